"""The alignment losses' Triton kernels in Triton's interpreter: run by test_kernels_alignment_triton.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnpatch.kernels import alignment as al
from attnpatch.kernels import alignment_networks as an
from attnpatch.kernels import alignment_triton, dispatch

HIDDEN = 5


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    """On a CPU, in the interpreter, Triton's kernels are used where they are asked for."""
    with dispatch.use_implementation("triton"):
        yield


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities that the kernels expect


def networks(method: str, dim: int) -> dict[str, nn.Module]:
    if method == "gan":
        return {"discriminator": an.Discriminator(dim, HIDDEN)}
    return {"navigator": an.Navigator(dim, HIDDEN), "critic": an.Critic(dim, HIDDEN)}


def kinks(module: Any, x: Tensor) -> Tensor:
    """What relu and leaky_relu are applied to: where it is nearly 0, its sign is no matter of precision."""
    near = []
    if hasattr(module, "highway"):
        near.append(module.highway.transform(x).flatten())
        x = module.highway(x)
    return torch.cat([*near, module.inner(x).flatten()]).abs().min()


def away_from_kinks(make: Any, modules: list[nn.Module]) -> list[Tensor]:
    while True:
        drawn = make()
        wide = [copy.deepcopy(m).double() for m in modules]
        if all(kinks(m, x.double().nan_to_num()) > 1e-5 for m in wide for x in drawn):
            return drawn


