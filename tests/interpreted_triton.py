"""The Triton kernels in Triton's interpreter, which needs no GPU: run by test_kernels_score_triton.py."""

from __future__ import annotations

from typing import Any

import fast_cases
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from attnpatch.errors import SpecError
from attnpatch.kernels import dispatch, query_value, query_value_triton, score, score_triton

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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[3]])
def test_masks_as_models_give_them(seed: int, kernel: tuple[str, int], causal: bool) -> None:
    """Keys at the end, the beginning or both hidden, from all queries or causally: skipped, or summed without a mask.
    With holes, or one query that sees other keys, they are not."""
    lengths, begin = torch.tensor([5, 33, 70, 64, 0, 70, 70]), torch.tensor([0, 31, 32, 1, 0, 0, 0])
    n = 70
    n_queries = n if causal else 21
    place = torch.arange(n)
    seen = (place < lengths[:, None]) & (place >= begin[:, None])
    seen[5, 7] = False
    seen = seen[:, None, None].repeat(1, 1, n_queries, 1)
    if causal:
        seen &= torch.ones(n, n, dtype=torch.bool).tril()
    seen[6, 0, 11, 3] ^= True
    query, key, value = (torch.randn(7, 1, length, 16) for length in (n_queries, n, n))
    # Scores away from 0, as in fast_cases.check_against_oracle.
    query, key = query.abs() + 0.5, (key.abs() + 0.5) * torch.randn(n, 1).sign()
    inputs, grad = [query, key, value], torch.randn(7, 1, n_queries, 16)
    arguments = {"kernel": kernel[0], "degree": kernel[1], "scale": 0.1}
    wanted = fast_cases.run("plain", inputs, grad, torch.float64, attn_mask=seen, **arguments)
    for mask in (seen, seen[:, :, :1]) if not causal else (seen,):
        if mask.shape[2] == 1:
            wanted = fast_cases.run("plain", inputs, grad, torch.float64, attn_mask=mask, **arguments)
        found = fast_cases.run("triton", inputs, grad, torch.float32, attn_mask=mask, **arguments)
        for a, b in zip(found, wanted, strict=True):
            # The true gradient of a row that sees one key is 0.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    kinds = score_triton.mask_kinds(seen, n_queries)
    assert kinds is not None
    uniform, triangle = kinds[:, 0, :, 0].amin(-1), kinds[:, 0, :, 1].amin(-1)
    alike = [1, 1, 1, 1, 1, 0, 0] if not causal else [0, 0, 0, 0, 1, 0, 0]
    assert uniform.tolist() == alike
    assert triangle.tolist() == ([1, 1, 1, 1, 1, 0, 0] if causal else [0, 0, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e4, -0.5])
def test_any_scale(seed: int, scale: float) -> None:
    """Beyond what c = 1 / scale^2 can say in float32, too."""
    query, key, value = fast_cases.make_inputs(12, 20, 16, torch.float32)
    grad = torch.randn(2, 3, 12, 16)
    arguments = {"kernel": "expressive", "scale": scale}
    results, expected = (
        fast_cases.run(name, [query, key, value], grad, torch.float32, **arguments) for name in ("triton", "plain")
    )
    for what, (a, b) in enumerate(zip(results, expected, strict=True)):
        if scale != 1e4 or what in (0, 3):  # there every weight is one, and the gradient is rounding
            # Beside scores of 1e4 those near 0 are the rounding of their products.
            tolerance = 1e-3 if scale == 1e4 else 1e-4
            torch.testing.assert_close(a, b, rtol=tolerance, atol=0.1 * tolerance * float(b.abs().max()))


