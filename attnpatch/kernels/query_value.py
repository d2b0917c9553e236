"""Query-value interaction: values that know who reads them (Wu, Wu, Qi, Huang 2020, arXiv 2010.03766).

A documented reconstruction of the paper's equations 4-6 (pairwise) and 7-10 (pooled). With ordinary attention
weights a_ij and, per head, D x D matrices that act like `nn.Linear` weights ([out, in]):

    pairwise   g_ij = strength * sigmoid(G_q q_i + G_v v_j + c),   u_ij = phi(q_i, v_j)
               o_i  = sum_j a_ij [ g_ij * u_ij + (1 - g_ij) * v_j ]
    query      the gate depends on q_i alone and phi = q * v: o_i = [g_i * q_i + (1 - g_i)] * sum_j a_ij v_j
    pooled     q_i is replaced by one qbar_j per key, mixed over all queries (never on a causal site)
    phi        "product": q * v        "tanh": tanh(U_q q + U_v v + b)

Initialisation: c = `GATE_BIAS` (-4: the gate starts almost shut). `strength` is 1 for a model trained from
scratch and 0 for a converted one: with 0 every form returns exactly `weights @ value`, and the gradient of
`strength` itself is not zero, so training opens the gate.

Arithmetic is in float32 for float16 and bfloat16 inputs (also under autocast) and in float64 for float64; the
result has the dtype of `value`. A key of weight 0 has no influence, whatever its value holds.
"""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpecError, unknown
from . import dispatch
from .once import differentiable_once

GATE_BIAS = -4.0
PHIS = ("product", "tanh")
GATES = ("pairwise", "query", "pooled")
POOLINGS = ("attention", "additive")

# Elements of one [rows, S, D] block: on a CPU it should stay in the cache, on a GPU it should fill the
# device.
_BLOCK_ELEMENTS_CPU = 1 << 17
_BLOCK_ELEMENTS_GPU = 1 << 24


# ----------------------------------------------------------------------------------------- the blocked sum


