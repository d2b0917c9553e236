"""query_value: values made query-aware by a gate (Wu et al. 2020, arXiv 2010.03766), a reconstruction.

The paper's structure is known, its exact functions are not: see docs/methods.md for what is reconstructed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnpatch.errors import SpecError
from attnpatch.families.base import Site
from attnpatch.kernels.query_value import pairwise_aggregate, pooled_aggregate, query_gated_aggregate
from attnpatch.methods.base import StageVariant
from attnpatch.options import option
from attnpatch.registry import register_variant
from attnpatch.stages.aggregate import AggregateStage

GATE_BIAS = -4.0
STD = 0.02


class QueryValueSum(AggregateStage):
    """sum_j a_ij [g_ij u_ij + (1 - g_ij) v_j]; one set of D x D weights for each head.

    Parameters: gate_query, gate_value [H, D, D], gate_bias [H, D], strength [H] in front of the gate, and for
    phi = tanh phi_query, phi_value [H, D, D], phi_bias [H, D]; for additive pooling pool_query [H, D].
    """

    def __init__(self, num_heads: int, head_dim: int, gate: str, phi: str, pooling: str) -> None:
        super().__init__()
        self.gate, self.phi, self.pooling = gate, phi, pooling
        self.bidirectional = gate == "pooled"
        square, row = (num_heads, head_dim, head_dim), (num_heads, head_dim)
        self.gate_query = nn.Parameter(torch.empty(square))
        self.gate_value = nn.Parameter(torch.empty(square)) if gate != "query" else None
        self.gate_bias = nn.Parameter(torch.empty(row))
        self.strength = nn.Parameter(torch.empty(num_heads))
        with_phi = phi == "tanh"
        self.phi_query = nn.Parameter(torch.empty(square)) if with_phi else None
        self.phi_value = nn.Parameter(torch.empty(square)) if with_phi else None
        self.phi_bias = nn.Parameter(torch.empty(row)) if with_phi else None
        pooled = gate == "pooled" and pooling == "additive"
        self.pool_query = nn.Parameter(torch.empty(row)) if pooled else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gate nearly shut (bias -4, strength 1), all other weights N(0, 0.02)."""
        for name, parameter in self.named_parameters():
            if name == "gate_bias":
                nn.init.constant_(parameter, GATE_BIAS)
            elif name == "strength":
                nn.init.ones_(parameter)
            elif name == "phi_bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=STD)

    def forward(self, query: Tensor, weights: Tensor, value: Tensor, query_valid: Tensor | None) -> Tensor:
        if self.gate_value is None:
            return query_gated_aggregate(query, weights, value, self.gate_query, self.gate_bias, self.strength)
        shared = (self.gate_query, self.gate_value, self.gate_bias, self.strength)
        phi = (self.phi, self.phi_query, self.phi_value, self.phi_bias)
        if self.gate == "pairwise":
            return pairwise_aggregate(query, weights, value, *shared, *phi)
        return pooled_aggregate(
            query,
            weights,
            value,
            *shared,
            *phi,
            query_valid=query_valid,
            pooling=self.pooling,
            pool_query=self.pool_query,
        )

    def extra_repr(self) -> str:
        return f"gate={self.gate}, phi={self.phi}"


@dataclass(frozen=True)
class QueryValueOptions:
    gate: str = option(
        "pairwise",
        "pairwise: a gate and a value for each query and key; query: a gate of the query alone, at no cost; pooled: "
        "queries mixed for each key, for bidirectional sites",
        choices=("pairwise", "query", "pooled"),
    )
    phi: str = option(
        "product",
        "how query and value meet: their element-wise product, or tanh of their weighted sum",
        choices=("product", "tanh"),
    )
    pooling: str = option(
        "attention",
        "for gate=pooled: how queries are mixed, by the attention weights or by a learned additive pooling",
        choices=("attention", "additive"),
    )


@register_variant
class QueryValue(StageVariant):
    """Query-aware values, gated against the original ones, summed under the ordinary weights."""

    name = "query_value"
    stage = "aggregate"
    summary = "values that depend on the query, through a learned gate (reconstruction)"
    paper = "Wu, Wu, Qi & Huang 2020, arXiv 2010.03766"
    Options = QueryValueOptions

    def check(self, options: QueryValueOptions) -> None:
        if options.gate == "query" and options.phi != "product":
            raise SpecError("query_value.gate='query' has a closed form for phi='product' only; use gate='pairwise'")
        if options.gate != "pooled" and options.pooling != "attention":
            raise SpecError("query_value.pooling belongs to gate='pooled'")

    def applies(self, options: QueryValueOptions, site: Site, explicit: bool) -> bool:
        if options.gate == "pooled" and site.kind != "encoder":
            raise SpecError(
                f"query_value.gate='pooled' mixes all queries, which at {site.path} ({site.kind}) would show later "
                "target tokens to earlier ones; use gate='pairwise' there, or sites='encoder'"
            )
        return super().applies(options, site, explicit)

    def build(self, options: QueryValueOptions, site: Site) -> QueryValueSum:
        return QueryValueSum(site.num_heads, site.head_dim, options.gate, options.phi, options.pooling)

    def preserve(self, module: nn.Module) -> None:
        """A gate that is exactly 0: the function is the stock one until the strength is trained."""
        if isinstance(module, QueryValueSum):
            nn.init.zeros_(module.strength)

    def preserves(self, options: QueryValueOptions) -> bool:
        return True

    def flops(self, options: QueryValueOptions, site: Site, tokens: int) -> int:
        squares = {"pairwise": 2, "query": 1, "pooled": 2}[options.gate] + (2 if options.phi == "tanh" else 0)
        linear = 2 * squares * tokens * site.num_heads * site.head_dim**2
        # Gate, interaction, difference and sum: about eight operations for each element.
        elements = tokens * tokens if options.gate == "pairwise" else tokens
        return linear + 8 * elements * site.embed_dim
