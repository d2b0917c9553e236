"""Trained language models with r keys for each query: how much sparse attention loses."""
