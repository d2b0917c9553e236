"""The fused selection: r keys a query, no T x S matrix, against loops in float64 and the plain form's gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnpatch.kernels import select, select_blocked
from attnpatch.kernels.dispatch import use_implementation
from attnpatch.kernels.score import attention_weights, kernel_attention
from attnpatch.kernels.select import top_r_weights, value_aware_weights
from attnpatch.pipeline import AttentionPipeline

KERNELS = [("softmax", 2), ("expressive", 2), ("polynomial", 2), ("polynomial", 4), ("elu", 2)]
CRITERIA = ["weight", "norm", "centered"]
MASKS = ["none", "bool", "keys", "float", "causal"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_blocked, "BLOCK_WEIGHTS", 900)


def attend(criterion: str, *tensors: Any, implementation: str = "blocked", **options: Any) -> Tensor:
    with use_implementation(implementation):
        if criterion == "weight":
            return select.top_r_attention(*tensors, **options)
        return select.value_aware_attention(*tensors, selector=criterion, **options)


def make_mask(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor | None, bool]:
    n_batch, _, n_query, n_key = shape
    if name == "bool":
        mask = torch.rand(n_batch, 1, n_query, n_key) < 0.6
        mask[0, 0, 0] = False
        return mask, False
    if name == "keys":
        length = torch.randint(1, n_key + 1, (n_batch, 1, 1, 1))
        return (torch.arange(n_key) < length).expand(n_batch, 1, n_query, n_key), False
    if name == "float":
        mask = torch.randn(shape, dtype=dtype).masked_fill(torch.rand(shape) < 0.3, -torch.inf)
        mask[0, 0, 1] = torch.finfo(dtype).min
        return mask, False
    return None, name == "causal"


def by_loop(criterion: str, inputs: list[Tensor], mask: Tensor | None, causal: bool, r: int, kernel: Any) -> np.ndarray:
    query, key, value = (x.detach().double().numpy() for x in inputs)
    shape = (*query.shape[:3], key.shape[2])
    prior = np.zeros(shape)
    if causal:
        prior[..., ~np.tri(*shape[2:], dtype=bool)] = -np.inf
    elif mask is not None:
        full = mask.expand(shape).numpy()
        prior = np.where(full, 0.0, -np.inf) if mask.dtype == torch.bool else full.astype(float)
    weights = oracles.attention_weights(query, key, prior, kernel=kernel[0], degree=kernel[1])
    output = np.zeros((*shape[:3], value.shape[-1]))
    for index in np.ndindex(*shape[:3]):
        row, v = weights[index], value[index[:2]]
        mean = v[row > 0].mean(axis=0) if criterion == "centered" and (row > 0).any() else 0.0
        distance = 1.0 if criterion == "weight" else np.linalg.norm(v - mean, axis=-1)
        output[index] = oracles.top_r(row, r, row * distance) @ v
    return output


def check(criterion: str, kernel: tuple[str, int], name: str, n_query: int, n_key: int, r: int) -> None:
    inputs = [torch.randn(2, 3, n, d, dtype=torch.float64) for n, d in ((n_query, 6), (n_key, 6), (n_key, 5))]
    inputs[2] += 3.0
    inputs = [x.requires_grad_() for x in inputs]
    mask, causal = make_mask(name, (2, 3, n_query, n_key), torch.float64)
    options: dict[str, Any] = {"r": r, "kernel": kernel[0], "degree": kernel[1]}
    output = attend(criterion, *inputs, mask, 0.0, causal, **options)
    np.testing.assert_allclose(
        output.detach().numpy(), by_loop(criterion, inputs, mask, causal, r, kernel), rtol=1e-9, atol=1e-11
    )
    plain = attend(criterion, *inputs, mask, 0.0, causal, implementation="plain", **options)
    given = torch.randn_like(output)
    for fast, exact in zip(*(torch.autograd.grad(x, inputs, given) for x in (output, plain)), strict=True):
        torch.testing.assert_close(fast, exact, rtol=1e-8, atol=1e-10 * (1.0 + float(exact.abs().max())))
    with torch.no_grad():
        assert torch.equal(attend(criterion, *inputs, mask, 0.0, causal, **options), output)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_the_loop(seed: int, criterion: str, kernel: tuple[str, int], mask: str) -> None:
    check(criterion, kernel, mask, 11, 23, 5)
    check(criterion, kernel, mask, 9, 9, 8)
    # Few of many keys: gathered, and summed by key.
    check(criterion, kernel, mask, 3, 110, 4)
    check(criterion, kernel, mask, 30, 24, 1)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ties_go_to_the_lower_index(seed: int, criterion: str) -> None:
    """Keys and values from a small set, so that equal weights and scores abound; zero values among them."""
    query, key = torch.randn(1, 2, 12, 4), torch.randint(0, 2, (1, 2, 32, 4)).float()
    value = torch.randint(0, 2, (1, 2, 32, 3)).float() * torch.arange(1.0, 33.0).view(1, 1, -1, 1).fmod(3.0)
    if criterion == "centered":
        # All values at one distance of their mean, and (by a power of two) nothing is rounded.
        value = torch.eye(32)[None, None].expand(1, 2, 32, 32).contiguous()
    for r in (1, 3, 7):
        fast = attend(criterion, query, key, value, r=r)
        torch.testing.assert_close(fast, attend(criterion, query, key, value, r=r, implementation="plain"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-18, 1e-6, 1e4, 1e12])
def test_any_magnitude(seed: int, kernel: tuple[str, int], magnitude: float) -> None:
    """Rows of zero strength, underflowing and huge scores, in float32 against float64."""
    query, key, value = torch.randn(1, 2, 7, 4) * magnitude, torch.randn(1, 2, 40, 4), torch.randn(1, 2, 40, 4)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    fixed = [x.detach() for x in inputs]
    wide = [x.double().requires_grad_() for x in fixed]
    options: dict[str, Any] = {"kernel": kernel[0], "degree": kernel[1]}
    # What is exponential in a score has the score's rounding for its relative error.
    scores = (fixed[0] @ fixed[1].mT).abs().max()
    rtol = 1e-3 + (1e-6 * float(scores) if kernel[0] in ("softmax", "elu") else 0.0)
    for criterion in CRITERIA:
        rule = select_blocked.Rule(*kernel, 1.0, False, 3, criterion, 0.0)
        _, weights, index = select_blocked.selected_forward(*fixed, None, None, rule, True)
        plain = attention_weights(*fixed[:2], scale=1.0, **options)
        chosen = (
            top_r_weights(plain, 3) if criterion == "weight" else value_aware_weights(plain, fixed[2], 3, criterion)
        )
        scattered = torch.zeros_like(plain).scatter(-1, index.long(), weights)
        torch.testing.assert_close(scattered, chosen, rtol=1e-4, atol=1e-6)
        # The exact gradient, over the keys that were chosen.
        output = attend(criterion, *inputs, scale=1.0, r=3, **options)
        exact = kernel_attention(*wide, scattered > 0, scale=1.0, implementation="plain", **options)
        given = torch.randn_like(output)
        fast = (output, *torch.autograd.grad(output, inputs, given))
        wanted = (exact, *torch.autograd.grad(exact, wide, given.double()))
        # A score's gradient is a difference of products with values, and next to nothing where one weight is all.
        rounding = 1e-6 * float(given.abs().max() * fixed[2].abs().max())
        floor = {"output": 0.0, "dq": rounding * float(fixed[1].abs().max()), "dk": rounding * magnitude, "dv": 0.0}
        for name, x, y in zip(("output", "dq", "dk", "dv"), fast, wanted, strict=True):
            largest = float(y.detach().abs().max())
            # Below the smallest weight of float32, and for rows that are uniform, a gradient is 0. Expressive weights
            # are uniform here but for a score that is small by cancellation, which float32 has few digits of.
            uniform = kernel[0] == "expressive" and magnitude > 1e8 and name in ("dq", "dk")
            if largest > 1e-30 and magnitude > 1e-12 and not uniform:
                torch.testing.assert_close(x.double(), y, rtol=rtol, atol=2e-4 * largest + floor[name])
            assert x.isfinite().all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nan_shows_and_hidden_keys_do_not(seed: int, criterion: str) -> None:
    query, key, value = (torch.randn(1, 1, 6, 4), torch.randn(1, 1, 30, 4), torch.randn(1, 1, 30, 4))
    broken = query.clone()
    broken[..., 2, 0] = torch.nan
    output = attend(criterion, broken, key, value, r=3)
    assert output[0, 0, 2].isnan().any()
    assert output[0, 0, [0, 1, 3, 4, 5]].isfinite().all()
    seen = torch.rand(1, 1, 6, 30) < 0.5
    seen[..., 7] = False
    before = attend(criterion, query, key, value, seen, r=3)
    # Not infinity or NaN: a weight of 0 does not hide those in a product with all keys, as in the plain form.
    for garbage in (1e4, -1e20):
        key[..., 7, :] = value[..., 7, :] = garbage
        assert torch.equal(before, attend(criterion, query, key, value, seen, r=3))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_dropout_drops_kept_weights_and_its_gradient(seed: int, criterion: str) -> None:
    query, key, value = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (9, 30, 30))
    inputs = [x.requires_grad_() for x in (query, key, value)]

    def run(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(criterion, *inputs, None, 0.4, r=5, kernel="expressive")

    assert torch.autograd.gradcheck(run, inputs)
    exact = attend(criterion, *inputs, r=5, kernel="expressive")
    many = torch.stack([attend(criterion, *inputs, None, 0.4, r=5, kernel="expressive") for _ in range(600)])
    spread = many.std(dim=0) / 600**0.5
    assert (((many.mean(dim=0) - exact).abs() / spread.clamp(min=1e-12)) < 6).all()
    assert not attend(criterion, *inputs, None, 1.0, r=5).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_strides_and_dimensions(seed: int, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, n, 3, 4).to(dtype).transpose(1, 2) for n in (8, 40, 40))
    for criterion in CRITERIA:
        output = attend(criterion, query, key, value, r=6)
        assert output.dtype == dtype
        plain = attend(criterion, query, key, value, r=6, implementation="plain")
        torch.testing.assert_close(output, plain)
        torch.testing.assert_close(attend(criterion, query[0], key[0], value[0], r=6), plain[0])
        torch.testing.assert_close(
            attend(criterion, query, key[:, :1], value[:, :1], r=6),
            attend(criterion, query, key[:, :1], value[:, :1], r=6, implementation="plain"),
        )


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("causal", [False, True])
def test_memory_does_not_grow_with_the_square(criterion: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the backward pass is O(T r), and nothing ever made is larger than that or a block."""
    monkeypatch.setattr(select_blocked, "BLOCK_WEIGHTS", 4096)
    tokens, r, width = 600, 4, 8
    inputs = [torch.randn(1, 2, tokens, width).requires_grad_() for _ in range(3)]
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = attend(criterion, *inputs, None, 0.1, causal, r=r)
    assert sum(kept) <= 2 * tokens * (3 * width + 3 * r)
    output.sum().backward()
    rule = select_blocked.Rule("expressive", 2, 1.0, causal, r, criterion, 0.0)
    with torch.no_grad(), _Largest() as largest:
        output, weights, index = select_blocked.selected_forward(*inputs, None, None, rule, True)
        select_blocked.selected_backward(output, *inputs, weights, index, None, rule)
    block = 4096 * torch.get_num_threads()
    assert 0 < largest.elements <= max(block, 2 * tokens * max(width, r))
    assert 2 * tokens * tokens > 10 * largest.elements or block > tokens * tokens / 10


