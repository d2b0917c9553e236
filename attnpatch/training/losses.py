"""The loss per token of all trainers, and its perplexity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from attnpatch.training.batching import IGNORE


def token_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Sum over target tokens of the cross-entropy with labels smoothed by `smoothing` (uniform over the vocabulary).

    logits [B, T, V], labels [B, T] with -100 in padding; float32, unless the logits are float64.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")


def perplexity(loss: float) -> float:
    """exp(loss), of a mean negative log-likelihood; finite where a float can hold no more."""
    return math.exp(min(loss, 700))
