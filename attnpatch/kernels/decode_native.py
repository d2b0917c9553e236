"""Attention of single queries on the CPU, in C: a step of generation.

torch's fused softmax kernel is made for blocks of queries. With one for each row it takes several times as long as
reading the keys and values does, most of all in bfloat16 (docs/performance.md, "One layer, and generating"). The other
score kernels would be some ten passes of torch over as few numbers.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnpatch.kernels.compiled import library, openmp
from attnpatch.kernels.recorded import is_recorded

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_KERNELS = ("softmax", "expressive", "polynomial", "elu")  # `enum kernel` of decode_native.c
_FEW = 2**16
"""Multiplications up to which another thread would not be awake before they are done."""


class _Tensor(ctypes.Structure):
    """`struct tensor` of decode_native.c."""

    _fields_ = [("data", ctypes.c_void_p), *[(x, ctypes.c_long) for x in ("row", "head", "position")]]


class _Mask(ctypes.Structure):
    """`struct mask` of decode_native.c."""

    _fields_ = [("data", ctypes.c_void_p), ("row", ctypes.c_long), ("position", ctypes.c_long)]


_SIZES = ("n_rows", "n_heads", "n_keys", "head_dim", "value_dim", "rows_per_key_row")


class _Call(ctypes.Structure):
    """`struct call` of decode_native.c."""

    _fields_ = [
        *[(x, _Tensor) for x in ("query", "key", "value")],
        ("mask", _Mask),
        ("output", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        *[(x, ctypes.c_long) for x in ("threads", "space", *_SIZES, "kernel", "degree")],
        ("scale", ctypes.c_float),
    ]


def why_not(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """Why `decode_attention` cannot serve a call, or None if it can.

    Raises:
        SpecError: ATTNPATCH_NATIVE has no such value.
    """
    tensors = (query, key, value)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if is_recorded(*tensors, mask) or transformed:
        return "torch.compile, torch.jit, dispatch modes, torch.func and forward-mode derivatives cannot look into it"
    if query.dim() != 4 or query.shape[2] != 1:
        return "it takes one query for each row"
    if any(x.device.type != "cpu" for x in tensors):
        return "it takes tensors on the CPU"
    if query.dtype not in _DTYPES or any(x.dtype != query.dtype for x in tensors):
        return f"it takes float32 or bfloat16, not {query.dtype}, {key.dtype} and {value.dtype}"
    fit = query.shape[1:4:2] == key.shape[1:4:2] and key.shape[:3] == value.shape[:3] and key.numel() > 0
    if not fit or query.shape[0] % key.shape[0]:
        return f"shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)} do not fit"
    if any(x.stride(-1) != 1 or x.is_neg() or x._is_zerotensor() for x in tensors):
        return "features have to be next to each other, as they are"
    if mask is not None:
        shape = mask.shape
        if mask.dtype != torch.bool or len(shape) != 4 or shape[0] not in (1, len(key)) or shape[1:3] != (1, 1):
            return "it takes masks of keys, bool [1 or R, 1, 1, S]"
        if shape[3] != key.shape[2] or mask.device.type != "cpu":
            return f"a mask {tuple(shape)} on {mask.device} does not fit"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "it has no gradient"
    reason = library("decode_native")
    return reason if isinstance(reason, str) else None


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    kernel: str = "softmax",
    degree: int = 2,
) -> Tensor | None:
    """Output [R, H, 1, Dv] in the query's dtype, computed in float32.

    It checks nothing: for arguments that `why_not` has an objection to it would read foreign memory.

    Args:
        query: [R, H, 1, D], float32 or bfloat16.
        key, value: [R / n, H, S, D] and [R / n, H, S, Dv]; each row serves n rows of queries that follow each other.
        mask: None or bool [1 or R / n, 1, 1, S], True where a key may be seen. A row that sees none is 0.
        scale: multiplies the scores.
        kernel, degree: as in `attnpatch.kernels.score.kernel_attention`.

    Returns:
        None if float32 cannot sum the weights of a row as they are, which softmax never comes to.
    """
    rows, heads, _, head_dim = query.shape
    output = query.new_empty(rows, heads, 1, value.shape[-1])
    parallel = openmp() is not None and rows * heads * key.shape[2] * head_dim > _FEW
    threads = torch.get_num_threads() if parallel else 1
    space = heads * (key.shape[2] + head_dim + value.shape[-1] + 3)
    workspace = query.new_empty(threads * space, dtype=torch.float32)
    sizes = (rows, heads, key.shape[2], head_dim, value.shape[-1], rows // len(key))
    given = {"query": query, "key": key, "value": value}
    call = _Call(
        **{name: _Tensor(x.data_ptr(), *x.stride()[:3]) for name, x in given.items()},
        output=output.data_ptr(),
        workspace=workspace.data_ptr(),
        threads=threads,
        space=space,
        kernel=_KERNELS.index(kernel),
        degree=degree,
        scale=scale,
        **dict(zip(_SIZES, sizes, strict=True)),
    )
    if mask is not None:
        call.mask = _Mask(mask.data_ptr(), mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(3))
    return output if _function(query.dtype)(ctypes.byref(call)) else None


@functools.lru_cache
def _function(dtype: torch.dtype) -> Any:
    """`NAME_attend` of decode_native.c: 1 if all rows are done."""
    code: Any = library("decode_native")
    attend = code[f"{_DTYPES[dtype]}_attend"]
    attend.argtypes, attend.restype = (ctypes.POINTER(_Call),), ctypes.c_int
    return attend
