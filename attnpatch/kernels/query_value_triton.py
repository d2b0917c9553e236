"""The pairwise query-value sum fused in Triton, for CUDA, forward and backward: nothing of size T x S x D in memory.

    out[t, d] = sum_s a[t, s] sigmoid(gate_q[t, d] + gate_v[s, d]) f
    f = v[s, d], or tanh(mix_q[t, d] + mix_v[s, d]) - v[s, d]

Shapes: a [N, T, S]; v, gate_v, mix_v [N, S, D]; gate_q, mix_q, out [N, T, D]. D up to 128, padded to a power of two.

The sum has a different matrix a * sigmoid for every feature, so tensor cores have no part in it: arithmetic sets the
time, and is counted here in instructions of one warp lane for each element (t, s, d).

    x y           With x = exp(-gate_q) and y = exp(-gate_v), made once for each row, sigmoid = 1 / (1 + x y); tanh is
                  1 - 2 / (1 + exp(2 mix_q) exp(2 mix_v)). No exponential is left in the loop.
    reciprocals   are an eighth of the rate of the rest, so two elements share one: r = 1 / (p q), 1 / p = r q. The two
                  are neighbours in d (tanh: the two denominators of one element), not tokens.
    forward       One program owns queries and loops over keys: fma, 3/2 mul and 1/2 reciprocal for s; a v, out += a v s
                  and, when gradients will be asked for, s - s^2 and slope += a v (s - s^2): 6.5 + 0.5, or 4.5 + 0.5.
                  slope is d out / d gate_q, so gate_q's gradient needs no loop of its own.
    backward      One program owns keys and loops over queries: s as before; w = g s, da = sum_d w v, w - w s,
                  dv += a w, dgate += a (w - w s): 7.5 + 0.5. da is a sum over what one program holds, so there is no
                  atomic addition, and results do not differ from run to run.

At 192 heads, T = S = 512, D = 64 an H200 (132 SMs, 128 lanes, 1.75 GHz) has 0.109 ms for one instruction an element:
floors are 0.54 ms forward without gradients, 0.76 forward and 0.87 backward with them; reciprocals alone would take
0.44 ms a pass. Compiled for sm_90 the loops have 5.7, 7.7 and 9.1 instructions, with loads, addresses and the sum over
lanes: 0.63, 0.84 and 0.99 ms. With tanh they are 13 and a whole reciprocal each way, compiled 15.4 and 17.1.

x y is formed around the middle of gate_q's range over the queries, feature by feature. The gates of a head qualify if
gate_q is within 2^+-60 of it, in x, and x y <= 2^60 for all pairs: then the product of two denominators is a normal
number, and where y underflows sigmoid is 1 in float32 anyway. A head with other gates (below -41, or further apart, as
padding may have them) takes sigmoid of the sum, with an exponential in the loop, which is three times as slow.

A key of weight 0 adds 0 times its value, as in the plain form: nothing, if the value is finite.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnpatch.kernels import score_triton
from attnpatch.kernels.once import differentiable_once
from attnpatch.kernels.score_triton import MAX_HEAD_DIM, tuning
from attnpatch.kernels.triton_here import INTERPRETED, why_not_on

# Triton's interpreter has no inline assembly.
PLAIN = tl.constexpr(INTERPRETED)

# Arguments whose being 1 or a multiple of 16 would only make Triton compile again.
UNSPECIALISED = ["n_queries", "n_keys", "size_class"]

# log2 of the largest x y: the square of 1 + x y has a reciprocal that is a normal float32.
BOUND = tl.constexpr(60.0)
LOG2E = 1.4426950408889634
# Threads that share a key's features in the backward pass; the others of a warp have other keys.
LANES = 4

# Of two numbers from 1 to 2^62. `1.0 / x` would be a division, of many instructions.
_RECIPROCALS = tl.constexpr("""{
    .reg .f32 product, inverse, first, second;
    mul.f32 product, $2, $3;
    rcp.approx.ftz.f32 inverse, product;
    mul.f32 first, inverse, $3;
    mul.f32 second, inverse, $2;
    mov.f32 $0, first;
    mov.f32 $1, second;
}""")


def why_not(weights: Tensor, value: Tensor) -> str | None:
    """Why the fused sum cannot serve weights [N, T, S] and value [N, S, D] (in the arithmetic's dtype), or None."""
    if reason := why_not_on(value, "value"):
        return reason
    if value.dtype != torch.float32:
        return f"it computes in float32, and this call in {value.dtype}"
    if weights.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes weights in float32, float16 and bfloat16, and these are {weights.dtype}"
    if not 1 <= value.shape[-1] <= MAX_HEAD_DIM:
        return f"the head size is {value.shape[-1]}, and it takes 1 to {MAX_HEAD_DIM}"
    return None


# ------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _gates(x, y, mix_x, mix_y, SAFE: tl.constexpr, TANH: tl.constexpr):
    """(sigmoid of the gates' sum, of -2 times the mixes' sum): of exponentials of them or, not SAFE, of themselves."""
    t = 0.0
    if not SAFE:
        s = 1.0 / (1.0 + tl.exp(-(x + y)))
        if TANH:
            t = 1.0 / (1.0 + tl.exp(2.0 * (mix_x + mix_y)))
    elif PLAIN:
        s = 1.0 / (1.0 + x * y)
        if TANH:
            t = 1.0 / (1.0 + mix_x * mix_y)
    elif TANH:
        s, t = tl.inline_asm_elementwise(
            _RECIPROCALS, "=f,=f,f,f", [1.0 + x * y, 1.0 + mix_x * mix_y],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        s = tl.inline_asm_elementwise(
            _RECIPROCALS, "=f,=f,f,f", [1.0 + x * y], dtype=tl.float32, is_pure=True, pack=2
        )  # fmt: skip
    return s, t


@triton.jit
def _wide(index):
    """In 64 bits, as weights may have more than 2^31 elements. (A loop's counter is Python's in the interpreter.)"""
    return tl.full((), 0, tl.int64) + index


@triton.jit
def _load(Base, offsets, features, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of D numbers, zero beyond them."""
    if HEAD_DIM == BLOCK_D:
        x = tl.load(Base + offsets + features)
    else:
        x = tl.load(Base + offsets + features, mask=features < HEAD_DIM, other=0.0)
    return x


@triton.jit
def _prepare(
    RowsQ, RowsV, ExpQ, ExpV, Unsafe, n_queries, n_keys, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """exp2(factor (q - m)) [N, T, BLOCK_D] and exp2(factor (v + m)) [N, S, BLOCK_D], m the middle of all queries' q.

    Unsafe[n] becomes 1 where their products may leave the range.
    """
    n = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, BLOCK_D)[None, :]
    places = tl.arange(0, BLOCK_L)[:, None]
    RowsQ += n * n_queries * HEAD_DIM
    RowsV += n * n_keys * HEAD_DIM
    ExpQ += n * n_queries * BLOCK_D
    ExpV += n * n_keys * BLOCK_D
    high_q = tl.full([BLOCK_L, BLOCK_D], -float("inf"), tl.float32)
    low_q = tl.full([BLOCK_L, BLOCK_D], float("inf"), tl.float32)
    high_v, low_v = high_q, low_q
    for first in range(0, n_queries, BLOCK_L):
        rows = tl.minimum(first + places, n_queries - 1)
        q = _load(RowsQ, rows * HEAD_DIM, features, HEAD_DIM, BLOCK_D)
        high_q, low_q = tl.maximum(high_q, q), tl.minimum(low_q, q)
    for first in range(0, n_keys, BLOCK_L):
        rows = tl.minimum(first + places, n_keys - 1)
        v = _load(RowsV, rows * HEAD_DIM, features, HEAD_DIM, BLOCK_D)
        high_v, low_v = tl.maximum(high_v, v), tl.minimum(low_v, v)
    high, low = tl.max(high_q, 0), tl.min(low_q, 0)
    middle = 0.5 * high + 0.5 * low
    width = tl.abs(factor) * (high - middle)
    peak = tl.maximum(factor * (high + tl.max(high_v, 0)), factor * (low + tl.min(low_v, 0)))
    safe = (width <= BOUND) & (peak <= BOUND)  # not a number fails the comparisons, too
    tl.store(Unsafe + n, tl.load(Unsafe + n) | tl.max(tl.where(safe, 0, 1), 0))
    middle = middle[None, :]
    for first in range(0, n_queries, BLOCK_L):
        rows = first + places
        q = _load(RowsQ, tl.minimum(rows, n_queries - 1) * HEAD_DIM, features, HEAD_DIM, BLOCK_D)
        tl.store(ExpQ + rows * BLOCK_D + features, tl.exp2(factor * (q - middle)), mask=rows < n_queries)
    for first in range(0, n_keys, BLOCK_L):
        rows = first + places
        v = _load(RowsV, tl.minimum(rows, n_keys - 1) * HEAD_DIM, features, HEAD_DIM, BLOCK_D)
        tl.store(ExpV + rows * BLOCK_D + features, tl.exp2(factor * (v + middle)), mask=rows < n_keys)


@triton.jit
def _add_key(
    out, slope, mix_slope, x, mix_x, Weights, Value, Gates, Mixes, key, stride_as, features,
    SAFE: tl.constexpr, TANH: tl.constexpr, SLOPES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One key's part of the sums of a block of queries. Rows of exponentials are BLOCK_D long, of gates HEAD_DIM."""
    ROW: tl.constexpr = BLOCK_D if SAFE else HEAD_DIM
    a = tl.load(Weights + _wide(key) * stride_as).to(tl.float32)[:, None]
    v = _load(Value, key * HEAD_DIM, features, HEAD_DIM, BLOCK_D)[None, :]
    y = _load(Gates, key * ROW, features, ROW, BLOCK_D)[None, :]
    mix_y = y
    if TANH:
        mix_y = _load(Mixes, key * ROW, features, ROW, BLOCK_D)[None, :]
    s, t = _gates(x, y, mix_x, mix_y, SAFE, TANH)
    if TANH:
        p = a * s
        f = (1.0 - v) - 2.0 * t
        out += p * f
        if SLOPES:
            slope += (a * f) * (s - s * s)
            mix_slope += p * (t - t * t)
    else:
        p = a * v
        out += p * s
        if SLOPES:
            slope += p * (s - s * s)
    return out, slope, mix_slope


@triton.jit(do_not_specialize=UNSPECIALISED)
def _forward(
    Weights, Value, GateQ, GateV, MixQ, MixV, ExpGateQ, ExpGateV, ExpMixQ, ExpMixV, Unsafe, Output, Slope, MixSlope,
    stride_an, stride_at, stride_as, n_queries, n_keys, size_class,
    TANH: tl.constexpr, SLOPES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The sum, and with SLOPES its derivatives by gate_q (and mix_q), of a block of queries."""
    blocks = tl.cdiv(n_queries, BLOCK)
    block, n = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    near = tl.minimum(rows, n_queries - 1)  # rows beyond the last are computed, and not stored
    features = tl.arange(0, BLOCK_D)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    slope = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    mix_slope = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    Weights += n * stride_an + near.to(tl.int64) * stride_at
    Value += n * n_keys * HEAD_DIM
    if tl.load(Unsafe + n) == 0:
        place = near[:, None] * BLOCK_D
        x = _load(ExpGateQ + n * n_queries * BLOCK_D, place, features[None, :], BLOCK_D, BLOCK_D)
        mix_x = x
        if TANH:
            mix_x = _load(ExpMixQ + n * n_queries * BLOCK_D, place, features[None, :], BLOCK_D, BLOCK_D)
        ExpGateV += n * n_keys * BLOCK_D
        ExpMixV += n * n_keys * BLOCK_D
        whole = n_keys // UNROLL * UNROLL
        for first in range(0, whole, UNROLL):
            for u in tl.static_range(UNROLL):
                out, slope, mix_slope = _add_key(
                    out, slope, mix_slope, x, mix_x, Weights, Value, ExpGateV, ExpMixV, first + u, stride_as, features,
                    True, TANH, SLOPES, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
        for key in range(whole, n_keys):
            out, slope, mix_slope = _add_key(
                out, slope, mix_slope, x, mix_x, Weights, Value, ExpGateV, ExpMixV, key, stride_as, features,
                True, TANH, SLOPES, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    else:
        place = near[:, None] * HEAD_DIM
        x = _load(GateQ + n * n_queries * HEAD_DIM, place, features[None, :], HEAD_DIM, BLOCK_D)
        mix_x = x
        if TANH:
            mix_x = _load(MixQ + n * n_queries * HEAD_DIM, place, features[None, :], HEAD_DIM, BLOCK_D)
        GateV += n * n_keys * HEAD_DIM
        MixV += n * n_keys * HEAD_DIM
        for key in range(0, n_keys):
            out, slope, mix_slope = _add_key(
                out, slope, mix_slope, x, mix_x, Weights, Value, GateV, MixV, key, stride_as, features,
                False, TANH, SLOPES, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    place = n * n_queries * HEAD_DIM + rows[:, None] * HEAD_DIM + features[None, :]
    stored = (rows < n_queries)[:, None] & (features < HEAD_DIM)[None, :]
    tl.store(Output + place, out, mask=stored)
    if SLOPES:
        tl.store(Slope + place, slope, mask=stored)
        if TANH:
            # Of t = sigmoid(-2 z), with tanh(z) = 1 - 2 t: its derivative is 4 (t - t^2).
            tl.store(MixSlope + place, 4.0 * mix_slope, mask=stored)


@triton.jit
def _add_query(
    dv, dgate, dmix, y, mix_y, v, Weights, Gates, Mixes, Grad, row, stride_at, features,
    SAFE: tl.constexpr, TANH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query's part of the sums of a block of keys, and its own gradient of their weights; v is 1 - v with TANH."""
    ROW: tl.constexpr = BLOCK_D if SAFE else HEAD_DIM
    a = tl.load(Weights + _wide(row) * stride_at).to(tl.float32)[None, :, None, None]
    g = _load(Grad, row * HEAD_DIM, features, HEAD_DIM, BLOCK_D)
    x = _load(Gates, row * ROW, features, ROW, BLOCK_D)
    mix_x = x
    if TANH:
        mix_x = _load(Mixes, row * ROW, features, ROW, BLOCK_D)
    s, t = _gates(x, y, mix_x, mix_y, SAFE, TANH)
    w = g * s
    if TANH:
        f = v - 2.0 * t
        da = w * f
        w = a * w
        dv -= w
        dgate += (w - w * s) * f
        dmix += w * (t - t * t)
    else:
        da = w * v
        dv += a * w
        dgate += a * (w - w * s)
    # Over one dimension, so that Triton adds what a thread holds first, whichever dimension that is.
    return dv, dgate, dmix, tl.sum(tl.reshape(tl.permute(da, (1, 0, 2, 3)), (da.shape[1], BLOCK_D)), 1)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _backward(
    Weights, Value, GateQ, GateV, MixQ, MixV, ExpGateQ, ExpGateV, ExpMixQ, ExpMixV, Unsafe, Grad,
    WeightsGrad, ValueGrad, GateGrad, MixGrad,
    stride_an, stride_at, stride_as, n_queries, n_keys, size_class,
    TANH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradients of weights, value, gate_v (and mix_v) of a block of keys.

    Blocks are [D / 4 LANES, keys, LANES, 4]: Triton gives four neighbours to one thread, then threads to the third or
    (in 3.6) the first dimension, then to the keys, and leaves the other to registers. So the features of a key lie in
    about LANES threads and not in D / 4, and fewer additions go across.
    """
    blocks = tl.cdiv(n_keys, BLOCK)
    block, n = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    chunk = tl.arange(0, BLOCK_D // (4 * LANES))[:, None, None, None]
    lane = tl.arange(0, LANES)[None, None, :, None]
    features = (chunk * LANES + lane) * 4 + tl.arange(0, 4)[None, None, None, :]
    cols = block * BLOCK + tl.arange(0, BLOCK)
    near = tl.minimum(cols, n_keys - 1)  # columns beyond the last are computed, and not stored
    index = near[None, :, None, None]
    v = _load(Value + n * n_keys * HEAD_DIM, index * HEAD_DIM, features, HEAD_DIM, BLOCK_D)
    if TANH:
        v = 1.0 - v
    dv = tl.zeros_like(v)
    dgate = tl.zeros_like(v)
    dmix = tl.zeros_like(v)
    Grad += n * n_queries * HEAD_DIM
    Weights += n * stride_an + near.to(tl.int64) * stride_as
    WeightsGrad += n * n_queries * n_keys
    stored = cols < n_keys
    if tl.load(Unsafe + n) == 0:
        y = _load(ExpGateV + n * n_keys * BLOCK_D, index * BLOCK_D, features, BLOCK_D, BLOCK_D)
        mix_y = y
        if TANH:
            mix_y = _load(ExpMixV + n * n_keys * BLOCK_D, index * BLOCK_D, features, BLOCK_D, BLOCK_D)
        ExpGateQ += n * n_queries * BLOCK_D
        ExpMixQ += n * n_queries * BLOCK_D
        whole = n_queries // UNROLL * UNROLL
        for first in range(0, whole, UNROLL):
            # Stored together: the threads that store are not those that sum, and each store is a round through shared
            # memory.
            dv, dgate, dmix, da = _add_query(
                dv, dgate, dmix, y, mix_y, v, Weights, ExpGateQ, ExpMixQ, Grad, first, stride_at, features,
                True, TANH, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            dv, dgate, dmix, second = _add_query(
                dv, dgate, dmix, y, mix_y, v, Weights, ExpGateQ, ExpMixQ, Grad, first + 1, stride_at, features,
                True, TANH, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            pair = tl.join(da, second)
            if UNROLL == 2:
                rows = first + tl.arange(0, 2)[None, :]
                pointers = WeightsGrad + rows.to(tl.int64) * n_keys + cols[:, None]
                tl.store(pointers, pair.to(WeightsGrad.dtype.element_ty), mask=stored[:, None])
            else:
                dv, dgate, dmix, da = _add_query(
                    dv, dgate, dmix, y, mix_y, v, Weights, ExpGateQ, ExpMixQ, Grad, first + 2, stride_at, features,
                    True, TANH, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
                dv, dgate, dmix, second = _add_query(
                    dv, dgate, dmix, y, mix_y, v, Weights, ExpGateQ, ExpMixQ, Grad, first + 3, stride_at, features,
                    True, TANH, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
                four = tl.join(pair, tl.join(da, second))
                rows = first + tl.arange(0, 2)[None, :, None] + 2 * tl.arange(0, 2)[None, None, :]
                pointers = WeightsGrad + rows.to(tl.int64) * n_keys + cols[:, None, None]
                tl.store(pointers, four.to(WeightsGrad.dtype.element_ty), mask=stored[:, None, None])
        for row in range(whole, n_queries):
            dv, dgate, dmix, da = _add_query(
                dv, dgate, dmix, y, mix_y, v, Weights, ExpGateQ, ExpMixQ, Grad, row, stride_at, features,
                True, TANH, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            pointers = WeightsGrad + _wide(row) * n_keys + cols
            tl.store(pointers, da.to(WeightsGrad.dtype.element_ty), mask=stored)
    else:
        y = _load(GateV + n * n_keys * HEAD_DIM, index * HEAD_DIM, features, HEAD_DIM, BLOCK_D)
        mix_y = y
        if TANH:
            mix_y = _load(MixV + n * n_keys * HEAD_DIM, index * HEAD_DIM, features, HEAD_DIM, BLOCK_D)
        GateQ += n * n_queries * HEAD_DIM
        MixQ += n * n_queries * HEAD_DIM
        for row in range(0, n_queries):
            dv, dgate, dmix, da = _add_query(
                dv, dgate, dmix, y, mix_y, v, Weights, GateQ, MixQ, Grad, row, stride_at, features,
                False, TANH, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            pointers = WeightsGrad + _wide(row) * n_keys + cols
            tl.store(pointers, da.to(WeightsGrad.dtype.element_ty), mask=stored)
    if not TANH:
        dgate = dgate * v
    place = n * n_keys * HEAD_DIM + cols[None, :, None, None] * HEAD_DIM + features
    inside = stored[None, :, None, None] & (features < HEAD_DIM)
    tl.store(ValueGrad + place, dv, mask=inside)
    tl.store(GateGrad + place, dgate, mask=inside)
    if TANH:
        tl.store(MixGrad + place, 4.0 * dmix, mask=inside)


# ------------------------------------------------------------------------------------------------ launches

# (rows, warps, unrolled rows of the other side). One row of the other side has to have fewer numbers than there are
# threads, or Triton passes it through shared memory; 32 elements a thread (tanh: 16) fit into registers.
Sizes = tuple[int, int, int]
_FORWARD: list[Sizes] = [(64, 4, 2), (64, 4, 4), (32, 4, 4), (64, 8, 4), (32, 8, 4)]
_BACKWARD: list[Sizes] = [(64, 4, 2), (64, 4, 4), (32, 4, 4), (64, 8, 2), (32, 8, 2)]
_SMALL: Sizes = (16, 4, 4)
_KEY = ["size_class", "TANH", "BLOCK_D"]


def _fits(sizes: Sizes, block_d: int, tanh: bool) -> bool:
    rows, warps, _ = sizes
    return block_d < 32 * warps and rows * block_d <= (16 if tanh else 32) * 32 * warps


def _config(sizes: Sizes) -> Any:
    rows, warps, unroll = sizes
    return triton.Config({"BLOCK": rows, "UNROLL": unroll}, num_warps=warps, num_stages=1)


def _prune(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Leaves out what would spill registers, and blocks far longer than the sequences."""
    longest = max(arguments["n_queries"], arguments["n_keys"], 32)
    fitting = [
        c for c in configs if _fits((c.kwargs["BLOCK"], c.num_warps, 0), constants["BLOCK_D"], constants["TANH"])
    ]
    return [c for c in fitting if c.kwargs["BLOCK"] < 2 * longest] or fitting[-1:]


def _tuned(function: Any, sizes: list[Sizes], key: list[str]) -> Any:
    sizes = [_SMALL] if INTERPRETED else sizes
    options = {"prune_configs_by": {"early_config_prune": _prune}, "do_bench": score_triton._bench}
    return triton.autotune([_config(size) for size in sizes], key=key, **({} if INTERPRETED else options))(function)


_TUNED = {
    "forward": _tuned(_forward, _FORWARD, [*_KEY, "SLOPES"]),
    "backward": _tuned(_backward, _BACKWARD, _KEY),
}


def _untuned(name: str, block_d: int, tanh: bool) -> Sizes:
    if INTERPRETED:
        return (16, 4, 2)
    return next(x for x in (_FORWARD if name == "forward" else _BACKWARD) if _fits(x, block_d, tanh))


def _launch(name: str, length: int, heads: int, *arguments: Any, **constants: Any) -> None:
    """Runs a kernel, one program for each block of `length` and each head, with tuned or fixed block sizes."""
    kernel = _TUNED[name]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(length, meta["BLOCK"]) * heads,)

    if INTERPRETED or tuning(arguments[0]):
        kernel[grid](*arguments, **constants)
        return
    rows, warps, unroll = _untuned(name, constants["BLOCK_D"], constants["TANH"])
    kernel.fn[grid](*arguments, **constants, BLOCK=rows, UNROLL=unroll, num_warps=warps, num_stages=1)


def _block_d(head_dim: int) -> int:
    return max(4 * LANES, triton.next_power_of_2(head_dim))


def _exponentials(
    gate_q: Tensor, gate_v: Tensor, mix_q: Tensor | None, mix_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the loops multiply, of gates and mixes (without mixes: of gates again), and which heads it does not fit."""
    heads, n_queries, head_dim = gate_q.shape
    n_keys, block_d = gate_v.shape[1], _block_d(head_dim)
    unsafe = torch.zeros(heads, dtype=torch.int32, device=gate_q.device)

    def pair(q: Tensor, v: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        exp_q, exp_v = q.new_empty(heads, n_queries, block_d), v.new_empty(heads, n_keys, block_d)
        _prepare[(heads,)](
            q, v, exp_q, exp_v, unsafe, n_queries, n_keys, factor,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_L=4096 // block_d, num_warps=8,
        )  # fmt: skip
        return exp_q, exp_v

    gates = pair(gate_q, gate_v, -LOG2E)
    mixes = gates if mix_q is None or mix_v is None else pair(mix_q, mix_v, 2.0 * LOG2E)
    return *gates, *mixes, unsafe


def _arguments(
    weights: Tensor, value: Tensor, gate_q: Tensor, gate_v: Tensor, mix_q: Tensor | None, mix_v: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """The tensors, scalars and constants that both kernels share."""
    value, gate_q, gate_v = value.contiguous(), gate_q.contiguous(), gate_v.contiguous()
    tanh = mix_q is not None and mix_v is not None
    mixes = (mix_q.contiguous(), mix_v.contiguous()) if mix_q is not None and mix_v is not None else (gate_q, gate_v)
    exponentials = _exponentials(gate_q, gate_v, *(mixes if tanh else (None, None)))
    n_queries, n_keys, head_dim = gate_q.shape[1], value.shape[1], value.shape[2]
    # Tuned once for each power of two of the longer length, not for every length.
    scalars = (*weights.stride(), n_queries, n_keys, max(n_queries, n_keys, 128).bit_length())
    constants = {"TANH": tanh, "HEAD_DIM": head_dim, "BLOCK_D": _block_d(head_dim)}
    return (weights, value, gate_q, gate_v, *mixes, *exponentials), scalars, constants


@torch.library.custom_op("attnpatch::triton_gated_value_sum", mutates_args=())
def gated_value_sum_op(
    weights: Tensor,
    value: Tensor,
    gate_q: Tensor,
    gate_v: Tensor,
    mix_q: Tensor | None,
    mix_v: Tensor | None,
    training: bool,
) -> list[Tensor]:
    """The sum; with `training` also its derivative by gate_q and, where there is one, by mix_q. All [N, T, D]."""
    outputs = _empty_outputs(gate_q, mix_q, training)
    with torch.cuda.device_of(value):
        tensors, scalars, constants = _arguments(weights, value, gate_q, gate_v, mix_q, mix_v)
        _launch(
            "forward", gate_q.shape[1], gate_q.shape[0], *tensors, *outputs, *outputs[:1] * (3 - len(outputs)),
            *scalars, **constants, SLOPES=training,
        )  # fmt: skip
    return outputs


@torch.library.custom_op("attnpatch::triton_gated_value_sum_backward", mutates_args=())
def gated_value_sum_backward_op(
    grad: Tensor,
    weights: Tensor,
    value: Tensor,
    gate_q: Tensor,
    gate_v: Tensor,
    mix_q: Tensor | None,
    mix_v: Tensor | None,
) -> list[Tensor]:
    """Gradients of weights, in their dtype, and of value, gate_v and, where there is one, mix_v."""
    gradients = _empty_gradients(weights, value, mix_v)
    with torch.cuda.device_of(value):
        tensors, scalars, constants = _arguments(weights, value, gate_q, gate_v, mix_q, mix_v)
        _launch(
            "backward", value.shape[1], value.shape[0], *tensors, grad.contiguous(), *gradients,
            *gradients[1:2] * (4 - len(gradients)), *scalars, **constants, LANES=LANES,
        )  # fmt: skip
    return gradients


def _empty_outputs(gate_q: Tensor, mix_q: Tensor | None, training: bool) -> list[Tensor]:
    count = 1 if not training else 2 if mix_q is None else 3
    return [torch.empty_like(gate_q, memory_format=torch.contiguous_format) for _ in range(count)]


def _empty_gradients(weights: Tensor, value: Tensor, mix_v: Tensor | None) -> list[Tensor]:
    like = [weights, value, value] if mix_v is None else [weights, value, value, value]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


@gated_value_sum_op.register_fake
def _fake_forward(
    weights: Tensor,
    value: Tensor,
    gate_q: Tensor,
    gate_v: Tensor,
    mix_q: Tensor | None,
    mix_v: Tensor | None,
    training: bool,
) -> list[Tensor]:
    return _empty_outputs(gate_q, mix_q, training)


@gated_value_sum_backward_op.register_fake
def _fake_backward(
    grad: Tensor,
    weights: Tensor,
    value: Tensor,
    gate_q: Tensor,
    gate_v: Tensor,
    mix_q: Tensor | None,
    mix_v: Tensor | None,
) -> list[Tensor]:
    return _empty_gradients(weights, value, mix_v)


class _GatedValueSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        value: Tensor,
        gate_q: Tensor,
        gate_v: Tensor,
        mix_q: Tensor | None,
        mix_v: Tensor | None,
        training: bool,
    ) -> Tensor:
        inputs = (weights, value, gate_q, gate_v, mix_q, mix_v)
        out, *slopes = gated_value_sum_op(*inputs, training)
        if training:
            ctx.save_for_backward(*inputs, *slopes)
        return out

    @staticmethod
    @differentiable_once("pairwise query-value attention")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, slopes = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        weights, value, gate_v, *mix_v = gated_value_sum_backward_op(grad, *inputs)
        gate_q, *mix_q = (grad * slope for slope in slopes)
        return (weights, value, gate_q, gate_v, *(mix_q or [None]), *(mix_v or [None]), None)


def gated_value_sum(
    weights: Tensor, value: Tensor, gate_q: Tensor, gate_v: Tensor, mix_q: Tensor | None, mix_v: Tensor | None
) -> Tensor:
    """sum_j a_ij s_ij f_ij, s = sigmoid(gate_q_i + gate_v_j); f = v_j, or tanh(mix_q_i + mix_v_j) - v_j.

    For what `why_not` has no objection to. Not differentiable twice.

    Args:
        weights: [N, T, S], of any strides. value, gate_v, mix_v: [N, S, D]. gate_q, mix_q: [N, T, D]. All but
            weights in float32; N, T and S at least 1.
    Returns:
        [N, T, D], in float32.
    """
    inputs = (weights, value, gate_q, gate_v, mix_q, mix_v)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _GatedValueSum.apply(*inputs, training)
