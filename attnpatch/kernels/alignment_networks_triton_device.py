"""The device code of the alignment losses' networks (`attnpatch.kernels.alignment_networks`), for Triton.

A program takes blocks of tokens one after another. What a network does to a block stays in registers and shared
memory; the backward pass computes it again from the tokens, and a program keeps the sums of its weights' gradients
until it has no blocks left. The programs' sums are added up afterwards, always in the same order.

Products are of numbers split into parts of bfloat16, each of what the one before left over: of three parts for float32
tokens, whose six products are right to float32's last bits, and of two for tokens in half precision, whose three are
right to about 2^-17. Tokens that are bfloat16 are one part. TF32's products would take as long, and shared memory for
every matrix and its transpose.

The tokens are queries and keys, [B, H, T, D] each, of any strides but of D; a program belongs to one side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnpatch.kernels.triton_device import PTX, UPCAST, from_bfloat16, reciprocal, to_bfloat16

# What a forward pass gives, and where the gradient of its result comes from.
PLAIN = tl.constexpr(0)  # the network's result; its gradient from memory
LOSS = tl.constexpr(1)  # the sum of weighted log sigmoids of a discriminator; its gradient from there
# The result as two of bfloat16 (of float32 tokens as it is); its gradient from memory, times a number on the device.
HALVES = tl.constexpr(2)
UNIT = tl.constexpr(3)  # as HALVES, of length 1, and what it was divided by

TINY = tl.constexpr(1e-12)  # the square of a length below which a vector has no direction
SLOPE = tl.constexpr(0.01)  # of leaky_relu
UNSPECIALISED = ["n_heads", "n_queries", "n_keys", "query_rows", "key_rows", "query_programs", "key_programs"]


@triton.jit
def _rounded(x):
    """(x as bfloat16, that in float32)."""
    if UPCAST:
        # The interpreter cuts the digits that a GPU rounds.
        bits = x.to(tl.uint32, bitcast=True)
        wide = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return wide.to(tl.bfloat16), wide
    rounded = to_bfloat16(x)
    return rounded, from_bfloat16(rounded)


@triton.jit
def exp2(x):
    """2^x in one instruction: Triton's takes four, for results below 2^-126, which are 0 here."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def split(x, PARTS: tl.constexpr):
    """float32 as the sum of three of bfloat16, the third without meaning if PARTS is 2."""
    high, wide = _rounded(x)
    x -= wide
    low, wide = _rounded(x)
    lowest = low
    if PARTS == 3:
        lowest, _ = _rounded(x - wide)
    return high, low, lowest


@triton.jit
def flipped(a):
    """The parts transposed."""
    return tl.trans(a[0]), tl.trans(a[1]), tl.trans(a[2])


@triton.jit
def _dot(a, b, total):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def product(a, b, total, A: tl.constexpr, B: tl.constexpr):
    """total + a b, of A and B parts: the smallest products first, and those below the last part not at all."""
    if A == 3 or B == 3:
        if A == 3:
            total = _dot(a[2], b[0], total)
        if A > 1 and B > 1:
            total = _dot(a[1], b[1], total)
        if B == 3:
            total = _dot(a[0], b[2], total)
    if A > 1:
        total = _dot(a[1], b[0], total)
    if B > 1:
        total = _dot(a[0], b[1], total)
    return _dot(a[0], b[0], total)


@triton.jit
def _waited(x):
    """x, so that the products it is a sum of are over: ptxas puts a wait after every one if some last until the next
    round of a loop."""
    if PTX:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return x