def assert_near(results: list[Tensor], expected: list[Tensor], tolerances: list[float]) -> None:
    for i, (result, wanted, tolerance) in enumerate(zip(results, expected, tolerances, strict=True)):
        assert result.isfinite().all(), i
        error = (result.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{i}: {error:.1e} > {tolerance:.0e}"


@pytest.mark.parametrize(("dim", "hidden", "adversary"), [(20, 5, True), (16, 16, False)])
@pytest.mark.parametrize("kind", [an.Discriminator, an.Navigator, an.Critic])
def test_networks(seed: int, kind: Any, dim: int, hidden: int, adversary: bool) -> None:
    net = kind(dim, hidden)
    shape = (7, 5, dim) if dim == 20 else (16, dim)
    (x,) = away_from_kinks(lambda: [torch.randn(shape)], [net])
    assert an.serves_triton(net, x)
    wide = copy.deepcopy(net).double()
    results, direction = [], None
    for module, tokens in ((net, x), (wide, x.double())):
        tokens.requires_grad_()
        out = an.apply_network(module, tokens, adversary)
        direction = torch.randn_like(out) if direction is None else direction
        results.append([out, *torch.autograd.grad((out * direction).sum(), [tokens, *module.parameters()])])
    assert_near(*results, [1e-6, 1e-6, *[1e-5] * (len(results[0]) - 2)])


def loss_and_gradients(
    method: str, nets: dict[str, nn.Module], tokens: list[Tensor], masks: list[Tensor | None], **options: Any
) -> list[Tensor]:
    query, key = (x.detach().requires_grad_() for x in tokens)
    loss = al.alignment_loss(query, key, masks[1], method, masks[0], **nets, **options)
    leaves = [query, key, *(p for net in nets.values() for p in net.parameters())]
    d_query, d_key, *gradients = torch.autograd.grad(loss * 3, leaves)
    results = [loss, d_query, d_key]
    for net in nets.values():
        # As one: a bias's gradient may be a sum of much larger numbers, with their errors.
        count = len(list(net.parameters()))
        results.append(torch.cat([g.flatten() for g in gradients[:count]]))
        gradients = gradients[count:]
    return results


def check(
    method: str, dtype: torch.dtype, lengths: tuple[int, int], dim: int, padded: bool, reduction: str = "mean"
) -> None:
    nets, heads = networks(method, dim), 2 if method == "gan" else 1
    masks: list[Tensor | None] = [None, None]
    if padded:
        masks = [torch.rand(2, n) < 0.3 for n in lengths]
        for mask in masks:
            mask[0, 0], mask[0, -1] = False, True
        masks[1][1] = True  # a sequence without any key

    def make() -> list[Tensor]:
        drawn = [torch.randn(2, n, heads, dim).transpose(1, 2).to(dtype) for n in lengths]
        return drawn if not padded else [
            x.masked_fill(mask[:, None, :, None], float("nan")) for x, mask in zip(drawn, masks, strict=True)
        ]  # fmt: skip

    tokens = away_from_kinks(make, list(nets.values()))
    assert all(an.serves_triton(net, *tokens) for net in nets.values())
    results = loss_and_gradients(method, nets, tokens, masks, reduction=reduction)
    assert [x.dtype for x in results[:3]] == [torch.float32, dtype, dtype]
    wide = {name: copy.deepcopy(net).double() for name, net in nets.items()}
    expected = loss_and_gradients(method, wide, [x.double() for x in tokens], masks, reduction=reduction)
    exact = dtype == torch.float32
    # A softmax's gradients are differences of near numbers; tokens' gradients are rounded to their dtype.
    of_weights = (2e-5 if method == "ct" else 1e-5) if exact else 1e-3 if method == "ct" else 1e-4
    of_tokens = 1e-5 if exact else 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert_near(results, expected, [of_weights, of_tokens, of_tokens, *[of_weights] * (len(results) - 3)])
    if padded:
        for gradient, mask in zip(results[1:3], masks, strict=True):
            assert not gradient.transpose(1, 2)[mask].any()
            assert not gradient[1].any()


@pytest.mark.parametrize("method", ["gan", "ct"])
def test_losses(seed: int, method: str) -> None:
    check(method, torch.float32, (5, 18), 20, padded=True)
    check(method, torch.bfloat16, (16, 16), 16, padded=False, reduction="sum")


@pytest.mark.parametrize("method", ["gan", "ct"])
def test_losses_in_half_precision(seed: int, method: str) -> None:
    check(method, torch.bfloat16, (18, 3), 5, padded=True)
    check(method, torch.float16, (3, 4), 5, padded=False)


@pytest.mark.parametrize("method", ["gan", "ct"])
def test_nothing_counts(seed: int, method: str) -> None:
    masks: list[Tensor | None] = [torch.ones(2, 4, dtype=torch.bool)] * 2
    results = loss_and_gradients(method, networks(method, 8), [torch.randn(2, 1, 4, 8)] * 2, masks)
    assert not any(x.any() for x in results)


@pytest.mark.parametrize("method", ["gan", "ct"])
def test_what_is_not_averaged_inside(seed: int, method: str) -> None:
    """reduction="none" takes the networks' kernels, and the loss of the definition."""
    nets, tokens = networks(method, 8), [torch.randn(2, 1, 4, 8) for _ in range(2)]
    each = al.alignment_loss(*tokens, method=method, **nets, reduction="none")
    assert each.shape == (2, 1)
    torch.testing.assert_close(each.mean(), al.alignment_loss(*tokens, method=method, **nets))


def test_autocast_and_other_implementations(seed: int) -> None:
    nets, tokens = networks("gan", 8), [torch.randn(1, 2, 4, 8) for _ in range(2)]
    results = []
    for name, cast in (("triton", False), ("triton", True), ("auto", False)):
        with dispatch.use_implementation(name), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            assert an.serves_triton(nets["discriminator"], *tokens) == (name == "triton")
            results.append(loss_and_gradients("gan", nets, tokens, [None, None]))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert_near(results[0], [x.double() for x in results[2]], [1e-5] * len(results[0]))


def second(method: str, nets: dict[str, nn.Module], tokens: list[Tensor], masks: list[Tensor | None]) -> list[Tensor]:
    query, key = (x.detach().requires_grad_() for x in tokens)
    leaves = [query, key, *(p for net in nets.values() for p in net.parameters())]
    loss = al.alignment_loss(query, key, masks[1], method, masks[0], **nets)
    (first,) = torch.autograd.grad(loss, query, create_graph=True)
    return [first, *torch.autograd.grad(first.square().sum(), leaves, materialize_grads=True)]


def test_second_derivatives(seed: int) -> None:
    nets, tokens = networks("gan", 8), [torch.randn(2, 2, n, 8) for n in (4, 5)]
    masks: list[Tensor | None] = [torch.rand(2, n) < 0.3 for n in (4, 5)]
    for mask in masks:
        mask[:, 0] = False
    ours = second("gan", nets, tokens, masks)
    with dispatch.use_implementation("plain"):
        wanted = second("gan", nets, tokens, masks)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        second("ct", networks("ct", 8), tokens, masks)


def test_what_the_kernels_do_not_take(seed: int) -> None:
    assert not an.serves_triton(an.Critic(8, 65), torch.randn(3, 8))
    assert not an.serves_triton(an.Critic(8, 6), torch.randn(3, 8).double())
    assert not an.serves_triton(an.Critic(8, 6), torch.randn(0, 8))
    assert not an.serves_triton(an.Critic(8, 6), torch.randn(3, 8), torch.randn(3, 8).bfloat16())
    assert alignment_triton.BLOCK == 16  # so that lengths above are more than one block


@pytest.mark.parametrize("method", ["gan", "ct"])
def test_not_a_number_stays_one(seed: int, method: str) -> None:
    nets, tokens = networks(method, 8), [torch.randn(2, 1, 4, 8) for _ in range(2)]
    tokens[0][0, 0, 0, 0] = float("nan")
    assert loss_and_gradients(method, nets, tokens, [None, None])[0].isnan()


def test_networks_in_other_places_are_computed_as_they_are(seed: int) -> None:
    """A critic that navigates is no mistake of shapes, and not what the fused loss is written for."""
    tokens = [torch.randn(2, 1, 4, 8) for _ in range(2)]
    for nets in (
        {"navigator": an.Critic(8, 5), "critic": an.Navigator(8, 5)},
        {"navigator": an.Critic(8, 5), "critic": an.Critic(8, 5)},
        {"navigator": an.Navigator(8, 5), "critic": an.Navigator(8, 5)},
    ):
        wide = {name: copy.deepcopy(net).double() for name, net in nets.items()}
        results = loss_and_gradients("ct", nets, tokens, [None, None])
        expected = loss_and_gradients("ct", wide, [x.double() for x in tokens], [None, None])
        assert_near(results[:3], expected[:3], [1e-5] * 3)


def test_second_derivatives_with_frozen_networks(seed: int) -> None:
    net = an.Discriminator(8, 5).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    assert an.serves_triton(net, x)
    (grad,) = torch.autograd.grad(an.apply_network(net, x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].isfinite().all()
