"""Which keys an attention row keeps: the heaviest, or those whose values give its output best.

Value-aware Approximate Attention (Gupta & Berant, EMNLP 2021, arXiv 2103.09857).

Shapes: weights [..., T, S] with rows summing to 1 (or 0: no visible key), value [..., S, D]; the leading
dimensions, usually [B, H], broadcast. A key with weight exactly 0 is excluded: it is never selected, whatever
its value holds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnpatch.errors import SpecError
from attnpatch.kernels import dispatch
from attnpatch.kernels.score import (
    aggregate,
    attention_weights,
    check_call,
    check_name,
    compute_dtype,
    default_scale,
    no_autocast,
)
from attnpatch.kernels.select_blocked import best_order, selected_attention_op
from attnpatch.kernels.select_exact import solve_exactly

SELECTORS: tuple[str, ...] = ("oracle", "norm", "centered")

# float64 numbers that one chunk of the oracle may hold in its largest tensors (about 0.25 GB; on a GPU, which needs
# many rows at once to be busy, 4 GB).
CHUNK_ELEMENTS = 2**25
_GPU_CHUNKS = 16

FUSED_FROM = 1024
"""Weights of one head from which the fused form is faster than the plain one, on a CPU; see docs/performance.md."""


def check_r(r: int) -> None:
    """Raise SpecError unless r is an integer of at least 1."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise SpecError(f"r is the number of keys a query keeps: an integer of at least 1; got {r!r}")


def top_r_weights(weights: Tensor, r: int) -> Tensor:
    """OVO-r, the value-oblivious optimum: the r largest weights of each row, renormalised.

    Args:
        weights: [..., T, S], non-negative.
        r: keys kept per query, at least 1; r >= S keeps all. Ties go to the lower index.

    Returns:
        Weights of the same shape and dtype, at most r positive in a row; rows with fewer positive weights
        keep those, rows without any stay zero. Differentiable through the kept weights.
    """
    check_r(r)
    return _keep_best(weights, weights.detach(), r)


def value_aware_weights(weights: Tensor, value: Tensor, r: int, selector: str = "oracle", swaps: int = 0) -> Tensor:
    """Sparse weights, at most r positive per row, chosen with the values in view.

    Args:
        weights: [..., T, S], rows summing to 1 or 0.
        value: [..., S, D].
        r: keys kept per query, at least 1.
        selector: "oracle" (OVA-r), "norm" or "centered".
        swaps: rounds of swap improvement for the oracle (each tries to exchange every kept key once); 0 for
            none.

    "norm" keeps the r keys of largest a_ij * ||v_j|| and renormalises their weights. "centered" keeps those
    of largest a_ij * ||v_j - mu_i||, with mu_i the *unweighted* mean of the values that query i sees
    (weight > 0): it needs no attention output, no other query's attention, and no later token. Both are
    differentiable through the kept weights; the choice of the keys is not.

    "oracle" minimises ||o_i - sum_j beta_ij v_j|| over beta >= 0, sum beta = 1, at most r positive, with o_i
    = sum_j a_ij v_j. r = 1 is exact (the nearest value), r >= D + 1 has error 0 up to rounding
    (Caratheodory), and a row with at most r positive weights is returned as it is. In between the problem is
    combinatorial: greedy selection with fully corrective weights (Wolfe's min-norm-point algorithm stopped at
    r points), run from the nearest value and again from the top-r keys; the best of these and of top-r itself
    is returned, so the error is never above that of `top_r_weights`. It works in float64 and is an analysis
    tool: there is no gradient.

    Returns:
        Weights of the same shape and dtype as `weights`.

    Raises:
        SpecError (a ValueError): r < 1, swaps < 0, an unknown selector, or "oracle" where a gradient would be
        needed.
    """
    check_r(r)
    check_name("selector", selector, SELECTORS)
    if isinstance(swaps, bool) or not isinstance(swaps, int) or swaps < 0:
        raise SpecError(f"swaps is a number of rounds: an integer of at least 0; got {swaps!r}")
    if value.shape[-2] != weights.shape[-1]:
        raise SpecError(f"weights are over {weights.shape[-1]} keys but value holds {value.shape[-2]}")
    if selector == "oracle":
        if torch.is_grad_enabled() and (weights.requires_grad or value.requires_grad):
            raise SpecError(
                'selector="oracle" has no gradient: it solves a combinatorial problem around the output. '
                'Run it under torch.no_grad(), or train with selector="norm" or "centered"'
            )
        return cast(Tensor, _oracle_weights(weights, value, r, swaps))
    with torch.no_grad():
        score = _value_scores(weights, value, centered=selector == "centered")
    return _keep_best(weights, score, r)


