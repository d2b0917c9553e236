"""Query-value interaction against plain float64 loops, and what it promises about masks, memory and dtypes."""

from __future__ import annotations

import oracles_qv as oracle
import pytest
import torch
import torch.nn.functional as F

from attnpatch.errors import SpecError
from attnpatch.kernels import query_value as qv

SHAPES = [(2, 2, 5, 5, 4), (1, 3, 1, 6, 4), (2, 1, 6, 1, 3), (1, 2, 4, 7, 5)]


def parameters(heads, dim, phi="product", dtype=torch.float64, gate_value=True, grad=True):
    """Large enough that gates are neither shut nor open."""
    p = {
        "gate_query": torch.randn(heads, dim, dim, dtype=dtype),
        "gate_bias": torch.randn(heads, dim, dtype=dtype),
        "strength": torch.rand(heads, dtype=dtype) + 0.5,
    }
    if gate_value:
        p["gate_value"] = torch.randn(heads, dim, dim, dtype=dtype)
    if phi == "tanh":
        p["phi_query"] = torch.randn(heads, dim, dim, dtype=dtype)
        p["phi_value"] = torch.randn(heads, dim, dim, dtype=dtype)
        p["phi_bias"] = torch.randn(heads, dim, dtype=dtype)
    return {name: x.requires_grad_(grad) for name, x in p.items()}


def inputs(shape, dtype=torch.float64, grad=True):
    b, h, t, s, d = shape
    sizes = [(b, h, t, d), (b, h, s, d), (b, h, s, d)]
    return [torch.randn(size, dtype=dtype).requires_grad_(grad) for size in sizes]


def random_weights(b, h, t, s, dtype=torch.float64):
    return torch.softmax(torch.randn(b, h, t, s, dtype=dtype), -1).detach().requires_grad_()


