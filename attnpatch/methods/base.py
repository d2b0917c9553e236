"""What a variant is: a named choice for one stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from attnpatch.errors import SpecError
from attnpatch.families.base import SITE_KINDS, Site

INITS = ("preserve", "paper", "calibrate")
"""preserve: the function of the source checkpoint; paper: what the paper starts from; calibrate: preserve,
with the output layer of each new projection fitted on real activations."""


@dataclass(frozen=True)
class NoOptions:
    """For variants without options."""


class Variant:
    """Base of all variants; subclass `StageVariant` or `ProjectVariant`.

    Class attributes:
        name: as written in a spec. stage: the one stage it replaces. summary: one line for listings.
        paper: authors, year and identifier. Options: a frozen dataclass made of `attnpatch.options.option`.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    site_kinds: ClassVar[tuple[str, ...]] = SITE_KINDS
    """Sites the method is defined for; a rule that names no sites skips the others."""

    def check(self, options: Any) -> None:
        """Raise SpecError when options contradict each other."""

    def applies(self, options: Any, site: Site, explicit: bool) -> bool:
        """Whether a rule takes effect at `site`; `explicit` when the rule named its sites.

        Raises:
            SpecError: the rule asks for a site at which the method is not defined.
        """
        if site.kind in self.site_kinds:
            return True
        if explicit:
            raise SpecError(
                f"{self.name} is not defined for {site.kind} attention ({site.path}); "
                f"it can take the sites: {', '.join(self.site_kinds)}"
            )
        return False

    def shows_at(self, options: Any, site: Site) -> int:
        """Sequence length from which on the method can differ from the stock form; measurements are made beyond."""
        return 1

    def trains(self, options: Any) -> bool:
        """Whether gradients pass through it; False for what is for inference only."""
        return True

    def flops(self, options: Any, site: Site, tokens: int) -> int:
        """FLOPs (a multiplication and an addition are two) added to one forward pass over `tokens` tokens."""
        return 0


class StageVariant(Variant):
    """A variant of score, select, aggregate or regularise."""

    def build(self, options: Any, site: Site) -> nn.Module:
        """The stage module for one site, with its parameters in the paper's initialisation."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def preserve(self, module: nn.Module) -> None:
        """Set the parameters of `module` so that the function is the stock one, where the method allows it."""

    def preserves(self, options: Any) -> bool:
        """Whether `preserve` leaves the model's function exactly as it was."""
        return False


class ProjectVariant(Variant):
    """A variant of project: a module in the place of some of the four linear layers."""

    stage = "project"

    def roles(self, options: Any) -> tuple[str, ...]:
        """Which of query, key, value and output are replaced."""
        raise NotImplementedError(f"{type(self).__name__} must define roles()")

    def build(self, options: Any, in_features: int, out_features: int) -> nn.Module:
        """The module, [..., in_features] -> [..., out_features], in the paper's initialisation."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def build_for_preserve(self, options: Any, in_features: int, out_features: int) -> nn.Module:
        """As `build`, for a module whose parameters `preserve` sets: random numbers can be saved."""
        return self.build(options, in_features, out_features)

    def preserve(self, module: nn.Module, linear: nn.Linear, options: Any) -> None:
        """Set the parameters of `module` so that it computes what `linear` does, as far as the form allows."""
        raise NotImplementedError(f"{type(self).__name__} must define preserve()")

    def preserves(self, options: Any) -> bool:
        """Whether `preserve` is exact up to rounding."""
        return False

    def recover(self, module: nn.Module, options: Any, init: str) -> nn.Linear | None:
        """The stock layer that `preserve` was given, bit for bit, where `module` still shows it; None otherwise.

        `init` is how the module was initialised; a module that was trained since must give None.
        """
        return None

    def features(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """What the last linear layer of `module` reads, for calibration. [..., in] -> [..., width]."""
        raise SpecError(f"{self.name} has no layer that could be calibrated; use init='preserve'")

    def last_linear(self, module: nn.Module) -> nn.Linear:
        """The layer that calibration fits."""
        raise SpecError(f"{self.name} has no layer that could be calibrated; use init='preserve'")
