"""What `attnpatch env` shows: versions, the machine, and what is registered."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from attnpatch import _versions

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "datasets",
    "peft",
    "sacrebleu",
    "sentencepiece",
    "numpy",
)
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16")


def describe() -> dict[str, Any]:
    """Plain JSON types."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from attnpatch.registry import families, variants

    return {
        "attnpatch": _versions.ATTNPATCH,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "supported": {name: _window(low, high) for name, (low, high) in _versions.SUPPORTED.items()},
        "cpu": {
            "model": _cpu_line("model name"),
            "cores": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
            "features": [flag for flag in _CPU_FLAGS if flag in (_cpu_line("flags") or "").split()],
            "memory (GB)": _memory(),
        },
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or None,
        "cuda": torch.version.cuda,
        "families": {name: list(family.model_types) for name, family in families().items()},
        "variants": {name: variant.stage for name, variant in variants().items()},
        "attention backends": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _window(low: tuple[int, ...], high: tuple[int, ...] | None) -> str:
    return f">= {'.'.join(map(str, low))}" + (f", < {'.'.join(map(str, high))}" if high else "")


def _cpu_line(key: str) -> str | None:
    """A line of /proc/cpuinfo; None where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None
