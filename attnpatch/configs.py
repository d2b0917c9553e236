"""patch_config: a config that makes every model built from it patched."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from attnpatch.errors import SpecError
from attnpatch.registry import family_for_model_type
from attnpatch.spec import AttentionSpec

C = TypeVar("C")


def patch_config(config: C, spec: Any, layers: Any = None, sites: Any = None, init: str | None = None) -> C:
    """A copy of a transformers config that carries a spec.

    `Model(config)` and `AutoModel.from_config(config)` then build the patched model from scratch, and
    `from_pretrained(stock_checkpoint, config=config)` converts the checkpoint's weights on the way.

    Args:
        config: of a supported model type. One that carries a spec already gets the new rules added.
        spec, layers, sites: as for `attnpatch.patch`.
        init: for weights that come from a stock checkpoint: "preserve" (default) or "paper".

    Raises:
        SpecError: a wrong spec. UnsupportedModelError: the model type has no family.
    """
    family = family_for_model_type(getattr(config, "model_type", ""))
    parsed = AttentionSpec.parse(spec, layers, sites, init).resolved(family)
    result = copy.deepcopy(config)
    if not parsed:
        return result
    if parsed.init == "calibrate":
        raise SpecError(
            "a config cannot hold the text that init='calibrate' needs: use attnpatch.convert(..., "
            "calibration_text=...), or attnpatch.patch(model, ..., calibration=...)"
        )
    had: Any = getattr(config, "attnpatch", None)
    if had:
        parsed = AttentionSpec.parse(AttentionSpec.from_dict(had).merged(parsed))
    _check(config, parsed)
    result.attnpatch = parsed.to_dict()  # type: ignore[attr-defined]
    return result


def _check(config: Any, spec: AttentionSpec) -> None:
    """Try the spec on a model without weights, so that a wrong layer or site is an error here and not later."""
    import torch
    from transformers import AutoModel

    from attnpatch.patching import check_spec

    stock = copy.deepcopy(config)
    if hasattr(stock, "attnpatch"):
        del stock.attnpatch
    with torch.device("meta"):
        model = AutoModel.from_config(stock)
    check_spec(model, spec)
