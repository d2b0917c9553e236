"""The blocked form, FlexAttention and the choice between them, against loops and the plain form in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fast_cases
import models
import numpy as np
import oracles
import pytest
import torch

from attnpatch.errors import SpecError
from attnpatch.kernels import compiled, dispatch, score, score_blocked, score_native

KERNELS = [pytest.param(k, id=f"{k[0]}{k[1]}") for k in fast_cases.KERNELS]
SIZES = [(1, 1), (1, 70), (70, 1), (37, 53), (64, 64), (90, 33), (33, 90)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small test has several blocks and a remainder in both directions, and the loop in C where it can."""
    monkeypatch.setattr(score_blocked, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(score_blocked, "BLOCK_KEYS", 32)
    monkeypatch.setattr(score_blocked, "COMPILED_FROM", 0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", fast_cases.MASKS)
@pytest.mark.parametrize("size", SIZES)
def test_blocked(seed: int, kernel: tuple[str, int], mask: str, size: tuple[int, int]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        fast_cases.check_against_oracle("blocked", kernel, mask, size, 5, dtype)


@pytest.mark.parametrize("kernel", [("expressive", 2), ("polynomial", 2)])
@pytest.mark.parametrize("mask", ["causal", "heads"])
def test_blocked_without_the_compiled_loop(
    seed: int, monkeypatch: pytest.MonkeyPatch, kernel: tuple[str, int], mask: str
) -> None:
    monkeypatch.setattr(score_blocked, "COMPILED_FROM", 2**62)
    for dtype in (torch.float32, torch.bfloat16):
        fast_cases.check_against_oracle("blocked", kernel, mask, (37, 53), 5, dtype)
    fast_cases.check_magnitudes("blocked", kernel, 1e19, (40, 70))


@pytest.mark.skipif(compiled.unwanted() is not None, reason=f"no compiled loop: {compiled.unwanted()}")
@pytest.mark.parametrize("processor", ["this", "haswell", "x86-64"])
@pytest.mark.parametrize("name", score_native.KERNELS)
def test_the_compiled_loop(
    seed: int, monkeypatch: pytest.MonkeyPatch, name: str, processor: str, tmp_path: Path
) -> None:
    """Built anew into an empty folder; each function against float64; and denormal numbers still exist."""
    if processor != "this":
        if not compiled._X86 or (processor == "haswell" and torch.backends.cpu.get_cpu_capability() == "DEFAULT"):
            pytest.skip(f"this processor is no {processor}")
        monkeypatch.setattr(compiled, "COMPILE", (*compiled.COMPILE, f"-march={processor}"))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    loop = score_native.Native(compiled.load("score_native", tmp_path), name)
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
    # Next to where z * z overflows.
    huge = torch.tensor([[[9e18, 1e19, -1.5e19, 1.8e19]]]).repeat(1, 1, 40)
    strength, sums = huge.clone(), torch.empty(1, 1)
    loop.forward(strength, sums)
    wanted = torch.ones(()) if name == "expressive" else huge.square()
    torch.testing.assert_close(strength, wanted.expand_as(huge), rtol=1e-6, atol=0.0)
    z, inner = (torch.randn(2, 7, 131) * 10.0 ** torch.randint(-8, 5, (2, 7, 1)) for _ in range(2))
    exact = z.double().requires_grad_()
    f = exact.square() / (1.0 + exact.square()) if name == "expressive" else exact.square()
    (slope,) = torch.autograd.grad(f.sum(), exact)
    strength, sums = z.clone(), torch.empty(2, 7)
    loop.forward(strength, sums)
    torch.testing.assert_close(strength.double(), f.detach(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(sums.double(), f.detach().sum(-1), rtol=1e-5, atol=0.0)
    strength, gradient = z.clone(), inner.clone()
    loop.backward(strength, gradient)
    torch.testing.assert_close(strength.double(), f.detach(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), inner.double() * slope / 2.0, rtol=2e-6, atol=0.0)
    assert (torch.tensor(1e-40) * 0.5).item() > 0.0


needs_whole_attention = pytest.mark.skipif(
    compiled.unwanted() is not None or score_native.products() is None,
    reason="torch has no MKL, or there is no C compiler",
)


@needs_whole_attention
@pytest.mark.parametrize("mask", fast_cases.MASKS)
@pytest.mark.parametrize("kernel", [("expressive", 2), ("polynomial", 2)])
def test_whole_attention_in_compiled_code(
    seed: int, monkeypatch: pytest.MonkeyPatch, kernel: tuple[str, int], mask: str
) -> None:
    """It is what computes; the number of threads changes no bit; and from a thread of Python it is the same."""
    taken = []
    run = score_native.Native._run
    monkeypatch.setattr(score_native.Native, "_run", staticmethod(lambda *x: (taken.append(x[0].__name__), run(*x))[1]))
    inputs = fast_cases.make_inputs(37, 90, 8, torch.float32)
    arguments = {**fast_cases.make_mask(mask, 37, 90), "kernel": kernel[0], "degree": kernel[1]}
    grad = torch.randn(2, 3, 37, 8)

    def attend() -> tuple[torch.Tensor, ...]:
        return fast_cases.run("blocked", inputs, grad, torch.float32, **arguments)

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attend())
    finally:
        torch.set_num_threads(before)
    assert taken == [f"{kernel[0]}_attend", f"{kernel[0]}_attend_backward"] * 3
    with ThreadPoolExecutor(1) as pool:
        found.append(pool.submit(attend).result())
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(compiled.unwanted() is not None, reason=f"no compiled code: {compiled.unwanted()}")
def test_a_damaged_library_is_built_anew(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from attnpatch.kernels import compiled\n"
        "print(compiled.load('score_native', Path(sys.argv[1])).expressive_attend)"
    )
    # Never in this process: a library that is cut off while it is loaded kills it.
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:9000], b"", b"x" * len(whole)):
        path.write_bytes(damaged)
        subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True)
        assert path.stat().st_size == len(whole)
        assert path.read_bytes()[:4] == whole[:4]


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_what_a_row_that_sees_no_key_holds(seed: int, garbage: float) -> None:
    """Its query and its output's gradient reach no gradient."""
    query, key, value = fast_cases.make_inputs(37, 90, 8, torch.float32)
    seen = torch.rand(2, 3, 37, 90) < 0.7
    seen[:, :, 5] = False
    grad = torch.randn(2, 3, 37, 8)
    arguments: dict[str, Any] = {"attn_mask": seen, "kernel": "expressive"}
    wanted = fast_cases.run("blocked", [query, key, value], grad, torch.float32, **arguments)
    query[:, :, 5] = grad[:, :, 5] = garbage
    found = fast_cases.run("blocked", [query, key, value], grad, torch.float32, **arguments)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_repaired_rows_in_a_backward_pass_under_autocast(seed: int) -> None:
    inputs = fast_cases.make_inputs(37, 90, 8, torch.float32)
    inputs[0] *= 1e-16
    leaves = [x.requires_grad_() for x in inputs]
    output = score.kernel_attention(*leaves, kernel="expressive", implementation="blocked")  # type: ignore[arg-type]
    grad = torch.randn_like(output)
    outside = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(output, leaves, grad)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mask", fast_cases.MASKS)
def test_without_the_products_of_mkl(seed: int, monkeypatch: pytest.MonkeyPatch, mask: str) -> None:
    monkeypatch.setattr(score_native, "products", lambda: None)
    monkeypatch.setattr(score_native.Native, "_run", None)
    for kernel in (("expressive", 2), ("polynomial", 2)):
        fast_cases.check_against_oracle("blocked", kernel, mask, (37, 90), 5, torch.float32)
        fast_cases.check_magnitudes("blocked", kernel, 1e19, (40, 70))
    if compiled.unwanted() is None:
        assert "torch has no MKL" in str(dispatch.describe()["compiled code of blocked"])


@needs_whole_attention
def test_more_threads_than_heads(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass shares out heads: with fewer of them than threads it goes from block to block."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(score_native.Native, "attend_backward", None)
    fast_cases.check_against_oracle("blocked", ("expressive", 2), "heads", (37, 90), 5, torch.float32)


@pytest.fixture
def builds_anew() -> Iterator[None]:
    compiled.library.cache_clear()
    yield
    compiled.library.cache_clear()


def test_no_compiled_loop(monkeypatch: pytest.MonkeyPatch, builds_anew: None) -> None:
    """A compiler that fails, or none, is no error."""
    for compiler in ("/bin/false", None):
        compiled.library.cache_clear()
        monkeypatch.setattr(compiled, "_compiler", lambda compiler=compiler: compiler)
        assert score_native.native.__wrapped__("expressive", 2, torch.float32) is None
        assert ("/bin/false" if compiler else "no C compiler") in str(compiled.why_not("score_native"))
    compiled.library.cache_clear()
    monkeypatch.setenv(compiled.VARIABLE, "0")
    assert compiled.VARIABLE in str(compiled.why_not("score_native"))
    compiled.library.cache_clear()
    monkeypatch.setenv(compiled.VARIABLE, "no")
    with pytest.raises(SpecError, match="'no'; it takes 1"):
        score_native.native.__wrapped__("expressive", 2, torch.float32)


def test_the_compilers_own_error_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builds_anew: None) -> None:
    """The real compiler on a source that is no C."""
    (tmp_path / "score_native.c").write_text("int x = nonsense_here;")
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    if compiled.unwanted() is not None:
        pytest.skip(str(compiled.unwanted()))
    assert "nonsense_here" in str(compiled.why_not("score_native"))
    assert "nonsense_here" in str(dispatch.describe()["compiled code of blocked"])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("implementation", ["blocked", "flex"])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "heads"])
