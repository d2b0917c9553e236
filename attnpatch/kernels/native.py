"""Score kernels in C, where the machine has a C compiler: elementwise passes over blocks, and whole attention.

Whole attention (float32, no dropout) takes its matrix products from the MKL that torch is linked with; where there is
none, `attnpatch.kernels.blocked` goes from block to block with torch's products and the passes alone.

native.c is compiled when first wanted, in 0.1 s of processor time, and kept in the user's cache for this processor and
compiler. Without a compiler, on a failure, or with ATTNPATCH_NATIVE=0, torch makes the passes; the results differ by
rounding. ctypes and not torch's extensions: none of torch's headers is read.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpatch.environment import cpu_identity
from attnpatch.errors import SpecError, one_line

VARIABLE = "ATTNPATCH_NATIVE"
SOURCE = Path(__file__).with_name("native.c")
# Elsewhere than on x86 the processor's identity, which the cache goes by, says too little for -march=native.
_TUNED = ("-march=native", "-mprefer-vector-width=512") if platform.machine() in ("x86_64", "AMD64") else ()
COMPILE = ("-O3", *_TUNED, "-ffast-math", "-fPIC", "-c")
TIMEOUT = 60.0

_FORWARD = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
_BACKWARD = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long)
KERNELS = ("expressive", "polynomial")


class _Tensor(ctypes.Structure):
    """`struct tensor` and `struct mask` of native.c."""

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
    """`struct call` of native.c."""

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

    def __init__(self, library: ctypes.CDLL, kernel: str) -> None:
        self._forward, self._backward = library[f"{kernel}_forward"], library[f"{kernel}_backward"]
        self._forward.argtypes, self._forward.restype = _FORWARD, None
        self._backward.argtypes, self._backward.restype = _BACKWARD, None
        self._attend, self._attend_backward = library[f"{kernel}_attend"], library[f"{kernel}_attend_backward"]
        for function in (self._attend, self._attend_backward):
            function.argtypes, function.restype = (ctypes.POINTER(_Call),), None

    @staticmethod
    def takes(*tensors: Tensor) -> bool:
        """Whether whole attention can read and write them: rows of float32 numbers that are next to each other."""
        return (
            products() is not None
            and (_openmp() is not None or torch.get_num_threads() == 1)
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
        rows = numbers["block_queries"]
        space = rows * (2 * numbers["block_keys"] + tensors["value"].shape[-1] + 1)
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
        threads = torch.get_num_threads() if _openmp() else 1
        workspace = torch.empty(space * threads, dtype=torch.float32)
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
    library = _library()
    return None if isinstance(library, str) else Native(library, kernel)


def why_not() -> str | None:
    """Why there are no compiled passes, with the compiler's error if it failed, or None. Compiles them if need be.

    Raises:
        SpecError: as `unwanted`.
    """
    library = _library()
    return library if isinstance(library, str) else None


def unwanted() -> str | None:
    """Why compiling is not tried, or None.

    Raises:
        SpecError: ATTNPATCH_NATIVE is neither 0 nor 1.
    """
    wanted = os.environ.get(VARIABLE) or "1"
    if wanted not in ("0", "1"):
        raise SpecError(f"{VARIABLE} is {wanted!r}; it takes 1 (the default: a loop in C, compiled once) or 0 (torch)")
    if wanted == "0":
        return f"{VARIABLE} is 0"
    if os.name != "posix":
        return f"not tried on {platform.system()}"
    if _compiler() is None:
        return "there is no C compiler (cc, gcc or clang, or the one that CC names)"
    return None


@functools.lru_cache
def _compiler() -> str | None:
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@functools.lru_cache
def _library() -> ctypes.CDLL | str:
    """The compiled functions, or why there are none."""
    if (reason := unwanted()) is not None:
        return reason
    try:
        return _load(_cache())
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home
        pass
    try:
        # No writable cache: built for this process alone. The file may go once it is loaded.
        with tempfile.TemporaryDirectory(prefix="attnpatch-") as folder:
            return _load(Path(folder))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        text = f"{one_line(error)} {said.decode(errors='replace')}"
        return f"it could not be compiled: {' '.join(text.split())[:600]}"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnpatch"


def _load(folder: Path) -> ctypes.CDLL:
    """The library out of `folder`, compiled into it if it is not there.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled, written or loaded.
    """
    compiler = _compiler()
    if compiler is None:
        raise OSError("no C compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT).stdout
    threads = _openmp()
    compiling = [*COMPILE, *(["-fopenmp"] if threads else [])]
    linking = [str(threads)] if threads else []
    what = (SOURCE.read_bytes(), version, " ".join([*compiling, *linking]).encode(), cpu_identity().encode())
    # -march=native: one home may serve unlike machines.
    path = folder / f"native-{hashlib.sha256(b'|'.join(what)).hexdigest()[:20]}.so"
    with contextlib.suppress(OSError):  # missing, or damaged and then built anew
        return ctypes.CDLL(str(path))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        build, built = f"{aside}/native.o", f"{aside}/native.so"
        # In two steps: linking with -ffast-math would flush denormal numbers in the whole process.
        commands = (
            [compiler, *compiling, str(SOURCE), "-o", build],
            [compiler, "-shared", build, *linking, "-o", built],
        )
        for command in commands:
            subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT)
        library = ctypes.CDLL(built)
        with open(built, "rb") as file:
            os.fsync(file.fileno())
        os.replace(built, path)
    return library


@functools.lru_cache
def products() -> int | None:
    """The address of sgemm of the MKL that torch is linked with, if it is; others' threads do not go with ours."""
    if not torch.backends.mkl.is_available():
        return None
    try:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        return ctypes.cast(library.sgemm_, ctypes.c_void_p).value
    except (OSError, AttributeError, StopIteration):
        return None


@functools.lru_cache
def _openmp() -> Path | None:
    """The OpenMP library that torch runs on: its threads and their number serve the loops, too; another one would
    start threads of its own beside them."""
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)
