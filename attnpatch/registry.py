"""Variants and families by name. Adding one is one file with one registration; an unknown name gets the nearest."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from attnpatch.errors import SpecError, UnsupportedModelError, unknown
from attnpatch.stages import STAGES

if TYPE_CHECKING:
    from torch import nn

    from attnpatch.families.base import Family, Site
    from attnpatch.methods.base import Variant

V = TypeVar("V", bound="type[Variant]")

_variants: dict[str, Variant] = {}
_families: dict[str, Family] = {}


def register_variant(variant: V) -> V:
    """Make a `Variant` subclass known under its `name`; usable as a class decorator.

    Raises:
        SpecError: a name that is taken or cannot be written in a spec, or a stage that does not exist.
    """
    name = variant.name
    if not name.replace("_", "").isalnum() or name == "stock":
        raise SpecError(f"a variant cannot be called {name!r}: letters, digits and _ only, and not 'stock'")
    if variant.stage not in STAGES:
        raise SpecError(f"variant {name!r}: {unknown('stage', variant.stage, STAGES)}")
    if name in _variants:
        taken = type(_variants[name])
        raise SpecError(f"variant {name!r} is registered already, by {taken.__module__}.{taken.__qualname__}")
    if not dataclasses.is_dataclass(variant.Options):
        raise SpecError(f"variant {name!r}: Options must be a dataclass")
    _variants[name] = variant()
    return variant


def register_family(family: Family) -> Family:
    """Make a family known under its name and model types; returns it.

    Raises:
        SpecError: the name or one of its model types is taken.
    """
    if family.name in _families:
        raise SpecError(f"family {family.name!r} is registered already")
    for other in _families.values():
        shared = set(other.model_types) & set(family.model_types)
        if shared:
            raise SpecError(f"family {family.name!r}: model type {shared.pop()!r} belongs to family {other.name!r}")
    _families[family.name] = family
    return family


def variants() -> dict[str, Variant]:
    """All variants by name, in the order of the stages they replace."""
    importlib.import_module("attnpatch.methods")
    return dict(sorted(_variants.items(), key=lambda item: STAGES.index(item[1].stage)))


def families() -> dict[str, Family]:
    """All families by name."""
    importlib.import_module("attnpatch.families")
    return dict(_families)


def get_variant(name: str) -> Variant:
    """The variant called `name`.

    Raises:
        SpecError: there is none; says what is known and what is nearest.
    """
    known = variants()
    if name not in known:
        raise SpecError(unknown("variant", name, known))
    return known[name]


def import_plugin(name: str) -> None:
    """Import the module `name`, which registers families or variants, from the working directory or as installed.

    Raises:
        SpecError: it cannot be imported.
    """
    if name.endswith(".py") or "/" in name or os.sep in name:
        module = ".".join(Path(name).with_suffix("").parts)
        raise SpecError(
            f"plugin {name!r} is a file, and a module is wanted, without folder and .py: --plugin {module}, from the "
            "folder in which its file or package lies"
        )
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise SpecError(f"plugin {name!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(here)


def family_for_model_type(model_type: str) -> Family:
    """The family that serves `config.model_type`.

    Raises:
        UnsupportedModelError: none does.
    """
    types = {t: family for family in families().values() for t in family.model_types}
    if model_type not in types:
        raise UnsupportedModelError(
            f"{unknown('model type', model_type, types)}. attnpatch.register_family adds one (see docs/extending.md)"
        )
    return types[model_type]


def find_sites(model: nn.Module) -> list[Site]:
    """Every attention module in `model` that some family knows.

    Raises:
        UnsupportedModelError: there is none.
    """
    sites = [site for family in families().values() for site in family.sites(model)]
    if not sites:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        what = f" (model_type {model_type!r})" if model_type else ""
        raise UnsupportedModelError(
            f"{type(model).__name__}{what} has no attention that attnpatch can rewrite; it knows: "
            f"{', '.join(families())}. attnpatch.register_family adds one (see docs/extending.md)"
        )
    return sites
