"""Stage 2, score: query and key -> attention weights. Stock: softmax of the scaled dot product."""

from __future__ import annotations

from torch import Tensor, nn

from attnpatch.kernels.score import aggregate, attention_weights


class ScoreStage(nn.Module):
    """Turns scores into weights. Subclasses give `weights`, and `attend` where a fused form exists."""

    def weights(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        """Normalised weights [B, H, T, S] of query [B, H, T, D] over key [B, H, S, D].

        `attn_mask` broadcasts to [B, H, T, S]: bool (True attends) or float (added in score space).
        A row that sees no key is all zeros.
        """
        raise NotImplementedError(f"{type(self).__name__} must define weights()")

    def kernel_form(self, scale: float) -> tuple[str, int, float] | None:
        """Kernel, degree and scale with which `attention_weights` gives `weights`; None where it does not."""
        return None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        """Output [B, H, T, D] in one go, for pipes whose later stages are stock."""
        weights = self.weights(query, key, attn_mask, is_causal, scale)
        return aggregate(weights, value, dropout_p, query.dtype)


class SoftmaxScore(ScoreStage):
    """The stock score: softmax(scale * query . key + mask)."""

    def weights(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        return attention_weights(query, key, attn_mask, is_causal, scale, kernel="softmax")

    def kernel_form(self, scale: float) -> tuple[str, int, float] | None:
        return ("softmax", 2, scale) if type(self) is SoftmaxScore else None
