"""What a family is: where in a model's classes the stages of attention are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from attnpatch.errors import UnsupportedModelError

SITE_KINDS = ("encoder", "decoder", "cross")
"""Encoder self-attention, (causal) decoder self-attention, cross-attention."""

SiteRule = str | Callable[[nn.Module, str], str]


@dataclass(frozen=True)
class Family:
    """A group of transformers models with the same attention classes.

    Attributes:
        name: how attnpatch calls it ("bert").
        model_types: the `config.model_type`s it serves.
        attention_classes: full class name ("package.module.Class") -> the kind of site its instances are, or a
            function of (module, dotted path) that tells it.
        projections: role ("query", "key", "value", "output") -> attribute path of the linear layer, relative to
            the attention module; a leading "../" steps up to the module that holds it.
        num_heads, head_dim: names of the attention module's attributes.
        defaults: variant name -> option defaults that suit this family.
        first_position: config -> the position id of a sequence's first token.
    """

    name: str
    model_types: tuple[str, ...]
    attention_classes: Mapping[str, SiteRule]
    projections: Mapping[str, str]
    num_heads: str
    head_dim: str
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    first_position: Callable[[Any], int] = lambda config: 0

    def sites(self, model: nn.Module) -> Iterator[Site]:
        """Every attention module of `model` that belongs to this family, in the model's order."""
        for path, module in model.named_modules():
            rule = self._rule(module)
            if rule is None:
                continue
            kind = rule if isinstance(rule, str) else rule(module, path)
            yield Site(
                path=path,
                kind=kind,
                layer=_layer_of(path),
                family=self,
                num_heads=int(getattr(module, self.num_heads)),
                head_dim=int(getattr(module, self.head_dim)),
            )

    def projection_path(self, site_path: str, role: str) -> str:
        """Dotted path, from the model, of the linear layer that serves `role` at the site."""
        relative = self.projections[role]
        parts = site_path.split(".") if site_path else []
        while relative.startswith("../"):
            if not parts:
                raise UnsupportedModelError(
                    f"the {role} projection lies outside the module that was given; patch the whole model instead"
                )
            parts.pop()
            relative = relative[3:]
        return ".".join([*parts, relative])

    def _rule(self, module: nn.Module) -> SiteRule | None:
        # By name along the bases, so that no modelling file is imported to ask the question.
        for cls in type(module).__mro__:
            rule = self.attention_classes.get(f"{cls.__module__}.{cls.__qualname__}")
            if rule is not None:
                return rule
        return None


@dataclass(frozen=True)
class Site:
    """One attention module of a model: its dotted path, kind, layer number in its stack, and shape."""

    path: str
    kind: str
    layer: int
    family: Family
    num_heads: int
    head_dim: int

    @property
    def embed_dim(self) -> int:
        """Width of the concatenated heads."""
        return self.num_heads * self.head_dim


def _layer_of(path: str) -> int:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[-1]) if numbers else 0
