"""The alignment losses' Triton kernels: run by Triton's interpreter (in a process of its own), compiled for Hopper."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attnpatch.kernels import alignment_networks_triton_device as n
from attnpatch.kernels import alignment_shares_triton_device as s
from attnpatch.kernels import alignment_transport_triton_device as t


def build(function, dtype, stages=1, **values):
    sizes = dict(MASKED=True, DIM=64, HIDDEN=64, BLOCK_D=64, BLOCK_H=64, BLOCK_M=64, BLOCK_N=64, SIGN=-1.0)
    sizes |= dict(WHOLE=False, ADDED=True, SIZE=16640, MEAN=True, BLOCK_B=32, BLOCK_T=128) | values
    constants = {name: sizes[name] for name in function.arg_names if name in sizes}
    tokens = ("Query", "Key", "QueryGrad", "KeyGrad")
    halves = ("Out", "OutLow") if values.get("RESULT", 0) > 1 else ("Moves", "MovesLow", "Units", "UnitsLow")
    kinds = {name: "*" + dtype for name in tokens} | {"QueryPadding": "*u8", "KeyPadding": "*u8"}
    kinds |= {name: "*fp32" if dtype == "fp32" else "*bf16" for name in halves}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*fp32" if name[0].isupper() else "i32")
        for name in function.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name][0] == "*" or name.startswith("stride")
    }
    source = ASTSource(function, signature, constants, aligned)
    built = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": stages}
    )
    # Of half precision two programs share a multiprocessor's 227 KiB.
    assert built.metadata.shared <= (113 if dtype == "bf16" else 227) * 1024, (values, built.metadata.shared)


build(s.token_shares, "bf16")
for dtype in ("bf16", "fp16", "fp32"):
    for values in (
        dict(HIGHWAY=True, OUT=1, RESULT=1),
        dict(HIGHWAY=False, OUT=64, RESULT=2),
        dict(HIGHWAY=True, OUT=64, RESULT=3),
    ):
        build(n.network_forward, dtype, **values)
        build(n.network_backward, dtype, **values)
    if dtype != "fp16":
        build(t.transport_means, dtype, 2)
        build(t.transport_gradients, dtype, 2)
build(n.network_backward, "fp32", HIGHWAY=True, OUT=1, RESULT=0)
"""


def test_in_the_interpreter() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", here / "interpreted_alignment.py"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_compiles_for_a_gpu(tmp_path: Path) -> None:
    """Without one: what the interpreter does not check is types, and that the blocks fit."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
