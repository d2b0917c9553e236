"""Selection fused in Triton: run by Triton's interpreter (in a process of its own), and compiled for a Hopper GPU."""

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
from attnpatch.kernels import select_triton as s, select_triton_device as t

kinds = {"Norm": "*fp32", "Scale": "*fp32", "Peak": "*fp32", "Uniform": "*i8", "Mean": "*fp32", "Index": "*i32",
         "Kept": "*u8", "Weights": "*fp32", "ScoreGrad": "*fp32", "scale": "fp32", "factor": "fp32"}


def build(function, blocks, dtype, dim, r, kernel=0, criterion=0, causal=False, mask=0):
    block_d = max(16, triton.next_power_of_2(dim))
    values = dict(KERNEL=kernel, DEGREE=2, CRITERION=criterion, CAUSAL=causal, MASK=mask, HEAD_DIM=dim, BLOCK_D=block_d,
                  VALUE_DIM=dim, BLOCK_V=block_d, KEPT=r, BLOCK_R=s._power_of_two(r, 2), DROPOUT=True, TRAINING=True,
                  PRECISION="tf32x3" if dtype == "fp32" else "tf32", EXACT="tf32x3", **blocks)
    constants = {name: values[name] for name in function.arg_names if name in values}
    constants |= {name: 1 for name in function.arg_names if name.startswith("stride_") and name[-1] == "d"}
    signature = {
        name: "constexpr" if name in constants
        else {0: "*" + dtype, 1: "*u8", 2: "*fp32"}[mask] if name == "Mask"
        else kinds.get(name, "*" + dtype if name[0].isupper() else "i32")
        for name in function.arg_names
    }
    options = {name: blocks[name] for name in ("num_warps", "num_stages", "maxnreg") if name in blocks}
    built = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
    # The least that GPUs of compute capability 8.0 and above have.
    assert built.metadata.shared <= 99 * 1024, (function, dtype, dim, r, built.metadata.shared)


s.INTERPRETED = False
for dtype, dim, r in CASES:
    single, block_d = dtype == "fp32", max(16, triton.next_power_of_2(dim))
    for kernel, criterion, (causal, mask) in CALLS:
        select = s.select_blocks(r, block_d, criterion == 2, single)
        build(t._select, select, dtype, dim, r, kernel, criterion, causal, mask)
        if kernel or criterion:
            blocks = s.statistics_blocks(block_d, single)
            build(t._statistics, blocks, dtype, dim, r, kernel, criterion, causal, mask)
        build(t._attend, s.list_blocks(r, block_d), dtype, dim, r, kernel, mask=mask)
        build(t._row_gradients, s.list_blocks(r, block_d), dtype, dim, r, kernel)
        build(t._key_gradients, s.key_blocks(), dtype, dim, r, causal=causal)
"""

USUAL = """
CASES = [(dtype, 64, r) for dtype in ("bf16", "fp32") for r in (16, 32, 64)]
CALLS = [(0, criterion, rest) for criterion in (0, 1, 2) for rest in ((False, 1), (True, 0))]
"""
EXTREME = """
CASES = [("fp16", 80, 128), ("fp32", 128, 128), ("bf16", 8, 1)]
CALLS = [(1, 2, (False, 2)), (2, 1, (True, 0)), (3, 0, (False, 1))]
"""


def test_in_the_interpreter() -> None:
    run_interpreted("interpreted_select.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("cases", [USUAL, EXTREME], ids=["usual", "extreme"])
def test_compiles_for_a_gpu(tmp_path: Path, cases: str) -> None:
    run_compiler(cases + COMPILE, tmp_path)
