"""Key selection: top-r, the practical value-aware selectors and the OVA-r oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from attnpatch.kernels import compiled, select, select_exact
from attnpatch.kernels.score import attention_weights
from attnpatch.kernels.select import top_r_weights, value_aware_weights


def random_weights(*shape: int, sharpness: float = 2.0, hidden: float = 0.0) -> Tensor:
    """Rows of a softmax in float64, some keys hidden (at least one row without any)."""
    weights = torch.softmax(torch.randn(shape, dtype=torch.float64) * sharpness, -1)
    if hidden:
        mask = torch.rand(shape) < hidden
        mask.view(-1, shape[-1])[0] = True
        weights = weights.masked_fill(mask, 0.0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return weights


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def error(weights: Tensor, sparse: Tensor, value: Tensor) -> Tensor:
    weights, sparse, value = weights.double(), sparse.double(), value.double()
    return torch.linalg.vector_norm(weights @ value - sparse @ value, dim=-1)


def check_form(weights: Tensor, sparse: Tensor, r: int) -> None:
    """At most r positive, on visible keys only, rows summing to 1 or (no visible key) 0."""
    assert sparse.shape == weights.shape
    assert sparse.dtype == weights.dtype
    assert (sparse >= 0).all()
    assert ((sparse > 0).sum(-1) <= r).all()
    assert not sparse[weights == 0].any()
    seen = (weights > 0).any(-1).to(sparse.dtype)
    torch.testing.assert_close(sparse.sum(-1), seen, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("r", [1, 2, 3, 7, 8, 20])
def test_top_r_equals_the_loop(seed: int, r: int) -> None:
    weights = random_weights(2, 2, 5, 8, hidden=0.4)
    weights = (weights * 8).round() / 8  # ties
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    expected = np.apply_along_axis(oracles.top_r, -1, weights.numpy(), r)
    kept = top_r_weights(weights, r)
    np.testing.assert_allclose(kept.numpy(), expected, rtol=1e-12)
    check_form(weights, kept, r)


def test_top_r_breaks_ties_by_index() -> None:
    weights = torch.full((1, 1, 1, 1000), 1e-3)
    assert torch.equal(top_r_weights(weights, 3)[0, 0, 0].nonzero().squeeze(-1), torch.arange(3))


@pytest.mark.parametrize("r", [1, 3, 6])
@pytest.mark.parametrize("selector", ["norm", "centered"])
def test_practical_selectors_equal_the_loop(seed: int, r: int, selector: str) -> None:
    weights, value = random_weights(2, 2, 5, 8, hidden=0.4), randn(2, 2, 8, 3) + 5
    expected = np.zeros(weights.shape)
    for index in np.ndindex(*weights.shape[:-1]):
        row, v = weights[index].numpy(), value[index[:2]].numpy()
        mean = v[row > 0].mean(axis=0) if selector == "centered" and (row > 0).any() else np.zeros(3)
        expected[index] = oracles.top_r(row, r, row * np.linalg.norm(v - mean, axis=-1))
    kept = value_aware_weights(weights, value, r, selector)
    np.testing.assert_allclose(kept.numpy(), expected, rtol=1e-12)
    check_form(weights, kept, r)


def test_norm_selector_on_zero_values_is_top_r(seed: int) -> None:
    weights = random_weights(1, 2, 4, 8, hidden=0.4)
    for selector in ("norm", "centered"):
        kept = value_aware_weights(weights, torch.zeros(1, 2, 8, 3).double(), 2, selector)
        assert torch.equal(kept, top_r_weights(weights, 2))


def test_dropped_mass_identity(seed: int) -> None:
    """o - att_S = delta (mu_dropped - mu_kept), for every renormalising selector."""
    weights, value = random_weights(2, 2, 5, 8), randn(2, 2, 8, 3)
    for kept in (
        top_r_weights(weights, 3),
        value_aware_weights(weights, value, 3, "norm"),
        value_aware_weights(weights, value, 3, "centered"),
    ):
        inside = weights * (kept > 0)
        outside = weights - inside
        delta = outside.sum(-1, keepdim=True)
        gap = outside @ value / delta - inside @ value / inside.sum(-1, keepdim=True)
        torch.testing.assert_close(weights @ value - kept @ value, delta * gap)


def test_gradients_of_the_renormalising_selectors(seed: int) -> None:
    value = randn(1, 2, 6, 3).requires_grad_()
    weights = random_weights(1, 2, 3, 6, hidden=0.2).requires_grad_()
    positive = weights.detach() > 0

    def run(weights: Tensor, value: Tensor) -> Tensor:
        weights = weights.masked_fill(~positive, 0.0)
        return torch.cat(
            [top_r_weights(weights, 2)]
            + [value_aware_weights(weights, value, 2, name) @ value for name in ("norm", "centered")],
            dim=-1,
        )

    assert torch.autograd.gradcheck(run, (weights, value))
    (gradient,) = torch.autograd.grad(run(weights, value).square().sum(), weights)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_oracle_r1_is_the_nearest_value(seed: int) -> None:
    weights, value = random_weights(3, 2, 7, 9, hidden=0.4), randn(3, 2, 9, 4) + 100
    sparse = value_aware_weights(weights, value, 1)
    check_form(weights, sparse, 1)
    output = weights @ value
    for index in np.ndindex(3, 2, 7):
        visible = weights[index] > 0
        if visible.any():
            distance = torch.linalg.vector_norm(value[index[:2]] - output[index], dim=-1)
            assert sparse[index].argmax() == distance.masked_fill(~visible, torch.inf).argmin()


@pytest.mark.parametrize(("n_key", "head_dim"), [(12, 3), (40, 8), (96, 32)])
@pytest.mark.parametrize("extra", [0, 4])
def test_oracle_is_exact_from_head_dim_plus_one(seed: int, n_key: int, head_dim: int, extra: int) -> None:
    weights, value = random_weights(2, 2, 10, n_key, hidden=0.2), randn(2, 2, n_key, head_dim)
    sparse = value_aware_weights(weights, value, head_dim + 1 + extra)
    check_form(weights, sparse, head_dim + 1 + extra)
    assert error(weights, sparse, value).max() < 1e-10


def test_oracle_agrees_with_nnls(seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    weights, value = random_weights(1, 1, 8, 30), randn(1, 1, 30, 5)
    sparse = value_aware_weights(weights, value, 6)
    design = np.vstack([value[0, 0].numpy().T, np.ones(30)])
    for t in range(8):
        target = np.append((weights @ value)[0, 0, t].numpy(), 1.0)
        solution, residual = optimize.nnls(design, target)
        assert residual < 1e-9
        assert (solution > 0).sum() <= 6
        np.testing.assert_allclose(design @ sparse[0, 0, t].numpy(), design @ solution, atol=1e-9)


@pytest.mark.parametrize("head_dim", [2, 4])
def test_oracle_against_enumeration(seed: int, head_dim: int) -> None:
    """Never below the optimum, never above top-r; the optimum itself at r = 1 and r >= D + 1."""
    n_key = 7
    weights, value = random_weights(1, 2, 8, n_key), randn(1, 2, n_key, head_dim)
    hits = {0: 0, 1: 0}
    rows = 0
    for r in range(1, head_dim + 2):
        best = np.array(
            [
                [oracles.optimal_error(weights[0, h, t].numpy(), value[0, h].numpy(), r) for t in range(8)]
                for h in range(2)
            ]
        )
        oblivious = error(weights, top_r_weights(weights, r), value)[0].numpy()
        rows += best.size
        for swaps in hits:
            found = error(weights, value_aware_weights(weights, value, r, swaps=swaps), value)[0].numpy()
            assert (found >= best - 1e-9).all()
            assert (found <= oblivious + 1e-12).all()
            if r == 1 or r == head_dim + 1:
                np.testing.assert_allclose(found, best, atol=1e-9)
            hits[swaps] += int((found <= best + 1e-9).sum())
    print(f"optimal rows: greedy {hits[0]}/{rows}, with one swap round {hits[1]}/{rows}")
    assert hits[1] >= hits[0]


@pytest.mark.parametrize("form", ["compiled", "lockstep"])
@pytest.mark.parametrize("mask", ["none", "keys", "causal"])
@pytest.mark.parametrize("head_dim", [2, 9, 24])
def test_exact_solver_by_itself(
    seed: int, monkeypatch: pytest.MonkeyPatch, head_dim: int, mask: str, form: str
) -> None:
    """What the vertex solver calls solved is solved, and on plain values it solves nearly every row."""
    if form == "lockstep":
        monkeypatch.setattr(select_exact, "library", lambda source: "not wanted")
    elif compiled.unwanted() is not None:
        pytest.skip(f"no compiled code: {compiled.unwanted()}")
    search, left = select_exact._search, []
    monkeypatch.setattr(select_exact, "_search", lambda *x: (left.append(int(x[4].sum())), search(*x)))
    n_key, n_query = 4 * head_dim + 3, 4 * head_dim + 3
    for sharpness in (0.2, 1.0, 5.0):
        weights = random_weights(3, n_query, n_key, sharpness=sharpness)
        if mask != "none":
            hidden = torch.rand(3, 1, n_key) < 0.2 if mask == "keys" else torch.ones(n_query, n_key).triu(1).bool()
            weights = weights.masked_fill(hidden, 0.0)
            weights = weights / weights.sum(-1, keepdim=True)
        value = randn(3, n_key, head_dim) * 10.0 ** torch.randint(-3, 4, (3, 1, 1)) + 100 * randn(3, 1, head_dim)
        wanted = (weights > 0).sum(-1) > head_dim + 1
        wanted &= torch.rand(wanted.shape) < 0.8
        garbage = value.masked_fill(~(weights > 0).any(1).unsqueeze(-1), 1e30)
        sparse, solved = select_exact.solve_exactly(weights, garbage, wanted)
        assert not solved[~wanted].any()
        assert not sparse[~solved].any()
        # Under a causal mask the keys that all rows see are few, and may not span the space.
        assert mask == "causal" or solved[wanted].double().mean() > 0.9
        if form == "compiled" and mask == "none":
            # One row in 20,000 is left for the search in float64.
            assert sum(left) <= 0.05 * wanted.sum()
            left.clear()
        check_form(weights[solved], sparse[solved], head_dim + 1)
        size = float(value.abs().max())
        assert error(weights, sparse, value)[solved].max() < 1e-12 * size


@pytest.mark.skipif(compiled.unwanted() is not None, reason=f"no compiled code: {compiled.unwanted()}")
def test_exact_solver_on_any_number_of_threads(seed: int) -> None:
    """Rows are solved one by one: not a bit hangs on who solves them."""
    weights, value = random_weights(3, 40, 90, sharpness=2.0), randn(3, 90, 17)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(select_exact.solve_exactly(weights, value, torch.ones(3, 40, dtype=torch.bool)))
    finally:
        torch.set_num_threads(before)
    for sparse, solved in found:
        assert solved.all()
        assert torch.equal(sparse, found[0][0])


def test_exact_solver_on_weights_in_any_order_in_memory(seed: int) -> None:
    """And while tensors are made elsewhere by default."""
    weights, value = random_weights(3, 20, 60, sharpness=2.0), randn(3, 60, 5)
    weights = weights.masked_fill(torch.rand(3, 1, 60) < 0.3, 0.0)
    weights /= weights.sum(-1, keepdim=True)
    wanted = torch.ones(3, 20, dtype=torch.bool)
    expected, solved = select_exact.solve_exactly(weights, value, wanted)
    assert solved.all()
    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
        back = torch.argsort(torch.tensor(order)).tolist()
        turned = weights.permute(order).contiguous().permute(back)
        with torch.device("meta"):
            found = select_exact.solve_exactly(turned, value, wanted.t().contiguous().t())
        assert torch.equal(found[0], expected)
        assert found[1].all()


def test_exact_solver_gives_up_on_flat_values(seed: int) -> None:
    weights = random_weights(2, 5, 12)
    flat = randn(2, 12, 2) @ randn(2, 2, 4)
    sparse, solved = select_exact.solve_exactly(weights, flat, torch.ones(2, 5, dtype=torch.bool))
    assert not solved.any()
    assert not sparse.any()


def degenerate_values(kind: str, n_batch: int, n_key: int, head_dim: int) -> Tensor:
    value = randn(n_batch, 1, n_key, head_dim)
    if kind == "duplicates":
        return value[:, :, torch.randint(0, 3, (n_key,))]
    if kind == "near-duplicates":
        return value[:, :, torch.randint(0, 3, (n_key,))] + 1e-9 * value
    if kind == "collinear":
        return randn(n_batch, 1, n_key, 1) * randn(n_batch, 1, 1, head_dim) + randn(n_batch, 1, 1, head_dim)
    if kind == "plane":
        return randn(n_batch, 1, n_key, 2) @ randn(n_batch, 1, 2, head_dim)
    if kind == "zeros":
        return torch.zeros_like(value)
    if kind == "some zeros":
        return value * (torch.rand(n_batch, 1, n_key, 1) < 0.5)
    if kind == "offset":
        return value + 1e5
    if kind == "tiny":
        return value * 1e-20
    if kind == "scales":
        return value * 10.0 ** torch.randint(-6, 6, (n_batch, 1, n_key, 1))
    if kind == "simplex":
        return torch.eye(n_key, head_dim, dtype=torch.float64).expand(n_batch, 1, -1, -1)
    return value


KINDS = [
    "random",
    "duplicates",
    "near-duplicates",
    "collinear",
    "plane",
    "zeros",
    "some zeros",
    "offset",
    "tiny",
    "scales",
    "simplex",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swaps", [0, 1])
def test_oracle_is_never_worse_than_top_r(seed: int, kind: str, swaps: int) -> None:
    n_key, head_dim = 10, 4
    value = degenerate_values(kind, 6, n_key, head_dim)
    weights = torch.cat(
        [
            random_weights(6, 1, 16, n_key, hidden=0.3),
            random_weights(6, 1, 8, n_key, sharpness=0.1),
            random_weights(6, 1, 8, n_key, sharpness=20.0),
            torch.eye(n_key).double().expand(6, 1, -1, -1),  # one-hot rows
            torch.full((6, 1, 1, n_key), 1 / n_key, dtype=torch.float64),
        ],
        dim=-2,
    )
    size = float(value.abs().max())
    for r in (1, 2, 3, 4, 5, 10, 11):
        sparse = value_aware_weights(weights, value, r, swaps=swaps)
        check_form(weights, sparse, r)
        found, floor = error(weights, sparse, value), error(weights, top_r_weights(weights, r), value)
        assert (found <= floor + 1e-14 * size).all()
        if r > head_dim:
            assert found.max() <= 1e-7 * size
        few = (weights > 0).sum(-1) <= r
        assert few.any()
        assert torch.equal(sparse[few], weights[few])


def test_oracle_swaps_never_hurt(seed: int) -> None:
    weights, value = random_weights(2, 2, 16, 12), randn(2, 2, 12, 6)
    for r in (2, 3, 5):
        errors = [error(weights, value_aware_weights(weights, value, r, swaps=n), value) for n in (0, 1, 2)]
        assert (errors[1] <= errors[0] + 1e-12).all()
        assert (errors[2] <= errors[1] + 1e-12).all()
    with_swaps = value_aware_weights(weights, value, 3, swaps=2)
    check_form(weights, with_swaps, 3)


@pytest.mark.parametrize("r", [2, 5, 12])
def test_orthonormal_values(seed: int, r: int) -> None:
    """The best support is top-r and the best weights are a_i + (1 - sum_S a) / r, not the renormalised ones."""
    weights = random_weights(2, 2, 6, 16)
    value = torch.linalg.qr(randn(2, 2, 16, 16)).Q
    sparse = value_aware_weights(weights, value, r)
    support = top_r_weights(weights, r) > 0
    inside = weights * support
    expected = (inside + (1 - inside.sum(-1, keepdim=True)) / r) * support
    torch.testing.assert_close(sparse, expected, rtol=1e-6, atol=1e-9)


def test_oracle_in_chunks_is_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, value = random_weights(3, 2, 11, 14, hidden=0.2), randn(3, 2, 14, 5)
    whole = value_aware_weights(weights, value, 3, swaps=1)
    for limit in (500, 5000):
        monkeypatch.setattr(select, "CHUNK_ELEMENTS", limit)
        parts = value_aware_weights(weights, value, 3, swaps=1)
        torch.testing.assert_close(error(weights, parts, value), error(weights, whole, value), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_oracle_in_lower_precision(seed: int, dtype: torch.dtype) -> None:
    value = randn(2, 2, 20, 6).to(dtype)
    weights = random_weights(2, 2, 9, 20, hidden=0.2).float()
    for r in (1, 3, 7):
        sparse = value_aware_weights(weights, value, r)
        check_form(weights, sparse, r)
        floor = error(weights, top_r_weights(weights, r), value)
        assert (error(weights, sparse, value) <= floor + 1e-5).all()
    assert error(weights, sparse, value).max() < 1e-5


def test_rows_with_few_visible_keys_are_returned_as_they_are(seed: int) -> None:
    weights, value = random_weights(2, 2, 9, 12, hidden=0.8).float(), randn(2, 2, 12, 6).float()
    few = (weights > 0).sum(-1) <= 3
    assert few.any()
    assert torch.equal(value_aware_weights(weights, value, 3)[few], weights[few])
    assert torch.equal(value_aware_weights(weights, value, 12), weights)


def test_nan_is_not_hidden() -> None:
    weights, value = torch.full((1, 1, 2, 4), 0.25), torch.randn(1, 1, 4, 3)
    weights[0, 0, 0] = torch.nan
    for r in (2, 4):
        assert top_r_weights(weights, r)[0, 0, 0].isnan().any()
        for selector in select.SELECTORS:
            kept = value_aware_weights(weights, value, r, selector)
            assert kept[0, 0, 0].isnan().any()
            assert kept[0, 0, 1].isfinite().all()


SETTINGS: list[tuple[str, dict[str, Any]]] = [("top_r", {})] + [
    ("value_aware", {"selector": name}) for name in select.SELECTORS
]


def attend(name: str) -> Any:
    return select.top_r_attention if name == "top_r" else select.value_aware_attention


@pytest.mark.parametrize(("name", "options"), SETTINGS)
@pytest.mark.parametrize("kernel", ["softmax", "expressive", "polynomial", "elu"])
@pytest.mark.parametrize("size", [(1, 7), (5, 9), (6, 6), (3, 1)])
def test_attention_functions(seed: int, name: str, options: dict[str, Any], kernel: str, size: tuple[int, int]) -> None:
    query, key, value = randn(2, 2, size[0], 3), randn(2, 2, size[1], 3), randn(2, 2, size[1], 3)
    mask = torch.rand(2, 1, size[0], size[1]) < 0.7
    mask[0, 0, 0] = False
    weights = attention_weights(query, key, mask, scale=0.8, kernel=kernel)
    for r in (1, 3):
        sparse = top_r_weights(weights, r) if name == "top_r" else value_aware_weights(weights, value, r, **options)
        output = attend(name)(query, key, value, mask, 0.0, False, 0.8, r=r, kernel=kernel, **options)
        torch.testing.assert_close(output, sparse @ value)
        assert not output[0, :, 0].any()
    every = attend(name)(query, key, value, mask, scale=0.8, r=size[1], kernel=kernel, **options)
    torch.testing.assert_close(every, weights @ value)


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_hidden_and_later_keys_change_nothing(seed: int, name: str, options: dict[str, Any]) -> None:
    query, key, value = (torch.randn(2, 2, 8, 4) for _ in range(3))
    hidden = torch.tensor([False, True, False, False, True, False, False, True])
    outputs, causal = [], []
    for garbage in (0.0, 1e4):
        k, v = key.clone(), value.clone()
        k[:, :, hidden] = v[:, :, hidden] = garbage
        outputs.append(attend(name)(query, k, v, ~hidden, r=2, **options))
        k, v = key.clone(), value.clone()
        k[:, :, 5:], v[:, :, 5:] = k[:, :, 5:] + garbage, v[:, :, 5:] - garbage
        causal.append(attend(name)(query, k, v, is_causal=True, r=2, **options)[:, :, :5])
    assert torch.equal(*outputs)
    torch.testing.assert_close(*causal, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_non_contiguous_and_half(seed: int, name: str, options: dict[str, Any]) -> None:
    query, key, value = (torch.randn(2, 7, 2, 4).transpose(1, 2) for _ in range(3))
    plain = attend(name)(query.contiguous(), key.contiguous(), value.contiguous(), r=2, **options)
    torch.testing.assert_close(attend(name)(query, key, value, r=2, **options), plain)
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = (x.to(dtype) for x in (query, key, value))
        output = attend(name)(q, k, v, r=2, **options)
        assert output.dtype == dtype
        exact = attend(name)(q.double(), k.double(), v.double(), r=2, **options)
        # A choice between two nearly equal keys may fall the other way: most rows, not all.
        close = ((output.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * (1 + exact.abs())).all(-1)
        assert close.double().mean() > 0.8


def test_broadcast_value_and_extra_dimensions(seed: int) -> None:
    weights, value = random_weights(2, 3, 4, 8), randn(2, 1, 8, 3)
    for selector in select.SELECTORS:
        wide = value_aware_weights(weights, value.expand(2, 3, 8, 3), 2, selector)
        assert torch.equal(value_aware_weights(weights, value, 2, selector), wide)
        assert torch.equal(value_aware_weights(weights[0, 0], value[0, 0], 2, selector), wide[0, 0])


def test_dropout_acts_after_selection(seed: int) -> None:
    query, key, value = torch.randn(1, 1, 4, 3), torch.randn(1, 1, 6, 3), torch.rand(1, 1, 6, 3) + 1
    many = 3000
    for name, options in SETTINGS:
        if options.get("selector") == "oracle":
            continue
        exact = attend(name)(query, key, value, r=2, **options)
        wide = [x.expand(many, -1, -1, -1) for x in (query, key, value)]
        dropped = attend(name)(*wide, dropout_p=0.3, r=2, **options)
        assert dropped.std(dim=0).min() > 0
        assert (dropped.mean(dim=0) - exact[0]).abs().max() < 6 * 1.31 / many**0.5


def test_errors() -> None:
    weights, value = torch.full((1, 1, 2, 4), 0.25), torch.randn(1, 1, 4, 3)
    query = torch.randn(1, 1, 4, 3)
    for r in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="at least 1"):
            top_r_weights(weights, r)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="at least 1"):
            select.value_aware_attention(query, query, query, r=r)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="at least 1"):
            select.top_r_attention(query, query, query, r=r)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'centred'.*'centered'"):
        value_aware_weights(weights, value, 1, "centred")
    with pytest.raises(ValueError, match="swaps"):
        value_aware_weights(weights, value, 1, swaps=-1)
    with pytest.raises(ValueError, match="4 keys but value holds 3"):
        value_aware_weights(weights, value[:, :, :3], 1)


def test_the_oracle_has_no_gradient() -> None:
    query = torch.randn(1, 1, 4, 3, requires_grad=True)
    fixed = query.detach()
    with pytest.raises(ValueError, match="no gradient"):
        select.value_aware_attention(query, fixed, fixed, r=2)
    with pytest.raises(ValueError, match="no gradient"):
        select.value_aware_attention(fixed, fixed, query, r=2)
    with torch.no_grad():
        assert select.value_aware_attention(query, fixed, fixed, r=2).isfinite().all()
    for selector in ("norm", "centered"):
        output = select.value_aware_attention(query, fixed, fixed, r=2, selector=selector)
        assert torch.autograd.grad(output.sum(), query)[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [s for s in SETTINGS if s[1].get("selector") != "oracle"])
def test_compiles_whole(seed: int, name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    query, key, value = (torch.randn(2, 2, 6, 4) for _ in range(3))
    compiled = torch.compile(attend(name), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(query, key, value, r=2, **options), attend(name)(query, key, value, r=2, **options)
    )


@pytest.mark.slow
def test_oracle_at_model_size(seed: int) -> None:
    """D = 64, S = 256: float32 weights of all kernels."""
    query, key, value = (torch.randn(1, 2, n, 64) for n in (24, 256, 256))
    for kernel in ("softmax", "expressive", "polynomial", "elu"):
        weights = attention_weights(query, key, kernel=kernel)
        before = None
        for r in (1, 2, 4, 8, 16, 32, 65):
            sparse = value_aware_weights(weights, value, r)
            check_form(weights, sparse, r)
            found = error(weights, sparse, value)
            assert (found <= error(weights, top_r_weights(weights, r), value) + 1e-6).all()
            assert before is None or found.mean() <= before + 1e-6
            before = found.mean()
        assert found.max() < 1e-5
