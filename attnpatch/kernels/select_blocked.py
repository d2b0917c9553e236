"""Attention over r selected keys on the CPU: no T x S matrix, neither in memory nor for the backward pass.

Shapes: query [B, H, T, D], key [B, H, S, D], value [B, H, S, Dv], mask None, bool or float broadcastable to
[B, H, T, S].

For a block of queries that stays in the cache: the weights over all keys, the r best of each row (the choice of
`select.top_r_weights` and `select.value_aware_weights`, ties included), and their weighted sum. Kept are the indices
and the renormalised weights w [B, H, T, r], and the backward pass goes through those keys alone:

    dw = dO_i . v_j,  dz = w (dw - sum_r w dw) * f'(z) / f(z)
    dq_i = sum_r dz k_j,  dk_j = sum_i dz q_i,  dv_j = sum_i w dO_i

with z of the kept keys computed again where f'/f is not 1. Renormalising cancels the sum over the keys left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnpatch.kernels.score import compute_dtype, no_autocast, weights_from_scores
from attnpatch.kernels.score_blocked import compact_mask, log_slope

BLOCK_WEIGHTS = 2**17
"""Weights of one block: half a megabyte, which the cache holds."""

_PARTITION_THREADS = 5
"""Up to so many threads numpy's partition, which has one, is faster than torch's topk, which has all."""

_GATHER_FROM, _TRANSPOSE_FROM = 4, 24
"""From so many keys for each selected one, gathering them is faster than a matrix product with zeros; and the same
for sums over the queries of a key, which need a sort, and products with single keys."""


class Rule(NamedTuple):
    """What is computed, apart from the tensors."""

    kernel: str
    degree: int
    scale: float
    is_causal: bool
    r: int
    criterion: str
    dropout_p: float

    @property
    def dropout_factor(self) -> float:
        return 1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1.0 else 0.0


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, n, D] -> contiguous [B * H, n, D]."""
    return x.to(dtype).reshape(-1, *x.shape[2:]).contiguous()


