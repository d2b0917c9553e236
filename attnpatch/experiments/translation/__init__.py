"""Marian fine-tuned or trained from scratch on parallel text: the translation study of neural attention."""
