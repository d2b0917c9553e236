"""Stage 3, select: which keys stay. Stock: all of them."""

from __future__ import annotations

from torch import Tensor, nn


class SelectStage(nn.Module):
    """Maps weights to sparser weights. Subclasses override `forward`."""

    def forward(self, weights: Tensor, value: Tensor) -> Tensor:
        """weights [B, H, T, S] and value [B, H, S, D] -> weights [B, H, T, S] whose rows sum to 1 (or are 0)."""
        return weights


class SelectAll(SelectStage):
    """The stock selection: every visible key stays."""