def _blocks(n: int, t: int, rows: int) -> list[tuple[slice, slice]]:
    """Tiles of an [n, t] grid of query rows, each of about `rows` rows (at least one)."""
    tile_n, tile_t = max(1, rows // max(t, 1)), max(1, min(t, rows))
    return [
        (slice(i, min(i + tile_n, n)), slice(j, min(j + tile_t, t)))
        for i in range(0, n, tile_n)
        for j in range(0, t, tile_t)
    ]


def _buffers(count: int, weights: Tensor, value: Tensor, rows: int) -> list[Tensor]:
    """Room for `count` blocks [n, t, S, D]; taken once, as fresh memory for every block costs as much as filling it."""
    tokens = min(max(rows, 1), weights.shape[0] * weights.shape[1])
    return [value.new_empty(tokens * value.shape[1] * value.shape[2]) for _ in range(count)]


def _view(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _outer_sum(row: Tensor, column: Tensor, buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[n, t, D] and [n, S, D] -> [n, t, S, D], in `buffer`"""
    return torch.add(row.unsqueeze(2), column.unsqueeze(1), out=_view(buffer, shape))


# Optional[...] instead of `| None`, and no postponed annotations: custom_op reads its schema from these.
@torch.library.custom_op("attnpatch::gated_value_sum", mutates_args=())
def _gated_value_sum(
    weights: Tensor,
    value: Tensor,
    gate_q: Tensor,
    gate_v: Tensor,
    mix_q: Optional[Tensor],  # noqa: UP045
    mix_v: Optional[Tensor],  # noqa: UP045
    rows: int,
) -> Tensor:
    """sum_j a_ij s_ij f_ij, s = sigmoid(gate_q_i + gate_v_j); f = v_j, or tanh(mix_q_i + mix_v_j) - v_j.

    weights [N,T,S], value/gate_v/mix_v [N,S,D], gate_q/mix_q [N,T,D] -> [N,T,D], `rows` query rows at a time.
    An operator of its own, so that torch.compile sees one node and not an unrolled loop.
    """
    out = torch.empty_like(gate_q, memory_format=torch.contiguous_format)
    buffers = _buffers(1 if mix_q is None else 2, weights, value, rows)
    for n, t in _blocks(gate_q.shape[0], gate_q.shape[1], rows):
        a, v = weights[n, t].to(value.dtype), value[n].unsqueeze(1)
        shape = (*a.shape, v.shape[-1])
        s = _outer_sum(gate_q[n, t], gate_v[n], buffers[0], shape).sigmoid_()
        if mix_q is None or mix_v is None:
            s.mul_(v)
        else:
            s.mul_(_outer_sum(mix_q[n, t], mix_v[n], buffers[1], shape).tanh_().sub_(v))
        out[n, t] = torch.matmul(a.unsqueeze(-2), s).squeeze(-2)
    return out


@_gated_value_sum.register_fake
def _(
    weights: Tensor,
    value: Tensor,
    gate_q: Tensor,
    gate_v: Tensor,
    mix_q: Optional[Tensor],  # noqa: UP045
    mix_v: Optional[Tensor],  # noqa: UP045
    rows: int,
) -> Tensor:
    return torch.empty_like(gate_q, memory_format=torch.contiguous_format)


@torch.library.custom_op("attnpatch::gated_value_sum_backward", mutates_args=())
def _gated_value_sum_backward(
    grad: Tensor,
    weights: Tensor,
    value: Tensor,
    gate_q: Tensor,
    gate_v: Tensor,
    mix_q: Optional[Tensor],  # noqa: UP045
    mix_v: Optional[Tensor],  # noqa: UP045
    rows: int,
) -> list[Tensor]:
    """Gradients of weights, value, gate_q, gate_v (and mix_q, mix_v), with the blocks computed again."""
    d_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    d_value, d_gate_v = torch.zeros_like(value), torch.zeros_like(value)
    d_gate_q = torch.empty_like(gate_q)
    d_mix_q = torch.empty_like(gate_q) if mix_q is not None else None
    d_mix_v = torch.zeros_like(value) if mix_v is not None else None
    buffers = _buffers(3 if mix_q is None else 5, weights, value, rows)
    for n, t in _blocks(gate_q.shape[0], gate_q.shape[1], rows):
        g, v = grad[n, t].unsqueeze(2), value[n].unsqueeze(1)
        a = weights[n, t].to(g.dtype)
        shape = (*a.shape, v.shape[-1])
        s = _outer_sum(gate_q[n, t], gate_v[n], buffers[0], shape).sigmoid_()
        w, product = _view(buffers[1], shape), _view(buffers[2], shape)
        torch.mul(s, g, out=w)
        if mix_q is None or mix_v is None or d_mix_q is None or d_mix_v is None:
            d_weights[n, t] = torch.mul(w, v, out=product).sum(-1)
            w.mul_(a.unsqueeze(-1))  # d loss / d f, f = v
            d_value[n].add_(w.sum(1))
            w.addcmul_(w, s, value=-1)  # a g s (1 - s)
            d_gate_v[n].add_(w.sum(1))  # times v_j, at the end
            d_gate_q[n, t] = torch.mul(w, v, out=product).sum(2)
        else:
            u = _outer_sum(mix_q[n, t], mix_v[n], buffers[3], shape).tanh_()
            f = torch.sub(u, v, out=_view(buffers[4], shape))
            d_weights[n, t] = torch.mul(w, f, out=product).sum(-1)
            w.mul_(a.unsqueeze(-1))
            d_value[n].sub_(w.sum(1))
            slope = u.square_().neg_().add_(1).mul_(w)  # a g s (1 - u^2)
            d_mix_q[n, t] = slope.sum(2)
            d_mix_v[n].add_(slope.sum(1))
            w.addcmul_(w, s, value=-1).mul_(f)
            d_gate_v[n].add_(w.sum(1))
            d_gate_q[n, t] = w.sum(2)
    gradients = [d_weights, d_value, d_gate_q, d_gate_v]
    if d_mix_q is not None and d_mix_v is not None:
        gradients += [d_mix_q, d_mix_v]
    else:
        d_gate_v.mul_(value)
    return gradients


@_gated_value_sum_backward.register_fake
def _(
    grad: Tensor,
    weights: Tensor,
    value: Tensor,
    gate_q: Tensor,
    gate_v: Tensor,
    mix_q: Optional[Tensor],  # noqa: UP045
    mix_v: Optional[Tensor],  # noqa: UP045
    rows: int,
) -> list[Tensor]:
    like = [weights, value, gate_q, gate_v]
    if mix_q is not None and mix_v is not None:
        like += [mix_q, mix_v]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


class _GatedValueSum(torch.autograd.Function):
    """Keeps its [N,T,S], [N,T,D] and [N,S,D] inputs and nothing of size T x S x D."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        value: Tensor,
        gate_q: Tensor,
        gate_v: Tensor,
        mix_q: Tensor | None,
        mix_v: Tensor | None,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(weights, value, gate_q, gate_v, mix_q, mix_v)
        ctx.rows = rows
        return _gated_value_sum(weights, value, gate_q, gate_v, mix_q, mix_v, rows)

    @staticmethod
    @differentiable_once("pairwise query-value attention")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            gradients = _gated_value_sum_backward(grad.contiguous(), *ctx.saved_tensors, ctx.rows)
        return (*gradients, *[None] * (7 - len(gradients)))


# ------------------------------------------------------------------------------------------------- helpers


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _per_head(matrix: Tensor, x: Tensor) -> Tensor:
    """[H, D, D] (out, in) applied to [B, H, L, D]."""
    return torch.matmul(x, matrix.to(x.dtype).transpose(-1, -2))


def _column(strength: Tensor, dtype: torch.dtype) -> Tensor:
    return strength.to(dtype).view(-1, 1, 1)


def _check_shapes(query: Tensor, value: Tensor, weights: Tensor | None, **parameters: Tensor | None) -> None:
    if query.dim() != 4 or value.dim() != 4:
        raise SpecError(
            "query and value have to be [batch, heads, length, head_dim];"
            f" got {tuple(query.shape)} and {tuple(value.shape)}"
        )
    batch, heads, length, dim = query.shape
    if value.shape[:2] != (batch, heads) or value.shape[3] != dim:
        raise SpecError(
            "query and value have to agree in batch, heads and head_dim (they interact element by element);"
            f" got {tuple(query.shape)} and {tuple(value.shape)}"
        )
    if weights is not None and weights.shape != (batch, heads, length, value.shape[2]):
        raise SpecError(
            f"weights have to be [batch, heads, queries, keys] = {(batch, heads, length, value.shape[2])};"
            f" got {tuple(weights.shape)}"
        )
    allowed = {
        "gate_query": (heads, dim, dim),
        "gate_value": (heads, dim, dim),
        "gate_bias": (heads, dim),
        "strength": (heads,),
        "phi_query": (heads, dim, dim),
        "phi_value": (heads, dim, dim),
        "phi_bias": (heads, dim),
        "pool_query": (heads, dim),
    }
    for name, parameter in parameters.items():
        if parameter is not None and tuple(parameter.shape) != allowed[name]:
            raise SpecError(f"{name} has shape {tuple(parameter.shape)}; these heads need {allowed[name]}")


def _check_phi(phi: str, phi_query: Tensor | None, phi_value: Tensor | None, phi_bias: Tensor | None) -> None:
    if phi not in PHIS:
        raise SpecError(unknown("phi", phi, PHIS))
    given = [x is not None for x in (phi_query, phi_value, phi_bias)]
    if phi == "tanh" and not all(given):
        raise SpecError("phi='tanh' needs phi_query, phi_value and phi_bias")
    if phi == "product" and any(given):
        raise SpecError("phi='product' has no parameters; phi_query, phi_value and phi_bias belong to phi='tanh'")


class _MaskedSoftmax(torch.autograd.Function):
    """Softmax over visible keys; a row without any is zero. Saves its result only, not the masked scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, visible: Tensor) -> Tensor:
        # A finite fill keeps rows without a visible key free of NaN; the second fill makes them zero.
        filled = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = torch.softmax(filled, dim=-1).masked_fill_(~visible, 0.0)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        # Where the weight is 0 the incoming gradient may have overflowed (huge padding in float16).
        product = (grad * weights).masked_fill(weights == 0, 0.0)
        return product - weights * product.sum(-1, keepdim=True), None


def _softmax_weights(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Softmax attention weights [B,H,T,S] in float32 (float64 for float64); no visible key -> a zero row.

    In a float mask -inf and everything below half of its dtype's minimum (finfo.min, with or without a bias
    added to it) mean excluded.
    """
    dtype = _compute_dtype(query, key)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query.to(dtype) * scale, key.to(dtype).transpose(-1, -2))
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return _MaskedSoftmax.apply(scores, visible)
    if attn_mask is None:
        return torch.softmax(scores, dim=-1)
    if attn_mask.dtype == torch.bool:
        return _MaskedSoftmax.apply(scores, attn_mask)
    visible = attn_mask > torch.finfo(attn_mask.dtype).min / 2
    bias = attn_mask.to(dtype).masked_fill(~visible, 0.0)
    return _MaskedSoftmax.apply(scores + bias, visible)


def differs_by_query(attn_mask: Tensor) -> bool:
    """Whether a mask [.., T, S] shows one query other keys than another."""
    if attn_mask.dim() < 2 or attn_mask.shape[-2] == 1 or attn_mask.stride(-2) == 0:
        return False
    return not bool((attn_mask == attn_mask[..., :1, :]).all())


# ------------------------------------------------------------------------------------------------- public


def pairwise_aggregate(
    query: Tensor,
    weights: Tensor,
    value: Tensor,
    gate_query: Tensor,
    gate_value: Tensor,
    gate_bias: Tensor,
    strength: Tensor,
    phi: str = "product",
    phi_query: Tensor | None = None,
    phi_value: Tensor | None = None,
    phi_bias: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """o_i = sum_j a_ij [ g_ij * u_ij + (1 - g_ij) * v_j ] with one gate and one value for each query-key pair.

    Computed as `weights @ value` plus sum_j a_ij g_ij (u_ij - v_j), the second term fused (on CUDA, see
    `attnpatch.kernels.query_value_triton`) or in blocks of query rows, and computed again in the backward pass:
    O(T D + S D + T S) memory, never T x S x D. Not differentiable twice.

    Args:
        query: [B, H, T, D]. value: [B, H, S, D].
        weights: [B, H, T, S]; a zero row gives a zero output, a key of weight 0 has no influence.
        gate_query, gate_value: [H, D, D] (out, in). gate_bias: [H, D]. strength: [H].
        phi: "product", or "tanh" with phi_query and phi_value [H, D, D] and phi_bias [H, D].
        block: query rows (counted over batch and heads) held at once, and not fused; None fits the device.
    Returns:
        [B, H, T, D] in the dtype of value.
    Raises:
        SpecError: for shapes that do not fit, an unknown phi, or phi parameters that are missing or superfluous.
    """
    _check_phi(phi, phi_query, phi_value, phi_bias)
    _check_shapes(
        query,
        value,
        weights,
        gate_query=gate_query,
        gate_value=gate_value,
        gate_bias=gate_bias,
        strength=strength,
        phi_query=phi_query,
        phi_value=phi_value,
        phi_bias=phi_bias,
    )
    if block is not None and block < 1:
        raise SpecError(f"block is a number of query rows, at least 1; got {block}")
    batch, heads, length, dim = query.shape
    keys = value.shape[2]
    dtype = _compute_dtype(query, value, weights)
    with torch.autocast(query.device.type, enabled=False):
        base = torch.matmul(weights.to(value.dtype), value)
        if base.numel() == 0 or keys == 0:
            return base
        q, v = query.to(dtype), value.to(dtype)
        gate_q = _per_head(gate_query, q) + gate_bias.to(dtype).unsqueeze(1)
        gate_v = _per_head(gate_value, v)
        mix_q = mix_v = None
        if phi_query is not None and phi_value is not None and phi_bias is not None:
            mix_q = (_per_head(phi_query, q) + phi_bias.to(dtype).unsqueeze(1)).flatten(0, 1)
            mix_v = _per_head(phi_value, v).flatten(0, 1)
        a, values, gates = weights.flatten(0, 1), v.flatten(0, 1), (gate_q.flatten(0, 1), gate_v.flatten(0, 1))
        if block is None and dispatch.why_not_fused_sum(a, values) is None:
            mixed = dispatch.query_value_triton.gated_value_sum(a, values, *gates, mix_q, mix_v)
        else:
            if block is None:
                budget = _BLOCK_ELEMENTS_CPU if query.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
                block = max(1, budget // (keys * dim))
            mixed = _GatedValueSum.apply(a, values, *gates, mix_q, mix_v, block)
        mixed = mixed.view(batch, heads, length, dim)
        if phi == "product":
            mixed = (q - 1) * mixed  # u - v = (q - 1) * v, and q does not depend on j
        return base + (_column(strength, dtype) * mixed).to(base.dtype)


def query_gated_aggregate(
    query: Tensor, weights: Tensor, value: Tensor, gate_query: Tensor, gate_bias: Tensor, strength: Tensor
) -> Tensor:
    """o_i = [g_i * q_i + (1 - g_i)] * sum_j a_ij v_j, g_i = strength * sigmoid(G_q q_i + c): no extra cost.

    The pairwise form with G_v = 0 and phi = q * v. Shapes and errors as in `pairwise_aggregate`.
    """
    _check_shapes(query, value, weights, gate_query=gate_query, gate_bias=gate_bias, strength=strength)
    dtype = _compute_dtype(query, value, weights)
    with torch.autocast(query.device.type, enabled=False):
        base = torch.matmul(weights.to(value.dtype), value)
        q = query.to(dtype)
        gate = torch.sigmoid(_per_head(gate_query, q) + gate_bias.to(dtype).unsqueeze(1))
        return (base * (1 + _column(strength, dtype) * gate * (q - 1))).to(base.dtype)


def pooled_aggregate(
    query: Tensor,
    weights: Tensor,
    value: Tensor,
    gate_query: Tensor,
    gate_value: Tensor,
    gate_bias: Tensor,
    strength: Tensor,
    phi: str = "product",
    phi_query: Tensor | None = None,
    phi_value: Tensor | None = None,
    phi_bias: Tensor | None = None,
    query_valid: Tensor | None = None,
    pooling: str = "attention",
    pool_query: Tensor | None = None,
) -> Tensor:
    """o_i = sum_j a_ij [ g_j * phi(qbar_j, v_j) + (1 - g_j) * v_j ]: one mixed query for each key, O(S D) extra.

    Every query takes part in every qbar, so this is for bidirectional sites only; on a causal site use
    `pairwise_aggregate`.

    Args:
        query_valid: bool [B, T], True where the query is a token and not padding; None when all are. Padding
            queries take no part in qbar.
        pooling: "attention": qbar_j = sum_i a_ij q_i / sum_i a_ij, and 0 for a key that no query attends to.
            "additive": qbar = sum_i softmax_i(w_h . q_i) q_i, the same for all keys, with `pool_query` w [H, D].
        The rest as in `pairwise_aggregate`.
    Raises:
        SpecError: as `pairwise_aggregate`; also for an unknown pooling and a query_valid that does not fit.
    """
    _check_phi(phi, phi_query, phi_value, phi_bias)
    _check_shapes(
        query,
        value,
        weights,
        gate_query=gate_query,
        gate_value=gate_value,
        gate_bias=gate_bias,
        strength=strength,
        phi_query=phi_query,
        phi_value=phi_value,
        phi_bias=phi_bias,
        pool_query=pool_query,
    )
    if pooling not in POOLINGS:
        raise SpecError(unknown("pooling", pooling, POOLINGS))
    if (pooling == "additive") != (pool_query is not None):
        raise SpecError("pool_query [H, D] goes with pooling='additive', and only with it")
    if query_valid is not None and (
        query_valid.dtype != torch.bool or query_valid.shape != (query.shape[0], query.shape[2])
    ):
        raise SpecError(
            f"query_valid has to be bool of shape {(query.shape[0], query.shape[2])} (batch, queries);"
            f" got {query_valid.dtype} {tuple(query_valid.shape)}"
        )
    dtype = _compute_dtype(query, value, weights)
    with torch.autocast(query.device.type, enabled=False):
        q, v, shares = query.to(dtype), value.to(dtype), weights.to(dtype)
        if query_valid is not None:
            padding = ~query_valid[:, None, :, None]
            q, shares = q.masked_fill(padding, 0.0), shares.masked_fill(padding, 0.0)
        if pool_query is None:
            total = shares.sum(-2).unsqueeze(-1)  # [B, H, S, 1]
            # Below this the quotient and its gradient would leave the range of the dtype.
            attended = total > torch.finfo(dtype).tiny / torch.finfo(dtype).eps
            pooled = torch.matmul(shares.transpose(-1, -2), q) / torch.where(attended, total, 1.0)
            pooled = pooled.masked_fill(~attended, 0.0)
        else:
            logits = torch.matmul(q, pool_query.to(dtype).unsqueeze(-1)).transpose(-1, -2)  # [B, H, 1, T]
            if query_valid is None:
                attention = torch.softmax(logits, dim=-1)
            else:
                attention = _MaskedSoftmax.apply(logits, query_valid[:, None, None, :])
            pooled = torch.matmul(attention, q)  # [B, H, 1, D]
        gate = torch.sigmoid(
            _per_head(gate_query, pooled) + _per_head(gate_value, v) + gate_bias.to(dtype).unsqueeze(1)
        )
        if phi_query is not None and phi_value is not None and phi_bias is not None:
            mixed = torch.tanh(_per_head(phi_query, pooled) + _per_head(phi_value, v) + phi_bias.to(dtype).unsqueeze(1))
        else:
            mixed = pooled * v
        mixed = v + _column(strength, dtype) * gate * (mixed - v)
        return torch.matmul(weights.to(value.dtype), mixed.to(value.dtype))


def query_value_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    gate_query: Tensor,
    gate_bias: Tensor,
    strength: Tensor,
    gate_value: Tensor | None = None,
    phi: str = "product",
    phi_query: Tensor | None = None,
    phi_value: Tensor | None = None,
    phi_bias: Tensor | None = None,
    gate: str = "pairwise",
    query_valid: Tensor | None = None,
    pooling: str = "attention",
    pool_query: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Softmax attention whose values know the query: `F.scaled_dot_product_attention` with an aggregate.

    The positional parameters are those of `F.scaled_dot_product_attention`. A query without a visible key
    gives zeros. Dropout acts on the attention weights.

    Args:
        query [B,H,T,D], key [B,H,S,D], value [B,H,S,D].
        attn_mask: None; bool (True: may attend); or float, added to the scores, -inf or finfo.min: excluded.
            Broadcastable to [B,H,T,S].
        gate: "pairwise" (`pairwise_aggregate`), "query" (`query_gated_aggregate`; no gate_value, phi is the
            product) or "pooled" (`pooled_aggregate` with query_valid, pooling and pool_query).
        query_valid: for gate="pooled" pass it whenever a batch has padding: attn_mask speaks of keys only.
    Raises:
        SpecError (a ValueError): gate="pooled" on a causal site or with a mask that differs by query, where it
            would show later tokens to earlier ones; is_causal together with attn_mask; arguments that do not fit.
    """
    if gate not in GATES:
        raise SpecError(unknown("gate", gate, GATES))
    _check_shapes(query, value, None)
    if is_causal and attn_mask is not None:
        raise SpecError("is_causal=True and attn_mask exclude each other; put the causal mask into attn_mask")
    if gate == "pooled" and (is_causal or (attn_mask is not None and differs_by_query(attn_mask))):
        raise SpecError(
            "gate='pooled' mixes all queries, so a site that is causal or has a mask that differs by query"
            " would leak what its mask hides; use gate='pairwise' there"
        )
    if gate == "query":
        if gate_value is not None or phi != "product":
            raise SpecError("gate='query' has no gate_value and only phi='product'; use gate='pairwise' for these")
        _check_phi(phi, phi_query, phi_value, phi_bias)
    elif gate_value is None:
        raise SpecError(f"gate={gate!r} needs gate_value [H, D, D]")
    if gate != "pooled" and (query_valid is not None or pool_query is not None or pooling != "attention"):
        raise SpecError("query_valid, pooling and pool_query belong to gate='pooled'")
    if gate != "pairwise" and block is not None:
        raise SpecError("block belongs to gate='pairwise'")
    with torch.autocast(query.device.type, enabled=False):
        weights = _softmax_weights(query, key, attn_mask, is_causal, scale)
        if dropout_p > 0.0:
            weights = F.dropout(weights, dropout_p)
    if gate_value is None:
        return query_gated_aggregate(query, weights, value, gate_query, gate_bias, strength)
    shared = (gate_query, gate_value, gate_bias, strength, phi, phi_query, phi_value, phi_bias)
    if gate == "pooled":
        return pooled_aggregate(query, weights, value, *shared, query_valid, pooling, pool_query)
    return pairwise_aggregate(query, weights, value, *shared, block=block)
