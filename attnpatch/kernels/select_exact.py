"""Carathéodory's theorem, batched: every attention output as a mixture of D + 1 of its values, without error.

For r >= D + 1 the optimum of Value-aware Approximate Attention (Gupta & Berant, EMNLP 2021, arXiv 2103.09857) has
error 0, and any basic feasible solution of

    sum_j beta_j v_j = o,   sum_j beta_j = 1,   beta >= 0

is one. All queries of a head share the values, so they start from one well-conditioned basis of D + 1 keys, in
which the outputs are coordinates (one matrix product). Each query then exchanges keys until its coordinates are
non-negative. The search runs in float32; its weights are refined against the float64 values and checked. On a CPU it
is compiled code, a query at a time (select_exact.c); elsewhere, and in float64 for what is then left, all queries go in
lockstep, an exchange being a product-form update of the shared inverse.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attnpatch.kernels.compiled import library, openmp

CANDIDATES = 8
"""Keys compared in each exchange."""

# Rows that ended are taken out when no more than this share is left.
COMPACT = 0.5

# Rows in lockstep: their blocks [rows, CANDIDATES, D + 1] should stay in a CPU's cache and fill a GPU.
_ROWS_CPU = 512
_ROWS_GPU = 1 << 16
_LU_ROWS_CPU = 128

# The heaviest keys, as a share of a basis, that a row takes in at once where its weight lies on few keys: on no more
# than FEW bases of them, counted as the inverse of sum a^2. Even weights end on any keys, and gain nothing by it.
HEAVIEST = 0.5
FEW = 1.0


def solve_exactly(weights: Tensor, values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weights on at most D + 1 keys that give the same outputs as `weights`, where the search finds them.

    Args:
        weights: [G, T, S] float64, rows summing to 1. A key of weight 0 is never used.
        values: [G, S, D] float64.
        wanted: [G, T] bool, the rows to solve.

    Returns:
        Sparse weights [G, T, S], zero in rows that are not solved, and which rows are: [G, T]. A row may be left
        unsolved where the values do not span D dimensions, or in rare cases by rounding.
    """
    # Compiled code reads and writes them row by row.
    weights, wanted = weights.contiguous(), wanted.contiguous()
    n_group, _, n_key = weights.shape
    sparse, solved = torch.zeros_like(weights), torch.zeros_like(wanted)
    if n_key <= values.shape[-1] or not bool(wanted.any()):
        return sparse, solved
    frame = _Frame.of(weights, values, wanted)
    wanted = wanted & frame.usable.unsqueeze(-1)
    rows = _ROWS_CPU if weights.device.type == "cpu" else _ROWS_GPU
    for dtype in (torch.float32, torch.float64):
        tableau = _Tableau.of(frame, dtype)
        if (
            dtype == torch.float32
            and weights.device.type == "cpu"
            and _search_compiled(frame, tableau, weights, wanted, sparse, solved)
        ):
            wanted = wanted & ~solved
            if not bool(wanted.any()):
                break
            continue
        count = int(wanted.sum(dim=-1).max())
        # The wanted rows of each group first; groups with fewer are filled up with rows that are finished.
        order = torch.argsort((~wanted).to(torch.int8), dim=1, stable=True)
        step = min(rows, max(count, 1))
        for first in range(0, n_group, max(1, rows // step)):
            groups = slice(first, min(first + max(1, rows // step), n_group))
            part = frame.part(groups), tableau.part(groups), weights[groups]
            for start in range(0, count, step):
                row = order[groups, start : min(start + step, count)]
                _search(*part, row, wanted[groups].gather(1, row), sparse[groups], solved[groups])
        wanted = wanted & ~solved
        if not bool(wanted.any()):
            break
    return sparse, solved


@dataclass
class _Frame:
    """What the rows of a group share, with values moved and scaled and a 1 appended: [v; 1]."""

    points: Tensor  # [G, S, M], M = D + 1
    target: Tensor  # [G, T, M]
    basis: Tensor  # [G, M] keys
    inverse: Tensor  # [G, M, M]: coordinates in the basis are point @ inverse
    usable: Tensor  # [G] the basis spans the space
    spread: Tensor  # [G, S] ||v_j - centre||, in units of `points`

    @classmethod
    def of(cls, weights: Tensor, values: Tensor, wanted: Tensor) -> _Frame:
        output = torch.bmm(weights, values)
        share = wanted.to(values.dtype).unsqueeze(-1)
        # NaN and infinities stay in their own rows.
        finite = output.masked_fill(~wanted.unsqueeze(-1), 0.0)
        centre = (finite * share).sum(dim=1, keepdim=True) / share.sum(dim=1, keepdim=True).clamp(min=1.0)
        moved = values - centre
        # Values behind a mask may be anything.
        visible = ((weights > 0) & wanted.unsqueeze(-1)).any(dim=1)
        moved = moved.masked_fill(~visible.unsqueeze(-1), 0.0)
        count = visible.sum(dim=-1).clamp(min=1)[:, None, None]
        scale = (moved.square().sum(dim=(1, 2), keepdim=True) / count).sqrt()
        scale = torch.where(scale > 0.0, scale, 1.0)
        moved, finite = moved / scale, (finite - centre) / scale
        points = torch.cat([moved, torch.ones_like(moved[..., :1])], dim=-1)
        target = torch.cat([finite, torch.ones_like(finite[..., :1])], dim=-1)
        common = ((weights > 0) | ~wanted.unsqueeze(-1)).all(dim=1) & visible
        basis, usable = _spanning_keys(points, common)
        matrix = points.gather(1, basis.unsqueeze(-1).expand(-1, -1, points.shape[-1]))
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        matrix = torch.where(usable[:, None, None], matrix, eye)
        inverse, info = torch.linalg.inv_ex(matrix)
        usable = usable & (info == 0) & inverse.isfinite().all(dim=-1).all(dim=-1)
        return cls(points, target, basis, inverse, usable, torch.linalg.vector_norm(moved, dim=-1))

    def part(self, groups: slice) -> _Frame:
        return _Frame(*(getattr(self, f.name)[groups] for f in fields(self)))


def _spanning_keys(points: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Far-apart keys that span the space: pivoted Cholesky of the Gram matrix. [G, S, M] -> [G, M] and [G]."""
    n_group, _, size = points.shape
    # Precision decides only which basis is taken, and float32 halves the cost.
    points = points.float()
    group = torch.arange(n_group, device=points.device)
    left = points.square().sum(dim=-1).masked_fill(~allowed, -1.0)
    factor = torch.zeros_like(points.transpose(1, 2), memory_format=torch.contiguous_format)
    basis = torch.zeros(n_group, size, dtype=torch.long, device=points.device)
    usable = torch.ones(n_group, dtype=torch.bool, device=points.device)
    for k in range(size):
        pivot, key = left.max(dim=-1)
        usable &= pivot > 1e-4
        basis[:, k] = key
        column = torch.bmm(points, points[group, key].unsqueeze(-1)).squeeze(-1)
        if k:
            column -= torch.bmm(factor[group, :k, key].unsqueeze(1), factor[:, :k]).squeeze(1)
        column *= pivot.clamp(min=1e-4).rsqrt().unsqueeze(-1)
        factor[:, k] = column
        left = (left - column.square()).scatter(1, basis[:, : k + 1], -1.0)
    return basis, usable


@dataclass
class _Tableau:
    """The coordinates of every key in the shared basis, in the precision of the search."""

    columns: Tensor  # [G, S', M], S' = S filled up to a multiple of CANDIDATES
    rows: Tensor  # [G, M, S']
    steepness: Tensor  # [G, 1, S'] -1 / length of the column; 0 where filled up
    coordinates: Tensor  # [G, T, M] of the targets

    @property
    def n_slot(self) -> int:
        return self.rows.shape[-1]

    def part(self, groups: slice) -> _Tableau:
        return _Tableau(*(getattr(self, f.name)[groups] for f in fields(self)))

    def take(self, key: Tensor) -> Tensor:
        """The columns of keys [G, N, K]: [G * N, K, M]."""
        n_group, n_row, count = key.shape
        offset = torch.arange(n_group, device=key.device).view(-1, 1, 1) * self.n_slot
        columns = self.columns.view(-1, self.columns.shape[-1]).index_select(0, (key + offset).view(-1))
        return columns.view(n_group * n_row, count, -1)

    @classmethod
    def of(cls, frame: _Frame, dtype: torch.dtype) -> _Tableau:
        columns = torch.bmm(frame.points, frame.inverse)
        n_key = columns.shape[1]
        n_slot = -(-n_key // CANDIDATES) * CANDIDATES
        columns = torch.nn.functional.pad(columns, (0, 0, 0, n_slot - n_key))
        length = torch.linalg.vector_norm(columns, dim=-1)
        steepness = torch.where(length > 0.0, -length.reciprocal(), 0.0).unsqueeze(1)
        return cls(
            columns.to(dtype),
            columns.transpose(1, 2).contiguous().to(dtype),
            steepness.to(dtype),
            torch.bmm(frame.target, frame.inverse).to(dtype),
        )


_READ = (
    *("columns", "rows", "steepness", "coordinates"),  # of the tableau
    *("points", "target", "inverse", "spread"),  # of the frame
    *("weights", "basis", "wanted"),
)
_SIZES = ("threads", "n_group", "n_query", "n_key", "n_slot", "size", "heaviest", "few")


class _Search(ctypes.Structure):
    """`struct search` of select_exact.c."""

    _fields_ = [
        *[(x, ctypes.c_void_p) for x in (*_READ, "sparse", "solved", "workspace")],
        *[(x, ctypes.c_long) for x in _SIZES],
    ]


def _search_compiled(
    frame: _Frame, tableau: _Tableau, weights: Tensor, wanted: Tensor, sparse: Tensor, solved: Tensor
) -> bool:
    """Solve the rows `wanted` into `sparse` and `solved`; False, and nothing is done, where there is no compiler."""
    code = library("select_exact")
    if isinstance(code, str):
        return False
    n_group, n_query, n_key = weights.shape
    size, n_slot = frame.points.shape[-1], tableau.n_slot
    heaviest = max(0, min(int(HEAVIEST * size), n_key - size))
    threads = torch.get_num_threads() if openmp() else 1
    code.vertex_space.argtypes, code.vertex_space.restype = (ctypes.c_long, ctypes.c_long), ctypes.c_long
    read = vars(tableau) | vars(frame) | {"weights": weights, "wanted": wanted}
    held = {name: read[name].contiguous() for name in _READ} | {"sparse": sparse, "solved": solved}
    held["workspace"] = weights.new_empty(threads * code.vertex_space(size, n_slot))
    sizes = (threads, n_group, n_query, n_key, n_slot, size, heaviest, int(FEW * size))
    call = _Search(**{name: x.data_ptr() for name, x in held.items()}, **dict(zip(_SIZES, sizes, strict=True)))
    code.vertex_search(ctypes.byref(call))
    return True


@dataclass
class _Rows:
    """Rows in lockstep: [G, N] of them, N the largest number a group still has."""

    row: Tensor  # [G, N] index into the queries
    alive: Tensor  # [G, N]
    x: Tensor  # [G, N, M] coordinates, to become non-negative
    basis: Tensor  # [G, N, M] keys
    price: Tensor  # [G, N, S'] steepness of the visible keys, 0 elsewhere
    update: Tensor  # [G, N, K, M] inverse = (1 + sum_k e_place(k) update_k) shared inverse, acting from the right
    place: Tensor  # [G, N, K]

    def pick(self, order: Tensor, *names: str) -> _Rows:
        """The rows `order` [G, K]; the fields `names`, or all."""
        n_group, n_row = self.row.shape
        flat = (order + torch.arange(n_group, device=order.device).unsqueeze(-1) * n_row).view(-1)
        taken = {}
        for f in fields(self):
            x = getattr(self, f.name)
            if not names or f.name in names:
                x = x.view(-1, *x.shape[2:]).index_select(0, flat).view(*order.shape, *x.shape[2:])
            taken[f.name] = x
        return _Rows(**taken)

    def grow(self, count: int) -> None:
        """Room for `count` more exchanges."""
        for name in ("update", "place"):
            x = getattr(self, name)
            setattr(self, name, torch.cat([x, x.new_empty(*x.shape[:2], count, *x.shape[3:])], dim=2))


def _search(
    frame: _Frame, tableau: _Tableau, weights: Tensor, row: Tensor, alive: Tensor, sparse: Tensor, solved: Tensor
) -> None:
    """Solve the rows [G, N] of `weights` that are `alive`, into `sparse` [G, T, S] and `solved` [G, T]."""
    n_group, n_row = row.shape
    n_key, size = weights.shape[-1], frame.points.shape[-1]
    dtype, device = tableau.rows.dtype, weights.device
    weight = weights.gather(1, row.unsqueeze(-1).expand(-1, -1, n_key)).to(dtype)
    visible = torch.nn.functional.pad(weight > 0, (0, tableau.n_slot - n_key))
    first = 0
    if dtype == torch.float32:
        few = weight.square().sum(dim=-1) * (FEW * size) >= 1.0
        if 2 * int((few & alive).sum()) >= few.numel():
            first = max(0, min(int(HEAVIEST * size), n_key - size))
    state = _Rows(
        row=row.contiguous(),
        alive=alive,
        x=tableau.coordinates.gather(1, row.unsqueeze(-1).expand(-1, -1, size)),
        basis=frame.basis.unsqueeze(1).repeat(1, n_row, 1),
        price=tableau.steepness * visible,
        update=torch.empty(n_group, n_row, first + 16, size, dtype=dtype, device=device),
        place=torch.empty(n_group, n_row, first + 16, dtype=torch.long, device=device),
    )
    if first:
        part = max(1, (_LU_ROWS_CPU if device.type == "cpu" else _ROWS_GPU) // n_group)
        for start in range(0, n_row, part):
            _take_heaviest(tableau, state, weight, first, slice(start, start + part))

    for step in range(first, first + 4 * size + 1):
        worst, leaving = state.x.min(dim=-1)
        going = state.alive & (worst < 0.0)
        most = int(going.sum(dim=-1).max())
        if most <= COMPACT * going.shape[1]:
            _finish(frame, state, going, step, weights, sparse, solved)
            worst, leaving = state.x.min(dim=-1)
            going = state.alive & (worst < 0.0)
            most = int(going.sum(dim=-1).max())
            if most == 0:
                break
            order = torch.argsort((~going).to(torch.int8), dim=1, stable=True)[:, :most]
            state = state.pick(order)
            worst, leaving, going = worst.gather(1, order), leaving.gather(1, order), going.gather(1, order)
        if step == state.place.shape[2]:
            state.grow(16)
        found = _exchange(tableau, state, step, worst, leaving, going)
        state.alive = state.alive & (found | ~going)


def _take_heaviest(tableau: _Tableau, state: _Rows, weight: Tensor, count: int, rows: slice) -> None:
    """Take the `count` heaviest keys outside the basis into it, at the places that a pivoted LU finds.

    With the entering keys' columns C and their places P, K = C[P], the coordinates c become c + c[P] U, where
    U is the transpose of K^-1 - 1 at P and of -C K^-1 elsewhere.
    """
    x, basis, weight = state.x[:, rows], state.basis[:, rows], weight[:, rows]
    n_group, n_row, size = x.shape
    many = n_group * n_row
    heavy, key = weight.scatter(2, basis, 0.0).topk(count, dim=-1)
    # Heavy keys stay in the basis: the LU sees their rows as small.
    stays = weight.gather(2, basis) >= heavy[..., -1:]
    scale = torch.where(stays, 1e-2, 1.0).to(weight.dtype).view(many, size)
    factor, pivots, info = torch.linalg.lu_factor_ex((tableau.take(key) * scale.unsqueeze(1)).mT)
    pivots = (pivots - 1).long()
    order = torch.arange(size, device=key.device).repeat(many, 1)
    for i in range(count):
        here, there = order[:, i : i + 1].clone(), pivots[:, i : i + 1]
        order[:, i : i + 1] = order.gather(1, there)
        order.scatter_(1, there, here)
    scale = scale.gather(1, order)
    lower = torch.cat([torch.eye(count, dtype=x.dtype, device=x.device).expand(many, -1, -1), factor[:, count:]], dim=1)
    first = factor[:, :count]
    lower = torch.linalg.solve_triangular(first, lower, upper=False, left=False, unitriangular=True)
    top = torch.linalg.solve_triangular(first, lower[:, :count], upper=True)
    lower = torch.cat([top, lower[:, count:] / -scale[:, count:].unsqueeze(-1)], dim=1).contiguous()
    lower *= scale[:, :count].unsqueeze(1)
    lower[:, :count].diagonal(dim1=1, dim2=2).sub_(1.0)
    # Left as they are: rows that see too few keys, or whose new basis is next to singular.
    low, high = lower.view(many, -1).aminmax(dim=-1)
    steady = ((info == 0) & (low > -1e3) & (high < 1e3)).view(n_group, n_row)
    moving = (state.alive[:, rows] & (heavy[..., -1] > 0.0) & steady).unsqueeze(-1)
    lower.masked_fill_(~moving.view(many, 1, 1), 0.0)
    back = torch.argsort(order, dim=1) + torch.arange(0, many * size, size, device=key.device).unsqueeze(-1)
    update = lower.view(-1, count).index_select(0, back.view(-1)).view(n_group, n_row, size, count).mT
    place = order[:, :count].view(n_group, n_row, count)
    state.update[:, rows, :count], state.place[:, rows, :count] = update, place
    x += torch.matmul(x.gather(2, place).unsqueeze(2), update).squeeze(2)
    basis.scatter_(2, place, torch.where(moving, key, basis.gather(2, place)))


def _exchange(tableau: _Tableau, state: _Rows, step: int, worst: Tensor, leaving: Tensor, going: Tensor) -> Tensor:
    """One exchange in every row of `going`; which rows found a key to take in."""
    n_group, n_row, size = state.x.shape
    n_slot, many = tableau.n_slot, n_group * n_row
    slot = leaving.unsqueeze(-1)
    update, place = state.update[:, :, :step], state.place[:, :, :step]
    flat = state.update.view(many, -1, size)[:, :step]

    # The leaving key's row of the current tableau, for every key.
    left = torch.zeros_like(state.x).scatter_(2, slot, 1.0)
    share = update.gather(3, slot.unsqueeze(2).expand(-1, -1, step, 1)).squeeze(-1)
    left.scatter_add_(2, place, share)
    slopes = torch.bmm(left, tableau.rows).mul_(state.price).view(n_group, n_row, CANDIDATES, -1)
    # The steepest key of each of CANDIDATES parts, and its column of the current tableau.
    steep, key = slopes.max(dim=-1)
    key = key + torch.arange(CANDIDATES, device=key.device) * (n_slot // CANDIDATES)
    columns = tableau.take(key)
    if step:
        places = place.unsqueeze(2).expand(-1, -1, CANDIDATES, -1)
        at_places = columns.view(n_group, n_row, CANDIDATES, size).gather(3, places)
        columns.baddbmm_(at_places.view(many, CANDIDATES, step), flat)

    # Take the one that leaves least below zero.
    x = state.x.view(many, 1, size)
    pivots = columns.gather(2, slot.view(many, 1, 1).expand(-1, CANDIDATES, 1))
    reach = worst.view(many, 1, 1) / pivots
    below = torch.addcmul(x, columns, reach, value=-1).clamp_(max=0.0).sum(dim=-1)
    below = below.view(n_group, n_row, CANDIDATES).masked_fill_(steep <= 1e-3, -torch.inf)
    best, choice = below.max(dim=-1)
    going = going & (best > -torch.inf)

    index = choice.view(-1) + torch.arange(0, many * CANDIDATES, CANDIDATES, device=key.device)
    column = columns.view(-1, size).index_select(0, index).view(n_group, n_row, size)
    pivot, reach = (z.view(-1).index_select(0, index).view(n_group, n_row, 1) for z in (pivots, reach))
    moving = going.unsqueeze(-1)
    kept = state.x.gather(2, slot)
    state.x.addcmul_(column, reach.masked_fill(~moving, 0.0), value=-1)
    state.x.scatter_(2, slot, torch.where(moving, reach, kept))
    entering = key.gather(2, choice.unsqueeze(-1))
    state.basis.scatter_(2, slot, torch.where(moving, entering, state.basis.gather(2, slot)))

    # inverse <- inverse (1 - e_leaving (column - e_leaving) / pivot)
    change = column.scatter_(2, slot, pivot - 1.0).mul_(torch.where(moving, -pivot.reciprocal(), 0.0))
    if step:
        flat.addcmul_(share.reshape(many, step, 1), change.view(many, 1, size))
    state.update[:, :, step] = change
    state.place[:, :, step] = leaving
    return going


def _finish(
    frame: _Frame, state: _Rows, going: Tensor, step: int, weights: Tensor, sparse: Tensor, solved: Tensor
) -> None:
    """Refine in float64 the coordinates that ended non-negative, and put what is right into `sparse` and `solved`.

    A coordinate that turns out to be negative goes back into the search.
    """
    n_group, n_query, n_key = sparse.shape
    size = state.x.shape[-1]
    ended = state.alive & ~going
    order = torch.argsort((~ended).to(torch.int8), dim=1, stable=True)[:, : int(ended.sum(dim=-1).max())]
    part, ended = state.pick(order, "row", "alive", "x", "basis", "update", "place"), ended.gather(1, order)
    update, place = part.update[:, :, :step], part.place[:, :, :step]
    index = part.row.unsqueeze(-1).expand(-1, -1, size)
    target = frame.target.gather(1, index)
    x = part.x.to(target.dtype)
    dense = torch.zeros(*x.shape[:2], n_key, dtype=x.dtype, device=x.device)
    for _ in range(3):
        rest = torch.bmm(target - torch.bmm(dense.scatter_(2, part.basis, x), frame.points), frame.inverse)
        if step:
            x += torch.matmul(rest.gather(2, place).to(update.dtype).unsqueeze(2), update).squeeze(2)
        x += rest
    low = x.to(state.x.dtype)
    state.x.scatter_(1, order.unsqueeze(-1).expand(-1, -1, size), torch.where(ended.unsqueeze(-1), low, part.x))
    x.clamp_(min=0.0)
    x /= x.sum(dim=-1, keepdim=True)
    error = torch.linalg.vector_norm(target - torch.bmm(dense.scatter_(2, part.basis, x), frame.points), dim=-1)
    group = torch.arange(n_group, device=x.device).unsqueeze(-1)
    spread = (frame.spread[group.unsqueeze(-1), part.basis] * (x > 0)).amax(dim=-1)
    allowed = 4 * size * torch.finfo(x.dtype).eps * spread
    hidden = weights[group.unsqueeze(-1), part.row.unsqueeze(-1), part.basis] <= 0
    right = ended & (error <= allowed) & ~(hidden & (x > 0)).any(dim=-1)
    into = (group * n_query + part.row)[right]
    sparse.view(-1, n_key)[into] = dense[right]
    solved.view(-1)[into] = True
    # Not right, and no coordinate below zero to work on: given up.
    again = ended & ~right & (low.amin(dim=-1) < 0.0)
    state.alive.scatter_(1, order, again | (part.alive & ~ended))
