"""Stage 4, aggregate: weights and values -> output. Stock: the weighted sum of the values."""

from __future__ import annotations

from torch import Tensor, nn

from attnpatch.kernels.score import aggregate


class AggregateStage(nn.Module):
    """Sums values under weights. Subclasses override `forward`."""

    bidirectional = False
    """Whether outputs depend on other queries, so that every query must be allowed to see the same keys."""

    def forward(self, query: Tensor, weights: Tensor, value: Tensor, query_valid: Tensor | None) -> Tensor:
        """query [B, H, T, D], weights [B, H, T, S], value [B, H, S, D] -> output [B, H, T, D].

        `query_valid` [B, T] marks the queries that are no padding (None: all of them).
        """
        return aggregate(weights, value)


class WeightedSum(AggregateStage):
    """The stock aggregation: sum_j a_ij v_j."""
