"""Masked and causal language models of RoBERTa and BERT: the perplexity study of neural attention."""
