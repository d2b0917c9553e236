"""alignment: a training loss that matches keys and queries (Zhang et al., NeurIPS 2021, arXiv 2110.12567)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnpatch.families.base import Site
from attnpatch.kernels.alignment import alignment_loss
from attnpatch.kernels.alignment_networks import Critic, Discriminator, Navigator
from attnpatch.methods.base import StageVariant
from attnpatch.options import option
from attnpatch.registry import register_variant
from attnpatch.stages.regularise import RegulariseStage


class AlignmentLoss(RegulariseStage):
    """The loss of one attention layer, with its networks: discriminator (gan), navigator and critic (ct)."""

    def __init__(self, head_dim: int, method: str, weight: float, hidden: int, eps: float) -> None:
        super().__init__()
        self.method = method
        self.weight = weight
        self.eps = eps
        self.navigator = Navigator(head_dim, hidden) if method == "ct" else None
        self.critic = Critic(head_dim, hidden) if method == "ct" else None
        self.discriminator = Discriminator(head_dim, hidden) if method == "gan" else None

    def forward(self, query: Tensor, key: Tensor, key_valid: Tensor | None) -> Tensor:
        padding = None if key_valid is None else ~key_valid
        return alignment_loss(
            query,
            key,
            padding,
            self.method,
            navigator=self.navigator,
            critic=self.critic,
            discriminator=self.discriminator,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"method={self.method}, weight={self.weight}"


@dataclass(frozen=True)
class AlignmentOptions:
    method: str = option(
        "ct",
        "ct: conditional transport; gan: a discriminator; ot: entropic optimal transport; mmd: kernel discrepancy",
        choices=("ct", "gan", "ot", "mmd"),
    )
    weight: float = option(0.01, "lambda, the loss's weight in each layer", check=lambda x: x >= 0, rule="zero or more")
    hidden: int | None = option(
        None, "width of the networks; none is head_dim", check=lambda x: x >= 1, rule="1 or more"
    )
    eps: float = option(0.01, "entropic regularisation of ot", check=lambda x: x > 0, rule="more than zero")


@register_variant
class Alignment(StageVariant):
    """Key and query distributions matched within each head, in self-attention, in training only."""

    name = "alignment"
    stage = "regularise"
    summary = "a training loss that matches the distributions of keys and queries"
    paper = "Zhang, Fan, Zheng, Tanwisuth & Zhou, NeurIPS 2021, arXiv 2110.12567"
    Options = AlignmentOptions
    site_kinds = ("encoder", "decoder")

    def build(self, options: AlignmentOptions, site: Site) -> AlignmentLoss:
        hidden = site.head_dim if options.hidden is None else options.hidden
        return AlignmentLoss(site.head_dim, options.method, options.weight, hidden, options.eps)

    def preserves(self, options: AlignmentOptions) -> bool:
        return True