def top_r_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    r: int,
    kernel: str = "softmax",
    degree: int = 2,
) -> Tensor:
    """Attention over the r heaviest keys of each query, [B, H, T, D]; arguments as
    `score.kernel_attention` and `top_r_weights`.
    """
    check_r(r)
    if form := _fused_form(query, key, value, attn_mask, dropout_p, r):
        return _fused(form, query, key, value, attn_mask, dropout_p, is_causal, scale, r, kernel, degree, "weight")
    weights = attention_weights(query, key, attn_mask, is_causal, scale, kernel, degree)
    return aggregate(top_r_weights(weights, r), value, dropout_p, query.dtype)


def value_aware_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    r: int,
    kernel: str = "softmax",
    degree: int = 2,
    selector: str = "oracle",
    swaps: int = 0,
) -> Tensor:
    """Attention over r keys chosen with the values in view, [B, H, T, D]; arguments as
    `score.kernel_attention` and `value_aware_weights`.
    """
    check_r(r)
    form = _fused_form(query, key, value, attn_mask, dropout_p, r) if selector in ("norm", "centered") else None
    if form is not None:
        return _fused(form, query, key, value, attn_mask, dropout_p, is_causal, scale, r, kernel, degree, selector)
    weights = attention_weights(query, key, attn_mask, is_causal, scale, kernel, degree)
    weights = value_aware_weights(weights, value, r, selector, swaps)
    return aggregate(weights, value, dropout_p, query.dtype)


def _fused_form(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, r: int
) -> str | None:
    """The fused form that computes a call, "blocked" (on a CPU) or "triton", or None: it cannot, or is not asked to."""
    tensors = (query, key, value)
    if not query.is_floating_point() or any(x.dtype != query.dtype or not 2 <= x.dim() <= 4 for x in tensors):
        return None
    if any(x is not None and x.device != query.device for x in (key, value, attn_mask)):
        return None
    if not 0.0 <= dropout_p <= 1.0 or (attn_mask is not None and attn_mask.requires_grad):
        return None
    n_query, n_key = query.shape[-2], key.shape[-2]
    # An operator without a rule for forward-mode derivatives would give 0.
    if forward_ad._current_level >= 0 or 0 in (n_query, query.shape[-1], value.shape[-1]):
        return None
    if not r < n_key == value.shape[-2]:
        return None  # with all keys there is nothing to select, and T x r is no less than T x S
    asked = dispatch.asked()
    if query.device.type == "cpu" and asked in ("auto", "blocked"):
        return "blocked" if asked == "blocked" or n_query * n_key >= FUSED_FROM else None
    if torch._C._are_functorch_transforms_active() or dispatch.why_not_fused_selection(query, value, r):
        return None
    return "triton"


