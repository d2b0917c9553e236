"""Builds the sources in C beside this file, where the machine has a compiler; what they compute is said there.

A source is compiled when first wanted, in 0.1 to 0.3 s of processor time, and kept in the user's cache for this
processor and compiler. Without a compiler, on a failure, or with ATTNPATCH_NATIVE=0, torch computes instead; the
results differ by rounding. ctypes and not torch's extensions: none of torch's headers is read.
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

import torch

from attnpatch.environment import cpu_identity
from attnpatch.errors import SpecError, one_line

VARIABLE = "ATTNPATCH_NATIVE"
FOLDER = Path(__file__).parent
# Elsewhere than on x86 the processor's identity, which the cache goes by, says too little for -march=native.
_X86 = platform.machine() in ("x86_64", "AMD64")
_TUNED = ("-march=native", "-mprefer-vector-width=512") if _X86 else ()
# Sums by vectors, but with NaN and infinity as they are, which -ffast-math would not keep.
_REASSOCIATED = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
SOURCES = {
    "decode_native": _REASSOCIATED,
    "score_native": ("-ffast-math",),
    "select_exact": ("-fno-math-errno",),
}
"""The sources, and the flags of the compiler that each takes."""
COMPILE = ("-O3", *_TUNED, "-fPIC", "-c")
TIMEOUT = 60.0


def why_not(source: str) -> str | None:
    """Why a source is not compiled, with the compiler's error if it failed, or None. Compiles it if need be.

    Raises:
        SpecError: as `unwanted`.
    """
    found = library(source)
    return found if isinstance(found, str) else None


def unwanted() -> str | None:
    """Why compiling is not tried, or None.

    Raises:
        SpecError: ATTNPATCH_NATIVE is neither 0 nor 1.
    """
    wanted = os.environ.get(VARIABLE) or "1"
    if wanted not in ("0", "1"):
        raise SpecError(f"{VARIABLE} is {wanted!r}; it takes 1 (the default: code in C, compiled once) or 0 (torch)")
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
def library(source: str) -> ctypes.CDLL | str:
    """The compiled functions of one of SOURCES, or why there are none.

    Raises:
        SpecError: as `unwanted`.
    """
    if (reason := unwanted()) is not None:
        return reason
    try:
        return load(source, _cache())
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home
        pass
    try:
        # No writable cache: built for this process alone. The file may go once it is loaded.
        with tempfile.TemporaryDirectory(prefix="attnpatch-") as folder:
            return load(source, Path(folder))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        text = f"{source}.c: {one_line(error)} {said.decode(errors='replace')}"
        return f"it could not be compiled: {' '.join(text.split())[:600]}"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnpatch"


def load(source: str, folder: Path) -> ctypes.CDLL:
    """The library of a source out of `folder`, compiled into it if it is not there.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled, written or loaded.
    """
    compiler = _compiler()
    if compiler is None:
        raise OSError("no C compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT).stdout
    threads = openmp()
    compiling = [*COMPILE, *SOURCES[source], *_division(), *(["-fopenmp"] if threads else [])]
    linking = [*([str(threads)] if threads else []), "-lm"]
    text = FOLDER / f"{source}.c"
    what = (text.read_bytes(), version, " ".join([*compiling, *linking]).encode(), cpu_identity().encode())
    # -march=native: one home may serve unlike machines.
    name = f"{source}-{hashlib.sha256(b'|'.join(what)).hexdigest()[:20]}"
    for path in folder.glob(f"{name}-*.so"):
        # Of another size than its name says it is damaged, and would kill the process.
        with contextlib.suppress(OSError):
            if path.stem == f"{name}-{path.stat().st_size}":
                return ctypes.CDLL(str(path))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        build, built = f"{aside}/built.o", f"{aside}/built.so"
        # In two steps: linking with -ffast-math would flush denormal numbers in the whole process.
        commands = (
            [compiler, *compiling, str(text), "-o", build],
            [compiler, "-shared", build, *linking, "-o", built],
        )
        for command in commands:
            subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT)
        library = ctypes.CDLL(built)
        with open(built, "rb") as file:
            os.fsync(file.fileno())
        os.replace(built, folder / f"{name}-{os.path.getsize(built)}.so")
    return library


def _division() -> tuple[str, ...]:
    """Without AVX-512 fast division is by rcpps, of which the reciprocal of a number above 2^126 is 0."""
    exact = not _X86 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return () if exact else ("-mrecip=!div,!vec-div",)


@functools.lru_cache
def openmp() -> Path | None:
    """The OpenMP library that torch runs on: its threads and their number serve our code, too; another one would
    start threads of its own beside them."""
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)
