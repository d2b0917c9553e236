"""The device code of `attnpatch.kernels.score_triton`: forward and backward pass of non-softmax score kernels.

f needs no running maximum, and the backward pass recomputes f from query, key and the row sums. The inner loops are
written for few instructions, because elementwise work and not the matrix products sets the time
(docs/performance.md):

- Expressive weights are x^2 / (c + x^2) of the plain products x = q k, with c = 1 / scale^2: a multiplication, an
  addition, a reciprocal, a multiplication.
- Blocks are masked only where something is hidden: beyond the last key x = 0 and f(0) = 0, and of a causal mask it is
  the blocks on the diagonal. What a mask in memory looks like is found out first (`_mask_kind`), as models give causal
  masks and padding so: one that shows all queries the same range of keys, or such a range causally, is read on the
  diagonal alone, and what it hides is skipped.
- A row whose sum under- or overflows is computed again in the same program, scaled by a number m that is saved beside
  the sum: f(z) is z^2 / m^2 / (1 + z^2), (z / m)^degree, or elu(z) + 1 over exp(m) for a negative m and over 1 + m
  for a positive one. m = 1 (elu: 0) in every other row; m = inf means that all visible scores are zero, and the row
  is uniform. The backward pass takes the loops for such rows only where there are any: rarely, but in float16.

Dropout keeps the weight of row i and column j if (a_i j + c_i) j + d_i mod 2^32 is not below p 2^32; a_i, c_i and d_i
are Philox of (seed; row, head). Rows are independent of each other, and any three weights of a row nearly so (up to
some 65,000 keys), for two multiplications a weight; the backward pass draws the same numbers, whatever the block sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnpatch.kernels.triton_device import UPCAST, from_bfloat16, reciprocal, to_bfloat16

# Arguments whose being 1 or a multiple of 16 would only make Triton compile again.
UNSPECIALISED = ["n_heads", "n_queries", "n_keys", "n_rows", "threshold", "stride_kind_b", "stride_kind_h"]

SMALLEST = tl.constexpr(1e-25)
LARGEST = tl.constexpr(1e25)
# sqrt of the smallest normal float32, times 1e-9: rows of smaller scores are uniform in the plain form.
ZERO = tl.constexpr(1e-28)
# Beyond it f(z) = 1 in float32, and the square does not overflow.
BOUND = tl.constexpr(1e18)


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


# --- f and its slope: of scores as they are, and of rows scaled by m ---------------------------------------------


@triton.jit
def _strength(x, c, scale, KERNEL: tl.constexpr, DEGREE: tl.constexpr):
    """f(scale x), of products x = q k; for expressive as x^2 / (c + x^2) with c = 1 / scale^2.

    There f is 0 instead of 1 for x from 9e18 to 1.8e19; beyond, its square is infinite, and the row is lost.
    """
    if KERNEL == 0:
        square = x * x
        return square * reciprocal(square + c)
    z = x * scale
    if KERNEL == 1:
        return _power(z, DEGREE)
    # Triton would take the number of a number and NaN.
    return tl.exp(tl.minimum(z, 0.0)) + tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _weights_and_slope(
    x, inverse, c, scale, slope_factor, KERNEL: tl.constexpr, DEGREE: tl.constexpr, HALF: tl.constexpr
):
    """(f(z) / N, f'(z) / N) of z = scale x; the slope without the factor `slope_factor` but for HALF (float16, whose
    range a slope without it could leave)."""
    if KERNEL == 0:
        square = x * x
        root = reciprocal(square + c)
        share = root * inverse
        slope = (x * root) * share
        if HALF:
            slope = slope * slope_factor
        return square * share, slope
    z = x * scale
    if KERNEL == 1:
        slope = _power(z, DEGREE - 1) * inverse
        weights = slope * z
        if HALF:
            slope = slope * slope_factor
        return weights, slope
    slope = tl.exp(tl.minimum(z, 0.0)) * inverse
    return slope + tl.maximum(z, 0.0) * inverse, slope


@triton.jit
def _row_factors(m, KERNEL: tl.constexpr):
    """(what z or f is multiplied by, what is added to f) for rows scaled by m."""
    if KERNEL == 2:
        return 1.0 / (1.0 + tl.maximum(m, 0.0)), m * 0.0
    uniform = m == float("inf")
    return tl.where(uniform, 0.0, 1.0 / m), tl.where(uniform, 1.0, 0.0)


@triton.jit
def _scaled_strength(z, m, KERNEL: tl.constexpr, DEGREE: tl.constexpr):
    """f(z) of rows scaled by m."""
    unit, added = _row_factors(m, KERNEL)
    if KERNEL == 0:
        z = tl.minimum(tl.abs(z), BOUND, propagate_nan=tl.PropagateNan.ALL)
        f = z * tl.rsqrt(1.0 + z * z) * unit
        f = f * f + added
    elif KERNEL == 1:
        f = _power(z * unit, DEGREE) + added
    else:
        # m is the largest score, but for the rounding of a product whose factors have changed places.
        f = (
            tl.exp(tl.minimum(tl.minimum(z, 0.0) - tl.minimum(m, 0.0), 0.0))
            + tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        ) * unit
    return f


@triton.jit
def _scaled_slope(z, m, KERNEL: tl.constexpr, DEGREE: tl.constexpr):
    """df/dz, in the same scale."""
    unit, _ = _row_factors(m, KERNEL)
    if KERNEL == 0:
        z = tl.maximum(tl.minimum(z, BOUND), -BOUND)
        root = tl.rsqrt(1.0 + z * z)
        inverse = root * root
        d = (2.0 * unit) * (z * unit) * (inverse * inverse)
    elif KERNEL == 1:
        d = (DEGREE * unit) * _power(z * unit, DEGREE - 1)
    else:
        d = tl.exp(tl.minimum(tl.minimum(z, 0.0) - tl.minimum(m, 0.0), 0.0)) * unit
    return d


# --- what counts, and what dropout keeps -------------------------------------------------------------------------


@triton.jit
def _visible(
    Mask, rows, cols, stride_mt, stride_ms, n_queries, n_keys, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Which elements of a block of scores count; rows and cols as [M, 1] and [1, N], or [1, M] and [N, 1]."""
    inside = (rows < n_queries) & (cols < n_keys)
    if CAUSAL:
        inside = inside & (rows >= cols)
    if MASK:
        pointers = Mask + rows.to(tl.int64) * stride_mt + cols.to(tl.int64) * stride_ms
        inside = inside & (tl.load(pointers, mask=inside, other=0) != 0)
    return inside


