"""value_aware and top_r: sparse attention (Gupta & Berant, EMNLP 2021, arXiv 2103.09857)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnpatch.errors import PatchError
from attnpatch.families.base import Site
from attnpatch.kernels.select import top_r_attention, top_r_weights, value_aware_attention, value_aware_weights
from attnpatch.methods.base import StageVariant
from attnpatch.options import option
from attnpatch.registry import register_variant
from attnpatch.stages.select import SelectStage

PAPER = "Gupta & Berant, EMNLP 2021, arXiv 2103.09857"


class TopRSelection(SelectStage):
    """OVO-r: the r keys of largest weight, renormalised."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.r = r

    def forward(self, weights: Tensor, value: Tensor) -> Tensor:
        return top_r_weights(weights, self.r)

    def fused(self) -> Callable[..., Tensor] | None:
        return partial(top_r_attention, r=self.r)

    def extra_repr(self) -> str:
        return f"r={self.r}"


class _Oracle(torch.autograd.Function):
    """The optimum over supports has no useful gradient; asking for one is an error, and not a wrong number."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor, r: int, swaps: int) -> Tensor:
        return value_aware_weights(weights, value, r, selector="oracle", swaps=swaps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise PatchError(
            "value_aware with selector='oracle' is for inference and analysis: it needs the exact output and has no "
            "gradient. Train with selector='centered' or 'norm'"
        )


class ValueAwareSelection(SelectStage):
    """OVA-r (`oracle`), or the practical selectors `centered` and `norm`."""

    def __init__(self, r: int, selector: str, swaps: int) -> None:
        super().__init__()
        self.r = r
        self.selector = selector
        self.swaps = swaps

    def forward(self, weights: Tensor, value: Tensor) -> Tensor:
        if self.selector == "oracle":
            selected: Tensor = _Oracle.apply(weights, value, self.r, self.swaps)
            return selected
        return value_aware_weights(weights, value, self.r, selector=self.selector)

    def fused(self) -> Callable[..., Tensor] | None:
        if self.selector == "oracle":
            return None
        return partial(value_aware_attention, r=self.r, selector=self.selector)

    def extra_repr(self) -> str:
        return f"r={self.r}, selector={self.selector}"


def _positive(x: int) -> bool:
    return x >= 1


@dataclass(frozen=True)
class TopROptions:
    r: int = option(32, "keys kept for each query", check=_positive, rule="1 or more")


@dataclass(frozen=True)
class ValueAwareOptions:
    r: int | None = option(
        None,
        "keys kept for each query; none is head_dim + 1, at which the oracle is exact",
        check=_positive,
        rule="1 or more",
    )
    selector: str = option(
        "oracle",
        "oracle: the support and weights nearest to the exact output (inference only); centered, norm: the largest "
        "weight times distance of the value from the mean, or times its norm, renormalised",
        choices=("oracle", "centered", "norm"),
    )
    swaps: int = option(
        0,
        "rounds of swap improvement of the oracle's greedy support",
        check=lambda x: x >= 0,
        rule="0 or more",
    )


@register_variant
class TopR(StageVariant):
    """The optimum of the value-oblivious family."""

    name = "top_r"
    stage = "select"
    summary = "only the r keys of largest weight, renormalised"
    paper = PAPER
    Options = TopROptions

    def shows_at(self, options: TopROptions, site: Site) -> int:
        return options.r + 1

    def build(self, options: TopROptions, site: Site) -> TopRSelection:
        return TopRSelection(options.r)


@register_variant
class ValueAware(StageVariant):
    """The optimum of the value-aware family, or a practical selector that needs no oracle."""

    name = "value_aware"
    stage = "select"
    summary = "at most r keys, chosen and weighted by the output they give"
    paper = PAPER
    Options = ValueAwareOptions

    def shows_at(self, options: ValueAwareOptions, site: Site) -> int:
        # The oracle is exact from head_dim + 1 keys on: it shows nowhere, and is slow where it would be looked for.
        r = site.head_dim + 1 if options.r is None else options.r
        return 1 if options.selector == "oracle" and r > site.head_dim else r + 1

    def trains(self, options: ValueAwareOptions) -> bool:
        return options.selector != "oracle"

    def build(self, options: ValueAwareOptions, site: Site) -> ValueAwareSelection:
        r = site.head_dim + 1 if options.r is None else options.r
        return ValueAwareSelection(r, options.selector, options.swaps)