def _fused(
    form: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    r: int,
    kernel: str,
    degree: int,
    criterion: str,
) -> Tensor:
    check_call(kernel, degree, attn_mask, is_causal)
    leading = dispatch.leading_shape(query, key, value)
    factor = default_scale(kernel, query.shape[-1]) if scale is None else float(scale)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    q, k, v, mask = dispatch.four_dimensions(query, key, value, attn_mask)
    kept = None
    if dropout_p > 0.0:
        # As each form holds its lists: r keys of a query side by side, or the queries of a place in the list.
        lists = (*q.shape[:-1], r) if form == "blocked" else (*q.shape[:2], r, q.shape[2])
        kept = torch.empty(lists, dtype=torch.bool, device=q.device).bernoulli_(1.0 - dropout_p)
    arguments = (q, k, v, mask, kept, kernel, degree, factor, is_causal, r, criterion, dropout_p, training)
    if form == "blocked":
        output: Tensor = selected_attention_op(*arguments)[0]
    else:
        output = dispatch.select_triton.selected_attention(*arguments)
    return output if len(leading) == 2 else output.reshape(*leading, *output.shape[-2:])


def _keep_best(weights: Tensor, score: Tensor, r: int) -> Tensor:
    """Keep each row's r positive weights of largest score, then weight, then lowest index; renormalise."""
    with torch.no_grad():
        keep = _best_mask(weights, score, r)
    kept = weights.masked_fill(~keep, 0.0)
    total = kept.sum(dim=-1, keepdim=True)
    return kept / total.masked_fill(total == 0.0, 1.0)


def _best_mask(weights: Tensor, score: Tensor, r: int) -> Tensor:
    # A NaN is kept, so that it shows.
    positive = ~(weights <= 0)
    if r >= weights.shape[-1]:
        return positive
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        # Without ties at the r-th score or NaN, a threshold is enough, at a fraction of a sort.
        ranked = score.masked_fill(~positive, -torch.inf)
        keep = (ranked >= ranked.topk(r, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)) & positive
        if torch.equal(keep.sum(dim=-1), positive.sum(dim=-1).clamp(max=r)):
            return keep
    order = best_order(weights, score, positive)
    keep = torch.zeros_like(positive).scatter(-1, order[..., :r], True)
    return keep & positive


