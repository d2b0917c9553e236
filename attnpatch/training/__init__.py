"""What the training scripts share: configs, distribution, the trainer, checkpoints and results."""
