"""The device code of conditional transport (`ct` of `attnpatch.kernels.alignment`) between queries and keys.

With scores S = t_phi(q) . t_phi(k), cosines C of t_eta, shares a of queries and b of keys (half of 1 / n each):

    loss = sum_i a_i (1 - E_i[C]) + sum_j b_j (1 - E_j[C]),   E_i over softmax_j(S), E_j over softmax_i(S)

Two passes, block by block, so that no T x S matrix is ever in memory: the first gives each query and each key the
logarithm of its softmax's sum and its mean cosine, the second the gradients. In both a program owns a block of one side
and goes over the other's. Vectors are in memory as two of bfloat16 each, or as one of float32: see
`attnpatch.kernels.alignment_networks_triton_device`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnpatch.kernels.alignment_networks_triton_device import exp2, flipped, product, split

LOG2E = tl.constexpr(1.4426950408889634)
UNSPECIALISED = ["n_batch", "n_heads", "n_queries", "n_keys"]


@triton.jit
def _sides(n_batch, n_heads, n_queries, n_keys, BLOCK_M: tl.constexpr):
    """Of a program: (whether it owns queries, its problem, first row of its block, own first row, own length,
    the others' first row and length)."""
    program = tl.program_id(0)
    problems = n_batch * n_heads
    of_queries, of_keys = tl.cdiv(n_queries, BLOCK_M), tl.cdiv(n_keys, BLOCK_M)
    queries = program < problems * of_queries
    blocks = of_queries
    if not queries:
        program -= problems * of_queries
        blocks = of_keys
    problem = program // blocks
    start = (program % blocks) * BLOCK_M
    query_base, key_base = problem * n_queries, problems * n_queries + problem * n_keys
    base, length, other_base, others = query_base, n_queries, key_base, n_keys
    if not queries:
        base, length, other_base, others = key_base, n_keys, query_base, n_queries
    return queries, problem, start, base, length, other_base, others


@triton.jit
def _rows(High, Low, base, start, length, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, features = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = base.to(tl.int64) * DIM + (rows[:, None] * DIM + features[None, :])
    mask = (rows < length)[:, None] & (features < DIM)[None, :]
    high = tl.load(High + pointers, mask=mask, other=0.0)
    if High.dtype.element_ty == tl.float32:
        return split(high, 3)
    else:
        return high, tl.load(Low + pointers, mask=mask, other=0.0), high


@triton.jit(do_not_specialize=UNSPECIALISED)
def transport_means(
    Moves, MovesLow, Units, UnitsLow, QueryPadding, KeyPadding, Shares, Sums, Means, Loss,
    n_batch, n_heads, n_queries, n_keys,
    MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """For each row: Sums, log2 of the softmax's sum (infinite for padding), and Means; Loss: each program's part."""
    PARTS: tl.constexpr = 3 if Moves.dtype.element_ty == tl.float32 else 2
    queries, problem, start, base, length, other_base, others = _sides(n_batch, n_heads, n_queries, n_keys, BLOCK_M)
    b = problem // n_heads
    Padding, OtherPadding, share = QueryPadding + b * n_queries, KeyPadding + b * n_keys, tl.load(Shares + b)
    if not queries:
        Padding, OtherPadding, share = (
            KeyPadding + b * n_keys,
            QueryPadding + b * n_queries,
            tl.load(Shares + n_batch + b),
        )
    move = _rows(Moves, MovesLow, base, start, length, DIM, BLOCK_M, BLOCK_D)
    unit = _rows(Units, UnitsLow, base, start, length, DIM, BLOCK_M, BLOCK_D)
    rows = start + tl.arange(0, BLOCK_M)
    valid = rows < length
    if MASKED:
        valid = valid & (tl.load(Padding + rows, mask=valid, other=1) == 0)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    gain = tl.zeros([BLOCK_M], tl.float32)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, others, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        seen = columns < others
        if MASKED:
            seen = seen & (tl.load(OtherPadding + columns, mask=seen, other=1) == 0)
        other = _rows(Moves, MovesLow, other_base, first, others, DIM, BLOCK_N, BLOCK_D)
        scores = product(move, flipped(other), zero, PARTS, PARTS) * LOG2E
        scores = tl.where(seen[None, :], scores, float("-inf"))
        other = _rows(Units, UnitsLow, other_base, first, others, DIM, BLOCK_N, BLOCK_D)
        cosine = product(unit, flipped(other), zero, PARTS, PARTS)
        new = tl.maximum(top, tl.max(scores, 1))
        weights = exp2(scores - new[:, None])
        scale = exp2(top - new)
        total = total * scale + tl.sum(weights, 1)
        gain = gain * scale + tl.sum(weights * cosine, 1)
        top = new
    # True of NaN, too: what is not a number must not pass for padding.
    some = total != 0
    mean = tl.where(some, gain / tl.where(some, total, 1.0), 0.0)
    inside = rows < length
    sums = tl.where(valid & some, top + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(Sums + base + rows, sums, mask=inside)
    tl.store(Means + base + rows, mean, mask=inside)
    loss = tl.sum(tl.where(valid, 1.0 - mean, 0.0), 0) * share * 0.5
    tl.store(Loss + tl.program_id(0), loss)


@triton.jit(do_not_specialize=UNSPECIALISED)
def transport_gradients(
    Moves, MovesLow, Units, UnitsLow, Shares, Sums, Means, Inverse, MovesGrad, FeaturesGrad,
    n_batch, n_heads, n_queries, n_keys,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the moves t_phi and the features t_eta, [rows, D]."""
    PARTS: tl.constexpr = 3 if Moves.dtype.element_ty == tl.float32 else 2
    queries, problem, start, base, length, other_base, others = _sides(n_batch, n_heads, n_queries, n_keys, BLOCK_M)
    b = problem // n_heads
    share, other_share = tl.load(Shares + b) * 0.5, tl.load(Shares + n_batch + b) * 0.5
    if not queries:
        share, other_share = other_share, share
    move = _rows(Moves, MovesLow, base, start, length, DIM, BLOCK_M, BLOCK_D)
    unit = _rows(Units, UnitsLow, base, start, length, DIM, BLOCK_M, BLOCK_D)
    rows = start + tl.arange(0, BLOCK_M)
    inside = rows < length
    sums = tl.load(Sums + base + rows, mask=inside, other=float("inf"))
    mean = tl.load(Means + base + rows, mask=inside, other=0.0)
    shown = sums != float("inf")
    d_move = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_unit = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, others, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        other_sums = tl.load(Sums + other_base + columns, mask=columns < others, other=float("inf"))
        other_mean = tl.load(Means + other_base + columns, mask=columns < others, other=0.0)
        other_move = _rows(Moves, MovesLow, other_base, first, others, DIM, BLOCK_N, BLOCK_D)
        other_unit = _rows(Units, UnitsLow, other_base, first, others, DIM, BLOCK_N, BLOCK_D)
        scores = product(move, flipped(other_move), zero, PARTS, PARTS) * LOG2E
        seen = shown[:, None] & (other_sums != float("inf"))[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        cosine = product(unit, flipped(other_unit), zero, PARTS, PARTS)
        there = share * exp2(scores - sums[:, None])
        back = other_share * exp2(scores - other_sums[None, :])
        d_scores = there * (mean[:, None] - cosine) + back * (other_mean[None, :] - cosine)
        d_move = product(split(d_scores, PARTS), other_move, d_move, PARTS, PARTS)
        d_unit = product(split(there + back, PARTS), other_unit, d_unit, PARTS, PARTS)
    features = tl.arange(0, BLOCK_D)
    pointers = base.to(tl.int64) * DIM + (rows[:, None] * DIM + features[None, :])
    stored = inside[:, None] & (features < DIM)[None, :]
    tl.store(MovesGrad + pointers, d_move, mask=stored)
    # Through x / |x|, with the sign of -C.
    unit = _rows(Units, UnitsLow, base, start, length, DIM, BLOCK_M, BLOCK_D)
    e = unit[0].to(tl.float32) + unit[1].to(tl.float32)
    if PARTS == 3:
        e += unit[2].to(tl.float32)
    inverse = tl.load(Inverse + base + rows, mask=inside, other=0.0)
    d_unit = (e * tl.sum(e * d_unit, 1)[:, None] - d_unit) * inverse[:, None]
    tl.store(FeaturesGrad + pointers, d_unit, mask=stored)
