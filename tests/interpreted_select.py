"""Selection fused in Triton, in Triton's interpreter, which needs no GPU: run by test_kernels_select_triton.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.language import standard
from triton.runtime import interpreter

from attnpatch.kernels import dispatch, select, select_triton
from attnpatch.kernels.score import attention_weights, default_scale
from attnpatch.kernels.select import top_r_weights, value_aware_weights
from attnpatch.kernels.select_blocked import Rule

KERNELS = [("softmax", 2), ("expressive", 2), ("polynomial", 4), ("elu", 2)]
CRITERIA = ["weight", "norm", "centered"]
MASKS = ["none", "bool", "padding", "bias", "causal"]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow that the kernels expect


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minimum and maximum of a number and NaN are the number on a GPU, unless they are told to propagate it."""
    for name, function in (("create_minnumf", np.fmin), ("create_maxnumf", np.fmax)):
        monkeypatch.setattr(
            interpreter.InterpreterBuilder,
            name,
            lambda self, a, b, function=function: self.binary_op(a, b, function),
        )


@pytest.fixture(autouse=True)
def fast_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter combines what a sort exchanges number by number, in Python: two thirds of these tests' time."""
    slow = interpreter.ReduceOps.generic_reduce

    def reduce(self: Any, input: Any) -> Any:
        if self.combine_fn is not standard._xor_combine:
            return slow(self, input)
        combined = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(combined, input[0].dtype)

    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce)


def attend(criterion: str, *tensors: Any, implementation: str = "triton", **options: Any) -> Tensor:
    with dispatch.use_implementation(implementation):
        if criterion == "weight":
            return select.top_r_attention(*tensors, **options)
        return select.value_aware_attention(*tensors, selector=criterion, **options)


def make_mask(name: str, n_queries: int, n_keys: int) -> tuple[Tensor | None, bool]:
    if name == "bool":
        mask = torch.rand(1, 1, n_queries, n_keys) < 0.5
        mask[0, 0, 0] = False
        return mask, False
    if name == "padding":
        return torch.arange(n_keys) < torch.tensor([n_keys // 2, 2]).view(1, 2, 1, 1), False
    if name == "bias":
        mask = torch.randn(1, 2, n_queries, n_keys)
        mask[torch.rand(mask.shape) < 0.3] = -torch.inf
        mask[0, 0, 0] = torch.finfo(torch.float32).min
        return mask, False
    return None, name == "causal"


def make_inputs(n_queries: int, n_keys: int, dim: int, value_dim: int, dtype: torch.dtype) -> list[Tensor]:
    inputs = [torch.randn(1, 2, n, d) for n, d in ((n_queries, dim), (n_keys, dim), (n_keys, value_dim))]
    inputs[2] += 1.0
    return [x.to(dtype) for x in inputs]


def exact_weights(rule: Rule, inputs: list[Tensor], mask: Tensor | None) -> Tensor:
    query, key, _ = (x.double() for x in inputs)
    given = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return attention_weights(query, key, given, rule.is_causal, rule.scale, rule.kernel, rule.degree)


def near_ties(rule: Rule, inputs: list[Tensor], mask: Tensor | None) -> bool:
    """Whether rounding may choose another key: the r-th best and the next differ by less than 1e-5."""
    score = exact_weights(rule, inputs, mask)
    if rule.criterion != "weight":
        score = select._value_scores(score, inputs[2].double(), rule.criterion == "centered")
    last, following = score.topk(rule.r + 1).values[..., -2:].unbind(-1)
    return bool(((last > 0) & (last - following < 1e-5 * last)).any())


def exact_keys(rule: Rule, inputs: list[Tensor], mask: Tensor | None) -> list[set[int]]:
    """The keys of each row that the plain form keeps in float64."""
    weights, value = exact_weights(rule, inputs, mask), inputs[2].double()
    if rule.criterion == "weight":
        kept = top_r_weights(weights, rule.r)
    else:
        kept = value_aware_weights(weights, value, rule.r, rule.criterion)
    return [set(row.nonzero()[:, 0].tolist()) for row in kept.flatten(0, -2)]


def keys_of(index: Tensor, n_keys: int) -> list[set[int]]:
    """Those in the lists that the kernels make; no key is in one twice."""
    rows = index.transpose(-1, -2).flatten(0, -2).tolist()
    found = [[i for i in row if i >= 0] for row in rows]
    assert all(len(set(row)) == len(row) and max(row, default=0) < n_keys for row in found)
    return [set(row) for row in found]


def chosen_keys(rule: Rule, inputs: list[Tensor], mask: Tensor | None = None) -> list[set[int]]:
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], inputs[1].shape[2])
    index = select_triton.selected_forward(*inputs, mask, None, rule, True)[2]
    return keys_of(index, inputs[1].shape[2])


