"""Matrix products of tall and narrow float32 matrices on a CPU, with what follows them elementwise."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpatch.environment import cpu_vendor

LEAKY_SLOPE = 0.01  # of F.leaky_relu
_LEAST = 16
"""Columns and summands from which oneDNN is taken."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """then(x weight' + bias): [n, in] and [out, in] -> [n, out]. `then`: "none", "relu", "sigmoid" or "leaky_relu".

    No autograd: for passes that have their own.
    """
    onednn = _onednn() if x.dtype == torch.float32 and min(weight.shape) >= _LEAST and len(x) else None
    if onednn is not None:
        product: Tensor = onednn(x, weight, bias, then, [LEAKY_SLOPE] if then == "leaky_relu" else [], "")
        return product
    product = F.linear(x, weight, bias)
    if then == "relu":
        return product.relu_()
    if then == "sigmoid":
        return product.sigmoid_()
    return F.leaky_relu_(product, LEAKY_SLOPE) if then == "leaky_relu" else product


@functools.lru_cache
def _onednn() -> Any:
    """torch's call of oneDNN's linear layer where it pays, or None.

    MKL, which torch multiplies by, does not use AVX-512 on AMD's processors: there oneDNN is 2.3 times as fast
    (247 and 107 GFLOP/s of a core, docs/performance.md), and what follows is done while the result is in registers.
    """
    if cpu_vendor() != "AuthenticAMD" or not torch.backends.mkldnn.is_available():
        return None
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None
    # Of torch.compile's own, not public: it may be gone.
    return getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)
