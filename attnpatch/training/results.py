"""What a run leaves behind in results.json, so that its numbers can be read and compared later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from attnpatch.training.files import write_json

PACKAGES = ("torch", "transformers", "attnpatch", "accelerate", "datasets", "evaluate", "sacrebleu", "sentencepiece")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = str(getattr(sys.modules.get(name), "__version__", "not installed as a package"))
    return found


def machine() -> dict[str, Any]:
    """The hardware in words, without the host's name."""
    described: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": available_cpus(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": cpu_has_bf16(),
    }
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        described["cpu"] = names[0] if names else "unknown"
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
        described["gpus"] = torch.cuda.device_count()
    return described


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16). Without that, bf16 on CPU is
    emulated and several times slower than float32."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in checks if hasattr(torch.cpu, name))


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Numbers of parameters; tied ones count once, fixed position embeddings are not trainable."""
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def write_results(folder: str | Path, results: dict[str, Any]) -> Path:
    """Writes results.json, aside and renamed."""
    path = Path(folder) / "results.json"
    write_json(path, results)
    return path
