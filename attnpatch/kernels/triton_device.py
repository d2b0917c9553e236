"""What the device code of Triton's kernels shares."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnpatch.kernels.triton_here import INTERPRETED

# Triton's interpreter multiplies bfloat16 as if it were integers.
UPCAST = tl.constexpr(INTERPRETED)
# Whether NVIDIA's instructions can be named.
PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)

_RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
_PAIR = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
_UNPAIR = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


@triton.jit
def reciprocal(x):
    """1 / x to one unit in the last place, and 0 from 2^126 on, in one instruction: a division takes eight."""
    if PTX:
        return tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [x], tl.float32, True, 1)
    return 1.0 / x


@triton.jit
def to_bfloat16(x):
    """float32 to bfloat16, two numbers by one instruction, which LLVM neither splits nor moves before a select."""
    if PTX:
        return tl.inline_asm_elementwise(_PAIR, "=r,f,f", [x], tl.bfloat16, True, 2)
    return x.to(tl.bfloat16)


@triton.jit
def from_bfloat16(x):
    """bfloat16 to float32, of a result of `to_bfloat16` that is wanted in both: of its own accord Triton would convert
    numbers one by one, in the unit that reciprocals wait for."""
    if PTX:
        return tl.inline_asm_elementwise(_UNPAIR, "=r,=r,r", [x], tl.float32, True, 2)
    return x.to(tl.float32)
