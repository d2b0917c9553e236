"""Non-softmax score kernels on the CPU, block by block: O(T) memory beside inputs and outputs.

Shapes: query [B, H, T, D], key [B, H, S, D], value [B, H, S, Dv], keep None or bool broadcastable to [B, H, T, S].

f is bounded (expressive) or needs no maximum, so a block of scores needs no rescaling against the others: the
forward pass adds up f V and the row sums N = sum_j f_ij, and the backward pass recomputes f from query, key and N:

    a = f / N,  da = dO V^T,  dz = (da - rowsum(dO * O)) / N * f'(z)

The elementwise work is done in place, on buffers that stay in the cache, by torch or in one pass by a compiled loop;
float32 without dropout is compiled code as a whole (`attnpatch.kernels.score_native`). Rows that float32 cannot sum
this way (N under- or overflows) are found by N and computed by the plain form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnpatch.kernels.score import attention_weights, compute_dtype, no_autocast
from attnpatch.kernels.score_native import Native, native

BLOCK_QUERIES = 256
BLOCK_KEYS = 512

# Scores of one call from which the compiled loop is used (and built, if this is the first): smaller calls gain little.
COMPILED_FROM = 2**20

# A row sum outside these bounds has lost weights, or overflows in the gradient: the plain form rescales the row.
SMALLEST, LARGEST = 1e-25, 1e25

# Saved in the place of the row sum: rows that see no key, and rows computed by the plain form.
_EMPTY, _PLAIN = 0.0, -1.0


class Rule(NamedTuple):
    """What is computed, apart from the tensors."""

    kernel: str
    degree: int
    scale: float
    is_causal: bool
    dropout_p: float
    seed: int


Hide = Callable[[Tensor], Tensor]
"""Zeroes, in place, what must not be seen."""


class _Strength:
    """f and f' of a block of scores, in place, on preallocated buffers."""

    def __init__(self, rule: Rule, size: int, dtype: torch.dtype, gradient: bool, compiled: bool) -> None:
        self.rule = rule
        self._native = native(rule.kernel, rule.degree, dtype) if compiled else None
        if self._native is not None:
            self._sums = torch.empty(size, dtype=dtype)
            return
        count = {"expressive": 2 if gradient else 1, "elu": 1, "polynomial": 1 if gradient or rule.degree > 2 else 0}
        self._spare = [torch.empty(size, dtype=dtype) for _ in range(count[rule.kernel])]
        self._one = torch.ones((), dtype=dtype)

        self._views: dict[torch.Size, list[Tensor]] = {}

    def _buffers(self, like: Tensor) -> list[Tensor]:
        views = self._views.get(like.shape)
        if views is None:
            views = self._views[like.shape] = [spare[: like.numel()].view(like.shape) for spare in self._spare]
        return views

    def forward(self, z: Tensor, hide: Hide) -> Tensor:
        """z -> f(z), and the sums of its rows; `z` is hidden (zero) already where no key is visible."""
        if self._native is not None:
            sums = self._sums[: z.shape[0] * z.shape[1]].view(z.shape[:2])
            self._native.forward(z, sums)
            return sums
        if self.rule.kernel == "expressive":
            (other,) = self._buffers(z)
            z.mul_(z)
            torch.add(z, 1.0, out=other)
            z.div_(other)
        elif self.rule.kernel == "polynomial":
            z.mul_(z)
            if self.rule.degree > 2:
                (other,) = self._buffers(z)
                _power(z, self.rule.degree // 2, other)
        else:
            (other,) = self._buffers(z)
            # exp(z) below 0 and not elu(z)+1, which has lost all digits at z = -17.
            torch.clamp(z, max=0.0, out=other)
            other.exp_()
            hide(other)
            z.clamp_(min=0.0).add_(other)
        return z.sum(-1)

    def backward(self, z: Tensor, inner: Tensor, hide: Hide) -> None:
        """z -> f(z), and inner -> inner * f'(z) up to a constant, see `_slope`."""
        if self._native is not None:
            self._native.backward(z, inner)
            return
        if self.rule.kernel == "expressive":
            inverse, half = self._buffers(z)
            torch.addcmul(self._one, z, z, out=inverse)
            inverse.reciprocal_()
            torch.mul(z, inverse, out=half)
            z.mul_(half)
            inner.mul_(half).mul_(inverse)
        elif self.rule.kernel == "polynomial":
            (other,) = self._buffers(z)
            if self.rule.degree == 2:
                inner.mul_(z)
                z.mul_(z)
                return
            inner.mul_(z)
            z.mul_(z)
            other.copy_(z)
            for _ in range(self.rule.degree // 2 - 2):
                other.mul_(z)
            inner.mul_(other)
            z.mul_(other)
        else:
            (other,) = self._buffers(z)
            torch.clamp(z, max=0.0, out=other)
            other.exp_()
            hide(other)
            z.clamp_(min=0.0).add_(other)
            inner.mul_(other)


def _slope(rule: Rule) -> float:
    """The constant factor of the scores' derivatives by query and key, which the passes leave out."""
    return rule.scale * {"expressive": 2.0, "polynomial": float(rule.degree), "elu": 1.0}[rule.kernel]


def _power(x: Tensor, exponent: int, other: Tensor) -> None:
    other.copy_(x)
    for _ in range(exponent - 1):
        x.mul_(other)


class KeyBlock(NamedTuple):
    first: int
    end: int
    key: Tensor
    value: Tensor
    key_t: Tensor
    value_t: Tensor


class _Chunk:
    """Some heads of one sequence (or of the flattened batch): their keys, and what of them is visible."""

    def __init__(self, rule: Rule, key: Tensor, value: Tensor, keep: Tensor | None, dtype: torch.dtype) -> None:
        """key [C, S, D], value [C, S, Dv], keep None or [1 or C, 1 or T, S]; computed with in `dtype`."""
        self.rule = rule
        self.first_key, self.n_keys = 0, key.shape[1]
        # A byte becomes a float six times faster than a bool does.
        self._mask = None if keep is None else keep.view(torch.uint8)
        if keep is not None and keep.shape[:2] == (1, 1):
            visible = keep[0, 0].nonzero()[:, 0]
            if len(visible) > 0:
                self.first_key, self.n_keys = int(visible[0]), int(visible[-1]) + 1
            else:
                self.n_keys = 0
            if len(visible) == self.n_keys - self.first_key:
                self._mask = None
        self.key = key[:, : self.n_keys].to(dtype)
        self.value = value[:, : self.n_keys].to(dtype)
        self._blocks: dict[tuple[int, int], KeyBlock] = {}

    @property
    def seen_key(self) -> Tensor:
        """From `first_key` on, as in `visible`."""
        return self.key[:, self.first_key :]

    @property
    def seen_value(self) -> Tensor:
        return self.value[:, self.first_key :]

    def _part(self, start: int, stop: int, first: int, end: int) -> Tensor | None:
        if self._mask is None:
            return None
        rows = self._mask if self._mask.shape[1] == 1 else self._mask[:, start:stop]
        return rows[:, :, first:end]

    def blocks(self, start: int, stop: int) -> Iterator[KeyBlock]:
        """Key blocks of which some query in [start, stop) sees a key."""
        last = min(self.n_keys, stop) if self.rule.is_causal else self.n_keys
        for first in range(self.first_key, last, BLOCK_KEYS):
            end = min(first + BLOCK_KEYS, last)
            part = self._part(start, stop, first, end)
            if part is None or part.amax():
                block = self._blocks.get((first, end))
                if block is None:
                    key, value = self.key[:, first:end], self.value[:, first:end]
                    block = self._blocks[first, end] = KeyBlock(first, end, key, value, key.mT, value.mT)
                yield block

    def hider(self, start: int, stop: int, first: int, end: int, dtype: torch.dtype) -> Hide:
        """What zeroes the elements of a block [C, stop - start, end - first] that are not visible."""
        if self.rule.is_causal:
            return _nothing if end - 1 <= start else lambda x: x.tril_(start - first)
        part = self._part(start, stop, first, end)
        if part is None or part.amin():
            return _nothing
        factor = part.to(dtype)
        return lambda x: x.mul_(factor)

    def visible(self, start: int, stop: int) -> Tensor:
        """Bool [1 or C, stop - start, visible keys]: the same as one mask, from `first_key` on."""
        n_keys = self.n_keys - self.first_key
        seen = torch.ones(1, stop - start, n_keys, dtype=torch.bool)
        if self.rule.is_causal:
            return seen.tril(start - self.first_key)
        part = self._part(start, stop, self.first_key, self.n_keys)
        return seen if part is None else seen & part.view(torch.bool)


def _nothing(x: Tensor) -> Tensor:
    return x


class _Dropout:
    """Factors 0 or 1/(1-p) of a block, the same whenever asked for."""

    def __init__(self, rule: Rule, size: int, dtype: torch.dtype) -> None:
        # 16 random bits a weight: four times faster than a uniform number, and p is met to 2^-17.
        self._threshold = min(round(rule.dropout_p * 65536), 65535)
        self._factor = 65536.0 / (65536 - self._threshold)
        self._seed = rule.seed
        self._generator = torch.Generator()
        self._bits = torch.empty(-(-size // 4), dtype=torch.int64)
        self._keep = torch.empty(size, dtype=dtype)

    def draw(self, shape: tuple[int, ...], chunk: int, start: int, first: int) -> Tensor:
        size = math.prod(shape)
        self._generator.manual_seed(hash((self._seed, chunk, start, first)) % 2**63)
        bits = self._bits[: -(-size // 4)].random_(-(2**63), None, generator=self._generator)
        keep = self._keep[:size].view(shape)
        torch.ge(bits.view(torch.int16)[:size].view(shape), self._threshold - 32768, out=keep)
        return keep.mul_(self._factor)


def _large(query: Tensor, key: Tensor) -> bool:
    """Whether a call is worth the compiled loop."""
    return query.shape[:3].numel() * key.shape[2] >= COMPILED_FROM


class _Workspace:
    """The buffers of one call: a few blocks, whatever the length."""

    def __init__(self, rule: Rule, query: Tensor, key: Tensor, gradient: bool) -> None:
        size = _buffer_size(rule)
        self.dtype = compute_dtype(query)
        self.strength = _Strength(rule, size, self.dtype, gradient, _large(query, key))
        self.dropout = _Dropout(rule, size, self.dtype) if rule.dropout_p > 0.0 else None
        self._buffers = [torch.empty(size, dtype=self.dtype) for _ in range(2 if gradient else 1)]
        self._views: dict[tuple[int, ...], list[Tensor]] = {}

    def _shaped(self, shape: tuple[int, int, int]) -> list[Tensor]:
        """Views of the buffers, kept: making them takes as long as a pass over a small block."""
        views = self._views.get(shape)
        if views is None:
            views = self._views[shape] = [x[: math.prod(shape)].view(shape) for x in self._buffers]
        return views

    def scores(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """scale * a b, in the buffer for scores."""
        out = self._shaped((a.shape[0], a.shape[1], b.shape[2]))[0]
        return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """a b, in the buffer for the gradient of the weights."""
        return torch.bmm(a, b, out=self._shaped((a.shape[0], a.shape[1], b.shape[2]))[1])


def compact_mask(keep: Tensor | None) -> Tensor | None:
    """The mask without the dimensions that only repeat it; models repeat a padding mask for each query."""
    if keep is None:
        return None
    for dim in range(3):
        if keep.stride(dim) == 0:
            keep = keep.narrow(dim, 0, 1)
    if keep.shape[2] > 1 and torch.equal(keep[:, :, 0], keep[:, :, -1]):
        same = keep.view(torch.uint8) == keep[:, :, :1].view(torch.uint8)
        if same.view(torch.uint8).amin():
            keep = keep[:, :, :1]
    return keep


def _flatten(tensors: list[Tensor], keep: Tensor | None, rule: Rule) -> tuple[list[Tensor], Tensor | None]:
    """[B, H, ...] as [1, B * H, ...] where that is a view and no sequence has a mask of its own.

    Not with dropout, which is drawn by the chunks' numbers: the backward pass must find the same ones, and its saved
    tensors may have come back with other strides (offloading hooks).
    """
    if rule.dropout_p > 0.0 or (keep is not None and keep.shape[0] * keep.shape[1] > 1):
        return tensors, keep
    try:
        return [x.view(1, x.shape[0] * x.shape[1], *x.shape[2:]) for x in tensors], keep
    except RuntimeError:  # strides that do not allow it
        return tensors, keep


def _buffer_size(rule: Rule) -> int:
    """Scores at a time: a block for each thread, which then has heads of its own to multiply.

    One block with dropout, which is drawn by the chunks' numbers and must not hang on the number of threads.
    """
    return BLOCK_QUERIES * BLOCK_KEYS * (1 if rule.dropout_p > 0.0 else torch.get_num_threads())


def _chunks(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, rule: Rule
) -> Iterator[tuple[int, tuple[int, slice], _Chunk]]:
    """(number, where in [B, H], keys and values there): as many heads at a time as make the buffers' size."""
    n_batch, n_heads, n_queries = query.shape[:3]
    block = max(1, min(n_queries, BLOCK_QUERIES) * min(key.shape[2], BLOCK_KEYS))
    at_once = max(1, _buffer_size(rule) // block)
    dtype, number = compute_dtype(query), 0
    for batch in range(n_batch):
        for first in range(0, n_heads, at_once):
            heads = slice(first, min(first + at_once, n_heads))
            mask = None
            if keep is not None:
                mask = keep[batch if keep.shape[0] > 1 else 0]
                mask = mask[heads] if mask.shape[0] > 1 else mask
            where = batch, heads
            yield number, where, _Chunk(rule, key[where], value[where], mask, dtype)
            number += 1


def _compiled(rule: Rule, tensors: dict[str, Tensor], parts: int) -> Native | None:
    """Attention in compiled code, if it can take this call, of which threads share the `parts`."""
    query, key = tensors["query"], tensors["key"]
    if rule.dropout_p > 0.0 or not _large(query, key) or parts < torch.get_num_threads():
        return None
    whole = native(rule.kernel, rule.degree, query.dtype)
    return whole if whole is not None and whole.takes(*tensors.values()) else None


def _rows(x: Tensor) -> Tensor:
    """x, or a copy where its rows overlap or are not in one piece, as those of an expanded gradient."""
    return x if x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] else x.contiguous()


def _numbers(rule: Rule) -> dict[str, Any]:
    blocks = {"block_queries": BLOCK_QUERIES, "block_keys": BLOCK_KEYS}
    return {**blocks, "causal": rule.is_causal, "scale": rule.scale}


def _sums_well(sums: Tensor) -> bool:
    lowest, highest = torch.aminmax(sums)
    return bool(lowest >= SMALLEST) and bool(highest <= LARGEST)


def _plain_weights(rule: Rule, chunk: _Chunk, rows: Tensor, start: int) -> Tensor:
    """Weights of one query block [C, Tb, seen keys] in the plain form."""
    seen = chunk.visible(start, start + rows.shape[1])
    return attention_weights(rows, chunk.seen_key, seen, scale=rule.scale, kernel=rule.kernel, degree=rule.degree)


def log_slope(kernel: str, degree: int, z: Tensor) -> Tensor:
    """f'(z) / f(z), and 0 at z = 0, where the weight is 0 or counts as constant."""
    if kernel == "elu":
        return torch.where(z > 0.0, 1.0 / (1.0 + z.clamp(min=0.0)), 1.0)
    # Rows so small are uniform in the plain form.
    order = degree if kernel == "polynomial" else 2
    smallest = math.sqrt(torch.finfo(z.dtype).tiny) ** (1.0 + 1.0 / order)
    inverse = torch.where(z.abs() > smallest, z, torch.inf).reciprocal()
    return degree * inverse if kernel == "polynomial" else 2.0 * inverse / (1.0 + z.square())


def _whole_dropout(work: _Workspace, chunk: _Chunk, n_heads: int, number: int, start: int, stop: int) -> Tensor | None:
    """The dropout factors of a query block over all its keys."""
    if work.dropout is None:
        return None
    keep = torch.zeros(n_heads, stop - start, chunk.n_keys, dtype=work.dtype)
    for first, end, *_ in chunk.blocks(start, stop):
        keep[:, :, first:end] = work.dropout.draw((n_heads, stop - start, end - first), number, start, first)
    return keep[:, :, chunk.first_key :]


def blocked_forward(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, rule: Rule, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, T, Dv] in query's dtype; what its rounding lost, for the backward pass; row sums [B, H, T]."""
    output, residual, sums = empty_outputs(query, value, training)
    tensors = {"query": query, "key": key, "value": value, "output": output}
    parts = query.shape[:2].numel() * -(-query.shape[2] // BLOCK_QUERIES)
    if (whole := _compiled(rule, tensors, parts)) is not None:
        keep = compact_mask(keep)
        whole.attend(tensors, sums, keep, **_numbers(rule))
        if not _sums_well(sums):
            with no_autocast(query.device):
                work = _Workspace(rule, query, key, gradient=False)
                for number, where, chunk in _chunks(query, key, value, keep, rule):
                    _repair(rule, work, chunk, number, *(x[where] for x in (query, output, sums)))
        return output, residual, sums
    (q, k, v, o, n), keep = _flatten([query, key, value, output, sums], compact_mask(keep), rule)
    r = residual.view(o.shape) if residual.numel() else None
    with no_autocast(query.device):
        work = _Workspace(rule, query, key, gradient=False)
        n.zero_()
        for number, where, chunk in _chunks(q, k, v, keep, rule):
            rows, total = q[where].to(work.dtype), n[where]
            target = o[where]
            summed = _place(target, work.dtype)
            for start in range(0, rows.shape[1], BLOCK_QUERIES):
                stop = min(start + BLOCK_QUERIES, rows.shape[1])
                here, here_total, here_summed = rows[:, start:stop], total[:, start:stop], summed[:, start:stop]
                beta = 0.0
                for block in chunk.blocks(start, stop):
                    z = work.scores(here, block.key_t, rule.scale)
                    hide = chunk.hider(start, stop, block.first, block.end, work.dtype)
                    hide(z)
                    here_total.add_(work.strength.forward(z, hide))
                    if work.dropout is not None:
                        z.mul_(work.dropout.draw(z.shape, number, start, block.first))
                    torch.baddbmm(here_summed, z, block.value, beta=beta, out=here_summed)
                    beta = 1.0
                if beta == 0.0:
                    here_summed.zero_()
            # Not a number where the row is lost, which is repaired.
            summed.div_(total.unsqueeze(-1))
            if not _sums_well(total):
                _repair(rule, work, chunk, number, rows, summed, total)
            if summed is not target:
                target.copy_(summed)
            if r is not None:
                r[where] = summed.sub_(target)
    return output, residual, sums


def _place(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to add up a result, uninitialised: in place where nothing is rounded."""
    direct = target.dtype == dtype and target.is_contiguous()
    return target if direct else torch.empty(target.shape, dtype=dtype)


def _repair(
    rule: Rule, work: _Workspace, chunk: _Chunk, number: int, rows: Tensor, target: Tensor, total: Tensor
) -> None:
    """Put right the rows whose sum is too small, too large or not a number."""
    for start in range(0, rows.shape[1], BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, rows.shape[1])
        here_total, here_target = total[:, start:stop], target[:, start:stop]
        lost = ~((here_total >= SMALLEST) & (here_total <= LARGEST))
        if not lost.any():
            continue
        empty = ~chunk.visible(start, stop).any(-1)
        here_total.masked_fill_(lost, _PLAIN).masked_fill_(empty, _EMPTY)
        here_target.masked_fill_(lost.unsqueeze(-1), 0.0)
        needed = (here_total == _PLAIN).unsqueeze(-1)
        if needed.any():
            dropout = _whole_dropout(work, chunk, len(rows), number, start, stop)
            weights = _plain_weights(rule, chunk, rows[:, start:stop], start)
            if dropout is not None:
                weights *= dropout
            exact = torch.matmul(weights, chunk.seen_value.to(work.dtype))
            here_target.copy_(torch.where(needed, exact, here_target))


def empty_outputs(query: Tensor, value: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised output (in query's memory layout where the shapes agree), residual and row sums.

    The residual is empty unless a gradient is wanted and the output is rounded. f'/f is unbounded at z = 0, so
    that there dO * O must cancel against dO * V to more digits than half precision has.
    """
    if query.shape[-1] == value.shape[-1]:
        output = torch.empty_like(query)
    else:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
    sums = query.new_empty(query.shape[:-1], dtype=compute_dtype(query))
    rounded = training and query.dtype != sums.dtype
    return output, torch.empty_like(output) if rounded else output.new_empty(0), sums


def blocked_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    output: Tensor,
    residual: Tensor,
    sums: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grads = [torch.empty_like(x) for x in (query, key, value)]
    tensors = {"query": query, "key": key, "value": value, "output": output, "grad": _rows(grad)}
    tensors |= dict(zip(("dquery", "dkey", "dvalue"), grads, strict=True))
    if (whole := _compiled(rule, tensors, query.shape[:2].numel())) is not None:
        keep = compact_mask(keep)
        whole.attend_backward(tensors, sums.contiguous(), keep, slope=_slope(rule), **_numbers(rule))
        if bool((sums == _PLAIN).any()):
            with no_autocast(query.device):
                work = _Workspace(rule, query, key, gradient=True)
                for number, where, chunk in _chunks(query, key, value, keep, rule):
                    lost = torch.where(sums[where].unsqueeze(-1) == _PLAIN, grad[where], 0.0)
                    dq, dk, dv = (x[where] for x in grads)
                    seen = slice(chunk.first_key, chunk.n_keys)
                    _add_plain_gradients(rule, work, chunk, number, query[where], lost, dq, dk[:, seen], dv[:, seen])
        return grads[0], grads[1], grads[2]
    (q, k, v, o, n), keep = _flatten([query, key, value, output, sums], compact_mask(keep), rule)
    r = residual.view(o.shape) if residual.numel() else None
    g, dq, dk, dv = (x.reshape(y.shape) for x, y in zip((grad, *grads), (o, q, k, v), strict=True))
    with no_autocast(query.device):
        work = _Workspace(rule, query, key, gradient=True)
        slope = _slope(rule)
        for number, where, chunk in _chunks(q, k, v, keep, rule):
            rows = q[where].to(work.dtype)
            targets = [x[where] for x in (dq, dk, dv)]
            results = [_place(x, work.dtype).zero_() for x in targets]
            dq_sum, dk_sum, dv_sum = results
            total = n[where].unsqueeze(-1)
            given = g[where].to(work.dtype)
            by_plain = None
            if (total <= 0.0).any():
                by_plain = torch.where(total == _PLAIN, given, 0.0)
                # Zero queries and gradients add nothing to the sums.
                rows, given = (x.masked_fill(total <= 0.0, 0.0) for x in (rows, given))
                total = total.masked_fill(total <= 0.0, 1.0)
            given = given / total
            exact = o[where] if r is None else o[where].to(work.dtype) + r[where]
            delta = (given * exact).sum(-1, keepdim=True)
            # It is subtracted within the product: [dO / N, -delta] [V, 1]^T.
            given_delta = torch.cat([given, -delta], dim=-1)
            value_one_t = torch.cat([chunk.value, torch.ones_like(chunk.value[:, :, :1])], dim=-1).mT
            for start in range(0, rows.shape[1], BLOCK_QUERIES):
                stop = min(start + BLOCK_QUERIES, rows.shape[1])
                here, here_given = rows[:, start:stop], given[:, start:stop]
                here_delta, here_both, here_dq = (x[:, start:stop] for x in (delta, given_delta, dq_sum))
                for block in chunk.blocks(start, stop):
                    first, end = block.first, block.end
                    z = work.scores(here, block.key_t, rule.scale)
                    hide = chunk.hider(start, stop, first, end, work.dtype)
                    hide(z)
                    keep_weight = None
                    if work.dropout is None:
                        inner = work.inner(here_both, value_one_t[:, :, first:end])
                    else:
                        keep_weight = work.dropout.draw(z.shape, number, start, first)
                        inner = work.inner(here_given, block.value_t).mul_(keep_weight).sub_(here_delta)
                    work.strength.backward(z, inner, hide)
                    if keep_weight is not None:
                        z.mul_(keep_weight)
                    dv_sum[:, first:end].baddbmm_(z.mT, here_given)
                    dk_sum[:, first:end].baddbmm_(inner.mT, here)
                    here_dq.baddbmm_(inner, block.key)
            dq_sum.mul_(slope)
            dk_sum.mul_(slope)
            if by_plain is not None:
                seen = slice(chunk.first_key, chunk.n_keys)
                _add_plain_gradients(
                    rule, work, chunk, number, q[where], by_plain, dq_sum, dk_sum[:, seen], dv_sum[:, seen]
                )
            for target, result in zip(targets, results, strict=True):
                if result is not target:
                    target.copy_(result)
    return grads[0], grads[1], grads[2]


def _add_plain_gradients(
    rule: Rule,
    work: _Workspace,
    chunk: _Chunk,
    number: int,
    query: Tensor,
    grad: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Add what the rows that `_repair` has put right contribute; `grad` is zero in all others."""
    for start in range(0, query.shape[1], BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, query.shape[1])
        if not grad[:, start:stop].any():
            continue
        here, given, value = query[:, start:stop], grad[:, start:stop], chunk.seen_value.to(work.dtype)
        weights = _plain_weights(rule, chunk, here, start)
        inner = torch.matmul(given, value.mT)
        dropped = weights
        dropout = _whole_dropout(work, chunk, len(query), number, start, stop)
        if dropout is not None:
            inner *= dropout
            dropped = weights * dropout
        dv += torch.matmul(dropped.mT, given)
        inner -= (inner * weights).sum(-1, keepdim=True)
        key = chunk.seen_key.to(work.dtype)
        z = torch.matmul(here.to(work.dtype) * rule.scale, key.mT).masked_fill(~chunk.visible(start, stop), 0.0)
        dz = inner * (weights * log_slope(rule.kernel, rule.degree, z)) * rule.scale
        dq[:, start:stop] += torch.matmul(dz, key)
        dk += torch.matmul(dz.mT, here.to(work.dtype))


def _rule(kernel: str, degree: int, scale: float, is_causal: bool, dropout_p: float, seed: Tensor | None) -> Rule:
    return Rule(kernel, degree, scale, is_causal, dropout_p, 0 if seed is None else int(seed))


@torch.library.custom_op("attnpatch::blocked_attention", mutates_args=())
def blocked_attention_op(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, residual and row sums as one operator, which autograd and torch.compile know."""
    rule = _rule(kernel, degree, scale, is_causal, dropout_p, seed)
    return blocked_forward(query, key, value, keep, rule, training)


@torch.library.custom_op("attnpatch::blocked_attention_backward", mutates_args=())
def blocked_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    output: Tensor,
    residual: Tensor,
    sums: Tensor,
    seed: Tensor | None,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    rule = _rule(kernel, degree, scale, is_causal, dropout_p, seed)
    return blocked_backward(grad, query, key, value, keep, output, residual, sums, rule)


@blocked_attention_op.register_fake
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(query, value, arguments[-1])


@blocked_attention_backward_op.register_fake
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, keep, seed, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, keep, *output, seed)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = blocked_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 8)


torch.library.register_autograd(blocked_attention_op, _gradients, setup_context=_save)