@torch.no_grad()
def test_equals_the_loops(seed: int, implementation: str, kernel: tuple[str, int], mask: str) -> None:
    query, key, value = fast_cases.make_inputs(19, 40, 16, torch.float32)
    arguments = fast_cases.make_mask(mask, 19, 40)
    seen = arguments.get("attn_mask", torch.ones(19, 40, dtype=torch.bool))
    seen = (seen.tril() if "is_causal" in arguments else seen).expand(2, 3, 19, 40)
    prior = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -np.inf)
    weights = oracles.attention_weights(
        query.double().numpy(), key.double().numpy(), prior.numpy(), 0.4, kernel=kernel[0], degree=kernel[1]
    )
    output = score.kernel_attention(
        query, key, value, scale=0.4, kernel=kernel[0], degree=kernel[1], implementation=implementation, **arguments
    )
    np.testing.assert_allclose(output.numpy(), weights @ value.double().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-22, 1e-13, 1e-6, 1e8, 1e19])
def test_blocked_at_any_magnitude(seed: int, kernel: tuple[str, int], magnitude: float) -> None:
    fast_cases.check_magnitudes("blocked", kernel, magnitude, (40, 70))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocked_ignores_hidden_keys(seed: int, kernel: tuple[str, int], dtype: torch.dtype) -> None:
    fast_cases.check_hidden_keys("blocked", kernel, dtype, 70)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_blocked_dropout(seed: int, kernel: tuple[str, int], p: float) -> None:
    fast_cases.check_dropout("blocked", kernel, (40, 48), p)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocked_dropout_of_repaired_rows(seed: int, kernel: tuple[str, int]) -> None:
    """Rows that the plain form computes lose the same weights forward and backward."""
    query, key = torch.zeros(1, 1, 20, 8), torch.randn(1, 1, 70, 8)
    query[:, :, ::2] = torch.randn(10, 8) * 1e-20
    value = torch.eye(70)[None, None].requires_grad_()
    arguments: dict[str, Any] = {"kernel": kernel[0], "degree": kernel[1]}
    output = score.kernel_attention(query, key, value, None, 0.5, implementation="blocked", **arguments)
    kept = output.detach() != 0
    assert 0.4 < kept.double().mean() < 0.6
    expected = (score.attention_weights(query, key, **arguments) * kept * 2.0) @ value
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)
    grad = torch.randn_like(output)
    found, wanted = (torch.autograd.grad(x, value, grad)[0] for x in (output, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_blocked_gradcheck(seed: int, kernel: tuple[str, int], mask: str) -> None:
    leaves = [torch.randn(1, 2, n, 3, dtype=torch.float64).requires_grad_() for n in (18, 35, 35)]
    arguments = fast_cases.make_mask(mask, 18, 35, heads=2)
    if "attn_mask" in arguments:
        arguments["attn_mask"] = arguments["attn_mask"][:1]

    def run(*x: torch.Tensor) -> torch.Tensor:
        return score.kernel_attention(*x, kernel=kernel[0], degree=kernel[1], implementation="blocked", **arguments)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocked_strides_and_dimensions(seed: int, kernel: tuple[str, int]) -> None:
    """Heads beside features in memory, broadcast keys, slices, and fewer than 4 dimensions."""
    query = torch.randn(2, 40, 3, 6).transpose(1, 2).requires_grad_()
    key = torch.randn(1, 1, 50, 12)[..., ::2].expand(2, 3, 50, 6).requires_grad_()
    value = torch.randn(2, 50, 3, 9)[..., 2:].transpose(1, 2).requires_grad_()
    arguments: dict[str, Any] = {"kernel": kernel[0], "degree": kernel[1]}
    results = []
    for name in ("plain", "blocked"):
        output = score.kernel_attention(query, key, value, implementation=name, **arguments)
        grad = torch.ones(2, 40, 3, 7).cumsum(-1).transpose(1, 2)
        results.append((output, *torch.autograd.grad(output, (query, key, value), grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for index in (0, (0, 1)):
        q, k, v = (x[index].detach() for x in (query, key, value))
        mask = torch.rand(40, 50) < 0.5
        output = score.kernel_attention(q, k, v, mask, implementation="blocked", **arguments)
        torch.testing.assert_close(output, score.kernel_attention(q, k, v, mask, implementation="plain", **arguments))


def test_memory_does_not_grow_with_the_square(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that the blocked form makes is larger than its inputs or a block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return result

    monkeypatch.undo()
    query, key, value = (torch.randn(1, 2, 3000, 16) for _ in range(3))
    rule = score_blocked.Rule("expressive", 2, 1.0, True, 0.1, 3)
    with Watch():
        output, residual, sums = score_blocked.blocked_forward(query, key, value, None, rule, True)
        score_blocked.blocked_backward(output, query, key, value, None, output, residual, sums, rule)
    block = 4 * score_blocked.BLOCK_QUERIES * score_blocked.BLOCK_KEYS
    assert largest <= max(block, query.untyped_storage().nbytes())


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocked_compiles_whole(seed: int, kernel: tuple[str, int]) -> None:
    torch._dynamo.reset()
    inputs = fast_cases.make_inputs(40, 50, 8, torch.float32)
    grad = torch.randn(2, 3, 40, 8)

    def attend(query: Any, key: Any, value: Any, mask: Any) -> Any:
        return score.kernel_attention(query, key, value, mask, kernel=kernel[0], degree=kernel[1])

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    mask = torch.rand(2, 1, 40, 50) < 0.5
    with dispatch.use_implementation("blocked"):
        results = []
        for function in (attend, compiled):
            leaves = [x.clone().requires_grad_() for x in inputs]
            output = function(*leaves, mask)
            results.append((output, *torch.autograd.grad(output, leaves, grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which implementations are called."""
    called: list[str] = []

    def record(name: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(dispatch, "plain_attention", record("plain", dispatch.plain_attention))
    monkeypatch.setattr(dispatch, "blocked_attention_op", record("blocked", dispatch.blocked_attention_op))
    return called


def test_the_choice(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called = spy(monkeypatch)
    small, large = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 64, 4)
    score.expressive_attention(small, small, small)
    score.expressive_attention(large, large, large)
    score.kernel_attention(large, large, large)  # softmax
    score.elu_attention(large, large, large, torch.zeros(64, 64))
    score.polynomial_attention(large, large, large, torch.ones(64, 64).bool())
    assert called == ["plain", "blocked", "plain", "plain", "blocked"]
    called.clear()
    with dispatch.use_implementation("blocked"):
        score.expressive_attention(small, small, small)
        score.kernel_attention(small, small, small)
        with dispatch.use_implementation("plain"):
            score.expressive_attention(large, large, large)
        score.expressive_attention(small, small, small)
    score.expressive_attention(small, small, small)
    assert called == ["blocked", "plain", "plain", "blocked", "plain"]


def test_a_choice_that_cannot_serve() -> None:
    x = torch.zeros(1, 1, 4, 3)
    call = score.kernel_attention
    refusals: list[tuple[str, dict[str, Any], str]] = [
        ("blocked", {"attn_mask": torch.zeros(4, 4)}, "float32.*takes bool"),
        ("blocked", {"dropout_p": 1.0}, "less than 1"),
        ("blocked", {"kernel": "softmax"}, "no softmax"),
        ("flex", {"dropout_p": 0.1}, "no dropout"),
        ("bloked", {}, "'bloked'.*'blocked'"),
    ]
    if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        refusals.append(("triton", {}, "CUDA|not installed"))
    for name, arguments, message in refusals:
        with pytest.raises(SpecError, match=message):
            call(x, x, x, **({"kernel": "expressive"} | arguments), implementation=name)
    with pytest.raises(SpecError, match="no gradient"):
        call(x.clone().requires_grad_(), x, x, kernel="elu", implementation="flex")
    with pytest.raises(SpecError, match="'plane'"), dispatch.use_implementation("plane"):
        pass
    with pytest.raises(SpecError, match=r"\(3, 4\)"):
        call(x, x, x, torch.ones(3, 4).bool(), kernel="elu", implementation="blocked")


def test_the_environment_variable() -> None:
    code = (
        "import torch, attnpatch.functional as f; x = torch.zeros(1, 1, 2, 2)\n"
        "try: print(f.expressive_attention(x, x, x, torch.zeros(2, 2)).shape)\n"
        "except ValueError as e: print(e)"
    )
    for value, expected in (("blocked", "takes bool"), ("blokced", "ATTNPATCH_KERNEL"), ("", "torch.Size")):
        environment = os.environ | {dispatch.VARIABLE: value}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert expected in run.stdout, run.stdout


@pytest.mark.parametrize("spec", ["expressive", "polynomial", "elu"])
@pytest.mark.parametrize("name", ["RobertaModel", "BertLMHeadModel"])
@pytest.mark.parametrize("padded", [True, False])
def test_patched_models(seed: int, monkeypatch: pytest.MonkeyPatch, spec: str, name: str, padded: bool) -> None:
    """A RoBERTa encoder and a causal BERT decoder: the blocked form is taken, and gives what the plain one does."""
    family = "roberta" if name.startswith("Roberta") else "bert"
    model = models.head(family, name, spec, max_position_embeddings=80)
    batch = models.batch_of(model, 64, labels=False)
    if not padded:
        batch["attention_mask"][:] = 1
    called = spy(monkeypatch)
    results = []
    for implementation in ("plain", "auto"):
        called.clear()
        with dispatch.use_implementation(implementation):
            output = model(**batch)[0][batch["attention_mask"].bool()]
        assert set(called) == {"plain" if implementation == "plain" else "blocked"}
        model.zero_grad()
        output.square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((output.detach(), gradients))
    (plain, plain_gradients), (fast, fast_gradients) = results
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
    for key, gradient in plain_gradients.items():
        error = (fast_gradients[key] - gradient).norm() / gradient.norm().clamp(min=1e-4)
        assert error < 1e-2, key


def test_forward_mode_derivatives_are_the_plain_forms(seed: int) -> None:
    """No operator has a rule for them, and torch would give 0: the automatic choice is plain, a named one refuses."""
    q, k, v, direction = (torch.randn(1, 2, 40, 8, dtype=torch.float64) for _ in range(4))

    def attend(implementation: str | None) -> torch.Tensor:
        def of(x: torch.Tensor) -> torch.Tensor:
            return score.kernel_attention(x, k, v, kernel="expressive", implementation=implementation)

        return torch.func.jvp(of, (q,), (direction,))[1]

    assert dispatch.choose(q, k, v, None, 0.0, "expressive") == "blocked"
    torch.testing.assert_close(attend(None), attend("plain"))
    assert attend(None).abs().max() > 0
    with pytest.raises(SpecError, match="forward-mode"):
        attend("blocked")


def test_dropout_does_not_hang_on_the_strides_of_saved_tensors(seed: int) -> None:
    """Heads beside features in memory, as models have them; a hook brings the saved tensors back contiguous."""
    given = [torch.randn(2, 24, 3, 8, dtype=torch.float64).transpose(1, 2) for _ in range(3)]
    weight = torch.randn(2, 3, 24, 8, dtype=torch.float64)
    found = []
    for pack in (lambda x: x, lambda x: x.contiguous()):
        leaves = [x.clone().requires_grad_() for x in given]
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = score.kernel_attention(*leaves, None, 0.4, kernel="expressive", implementation="blocked")
        found.append(torch.autograd.grad(output, leaves, weight))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_to_attend_to(seed: int) -> None:
    for n_queries, n_keys, value_dim in ((0, 2000, 4), (2000, 0, 4), (60, 60, 0)):
        q, k, v = torch.randn(1, 2, n_queries, 8), torch.randn(1, 2, n_keys, 8), torch.randn(1, 2, n_keys, value_dim)
        assert score.kernel_attention(q, k, v, kernel="elu").shape == (1, 2, n_queries, value_dim)
        with pytest.raises(SpecError, match="no query, no key"):
            score.kernel_attention(q, k, v, kernel="elu", implementation="blocked")
