"""The device code of `attnpatch.kernels.select_triton`: r keys for each query, and attention over them.

    _statistics      what a row's weights are scaled by, whether it is uniform, and ("centered") the mean of its values
    _select          the r best keys of each row
    _attend          their renormalised weights, and the output
    _row_gradients   the gradient of the kept scores, and that of the queries
    _key_gradients   those of keys and values, by the programs that own keys: no atomics, the same bits in every run

A weight stands here without the row's sum, which renormalising cancels. Keys are ranked by one integer of 64 bits:
above, 32 that grow with the score they are ranked by; below, 32 that fall with the index, so that the lower of equal
ones wins. Such scores are not negative, which leaves the negative integers to those that are 0 (of a value at the mean,
or of length 0), by weight. A row keeps its best R so far, in ascending order; the best R of the next keys come in
descending order, and the larger of each pair are the best R of both.

Of a row's result only what the row sees is part: hidden scores are excluded before anything is compared or added, and
values that are not finite take no part in a mean (where a row sees one it ranks first, so that it shows).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnpatch.kernels.score_triton_device import _dot, _narrow, _place, _power, _tile
from attnpatch.kernels.triton_device import UPCAST

# Arguments whose being 1 or a multiple of 16 would only make Triton compile again.
UNSPECIALISED = ["n_heads", "n_queries", "n_keys"]

SOFTMAX, EXPRESSIVE, POLYNOMIAL, ELU = (tl.constexpr(code) for code in range(4))
WEIGHT, NORM, CENTERED = (tl.constexpr(code) for code in range(3))
NO_MASK, BOOL, BIAS = (tl.constexpr(code) for code in range(3))

# A float mask from here on excludes the key, as in `attnpatch.kernels.score`.
EXCLUDED = tl.constexpr(-9.9e3)
# sqrt of the smallest normal float32: a row whose weights sum to less is uniform.
SMALLEST = tl.constexpr(1.0842021724855044e-19)
WORST = tl.constexpr(-(2**63))
NOT_A_NUMBER = tl.constexpr(0x7FFFFFFF)
# Squared distances below this share of the squares they are the difference of are computed from differences.
CANCELS = tl.constexpr(0.0625)


# --- weights -----------------------------------------------------------------------------------------------------


@triton.jit
def _scores(
    q, Key, start, n_keys, stride_ks, stride_kd, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = _tile(Key, start, n_keys, stride_ks, stride_kd, HEAD_DIM, BLOCK_D, BLOCK_N)
    return _dot(q, tl.trans(k), PRECISION) * scale


@triton.jit
def _visible(
    Mask, rows, cols, stride_mt, stride_ms, n_queries, n_keys, CAUSAL: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """(which keys each row sees, the bias of a float mask), rows as [M, 1] and cols as [1, N] or [M, N]."""
    seen = (rows < n_queries) & (cols >= 0) & (cols < n_keys)
    if CAUSAL:
        seen = seen & (rows >= cols)
    bias = 0.0
    if MASK != NO_MASK:
        pointers = Mask + rows.to(tl.int64) * stride_mt + cols.to(tl.int64) * stride_ms
        given = tl.load(pointers, mask=seen, other=0)
        if MASK == BOOL:
            seen = seen & (given != 0)
        else:
            bias = given.to(tl.float32)
            seen = seen & (bias > EXCLUDED)
    return seen, bias


@triton.jit
def _row_scale(z, bias, seen, KERNEL: tl.constexpr, MASK: tl.constexpr):
    """(the largest of what the kernel is scaled by, the largest bias) of each row, before `_bounded`."""
    lowest = -float("inf")
    peak = lowest
    if KERNEL == SOFTMAX and MASK == BIAS:
        z = z + bias
    if KERNEL != SOFTMAX and KERNEL != ELU:
        z = tl.abs(z)
    m = tl.max(tl.where(seen, z, lowest), 1)
    if KERNEL != SOFTMAX and MASK == BIAS:
        peak = tl.max(tl.where(seen, bias, lowest), 1)
    return m, peak


@triton.jit
def _bounded(m, KERNEL: tl.constexpr):
    if KERNEL != SOFTMAX and KERNEL != ELU:
        m = tl.maximum(m, SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    if KERNEL == EXPRESSIVE:
        m = tl.minimum(m, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return m


@triton.jit
def _strength(z, m, KERNEL: tl.constexpr, DEGREE: tl.constexpr):
    """f(z) up to a factor a row, which m sets; the arithmetic of `attnpatch.kernels.score`, whose ties it has."""
    if KERNEL == EXPRESSIVE:
        # Whether z is large or not, the part that is not wanted stays finite.
        large = tl.abs(z) > 1.0
        inverse = 1.0 / tl.where(large, z, 1.0)
        z = tl.where(large, 1.0, z)
        unit = z * (1.0 / m)
        f = tl.where(large, tl.div_rn(1.0, 1.0 + inverse * inverse), tl.div_rn(unit * unit, 1.0 + z * z))
    elif KERNEL == POLYNOMIAL:
        f = _power(z * (1.0 / m), DEGREE)
    else:
        # Triton would take the number of a number and NaN.
        low = tl.exp(tl.minimum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - tl.minimum(m, 0.0))
        f = tl.where(z > 0.0, z + 1.0, low) * (1.0 / (1.0 + tl.maximum(m, 0.0)))
    return f


@triton.jit
def _mass(
    z, bias, seen, m, peak, uniform, KERNEL: tl.constexpr, DEGREE: tl.constexpr, MASK: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    """Weights up to a factor a row, 0 where hidden; of rows as [M, 1]. Without UNIFORM no row counts as uniform."""
    if KERNEL == SOFTMAX:
        if MASK == BIAS:
            z = z + bias
        mass = tl.exp(z - m)
    else:
        mass = _strength(z, m, KERNEL, DEGREE)
        prior = 1.0
        if MASK == BIAS:
            prior = tl.exp(bias - peak)
            mass = mass * prior
        if UNIFORM:
            mass = tl.where(uniform != 0, prior, mass)
    return tl.where(seen, mass, 0.0)


@triton.jit
def _log_slope(z, KERNEL: tl.constexpr, DEGREE: tl.constexpr):
    """f'(z) / f(z), as in `attnpatch.kernels.score_blocked`."""
    if KERNEL == ELU:
        return tl.where(z > 0.0, 1.0 / (1.0 + tl.maximum(z, 0.0)), 1.0)
    # Of smaller scores every row is uniform: SMALLEST, 2 ** -63, to the power of 1 + 1 / degree.
    ORDER: tl.constexpr = DEGREE if KERNEL == POLYNOMIAL else 2
    smallest = 2.0 ** (-63.0 * (1.0 + 1.0 / ORDER))
    inverse = tl.where(tl.abs(z) > smallest, 1.0 / tl.where(z == 0.0, 1.0, z), 0.0)
    if KERNEL == EXPRESSIVE:
        return 2.0 * inverse / (1.0 + z * z)
    return DEGREE * inverse