def compare(actual, expected, leaves, atol=1e-10):
    """Values, and gradients of a random projection with respect to every leaf."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=atol)
    direction = torch.randn_like(expected)
    got = torch.autograd.grad((actual * direction).sum(), leaves, materialize_grads=True)
    want = torch.autograd.grad((expected * direction).sum(), leaves, materialize_grads=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=atol, rtol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phi", ["product", "tanh"])
@pytest.mark.parametrize("block", [None, 1, 3, 10_000])
def test_pairwise_equals_loops(shape, phi, block):
    b, h, t, s, d = shape
    q, _, v = inputs(shape)
    a = random_weights(b, h, t, s)
    p = parameters(h, d, phi)
    out = qv.pairwise_aggregate(q, a, v, **p, phi=phi, block=block)
    compare(out, oracle.pairwise(q, a, v, p, phi), [q, a, v, *p.values()])


@pytest.mark.parametrize("shape", SHAPES)
def test_query_gate_equals_loops(shape):
    b, h, t, s, d = shape
    q, _, v = inputs(shape)
    a = random_weights(b, h, t, s)
    p = parameters(h, d, gate_value=False)
    compare(qv.query_gated_aggregate(q, a, v, **p), oracle.pairwise(q, a, v, p), [q, a, v, *p.values()])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phi", ["product", "tanh"])
@pytest.mark.parametrize("pooling", ["attention", "additive"])
@pytest.mark.parametrize("padded", [False, True])
def test_pooled_equals_loops(shape, phi, pooling, padded):
    b, h, t, s, d = shape
    q, _, v = inputs(shape)
    a = random_weights(b, h, t, s)
    p = parameters(h, d, phi)
    pool = torch.randn(h, d, dtype=torch.float64, requires_grad=True) if pooling == "additive" else None
    valid = torch.ones(b, t, dtype=torch.bool)
    if padded:
        valid[-1, t // 2 :] = False  # with t == 1: a sequence without a query
    out = qv.pooled_aggregate(q, a, v, **p, phi=phi, query_valid=valid, pooling=pooling, pool_query=pool)
    expected = oracle.pooled(q, a, v, p, phi, valid, pool)
    compare(out, expected, [q, a, v, *p.values(), *([] if pool is None else [pool])])


def visible_and_bias(mask_kind, b, h, t, s):
    """(arguments for the function, full visible mask, full bias) with some rows that see nothing."""
    full = torch.ones(b, h, t, s, dtype=torch.bool)
    if mask_kind == "none":
        return {}, full, None
    if mask_kind == "causal":
        return {"is_causal": True}, full.tril(), None
    if mask_kind == "keys":
        keys = torch.rand(b, 1, 1, s) < 0.6
        keys[0] = False
        return {"attn_mask": keys}, full & keys, None
    mask = torch.rand(b, 1, t, s) < 0.6
    mask[-1, :, -1] = False
    if mask_kind == "bool":
        return {"attn_mask": mask}, full & mask, None
    bias = torch.randn(b, 1, t, s, dtype=torch.float64)
    low = float("-inf") if mask_kind == "inf" else torch.finfo(torch.float64).min
    return {"attn_mask": bias.masked_fill(~mask, low)}, full & mask, bias.expand(b, h, t, s)


@pytest.mark.parametrize("mask_kind", ["none", "causal", "bool", "keys", "inf", "min"])
@pytest.mark.parametrize("gate", ["pairwise", "query", "pooled"])
def test_attention_equals_loops(mask_kind, gate):
    if gate == "pooled" and mask_kind not in ("none", "keys"):
        pytest.skip("refused, see test_pooled_refuses_causal_sites")
    shape = b, h, t, s, d = 2, 2, 5, 6, 4
    q, k, v = inputs(shape)
    p = parameters(h, d, gate_value=gate != "query")
    arguments, visible, bias = visible_and_bias(mask_kind, b, h, t, s)
    a = oracle.sdpa_weights(q, k, visible, bias, scale=0.7)
    out = qv.query_value_attention(q, k, v, **arguments, scale=0.7, **p, gate=gate)
    expected = (oracle.pooled if gate == "pooled" else oracle.pairwise)(q, a, v, p)
    assert torch.equal(out[~visible.any(-1)], torch.zeros_like(out[~visible.any(-1)]))
    compare(out, expected, [q, k, v, *p.values()])


@pytest.mark.parametrize("low", [float("-inf"), "min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_masks_exclude_in_every_dtype(dtype, low):
    b, h, t, s, d = 1, 2, 3, 4, 8
    q, k, v = inputs((b, h, t, s, d), dtype, grad=False)
    p = parameters(h, d, dtype=dtype, grad=False)
    seen = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])
    mask = torch.zeros(t, s, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min if low == "min" else low)
    out = qv.query_value_attention(q, k, v, mask, **p)
    assert out.dtype == dtype
    assert torch.equal(out, qv.query_value_attention(q, k, v, seen, **p))
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))


@pytest.mark.parametrize("gate", ["pairwise", "query", "pooled"])
@pytest.mark.parametrize("phi", ["product", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_strength_zero_is_exactly_weights_times_value(gate, phi, dtype):
    if gate == "query" and phi == "tanh":
        pytest.skip("the query gate has phi = product only")
    b, h, t, s, d = 2, 2, 5, 7, 8
    q, k, v = inputs((b, h, t, s, d), dtype, grad=False)
    a = torch.softmax(torch.randn(b, h, t, s), -1).to(dtype)
    p = parameters(h, d, phi, dtype, gate_value=gate != "query", grad=False)
    p["strength"] = torch.zeros(h, dtype=dtype, requires_grad=True)
    if gate == "query":
        out = qv.query_gated_aggregate(q, a, v, **p)
    elif gate == "pooled":
        out = qv.pooled_aggregate(q, a, v, **p, phi=phi)
    else:
        out = qv.pairwise_aggregate(q, a, v, **p, phi=phi)
    assert out.dtype == dtype
    assert torch.equal(out, a @ v)
    out.float().square().sum().backward()
    assert (p["strength"].grad != 0).all()  # training can open the gate
    if dtype == torch.float32:
        attended = qv.query_value_attention(q, k, v, **p, phi=phi, gate=gate)
        torch.testing.assert_close(attended, F.scaled_dot_product_attention(q, k, v), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gate", ["pairwise", "query", "pooled"])
@pytest.mark.parametrize("phi", ["product", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padding_has_no_influence(gate, phi, dtype):
    if gate == "query" and phi == "tanh":
        pytest.skip("the query gate has phi = product only")
    b, h, t, d = 2, 2, 6, 8
    p = parameters(h, d, phi, dtype, gate_value=gate != "query", grad=False)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    extra = {"query_valid": valid} if gate == "pooled" else {}
    clean = inputs((b, h, t, t, d), dtype, grad=False)
    results = []
    for garbage in (0.0, 1e4, -1e4):
        q, k, v = [x.clone() for x in clean]
        for x in (q, k, v):
            x[1, :, 4:] = garbage
            x.requires_grad_()
        out = qv.query_value_attention(q, k, v, valid[:, None, None], **p, phi=phi, gate=gate, **extra)
        kept = out.transpose(1, 2)[valid]
        gradients = torch.autograd.grad(kept.float().square().sum(), [q, k, v])
        for g in gradients if gate == "pooled" else gradients[1:]:
            assert torch.equal(g[1, :, 4:], torch.zeros_like(g[1, :, 4:]))
        results.append([kept, *(g.transpose(1, 2)[valid] for g in gradients)])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.isfinite(x).all()
            assert torch.equal(x, y)


@pytest.mark.parametrize("phi", ["product", "tanh"])
def test_causal_attention_sees_no_future(phi):
    h, t, d = 2, 6, 4
    q, k, v = inputs((1, h, t, t, d), torch.float32, grad=False)
    p = parameters(h, d, phi, torch.float32, grad=False)
    before = qv.query_value_attention(q, k, v, is_causal=True, **p, phi=phi)
    for x in (q, k, v):
        x[:, :, 4:] = 1e4
    after = qv.query_value_attention(q, k, v, is_causal=True, **p, phi=phi)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


@pytest.mark.parametrize("phi", ["product", "tanh"])
def test_gradcheck(phi):
    b, h, t, s, d = 1, 2, 3, 4, 3
    q, _, v = inputs((b, h, t, s, d))
    a = random_weights(b, h, t, s)
    p = parameters(h, d, phi)

    def run(*leaves):
        return qv.pairwise_aggregate(*leaves[:3], **dict(zip(p, leaves[3:], strict=True)), phi=phi, block=2)

    assert torch.autograd.gradcheck(run, (q, a, v, *p.values()))


def test_softmax_gradcheck_with_masked_rows():
    shape = 1, 1, 3, 4, 3
    q, k, v = inputs(shape)
    p = parameters(1, 3)
    mask = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])
    assert torch.autograd.gradcheck(lambda *x: qv.query_value_attention(*x, mask, **p), (q, k, v))


def test_double_backward_is_refused():
    q, _, v = inputs((1, 1, 2, 2, 2))
    p = parameters(1, 2)
    out = qv.pairwise_aggregate(q, random_weights(1, 1, 2, 2), v, **p)
    with pytest.raises(RuntimeError, match="pairwise query-value attention has no second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.parametrize("phi", ["product", "tanh"])
def test_half_precision_is_float32_inside(phi):
    b, h, t, s, d = 2, 2, 6, 5, 8
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        low = inputs((b, h, t, s, d), dtype)
        p = parameters(h, d, phi, dtype)
        out = qv.query_value_attention(*low, **p, phi=phi)
        assert out.dtype == dtype
        high = [x.detach().double() for x in low]
        wide = {name: x.detach().double() for name, x in p.items()}
        expected = qv.query_value_attention(*high, **wide, phi=phi)
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance
        gradients = torch.autograd.grad(out.float().sum(), [*low, *p.values()])
        assert all(g.dtype == dtype and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("gate", ["pairwise", "query", "pooled"])
def test_autocast_changes_nothing(gate):
    b, h, t, s, d = 1, 2, 5, 5, 8
    tensors = inputs((b, h, t, s, d), torch.float32)
    p = parameters(h, d, dtype=torch.float32, gate_value=gate != "query")
    leaves = [*tensors, *p.values()]
    plain = qv.query_value_attention(*tensors, **p, gate=gate)
    want = torch.autograd.grad(plain.sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = qv.query_value_attention(*tensors, **p, gate=gate)
    got = torch.autograd.grad(cast.sum(), leaves)
    assert torch.equal(plain, cast)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_unattended_keys_and_tiny_weights_stay_finite_when_pooled():
    b, h, t, s, d = 1, 1, 3, 4, 4
    q, _, v = inputs((b, h, t, s, d), torch.float32)
    a = torch.rand(b, h, t, s)
    a[..., 1], a[..., 2], a[..., 3] = 0.0, 1e-45, 1e-30
    a.requires_grad_()
    p = parameters(h, d, dtype=torch.float32)
    out = qv.pooled_aggregate(q, a, v, **p)
    out.sum().backward()
    for x in (q, a, v, *p.values()):
        assert torch.isfinite(x.grad).all()
    assert torch.isfinite(out).all()


def test_non_contiguous_inputs():
    b, h, t, s, d = 2, 3, 5, 4, 6
    q = torch.randn(b, t, h, d, dtype=torch.float64).transpose(1, 2)
    v = torch.randn(b, s, h, 2 * d, dtype=torch.float64)[..., ::2].transpose(1, 2)
    a = torch.softmax(torch.randn(b, h, s, t, dtype=torch.float64), -2).transpose(-1, -2)
    leaves = [x.requires_grad_() for x in (q, a, v)]
    p = parameters(h, d)
    assert not any(x.is_contiguous() for x in leaves)
    compare(qv.pairwise_aggregate(*leaves, **p), oracle.pairwise(*leaves, p), [*leaves, *p.values()])


@pytest.mark.parametrize("phi", ["product", "tanh"])
@pytest.mark.parametrize("masked", [False, True])
def test_saved_memory_is_linear_in_head_dim(phi, masked):
    """What autograd keeps: a few [T, D] tensors and one [T, S], the weights; T x S x D would be 64 of that."""
    b, h, t, d = 1, 2, 256, 64
    q, k, v = inputs((b, h, t, t, d), torch.float32)
    p = parameters(h, d, phi, torch.float32)
    kept: dict[int, int] = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    mask = torch.rand(b, 1, 1, t) < 0.9 if masked else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = qv.query_value_attention(q, k, v, mask, **p, phi=phi)
    saved = sum(kept.values())
    parameter_bytes = sum(x.numel() * 4 for x in p.values())
    assert saved <= 4 * h * (16 * t * d + t * t) + 2 * parameter_bytes
    assert saved < 4 * h * t * t * d / 10
    out.sum().backward()


def test_peak_memory_of_forward_and_backward():
    """The largest allocation, forward and backward, is a block or the weights, never T x S x D."""
    b, h, t, d = 1, 2, 512, 64
    tensors = inputs((b, h, t, t, d), torch.float32)
    p = parameters(h, d, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        qv.query_value_attention(*tensors, **p).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events() if "empty" in event.name)
    assert 4 * h * t * t <= largest < 4 * h * t * t * d / 16  # at least the weights: it does measure


def test_pooled_refuses_causal_sites():
    q, k, v = inputs((1, 1, 4, 4, 3))
    p = parameters(1, 3)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    for arguments in ({"is_causal": True}, {"attn_mask": causal}, {"attn_mask": causal.double().log()}):
        with pytest.raises(ValueError, match="pairwise"):
            qv.query_value_attention(q, k, v, **arguments, **p, gate="pooled")
    same = torch.tensor([True, True, False, True]).repeat(1, 1, 4, 1)  # written out, but one row for all
    out = qv.query_value_attention(q, k, v, same, **p, gate="pooled")
    assert torch.equal(out, qv.query_value_attention(q, k, v, same[..., :1, :], **p, gate="pooled"))


def test_dropout_acts_on_the_weights():
    q, k, v = inputs((2, 2, 8, 8, 4), torch.float32, grad=False)
    p = parameters(2, 4, dtype=torch.float32, grad=False)
    p["strength"] = torch.zeros(2)
    torch.manual_seed(3)
    dropped = qv.query_value_attention(q, k, v, dropout_p=0.5, **p)
    torch.manual_seed(3)
    weights = F.dropout(torch.softmax(q @ k.transpose(-1, -2) / 2, -1), 0.5)
    torch.testing.assert_close(dropped, weights @ v, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "pair"}, "pairwise"),
        ({"phi": "tan"}, "tanh"),
        ({"phi": "tanh"}, "needs phi_query"),
        ({"phi_bias": torch.zeros(2, 3)}, "no parameters"),
        ({"gate_value": None}, "needs gate_value"),
        ({"gate_query": torch.zeros(3, 3)}, "gate_query has shape"),
        ({"strength": torch.zeros(1)}, "strength has shape"),
        ({"gate": "query"}, "no gate_value"),
        ({"pooling": "additive"}, "belong to gate='pooled'"),
        ({"gate": "pooled", "pooling": "additiv"}, "additive"),
        ({"gate": "pooled", "pooling": "additive"}, "pool_query"),
        ({"gate": "pooled", "query_valid": torch.ones(1, 4)}, "query_valid has to be bool"),
        ({"gate": "pooled", "block": 3}, "block belongs"),
        ({"block": 0}, "at least 1"),
        ({"is_causal": True, "attn_mask": torch.ones(4, 4, dtype=torch.bool)}, "exclude each other"),
        ({"value": torch.zeros(1, 2, 4, 5)}, "agree in batch"),
    ],
)
def test_errors_say_what_is_allowed(change, message):
    q, k, v = inputs((1, 2, 4, 4, 3), grad=False)
    arguments = {"query": q, "key": k, "value": v, **parameters(2, 3, grad=False), **change}
    with pytest.raises(SpecError, match=message):
        qv.query_value_attention(**arguments)


def test_weights_of_a_wrong_shape_are_refused():
    q, _, v = inputs((1, 2, 4, 4, 3), grad=False)
    with pytest.raises(SpecError, match="weights have to be"):
        qv.pairwise_aggregate(q, torch.zeros(1, 1, 4, 4), v, **parameters(2, 3, grad=False))


@pytest.mark.slow
@pytest.mark.parametrize("phi", ["product", "tanh"])
def test_torch_compile_without_a_graph_break(phi):
    tensors = inputs((2, 2, 16, 16, 8), torch.float32)
    p = parameters(2, 8, phi, torch.float32)
    leaves = [*tensors, *p.values()]
    compiled = torch.compile(qv.query_value_attention, fullgraph=True)
    plain = qv.query_value_attention(*tensors, is_causal=True, **p, phi=phi)
    fast = compiled(*tensors, is_causal=True, **p, phi=phi)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    got, want = torch.autograd.grad(fast.sum(), leaves), torch.autograd.grad(plain.sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)