def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    original = select.selected_attention_op

    def record(*arguments: Any) -> Any:
        taken.append(arguments[0].shape[2])
        return original(*arguments)

    monkeypatch.setattr(select, "selected_attention_op", record)
    short, long = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 64, 4)
    select.top_r_attention(long, long, long, r=2)
    assert taken == [64]
    select.top_r_attention(short, short, short, r=2)
    select.top_r_attention(long, long, long, r=64)
    bias = torch.zeros(64, 64, requires_grad=True)
    assert torch.autograd.grad(select.top_r_attention(long, long, long, bias, r=2).sum(), bias)[0].isfinite().all()
    select.top_r_attention(long, long.double(), long, r=2)
    with use_implementation("plain"):
        select.top_r_attention(long, long, long, r=2)
    with torch.no_grad():
        select.value_aware_attention(long, long, long, r=2)
    assert taken == [64]
    with use_implementation("blocked"):
        select.value_aware_attention(short, short, short, r=2, selector="norm")
    assert taken == [64, 8]
    for arguments, message in (({"kernel": "sofmax"}, "softmax"), ({"kernel": "polynomial", "degree": 3}, "degree")):
        with pytest.raises(ValueError, match=message):
            select.top_r_attention(long, long, long, r=2, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_forward_derivative_is_that_of_the_plain_form(seed: int, criterion: str) -> None:
    query, key, value, along = (torch.randn(1, 1, 40, 4, dtype=torch.float64) for _ in range(4))

    def run(query: Tensor) -> Tensor:
        return attend(criterion, query, key, value, r=3)

    _, forward = torch.func.jvp(run, (query,), (along,))
    query.requires_grad_()
    given = torch.randn_like(forward)
    (backward,) = torch.autograd.grad(run(query), query, given)
    torch.testing.assert_close((forward * given).sum(), (backward * along).sum())


@pytest.mark.parametrize("score", ["softmax", "expressive"])
def test_in_the_pipeline(seed: int, score: str) -> None:
    """Without weights to return the fused form is taken; it gives what the stages give one by one."""
    from attnpatch.methods.expressive import KernelScore
    from attnpatch.methods.value_aware import TopRSelection, ValueAwareSelection

    query, key, value = (torch.randn(2, 3, 40, 8) for _ in range(3))
    for stage in (TopRSelection(5), ValueAwareSelection(5, "norm", 0), ValueAwareSelection(5, "centered", 0)):
        pipeline = AttentionPipeline("encoder")
        pipeline.set_stage("select", stage)
        if score != "softmax":
            pipeline.set_stage("score", KernelScore(score, scale=2.0))
        exact, weights = pipeline(query, key, value, None, 0.0, True, 0.3, True)
        assert weights is not None
        fused, none = pipeline(query, key, value, None, 0.0, True, 0.3, False)
        assert none is None
        torch.testing.assert_close(fused, exact)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", CRITERIA)
def test_compiles_whole(seed: int, criterion: str) -> None:
    torch._dynamo.reset()
    inputs = [torch.randn(1, 2, 40, 4, requires_grad=True) for _ in range(3)]

    def run(*inputs: Tensor) -> Tensor:
        if criterion == "weight":
            return select.top_r_attention(*inputs, r=3)
        return select.value_aware_attention(*inputs, r=3, selector=criterion)

    results = [f(*inputs) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run)]
    grads = [torch.autograd.grad(x.square().sum(), inputs) for x in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*grads)
