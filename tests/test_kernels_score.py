"""Score kernels against float64 loops, and the corners: masks, zero rows, overflow, gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnpatch.kernels import score

NORMALISED = ("expressive", "polynomial", "elu")


def inputs(n_query: int, n_key: int, head_dim: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(2, 3, n_query, head_dim), (2, 3, n_key, head_dim), (2, 3, n_key, head_dim)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def make_mask(kind: str, n_query: int, n_key: int) -> tuple[dict[str, Any], Tensor]:
    """(arguments, the log prior [2, 3, T, S] they mean)."""
    prior = torch.zeros(2, 3, n_query, n_key, dtype=torch.float64)
    if kind == "none":
        return {}, prior
    if kind == "causal":
        seen = torch.ones(n_query, n_key, dtype=torch.bool).tril()
        return {"is_causal": True}, prior.masked_fill(~seen, -np.inf)
    if kind == "padding":
        seen = torch.rand(2, 1, 1, n_key) < 0.6
        seen[0] = False  # one sequence without any visible key
        return {"attn_mask": seen}, prior.masked_fill(~seen, -np.inf)
    if kind == "bool":
        seen = torch.rand(2, 3, n_query, n_key) < 0.5
        return {"attn_mask": seen}, prior.masked_fill(~seen, -np.inf)
    bias = torch.randn(2, 3, n_query, n_key, dtype=torch.float64)
    hidden = torch.rand(bias.shape) < 0.3
    hidden[1, 0] = True
    lowest = -np.inf if kind == "float-inf" else torch.finfo(torch.float64).min
    return {"attn_mask": bias.masked_fill(hidden, lowest)}, bias.masked_fill(hidden, -np.inf)


@pytest.mark.parametrize("kernel", score.KERNELS)
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "bool", "float-inf", "float-min"])
@pytest.mark.parametrize("size", [(6, 6), (1, 7), (4, 9), (7, 1)])
def test_equals_the_loops(seed: int, kernel: str, mask: str, size: tuple[int, int]) -> None:
    query, key, value = inputs(*size)
    arguments, prior = make_mask(mask, *size)
    degree = random.Random(seed).choice([2, 4, 6])
    expected = oracles.attention_weights(query.numpy(), key.numpy(), prior.numpy(), kernel=kernel, degree=degree)
    weights = score.attention_weights(query, key, kernel=kernel, degree=degree, **arguments)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-9, atol=1e-13)
    assert not weights[torch.isinf(prior)].any()
    output = score.kernel_attention(query, key, value, kernel=kernel, degree=degree, **arguments)
    np.testing.assert_allclose(output.numpy(), expected @ value.numpy(), rtol=1e-9, atol=1e-12)


def test_named_functions(seed: int) -> None:
    query, key, value = inputs(4, 6)
    mask = torch.rand(4, 6) < 0.7
    named: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
        (score.expressive_attention, {"kernel": "expressive"}),
        (score.elu_attention, {"kernel": "elu"}),
        (score.polynomial_attention, {"kernel": "polynomial"}),
    ]
    for function, arguments in named:
        expected = score.attention_weights(query, key, mask, scale=0.7, **arguments) @ value
        torch.testing.assert_close(function(query, key, value, mask, 0.0, False, 0.7), expected)
    quartic = score.attention_weights(query, key, kernel="polynomial", degree=4) @ value
    torch.testing.assert_close(score.polynomial_attention(query, key, value, degree=4), quartic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_is_sdpa(seed: int, dtype: torch.dtype) -> None:
    query, key, value = inputs(5, 8, dtype=dtype)
    bias = torch.randn(2, 1, 5, 8, dtype=dtype)
    cases: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"attn_mask": bias},
        {"attn_mask": bias > -2},
        {"attn_mask": bias - 200},
    ]
    for arguments in cases:
        torch.testing.assert_close(
            score.kernel_attention(query, key, value, scale=0.3, **arguments),
            F.scaled_dot_product_attention(query, key, value, scale=0.3, **arguments),
            # The bias of -200 costs float32 scores 5 bits.
            rtol=1e-4,
            atol=1e-4,
        )


def test_default_scales(seed: int) -> None:
    query, key, _ = inputs(3, 4, head_dim=9)
    for kernel, scale in [("softmax", 1 / 3), ("polynomial", 1 / 3), ("elu", 1 / 3), ("expressive", 1.0)]:
        torch.testing.assert_close(
            score.attention_weights(query, key, kernel=kernel),
            score.attention_weights(query, key, kernel=kernel, scale=scale),
        )


@pytest.mark.parametrize("kernel", score.KERNELS)
def test_non_contiguous(seed: int, kernel: str) -> None:
    query, key, value = (torch.randn(2, 6, 3, 5).transpose(1, 2) for _ in range(3))
    mask = (torch.rand(2, 6, 6, 3) < 0.6).movedim(-1, 1)
    assert not query.is_contiguous()
    torch.testing.assert_close(
        score.kernel_attention(query, key, value, mask, kernel=kernel),
        score.kernel_attention(
            query.contiguous(), key.contiguous(), value.contiguous(), mask.contiguous(), kernel=kernel
        ),
    )


@pytest.mark.parametrize("kernel", score.KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(seed: int, kernel: str, dtype: torch.dtype) -> None:
    query, key, value = inputs(6, 9, dtype=dtype)
    weights = score.attention_weights(query, key, kernel=kernel)
    expected = oracles.attention_weights(query.double().numpy(), key.double().numpy(), kernel=kernel)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-4, atol=1e-6)
    output = score.kernel_attention(query, key, value, kernel=kernel)
    assert output.dtype == dtype
    # Only the last rounding is in half precision.
    epsilon = torch.finfo(dtype).eps
    np.testing.assert_allclose(
        output.double().numpy(), expected @ value.double().numpy(), rtol=epsilon, atol=epsilon / 16
    )


@pytest.mark.parametrize("kernel", score.KERNELS)
def test_autocast_changes_nothing(seed: int, kernel: str) -> None:
    query, key, value = inputs(6, 6, dtype=torch.float32)
    plain = score.kernel_attention(query, key, value, kernel=kernel)
    with torch.autocast("cpu", torch.bfloat16):
        cast = score.kernel_attention(query, key, value, kernel=kernel)
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("kernel", score.KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_without_a_visible_key(seed: int, kernel: str, dtype: torch.dtype) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(4, 5, dtype=dtype))
    hidden = torch.zeros(4, 5, dtype=torch.bool)
    hidden[1] = True
    hidden[2, :3] = True
    masks = [~hidden] + [
        torch.zeros(4, 5, dtype=mask_dtype).masked_fill(hidden, lowest)
        for mask_dtype in (dtype, torch.float32)
        for lowest in (-float("inf"), torch.finfo(mask_dtype).min, -1e4)
    ]
    for mask in masks:
        output = score.kernel_attention(query, key, value, mask, kernel=kernel)
        assert not output[:, :, 1].any()
        assert output.isfinite().all()
        gradients = torch.autograd.grad(output.float().square().sum(), (query, key, value))
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[0][:, :, 1].any()
        weights = score.attention_weights(query, key, mask, kernel=kernel)
        torch.testing.assert_close(weights.sum(-1), (~hidden).any(-1).float().expand(2, 3, 4))


@pytest.mark.parametrize("kernel", NORMALISED)
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_zero_scores_are_uniform(seed: int, kernel: str, size: float) -> None:
    query = torch.full((1, 1, 3, 2), size, requires_grad=True)
    key, value = torch.ones(1, 1, 4, 2, requires_grad=True), torch.randn(1, 1, 4, 2)
    seen = torch.tensor([True, True, False, True])
    weights = score.attention_weights(query, key, seen, kernel=kernel)
    torch.testing.assert_close(weights, (seen / 3.0).expand(1, 1, 3, 4))
    gradients = torch.autograd.grad((weights @ value).square().sum(), (query, key))
    assert all(g.isfinite().all() for g in gradients)
    bias = torch.randn(3, 4).masked_fill(~seen, -float("inf"))
    weights = score.attention_weights(query, key, bias, kernel=kernel)
    torch.testing.assert_close(weights[0, 0], bias.softmax(-1))


@pytest.mark.parametrize("kernel", NORMALISED)
@pytest.mark.parametrize("magnitude", [1e-18, 1e-10, 1.0, 300.0, 1e10, 1e20, 1e37])
def test_weights_and_gradients_at_any_magnitude(seed: int, kernel: str, magnitude: float) -> None:
    """float32 where z^2 under- and overflows, against float64 where it does not."""
    scores = torch.randn(3, 1, 4, 6) * magnitude
    probe = torch.randn(3, 1, 4, 6)
    seen = torch.rand(3, 1, 4, 6) < 0.8
    results = []
    for dtype in (torch.float32, torch.float64):
        z = scores.to(dtype).requires_grad_()
        weights = score.weights_from_scores(z, seen, kernel=kernel)
        (gradient,) = torch.autograd.grad((weights * probe.to(dtype)).sum(), z)
        results.append((weights.double(), gradient.double() * magnitude))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


def test_elu_of_very_negative_scores_is_softmax(seed: int) -> None:
    scores = torch.randn(1, 1, 3, 5) - 1e4
    seen = torch.tensor([True, False, True, True, True])
    torch.testing.assert_close(
        score.weights_from_scores(scores, seen, kernel="elu"),
        score.weights_from_scores(scores, seen, kernel="softmax"),
    )


@pytest.mark.parametrize("kernel", score.KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["bool", "float"])
def test_hidden_keys_do_not_exist(seed: int, kernel: str, dtype: torch.dtype, form: str) -> None:
    query, key, value = inputs(4, 7, dtype=dtype)
    hidden = torch.tensor([False, False, True, False, True, True, False])
    mask = ~hidden if form == "bool" else torch.zeros(7, dtype=dtype).masked_fill(hidden, float("-inf"))
    results = []
    for garbage in (0.0, 1e4, -3e4):
        q, k, v = (x.clone() for x in (query, key, value))
        k[:, :, hidden] = v[:, :, hidden] = garbage
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        output = score.kernel_attention(q, k, v, mask, kernel=kernel)
        dq, dk, dv = torch.autograd.grad(output.float().square().sum(), (q, k, v))
        assert not dk[:, :, hidden].any()
        assert not dv[:, :, hidden].any()
        results.append((output, dq, dk, dv))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kernel", score.KERNELS)
def test_causal_rows_ignore_later_keys(seed: int, kernel: str) -> None:
    query, key, value = inputs(8, 8)
    before = score.kernel_attention(query, key, value, is_causal=True, kernel=kernel)
    key[:, :, 5:], value[:, :, 5:] = 1e4, -1e4
    after = score.kernel_attention(query, key, value, is_causal=True, kernel=kernel)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


def test_dropout(seed: int) -> None:
    query, key, value = (torch.randn(1, 1, 4, 3), torch.randn(1, 1, 6, 3), torch.rand(1, 1, 6, 3) + 1)
    many = 4000
    for kernel in score.KERNELS:
        exact = score.kernel_attention(query, key, value, kernel=kernel)
        q, k, v = (x.expand(many, -1, -1, -1) for x in (query, key, value))
        dropped = score.kernel_attention(q, k, v, dropout_p=0.3, kernel=kernel)
        assert dropped.std(dim=0).min() > 0
        # Mean of `many` draws: a weight is kept with 0.7 and divided by it, so its standard deviation is
        # below sqrt(0.3 / 0.7) and the output's below 2 * 0.66; 6 standard errors.
        assert (dropped.mean(dim=0) - exact[0]).abs().max() < 6 * 1.31 / many**0.5


@pytest.mark.parametrize("kernel", score.KERNELS)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_gradcheck(seed: int, kernel: str, mask: str) -> None:
    query, key, value = (torch.randn(1, 2, n, 3, dtype=torch.float64) for n in (3, 4, 4))
    arguments: dict[str, Any] = {"kernel": kernel, "is_causal": mask == "causal"}
    hidden = torch.rand(3, 4) < 0.3
    hidden[1] = True
    bias = torch.randn(3, 4, dtype=torch.float64)

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        attn_mask = None
        if mask == "bool":
            attn_mask = ~hidden
        if mask == "float":
            attn_mask = bias.masked_fill(hidden, float("-inf"))
        return score.kernel_attention(query, key, value, attn_mask, **arguments)

    tensors = [x.requires_grad_() for x in (query, key, value, bias)]
    assert torch.autograd.gradcheck(run, tensors if mask == "float" else (*tensors[:3], bias.detach()))


def test_expressive_gradient_formula(seed: int) -> None:
    """dL/dz_ij = (dO_i . v_j - dO_i . O_i) / N_i * f'(z_ij), f'(z) = 2z / (1+z^2)^2."""
    z = torch.randn(2, 1, 4, 6, dtype=torch.float64, requires_grad=True)
    value, grad = (torch.randn(2, 1, n, 3, dtype=torch.float64) for n in (6, 4))
    output = score.weights_from_scores(z, kernel="expressive") @ value
    (computed,) = torch.autograd.grad(output, z, grad)
    with torch.no_grad():
        total = (z**2 / (1 + z**2)).sum(-1, keepdim=True)
        inner = grad @ value.transpose(-2, -1) - (grad * output).sum(-1, keepdim=True)
        expected = inner / total * 2 * z / (1 + z**2) ** 2
    torch.testing.assert_close(computed, expected)


def test_expressive_is_a_modified_softmax(seed: int) -> None:
    z = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    bias = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(
        score.weights_from_scores(z, bias, kernel="expressive"),
        torch.softmax(2 * z.abs().log() - torch.log1p(z**2) + bias, -1),
    )


def test_symmetries(seed: int) -> None:
    query, key, _ = inputs(4, 6)
    for kernel in ("expressive", "polynomial"):
        torch.testing.assert_close(
            score.attention_weights(query, key, kernel=kernel),
            score.attention_weights(query, -key, kernel=kernel),
        )
    torch.testing.assert_close(
        score.attention_weights(query, key, kernel="polynomial", degree=4, scale=1.0),
        score.attention_weights(query, key, kernel="polynomial", degree=4, scale=7.0),
    )


def test_errors() -> None:
    query = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match=r"'expresive'.*'expressive'"):
        score.attention_weights(query, query, kernel="expresive")
    for degree in (3, 0, -2, 2.5, True):
        with pytest.raises(ValueError, match="positive even integer"):
            score.polynomial_attention(query, query, query, degree=degree)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is_causal"):
        score.expressive_attention(query, query, query, torch.ones(2, 2).bool(), is_causal=True)
    with pytest.raises(ValueError, match="int64"):
        score.elu_attention(query, query, query, torch.ones(2, 2, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", score.KERNELS)
def test_compiles_whole(seed: int, kernel: str) -> None:
    torch._dynamo.reset()  # one compiled function for all kernels would exceed the recompile limit
    query, key, value = inputs(6, 8, dtype=torch.float32)
    masks = [None, torch.rand(6, 8) < 0.6, torch.randn(6, 8)]
    compiled = torch.compile(score.kernel_attention, fullgraph=True, backend="aot_eager")
    for mask in masks:
        q, k, v = (x.clone().requires_grad_() for x in (query, key, value))
        results = []
        for function in (score.kernel_attention, compiled):
            output = function(q, k, v, mask, kernel=kernel)
            results.append((output, *torch.autograd.grad(output.square().sum(), (q, k, v))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