def test_dropped_weights_are_independent(seed: int) -> None:
    """Sums over rows and columns vary as sums of independent choices do; neighbours do not go together."""
    n_query, n_key, p = 96, 256, 0.3
    query, key = torch.randn(1, 4, n_query, 128), torch.randn(1, 4, n_key, 128)
    value = torch.eye(n_key).expand(1, 4, -1, -1)[..., :128]
    kept = []
    for part in (value[:, :, :, :128], value.roll(128, 2)):
        torch.manual_seed(seed)
        output = score.kernel_attention(query, key, part, None, p, kernel="elu", implementation="triton")
        kept.append(output != 0.0)
    x = (torch.cat(kept, -1).double() - (1.0 - p)) / (p * (1.0 - p)) ** 0.5  # mean 0, variance 1
    for dim, count in ((-1, n_key), (-2, n_query)):
        sums = x.sum(dim).square() / count
        assert abs(sums.mean() - 1.0) < 6.0 * (2.0 / sums.numel()) ** 0.5
    for shift in (1, 2, 8, 64):
        for a, b in ((x[..., shift:], x[..., :-shift]), (x[..., shift:, :], x[..., :-shift, :])):
            assert abs((a * b).mean()) < 6.0 / a.numel() ** 0.5
    heads = (x[:, 1:] * x[:, :-1]).mean()
    assert abs(heads) < 6.0 / x[:, 1:].numel() ** 0.5


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minimum and maximum of a number and NaN are the number on a GPU, unless they are told to propagate it."""
    for name, function in (("create_minnumf", np.fmin), ("create_maxnumf", np.fmax)):
        monkeypatch.setattr(
            interpreter.InterpreterBuilder,
            name,
            lambda self, a, b, function=function: self.binary_op(a, b, function),
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("where", ["query", "key"])
def test_not_a_number_stays_one(seed: int, as_on_a_gpu: None, kernel: tuple[str, int], where: str) -> None:
    tensors = dict(zip(("query", "key", "value"), fast_cases.make_inputs(5, 20, 8, torch.float32), strict=True))
    tensors[where][0, 0, 3, 2] = float("nan")
    found = [
        score.kernel_attention(*tensors.values(), kernel=kernel[0], degree=kernel[1], implementation=name)
        for name in ("plain", "triton")
    ]
    assert torch.equal(found[0].isnan().any(-1), found[1].isnan().any(-1))
    assert found[0].isnan().any()


def test_shapes_that_do_not_fit(seed: int) -> None:
    query, key, value = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
    for wrong in ((query, key[..., :8], value), (query, key, value[:, :, :4]), (query[..., :8], key, value)):
        with pytest.raises(SpecError, match="one"):
            score.kernel_attention(*wrong, kernel="expressive", implementation="triton")


def test_transforms_take_the_plain_form(seed: int) -> None:
    x = torch.randn(1, 1, 5, 8)

    def loss(query: torch.Tensor) -> torch.Tensor:
        return score.expressive_attention(query, x, x).square().sum()

    with dispatch.use_implementation("auto"):
        found = torch.func.grad(loss)(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(loss(leaf), leaf)[0])
    with dispatch.use_implementation("triton"), pytest.raises(SpecError, match="transforms of torch"):
        torch.func.grad(loss)(x)


@pytest.mark.parametrize("tanh", [False, True])
def test_every_head_size_has_block_sizes(tanh: bool) -> None:
    """Of the pairwise sum; in the interpreter there is one size for all."""
    for dim in range(1, 129):
        block_d = query_value_triton._block_d(dim)
        for sizes in (query_value_triton._FORWARD, query_value_triton._BACKWARD):
            assert any(query_value_triton._fits(size, block_d, tanh) for size in sizes)
            configs = [query_value_triton._config(size) for size in sizes]
            for length in (1, 32, 512):
                lengths = {"n_queries": length, "n_keys": 1}
                assert query_value_triton._prune(configs, lengths, BLOCK_D=block_d, TANH=tanh)


def test_no_second_derivative(seed: int) -> None:
    x = torch.randn(1, 1, 5, 8, requires_grad=True)
    output = score.kernel_attention(x, x, x, kernel="expressive", implementation="triton")
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


def test_seen_by_dispatch_modes(seed: int) -> None:
    """Counters and selective checkpointing see an operator, which eager calls otherwise go without."""
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 1, 5, 8)
    plain = score.kernel_attention(x, x, x, kernel="expressive", implementation="triton")
    with Mode():
        assert torch.equal(plain, score.kernel_attention(x, x, x, kernel="expressive", implementation="triton"))
    assert any("triton_attention" in name for name in seen)


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


def pairwise_sum(
    a: Tensor, v: Tensor, gate_q: Tensor, gate_v: Tensor, mix_q: Tensor | None = None, mix_v: Tensor | None = None
) -> Tensor:
    """The definition, with the [N, T, S, D] tensors written out."""
    gate = torch.sigmoid(gate_q.unsqueeze(2) + gate_v.unsqueeze(1))
    f = v.unsqueeze(1)
    if mix_q is not None and mix_v is not None:
        f = torch.tanh(mix_q.unsqueeze(2) + mix_v.unsqueeze(1)) - f
    return (a.unsqueeze(-1) * gate * f).sum(2)


def pairwise_inputs(n_queries: int, n_keys: int, dim: int, phi: str) -> list[Tensor]:
    weights = torch.softmax(torch.randn(2, n_queries, n_keys), -1)
    count = 5 if phi == "tanh" else 3
    return [weights, *(torch.randn(2, n, dim) for n in (n_keys, n_queries, n_keys, n_queries, n_keys)[:count])]


def check_pairwise_sum(inputs: list[Tensor], absolute: float = 0.0) -> None:
    """Fused, output and gradients, against the definition in float64; `absolute` for what is 0 in float32."""
    results = []
    grad = torch.randn(inputs[2].shape)
    for exact in (False, True):
        leaves = [(x.double() if exact else x).detach().requires_grad_() for x in inputs]
        padded = [*leaves, *[None] * (6 - len(leaves))]
        out = pairwise_sum(*leaves) if exact else query_value_triton.gated_value_sum(*padded)
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))))
    for name, x, y in zip(("output", "a", "v", "gate_q", "gate_v", "mix_q", "mix_v"), *results, strict=False):
        # Triton's interpreter rounds to bfloat16 towards zero.
        allowed = (1e-5 if x.dtype == torch.float32 else 8e-3) * y.norm() + absolute
        error = (x.double() - y).norm()
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}"


PHIS = pytest.mark.parametrize("phi", ["product", "tanh"])


@PHIS
@pytest.mark.parametrize(
    ("n_queries", "n_keys", "dim"), [(19, 21, 64), (1, 9, 20), (17, 1, 8), (5, 18, 128), (18, 6, 80)]
)
def test_pairwise_sum(
    seed: int, monkeypatch: pytest.MonkeyPatch, phi: str, n_queries: int, n_keys: int, dim: int
) -> None:
    inputs = pairwise_inputs(n_queries, n_keys, dim, phi)
    if dim == 64:
        # Rows without a visible key, weights of any strides.
        inputs[0][:, 3] = 0.0
        inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    if dim == 20:
        inputs[0] = inputs[0].bfloat16()
    if dim == 80:
        monkeypatch.setenv("ATTNPATCH_TUNE", "0")
    check_pairwise_sum(inputs)


@PHIS
@pytest.mark.parametrize("kind", ["large", "larger", "opposite", "spread", "shut", "open", "far"])
def test_pairwise_sum_of_any_gates(seed: int, phi: str, kind: str) -> None:
    """Whether their exponentials can be multiplied or not."""
    inputs = pairwise_inputs(7, 6, 16, phi)
    gate_q, gate_v = inputs[2:4]
    if kind in ("large", "larger"):
        for x in inputs[2:]:
            x *= 20.0 if kind == "large" else 1e4
    elif kind == "opposite":
        gate_q += 100.0 + torch.arange(16.0) * 50
        gate_v -= 100.0 + torch.arange(16.0) * 50
    elif kind == "spread":
        gate_q[:, ::2], gate_v[:, ::2] = 100.0, -100.0
        gate_q[:, 1::2], gate_v[:, 1::2] = -100.0, 100.0
    else:
        gate_q += {"shut": -35.0, "open": 40.0, "far": -60.0}[kind]
    check_pairwise_sum(inputs, 1e-6 if kind in ("larger", "open") else 0.0)


@PHIS
def test_pairwise_sum_is_saturated_exactly(seed: int, phi: str) -> None:
    inputs = pairwise_inputs(4, 5, 8, phi)
    for gate, wanted in ((1e4, 1.0), (-1e4, 0.0)):
        inputs[2], inputs[3] = torch.full_like(inputs[2], gate), torch.zeros_like(inputs[3])
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = query_value_triton.gated_value_sum(*leaves, *[None] * (6 - len(inputs)))
        mixed = pairwise_sum(leaves[0], leaves[1], leaves[2] * 0 + 1e4, *leaves[3:])
        torch.testing.assert_close(out, wanted * mixed, rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert all(x.isfinite().all() for x in gradients)
        assert not gradients[2].any()


@PHIS
@pytest.mark.parametrize("garbage", [1e4, -1e4, 3e38])
def test_pairwise_sum_without_hidden_keys(seed: int, phi: str, garbage: float) -> None:
    """A key of weight 0 has no influence, whatever finite numbers its value and what is made of it hold."""
    results = []
    clean = pairwise_inputs(6, 9, 16, phi)
    clean[0][..., 6:] = 0.0
    for filling in (0.0, garbage):
        inputs = [x.clone() for x in clean]
        for i in (1, 3, 5)[: 3 if phi == "tanh" else 2]:
            inputs[i][:, 6:] = filling
        leaves = [x.requires_grad_() for x in inputs]
        out = query_value_triton.gated_value_sum(*leaves, *[None] * (6 - len(leaves)))
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        assert not any(gradients[i][:, 6:].any() for i in (1, 3, 5)[: len(leaves) // 2])
        results.append((out, gradients[0][..., :6], *(g[:, :6] for g in gradients[1:])))
    for x, y in zip(*results, strict=True):
        assert y.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_pairwise_attention_takes_the_fused_sum(seed: int) -> None:
    """The same as blocks of torch operations, whole and compiled; not where it cannot serve."""
    tensors = [torch.randn(1, 2, 7, 8).requires_grad_() for _ in range(3)]
    gates = [torch.randn(shape).requires_grad_() for shape in ((2, 8, 8), (2, 8, 8), (2, 8), (2,))]
    names = ("gate_query", "gate_value", "gate_bias", "strength")
    calls: list[int] = []
    inner = query_value_triton.gated_value_sum

    def attend(*leaves: Tensor, block: int | None = None) -> Tensor:
        parameters = dict(zip(names, leaves[3:], strict=True))
        return query_value.query_value_attention(*leaves[:3], is_causal=True, **parameters, block=block)

    def counted(*arguments: Tensor | None) -> Tensor:
        calls.append(1)
        return inner(*arguments)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query_value_triton, "gated_value_sum", counted)
        attend(*tensors, *gates)
        assert not calls  # on a CPU only where it is asked for
        with dispatch.use_implementation("triton"):
            assert "fused" in str(dispatch.describe()["query_value on cpu"])
            for block in (None, 3):
                out = attend(*tensors, *gates, block=block)
                results.append((out, *torch.autograd.grad(out.sum(), [*tensors, *gates])))
            attend(*(x.double() for x in (*tensors, *gates)))
            assert len(calls) == 1
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(attend(*tensors, *gates).sum(), gates, create_graph=True)
            with torch.no_grad():
                torch.testing.assert_close(attend(*tensors, *gates), results[0][0], rtol=0, atol=1e-7)
    with dispatch.use_implementation("triton"):
        out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors, *gates)
        results.append((out, *torch.autograd.grad(out.sum(), [*tensors, *gates])))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