def _value_scores(weights: Tensor, value: Tensor, centered: bool) -> Tensor:
    """a_ij * ||v_j||, or a_ij * ||v_j - mu_i||."""
    dtype = compute_dtype(weights, value)
    value = value.to(dtype)
    if not centered:
        return weights * torch.linalg.vector_norm(value, dim=-1).unsqueeze(-2)
    with no_autocast(value.device):
        seen = (weights > 0).to(dtype)
        mean = torch.matmul(seen, value) / seen.sum(dim=-1, keepdim=True).clamp(min=1.0)
        batch = torch.broadcast_shapes(mean.shape[:-2], value.shape[:-2])
        # Differences and not norms and products: those cancel when the values share a large offset.
        distance = torch.cdist(
            mean.expand(*batch, *mean.shape[-2:]),
            value.expand(*batch, *value.shape[-2:]),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
    return weights * distance


# OVA-r


@torch.compiler.disable
@torch.no_grad()
def _oracle_weights(weights: Tensor, value: Tensor, r: int, swaps: int) -> Tensor:
    n_query, n_key = weights.shape[-2:]
    head_dim = value.shape[-1]
    batch = torch.broadcast_shapes(weights.shape[:-2], value.shape[:-2])
    flat_weights = weights.expand(*batch, n_query, n_key).reshape(-1, n_query, n_key)
    flat_value = value.expand(*batch, n_key, head_dim).reshape(-1, n_key, head_dim)
    size = min(r, n_key, head_dim + 1)
    row_cost = 6 * n_key + 2 * size * (head_dim + size)
    rows = max(1, CHUNK_ELEMENTS // row_cost * (1 if weights.device.type == "cpu" else _GPU_CHUNKS))
    step_query = min(n_query, rows)
    step_group = max(1, rows // max(step_query, 1))
    out = torch.empty_like(flat_weights, memory_format=torch.contiguous_format)
    with no_autocast(weights.device):
        for g in range(0, flat_weights.shape[0], step_group):
            groups = slice(g, g + step_group)
            for t in range(0, n_query, step_query):
                queries = slice(t, t + step_query)
                chunk = _oracle_chunk(flat_weights[groups, queries].double(), flat_value[groups].double(), r, swaps)
                # A row that needed no approximation keeps its own bits.
                few = (flat_weights[groups, queries] > 0).sum(dim=-1, keepdim=True) <= r
                out[groups, queries] = torch.where(few, flat_weights[groups, queries], chunk.to(weights.dtype))
    return out.reshape(*batch, n_query, n_key)


def _oracle_chunk(weights: Tensor, values: Tensor, r: int, swaps: int) -> Tensor:
    """OVA-r for weights [G, T, S] and values [G, S, D], both float64."""
    n_key = weights.shape[-1]
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0.0, 1.0)
    output = torch.bmm(weights, values)
    result = weights.reshape(-1, n_key).clone()
    finite = output.isfinite().all(dim=-1).reshape(-1)
    wanted = ((result > 0).sum(dim=-1) > r) & finite
    if r > values.shape[-1]:
        exact, solved = solve_exactly(result.view_as(weights), values, wanted.view(weights.shape[:-1]))
        result = torch.where(solved.view(-1, 1), exact.view_as(result), result)
        wanted &= ~solved.view(-1)
    rows = wanted.nonzero().squeeze(-1)
    if rows.numel() == 0:
        return result.view_as(weights)

    # Differences and not products: exact for nearby values, and independent of what excluded keys hold.
    distance = torch.cdist(output, values, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.reshape(-1, n_key)[rows]
    visible = result[rows] > 0
    distance = distance.masked_fill(~visible, float("inf"))
    nearest = distance.argmin(dim=-1)
    if r == 1:
        result[rows] = torch.zeros_like(distance).scatter(-1, nearest.unsqueeze(-1), 1.0)
        return result.view_as(weights)

    problem = _Problem(
        values=values,
        n_query=weights.shape[1],
        row=rows,
        target=output.reshape(-1, output.shape[-1])[rows],
        scale=distance.masked_fill(~visible, 0.0).amax(dim=-1),
    )
    best = _wolfe(problem, visible, _single(nearest, min(r, n_key, values.shape[-1] + 1), problem))
    error = problem.error(best)

    # Second start, from the heaviest keys; pointless where the first has already reached the target.
    hard = (error > 1e-10 * problem.scale).nonzero().squeeze(-1)
    if hard.numel():
        part = problem.rows(hard)
        heavy = _best_mask(result[rows[hard]], result[rows[hard]], r)
        first = distance[hard].masked_fill(~heavy, float("inf")).argmin(dim=-1)
        other = _wolfe(part, heavy, _single(first, best.key.shape[-1], part))
        other = _wolfe(part, visible[hard], other)
        best, error = _take_better(best, error, hard, other, part.error(other))
        for _ in range(swaps):
            best, error = _swap_round(problem, visible, best, error)

    sparse = torch.zeros_like(distance).scatter_add(-1, best.key, best.beta)
    # The guard: whatever rounding did above, the plain top-r answer is the floor.
    oblivious = top_r_weights(weights, r)
    oblivious_error = torch.linalg.vector_norm(output - torch.bmm(oblivious, values), dim=-1).reshape(-1)[rows]
    worse = ~(error <= oblivious_error)
    result[rows] = torch.where(worse.unsqueeze(-1), oblivious.reshape(-1, n_key)[rows], sparse)
    return result.view_as(weights)


@dataclass
class _Support:
    """Up to R kept keys a row and their weights; unused slots hold key 0 and weight 0."""

    key: Tensor  # [N, R] int64
    beta: Tensor  # [N, R]
    used: Tensor  # [N, R] bool

    def rows(self, index: Tensor) -> _Support:
        return _Support(*(getattr(self, f.name)[index] for f in fields(self)))

    def put(self, index: Tensor, other: _Support) -> None:
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(other, f.name)

    def clone(self) -> _Support:
        return _Support(self.key.clone(), self.beta.clone(), self.used.clone())


@dataclass
class _Problem:
    """N rows out of the G * T queries of a chunk, each with its target output."""

    values: Tensor  # [G, S, D]
    n_query: int  # T
    row: Tensor  # [N] flat index g * T + t
    target: Tensor  # [N, D]
    scale: Tensor  # [N] distance of the farthest visible value

    def rows(self, index: Tensor) -> _Problem:
        return _Problem(self.values, self.n_query, self.row[index], self.target[index], self.scale[index])

    def points(self, key: Tensor) -> Tensor:
        """v_j - o of the keys [N, R]: [N, R, D]."""
        group = (self.row // self.n_query).unsqueeze(-1)
        return self.values[group, key] - self.target.unsqueeze(-2)

    def error(self, support: _Support) -> Tensor:
        """||sum beta v - o||, [N]."""
        points = self.points(support.key).masked_fill(~support.used.unsqueeze(-1), 0.0)
        return torch.linalg.vector_norm(_combine(support.beta, points), dim=-1)

    def products(self, vector: Tensor) -> Tensor:
        """vector . v_j for every key: [N, D] -> [N, S]."""
        n_group, n_key, head_dim = self.values.shape
        n_row = vector.shape[0]
        if n_row * 4 < n_group * self.n_query and n_row * n_key * head_dim <= CHUNK_ELEMENTS // 8:
            return torch.bmm(self.values[self.row // self.n_query], vector.unsqueeze(-1)).squeeze(-1)
        dense = vector.new_zeros(n_group * self.n_query, head_dim)
        dense[self.row] = vector
        products = torch.bmm(dense.view(n_group, self.n_query, head_dim), self.values.transpose(1, 2))
        return products.view(-1, n_key)[self.row]


def _combine(beta: Tensor, points: Tensor) -> Tensor:
    """sum_k beta_k p_k: [N, R], [N, R, D] -> [N, D]."""
    return torch.bmm(beta.unsqueeze(-2), points).squeeze(-2)


def _single(key: Tensor, size: int, problem: _Problem) -> _Support:
    """A support of one key with weight 1."""
    slots = torch.zeros(key.shape[0], size, dtype=torch.long, device=key.device)
    slots[:, 0] = key
    beta = torch.zeros(slots.shape, dtype=problem.values.dtype, device=key.device)
    beta[:, 0] = 1.0
    return _Support(slots, beta, beta > 0)


def _take_better(
    best: _Support, error: Tensor, index: Tensor, other: _Support, other_error: Tensor
) -> tuple[_Support, Tensor]:
    """Replace the rows `index` of best by `other` where that is better."""
    better = other_error < error[index]
    chosen = index[better]
    best, error = best.clone(), error.clone()
    best.put(chosen, other.rows(better))
    error[chosen] = other_error[better]
    return best, error


def _swap_round(problem: _Problem, visible: Tensor, best: _Support, error: Tensor) -> tuple[_Support, Tensor]:
    """Take each kept key out in turn, refill greedily without it, and keep what is better."""
    for slot in range(best.key.shape[-1]):
        index = (
            (best.used[:, slot] & (best.used.sum(dim=-1) > 1) & (error > 1e-10 * problem.scale)).nonzero().squeeze(-1)
        )
        if index.numel() == 0:
            continue
        part, trial = problem.rows(index), best.rows(index)
        allowed = visible[index].scatter(-1, trial.key[:, slot : slot + 1], False)
        trial.used[:, slot] = False
        trial.key[:, slot] = 0
        trial.beta[:, slot] = 0.0
        total = trial.beta.sum(dim=-1, keepdim=True)
        even = trial.used / trial.used.sum(dim=-1, keepdim=True)
        trial.beta = torch.where(total > 0, trial.beta / total, even)
        trial = _wolfe(part, allowed, trial)
        best, error = _take_better(best, error, index, trial, part.error(trial))
    return best, error


def _affine_minimum(points: Tensor, used: Tensor) -> Tensor:
    """Weights y, sum 1, of the point of least norm in the affine hull of the used points.

    [N, K, D], [N, K] -> [N, K]. Wolfe's form: solve (P P^T + 1 1^T) u = 1, y = u / sum u. A ridge lets it
    survive affinely dependent points; refinement with P itself takes the ridge, and most of the squaring of
    the condition number, out again.
    """
    ones = used.to(points.dtype)
    power = points.square().sum(dim=(-2, -1)) / ones.sum(dim=-1).clamp(min=1.0)
    points = points / power.clamp(min=torch.finfo(points.dtype).tiny).sqrt()[:, None, None]
    gram = torch.bmm(points, points.transpose(-2, -1)) + ones.unsqueeze(-1) * ones.unsqueeze(-2)
    gram.diagonal(dim1=-2, dim2=-1).add_(1.0 - ones + 1e-14 * points.shape[-2])
    factor, info = torch.linalg.cholesky_ex(gram)
    singular = info.nonzero().squeeze(-1)
    if singular.numel():
        again = gram[singular]
        again.diagonal(dim1=-2, dim2=-1).add_(1e-9)
        factor[singular] = torch.linalg.cholesky_ex(again).L
    u = torch.cholesky_solve(ones.unsqueeze(-1), factor).squeeze(-1)
    for _ in range(2):
        residual = ones - torch.bmm(points, _combine(u, points).unsqueeze(-1)).squeeze(-1)
        residual = (residual - u.sum(dim=-1, keepdim=True)) * ones
        u = u + torch.cholesky_solve(residual.unsqueeze(-1), factor).squeeze(-1)
    u = u * ones
    return u / u.sum(dim=-1, keepdim=True)


@dataclass
class _State:
    """The rows still being solved."""

    index: Tensor  # [N] into the caller's rows
    support: _Support
    points: Tensor  # [N, R, D], zero in unused slots
    free: Tensor  # [N, S] candidates outside the support
    adding: Tensor  # [N] the weights are optimal on the support: the next step may add a key
    last: Tensor  # [N] squared error when a key was last added
    done: Tensor  # [N]

    def rows(self, index: Tensor) -> _State:
        return _State(
            self.index[index],
            self.support.rows(index),
            self.points[index],
            self.free[index],
            self.adding[index],
            self.last[index],
            self.done[index],
        )


def _wolfe(problem: _Problem, candidates: Tensor, start: _Support) -> _Support:
    """Min-norm point over the candidates' convex hull (Wolfe 1976), stopped when a row's R slots are full.

    All rows go in lockstep: a row either adds the candidate with the most negative gradient and moves to the
    optimum on its support, or, when that leaves the simplex, stops at the boundary, drops what became zero
    and moves again. The error never grows, whatever the linear solve returned, since every move ends at the
    exact minimum of its segment.
    """
    size = start.key.shape[-1]
    result = start.clone()
    free = candidates.clone()
    # scatter with duplicates is undefined: unused slots point at a spare column.
    spare = candidates.shape[-1]
    slots = torch.where(start.used, start.key, spare)
    free = torch.cat([free, free[:, :1]], dim=-1).scatter(-1, slots, False)[:, :spare]
    n_row = start.key.shape[0]
    device = start.key.device
    state = _State(
        index=torch.arange(n_row, device=device),
        support=start.clone(),
        points=problem.points(start.key).masked_fill(~start.used.unsqueeze(-1), 0.0),
        free=free,
        adding=start.used.sum(dim=-1) == 1,
        last=torch.full((n_row,), float("inf"), dtype=problem.values.dtype, device=device),
        done=torch.zeros(n_row, dtype=torch.bool, device=device),
    )
    part = problem
    # Slots fill from the lowest, one a step, so only the first `width` can be in use.
    width = int(start.used.any(dim=0).nonzero().max()) + 1
    for _ in range(20 * size + 50):
        width = min(size, width + 1)
        _add_step(part, state)
        _move_step(state, width)
        alive = ~state.done
        n_alive = int(alive.sum())
        if n_alive < 0.75 * alive.numel():
            result.put(state.index, state.support)
            if n_alive == 0:
                return result
            keep = alive.nonzero().squeeze(-1)
            state, part = state.rows(keep), part.rows(keep)
    result.put(state.index, state.support)
    return result


def _add_step(problem: _Problem, state: _State) -> None:
    """Give each row whose weights are optimal its steepest key, or mark it done."""
    support = state.support
    offset = _combine(support.beta, state.points)
    error = offset.square().sum(dim=-1)
    adding = state.adding & ~state.done
    full = support.used.all(dim=-1)
    reached = error <= (1e-14 * problem.scale).square()
    stalled = ~(error < state.last * (1.0 - 1e-12))
    stop = adding & (full | reached | stalled)
    state.last = torch.where(adding, error, state.last)

    slope = problem.products(offset).masked_fill(~state.free, float("inf"))
    key = slope.argmin(dim=-1)
    point = problem.points(key.unsqueeze(-1)).squeeze(-2)
    gain = error - (point * offset).sum(dim=-1)
    useful = (gain > 1e-12 * problem.scale * error.sqrt()) & state.free.gather(-1, key.unsqueeze(-1)).squeeze(-1)
    stop = stop | (adding & ~useful)
    state.done = state.done | stop

    index = (adding & ~stop).nonzero().squeeze(-1)
    slot = (~support.used[index]).to(torch.int8).argmax(dim=-1)
    support.key[index, slot] = key[index]
    support.used[index, slot] = True
    state.points[index, slot] = point[index]
    state.free[index, key[index]] = False


def _move_step(state: _State, width: int) -> None:
    """Move every row towards the optimum on its support, at most up to the boundary of the simplex."""
    support = state.support
    points, used, beta = state.points[:, :width], support.used[:, :width], support.beta[:, :width]
    aim = _affine_minimum(points, used)
    solved = aim.isfinite().all(dim=-1)
    state.done = state.done | ~solved
    active = ~state.done
    change = torch.where(active.unsqueeze(-1), aim - beta, 0.0)
    offset, shift = _combine(beta, points), _combine(change, points)
    length = shift.square().sum(dim=-1)
    best = -(offset * shift).sum(dim=-1) / length.masked_fill(length == 0.0, 1.0)
    best = torch.where(length > 0.0, best, 1.0).clamp(0.0, 1.0)
    leaving = used & (aim <= 0.0) & active.unsqueeze(-1)
    reach = torch.where(leaving, beta / (-change).clamp(min=torch.finfo(beta.dtype).tiny), float("inf"))
    limit = reach.amin(dim=-1)
    blocked = active & (limit <= best)
    theta = torch.minimum(best, limit)
    beta = (beta + theta.unsqueeze(-1) * change).clamp(min=0.0)
    dropped = blocked.unsqueeze(-1) & leaving & (reach <= limit.unsqueeze(-1) * (1.0 + 1e-12))
    beta = beta.masked_fill(dropped, 0.0)
    beta = torch.where(active.unsqueeze(-1), beta / beta.sum(dim=-1, keepdim=True), support.beta[:, :width])
    row, slot = dropped.nonzero(as_tuple=True)
    state.free[row, support.key[row, slot]] = True
    support.key[row, slot] = 0
    support.used[row, slot] = False
    state.points[row, slot] = 0.0
    support.beta[:, :width] = beta
    state.adding = torch.where(active, ~blocked, state.adding)