def check(
    criterion: str,
    kernel: tuple[str, int],
    mask_name: str,
    shape: tuple[int, int, int, int],
    r: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Chosen keys, output and gradients against the plain form in float64, of the same rounded inputs."""
    mask, causal = make_mask(mask_name, *shape[:2])
    rule = Rule(*kernel, default_scale(kernel[0], shape[2]), causal, r, criterion, 0.0)
    inputs = make_inputs(*shape, dtype)
    while near_ties(rule, inputs, mask):
        inputs = make_inputs(*shape, dtype)
    output, *saved = select_triton.selected_forward(*inputs, mask, None, rule, True)
    assert keys_of(saved[1], shape[1]) == exact_keys(rule, inputs, mask)
    assert ((saved[1] >= 0) == (saved[0] > 0)).all()
    grad = torch.randn(output.shape).to(dtype)
    found = (output, *select_triton.selected_backward(grad, *inputs, None, *saved, rule))
    exact = [x.double().requires_grad_() for x in inputs]
    given = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    options: dict[str, Any] = {"r": r, "kernel": kernel[0], "degree": kernel[1], "is_causal": causal}
    wanted = attend(criterion, *exact, given, implementation="plain", **options)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, x, y in zip(
        ("output", "dq", "dk", "dv"), found, (wanted, *torch.autograd.grad(wanted, exact, grad.double())), strict=True
    ):
        assert x.dtype == dtype
        # The true gradient of a row that keeps one key is 0.
        error = float((x.double() - y).detach().norm())
        allowed = tolerance * max(float(y.detach().norm()), 1e-6)
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}"
    if mask_name in ("bool", "bias"):
        assert not found[0][0, 0, 0].any()
        assert not found[1][0, 0, 0].any()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k[0])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_the_plain_form(seed: int, criterion: str, kernel: tuple[str, int], mask: str) -> None:
    check(criterion, kernel, mask, (18, 34, 12, 12) if mask == "causal" else (9, 37, 12, 12), 3)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    ("shape", "r"),
    [((1, 33, 20, 12), 4), ((3, 50, 16, 33), 16), ((17, 9, 8, 8), 8), ((2, 5, 1, 1), 1), ((2, 40, 64, 8), 33)],
    ids=str,
)
def test_shapes(seed: int, criterion: str, shape: tuple[int, int, int, int], r: int) -> None:
    check(criterion, ("softmax" if shape[0] == 1 else "elu", 2), "none" if shape[0] <= 2 else "bool", shape, r)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("mask", ["causal", "bias"])
def test_half_precision(seed: int, criterion: str, dtype: torch.dtype, mask: str) -> None:
    check(criterion, ("expressive" if mask == "bias" else "softmax", 2), mask, (18, 35, 16, 16), 4, dtype)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ties_go_to_the_lower_index(seed: int, criterion: str) -> None:
    """Keys and values from a small set, so that equal weights and scores abound; zero values among them."""
    # Products without rounding: numpy's may differ from column to column.
    query, key = torch.randint(-20, 20, (1, 2, 12, 4)) / 8.0, torch.randint(0, 2, (1, 2, 64, 4)).float()
    value = torch.randint(0, 2, (1, 2, 64, 3)).float() * torch.arange(1.0, 65.0).view(1, 1, -1, 1).fmod(3.0)
    if criterion == "centered":
        # All values at one distance of their mean, and (by a power of two) nothing is rounded.
        value = torch.eye(64)[None, None].expand(1, 2, 64, 64).contiguous()
    for r in (1, 7, 40):
        # A score of 0 would be hidden from expressive's mean, and its count no power of two.
        for kernel in ("softmax", "expressive")[: 1 if criterion == "centered" else 2]:
            fast = attend(criterion, query, key, value, r=r, kernel=kernel)
            plain = attend(criterion, query, key, value, r=r, kernel=kernel, implementation="plain")
            torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("criterion", ["norm", "centered"])
def test_values_that_score_zero_are_ranked_by_weight(seed: int, criterion: str) -> None:
    """All of length 0, or all at their mean."""
    query, key, value = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    if criterion == "centered":
        value += 2.0
    rules = [Rule("softmax", 2, 0.3, False, 5, name, 0.0) for name in (criterion, "weight")]
    assert chosen_keys(rules[0], [query, key, value]) == exact_keys(rules[1], [query, key, value], None)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k[0])
@pytest.mark.parametrize("magnitude", [0.0, 1e-13, 1e12])
def test_any_magnitude(seed: int, kernel: tuple[str, int], magnitude: float) -> None:
    """Rows of zero strength, underflowing and huge scores."""
    inputs = [torch.randn(1, 1, 5, 4) * magnitude, torch.randn(1, 1, 40, 4), torch.randn(1, 1, 40, 4)]
    inputs[0][:, :, 1] /= max(magnitude, 1e-30)
    if kernel[0] == "softmax" and 0.0 < magnitude < 1.0:
        return  # its scores tell apart what the plain form's weights do not
    grad = torch.randn(1, 1, 5, 4)
    for criterion in CRITERIA:
        results = []
        for implementation in ("triton", "plain"):
            leaves = [x.detach().requires_grad_() for x in inputs]
            options: dict[str, Any] = {"scale": 1.0, "r": 3, "kernel": kernel[0], "degree": kernel[1]}
            output = attend(criterion, *leaves, implementation=implementation, **options)
            results.append((output, *torch.autograd.grad(output, leaves, grad)))
        for name, x, y in zip(("output", "dq", "dk", "dv"), *results, strict=True):
            assert x.isfinite().all(), name
            if magnitude <= 1.0 or name in ("output", "dv"):  # else weights of one: the gradient is rounding
                torch.testing.assert_close(x, y, rtol=2e-4, atol=1e-4 * float(y.detach().abs().max()) + 1e-30)


@pytest.mark.parametrize("kernel", ["softmax", "elu", "polynomial"])
def test_a_bias_may_leave_a_row_without_strength(seed: int, kernel: str) -> None:
    """Where the bias is large the kernel is 0, and the row is the bias alone; its gradient is 0."""
    query, key, value = (torch.randn(1, 1, n, 4) for n in (3, 40, 40))
    key[:, :, ::2] = 0.0
    bias = torch.zeros(1, 1, 3, 40)
    bias[..., ::2] = torch.arange(1.0, 21.0) + 150.0
    results = []
    for implementation in ("triton", "plain"):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        output = attend("centered", *leaves, bias, r=5, kernel=kernel, implementation=implementation)
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nan_shows(seed: int, criterion: str) -> None:
    for kernel in ("softmax", "elu"):
        tensors = [torch.randn(1, 1, 6, 4), torch.randn(1, 1, 40, 4), torch.randn(1, 1, 40, 4)]
        tensors[0][..., 2, 0] = torch.nan
        output = attend(criterion, *tensors, r=3, kernel=kernel)
        assert output[0, 0, 2].isnan().any()
        assert output[0, 0, [0, 1, 3, 4, 5]].isfinite().all()
        tensors[0][..., 2, 0] = 0.0
        tensors[1][..., 36, 1] = torch.nan
        assert attend(criterion, *tensors, r=3, kernel=kernel).isnan().any(-1).all()
        if criterion != "weight":
            tensors[1][..., 36, 1] = 0.0
            for broken in (torch.nan, torch.inf):
                tensors[2][..., 36, 1] = broken
                assert (~attend(criterion, *tensors, r=3, kernel=kernel).isfinite()).any(-1).all()


@pytest.mark.parametrize("garbage", [-1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_hidden_keys_do_not_show(seed: int, criterion: str, garbage: float) -> None:
    """Whatever they hold: no bit of the rows that do not see them changes, forward or backward."""
    query, key, value = make_inputs(20, 20, 8, 8, torch.float32)
    kernels = ["softmax", "expressive"] if garbage == torch.inf else ["softmax"]
    hole = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    hole[..., :19, 17:] = False
    bias = torch.randn(1, 1, 20, 20).masked_fill(~hole, -torch.inf)
    for kernel in kernels:
        for mask in (None, hole, bias)[: 3 if kernel == "softmax" else 1]:
            results = []
            for filling in (None, garbage):
                leaves = [x.clone() for x in (query, key, value)]
                if filling is not None:
                    leaves[1][:, :, 17:] = leaves[2][:, :, 17:] = filling
                leaves = [x.requires_grad_() for x in leaves]
                output = attend(criterion, *leaves, mask, is_causal=mask is None, r=4, kernel=kernel)
                seen = output[:, :, :17]
                grad = torch.autograd.grad(seen.square().sum(), leaves)
                assert not grad[1][:, :, 17:].any() or filling is not None
                results.append((seen, grad[0][:, :, :17]))
            for x, y in zip(*results, strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("offset", [30.0, 1e4])
@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_a_common_offset_of_the_values_is_taken_out(seed: int, offset: float, mask: str) -> None:
    inputs = make_inputs(18, 40, 8, 8, torch.float32)
    # Exact in float32 with the offset, and far from ties.
    inputs[2] = (inputs[2] * 64.0).round() / 64.0 + offset
    given, causal = make_mask(mask, 18, 40)
    rule = Rule("softmax", 2, 0.3, causal, 4, "centered", 0.0)
    different = sum(
        x != y for x, y in zip(chosen_keys(rule, inputs, given), exact_keys(rule, inputs, given), strict=True)
    )
    assert different <= (1 if offset < 100.0 else 2)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_dropout(seed: int, criterion: str) -> None:
    """Drops kept weights, others each time and the same for a seed; gradients are of what was dropped."""
    query, key, value = (torch.randn(1, 1, n, 8) for n in (48, 50, 50))
    value[..., 0] = 1.0
    options: dict[str, Any] = {"r": 4, "kernel": "expressive"}

    def run(seed: int, *tensors: Tensor, p: float = 0.4) -> Tensor:
        torch.manual_seed(seed)
        return attend(criterion, *tensors, None, p, **options)

    exact = attend(criterion, query, key, value, **options)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    first = run(1, *leaves)
    assert torch.equal(first, run(1, *leaves))
    assert not torch.equal(first, run(2, *leaves))
    assert abs(float(first[..., 0].detach().mean()) - 1.0) < 6 * (0.4 / 0.6 / 48) ** 0.5
    assert not torch.equal(first, exact)
    grad = torch.randn_like(first)
    found = torch.autograd.grad(first, leaves, grad)
    # The same kept weights, by hand.
    torch.manual_seed(1)
    kept = torch.empty(1, 1, 4, 48, dtype=torch.bool).bernoulli_(0.6)
    rule = Rule("expressive", 2, 1.0, False, 4, criterion, 0.4)
    index = select_triton.selected_forward(query, key, value, None, None, rule, True)[2].long()
    mask = torch.zeros(1, 1, 48, 50).scatter(-1, index.mT, 1.0)
    dropped = torch.zeros(1, 1, 48, 50).scatter(-1, index.mT, kept.mT.float() / 0.6)
    weights = attention_weights(query, key, mask.bool(), kernel="expressive") * dropped
    wanted = torch.autograd.grad(weights @ value, leaves, grad)
    torch.testing.assert_close(first, weights @ value, rtol=1e-4, atol=1e-5)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    nothing = run(1, *leaves, p=1.0)
    assert not nothing.any()
    assert not any(x.any() for x in torch.autograd.grad(nothing.sum(), leaves))


def test_strides_dimensions_and_broadcasts(seed: int) -> None:
    query, key, value = (torch.randn(2, n, 3, 8).transpose(1, 2) for n in (9, 40, 40))
    grad = torch.randn(9, 2, 3, 8).movedim(0, 2)
    key, value = key[:, :1], value[:1]
    mask = torch.rand(40) < 0.7
    for part in (lambda x: x, lambda x: x[0], lambda x: x[0, 0]):
        results = []
        for name in ("plain", "triton"):
            leaves = [part(x).detach().requires_grad_() for x in (query, key, value)]
            output = attend("centered", *leaves, mask, r=6, implementation=name)
            results.append((output, *torch.autograd.grad(output, leaves, part(grad))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    original = select_triton.selected_attention

    def record(*arguments: Any) -> Any:
        taken.append(arguments[0].shape[2])
        return original(*arguments)

    monkeypatch.setattr(select_triton, "selected_attention", record)
    x = torch.randn(1, 1, 8, 4)
    attend("weight", x, x, x, r=2)
    assert taken == [8]
    wide = torch.randn(1, 1, 8, 130)
    bias = torch.zeros(8, 8, requires_grad=True)
    attend("weight", x, x, x, r=8)
    attend("norm", x.double(), x.double(), x.double(), r=2)
    attend("norm", x, x, wide, r=2)
    attend("norm", wide, wide, x, r=2)
    assert torch.autograd.grad(attend("weight", x, x, x, bias, r=2).sum(), bias)[0].isfinite().all()
    long = torch.randn(1, 1, 300, 4)
    attend("weight", x, long, long, r=select_triton.MAX_R + 1)
    for name in ("auto", "blocked", "plain"):
        attend("norm", x, x, x, r=2, implementation=name)
    torch.func.jvp(lambda q: attend("weight", q, x, x, r=2), (x,), (x,))
    found = torch.func.grad(lambda q: attend("weight", q, x, x, r=2).square().sum())(x)
    assert taken == [8]
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(attend("weight", leaf, x, x, r=2).square().sum(), leaf)[0])
    assert taken == [8, 8]
    with dispatch.use_implementation("triton"):
        assert dispatch.describe()["top_r, value_aware on cpu"] == "fused (triton)"
        assert "float64" in str(dispatch.why_not_fused_selection(x.double(), x, 2))
        assert "r is 129" in str(dispatch.why_not_fused_selection(x, x, 129))
        assert "of value is 130" in str(dispatch.why_not_fused_selection(x, wide, 2))
    assert dispatch.describe()["top_r, value_aware on cpu"] == "blocked"
    for arguments, message in (({"kernel": "sofmax"}, "softmax"), ({"kernel": "polynomial", "degree": 3}, "degree")):
        with pytest.raises(ValueError, match=message):
            attend("weight", x, x, x, r=2, **arguments)


def test_no_second_derivative(seed: int) -> None:
    x = torch.randn(1, 1, 5, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(attend("weight", x, x, x, r=2).sum(), x, create_graph=True)


class _Operators(TorchDispatchMode):
    """The names of all operators, and the bytes of the largest tensor that any makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for x in result if isinstance(result, tuple) else (result,):
            self.largest = max(self.largest, x.numel() * x.element_size() if isinstance(x, Tensor) else 0)
        return result


def test_nothing_grows_with_the_square(seed: int) -> None:
    """Neither what is kept for the backward pass nor anything that is made; dispatch modes see an operator."""
    tokens, r, width = 100, 2, 4
    x = torch.randn(1, 1, tokens, width).requires_grad_()
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = attend("centered", x, x, x, None, 0.1, r=r, kernel="elu")
    assert sum(kept) <= tokens * (3 * width + 3 * r + 1)
    output.sum().backward()
    rule = Rule("elu", 2, 0.5, False, r, "centered", 0.0)
    with torch.no_grad(), _Operators() as seen:
        plain = attend("centered", x, x, x, r=r, kernel="elu")
        output, *rest = select_triton.selected_forward(x, x, x, None, None, rule, True)
        select_triton.selected_backward(output, x, x, x, None, *rest, rule)
    assert torch.equal(plain, output)
    assert 0 < seen.largest <= 4 * tokens * width
    assert any("triton_selected_attention" in name for name in seen.names)


def test_compiles_whole(seed: int) -> None:
    inputs = make_inputs(9, 35, 16, 16, torch.bfloat16)
    grad = torch.randn(1, 2, 9, 16).bfloat16()

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return select.value_aware_attention(query, key, value, r=3, selector="centered", kernel="elu")

    with dispatch.use_implementation("triton"):
        results = []
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in inputs]
            output = function(*leaves)
            results.append((output, *torch.autograd.grad(output, leaves, grad)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
