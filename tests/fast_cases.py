"""What every fast form of the score kernels has to satisfy, whichever computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnpatch.kernels import score

KERNELS: tuple[tuple[str, int], ...] = (("expressive", 2), ("polynomial", 2), ("polynomial", 4), ("elu", 2))
MASKS = ("none", "causal", "padding", "bool", "heads")


def make_inputs(n_query: int, n_key: int, head_dim: int, dtype: torch.dtype, heads: int = 3) -> list[Tensor]:
    return [torch.randn(2, heads, n, head_dim, dtype=torch.float64).to(dtype) for n in (n_query, n_key, n_key)]


def make_mask(kind: str, n_query: int, n_key: int, heads: int = 3) -> dict[str, Any]:
    if kind == "none":
        return {}
    if kind == "causal":
        return {"is_causal": True}
    if kind == "padding":
        seen = torch.rand(2, 1, 1, n_key) < 0.6
        seen[0, ..., : n_key // 3] = False
        if n_key > 1:
            seen[1, ..., -(n_key // 2) :] = False
        return {"attn_mask": seen}
    seen = torch.rand(2, heads if kind == "heads" else 1, n_query, n_key) < 0.4
    seen[0, :, 0] = False  # rows without any visible key
    seen[:, :, :, n_key // 2 : n_key - 1] = False
    return {"attn_mask": seen}


def run(
    implementation: str, inputs: list[Tensor], grad: Tensor, dtype: torch.dtype, **arguments: Any
) -> tuple[Tensor, ...]:
    """Output and gradients, in float64, computed in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    output = score.kernel_attention(*leaves, implementation=implementation, **arguments)
    assert output.dtype == dtype
    results = (output, *torch.autograd.grad(output, leaves, grad.to(dtype)))
    return tuple(x.detach().double() for x in results)


def assert_near(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Relative to the norm of each tensor; exact where the expected tensor is zero."""
    for name, result, wanted in zip(("output", "dq", "dk", "dv"), results, expected, strict=True):
        assert result.isfinite().all(), name
        error = (result - wanted).norm() / wanted.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.1e} > {tolerance:.0e}"


def check_against_oracle(
    implementation: str, kernel: tuple[str, int], mask: str, size: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """Output and gradients against the plain form in float64, which test_kernels_score.py holds against loops."""
    inputs = make_inputs(*size, head_dim, dtype)
    # Scores of both signs, away from 0: f'/f is unbounded there, and magnifies rounding where few keys are visible.
    inputs[0], inputs[1] = inputs[0].abs() + 0.5, (inputs[1].abs() + 0.5) * torch.randn(size[1], 1).sign().to(dtype)
    arguments = {**make_mask(mask, *size), "kernel": kernel[0], "degree": kernel[1], "scale": 1.0 / head_dim}
    grad = torch.randn(*inputs[0].shape[:3], inputs[2].shape[-1]).to(dtype)
    expected = run("plain", inputs, grad, torch.float64, **arguments)
    results = run(implementation, inputs, grad, dtype, **arguments)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 1e-2)
    if expected[1].norm() < 1e-6 * expected[3].norm():
        # One visible key for every query: the true gradients of query and key are zero.
        results, expected = (x[:1] + (torch.zeros(1),) * 2 + x[3:] for x in (results, expected))
    assert_near(results, expected, tolerance)


def check_magnitudes(implementation: str, kernel: tuple[str, int], magnitude: float, size: tuple[int, int]) -> None:
    """Where z^2 and its sum under- or overflow in float32, the same as the plain form, row by row."""
    query, key, value = make_inputs(*size, 8, torch.float32)
    rows = torch.rand(2, 3, size[0], 1) < 0.5
    query = torch.where(rows, query * magnitude, query)
    query[:, :, 1] = 0.0
    arguments = {**make_mask("bool", *size), "kernel": kernel[0], "degree": kernel[1], "scale": 0.5}
    grad = torch.randn(2, 3, size[0], 8)
    results = run(implementation, [query, key, value], grad, torch.float32, **arguments)
    expected = run("plain", [query, key, value], grad, torch.float32, **arguments)
    torch.testing.assert_close(results[0], expected[0], rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in results)
    if not (implementation == "triton" and kernel[0] == "elu" and magnitude >= 1e8):
        # Its backward pass forms the scores anew: the last digit of 1e8 is 8, and e^8 is another weight.
        torch.testing.assert_close(results[3], expected[3], rtol=1e-4, atol=1e-4)
    if magnitude < 1e4:
        # In units of each row: beyond, the gradient is the rounding error of scores that all have weight one.
        torch.testing.assert_close(results[2], expected[2], rtol=1e-3, atol=1e-4)
        unit = torch.where(rows, magnitude, 1.0)
        torch.testing.assert_close(results[1] * unit, expected[1] * unit, rtol=1e-3, atol=1e-4)


def check_hidden_keys(implementation: str, kernel: tuple[str, int], dtype: torch.dtype, n_key: int) -> None:
    """Nothing depends on what a hidden key holds, and it gets no gradient."""
    inputs = make_inputs(20, n_key, 8, dtype)
    hidden = torch.rand(n_key) < 0.5
    hidden[0] = False
    grad = torch.randn(2, 3, 20, 8)
    found = []
    for garbage in (0.0, 3e4):
        query, key, value = (x.clone() for x in inputs)
        key[:, :, hidden] = value[:, :, hidden] = garbage
        arguments = {"attn_mask": ~hidden, "kernel": kernel[0], "degree": kernel[1]}
        found.append(run(implementation, [query, key, value], grad, dtype, **arguments))
        assert not found[-1][2][:, :, hidden].any()
        assert not found[-1][3][:, :, hidden].any()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def check_dropout(implementation: str, kernel: tuple[str, int], size: tuple[int, int], p: float) -> None:
    """The seed of torch decides which weights go; backward drops the same; the share is p."""
    n_query, n_key = size
    query, key, value = (torch.randn(2, 2, n, n_key).requires_grad_() for n in (n_query, n_key, n_key))
    value.data = torch.eye(n_key).expand(2, 2, -1, -1).clone()  # the output shows the weights
    arguments: dict[str, Any] = {"kernel": kernel[0], "degree": kernel[1], "scale": 0.3}

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return score.kernel_attention(query, key, value, None, p, implementation=implementation, **arguments)

    output = draw(5)
    assert torch.equal(output, draw(5))
    kept = output.detach() != 0.0
    assert not torch.equal(kept, draw(6) != 0.0)
    assert not torch.equal(kept[0, 0], kept[0, 1])
    n = kept.numel()
    assert abs(kept.double().mean() - (1.0 - p)) < 6 * (p * (1.0 - p) / n) ** 0.5
    weights = score.attention_weights(query, key, **arguments)
    expected = (weights * kept / (1.0 - p)) @ value
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)
    grad = torch.randn_like(output)
    inputs = (query, key, value)
    for a, b in zip(
        torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
