"""attnpatch: swap the attention of pretrained BERT, RoBERTa and Marian models for published variants.

    import attnpatch
    attnpatch.patch(model, "neural+alignment")                              # a model in memory
    AutoModel.from_pretrained(path, config=attnpatch.patch_config(config, "expressive"))
    attnpatch.convert("roberta-base", "roberta-neural", "neural")           # a checkpoint

Importing it teaches transformers to build and load patched models; stock models are left as they are.
Names are imported when first used, so that `import attnpatch` costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnpatch import _versions, integration

__version__ = _versions.ATTNPATCH

_versions.check_at_import()
integration.install()

_EXPORTS = {
    "AttentionSpec": "attnpatch.spec",
    "AttnpatchError": "attnpatch.errors",
    "PatchReport": "attnpatch.patch_report",
    "auxiliary_loss": "attnpatch.auxiliary",
    "convert": "attnpatch.checkpoint",
    "inspect": "attnpatch.checkpoint",
    "patch": "attnpatch.patching",
    "patch_config": "attnpatch.configs",
    "patched": "attnpatch.patching",
    "patched_modules": "attnpatch.patching",
    "register_family": "attnpatch.registry",
    "register_variant": "attnpatch.registry",
    "revert": "attnpatch.checkpoint",
    "unpatch": "attnpatch.patching",
    "verify": "attnpatch.verification",
}

__all__ = [*sorted(_EXPORTS), "functional", "variants"]

if TYPE_CHECKING:
    from attnpatch.auxiliary import auxiliary_loss
    from attnpatch.checkpoint import convert, inspect, revert
    from attnpatch.configs import patch_config
    from attnpatch.errors import AttnpatchError
    from attnpatch.patch_report import PatchReport
    from attnpatch.patching import patch, patched, patched_modules, unpatch
    from attnpatch.registry import register_family, register_variant
    from attnpatch.spec import AttentionSpec
    from attnpatch.verification import verify


def variants() -> tuple[str, ...]:
    """Names of all variants, in the order of the stages that they replace."""
    from attnpatch.registry import variants as registered

    return tuple(registered())


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("attnpatch.functional")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'attnpatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
