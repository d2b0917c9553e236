"""Whether torch records or watches a call, so that it has to be made of operators that torch knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_recorded(*tensors: Any) -> bool:
    """True under torch.compile, torch.jit's tracing, exports and dispatch modes, and for tensors of other classes (fake
    ones); of `tensors` any may be None. Code that reads memory by itself would be left out of a record.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(x) not in (Tensor, torch.nn.Parameter, type(None)) for x in tensors)
    )
