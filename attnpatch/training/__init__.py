"""What the training scripts share: configs, data, tokenizers, batches, metrics, the trainer and its results."""
