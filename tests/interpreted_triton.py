"""The Triton kernels in Triton's interpreter, which needs no GPU: run by test_kernels_score_triton.py."""

from __future__ import annotations

import fast_cases
import pytest
import torch

from attnpatch.kernels import dispatch, score

KERNELS = [pytest.param(k, id=f"{k[0]}{k[1]}") for k in fast_cases.KERNELS]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow that the kernels expect


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", fast_cases.MASKS)
def test_triton(seed: int, kernel: tuple[str, int], mask: str) -> None:
    fast_cases.check_against_oracle("triton", kernel, mask, (19, 37), 20, torch.float32)
    if mask == "causal":
        fast_cases.check_against_oracle("triton", kernel, mask, (33, 17), 20, torch.bfloat16)
        fast_cases.check_against_oracle("triton", kernel, mask, (1, 1), 20, torch.float32)


@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128])
def test_head_sizes(seed: int, head_dim: int) -> None:
    fast_cases.check_against_oracle("triton", ("expressive", 2), "causal", (17, 17), head_dim, torch.float16)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-22, 1e-13, 1e8, 1e19])
def test_any_magnitude(seed: int, kernel: tuple[str, int], magnitude: float) -> None:
    fast_cases.check_magnitudes("triton", kernel, magnitude, (12, 35))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hidden_keys(seed: int, dtype: torch.dtype) -> None:
    for kernel in (("expressive", 2), ("elu", 2)):
        fast_cases.check_hidden_keys("triton", kernel, dtype, 35)


def test_dropout(seed: int) -> None:
    for kernel in (("expressive", 2), ("elu", 2)):
        fast_cases.check_dropout("triton", kernel, (40, 24), 0.3)


def test_strides(seed: int) -> None:
    query, key, value = (torch.randn(2, n, 3, 16).transpose(1, 2).requires_grad_() for n in (20, 35, 35))
    grad = torch.randn(20, 2, 3, 16).movedim(0, 2)
    results = []
    for name in ("plain", "triton"):
        output = score.kernel_attention(query, key, value, kernel="expressive", implementation=name)
        results.append((output, *torch.autograd.grad(output, (query, key, value), grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiles_whole(seed: int) -> None:
    inputs = fast_cases.make_inputs(20, 35, 16, torch.bfloat16)
    grad = torch.randn(2, 3, 20, 16).bfloat16()

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return score.expressive_attention(query, key, value)

    with dispatch.use_implementation("triton"):
        results = []
        for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in inputs]
            output = function(*leaves)
            results.append((output, *torch.autograd.grad(output, leaves, grad)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
