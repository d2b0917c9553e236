"""Whether Triton's kernels can be used here, asked without importing Triton.

On a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1 in the environment before attnpatch is imported),
which is for tests: it takes seconds for what a GPU does in microseconds.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
# The words that Triton takes for yes.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
TUNE_VARIABLE = "ATTNPATCH_TUNE"
USABLE = INSTALLED and (torch.cuda.is_available() or INTERPRETED)


def why_not_here() -> str | None:
    """Why no Triton kernel can be used in this process, or None."""
    if USABLE:
        return None
    return "there is no CUDA device" if INSTALLED else "Triton is not installed (pip install triton)"


def why_not_on(x: Tensor, what: str, least: tuple[int, int] = (8, 0), major: int | None = None) -> str | None:
    """Why kernels for GPUs of compute capability `least` and above (or of `major` alone) cannot take `x` (called
    `what` in the answer) for its device, or None."""
    if x.device.type != "cuda":
        return None if INTERPRETED and x.device.type == "cpu" else f"it runs on CUDA, and {what} is on {x.device}"
    found = torch.cuda.get_device_capability(x.device)
    if major is not None and (found[0] != major or torch.version.hip is not None):
        return f"it takes NVIDIA's GPUs of compute capability {major}.x, and this one has {found[0]}.{found[1]}"
    if found < least:
        wanted = f"{least[0]}.{least[1]} and above"
        return f"it takes GPUs of compute capability {wanted}, and this one has {found[0]}.{found[1]}"
    return None