# --- the choice of keys ------------------------------------------------------------------------------------------


@triton.jit
def _last_key(block, n_keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    if CAUSAL:
        n_keys = tl.minimum(n_keys, (block + 1) * BLOCK_M)
    return n_keys


@triton.jit(do_not_specialize=UNSPECIALISED)
def _statistics(
    Query, Key, Value, Mask, Norm, Scale, Peak, Uniform, Mean,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mt, stride_ms,
    n_heads, n_queries, n_keys, scale,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, CRITERION: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scale (see `_strength`), Peak of the bias, Uniform, all [B, H, T]; Mean [B, H, T, Dv] of what a row sees."""
    block, head = _place(n_queries, BLOCK_M)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    start = block * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    index = tl.arange(0, BLOCK_N)
    Key += b * stride_kb + h * stride_kh
    Value += b * stride_vb + h * stride_vh
    Mask += b * stride_mb + h * stride_mh
    Query += b * stride_qb + h * stride_qh
    q = _tile(Query, start, n_queries, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, BLOCK_M)
    end = _last_key(block, n_keys, CAUSAL, BLOCK_M)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for first in range(0, end, BLOCK_N):
        z = _scores(q, Key, first, n_keys, stride_ks, stride_kd, scale, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION)
        cols = first + index
        seen, bias = _visible(
            Mask, rows[:, None], cols[None, :], stride_mt, stride_ms, n_queries, n_keys, CAUSAL, MASK
        )  # fmt: skip
        new_m, new_peak = _row_scale(z, bias, seen, KERNEL, MASK)
        m, peak = tl.maximum(m, new_m), tl.maximum(peak, new_peak)
    m = _bounded(m, KERNEL)
    place = head.to(tl.int64) * n_queries + rows
    inside = rows < n_queries
    tl.store(Scale + place, m, mask=inside)
    uniform = tl.zeros([BLOCK_M], tl.int32)
    if KERNEL != SOFTMAX:
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, end, BLOCK_N):
            z = _scores(q, Key, first, n_keys, stride_ks, stride_kd, scale, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION)
            cols = first + index
            seen, bias = _visible(
                Mask, rows[:, None], cols[None, :], stride_mt, stride_ms, n_queries, n_keys, CAUSAL, MASK
            )  # fmt: skip
            mass = _mass(z, bias, seen, m[:, None], peak[:, None], 0, KERNEL, DEGREE, MASK, False)
            total += tl.sum(mass, 1)
        uniform = (total < SMALLEST).to(tl.int32)
        tl.store(Uniform + place, uniform.to(tl.int8), mask=inside)
        if MASK == BIAS:
            tl.store(Peak + place, peak, mask=inside)
    if CRITERION == CENTERED:
        count = tl.zeros([BLOCK_M], tl.float32)
        mean = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for first in range(0, end, BLOCK_N):
            z = _scores(q, Key, first, n_keys, stride_ks, stride_kd, scale, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION)
            v = _tile(Value, first, n_keys, stride_vs, stride_vd, VALUE_DIM, BLOCK_V, BLOCK_N)
            cols = first + index
            seen, bias = _visible(
                Mask, rows[:, None], cols[None, :], stride_mt, stride_ms, n_queries, n_keys, CAUSAL, MASK
            )  # fmt: skip
            mass = _mass(
                z, bias, seen, m[:, None], peak[:, None], uniform[:, None], KERNEL, DEGREE, MASK, True
            )  # fmt: skip
            norm = tl.load(Norm + head.to(tl.int64) * n_keys + cols, mask=cols < n_keys, other=0.0)
            finite = norm < float("inf")
            # Another row may see what this one does not: 0 times infinity would be added.
            v = tl.where(finite[:, None], v, 0.0).to(v.dtype)
            counts = ((mass > 0.0) & finite[None, :]).to(tl.float32)
            count += tl.sum(counts, 1)
            mean += _dot(counts.to(v.dtype), v, PRECISION)
        mean = mean / tl.maximum(count, 1.0)[:, None]
        features = tl.arange(0, BLOCK_V)
        stored = inside[:, None] & (features < VALUE_DIM)[None, :]
        tl.store(Mean + place[:, None] * VALUE_DIM + features[None, :], mean, mask=stored)


@triton.jit
def _exact_products(x, v, PRECISION: tl.constexpr):
    """x v^T of x in float32, of which nothing is lost to tensor cores: as three bfloat16 where v is."""
    if v.dtype == tl.bfloat16:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        products = _dot(low, tl.trans(v), PRECISION)
        products += _dot(middle, tl.trans(v), PRECISION)
        products += _dot(high, tl.trans(v), PRECISION)
    else:
        products = _dot(x, tl.trans(v.to(tl.float32)), PRECISION)
    return products


@triton.jit
def _distances(
    mean, mean_squares, norm, counted, Value, Mean, first, rows, cols, stride_vs, stride_vd, n_queries, n_keys,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """||v_j - mu_i|| of a block; NaN for values that are not finite.

    By a product, which loses what the squares share; where that is too much (a common offset of the values), from the
    differences, feature by feature. Element by element, so that a row does not depend on what others see.
    """
    v = _tile(Value, first, n_keys, stride_vs, stride_vd, VALUE_DIM, BLOCK_V, BLOCK_N)
    finite = (norm < float("inf"))[None, :]
    squares = (norm * norm)[None, :] + mean_squares[:, None]
    distance = squares - 2.0 * _exact_products(mean, v, PRECISION)
    lost = counted & finite & ~(distance >= squares * CANCELS)
    if tl.max(tl.max(lost.to(tl.int32), 1), 0) > 0:
        exact = tl.full(squares.shape, 0.0, tl.float32)
        means = Mean + rows.to(tl.int64) * VALUE_DIM
        values = Value + cols.to(tl.int64) * stride_vs
        for feature in range(0, VALUE_DIM):
            mu = tl.load(means + feature, mask=rows < n_queries, other=0.0)
            x = tl.load(values + feature * stride_vd, mask=cols < n_keys, other=0.0).to(tl.float32)
            difference = x[None, :] - mu[:, None]
            exact += difference * difference
        distance = tl.where(lost, exact, distance)
    return tl.where(finite, tl.sqrt(tl.maximum(distance, 0.0)), float("nan"))


@triton.jit
def _ordered(x):
    """An int32 that grows with x; equal for both zeros, largest for NaN."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, NOT_A_NUMBER, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _packed(code, cols):
    return (code.to(tl.int64) << 32) | ((~cols).to(tl.int64) & 0xFFFFFFFF)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _select(
    Query, Key, Value, Mask, Norm, Scale, Peak, Uniform, Mean, Index,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mt, stride_ms,
    n_heads, n_queries, n_keys, scale,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, CRITERION: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    KEPT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Index [B, H, KEPT, T]: the keys of each row, best first; -1 where there are no more of positive weight."""
    block, head = _place(n_queries, BLOCK_M)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    start = block * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    inside = rows < n_queries
    Key += b * stride_kb + h * stride_kh
    Value += b * stride_vb + h * stride_vh
    Mask += b * stride_mb + h * stride_mh
    Norm += head.to(tl.int64) * n_keys
    Query += b * stride_qb + h * stride_qh
    q = _tile(Query, start, n_queries, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, BLOCK_M)
    place = head.to(tl.int64) * n_queries
    # By weight alone, softmax is ranked by the score: the order is the same, and an exponential is not needed.
    RANKED_BY_SCORE: tl.constexpr = KERNEL == SOFTMAX and CRITERION == WEIGHT
    if not RANKED_BY_SCORE:
        m = tl.load(Scale + place + rows, mask=inside, other=0.0)[:, None]
        peak, uniform = m, m
        if KERNEL != SOFTMAX:
            uniform = tl.load(Uniform + place + rows, mask=inside, other=0)[:, None]
            if MASK == BIAS:
                peak = tl.load(Peak + place + rows, mask=inside, other=0.0)[:, None]
    if CRITERION == CENTERED:
        features = tl.arange(0, BLOCK_V)
        Mean += place * VALUE_DIM
        mean = tl.load(
            Mean + rows.to(tl.int64)[:, None] * VALUE_DIM + features[None, :],
            mask=inside[:, None] & (features < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        mean_squares = tl.sum(mean * mean, 1)
    best = tl.full([BLOCK_M, BLOCK_R], WORST, tl.int64)
    for first in range(0, _last_key(block, n_keys, CAUSAL, BLOCK_M), BLOCK_N):
        z = _scores(q, Key, first, n_keys, stride_ks, stride_kd, scale, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION)
        cols = first + tl.arange(0, BLOCK_N)
        counted, bias = _visible(
            Mask, rows[:, None], cols[None, :], stride_mt, stride_ms, n_queries, n_keys, CAUSAL, MASK
        )  # fmt: skip
        if RANKED_BY_SCORE:
            code = _ordered(z + bias)
        else:
            mass = _mass(z, bias, counted, m, peak, uniform, KERNEL, DEGREE, MASK, KERNEL != SOFTMAX)
            # A NaN is kept, so that it shows.
            counted = counted & ~(mass <= 0.0)
            rank = mass
            if CRITERION != WEIGHT:
                norm = tl.load(Norm + cols, mask=cols < n_keys, other=0.0)
                if CRITERION == NORM:
                    rank = mass * norm[None, :]
                else:
                    rank = mass * _distances(
                        mean, mean_squares, norm, counted, Value, Mean, first, rows, cols, stride_vs, stride_vd,
                        n_queries, n_keys, VALUE_DIM, BLOCK_V, BLOCK_N, EXACT,
                    )  # fmt: skip
            code = _ordered(rank)
            code = tl.where(rank == 0.0, mass.to(tl.int32, bitcast=True) | -0x80000000, code)
        packed = tl.where(counted, _packed(code, cols[None, :]), WORST)
        better = packed > tl.min(best, 1)[:, None]
        if tl.max(tl.max(better.to(tl.int32), 1), 0) > 0:
            best = tl.sort(tl.maximum(best, tl.topk(packed, BLOCK_R)))
    slot = BLOCK_R - 1 - tl.arange(0, BLOCK_R)
    # Of WORST, too: -1.
    keys = ~(best.to(tl.int32))
    Index += place * KEPT
    tl.store(
        Index + slot[None, :].to(tl.int64) * n_queries + rows[:, None], keys,
        mask=inside[:, None] & (slot < KEPT)[None, :],
    )  # fmt: skip


# --- attention over the chosen keys ------------------------------------------------------------------------------


@triton.jit
def _lists(head, rows, n_queries, KEPT: tl.constexpr, BLOCK_R: tl.constexpr):
    """(offsets into [B, H, KEPT, T], which are inside) of a block of rows, [M, R]."""
    slot = tl.arange(0, BLOCK_R)[None, :]
    place = head.to(tl.int64) * n_queries * KEPT + slot.to(tl.int64) * n_queries + rows[:, None]
    return place, (rows < n_queries)[:, None] & (slot < KEPT)


@triton.jit
def _gather(Base, index, wanted, stride_n, stride_d, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a [n, DIM] matrix, [M, R, BLOCK] in float32; zero where not wanted."""
    features = tl.arange(0, BLOCK)[None, None, :]
    pointers = Base + index.to(tl.int64)[:, :, None] * stride_n + features * stride_d
    return tl.load(pointers, mask=wanted[:, :, None] & (features < DIM), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _attend(
    Query, Key, Value, Mask, Uniform, Index, Kept, Output, Weights,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_mb, stride_mh, stride_mt, stride_ms,
    stride_ob, stride_oh, stride_ot, stride_od,
    n_heads, n_queries, n_keys, scale, factor,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, TRAINING: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    KEPT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Output [B, H, T, Dv] and, with TRAINING, the Weights of the chosen keys [B, H, KEPT, T]."""
    block, head = _place(n_queries, BLOCK_M)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    start = block * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    place, stored = _lists(head, rows, n_queries, KEPT, BLOCK_R)
    index = tl.load(Index + place, mask=stored, other=-1)
    Query += b * stride_qb + h * stride_qh
    Mask += b * stride_mb + h * stride_mh
    q = _tile(Query, start, n_queries, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, BLOCK_M).to(tl.float32) * scale
    k = _gather(Key + b * stride_kb + h * stride_kh, index, index >= 0, stride_ks, stride_kd, HEAD_DIM, BLOCK_D)
    z = tl.sum(q[:, None, :] * k, 2)
    # Hidden keys have not been chosen: read again is the bias alone.
    seen, bias = _visible(Mask, rows[:, None], index, stride_mt, stride_ms, n_queries, n_keys, False, MASK)
    m, peak = _row_scale(z, bias, seen, KERNEL, MASK)
    m = _bounded(m, KERNEL)
    if MASK == BIAS and KERNEL != SOFTMAX:
        peak = peak[:, None]
    uniform = rows
    if KERNEL != SOFTMAX:
        uniform = tl.load(Uniform + head.to(tl.int64) * n_queries + rows, mask=rows < n_queries, other=0)
    mass = _mass(z, bias, seen, m[:, None], peak, uniform[:, None], KERNEL, DEGREE, MASK, KERNEL != SOFTMAX)
    total = tl.sum(mass, 1)
    weights = mass / tl.where(total == 0.0, 1.0, total)[:, None]
    if TRAINING:
        tl.store(Weights + place, weights, mask=stored)
    if DROPOUT:
        kept = tl.load(Kept + place, mask=stored, other=0)
        weights = tl.where(kept != 0, weights * factor, 0.0)
    # What has no weight is not read: it may be infinite.
    v = _gather(Value + b * stride_vb + h * stride_vh, index, weights != 0.0, stride_vs, stride_vd, VALUE_DIM, BLOCK_V)
    output = tl.sum(weights[:, :, None] * v, 1)
    features = tl.arange(0, BLOCK_V)[None, :]
    pointers = Output + b * stride_ob + h * stride_oh + rows.to(tl.int64)[:, None] * stride_ot + features * stride_od
    written = (rows < n_queries)[:, None] & (features < VALUE_DIM)
    tl.store(pointers, output.to(Output.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _row_gradients(
    Query, Key, Value, Grad, Uniform, Index, Kept, Weights, ScoreGrad, QueryGrad,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_xb, stride_xh, stride_xt, stride_xd,
    n_heads, n_queries, n_keys, scale, factor,
    KERNEL: tl.constexpr, DEGREE: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    KEPT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """ScoreGrad [B, H, KEPT, T], the gradient of q . k of the chosen keys, and that of the queries."""
    block, head = _place(n_queries, BLOCK_M)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    start = block * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    place, stored = _lists(head, rows, n_queries, KEPT, BLOCK_R)
    index = tl.load(Index + place, mask=stored, other=-1)
    weights = tl.load(Weights + place, mask=stored, other=0.0)
    used = weights
    if DROPOUT:
        kept = tl.load(Kept + place, mask=stored, other=0)
        used = tl.where(kept != 0, weights * factor, 0.0)
    Grad += b * stride_gb + h * stride_gh
    g = _tile(Grad, start, n_queries, stride_gt, stride_gd, VALUE_DIM, BLOCK_V, BLOCK_M).to(tl.float32)
    v = _gather(Value + b * stride_vb + h * stride_vh, index, used != 0.0, stride_vs, stride_vd, VALUE_DIM, BLOCK_V)
    inner = tl.sum(g[:, None, :] * v, 2)
    if DROPOUT:
        inner = inner * factor
    dz = (inner - tl.sum(inner * weights, 1)[:, None]) * weights
    wanted = index >= 0
    k = _gather(Key + b * stride_kb + h * stride_kh, index, wanted, stride_ks, stride_kd, HEAD_DIM, BLOCK_D)
    if KERNEL != SOFTMAX:
        Query += b * stride_qb + h * stride_qh
        q = _tile(Query, start, n_queries, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, BLOCK_M).to(tl.float32) * scale
        dz = dz * _log_slope(tl.sum(q[:, None, :] * k, 2), KERNEL, DEGREE)
        # The weights of a uniform row do not depend on the scores.
        uniform = tl.load(Uniform + head.to(tl.int64) * n_queries + rows, mask=rows < n_queries, other=0)
        wanted = wanted & (uniform == 0)[:, None]
    dz = tl.where(wanted, dz * scale, 0.0)
    tl.store(ScoreGrad + place, dz, mask=stored)
    dq = tl.sum(dz[:, :, None] * k, 1)
    features = tl.arange(0, BLOCK_D)[None, :]
    pointers = QueryGrad + b * stride_xb + h * stride_xh + rows.to(tl.int64)[:, None] * stride_xt + features * stride_xd
    written = (rows < n_queries)[:, None] & (features < HEAD_DIM)
    tl.store(pointers, dq.to(QueryGrad.dtype.element_ty), mask=written)


@triton.jit
def _add_product(total, weights, rows, PRECISION: tl.constexpr):
    """`total` with weights [N, M] times rows [M, D] added. Not in float16, whose range a gradient may leave: tf32 has
    its digits."""
    if rows.dtype == tl.float16 or UPCAST:
        return total + _dot(weights, rows.to(tl.float32), PRECISION)
    return total + _dot(_narrow(weights, rows), rows, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _key_gradients(
    Query, Grad, Index, Kept, Weights, ScoreGrad, KeyGrad, ValueGrad,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_yb, stride_yh, stride_ys, stride_yd, stride_wb, stride_wh, stride_ws, stride_wd,
    n_heads, n_queries, n_keys, factor,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    KEPT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, from the lists written out as a matrix, block by block."""
    block, head = _place(n_keys, BLOCK_N)
    b, h = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    Query += b * stride_qb + h * stride_qh
    Grad += b * stride_gb + h * stride_gh
    lists = head.to(tl.int64) * n_queries * KEPT
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    begin = 0
    if CAUSAL:
        # Queries before these keys have chosen none of them.
        begin = (block * BLOCK_N) // BLOCK_M * BLOCK_M
    for start in range(begin, n_queries, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < n_queries
        used = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        dz = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for slot in range(0, KEPT):
            place = lists + slot * n_queries + rows
            index = tl.load(Index + place, mask=inside, other=-1)
            weight = tl.load(Weights + place, mask=inside, other=0.0)
            slope = tl.load(ScoreGrad + place, mask=inside, other=0.0)
            if DROPOUT:
                kept = tl.load(Kept + place, mask=inside, other=0)
                weight = tl.where(kept != 0, weight * factor, 0.0)
            chosen = cols[:, None] == index[None, :]
            used = tl.where(chosen, weight[None, :], used)
            dz = tl.where(chosen, slope[None, :], dz)
        q = _tile(Query, start, n_queries, stride_qt, stride_qd, HEAD_DIM, BLOCK_D, BLOCK_M)
        g = _tile(Grad, start, n_queries, stride_gt, stride_gd, VALUE_DIM, BLOCK_V, BLOCK_M)
        dk = _add_product(dk, dz, q, PRECISION)
        dv = _add_product(dv, used, g, PRECISION)
    index = cols.to(tl.int64)[:, None]
    inside = (cols < n_keys)[:, None]
    features = tl.arange(0, BLOCK_D)[None, :]
    pointers = KeyGrad + b * stride_yb + h * stride_yh + index * stride_ys + features * stride_yd
    tl.store(pointers, dk.to(KeyGrad.dtype.element_ty), mask=inside & (features < HEAD_DIM))
    features = tl.arange(0, BLOCK_V)[None, :]
    pointers = ValueGrad + b * stride_wb + h * stride_wh + index * stride_ws + features * stride_wd
    tl.store(pointers, dv.to(ValueGrad.dtype.element_ty), mask=inside & (features < VALUE_DIM))