@triton.jit
def _place(
    index, n_rows, length, n_heads, stride_b, stride_h, stride_t, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Of a block of tokens in the order [B, H, T]: the row in that order, whether it is one, its b and t, its offset.

    WHOLE: the lengths are multiples of the block, which then has one b.
    """
    rows = index * BLOCK + tl.arange(0, BLOCK)
    if WHOLE:
        problem = index * BLOCK // length
        t = rows - problem * length
    else:
        problem, t = rows // length, rows % length
    b, h = problem // n_heads, problem % n_heads
    if not WHOLE:
        b = tl.where(rows < n_rows, b, 0)
    offset = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + t.to(tl.int64) * stride_t
    return rows, rows < n_rows, b, t, offset


@triton.jit
def _counted(Padding, inside, b, t, length, MASKED: tl.constexpr):
    """Which rows are tokens and no padding."""
    if MASKED:
        inside = inside & (tl.load(Padding + b * length + t, mask=inside, other=1) == 0)
    return inside


@triton.jit
def _tokens(X, offset, valid, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """[rows, D], zero at padding: (its parts, float32)."""
    features = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if BLOCK_D != DIM:
        mask = mask & (features < DIM)[None, :]
    x = tl.load(X + offset[:, None] + features[None, :], mask=mask, other=0.0)
    wide = x.to(tl.float32)
    if X.dtype.element_ty == tl.bfloat16:
        return (x, x, x), wide
    else:
        return split(wide, PARTS), wide


@triton.jit
def _matrix(
    W, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """A weight [ROWS, COLUMNS], zero beyond, in parts."""
    rows, columns = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    w = tl.load(W + rows * COLUMNS + columns, mask=(rows < ROWS) & (columns < COLUMNS), other=0.0)
    return split(w.to(tl.float32), PARTS)


@triton.jit
def _vector(W, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    return tl.load(W + index, mask=index < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _bias(B, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A bias whose product with ones it is itself: [16, BLOCK], its three parts and zeros.

    As a vector it would stay in registers, of which there are few.
    """
    part = tl.arange(0, 16)[:, None]
    index = tl.arange(0, BLOCK)[None, :] + part * 0
    b = tl.load(B + index, mask=index < SIZE, other=0.0).to(tl.float32)
    _, high = _rounded(b)
    _, low = _rounded(b - high)
    return tl.where(part == 0, high, tl.where(part == 1, low, tl.where(part == 2, b - high - low, 0.0))).to(tl.bfloat16)


@triton.jit
def _store_sums(Sums, w, b, SIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The gradients of a weight [ROWS, COLUMNS] and its bias, one after the other; b: [rows, 16], all columns alike."""
    rows, columns = tl.arange(0, w.shape[0]), tl.arange(0, w.shape[1])
    pointers = Sums + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(pointers, w * SIGN, mask=(rows < ROWS)[:, None] & (columns < COLUMNS)[None, :])
    tl.store(Sums + ROWS * COLUMNS + rows, tl.max(b, 1) * SIGN, mask=rows < ROWS)


@triton.jit
def _gate(x, wide, g, g_bias, r, r_bias, ones, X_PARTS: tl.constexpr, PARTS: tl.constexpr):
    """The gate, relu of the transformed tokens, and what the highway makes of both."""
    zero = tl.zeros(wide.shape, tl.float32)
    gate = product(x, flipped(g), _dot(ones, g_bias, zero), X_PARTS, PARTS)
    transformed = product(x, flipped(r), _dot(ones, r_bias, zero), X_PARTS, PARTS)
    gate = reciprocal(1.0 + exp2(gate * -1.4426950408889634))
    transformed = tl.maximum(transformed, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return gate, transformed, wide + gate * (transformed - wide)


@triton.jit
def _leaky(x):
    return tl.maximum(x, x * SLOPE)


@triton.jit(do_not_specialize=UNSPECIALISED)
def network_forward(
    Query, Key, QueryPadding, KeyPadding, Shares, Out, OutLow, Inverse,
    GateW, GateB, TransformW, TransformB, InnerW, InnerB, OuterW, OuterB,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    n_heads, n_queries, n_keys, query_rows, key_rows, query_programs, key_programs,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, HIGHWAY: tl.constexpr, RESULT: tl.constexpr,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """LOSS: each program's part of the loss to Out. Otherwise [queries' rows + keys' rows, OUT], OUT = 1 or DIM.

    Shares: [2, B], the weight of a query's and of a key's log sigmoid in the loss.
    """
    program = tl.program_id(0)
    queries = program < query_programs
    X, Padding, length, n_rows, step = Query, QueryPadding, n_queries, query_rows, query_programs
    stride_b, stride_h, stride_t, first_row, sign = stride_qb, stride_qh, stride_qt, 0, 1.0
    if not queries:
        X, Padding, length, n_rows, step = Key, KeyPadding, n_keys, key_rows, key_programs
        stride_b, stride_h, stride_t, first_row, sign = stride_kb, stride_kh, stride_kt, query_rows, -1.0
        program -= query_programs
        if RESULT == LOSS:
            Shares += query_rows // (n_heads * n_queries)
    PARTS: tl.constexpr = 3 if Query.dtype.element_ty == tl.float32 else 2
    X_PARTS: tl.constexpr = 1 if Query.dtype.element_ty == tl.bfloat16 else PARTS
    features = tl.arange(0, BLOCK_D)
    g = _matrix(GateW, DIM, DIM, BLOCK_D, BLOCK_D, PARTS)
    r = _matrix(TransformW, DIM, DIM, BLOCK_D, BLOCK_D, PARTS)
    g_bias, r_bias = _bias(GateB, DIM, BLOCK_D), _bias(TransformB, DIM, BLOCK_D)
    i = _matrix(InnerW, HIDDEN, DIM, BLOCK_H, BLOCK_D, PARTS)
    i_bias = _bias(InnerB, HIDDEN, BLOCK_H)
    if OUT == 1:
        o_bias = tl.load(OuterB).to(tl.float32)
        o_vector = _vector(OuterW, HIDDEN, BLOCK_H)
    else:
        o = _matrix(OuterW, DIM, HIDDEN, BLOCK_D, BLOCK_H, PARTS)
        o_bias = _bias(OuterB, DIM, BLOCK_D)
    ones = tl.full([BLOCK_M, 16], 1.0, tl.float32).to(tl.bfloat16)
    total = tl.zeros([BLOCK_M], tl.float32)
    for index in range(program, tl.cdiv(n_rows, BLOCK_M), step):
        rows, inside, b, t, offset = _place(
            index, n_rows, length, n_heads, stride_b, stride_h, stride_t, BLOCK_M, WHOLE
        )
        valid = _counted(Padding, inside, b, t, length, MASKED)
        x, wide = _tokens(X, offset, valid, DIM, BLOCK_D, PARTS)
        zero = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        if HIGHWAY:
            _, _, mixed = _gate(x, wide, g, g_bias, r, r_bias, ones, X_PARTS, PARTS)
            mixed = split(mixed, PARTS)
            hidden = product(mixed, flipped(i), _dot(ones, i_bias, zero), PARTS, PARTS)
        else:
            hidden = product(x, flipped(i), _dot(ones, i_bias, zero), X_PARTS, PARTS)
        hidden = _leaky(hidden)
        rows += first_row
        if OUT == 1:
            result = tl.sum(hidden * o_vector[None, :], 1) + o_bias
            if RESULT == LOSS:
                share = tl.where(valid, tl.load(Shares + b), 0.0)
                result *= sign
                result = tl.minimum(result, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(result)))
                total += share * result
            else:
                tl.store(Out + rows, result, mask=inside)
        else:
            hidden = split(hidden, PARTS)
            zero = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            result = product(hidden, flipped(o), _dot(ones, o_bias, zero), PARTS, PARTS)
            stored = inside[:, None] & (features < DIM)[None, :]
            pointers = rows.to(tl.int64)[:, None] * DIM + features[None, :]
            if RESULT == PLAIN:
                tl.store(Out + pointers, result, mask=stored)
            else:
                if RESULT == UNIT:
                    square = tl.sum(tl.where((features < DIM)[None, :], result * result, 0.0), 1)
                    inverse = tl.where(square > TINY, tl.rsqrt(tl.maximum(square, TINY)), 0.0)
                    tl.store(Inverse + rows, inverse, mask=inside)
                    result *= inverse[:, None]
                if PARTS == 3:
                    tl.store(Out + pointers, result, mask=stored)
                else:
                    high, low, _ = split(result, PARTS)
                    tl.store(Out + pointers, high, mask=stored)
                    tl.store(OutLow + pointers, low, mask=stored)
    if RESULT == LOSS:
        tl.store(Out + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _backward(
    X, Padding, Shares, Grad, factor, Before, TokenGrad, Sums,
    GateW, GateB, TransformW, TransformB, InnerW, InnerB, OuterW, OuterB,
    stride_b, stride_h, stride_t, n_heads, length, n_rows, first_row, sign, start, step,
    TOKENS: tl.constexpr, OUTER: tl.constexpr, GATES: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    HIGHWAY: tl.constexpr, RESULT: tl.constexpr, ADDED: tl.constexpr, SIGN: tl.constexpr, DIM: tl.constexpr,
    HIDDEN: tl.constexpr, OUT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """TOKENS: the gradients of the tokens and of the inner weights; OUTER and GATES: of the outer and the highway's."""
    PARTS: tl.constexpr = 3 if X.dtype.element_ty == tl.float32 else 2
    X_PARTS: tl.constexpr = 1 if X.dtype.element_ty == tl.bfloat16 else PARTS
    features, units = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    g = _matrix(GateW, DIM, DIM, BLOCK_D, BLOCK_D, PARTS)
    r = _matrix(TransformW, DIM, DIM, BLOCK_D, BLOCK_D, PARTS)
    g_bias, r_bias = _bias(GateB, DIM, BLOCK_D), _bias(TransformB, DIM, BLOCK_D)
    i = _matrix(InnerW, HIDDEN, DIM, BLOCK_H, BLOCK_D, PARTS)
    i_bias = _bias(InnerB, HIDDEN, BLOCK_H)
    if OUT == 1:
        o_bias = tl.load(OuterB).to(tl.float32)
        o_vector = _vector(OuterW, HIDDEN, BLOCK_H)
        # Of a hidden unit's gradient the outer weight is left out until the end: its own gradient is the rest times
        # what the unit was computed of.
        i_pointers = InnerW + units[:, None] * DIM + features[None, :]
        in_weight = (units < HIDDEN)[:, None] & (features < DIM)[None, :]
        i_weight = tl.load(i_pointers, mask=in_weight, other=0.0).to(tl.float32)
        back = split(i_weight * _vector(OuterW, HIDDEN, BLOCK_H)[:, None], PARTS)
        d_o_bias = tl.zeros([BLOCK_M], tl.float32)
    else:
        o = _matrix(OuterW, DIM, HIDDEN, BLOCK_D, BLOCK_H, PARTS)
        back = i
        d_o = tl.zeros([BLOCK_D, BLOCK_H], tl.float32)
        d_o_sums = tl.zeros([BLOCK_D, 16], tl.float32)
    ones = tl.full([BLOCK_M, 16], 1.0, tl.float32).to(tl.bfloat16)  # biases and sums over tokens are products, too
    d_i = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    d_i_sums = tl.zeros([BLOCK_H, 16], tl.float32)
    d_g = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    d_g_sums = tl.zeros([BLOCK_D, 16], tl.float32)
    d_r = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    d_r_sums = tl.zeros([BLOCK_D, 16], tl.float32)
    for index in range(start, tl.cdiv(n_rows, BLOCK_M), step):
        rows, inside, b, t, offset = _place(
            index, n_rows, length, n_heads, stride_b, stride_h, stride_t, BLOCK_M, WHOLE
        )
        valid = _counted(Padding, inside, b, t, length, MASKED)
        x, wide = _tokens(X, offset, valid, DIM, BLOCK_D, PARTS)
        zero = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        if HIGHWAY:
            gate, transformed, mixed = _gate(x, wide, g, g_bias, r, r_bias, ones, X_PARTS, PARTS)
            # d mixed / d gate's logit; and the gate, negative where relu lets nothing through.
            slope = gate * (1.0 - gate) * (transformed - wide)
            gate = tl.where(transformed > 0, gate, -gate)
            mixed = split(mixed, PARTS)
            hidden = product(mixed, flipped(i), _dot(ones, i_bias, zero), PARTS, PARTS)
        else:
            mixed = x
            hidden = product(x, flipped(i), _dot(ones, i_bias, zero), X_PARTS, PARTS)
        hidden = _leaky(hidden)
        if OUT == 1:
            if RESULT == LOSS:
                logit = sign * (tl.sum(hidden * o_vector[None, :], 1) + o_bias)
                share = tl.where(valid, tl.load(Shares + b), 0.0)
                d_out = (share * factor * sign) / (1.0 + tl.exp(logit))
            else:
                d_out = tl.load(Grad + rows + first_row, mask=inside, other=0.0)
            d_o_bias += d_out
            d_hidden = tl.where(hidden > 0, d_out[:, None], (d_out * SLOPE)[:, None])
        else:
            pointers = (rows + first_row).to(tl.int64)[:, None] * DIM + features[None, :]
            loaded = inside[:, None] & (features < DIM)[None, :]
            d_out = split(tl.load(Grad + pointers, mask=loaded, other=0.0) * factor, PARTS)
            if OUTER:
                d_o = product(flipped(d_out), split(hidden, PARTS), d_o, PARTS, PARTS)
                d_o_sums = product(flipped(d_out), (ones, ones, ones), d_o_sums, PARTS, 1)
                d_o, d_o_sums = _waited(d_o), _waited(d_o_sums)
        if TOKENS or GATES:
            if OUT > 1:
                d_hidden = product(d_out, o, zero, PARTS, PARTS) * tl.where(hidden > 0, 1.0, SLOPE)
            d = split(d_hidden, PARTS)
            if TOKENS:
                d_i = product(flipped(d), mixed, d_i, PARTS, PARTS if HIGHWAY else X_PARTS)
                d_i_sums = product(flipped(d), (ones, ones, ones), d_i_sums, PARTS, 1)
            zero = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            d_x = product(d, back, zero, PARTS, PARTS)
            if HIGHWAY:
                d_gate, d_transformed = split(d_x * slope, PARTS), split(d_x * tl.maximum(gate, 0.0), PARTS)
                if GATES:
                    d_g = product(flipped(d_gate), x, d_g, PARTS, X_PARTS)
                    d_g_sums = product(flipped(d_gate), (ones, ones, ones), d_g_sums, PARTS, 1)
                    d_r = product(flipped(d_transformed), x, d_r, PARTS, X_PARTS)
                    d_r_sums = product(flipped(d_transformed), (ones, ones, ones), d_r_sums, PARTS, 1)
                    d_g, d_g_sums, d_r, d_r_sums = _waited(d_g), _waited(d_g_sums), _waited(d_r), _waited(d_r_sums)
                if TOKENS:
                    d_x = product(d_gate, g, d_x - d_x * tl.abs(gate), PARTS, PARTS)
                    d_x = product(d_transformed, r, d_x, PARTS, PARTS)
            if TOKENS:
                stored = inside[:, None] & (features < DIM)[None, :]
                pointers = offset[:, None] + features[None, :]
                if ADDED:
                    d_x += tl.load(Before + pointers, mask=stored, other=0.0)
                if MASKED:
                    d_x = tl.where(valid[:, None], d_x, 0.0)
                tl.store(TokenGrad + pointers, d_x.to(TokenGrad.dtype.element_ty), mask=stored)
    if HIGHWAY:
        if GATES:
            _store_sums(Sums, d_g, d_g_sums, SIGN, DIM, DIM)
            _store_sums(Sums + (DIM + 1) * DIM, d_r, d_r_sums, SIGN, DIM, DIM)
        Sums += 2 * (DIM + 1) * DIM
    OuterSums = Sums + HIDDEN * (DIM + 1)
    if TOKENS:
        if OUT == 1:
            i_weight = tl.load(i_pointers, mask=in_weight, other=0.0).to(tl.float32)
            d_outer = tl.sum(i_weight * d_i, 1) + _vector(InnerB, HIDDEN, BLOCK_H) * tl.max(d_i_sums, 1)
            tl.store(OuterSums + units, d_outer * SIGN, mask=units < HIDDEN)
            tl.store(OuterSums + HIDDEN, tl.sum(d_o_bias, 0) * SIGN)
            outer = _vector(OuterW, HIDDEN, BLOCK_H)[:, None]
            d_i *= outer
            d_i_sums *= outer
        _store_sums(Sums, d_i, d_i_sums, SIGN, HIDDEN, DIM)
    if OUTER:
        _store_sums(OuterSums, d_o, d_o_sums, SIGN, DIM, HIDDEN)


@triton.jit(do_not_specialize=UNSPECIALISED)
def network_backward(
    Query, Key, QueryPadding, KeyPadding, Shares, Grad, Factor, QueryBefore, KeyBefore, QueryGrad, KeyGrad, Sums,
    GateW, GateB, TransformW, TransformB, InnerW, InnerB, OuterW, OuterB,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    n_heads, n_queries, n_keys, query_rows, key_rows, query_programs, key_programs,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, HIGHWAY: tl.constexpr, RESULT: tl.constexpr, ADDED: tl.constexpr,
    SIGN: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradients of queries and keys, with their strides, and SIGN times those of the weights.

    Grad: [queries' rows + keys' rows, OUT]; LOSS needs none. Factor: what gradients are multiplied by (but for PLAIN).
    Before: other gradients of the queries and keys, to which these are ADDED. Sums: [programs, SIZE].

    The gradients of all weights of a network with a highway would not fit the registers: there are two programs for
    each of its shares of the tokens then, or three where the outer weight is a matrix. One computes the gradients of
    the tokens and the inner weights, one those of the highway's and one those of the outer weights. Each writes the
    part of its row of Sums that is its own.
    """
    programs = query_programs + key_programs
    role, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    Sums += program.to(tl.int64) * SIZE
    queries = program < query_programs
    X, Padding, Before, TokenGrad = Query, QueryPadding, QueryBefore, QueryGrad
    length, n_rows, step, first_row, sign = n_queries, query_rows, query_programs, 0, 1.0
    stride_b, stride_h, stride_t = stride_qb, stride_qh, stride_qt
    if not queries:
        X, Padding, Before, TokenGrad = Key, KeyPadding, KeyBefore, KeyGrad
        length, n_rows, step, first_row, sign = n_keys, key_rows, key_programs, query_rows, -1.0
        stride_b, stride_h, stride_t = stride_kb, stride_kh, stride_kt
        program -= query_programs
        if RESULT == LOSS:
            Shares += query_rows // (n_heads * n_queries)
    factor = 1.0
    if RESULT != PLAIN:
        factor = tl.load(Factor)
    if role == 0:
        _backward(
            X, Padding, Shares, Grad, factor, Before, TokenGrad, Sums,
            GateW, GateB, TransformW, TransformB, InnerW, InnerB, OuterW, OuterB,
            stride_b, stride_h, stride_t, n_heads, length, n_rows, first_row, sign, program, step,
            True, not HIGHWAY and OUT > 1, False, MASKED, WHOLE, HIGHWAY, RESULT, ADDED, SIGN, DIM, HIDDEN, OUT,
            BLOCK_D, BLOCK_H, BLOCK_M,
        )  # fmt: skip
    if HIGHWAY:
        if role == 1:
            _backward(
                X, Padding, Shares, Grad, factor, Before, TokenGrad, Sums,
                GateW, GateB, TransformW, TransformB, InnerW, InnerB, OuterW, OuterB,
                stride_b, stride_h, stride_t, n_heads, length, n_rows, first_row, sign, program, step,
                False, False, True, MASKED, WHOLE, HIGHWAY, RESULT, ADDED, SIGN, DIM, HIDDEN, OUT,
                BLOCK_D, BLOCK_H, BLOCK_M,
            )  # fmt: skip
        if OUT > 1:  # noqa: SIM102 (decided by the compiler)
            if role == 2:
                _backward(
                    X, Padding, Shares, Grad, factor, Before, TokenGrad, Sums,
                    GateW, GateB, TransformW, TransformB, InnerW, InnerB, OuterW, OuterB,
                    stride_b, stride_h, stride_t, n_heads, length, n_rows, first_row, sign, program, step,
                    False, True, False, MASKED, WHOLE, HIGHWAY, RESULT, ADDED, SIGN, DIM, HIDDEN, OUT,
                    BLOCK_D, BLOCK_H, BLOCK_M,
                )  # fmt: skip
