"""The alignment losses' Triton kernels: run by Triton's interpreter (in a process of its own), compiled for Hopper."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from triton_process import run_compiler, run_interpreted

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
    run_interpreted("interpreted_alignment.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_compiles_for_a_gpu(tmp_path: Path) -> None:
    run_compiler(COMPILE, tmp_path)
