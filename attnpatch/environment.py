"""Versions and the machine: what `attnpatch env` shows, and what results and checkpoints record."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from attnpatch import _versions

LIBRARIES = ("transformers", "torch")
"""What a checkpoint depends on."""
PACKAGES = (
    *LIBRARIES,
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "datasets",
    "evaluate",
    "peft",
    "sacrebleu",
    "sentencepiece",
    "numpy",
)
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16")


def describe() -> dict[str, Any]:
    """What `attnpatch env` shows, as plain JSON types."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from attnpatch.kernels import dispatch
    from attnpatch.registry import families, variants

    found: dict[str, Any] = versions(())
    return {
        **found,
        "packages": {name: _version(name) for name in PACKAGES},
        "supported": {name: _window(low, high) for name, (low, high) in _versions.SUPPORTED.items()},
        "machine": machine(),
        "cuda": torch.version.cuda,
        "families": {name: list(family.model_types) for name, family in families().items()},
        "variants": {name: variant.stage for name, variant in variants().items()},
        "kernels": dispatch.describe(),
        "attention backends": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of attnpatch, of Python and of the packages that are installed."""
    found = {"attnpatch": _versions.ATTNPATCH, "python": platform.python_version()}
    return found | {name: version for name in packages if (version := _version(name)) is not None}


def code_commit() -> str | None:
    """The git commit of attnpatch's own checkout, with "+changes" where the package differs from it; None when it runs
    from no checkout, or without git."""
    package = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # An environment inside of another project's checkout is not at that project's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """The hardware in words, without the host's name."""
    import torch

    flags = (_cpu_line("flags") or "").split()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_line("model name") or "unknown",
        "cores": os.cpu_count(),
        "cpus": available_cpus(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": [flag for flag in _CPU_FLAGS if flag in flags],
        "bf16_instructions": cpu_has_bf16(),
        "memory_gb": _memory(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16). Without that, bf16 on CPU is
    emulated and several times slower than float32."""
    import torch

    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in checks if hasattr(torch.cpu, name))


def cpu_identity() -> str:
    """The processor's architecture, name and instruction sets: what code compiled for it depends on."""
    return "\n".join((platform.machine(), _cpu_line("model name") or platform.processor(), _cpu_line("flags") or ""))


def cpu_vendor() -> str | None:
    """As the processor names it, "GenuineIntel" or "AuthenticAMD"; None where that is not known."""
    return _cpu_line("vendor_id")


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
