"""Score kernels in C: elementwise passes over blocks, and whole attention.

Whole attention (float32, no dropout) takes its matrix products from the MKL that torch is linked with; where there is
none, `attnpatch.kernels.score_blocked` goes from block to block with torch's products and the passes alone.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpatch.kernels.compiled import library, openmp

_FORWARD = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
_BACKWARD = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long)
KERNELS = ("expressive", "polynomial")


class _Tensor(ctypes.Structure):
    """`struct tensor` and `struct mask` of score_native.c."""

    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_long), ("head", ctypes.c_long), ("row", ctypes.c_long)]

    @classmethod
    def of(cls, x: Tensor) -> _Tensor:
        return cls(x.data_ptr(), *x.stride()[:3])

    @classmethod
    def mask(cls, keep: Tensor) -> _Tensor:
        """A dimension of one element is broadcast."""
        return cls(keep.data_ptr(), *(0 if keep.shape[i] == 1 else keep.stride(i) for i in range(3)))


_SIZES = ("n_batch", "n_heads", "n_queries", "n_keys", "head_dim", "value_dim")


class _Call(ctypes.Structure):
    """`struct call` of score_native.c."""

    _fields_ = [
        ("gemm", ctypes.c_void_p),
        *[(x, _Tensor) for x in ("query", "key", "value", "output", "grad", "dquery", "dkey", "dvalue", "keep")],
        ("sums", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        *[(x, ctypes.c_long) for x in ("threads", *_SIZES, "block_queries", "block_keys", "causal")],
        ("scale", ctypes.c_float),
        ("slope", ctypes.c_float),
    ]


class Native:
    """The compiled functions of one kernel, on contiguous float32 blocks."""

    def __init__(self, code: ctypes.CDLL, kernel: str) -> None:
        self._forward, self._backward = code[f"{kernel}_forward"], code[f"{kernel}_backward"]
        self._forward.argtypes, self._forward.restype = _FORWARD, None
        self._backward.argtypes, self._backward.restype = _BACKWARD, None
        self._attend, self._attend_backward = code[f"{kernel}_attend"], code[f"{kernel}_attend_backward"]
        for function in (self._attend, self._attend_backward):
            function.argtypes, function.restype = (ctypes.POINTER(_Call),), None

    @staticmethod
    def takes(*tensors: Tensor) -> bool:
        """Whether whole attention can read and write them: rows of float32 numbers that are next to each other."""
        return (
            products() is not None
            and (openmp() is not None or torch.get_num_threads() == 1)
            and all(
                x.dtype == torch.float32 and x.stride(-1) == 1 and x.shape[-1] <= x.stride(-2) < 2**31 for x in tensors
            )
        )

    def attend(self, tensors: dict[str, Tensor], sums: Tensor, keep: Tensor | None, **numbers: Any) -> None:
        """query, key, value -> output and sums, which are written. Shapes, mask and `numbers`: `struct call`.

        A row that sees no key is 0; where float32 cannot sum a row, it is left for the caller, who knows it by `sums`.
        """
        space = numbers["block_queries"] * numbers["block_keys"]
        self._run(self._attend, space, tensors, sums, keep, numbers)

    def attend_backward(self, tensors: dict[str, Tensor], sums: Tensor, keep: Tensor | None, **numbers: Any) -> None:
        """All these and grad -> dquery, dkey and dvalue, which are written. Rows with sums <= 0 add nothing."""
        widths = tensors["query"].shape[-1] + tensors["value"].shape[-1]
        space = numbers["block_queries"] * (2 * numbers["block_keys"] + widths + 1)
        self._run(self._attend_backward, space, tensors, sums, keep, numbers)

    @staticmethod
    def _run(
        function: Any,
        space: int,
        tensors: dict[str, Tensor],
        sums: Tensor,
        keep: Tensor | None,
        numbers: dict[str, Any],
    ) -> None:
        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        sizes = (*query.shape[:3], key.shape[2], query.shape[-1], value.shape[-1])
        threads = torch.get_num_threads() if openmp() else 1
        workspace = query.new_empty(space * threads)
        call = _Call(
            gemm=products(),
            sums=sums.data_ptr(),
            workspace=workspace.data_ptr(),
            threads=threads,
            **{name: _Tensor.of(x) for name, x in tensors.items()},
            **dict(zip(_SIZES, sizes, strict=True)),
            **numbers,
        )
        if keep is not None:
            seen = (keep if keep.stride(-1) == 1 else keep.contiguous()).view(torch.uint8)
            call.keep = _Tensor.mask(seen)
        function(ctypes.byref(call))

    def forward(self, z: Tensor, sums: Tensor) -> None:
        """z -> f(z), in place; `sums` gets the sums over the last dimension."""
        columns = z.shape[-1]
        self._forward(z.data_ptr(), sums.data_ptr(), z.numel() // columns, columns)

    def backward(self, z: Tensor, inner: Tensor) -> None:
        """z -> f(z) and inner -> inner * f'(z) without its constant factor, in place."""
        self._backward(z.data_ptr(), inner.data_ptr(), z.numel())


@functools.lru_cache
def native(kernel: str, degree: int, dtype: torch.dtype) -> Native | None:
    """The functions of a kernel, or None if torch has to make its passes."""
    if dtype != torch.float32 or kernel not in KERNELS or (kernel == "polynomial" and degree != 2):
        return None
    code = library("score_native")
    return None if isinstance(code, str) else Native(code, kernel)


@functools.lru_cache
def products() -> int | None:
    """The address of sgemm of the MKL that torch is linked with, if it is; others' threads do not go with ours."""
    if not torch.backends.mkl.is_available():
        return None
    try:
        torch_cpu = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        return ctypes.cast(torch_cpu.sgemm_, ctypes.c_void_p).value
    except (OSError, AttributeError, StopIteration):
        return None
