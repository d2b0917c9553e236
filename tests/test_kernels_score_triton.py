"""The Triton kernels: run by Triton's interpreter (in a process of its own), and compiled for a Hopper GPU."""

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
from attnpatch.kernels import score_triton_device as t

kinds = {"Mask": "*u8", "Kinds": "*i32", "Sums": "*fp32", "Scales": "*fp32", "Rows": "*i64", "RowKeys": "*i32",
         "Seed": "*i64", "scale": "fp32", "c": "fp32", "slope_factor": "fp32", "factor": "fp32", "finish": "fp32",
         "threshold": "i64"}
for function in (t._forward, t._key_gradients, t._query_gradients, t._row_statistics, t._mask_kind):
    values = dict(KERNEL=0, DEGREE=2, CAUSAL=False, MASK=True, DROPOUT=True, BLOCK=128, HEAD_DIM=80, BLOCK_D=128,
                  PRECISION="tf32", BLOCK_M=64, BLOCK_N=64, RESIDUAL=True)
    constants = {name: values[name] for name in function.arg_names if name in values}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*bf16" if name[0].isupper() else "i32")
        for name in function.arg_names
    }
    built = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert built.metadata.shared <= 227 * 1024, built.metadata.shared
    # Products by warp groups, and no conversion of single numbers in the loops.
    assert "wgmma" in built.asm["ptx"] or function in (t._row_statistics, t._mask_kind)
"""

COMPILE_QUERY_VALUE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attnpatch.kernels import query_value_triton as t

for function, dim, tanh in ((t._prepare, 80, False), (t._forward, 80, True), (t._forward, 64, False),
                            (t._backward, 80, True), (t._backward, 64, False)):
    block_d = t._block_d(dim)
    rows, warps, unroll = t._untuned("forward" if function is t._forward else "backward", block_d, tanh)
    values = dict(TANH=tanh, SLOPES=True, HEAD_DIM=dim, BLOCK_D=block_d, BLOCK_L=64, LANES=t.LANES,
                  BLOCK=rows, UNROLL=unroll, stride_as=1)
    constants = {name: values[name] for name in function.arg_names if name in values}
    kinds = {"Unsafe": "*i32", "factor": "fp32", "Weights": "*bf16", "WeightsGrad": "*bf16"}
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*fp32" if name[0].isupper() else "i32")
        for name in function.arg_names
    }
    built = triton.compile(
        ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}
    )
    # Rows of the other side have not gone through shared memory.
    assert built.metadata.shared <= 4096, (function, built.metadata.shared)
    assert "rcp.approx.ftz.f32" in built.asm["ptx"] or function is t._prepare
"""


def test_in_the_interpreter() -> None:
    run_interpreted("interpreted_triton.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("code", [COMPILE, COMPILE_QUERY_VALUE], ids=["score", "query_value"])
def test_compiles_for_a_gpu(tmp_path: Path, code: str) -> None:
    run_compiler(code, tmp_path)