def _head_blocks(n_heads: int, n_queries: int, n_keys: int) -> Iterator[tuple[slice, int]]:
    """(heads at a time, queries at a time)"""
    size = BLOCK_WEIGHTS * torch.get_num_threads()
    rows = max(1, size // max(n_keys, 1))
    step = max(1, rows // max(n_queries, 1))
    for first in range(0, n_heads, step):
        yield slice(first, min(first + step, n_heads)), min(rows, n_queries)


class _Mask:
    """A mask [1 or B, 1 or H, 1 or T, S] of which heads and queries are taken by the block."""

    def __init__(self, mask: Tensor | None, n_heads: int) -> None:
        self.mask = compact_mask(mask) if mask is not None and mask.dtype == torch.bool else mask
        self.n_heads = n_heads

    def of(self, heads: slice) -> Tensor | None:
        """[1 or n, 1 or T, S] of some of the flattened heads."""
        if self.mask is None:
            return None
        n_batch, n_heads = self.mask.shape[:2]
        if n_batch == n_heads == 1:
            return self.mask[0]
        first, last = heads.start // self.n_heads, (heads.stop - 1) // self.n_heads
        if first == last:
            part = self.mask[first if n_batch > 1 else 0]
            start = first * self.n_heads
            return part if n_heads == 1 else part[heads.start - start : heads.stop - start]
        number = torch.arange(heads.start, heads.stop)
        batch = number // self.n_heads if n_batch > 1 else torch.zeros_like(number)
        return self.mask[batch, number % self.n_heads if n_heads > 1 else torch.zeros_like(number)]


def _visible_keys(mask: Tensor | None, n_keys: int, r: int) -> tuple[int, int, Tensor | None]:
    """(first, end, mask within): the range of keys outside which padding hides all; at least r keys."""
    if mask is None or mask.dtype != torch.bool or mask.shape[:2] != (1, 1):
        return 0, n_keys, mask
    seen = mask[0, 0].nonzero()[:, 0]
    first, end = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
    end = min(n_keys, max(end, first + r))
    first = min(first, end - r)
    return first, end, None if len(seen) == end - first else mask[:, :, first:end]


class _Space:
    """Buffers that the blocks of one call share: fresh memory for each takes as long as filling it."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or len(held) < size:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)


def _at_least_rth(score: Tensor, r: int, space: _Space) -> Tensor:
    """Bool, True from the r-th largest of each row on; False, or anything, in a row with NaN."""
    keep = space.take("keep", score.shape, torch.bool)
    if torch.get_num_threads() > _PARTITION_THREADS:
        return torch.ge(score, score.topk(r, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True), out=keep)
    ordered, place = space.take("ordered", score.shape, score.dtype).numpy(), score.shape[-1] - r
    np.copyto(ordered, score.numpy())
    ordered.partition(place, axis=-1)
    np.greater_equal(score.numpy(), ordered[..., place : place + 1], out=keep.numpy())
    return keep


def best_order(weights: Tensor, score: Tensor, positive: Tensor) -> Tensor:
    """Indices of each row, best first: by score among the `positive`, then weight, then lower index; NaN first."""
    # topk does not say which of two equal entries it takes; a stable sort does.
    order = torch.sort(weights, dim=-1, descending=True, stable=True).indices
    if score is not weights:
        # Where the score was NaN or infinite at an excluded key, this also clears it.
        masked = torch.where(positive, score, float("-inf")).gather(-1, order)
        order = order.gather(-1, torch.sort(masked, dim=-1, descending=True, stable=True).indices)
    return order


def _best(weights: Tensor, score: Tensor, r: int, finite: bool, space: _Space) -> tuple[Tensor, Tensor]:
    """Keys of each row in ascending order, and their weights: [n, t, S] -> [n, t, r].

    A row with fewer than r positive weights is filled up with keys of weight 0.
    """
    n_keys = weights.shape[-1]
    if r == n_keys:
        return torch.arange(n_keys).expand(weights.shape), weights
    rows, ranked = weights.view(-1, n_keys), score.view(-1, n_keys)
    start = np.arange(0, rows.numel(), n_keys)
    keep = _at_least_rth(ranked, r, space) if finite else torch.zeros(rows.shape, dtype=torch.bool)
    flat = np.flatnonzero(keep.numpy())
    if len(flat) != len(rows) * r or (flat[::r] < start).any() or (flat[r - 1 :: r] >= start + n_keys).any():
        _mend(keep, rows, rows if score is weights else ranked, r)
        flat = np.flatnonzero(keep.numpy())
    index = torch.from_numpy(flat.reshape(-1, r) - start[:, None])
    return index.view(*weights.shape[:-1], r), rows.view(-1)[torch.from_numpy(flat)].view(*weights.shape[:-1], r)


def _mend(keep: Tensor, weights: Tensor, score: Tensor, r: int) -> None:
    """Choose again in rows with ties, NaN or too few positive weights; r keys each."""
    wrong = (keep.sum(-1) != r).nonzero()[:, 0]
    few, ranked = weights[wrong], score[wrong]
    positive = ~(few <= 0)
    below = -1.0 - torch.arange(few.shape[-1], dtype=few.dtype)
    spread = torch.where(positive, ranked, below)
    chosen = _at_least_rth(spread, r, _Space())
    tied = ((chosen.sum(-1) != r) | spread.isnan().any(-1)).nonzero()[:, 0]
    if len(tied):
        few = few[tied]
        order = best_order(few, few if score is weights else ranked[tied], positive[tied])
        chosen[tied] = torch.zeros_like(few, dtype=torch.bool).scatter_(-1, order[:, :r], True)
    keep[wrong] = chosen


def _score(rule: Rule, weights: Tensor, value: Tensor, norm: Tensor | None, mask: Tensor | None) -> Tensor:
    """What the keys are ranked by, [n, t, S]; `norm` [n, S] of the values for "norm"."""
    if rule.criterion == "weight":
        return weights
    distance = _distance(weights, value, mask, rule.is_causal) if norm is None else norm.unsqueeze(1)
    return weights * distance


def _distance(weights: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """||v_j - mu_i||, [n, t or 1, S], of the mean of the values that query i gives a positive weight."""
    bias = mask is not None and mask.dtype != torch.bool
    if not is_causal and not bias and (mask is None or mask.shape[1] == 1):
        # All queries see the same, unless a weight has underflowed.
        lowest = weights if mask is None else weights.masked_fill(~mask, 1.0)
        if lowest.amin() > 0.0:
            seen = value if mask is None else value.masked_fill(~mask.mT, 0.0)
            count = value.shape[1] if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)
            return torch.linalg.vector_norm(value - seen.sum(1, keepdim=True) / count, dim=-1).unsqueeze(1)
    positive = weights > 0
    seen = positive.to(value.dtype)
    count = seen.sum(-1, keepdim=True)
    value = value.masked_fill(~positive.any(1).unsqueeze(-1), 0.0)
    # Products cancel when the values share a large offset, unless that is taken out first; by what all queries
    # see, so that a row does not depend on what it does not.
    common = (positive | (count == 0.0)).all(1).to(value.dtype).unsqueeze(1)
    shared = common.sum(-1, keepdim=True)
    if not shared.all():
        mean = torch.bmm(seen, value).div_(count.clamp(min=1.0))
        return torch.cdist(mean, value, compute_mode="donot_use_mm_for_euclid_dist")
    value = value - torch.bmm(common, value).div_(shared)
    mean = torch.bmm(seen, value).div_(count.clamp(min=1.0))
    square = torch.baddbmm(value.square().sum(-1).unsqueeze(1), mean, value.mT, alpha=-2.0)
    return square.add_(mean.square().sum(-1, keepdim=True)).clamp_(min=0.0).sqrt_()


def _weighted_sum(index: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """sum_r w rows[index], [n, t, D]: index and weights [n, t, r], rows [n, S, D]."""
    n_keys = rows.shape[1]
    if index.shape[-1] * _GATHER_FROM > n_keys:
        return torch.bmm(_dense(index, weights, n_keys), rows)
    bags = F.embedding_bag(
        _table_index(index, n_keys).flatten(0, 1),
        rows.reshape(-1, rows.shape[-1]),
        per_sample_weights=weights.flatten(0, 1),
        mode="sum",
    )
    return bags.view(*index.shape[:2], -1)


def _dense(index: Tensor, weights: Tensor, n_keys: int) -> Tensor:
    return weights.new_zeros(*index.shape[:2], n_keys).scatter_(-1, index, weights)


def _table_index(index: Tensor, n_keys: int) -> Tensor:
    """Index into [n * S, D] in the place of that into [S, D]."""
    if index.shape[0] == 1:
        return index
    return index + torch.arange(0, index.shape[0] * n_keys, n_keys).view(-1, 1, 1)


def _products(left: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """left_i . rows[index], [n, t, r]: left [n, t, D], rows [n, S, D]."""
    n_keys, r = rows.shape[1], index.shape[-1]
    if r * _TRANSPOSE_FROM > n_keys:
        return torch.bmm(left, rows.mT).gather(-1, index)
    table = _table_index(index, n_keys).reshape(-1)
    bag = torch.arange(len(table) // r)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left.reshape(-1, left.shape[-1]), rows.view(-1, rows.shape[-1]), table, bag * r, bag.repeat_interleave(r), 0, -1
    )
    return products.view(index.shape)


class _Transposed:
    """The entries [T, r] of one head ordered by key, for sums over the queries that selected it."""

    def __init__(self, index: Tensor, n_keys: int) -> None:
        flat = index.reshape(-1)
        # numpy sorts 16 bits by radix, five times faster than torch.
        narrow = np.uint16 if n_keys <= 2**16 else np.int32
        self._order = torch.from_numpy(np.argsort(flat.numpy().astype(narrow), kind="stable"))
        count = torch.bincount(flat, minlength=n_keys)
        self._start = count.cumsum(0) - count
        self._query = torch.div(self._order, index.shape[-1], rounding_mode="floor")

    def sum(self, weights: Tensor, rows: Tensor) -> Tensor:
        """sum_i w_ij rows_i, [S, D]: weights [T, r], rows [T, D]."""
        ordered = weights.reshape(-1)[self._order]
        return F.embedding_bag(self._query, rows, self._start, per_sample_weights=ordered, mode="sum")


def selected_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropped: Tensor | None, rule: Rule, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, T, Dv] in query's dtype; weights and indices (int32) of the kept keys, [B, H, T, r].

    dropped: None or bool [B, H, T, r], True where dropout leaves a weight. Weights and indices are empty unless
    `training`.
    """
    output, saved_weights, saved_index = empty_outputs(query, key, value, rule, training)
    dtype = compute_dtype(query)
    masks = _Mask(mask, query.shape[1])
    with no_autocast(query.device):
        q, k, v = (_flat(x, dtype) for x in (query, key, value))
        q = q * rule.scale
        space = _Space()
        out = output.new_empty(len(q), q.shape[1], v.shape[-1])
        for heads, step in _head_blocks(len(q), q.shape[1], k.shape[1]):
            first, end, seen = _visible_keys(masks.of(heads), k.shape[1], rule.r)
            keys, values = k[heads, first:end], v[heads, first:end]
            norm = torch.linalg.vector_norm(values, dim=-1) if rule.criterion != "weight" else None
            finite = norm is None or bool(norm.isfinite().all())
            if rule.criterion == "centered":
                norm = None
            for start in range(0, q.shape[1], step):
                rows = slice(start, min(start + step, q.shape[1]))
                last = max(rows.stop, rule.r) if rule.is_causal else keys.shape[1]
                block_keys, block_values = keys[:, :last], values[:, :last]
                block_mask = seen if seen is None or seen.shape[1] == 1 else seen[:, rows]
                if rule.is_causal:
                    visible = torch.ones(rows.stop - start, block_keys.shape[1], dtype=torch.bool).tril_(start)
                    block_mask = visible.unsqueeze(0)
                shape = (len(block_keys), rows.stop - start, block_keys.shape[1])
                scores = torch.bmm(q[heads, rows], block_keys.mT, out=space.take("scores", shape, dtype))
                weights = weights_from_scores(scores, block_mask, False, rule.kernel, rule.degree)
                score = _score(rule, weights, block_values, None if norm is None else norm[:, :last], block_mask)
                index, kept = _best(weights, score, rule.r, finite, space)
                total = kept.sum(-1, keepdim=True)
                kept = kept / total.masked_fill_(total == 0.0, 1.0)
                if training:
                    saved_weights.view(len(q), -1, rule.r)[heads, rows] = kept
                    saved_index.view(len(q), -1, rule.r)[heads, rows] = index + first if first else index
                if dropped is not None:
                    kept = kept * dropped.reshape(len(q), -1, rule.r)[heads, rows] * rule.dropout_factor
                out[heads, rows] = _weighted_sum(index, kept, block_values)
        output.copy_(out.view(output.shape))
    return output, saved_weights, saved_index


def empty_outputs(
    query: Tensor, key: Tensor, value: Tensor, rule: Rule, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised output (in query's memory layout where the shapes agree), weights and indices."""
    if query.shape[-1] == value.shape[-1]:
        output = torch.empty_like(query)
    else:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
    shape = (*query.shape[:-1], rule.r) if training else (0,)
    return output, query.new_empty(shape, dtype=compute_dtype(query)), query.new_empty(shape, dtype=torch.int32)


def selected_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    index: Tensor,
    dropped: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    dtype = weights.dtype
    with no_autocast(query.device):
        q, k, v, g = (_flat(x, dtype) for x in (query, key, value, grad))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        shape = (len(q), q.shape[1], rule.r)
        transpose = rule.r * _TRANSPOSE_FROM <= k.shape[1]
        for heads, step in _head_blocks(len(q), q.shape[1], k.shape[1]):
            if transpose:
                # Nothing of the size T x S is made: all queries of the heads at once.
                step = q.shape[1]
            for start in range(0, q.shape[1], step):
                rows = slice(start, min(start + step, q.shape[1]))
                here, given = q[heads, rows], g[heads, rows]
                kept, keys = weights.reshape(shape)[heads, rows], index.reshape(shape)[heads, rows].long()
                used, inner = kept, _products(given, v[heads], keys)
                if dropped is not None:
                    factor = dropped.reshape(shape)[heads, rows].to(dtype).mul_(rule.dropout_factor)
                    used, inner = kept * factor, inner * factor
                dz = (inner - (inner * kept).sum(-1, keepdim=True)) * kept
                if rule.kernel != "softmax":
                    z = _products(here, k[heads], keys).mul_(rule.scale)
                    dz.mul_(log_slope(rule.kernel, rule.degree, z))
                dz.mul_(rule.scale)
                dq[heads, rows] = _weighted_sum(keys, dz, k[heads])
                if not transpose:
                    dk[heads].baddbmm_(_dense(keys, dz, k.shape[1]).mT, here)
                    dv[heads].baddbmm_(_dense(keys, used, k.shape[1]).mT, given)
                    continue
                for i, head in enumerate(range(heads.start, heads.stop)):
                    by_key = _Transposed(keys[i], k.shape[1])
                    dk[head] = by_key.sum(dz[i], here[i])
                    dv[head] = by_key.sum(used[i], given[i])
    grads = [torch.empty_like(x) for x in (query, key, value)]
    for target, source in zip(grads, (dq, dk, dv), strict=True):
        target.copy_(source.view(target.shape))
    return grads[0], grads[1], grads[2]


@torch.library.custom_op("attnpatch::selected_attention", mutates_args=())
def selected_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropped: Tensor | None,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    r: int,
    criterion: str,
    dropout_p: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`selected_forward` as one operator, which autograd and torch.compile know."""
    rule = Rule(kernel, degree, scale, is_causal, r, criterion, dropout_p)
    return selected_forward(query, key, value, mask, dropped, rule, training)


@torch.library.custom_op("attnpatch::selected_attention_backward", mutates_args=())
def selected_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropped: Tensor | None,
    weights: Tensor,
    index: Tensor,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    r: int,
    criterion: str,
    dropout_p: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`selected_backward` as one operator."""
    rule = Rule(kernel, degree, scale, is_causal, r, criterion, dropout_p)
    return selected_backward(grad, query, key, value, weights, index, dropped, rule)


@selected_attention_op.register_fake
def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropped: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(query, key, value, Rule(*options[:-1]), options[-1])


@selected_attention_backward_op.register_fake
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, _, dropped, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, dropped, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = selected_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 10)


torch.library.register_autograd(selected_attention_op, _gradients, setup_context=_save)
