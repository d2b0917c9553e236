"""What a patched attention module carries: its stages, and the order in which they run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnpatch.errors import PatchError
from attnpatch.kernels.query_value import differs_by_query
from attnpatch.kernels.score import EXCLUDED
from attnpatch.stages.aggregate import AggregateStage, WeightedSum
from attnpatch.stages.regularise import LossSlot, RegulariseStage
from attnpatch.stages.score import ScoreStage, SoftmaxScore
from attnpatch.stages.select import SelectAll, SelectStage

CORE_STAGES = ("score", "select", "aggregate", "regularise")
"""The stages that happen inside the attention function, between projecting and merging the heads."""


class AttentionPipeline(nn.Module):
    """score -> select -> aggregate, with regularise beside them. Stock until a stage is set.

    It hangs in its attention module as `attnpatch`, so that its parameters are trained, moved and saved with it.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.score: ScoreStage = SoftmaxScore()
        self.select: SelectStage = SelectAll()
        self.aggregate: AggregateStage = WeightedSum()
        self.regularise: RegulariseStage | None = None
        self.slot = LossSlot()
        self.query_valid: Tensor | None = None

    def set_stage(self, stage: str, module: nn.Module | None) -> None:
        """Put a stage's module in place, or its stock form for None."""
        if module is None:
            stock = {"score": SoftmaxScore, "select": SelectAll, "aggregate": WeightedSum}
            module = stock[stage]() if stage in stock else None
        setattr(self, stage, module)

    @property
    def is_stock(self) -> bool:
        """Whether no stage is replaced."""
        return self.has_stock_core and self.regularise is None

    @property
    def has_stock_core(self) -> bool:
        """Whether the output is computed as in the stock model."""
        return (
            type(self.score) is SoftmaxScore and type(self.select) is SelectAll and type(self.aggregate) is WeightedSum
        )

    def add_loss(self, query: Tensor, key: Tensor, attn_mask: Tensor | None) -> None:
        """In training, leave the weighted loss of this forward pass in the slot."""
        if self.regularise is None or not self.training:
            return
        valid = valid_keys(attn_mask, key.shape[0])
        if self.query_valid is not None and self.query_valid.shape == (key.shape[0], key.shape[2]):
            valid = self.query_valid if valid is None else valid & self.query_valid
        loss = self.regularise.weight * self.regularise(query, key, valid)
        if query.requires_grad and not loss.requires_grad:
            raise PatchError(f"{type(self.regularise).__name__} gives a loss without a gradient")
        self.slot.loss = loss

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, H, T, D], key and value [B, H, S, D] -> output [B, H, T, D] and, if asked for, weights."""
        if type(self.aggregate) is WeightedSum and not need_weights:
            output = self.select.attend(self.score, query, key, value, attn_mask, dropout_p, is_causal, scale)
            return output, None
        if self.aggregate.bidirectional and (is_causal or (attn_mask is not None and differs_by_query(attn_mask))):
            raise PatchError(
                f"{self.aggregate} mixes all queries, and this mask shows some of them less than others: what it hides "
                "would leak. Use query_value.gate='pairwise'"
            )
        weights = self.score.weights(query, key, attn_mask, is_causal, scale)
        weights = self.select(weights, value)
        # As in transformers, the weights that are returned are those that were used, dropout included.
        if dropout_p > 0.0:
            weights = F.dropout(weights, dropout_p)
        query_valid = valid_keys(attn_mask, key.shape[0]) if self.kind != "cross" else None
        output = self.aggregate(query, weights, value, query_valid).to(query.dtype)
        return output, weights.to(query.dtype) if need_weights else None

    def extra_repr(self) -> str:
        return f"kind={self.kind}"


def valid_keys(attn_mask: Tensor | None, batch: int) -> Tensor | None:
    """Keys that some query may see, [B, S]: what is left out everywhere is padding. None when all are seen."""
    if attn_mask is None:
        return None
    seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > EXCLUDED
    return seen.any(dim=2).any(dim=1).expand(batch, -1)


def pipeline_of(module: nn.Module) -> AttentionPipeline | None:
    """The pipeline that a patched attention module carries."""
    pipeline: Any = module._modules.get("attnpatch")
    return pipeline if isinstance(pipeline, AttentionPipeline) else None
