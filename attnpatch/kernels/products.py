"""Matrix products of tall and narrow matrices on a CPU, with what follows them elementwise."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpatch.environment import cpu_vendor
from attnpatch.kernels.compiled import VARIABLE

LEAKY_SLOPE = 0.01  # of F.leaky_relu
_LEAST = 16
"""Columns and summands from which oneDNN is taken: below, its layouts are mostly padding."""

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu_,
    "sigmoid": torch.sigmoid_,
    "leaky_relu": functools.partial(F.leaky_relu_, negative_slope=LEAKY_SLOPE),
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """then(x weight' + bias): [n, in] and [out, in] -> [n, out], in float32 by oneDNN where that is faster.

    No autograd: for passes that have their own.

    Args:
        then: "none", "relu", "sigmoid" or "leaky_relu". Another is a KeyError.
    """
    follow = _IN_PLACE[then]
    if x.dtype == torch.float32 and min(weight.shape) >= _LEAST and len(x):
        onednn = _onednn()
        if onednn is not None:
            # A bias it reads as if it were contiguous. Its relu makes 0 of NaN.
            bias = None if bias is None else bias.contiguous()
            fused = then if then != "relu" else "none"
            product: Tensor = onednn(x, weight, bias, fused, [LEAKY_SLOPE] if then == "leaky_relu" else [], "")
            return product if fused == then else follow(product)
    return follow(F.linear(x, weight, bias))


def why_not_onednn() -> str | None:
    """Why torch's own products (MKL) are taken, or None."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE} is 0"
    # MKL does not use AVX-512 on AMD's processors: 107 GFLOP/s of a core, oneDNN 247 (docs/performance.md).
    if cpu_vendor() != "AuthenticAMD" or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "MKL is as fast here"
    if not torch.backends.mkldnn.is_available() or operator() is None:
        return "this torch has no oneDNN"
    return None


def operator() -> Any:
    """torch's call of oneDNN's linear layer: torch.compile's own, not public, so it may be gone (None)."""
    return getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)


@functools.lru_cache
def _onednn() -> Any:
    """`operator` where it is to be used, or None."""
    return operator() if why_not_onednn() is None else None
