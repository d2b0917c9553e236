"""Non-softmax score kernels fused in Triton, for CUDA: O(T) memory, forward and backward.

Shapes: query [B, H, T, D], key [B, H, S, D], value [B, H, S, D], keep None or bool broadcastable to [B, H, T, S];
D up to 128, padded to a power of two in registers.

As in `attnpatch.kernels.score_blocked`, f needs no running maximum, and the backward pass recomputes f from query, key
and the row sums. A row whose sum under- or overflows is computed again in the same program, scaled by a number m
that is saved beside the sum: f(z) is z^2 / m^2 / (1 + z^2), (z / m)^degree, or elu(z) + 1 over exp(m) for a
negative m and over 1 + m for a positive one. m = 1 (elu: 0) in every other row; m = inf means that all visible
scores are zero, and the row is uniform.

Dropout keeps a weight if a hash of its column under two Philox keys of its row (seed; row, head) exceeds p: the
backward pass draws the same numbers, whatever the block sizes. The seed is read on the device, so that the kernels can
be captured in a CUDA graph.

The inner loop of a forward pass is a multiply-add, a reciprocal square root and three multiplications or additions a
score, because elementwise work and not the matrix products sets the time (docs/performance.md). Its blocks are not
masked where nothing is hidden: beyond the last key z = 0, and f(0) = 0.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KERNEL_CODES = {"expressive": 0, "polynomial": 1, "elu": 2}

MAX_HEAD_DIM = 128
TUNE_VARIABLE = "ATTNPATCH_TUNE"

# Arguments whose being 1 or a multiple of 16 would only make Triton compile again.
UNSPECIALISED = ["n_heads", "n_queries", "n_keys", "threshold", "size_class"]

_INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))

SMALLEST = tl.constexpr(1e-25)
LARGEST = tl.constexpr(1e25)
# sqrt of the smallest normal float32, times 1e-9: rows of smaller scores are uniform in the plain form.
ZERO = tl.constexpr(1e-28)
# Beyond it f(z) = 1 in float32, and the square does not overflow.
BOUND = tl.constexpr(1e18)
# Triton's interpreter multiplies bfloat16 as if it were integers.
UPCAST = tl.constexpr(_INTERPRETED)


def tuning() -> bool:
    """Whether block sizes are tuned for each kind of call, as they are unless ATTNPATCH_TUNE is 0."""
    return os.environ.get(TUNE_VARIABLE) != "0"


def why_not(query: Tensor, value: Tensor) -> str | None:
    """Why Triton cannot serve these tensors, or None if it can."""
    if query.device.type != "cuda" and not (_INTERPRETED and query.device.type == "cpu"):
        return f"it runs on CUDA, and query is on {query.device}"
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(query.device)
        return f"it takes GPUs of compute capability 8.0 and above, and this one has {major}.{minor}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, and query is {query.dtype}"
    if query.shape[-1] != value.shape[-1]:
        return f"heads of query and value have sizes {query.shape[-1]} and {value.shape[-1]}; one size is needed"
    if not 1 <= query.shape[-1] <= MAX_HEAD_DIM:
        return f"the head size is {query.shape[-1]}, and it takes 1 to {MAX_HEAD_DIM}"
    return None


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _power(x, EXPONENT: tl.constexpr):
    result = x
    for _ in tl.static_range(EXPONENT - 1):
        result = result * x
    return result


@triton.jit
def _row_factors(m, KERNEL: tl.constexpr):
    """(what z or f is multiplied by, what is added to f) for rows scaled by m."""
    if KERNEL == 2:
        return 1.0 / (1.0 + tl.maximum(m, 0.0)), m * 0.0
    uniform = m == float("inf")
    return tl.where(uniform, 0.0, 1.0 / m), tl.where(uniform, 1.0, 0.0)


@triton.jit
def _strength(z, m, unit, added, KERNEL: tl.constexpr, DEGREE: tl.constexpr):
    """f(z) of rows scaled by m; `unit` and `added` as from `_row_factors`."""
    if KERNEL == 0:
        z = tl.minimum(tl.abs(z), BOUND)
        f = z * tl.rsqrt(1.0 + z * z) * unit
        f = f * f + added
    elif KERNEL == 1:
        f = _power(z * unit, DEGREE) + added
    else:
        f = (tl.exp(tl.minimum(z, 0.0) - tl.minimum(m, 0.0)) + tl.maximum(z, 0.0)) * unit
    return f


@triton.jit
def _slope(z, m, unit, KERNEL: tl.constexpr, DEGREE: tl.constexpr):
    """df/dz, in the same scale."""
    if KERNEL == 0:
        z = tl.maximum(tl.minimum(z, BOUND), -BOUND)
        root = tl.rsqrt(1.0 + z * z)
        inverse = root * root
        d = (2.0 * unit) * (z * unit) * (inverse * inverse)
    elif KERNEL == 1:
        d = (DEGREE * unit) * _power(z * unit, DEGREE - 1)
    else:
        d = tl.exp(tl.minimum(z, 0.0) - tl.minimum(m, 0.0)) * unit
    return d


@triton.jit
def _visible(Mask, rows, cols, stride_mt, stride_ms, n_queries, n_keys, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which elements of a block of scores count."""
    inside = (rows < n_queries)[:, None] & (cols < n_keys)[None, :]
    if CAUSAL:
        inside = inside & (rows[:, None] >= cols[None, :])
    if HAS_MASK:
        pointers = Mask + rows.to(tl.int64)[:, None] * stride_mt + cols.to(tl.int64)[None, :] * stride_ms
        inside = inside & (tl.load(pointers, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _mix(x):
    """A bijection of 32 bits whose every output bit depends on every input bit (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _kept(rows, cols, head, Seed, threshold):
    """Dropout's choice, from the position alone. Philox is for rows: for each score it would cost most."""
    row = tl.cast(rows, tl.uint32)
    zero = row * 0
    first, second, _, _ = tl.philox(tl.load(Seed), row, zero + tl.cast(head, tl.uint32), zero, zero)
    first, second = tl.cast(first, tl.uint32, bitcast=True), tl.cast(second, tl.uint32, bitcast=True)
    random = _mix(_mix(first[:, None] ^ tl.cast(cols, tl.uint32)[None, :]) ^ second[:, None])
    return random >= tl.cast(threshold, tl.uint32)


@triton.jit
def _tile(Base, index, features, stride_n, stride_d, n, HEAD_DIM: tl.constexpr):
    """Rows `index` of a [n, D] matrix, zero beyond it."""
    pointers = Base + index.to(tl.int64)[:, None] * stride_n + features[None, :] * stride_d
    return tl.load(pointers, mask=(index < n)[:, None] & (features < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _sum_keys(
    q, m, Key, Value, Mask, rows, head, Seed, threshold, scale, last,
    stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys, SCALED: tl.constexpr,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(sum_j f v, sum_j f) of a block of queries; without SCALED m is neutral, and costs nothing."""
    unit, added = 1.0, 0.0
    if SCALED:
        unit, added = _row_factors(m, KERNEL)
        unit, added = unit[:, None], added[:, None]
    features = tl.arange(0, BLOCK_D)
    summed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, last, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        k = _tile(Key, cols, features, stride_ks, stride_kd, n_keys, HEAD_DIM)
        v = _tile(Value, cols, features, stride_vs, stride_vd, n_keys, HEAD_DIM)
        z = _dot(q, tl.trans(k), PRECISION) * scale
        f = _strength(z, m[:, None], unit, added, KERNEL, DEGREE)
        if SCALED or CAUSAL or HAS_MASK or KERNEL == 2:
            seen = _visible(Mask, rows, cols, stride_mt, stride_ms, n_queries, n_keys, CAUSAL, HAS_MASK)
            f = tl.where(seen, f, 0.0)
        # Rounded before they are summed, so that the weights add up to one.
        f = f.to(v.dtype)
        total += tl.sum(f.to(tl.float32), 1)
        if DROPOUT:
            f = tl.where(_kept(rows, cols, head, Seed, threshold), f, 0.0)
        summed += _dot(f, v, PRECISION)
    return summed, total


@triton.jit
def _place(n, BLOCK: tl.constexpr):
    """(block, head) of a program. One dimension: the others of a grid end at 65,535, which batches times heads pass."""
    blocks = tl.cdiv(n, BLOCK)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks


@triton.jit(do_not_specialize=UNSPECIALISED)
def _forward(
    Query, Key, Value, Mask, Seed, Output, Residual, Sums, Scales,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mt, stride_ms,
    stride_ob, stride_oh, stride_ot, stride_od,
    n_heads, n_queries, n_keys, scale, threshold, factor, size_class,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, head = _place(n_queries, BLOCK_M)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    start = block * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    features = tl.arange(0, BLOCK_D)
    Key += b * stride_kb + h * stride_kh
    Value += b * stride_vb + h * stride_vh
    Mask += b * stride_mb + h * stride_mh
    q = _tile(Query + b * stride_qb + h * stride_qh, rows, features, stride_qt, stride_qd, n_queries, HEAD_DIM)
    last = n_keys
    if CAUSAL:
        last = tl.minimum(n_keys, start + BLOCK_M)
    neutral = 0.0 if KERNEL == 2 else 1.0
    m = tl.full([BLOCK_M], neutral, tl.float32)
    summed, total = _sum_keys(
        q, m, Key, Value, Mask, rows, head, Seed, threshold, scale, last,
        stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys, False,
        KERNEL, DEGREE, CAUSAL, HAS_MASK, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    # Not a number fails the comparisons, too. float16 has no digits left for small weights.
    smallest = 0.5 if Output.dtype.element_ty == tl.float16 else SMALLEST
    lost = (rows < n_queries) & ~((total >= smallest) & (total <= LARGEST))
    if tl.max(lost.to(tl.int32), 0) > 0:
        lowest = -float("inf") if KERNEL == 2 else 0.0
        peak = tl.full([BLOCK_M], lowest, tl.float32)
        for first in range(0, last, BLOCK_N):
            cols = first + tl.arange(0, BLOCK_N)
            k = _tile(Key, cols, features, stride_ks, stride_kd, n_keys, HEAD_DIM)
            z = _dot(q, tl.trans(k), PRECISION) * scale
            seen = _visible(Mask, rows, cols, stride_mt, stride_ms, n_queries, n_keys, CAUSAL, HAS_MASK)
            if KERNEL == 2:
                peak = tl.maximum(peak, tl.max(tl.where(seen, z, lowest), 1))
            else:
                peak = tl.maximum(peak, tl.max(tl.where(seen, tl.abs(z), 0.0), 1))
        if KERNEL == 2:
            better = tl.where(peak == lowest, 0.0, peak)
        elif KERNEL == 1:
            better = tl.where(peak > ZERO, peak, float("inf"))
        else:
            better = tl.where(peak > ZERO, tl.minimum(peak, 1.0), float("inf"))
        m = tl.where(lost, better, m)
        summed, total = _sum_keys(
            q, m, Key, Value, Mask, rows, head, Seed, threshold, scale, last,
            stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys, True,
            KERNEL, DEGREE, CAUSAL, HAS_MASK, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    output = summed * (factor / tl.where(total > 0.0, total, 1.0))[:, None]
    place = b * stride_ob + h * stride_oh + rows.to(tl.int64)[:, None] * stride_ot + features[None, :] * stride_od
    stored = (rows < n_queries)[:, None] & (features < HEAD_DIM)[None, :]
    rounded = output.to(Output.dtype.element_ty)
    tl.store(Output + place, rounded, mask=stored)
    if RESIDUAL:
        lost_digits = (output - rounded.to(tl.float32)).to(Output.dtype.element_ty)
        tl.store(Residual + place, lost_digits, mask=stored)
    offset = head.to(tl.int64) * n_queries + rows
    tl.store(Sums + offset, total, mask=rows < n_queries)
    tl.store(Scales + offset, m, mask=rows < n_queries)


@triton.jit
def _row_delta(
    Grad, Output, Residual, Sums, Delta,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_ob, stride_oh, stride_ot, stride_od, n_heads, n_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O), and 1 / N in the place of N."""
    block, head = _place(n_queries, BLOCK_M)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.arange(0, BLOCK_D)
    g = _tile(Grad + b * stride_gb + h * stride_gh, rows, features, stride_gt, stride_gd, n_queries, HEAD_DIM)
    first = b * stride_ob + h * stride_oh
    o = _tile(Output + first, rows, features, stride_ot, stride_od, n_queries, HEAD_DIM).to(tl.float32)
    if RESIDUAL:
        o += _tile(Residual + first, rows, features, stride_ot, stride_od, n_queries, HEAD_DIM).to(tl.float32)
    offset = head.to(tl.int64) * n_queries + rows
    total = tl.load(Sums + offset, mask=rows < n_queries, other=0.0)
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)
    tl.store(Delta + offset, tl.sum(g.to(tl.float32) * o, 1), mask=rows < n_queries)
    tl.store(Sums + offset, inverse, mask=rows < n_queries)


@triton.jit
def _block_gradients(
    q, k, v, g, m, inverse, delta, Mask, rows, cols, head, Seed, threshold, factor, scale,
    stride_mt, stride_ms, n_queries, n_keys,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights after dropout, dL/dz) of one block of scores."""
    z = _dot(q, tl.trans(k), PRECISION) * scale
    inner = _dot(g, tl.trans(v), PRECISION)
    unit, added = _row_factors(m, KERNEL)
    weights = _strength(z, m[:, None], unit[:, None], added[:, None], KERNEL, DEGREE) * inverse[:, None]
    # Where it is zero the slope is, too, and rows and columns beyond the last reach nothing that is stored.
    slope = _slope(z, m[:, None], unit[:, None], KERNEL, DEGREE) * inverse[:, None]
    if CAUSAL or HAS_MASK or KERNEL == 2:
        seen = _visible(Mask, rows, cols, stride_mt, stride_ms, n_queries, n_keys, CAUSAL, HAS_MASK)
        weights = tl.where(seen, weights, 0.0)
        slope = tl.where(seen, slope, 0.0)
    if DROPOUT:
        kept = tl.where(_kept(rows, cols, head, Seed, threshold), factor, 0.0)
        weights = weights * kept
        inner = inner * kept
    return weights, (inner - delta[:, None]) * slope


@triton.jit(do_not_specialize=UNSPECIALISED)
def _key_gradients(
    Query, Key, Value, Mask, Seed, Grad, Inverse, Scales, Delta, KeyGrad, ValueGrad,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mt, stride_ms,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_yb, stride_yh, stride_ys, stride_yd,
    stride_wb, stride_wh, stride_ws, stride_wd,
    n_heads, n_queries, n_keys, scale, threshold, factor, size_class,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, head = _place(n_keys, BLOCK_N)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_D)
    Query += b * stride_qb + h * stride_qh
    Grad += b * stride_gb + h * stride_gh
    Mask += b * stride_mb + h * stride_mh
    k = _tile(Key + b * stride_kb + h * stride_kh, cols, features, stride_ks, stride_kd, n_keys, HEAD_DIM)
    v = _tile(Value + b * stride_vb + h * stride_vh, cols, features, stride_vs, stride_vd, n_keys, HEAD_DIM)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = 0
    if CAUSAL:
        # Queries before these keys see none of them.
        begin = (block * BLOCK_N) // BLOCK_M * BLOCK_M
    for start in range(begin, n_queries, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = _tile(Query, rows, features, stride_qt, stride_qd, n_queries, HEAD_DIM)
        g = _tile(Grad, rows, features, stride_gt, stride_gd, n_queries, HEAD_DIM)
        offset = head.to(tl.int64) * n_queries + rows
        inverse = tl.load(Inverse + offset, mask=rows < n_queries, other=0.0)
        delta = tl.load(Delta + offset, mask=rows < n_queries, other=0.0)
        m = tl.load(Scales + offset, mask=rows < n_queries, other=1.0)
        weights, dz = _block_gradients(
            q, k, v, g, m, inverse, delta, Mask, rows, cols, head, Seed, threshold, factor, scale,
            stride_mt, stride_ms, n_queries, n_keys, KERNEL, DEGREE, CAUSAL, HAS_MASK, DROPOUT, PRECISION,
        )  # fmt: skip
        dv += _dot(tl.trans(weights.to(g.dtype)), g, PRECISION)
        dk += _dot(tl.trans(dz.to(q.dtype)), q, PRECISION)
    stored = (cols < n_keys)[:, None] & (features < HEAD_DIM)[None, :]
    index = cols.to(tl.int64)[:, None]
    pointers = KeyGrad + b * stride_yb + h * stride_yh + index * stride_ys + features[None, :] * stride_yd
    tl.store(pointers, (dk * scale).to(KeyGrad.dtype.element_ty), mask=stored)
    pointers = ValueGrad + b * stride_wb + h * stride_wh + index * stride_ws + features[None, :] * stride_wd
    tl.store(pointers, dv.to(ValueGrad.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _query_gradients(
    Query, Key, Value, Mask, Seed, Grad, Inverse, Scales, Delta, QueryGrad,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mt, stride_ms,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_xb, stride_xh, stride_xt, stride_xd,
    n_heads, n_queries, n_keys, scale, threshold, factor, size_class,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, head = _place(n_queries, BLOCK_M)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    start = block * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    features = tl.arange(0, BLOCK_D)
    Key += b * stride_kb + h * stride_kh
    Value += b * stride_vb + h * stride_vh
    Mask += b * stride_mb + h * stride_mh
    q = _tile(Query + b * stride_qb + h * stride_qh, rows, features, stride_qt, stride_qd, n_queries, HEAD_DIM)
    g = _tile(Grad + b * stride_gb + h * stride_gh, rows, features, stride_gt, stride_gd, n_queries, HEAD_DIM)
    offset = head.to(tl.int64) * n_queries + rows
    inverse = tl.load(Inverse + offset, mask=rows < n_queries, other=0.0)
    delta = tl.load(Delta + offset, mask=rows < n_queries, other=0.0)
    m = tl.load(Scales + offset, mask=rows < n_queries, other=1.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = n_keys
    if CAUSAL:
        last = tl.minimum(n_keys, start + BLOCK_M)
    for first in range(0, last, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        k = _tile(Key, cols, features, stride_ks, stride_kd, n_keys, HEAD_DIM)
        v = _tile(Value, cols, features, stride_vs, stride_vd, n_keys, HEAD_DIM)
        _, dz = _block_gradients(
            q, k, v, g, m, inverse, delta, Mask, rows, cols, head, Seed, threshold, factor, scale,
            stride_mt, stride_ms, n_queries, n_keys, KERNEL, DEGREE, CAUSAL, HAS_MASK, DROPOUT, PRECISION,
        )  # fmt: skip
        dq += _dot(dz.to(k.dtype), k, PRECISION)
    stored = (rows < n_queries)[:, None] & (features < HEAD_DIM)[None, :]
    pointers = QueryGrad + b * stride_xb + h * stride_xh + rows.to(tl.int64)[:, None] * stride_xt
    pointers += features[None, :] * stride_xd
    tl.store(pointers, (dq * scale).to(QueryGrad.dtype.element_ty), mask=stored)


# (BLOCK_M, BLOCK_N, warps, stages). The first is what is used untuned: it fits the 99 KiB of shared memory of consumer
# GPUs up to D = 128 in half precision.
Sizes = tuple[int, int, int, int]
_FORWARD: list[Sizes] = [
    (64, 64, 4, 2),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 128, 8, 3),
    (64, 32, 4, 2),
    (32, 32, 4, 2),
]
_BACKWARD: list[Sizes] = [
    (32, 64, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 8, 2),
    (64, 128, 8, 2),
    (128, 64, 8, 2),
    (32, 32, 4, 2),
]
_SMALL: Sizes = (16, 32, 4, 1)
_sizes: Sizes | None = None
_KEY = ["size_class", "KERNEL", "DEGREE", "CAUSAL", "HAS_MASK", "DROPOUT", "BLOCK_D", "PRECISION"]


def _config(sizes: Sizes) -> Any:
    m, n, warps, stages = sizes
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


def _prune(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Leaves out blocks far longer than the sequences, and for float32 those that would live in spilled registers.

    Those that do not fit the GPU's shared memory Triton leaves out itself.
    """
    longest = max(arguments["n_queries"], arguments["n_keys"], 32)
    area = 128 * 64 if arguments["Query"].dtype != torch.float32 else 64 * 64
    area = area * 64 // constants.get("BLOCK_D", 64) if constants.get("BLOCK_D", 64) > 64 else area * 2
    kept = [
        c
        for c in configs
        if max(c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"]) < 2 * longest
        and c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"] <= area
    ]
    return kept or configs[-1:]


def _bench(call: Any, quantiles: Any) -> Any:
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _tuned(function: Any, sizes: list[Sizes]) -> Any:
    sizes = [_SMALL] if _INTERPRETED else sizes
    options = {} if _INTERPRETED else {"prune_configs_by": {"early_config_prune": _prune}, "do_bench": _bench}
    return triton.autotune([_config(size) for size in sizes], key=_KEY, **options)(function)


_TUNED = {
    "forward": _tuned(_forward, _FORWARD),
    "key": _tuned(_key_gradients, _BACKWARD),
    "query": _tuned(_query_gradients, _BACKWARD),
}


def all_sizes() -> list[Sizes]:
    """The block sizes that tuning chooses among."""
    return sorted({*_FORWARD, *_BACKWARD})


@contextlib.contextmanager
def fixed_sizes(sizes: Sizes) -> Iterator[None]:
    """Within it every kernel runs with these block sizes, untuned."""
    global _sizes
    before, _sizes = _sizes, sizes
    try:
        yield
    finally:
        _sizes = before


def _launch(name: str, length: int, heads: int, block: str, *arguments: Any, **constants: Any) -> None:
    """Runs a kernel, one program for each block of `length` and each head, with tuned or fixed block sizes."""
    kernel = _TUNED[name]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(length, meta[block]) * heads,)

    if tuning() and _sizes is None:
        kernel[grid](*arguments, **constants)
        return
    m, n, warps, stages = _sizes or _untuned(name, arguments[0].dtype, constants["BLOCK_D"])
    kernel.fn[grid](*arguments, **constants, BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)


def _untuned(name: str, dtype: torch.dtype, block_d: int) -> Sizes:
    if _INTERPRETED:
        return _SMALL
    if dtype == torch.float32:
        return (32, 32, 4, 1) if block_d > 64 else (32, 64, 4, 1)
    return _FORWARD[0] if name == "forward" else _BACKWARD[0]


def _options(
    query: Tensor,
    key: Tensor,
    keep: Tensor | None,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The scalar arguments that all kernels share, and their constants."""
    head_dim, n_keys = query.shape[-1], key.shape[2]
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    # Tuned once for each power of two of the longer length, not for every length.
    size_class = max(query.shape[2], n_keys, 128).bit_length()
    scalars = (
        query.shape[1],
        query.shape[2],
        n_keys,
        scale,
        threshold,
        2.0**32 / (2**32 - threshold),
        size_class,
    )
    constants = {
        "KERNEL": KERNEL_CODES[kernel],
        "DEGREE": degree,
        "CAUSAL": is_causal,
        "HAS_MASK": keep is not None,
        "DROPOUT": dropout_p > 0.0,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": _precision(query),
    }
    return scalars, constants


def _precision(query: Tensor) -> str:
    """Of products of float32: as torch's own are set. "tf32x3" is float32 but for its last bits, on tensor cores."""
    if query.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0) else "ieee"


def _mask(keep: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The mask as bytes and its strides over [B, H, T, S]; without a mask, something to point at."""
    if keep is None:
        return query, (0, 0, 0, 0)
    full = keep.expand(*query.shape[:3], key.shape[2]).view(torch.uint8)
    return full, full.stride()


def empty_outputs(query: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised output, residual (see `attnpatch.kernels.score_blocked`), row sums and row scales."""
    rows = query.shape[:3]
    rounded = training and query.dtype != torch.float32
    return (
        torch.empty_like(query),
        torch.empty_like(query) if rounded else query.new_empty(0),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty(rows, dtype=torch.float32),
    )


@torch.library.custom_op("attnpatch::triton_attention", mutates_args=())
def triton_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    seed: Tensor | None,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, H, T, D] in query's dtype, residual; row sums and row scales [B, H, T] in float32."""
    output, residual, sums, scales = empty_outputs(query, training)
    if output.numel() == 0:
        return output, residual, sums, scales
    mask, mask_strides = _mask(keep, query, key)
    scalars, constants = _options(query, key, keep, kernel, degree, scale, is_causal, dropout_p)
    n_batch, n_heads, n_queries, _ = query.shape
    with torch.cuda.device_of(query):
        _launch(
            "forward", n_queries, n_batch * n_heads, "BLOCK_M",
            query, key, value, mask, query if seed is None else seed, output, residual, sums, scales,
            *query.stride(), *key.stride(), *value.stride(), *mask_strides, *output.stride(), *scalars,
            **constants, RESIDUAL=residual.numel() > 0,
        )  # fmt: skip
    return output, residual, sums, scales


@torch.library.custom_op("attnpatch::triton_attention_backward", mutates_args=())
def triton_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    output: Tensor,
    residual: Tensor,
    sums: Tensor,
    scales: Tensor,
    seed: Tensor | None,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    if output.numel() == 0 or key.numel() == 0:
        return tuple(x.zero_() for x in grads)  # type: ignore[return-value]
    mask, mask_strides = _mask(keep, query, key)
    scalars, constants = _options(query, key, keep, kernel, degree, scale, is_causal, dropout_p)
    n_batch, n_heads, n_queries, _ = query.shape
    programs = n_batch * n_heads
    inverse, delta = sums.clone(), torch.empty_like(sums)
    tensors = (query, key, value, mask, query if seed is None else seed, grad, inverse, scales, delta)
    strides = (*query.stride(), *key.stride(), *value.stride(), *mask_strides, *grad.stride())
    dq, dk, dv = grads
    with torch.cuda.device_of(query):
        _row_delta[(triton.cdiv(n_queries, 64) * programs,)](
            grad, output, residual, inverse, delta, *grad.stride(), *output.stride(), n_heads, n_queries,
            HEAD_DIM=constants["HEAD_DIM"], BLOCK_D=constants["BLOCK_D"], RESIDUAL=residual.numel() > 0, BLOCK_M=64,
        )  # fmt: skip
        arguments = (*tensors, dk, dv, *strides, *dk.stride(), *dv.stride(), *scalars)
        _launch("key", key.shape[2], programs, "BLOCK_N", *arguments, **constants)
        arguments = (*tensors, dq, *strides, *dq.stride(), *scalars)
        _launch("query", n_queries, programs, "BLOCK_M", *arguments, **constants)
    return grads


@triton_attention_op.register_fake
def _fake_forward(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_outputs(query, arguments[-1])


@triton_attention_backward_op.register_fake
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, keep, seed, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, keep, *output, seed)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = triton_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 8)


torch.library.register_autograd(triton_attention_op, _gradients, setup_context=_save)
