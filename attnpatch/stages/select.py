"""Stage 3, select: which keys stay. Stock: all of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attnpatch.kernels.score import aggregate
from attnpatch.stages.score import ScoreStage


class SelectStage(nn.Module):
    """Maps weights to sparser weights. Subclasses override `forward`, and `fused` where such a form exists."""

    def forward(self, weights: Tensor, value: Tensor) -> Tensor:
        """weights [B, H, T, S] and value [B, H, S, D] -> weights [B, H, T, S] whose rows sum to 1 (or are 0)."""
        return weights

    def fused(self) -> Callable[..., Tensor] | None:
        """Selection and sum in one, for scores that are a kernel: a function with `kernel_attention`'s arguments."""
        return None

    def attend(
        self,
        score: ScoreStage,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        """Output [B, H, T, D] in one go, for pipes whose aggregation is stock; arguments as `ScoreStage.attend`."""
        fused, form = self.fused(), score.kernel_form(scale)
        if fused is not None and form is not None:
            kernel, degree, factor = form
            return fused(query, key, value, attn_mask, dropout_p, is_causal, factor, kernel=kernel, degree=degree)
        weights = self(score.weights(query, key, attn_mask, is_causal, scale), value)
        return aggregate(weights, value, dropout_p, query.dtype)


class SelectAll(SelectStage):
    """The stock selection: every visible key stays."""

    def attend(
        self,
        score: ScoreStage,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        return score.attend(query, key, value, attn_mask, dropout_p, is_causal, scale)
