"""Single queries in C against the plain form in float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from attnpatch.kernels import compiled, decode_native, dispatch
from attnpatch.kernels.score import KERNELS, kernel_attention, plain_attention

compiles = pytest.mark.skipif(compiled.unwanted() is not None, reason=f"no compiled code: {compiled.unwanted()}")


def draw(rows: int, heads: int, n: int, dim: int, layout: str, dtype: torch.dtype) -> Tensor:
    """[rows, heads, n, dim], in the memory layouts that projections and caches have."""
    if layout == "rows":
        x = torch.randn(rows, n, heads, dim).transpose(1, 2)
    elif layout == "places":
        x = torch.randn(n, rows, heads, dim).permute(1, 2, 0, 3)
    else:
        x = torch.randn(rows, heads, n + 3, dim)[:, :, 1 : n + 1]
    return x.to(dtype)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, kernel: str, degree: int) -> Tensor:
    shared = q.shape[0] // k.shape[0]
    whole = [x.double().repeat_interleave(shared, 0) for x in (k, v)]
    if mask is not None:
        mask = mask.expand(k.shape[0], -1, -1, -1).repeat_interleave(shared, 0)
    return plain_attention(q.double(), *whole, mask, 0.0, False, scale, kernel=kernel, degree=degree)


@compiles
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "places", "heads"])
@pytest.mark.parametrize("mask", ["none", "rows", "one row", "nothing seen"])
def test_single_queries_are_exact(seed: int, kernel: str, dtype: torch.dtype, layout: str, mask: str) -> None:
    shared, rows, heads = random.choice([1, 2, 5]), random.randint(1, 40), random.randint(1, 3)
    keys, dim, width = random.randint(1, 90), random.randint(1, 70), random.randint(1, 70)
    degree, scale = random.choice([2, 4, 6]), random.choice([0.1, 0.3, 2.0])
    query = draw(rows * shared, heads, 1, dim, "rows", dtype)
    key, value = draw(rows, heads, keys, dim, layout, dtype), draw(rows, heads, keys, width, layout, dtype)
    keep = None
    if mask != "none":
        keep = torch.rand(rows if mask == "rows" else 1, 1, 1, keys) < 0.7
        keep[..., random.randrange(keys)] = True
        keep &= mask != "nothing seen"
    assert decode_native.why_not(query, key, value, keep) is None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(random.choice([1, 2]))
        found = decode_native.decode_attention(query, key, value, keep, scale, kernel, degree)
    finally:
        torch.set_num_threads(before)
    assert found is not None
    assert found.dtype == dtype
    wanted = exact(query, key, value, keep, scale, kernel, degree)
    error = (found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
    assert error <= (3e-6 if dtype == torch.float32 else 3e-3)


@compiles
@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_hidden_does_not_matter_and_what_is_seen_does(seed: int, kernel: str) -> None:
    query, key, value = (draw(6, 2, n, 16, "places", torch.float32) for n in (1, 9, 9))
    keep = torch.ones(6, 1, 1, 9, dtype=torch.bool)
    keep[..., 4] = False
    wanted = decode_native.decode_attention(query, key, value, keep, 1.0, kernel)
    for hidden in (torch.inf, torch.nan, 0.0):
        key[:, :, 4], value[:, :, 4] = hidden, hidden
        found = decode_native.decode_attention(query, key, value, keep, 1.0, kernel)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for poisoned in (query[0, 0, 0], key[0, 0, 2], value[0, 0, 2]):
        before = poisoned[3].item()
        poisoned[3] = torch.nan
        found = decoded_or_plain(query, key, value, keep, kernel)
        assert found[0, 0].isnan().any()
        assert not found[1:].isnan().any()
        poisoned[3] = before


def decoded_or_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: str) -> Tensor:
    found = decode_native.decode_attention(query, key, value, mask, 1.0, kernel)
    if found is None:
        assert kernel != "softmax"
        return plain_attention(query, key, value, mask, 0.0, False, 1.0, kernel=kernel)
    return found


@compiles
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e-9, 1e-4, 1e4, 1e12, 1e19, 1e36])
def test_scores_of_any_size(seed: int, kernel: str, size: float) -> None:
    """What C leaves to the plain form included, and rows of negative scores alone."""
    query, key, value = (draw(3, 2, n, 8, "rows", torch.float32) for n in (1, 7, 7))
    key[1] = -query[1].sign() * key[1].abs()
    key = key * size
    largest = float((query.double() @ key.double().mT).abs().max())
    found = decoded_or_plain(query, key, value, None, kernel)
    # What is exponential in a score has the score's rounding for its relative error.
    rounding = 1e-6 * largest if kernel in ("softmax", "elu") else 0.0
    if rounding < 0.1 and size > 1e-18:  # below, float32's rows are uniform
        wanted = exact(query, key, value, None, 1.0, kernel, 2)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4 + rounding, atol=1e-5 + rounding)
    else:
        torch.testing.assert_close(found, plain_attention(query, key, value, None, 0.0, False, 1.0, kernel=kernel))
    alone = decode_native.decode_attention(query, key, value, None, 1.0, kernel)
    assert alone is not None or (kernel != "softmax" and not 1e-4 <= size <= 1e12)


@compiles
def test_the_automatic_choice_decodes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = decode_native.decode_attention
    monkeypatch.setattr(decode_native, "decode_attention", lambda *args: calls.append(args) or real(*args))
    query, key, value = (torch.randn(3, 2, n, 8) for n in (1, 7, 7))
    kernel_attention(query, key, value, kernel="expressive")
    assert len(calls) == 1
    keep = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    kernel_attention(query, key, value, keep, kernel="elu")
    assert len(calls) == 2
    with dispatch.use_implementation("plain"):
        kernel_attention(query, key, value, kernel="expressive")
    kernel_attention(query, key, value, kernel="expressive", implementation="plain")
    kernel_attention(query, key, value, kernel="softmax")
    kernel_attention(query, key, value, kernel="softmax", implementation="auto")
    kernel_attention(query, key, value, is_causal=True, kernel="expressive")
    kernel_attention(query, key, value, dropout_p=0.1, kernel="expressive")
    kernel_attention(query[:, :, 0], key[:, 0], value[:, 0], kernel="expressive")
    kernel_attention(query.clone().requires_grad_(), key, value, kernel="expressive").sum().backward()
    torch.func.jvp(lambda x: kernel_attention(x, key, value, kernel="expressive"), (query,), (query,))
    torch.func.vmap(lambda x: kernel_attention(x[None], key[:1], value[:1], kernel="expressive"))(query)
    # Rows that share their keys are for those who ask for it, not for what broadcasts to something else.
    with pytest.raises(Exception, match=r"size|shape|broadcast"):
        kernel_attention(torch.randn(6, 2, 1, 8), key, value, kernel="expressive")
    assert len(calls) == 2


def test_single_queries_say_what_they_do_not_take(seed: int) -> None:
    q, k, v = (torch.randn(4, 2, n, 8) for n in (1, 5, 5))
    for arguments, reason in (
        ((q.double(), k.double(), v.double(), None), "float64"),
        ((torch.randn(4, 2, 3, 8), k, v, None), "one query"),
        ((q[:3], k, v, None), "do not fit"),
        ((q, k, v[:, :, :4], None), "do not fit"),
        ((q, k[:, :, :0], v[:, :, :0], None), "do not fit"),
        ((q, k.transpose(2, 3).contiguous().transpose(2, 3), v, None), "next to each other"),
        ((q, k, v, torch.zeros(4, 1, 1, 5)), "bool"),
        ((q, k, v, torch.ones(4, 2, 1, 5, dtype=torch.bool)), "bool"),
        ((q, k, v, torch.ones(4, 1, 1, 1, dtype=torch.bool)), "mask"),
        ((q.clone().requires_grad_(), k, v, None), "gradient"),
        ((q.to("meta"), k, v, None), "CPU"),
        ((torch._neg_view(q), k, v, None), "as they are"),
        ((torch._efficientzerotensor(q.shape), k, v, None), "as they are"),
    ):
        assert reason in str(decode_native.why_not(*arguments))
    with torch.no_grad():
        assert "gradient" not in str(decode_native.why_not(q.clone().requires_grad_(), k, v, None))


@compiles
def test_a_trace_computes_what_it_is_given(seed: int) -> None:
    def attend(*x: Tensor) -> Tensor:
        return kernel_attention(*x, kernel="elu")

    inputs, others = ([torch.randn(2, 2, n, 8) for n in (1, 7, 7)] for _ in range(2))
    traced = torch.jit.trace(attend, tuple(inputs))
    torch.testing.assert_close(traced(*others), attend(*others))


@compiles
def test_decoding_compiles() -> None:
    """torch.compile traces the plain form."""
    query, key, value = (torch.randn(3, 2, n, 8) for n in (1, 7, 7))
    seen = torch.compile(lambda *x: kernel_attention(*x, kernel="expressive"), backend="eager", fullgraph=True)
    torch.testing.assert_close(seen(query, key, value), kernel_attention(query, key, value, kernel="expressive"))