# What a mask shows: anything; all queries the same range of keys; such a range, and of it no keys after themselves.
ANY = tl.constexpr(0)
RANGE = tl.constexpr(1)
CAUSAL_RANGE = tl.constexpr(2)
KIND_ROWS = tl.constexpr(64)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _mask_kind(
    Mask, Kinds, stride_mb, stride_mh, stride_mt, stride_ms, n_heads, n_queries, n_keys,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """For each KIND_ROWS queries of a mask, four numbers: whether it is a RANGE, a CAUSAL_RANGE, and the range."""
    block, head = _place(n_queries, KIND_ROWS)
    Mask += (head // n_heads).to(tl.int64) * stride_mb + (head % n_heads).to(tl.int64) * stride_mh
    rows = block * KIND_ROWS + tl.arange(0, KIND_ROWS)
    first, last, count = n_keys, 0, 0
    ranges = tl.full([KIND_ROWS], 1, tl.int32)
    causals = tl.full([KIND_ROWS], 1, tl.int32)
    for start in range(0, n_keys, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # The last query sees the whole range, whichever kind it is.
        place = Mask + cols.to(tl.int64) * stride_ms
        lowest = tl.load(place + (n_queries - 1).to(tl.int64) * stride_mt, mask=cols < n_keys, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(lowest, cols, n_keys), 0))
        last = tl.maximum(last, tl.max(tl.where(lowest, cols + 1, 0), 0))
        count += tl.sum(lowest.to(tl.int32), 0)
        inside = (rows < n_queries)[:, None] & (cols < n_keys)[None, :]
        seen = tl.load(place[None, :] + rows.to(tl.int64)[:, None] * stride_mt, mask=inside, other=0) != 0
        same = ~inside | (seen == lowest[None, :])
        causal = ~inside | (seen == (lowest[None, :] & (rows[:, None] >= cols[None, :])))
        ranges = tl.minimum(ranges, tl.min(same.to(tl.int32), 1))
        causals = tl.minimum(causals, tl.min(causal.to(tl.int32), 1))
    first = tl.minimum(first, last)
    one = count == last - first
    Kinds += (head.to(tl.int64) * tl.cdiv(n_queries, KIND_ROWS) + block) * 4
    tl.store(Kinds, tl.where(one, tl.min(ranges, 0), 0))
    tl.store(Kinds + 1, tl.where(one & (n_queries == n_keys), tl.min(causals, 0), 0))
    tl.store(Kinds + 2, first)
    tl.store(Kinds + 3, last)


@triton.jit
def _kind(Kinds, head, n_heads, n_queries, n_keys, stride_kind_b, stride_kind_h, MASK: tl.constexpr):
    """(ANY, RANGE or CAUSAL_RANGE, its first key, its last + 1) of a head; without a mask all keys are one range."""
    kind, first, last = RANGE, 0, n_keys
    if MASK:
        blocks = tl.cdiv(n_queries, KIND_ROWS)
        Kinds += ((head // n_heads) * stride_kind_b + (head % n_heads) * stride_kind_h).to(tl.int64) * 4
        ranges, causals = 1, 1
        for start in range(0, blocks, 128):
            index = start + tl.arange(0, 128)
            ranges = tl.minimum(ranges, tl.min(tl.load(Kinds + 4 * index, mask=index < blocks, other=1), 0))
            causals = tl.minimum(causals, tl.min(tl.load(Kinds + 4 * index + 1, mask=index < blocks, other=1), 0))
        first, last = tl.load(Kinds + 2), tl.load(Kinds + 3)
        kind = tl.where(ranges > 0, RANGE, tl.where(causals > 0, CAUSAL_RANGE, ANY))
    return kind, first, last


@triton.jit
def _key_bounds(
    kind, first, last, start, n_keys, KERNEL: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """For queries from `start` on: keys from `begin` to `whole` without a mask, from there to `end` with one."""
    begin, end = first // BLOCK_N * BLOCK_N, last
    whole = end
    if CAUSAL:
        end = tl.minimum(end, start + BLOCK_M)
        # Before it every key is seen by every query of the block.
        whole = tl.minimum(end, start) // BLOCK_N * BLOCK_N
    if MASK:
        if kind == CAUSAL_RANGE:
            end = tl.minimum(end, start + BLOCK_M)
            whole = tl.minimum(end, start) // BLOCK_N * BLOCK_N
        if kind == ANY:
            begin, whole, end = 0, 0, n_keys
        end = tl.maximum(end, begin)
        whole = tl.maximum(whole, begin)
    if KERNEL == 2:
        # elu(0) + 1 is not 0: what is beyond the last key has to be hidden.
        whole = begin
    return begin, whole, end


@triton.jit
def _row_keys(rows, head, Seed):
    """Three random numbers of 32 bits for each row."""
    row = tl.cast(rows, tl.uint32)
    zero = row * 0
    first, second, third, _ = tl.philox(tl.load(Seed), row, zero + tl.cast(head, tl.uint32), zero, zero)
    return (
        tl.cast(first, tl.uint32, bitcast=True),
        tl.cast(second, tl.uint32, bitcast=True),
        tl.cast(third, tl.uint32, bitcast=True),
    )


@triton.jit
def _load_row_keys(RowKeys, n_rows):
    """What `_row_keys` gave, from memory."""
    return (
        tl.load(RowKeys).to(tl.uint32, bitcast=True),
        tl.load(RowKeys + n_rows).to(tl.uint32, bitcast=True),
        tl.load(RowKeys + 2 * n_rows).to(tl.uint32, bitcast=True),
    )


@triton.jit
def _kept(first, second, third, cols, threshold):
    """Dropout's choice: a random polynomial of each row, at each column (see the module's docstring)."""
    number = tl.cast(cols, tl.uint32)
    return (first * number + second) * number + third >= tl.cast(threshold, tl.uint32)


@triton.jit
def _tile(
    Base, start, n, stride_n, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, first=0,
):  # fmt: skip
    """Rows of a [n, D] matrix from `start` on; zero before row `first` and beyond the last."""
    index, features = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    # 64 bits where the sequence counts, 32 within a block.
    pointers = Base + (tl.full((), 0, tl.int64) + start) * stride_n + (index * stride_n + features * stride_d)
    inside = (index < n - start) & (index >= first - start)
    if BLOCK_D != HEAD_DIM:
        inside = inside & (features < HEAD_DIM)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _narrow(x, like):
    """float32 in the type of `like`."""
    if like.dtype == tl.bfloat16:
        return to_bfloat16(x)
    return x.to(like.dtype)


@triton.jit
def _round(x, like):
    """(x as `_narrow` has it, the same in float32)."""
    narrow = _narrow(x, like)
    if like.dtype == tl.bfloat16:
        return narrow, from_bfloat16(narrow)
    return narrow, narrow.to(tl.float32)


@triton.jit
def _place(n, BLOCK: tl.constexpr):
    """(block, head) of a program. One dimension: the others of a grid end at 65,535, which batches times heads pass."""
    blocks = tl.cdiv(n, BLOCK)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks


# --- forward -----------------------------------------------------------------------------------------------------


@triton.jit
def _sum_keys(
    summed, total, q, m, Key, Value, Mask, rows, first, second, third, threshold, scale, c, begin, end, seen_from,
    seen_to, stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys,
    SCALED: tl.constexpr, MASKED: tl.constexpr, KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`summed` and `total` with sum_j f v and sum_j f of keys from `begin` to `end` added."""
    for start in range(begin, end, BLOCK_N):
        k = _tile(Key, start, seen_to, stride_ks, stride_kd, HEAD_DIM, BLOCK_D, BLOCK_N, seen_from)
        v = _tile(Value, start, seen_to, stride_vs, stride_vd, HEAD_DIM, BLOCK_D, BLOCK_N, seen_from)
        cols = start + tl.arange(0, BLOCK_N)
        x = _dot(q, tl.trans(k), PRECISION)
        if SCALED:
            f = _scaled_strength(x * scale, m[:, None], KERNEL, DEGREE)
        else:
            f = _strength(x, c, scale, KERNEL, DEGREE)
        if MASKED:
            seen = _visible(Mask, rows[:, None], cols[None, :], stride_mt, stride_ms, n_queries, n_keys, CAUSAL, MASK)
            f = tl.where(seen, f, 0.0)
        # Rounded before they are summed, so that the weights add up to one.
        f, wide = _round(f, v)
        total += tl.sum(wide, 1)
        if DROPOUT:
            kept = _kept(first[:, None], second[:, None], third[:, None], cols[None, :], threshold)
            f = _narrow(tl.where(kept, wide, 0.0), v)
        summed += _dot(f, v, PRECISION)
    return summed, total


@triton.jit(do_not_specialize=UNSPECIALISED)
def _forward(
    Query, Key, Value, Mask, Kinds, Seed, Output, Residual, Sums, Scales,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mt, stride_ms,
    stride_ob, stride_oh, stride_ot, stride_od, stride_kind_b, stride_kind_h,
    n_heads, n_queries, n_keys, scale, c, threshold, factor,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
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
    Query += b * stride_qb + h * stride_qh
    q = _tile(Query, start, n_queries, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, BLOCK_M)
    first, second, third = rows, rows, rows
    if DROPOUT:
        first, second, third = _row_keys(rows, head, Seed)
    kind, seen_from, seen_to = _kind(Kinds, head, n_heads, n_queries, n_keys, stride_kind_b, stride_kind_h, MASK)
    begin, whole, end = _key_bounds(kind, seen_from, seen_to, start, n_keys, KERNEL, CAUSAL, MASK, BLOCK_M, BLOCK_N)
    neutral = 0.0 if KERNEL == 2 else 1.0
    m = tl.full([BLOCK_M], neutral, tl.float32)
    summed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    summed, total = _sum_keys(
        summed, total, q, m, Key, Value, Mask, rows, first, second, third, threshold, scale, c, begin, whole,
        seen_from, seen_to, stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys,
        False, False, KERNEL, DEGREE, False, False, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    if CAUSAL or MASK or KERNEL == 2:
        summed, total = _sum_keys(
            summed, total, q, m, Key, Value, Mask, rows, first, second, third, threshold, scale, c, whole, end,
            0, n_keys, stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys,
            False, True, KERNEL, DEGREE, CAUSAL, MASK, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    # Not a number fails the comparisons, too. float16 has no digits left for small weights, so there it is not rare.
    smallest = 0.5 if Output.dtype.element_ty == tl.float16 else SMALLEST
    lost = (rows < n_queries) & ~((total >= smallest) & (total <= LARGEST))
    if tl.max(lost.to(tl.int32), 0) > 0:
        lowest = -float("inf") if KERNEL == 2 else 0.0
        peak = tl.full([BLOCK_M], lowest, tl.float32)
        last = n_keys
        if CAUSAL:
            last = tl.minimum(n_keys, start + BLOCK_M)
        for key in range(0, last, BLOCK_N):
            cols = key + tl.arange(0, BLOCK_N)
            k = _tile(Key, key, n_keys, stride_ks, stride_kd, HEAD_DIM, BLOCK_D, BLOCK_N)
            z = _dot(q, tl.trans(k), PRECISION) * scale
            seen = _visible(Mask, rows[:, None], cols[None, :], stride_mt, stride_ms, n_queries, n_keys, CAUSAL, MASK)
            if KERNEL == 2:
                peak = tl.maximum(peak, tl.max(tl.where(seen, z, lowest), 1))
            else:
                peak = tl.maximum(peak, tl.max(tl.where(seen, tl.abs(z), 0.0), 1))
        if KERNEL == 2:
            better = tl.where(peak == lowest, 0.0, peak)
        elif KERNEL == 1:
            better = tl.where(peak > ZERO, peak, float("inf"))
        else:
            # Any m serves, and one that is not neutral tells the backward pass that the row was lost.
            better = tl.where(peak > ZERO, tl.minimum(peak, 0.5), float("inf"))
        m = tl.where(lost, better, m)
        summed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        summed, total = _sum_keys(
            summed, total, q, m, Key, Value, Mask, rows, first, second, third, threshold, scale, c, 0, last,
            0, n_keys, stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys, True, True,
            KERNEL, DEGREE, CAUSAL, MASK, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
        # A row that sees no key has weights of zero in either form.
        m = tl.where(total == 0.0, neutral, m)
    output = summed * (factor / tl.where(total == 0.0, 1.0, total))[:, None]
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


# --- backward ----------------------------------------------------------------------------------------------------


@triton.jit
def _row_statistics(
    Grad, Output, Residual, Seed, Sums, Rows, RowKeys,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_ob, stride_oh, stride_ot, stride_od,
    n_heads, n_queries, n_padded, n_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O) and 1 / N of each row, as one number of 64 bits, and the row's random numbers; zeros up to
    `n_padded` rows a head, so that loops need no masks for them."""
    block, head = _place(n_padded, BLOCK_M)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    start = block * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    Grad += b * stride_gb + h * stride_gh
    first = b * stride_ob + h * stride_oh
    g = _tile(Grad, start, n_queries, stride_gt, stride_gd, HEAD_DIM, BLOCK_D, BLOCK_M)
    o = _tile(Output + first, start, n_queries, stride_ot, stride_od, HEAD_DIM, BLOCK_D, BLOCK_M).to(tl.float32)
    if RESIDUAL:
        o += _tile(Residual + first, start, n_queries, stride_ot, stride_od, HEAD_DIM, BLOCK_D, BLOCK_M).to(tl.float32)
    total = tl.load(Sums + head.to(tl.int64) * n_queries + rows, mask=rows < n_queries, other=0.0)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    delta = tl.sum(g.to(tl.float32) * o, 1)
    high = delta.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    offset = head.to(tl.int64) * n_padded + rows
    tl.store(Rows + offset, (high | inverse.to(tl.uint32, bitcast=True).to(tl.uint64)).to(tl.int64, bitcast=True))
    if DROPOUT:
        keys = _row_keys(rows, head, Seed)
        for i in tl.static_range(3):
            tl.store(RowKeys + i * n_rows + offset, keys[i].to(tl.int32, bitcast=True))


@triton.jit
def _load_rows(Rows):
    """(1 / N, rowsum(dO * O)) of rows, from `_row_statistics`."""
    both = tl.load(Rows).to(tl.uint64, bitcast=True)
    return both.to(tl.uint32).to(tl.float32, bitcast=True), (both >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _block_gradients(
    x, inner, m, inverse, delta, seen, kept, factor, scale, c, slope_factor,
    SCALED: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """(weights after dropout, but for its factor; dL/dz, but for `slope_factor`) of a block of scores."""
    if SCALED:
        weights = _scaled_strength(x * scale, m, KERNEL, DEGREE) * inverse
        slope = _scaled_slope(x * scale, m, KERNEL, DEGREE) * inverse
        if not HALF:
            slope = slope / slope_factor
    else:
        weights, slope = _weights_and_slope(x, inverse, c, scale, slope_factor, KERNEL, DEGREE, HALF)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
        slope = tl.where(seen, slope, 0.0)
    if DROPOUT:
        weights = tl.where(kept, weights, 0.0)
        inner = tl.where(kept, inner, 0.0) * factor
    return weights, (inner - delta) * slope


@triton.jit
def _any_scaled(Scales, n_queries, KERNEL: tl.constexpr):
    """Whether a row of a head was computed with a scale of its own."""
    neutral = 0.0 if KERNEL == 2 else 1.0
    found = tl.zeros([512], tl.int32)
    for start in range(0, n_queries, 512):
        rows = start + tl.arange(0, 512)
        m = tl.load(Scales + rows, mask=rows < n_queries, other=neutral)
        found = tl.maximum(found, (m != neutral).to(tl.int32))
    return tl.max(found, 0)


@triton.jit
def _sum_queries(
    dk, dv, k, v, Query, Grad, Mask, Rows, Scales, RowKeys, cols, begin, end,
    stride_qt, stride_qd, stride_gt, stride_gd, stride_mt, stride_ms, n_queries, n_keys, n_rows,
    scale, c, slope_factor, threshold, factor,
    SCALED: tl.constexpr, MASKED: tl.constexpr, KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` with what the queries from `begin` to `end` give.

    Scores stand as [keys, queries], so that weights go into the products as they lie in registers.
    """
    HALF: tl.constexpr = k.dtype == tl.float16
    index = tl.arange(0, BLOCK_M)
    for start in range(begin, end, BLOCK_M):
        q = _tile(Query, start, n_queries, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, BLOCK_M)
        g = _tile(Grad, start, n_queries, stride_gt, stride_gd, HEAD_DIM, BLOCK_D, BLOCK_M)
        inverse, delta = _load_rows(Rows + start + index)
        x = _dot(k, tl.trans(q), PRECISION)
        inner = _dot(v, tl.trans(g), PRECISION)
        m, seen, kept = inverse, inverse, inverse
        if SCALED:
            m = tl.load(Scales + start + index, mask=index < n_queries - start, other=1.0)
        if MASKED:
            rows = (start + index)[None, :]
            seen = _visible(Mask, rows, cols[:, None], stride_mt, stride_ms, n_queries, n_keys, CAUSAL, MASK)
        if DROPOUT:
            first, second, third = _load_row_keys(RowKeys + start + index, n_rows)
            kept = _kept(first[None, :], second[None, :], third[None, :], cols[:, None], threshold)
        weights, dz = _block_gradients(
            x, inner, m[None, :], inverse[None, :], delta[None, :], seen, kept, factor, scale, c, slope_factor,
            SCALED, MASKED, DROPOUT, KERNEL, DEGREE, HALF,
        )  # fmt: skip
        dv += _dot(_narrow(weights, g), g, PRECISION)
        dk += _dot(_narrow(dz, q), q, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def _key_gradients(
    Query, Key, Value, Mask, Kinds, Grad, Rows, Scales, RowKeys, KeyGrad, ValueGrad,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mt, stride_ms,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_yb, stride_yh, stride_ys, stride_yd,
    stride_wb, stride_wh, stride_ws, stride_wd, stride_kind_b, stride_kind_h,
    n_heads, n_queries, n_keys, n_padded, n_rows, scale, c, slope_factor, threshold, factor, finish,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys."""
    block, head = _place(n_keys, BLOCK_N)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_D)
    Query += b * stride_qb + h * stride_qh
    Grad += b * stride_gb + h * stride_gh
    Mask += b * stride_mb + h * stride_mh
    Key += b * stride_kb + h * stride_kh
    Value += b * stride_vb + h * stride_vh
    # The padded length is a multiple of every block.
    padded = tl.multiple_of(head.to(tl.int64) * n_padded, 128)
    Rows += padded
    RowKeys += padded
    Scales += head.to(tl.int64) * n_queries
    kind, seen_from, seen_to = _kind(Kinds, head, n_heads, n_queries, n_keys, stride_kind_b, stride_kind_h, MASK)
    if MASK:
        seen_from = tl.where(kind == ANY, 0, seen_from)
        seen_to = tl.where(kind == ANY, n_keys, seen_to)
    # Hidden keys are zero: f(0) = f'(0) = 0.
    k = _tile(Key, block * BLOCK_N, seen_to, stride_ks, stride_kd, HEAD_DIM, BLOCK_D, BLOCK_N, seen_from)
    v = _tile(Value, block * BLOCK_N, seen_to, stride_vs, stride_vd, HEAD_DIM, BLOCK_D, BLOCK_N, seen_from)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Queries from `begin` to `whole` with a mask, from there to `end` without.
    begin, whole, end = 0, 0, n_queries
    causal = CAUSAL
    if MASK:
        causal = kind == CAUSAL_RANGE
        end = tl.where((block * BLOCK_N < seen_to) & ((block + 1) * BLOCK_N > seen_from), n_queries, 0)
    if causal:
        # Queries before these keys see none of them; from the last key on they see all.
        begin = tl.minimum((block * BLOCK_N) // BLOCK_M * BLOCK_M, end)
        whole = tl.minimum(tl.cdiv((block + 1) * BLOCK_N, BLOCK_M) * BLOCK_M, end)
    if MASK:
        whole = tl.where(kind == ANY, end, whole)
    if KERNEL == 2:
        whole = end
    # Rows with scales of their own are rare: a head without any takes the loops without them.
    scaled_end = begin
    if _any_scaled(Scales, n_queries, KERNEL) > 0:
        scaled_end = end
        end = begin
        whole = begin
    dk, dv = _sum_queries(
        dk, dv, k, v, Query, Grad, Mask, Rows, Scales, RowKeys, cols, begin, scaled_end,
        stride_qt, stride_qd, stride_gt, stride_gd, stride_mt, stride_ms,
        n_queries, n_keys, n_rows, scale, c, slope_factor, threshold, factor, True, True,
        KERNEL, DEGREE, CAUSAL, MASK, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
    )  # fmt: skip
    if CAUSAL or MASK or KERNEL == 2:
        dk, dv = _sum_queries(
            dk, dv, k, v, Query, Grad, Mask, Rows, Scales, RowKeys, cols, begin, whole,
            stride_qt, stride_qd, stride_gt, stride_gd, stride_mt, stride_ms,
            n_queries, n_keys, n_rows, scale, c, slope_factor, threshold, factor, False, True,
            KERNEL, DEGREE, CAUSAL, MASK, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
        )  # fmt: skip
    dk, dv = _sum_queries(
        dk, dv, k, v, Query, Grad, Mask, Rows, Scales, RowKeys, cols, whole, end,
        stride_qt, stride_qd, stride_gt, stride_gd, stride_mt, stride_ms,
        n_queries, n_keys, n_rows, scale, c, slope_factor, threshold, factor, False, False,
        KERNEL, DEGREE, False, False, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
    )  # fmt: skip
    stored = (cols < n_keys)[:, None] & (features < HEAD_DIM)[None, :]
    index = cols.to(tl.int64)[:, None]
    pointers = KeyGrad + b * stride_yb + h * stride_yh + index * stride_ys + features[None, :] * stride_yd
    tl.store(pointers, (dk * finish).to(KeyGrad.dtype.element_ty), mask=stored)
    pointers = ValueGrad + b * stride_wb + h * stride_wh + index * stride_ws + features[None, :] * stride_wd
    if DROPOUT:
        dv = dv * factor
    tl.store(pointers, dv.to(ValueGrad.dtype.element_ty), mask=stored)


@triton.jit
def _sum_keys_of_gradients(
    dq, q, g, m, inverse, delta, Key, Value, Mask, rows, first, second, third, begin, end, seen_from, seen_to,
    stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys,
    scale, c, slope_factor, threshold, factor,
    SCALED: tl.constexpr, MASKED: tl.constexpr, KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq` with what the keys from `begin` to `end` give."""
    HALF: tl.constexpr = q.dtype == tl.float16
    for start in range(begin, end, BLOCK_N):
        k = _tile(Key, start, seen_to, stride_ks, stride_kd, HEAD_DIM, BLOCK_D, BLOCK_N, seen_from)
        v = _tile(Value, start, seen_to, stride_vs, stride_vd, HEAD_DIM, BLOCK_D, BLOCK_N, seen_from)
        cols = start + tl.arange(0, BLOCK_N)
        x = _dot(q, tl.trans(k), PRECISION)
        inner = _dot(g, tl.trans(v), PRECISION)
        seen, kept = inverse, inverse
        if MASKED:
            seen = _visible(Mask, rows[:, None], cols[None, :], stride_mt, stride_ms, n_queries, n_keys, CAUSAL, MASK)
        if DROPOUT:
            kept = _kept(first[:, None], second[:, None], third[:, None], cols[None, :], threshold)
        _, dz = _block_gradients(
            x, inner, m[:, None], inverse[:, None], delta[:, None], seen, kept, factor, scale, c, slope_factor,
            SCALED, MASKED, DROPOUT, KERNEL, DEGREE, HALF,
        )  # fmt: skip
        dq += _dot(_narrow(dz, k), k, PRECISION)
    return dq


@triton.jit(do_not_specialize=UNSPECIALISED)
def _query_gradients(
    Query, Key, Value, Mask, Kinds, Grad, Rows, Scales, RowKeys, QueryGrad,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mt, stride_ms,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_xb, stride_xh, stride_xt, stride_xd,
    stride_kind_b, stride_kind_h,
    n_heads, n_queries, n_keys, n_padded, n_rows, scale, c, slope_factor, threshold, factor, finish,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries."""
    block, head = _place(n_queries, BLOCK_M)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    start = block * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    features = tl.arange(0, BLOCK_D)
    Key += b * stride_kb + h * stride_kh
    Value += b * stride_vb + h * stride_vh
    Mask += b * stride_mb + h * stride_mh
    Query += b * stride_qb + h * stride_qh
    Grad += b * stride_gb + h * stride_gh
    q = _tile(Query, start, n_queries, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, BLOCK_M)
    g = _tile(Grad, start, n_queries, stride_gt, stride_gd, HEAD_DIM, BLOCK_D, BLOCK_M)
    padded = head.to(tl.int64) * n_padded + rows
    inside = rows < n_queries
    neutral = 0.0 if KERNEL == 2 else 1.0
    inverse, delta = _load_rows(Rows + padded)
    m = tl.load(Scales + head.to(tl.int64) * n_queries + rows, mask=inside, other=neutral)
    first, second, third = rows, rows, rows
    if DROPOUT:
        first, second, third = _load_row_keys(RowKeys + padded, n_rows)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    kind, seen_from, seen_to = _kind(Kinds, head, n_heads, n_queries, n_keys, stride_kind_b, stride_kind_h, MASK)
    begin, whole, end = _key_bounds(kind, seen_from, seen_to, start, n_keys, KERNEL, CAUSAL, MASK, BLOCK_M, BLOCK_N)
    scaled_end = begin
    if tl.max((m != neutral).to(tl.int32), 0) > 0:
        scaled_end, whole, end = end, begin, begin
    dq = _sum_keys_of_gradients(
        dq, q, g, m, inverse, delta, Key, Value, Mask, rows, first, second, third, begin, scaled_end, 0, n_keys,
        stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys,
        scale, c, slope_factor, threshold, factor, True, True, KERNEL, DEGREE, CAUSAL, MASK, DROPOUT,
        HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq = _sum_keys_of_gradients(
        dq, q, g, m, inverse, delta, Key, Value, Mask, rows, first, second, third, begin, whole, seen_from, seen_to,
        stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys,
        scale, c, slope_factor, threshold, factor, False, False, KERNEL, DEGREE, False, False, DROPOUT,
        HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
    )  # fmt: skip
    if CAUSAL or MASK or KERNEL == 2:
        dq = _sum_keys_of_gradients(
            dq, q, g, m, inverse, delta, Key, Value, Mask, rows, first, second, third, whole, end, 0, n_keys,
            stride_ks, stride_kd, stride_vs, stride_vd, stride_mt, stride_ms, n_queries, n_keys,
            scale, c, slope_factor, threshold, factor, False, True, KERNEL, DEGREE, CAUSAL, MASK, DROPOUT,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    stored = inside[:, None] & (features < HEAD_DIM)[None, :]
    pointers = QueryGrad + b * stride_xb + h * stride_xh + rows.to(tl.int64)[:, None] * stride_xt
    pointers += features[None, :] * stride_xd
    tl.store(pointers, (dq * finish).to(QueryGrad.dtype.element_ty), mask=stored)
