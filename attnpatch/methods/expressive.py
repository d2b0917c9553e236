"""expressive: a squared dot product in the place of softmax (Gros 2024, arXiv 2407.18601); polynomial and elu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnpatch.families.base import Site
from attnpatch.kernels.score import KERNELS, attention_weights, kernel_attention
from attnpatch.methods.base import StageVariant
from attnpatch.options import option
from attnpatch.registry import register_variant
from attnpatch.stages.score import ScoreStage


class KernelScore(ScoreStage):
    """Weights f(z) / sum f(z) of one kernel f, with z = scale * query . key."""

    def __init__(self, kernel: str, scale: float | None = None, degree: int = 2) -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ValueError(f"kernel is {kernel!r}; known: {', '.join(KERNELS)}")
        self.kernel = kernel
        self.scale = scale
        self.degree = degree

    def weights(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        kernel, degree, own = self.kernel_form(scale)
        return attention_weights(query, key, attn_mask, is_causal, own, kernel, degree)

    def kernel_form(self, scale: float) -> tuple[str, int, float]:
        return self.kernel, self.degree, scale if self.scale is None else self.scale

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
        kernel, degree, own = self.kernel_form(scale)
        return kernel_attention(query, key, value, attn_mask, dropout_p, is_causal, own, kernel=kernel, degree=degree)

    def extra_repr(self) -> str:
        return f"{self.kernel}, scale={'model' if self.scale is None else self.scale}"


def _scale() -> Any:
    return option(
        "model",
        'factor on query . key: a number (the paper\'s form is 1.0), or "model" for the 1/sqrt(head_dim) of the model',
        choices=("model",),
        check=lambda x: x > 0,
        rule='a positive number, or "model"',
    )


def _number(scale: str | float) -> float | None:
    return None if isinstance(scale, str) else float(scale)


@dataclass(frozen=True)
class KernelOptions:
    scale: str | float = _scale()


@dataclass(frozen=True)
class PolynomialOptions:
    scale: str | float = _scale()
    degree: int = option(2, "even exponent", check=lambda x: x >= 2 and x % 2 == 0, rule="an even number from 2")


@register_variant
class Expressive(StageVariant):
    """f(z) = z^2 / (1 + z^2): high for parallel and antiparallel query and key, low for orthogonal ones."""

    name = "expressive"
    stage = "score"
    summary = "weights z^2/(1+z^2) of the scaled dot product, normalised without an exponential"
    paper = "Gros 2024, arXiv 2407.18601"
    Options = KernelOptions

    def build(self, options: KernelOptions, site: Site) -> KernelScore:
        return KernelScore("expressive", _number(options.scale))


@register_variant
class Polynomial(StageVariant):
    """f(z) = z^degree, degree even."""

    name = "polynomial"
    stage = "score"
    summary = "weights z^2 (or a higher even power) of the scaled dot product"
    paper = "a kernel of Gupta & Berant 2021, arXiv 2103.09857"
    Options = PolynomialOptions

    def build(self, options: PolynomialOptions, site: Site) -> KernelScore:
        return KernelScore("polynomial", _number(options.scale), options.degree)


@register_variant
class Elu(StageVariant):
    """f(z) = elu(z) + 1."""

    name = "elu"
    stage = "score"
    summary = "weights elu(z)+1 of the scaled dot product"
    paper = "a kernel of Gupta & Berant 2021, arXiv 2103.09857"
    Options = KernelOptions

    def build(self, options: KernelOptions, site: Site) -> KernelScore:
        return KernelScore("elu", _number(options.scale))
