"""Alignment losses against plain float64 loops; the sign of every gradient; padding; transport; corner cases."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import oracles_qv as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from attnpatch.errors import SpecError
from attnpatch.kernels import alignment as al
from attnpatch.kernels import alignment_networks as an
from attnpatch.kernels import products

D = 4
METHODS = ["ct", "gan", "ot", "mmd"]


def networks(method, dtype=torch.float64, dim=D, hidden=6):
    if method == "ct":
        nets = {"navigator": an.Navigator(dim, hidden), "critic": an.Critic(dim, hidden)}
    elif method == "gan":
        nets = {"discriminator": an.Discriminator(dim, hidden)}
    else:
        nets = {}
    return {name: net.to(dtype) for name, net in nets.items()}


def tensors(b=2, h=2, t=5, s=5, d=D, dtype=torch.float64):
    query = torch.randn(b, h, t, d, dtype=dtype) + 0.5
    key = torch.randn(b, h, s, d, dtype=dtype)
    return query.requires_grad_(), key.requires_grad_()


def padding(b, length):
    """Some sequences padded, the last one without any token (when there is more than one)."""
    mask = torch.zeros(b, length, dtype=torch.bool)
    mask[0, length - length // 3 :] = True
    if b > 1:
        mask[-1] = True
    return mask


def problem_of(method, nets, **options):
    if method == "ct":
        return lambda qs, ks: oracle.ct_problem(qs, ks, nets.get("navigator"), nets.get("critic"))
    if method == "gan":
        return lambda qs, ks: oracle.gan_problem(qs, ks, nets["discriminator"])
    return lambda qs, ks: oracle.mmd_problem(qs, ks, options.get("bandwidth", "median"))


@pytest.mark.parametrize("masks", ["none", "both", "keys"])
@pytest.mark.parametrize(("t", "s"), [(5, 5), (3, 6), (1, 1), (1, 4)])
@pytest.mark.parametrize("method", ["ct", "ct-identity", "gan", "mmd", "mmd-mean", "mmd-fixed"])
def test_equals_loops(method, t, s, masks):
    method, _, form = method.partition("-")
    nets = {} if form == "identity" else networks(method)
    options = {"mean": {"bandwidth": "mean"}, "fixed": {"bandwidth": 1.3}}.get(form, {})
    q, k = tensors(3, 2, t, s)
    q_padding = padding(3, t) if masks == "both" else None
    k_padding = None if masks == "none" else padding(3, s)
    loss = al.alignment_loss(q, k, k_padding, method, q_padding, **nets, **options)
    if t == s and masks == "keys":
        q_padding = k_padding  # the documented default
    expected = oracle.over_problems(q, k, q_padding, k_padding, problem_of(method, nets, **options))
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-9)

    leaves = [q, k]
    names = [(name, n) for name, net in nets.items() for n, _ in net.named_parameters()]
    leaves += [p for net in nets.values() for p in net.parameters()]
    got = torch.autograd.grad(loss, leaves, materialize_grads=True)
    want = torch.autograd.grad(expected, leaves, materialize_grads=True)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        adversary = i >= 2 and names[i - 2][0] in ("critic", "discriminator")
        torch.testing.assert_close(g, -w if adversary else w, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("method", ["ct", "gan"])
def test_signs_by_finite_differences(method):
    """A small step against the gradient: critic or discriminator raise the loss, all others lower it."""
    q, k = tensors()
    nets = networks(method)
    pad = padding(2, 5)

    def value(query, key, nets):
        with torch.no_grad():
            return float(al.alignment_loss(query, key, pad, method, **nets))

    loss = al.alignment_loss(q, k, pad, method, **nets)
    loss.backward()
    before, step = value(q, k, nets), 1e-6
    assert math.isclose(before, float(loss.detach()), rel_tol=1e-12)

    for moved in ("query", "key", "both"):
        q2 = q.detach() - step * q.grad if moved != "key" else q
        k2 = k.detach() - step * k.grad if moved != "query" else k
        squares = float(q.grad.square().sum()) * (moved != "key") + float(k.grad.square().sum()) * (moved != "query")
        change = value(q2, k2, nets) - before
        assert change < 0
        assert math.isclose(change, -step * squares, rel_tol=1e-3)

    for name, net in nets.items():
        other = copy.deepcopy(net)
        squares = 0.0
        with torch.no_grad():
            for p, p2 in zip(net.parameters(), other.parameters(), strict=True):
                p2.sub_(step * p.grad)
                squares += float(p.grad.square().sum())
        change = value(q, k, {**nets, name: other}) - before
        sign = -1 if name == "navigator" else 1
        assert change * sign > 0, name
        assert math.isclose(change, sign * step * squares, rel_tol=1e-3)


@pytest.mark.parametrize("method", ["ot", "mmd"])
def test_a_step_lowers_the_loss(method):
    q, k = tensors()
    options = {"ot": {"tolerance": 1e-9, "iterations": 5000, "eps": 0.05}, "mmd": {"bandwidth": 1.0}}[method]
    loss = al.alignment_loss(q, k, method=method, **options)
    loss.backward()
    after = al.alignment_loss(q - 1e-3 * q.grad, k - 1e-3 * k.grad, method=method, **options)
    assert after.item() < loss.item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padding_changes_nothing(method, dtype):
    nets = networks(method, dtype)
    pad = padding(3, 6)
    q0, k0 = (x.detach() for x in tensors(3, 2, 6, 6, dtype=dtype))
    results = []
    for garbage in (0.0, 1e4, -3e4, float("inf"), float("nan")):
        q, k = (x.masked_fill(pad[:, None, :, None], garbage).requires_grad_() for x in (q0, k0))
        loss = al.alignment_loss(q, k, pad, method, **nets)
        gradients = torch.autograd.grad(loss, [q, k, *(p for net in nets.values() for p in net.parameters())])
        for g in gradients[:2]:
            assert torch.equal(g.transpose(1, 2)[pad], torch.zeros_like(g.transpose(1, 2)[pad]))
            assert (g.transpose(1, 2)[~pad] != 0).any()
        results.append([loss, *gradients])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.isfinite(x).all()
            assert torch.equal(x, y)


@pytest.mark.parametrize("method", METHODS)
def test_padding_equals_a_shorter_batch(method):
    nets = networks(method)
    q, k = tensors(1, 2, 7, 7)
    pad = torch.tensor([[False] * 4 + [True] * 3])
    options = {"tolerance": 1e-8, "iterations": 20000}
    padded = al.alignment_loss(q, k, pad, method, **nets, **options)
    short = al.alignment_loss(q[:, :, :4], k[:, :, :4], None, method, **nets, **options)
    torch.testing.assert_close(padded, short, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_sequences_without_tokens_are_not_counted(method):
    nets = networks(method)
    q, k = tensors(3, 2, 4, 4)
    pad = torch.tensor([[False] * 4, [True] * 4, [False, True, True, True]])
    loss = al.alignment_loss(q, k, pad, method, **nets)
    each = al.alignment_loss(q, k, pad, method, **nets, reduction="none")
    assert each.shape == (3, 2)
    assert torch.equal(each[1], torch.zeros_like(each[1]))
    torch.testing.assert_close(loss, each[[0, 2]].mean())
    torch.testing.assert_close(al.alignment_loss(q, k, pad, method, **nets, reduction="sum"), each.sum())
    nothing = al.alignment_loss(q, k, torch.ones_like(pad), method, **nets)
    assert float(nothing) == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(nothing, [q, k]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["single", "identical", "zeros", "constant", "large"])
def test_corner_cases_are_finite(method, case):
    nets = networks(method, torch.float32)
    q, k = (x.detach() for x in tensors(dtype=torch.float32))
    pad = None
    if case == "single":
        pad = torch.ones(2, 5, dtype=torch.bool)
        pad[:, 0] = False
    elif case == "identical":
        k = q.clone()
    elif case == "zeros":
        q, k = torch.zeros_like(q), torch.zeros_like(k)
    elif case == "constant":
        q, k = torch.ones_like(q), torch.ones_like(k)
    else:
        q, k = q * 1e4, k * 1e4
    q.requires_grad_()
    k.requires_grad_()
    loss = al.alignment_loss(q, k, pad, method, **nets)
    gradients = torch.autograd.grad(loss, [q, k, *(p for net in nets.values() for p in net.parameters())])
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients)
    if case in ("identical", "zeros", "constant") and method == "mmd":
        assert abs(float(loss)) < 1e-6
    if case in ("identical", "constant") and method == "ot":
        assert abs(float(loss)) < 1e-2


# ------------------------------------------------------------------------------------ optimal transport


def test_plan_has_its_marginals_and_the_form_of_entropic_transport():
    cost = torch.rand(3, 2, 6, 8, dtype=torch.float64) * 2
    rows, columns = torch.rand(3, 1, 6) < 0.7, torch.rand(3, 1, 8) < 0.7
    rows[..., 0] = columns[..., 0] = True
    plan = al.sinkhorn_plan(cost, rows, columns, eps=0.3, iterations=50_000, tolerance=1e-10)
    a = rows.double() / rows.sum(-1, keepdim=True)
    b = columns.double() / columns.sum(-1, keepdim=True)
    torch.testing.assert_close(plan.sum(-1), a.expand(3, 2, 6), atol=1e-9, rtol=0)
    torch.testing.assert_close(plan.sum(-2), b.expand(3, 2, 8), atol=1e-9, rtol=0)
    # The optimum is the feasible plan with log P + C / eps = f_i + g_j: its mixed differences vanish.
    for n in range(3):
        i, j = rows[n, 0].nonzero()[:, 0], columns[n, 0].nonzero()[:, 0]
        for h in range(2):
            dual = plan[n, h][i][:, j].log() + cost[n, h][i][:, j] / 0.3
            mixed = dual - dual[:1] - dual[:, :1] + dual[:1, :1]
            assert float(mixed.abs().max()) < 1e-6


def test_default_tolerance_holds_at_the_default_eps():
    q, k = (F.normalize(x.detach(), dim=-1) for x in tensors(2, 3, 40, 40, 16, dtype=torch.float32))
    plan = al.sinkhorn_plan(1 - q @ k.mT)
    torch.testing.assert_close(plan.sum(-2), torch.full((2, 3, 40), 1 / 40), atol=1e-6, rtol=0)
    assert float((plan.sum(-1) - 1 / 40).abs().sum(-1).max()) < 1e-2


def test_small_eps_approaches_the_linear_programme():
    from scipy.optimize import linear_sum_assignment, linprog

    q, k = tensors(2, 1, 6, 6)
    cost = (1 - F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).detach().numpy()
    loss = al.alignment_loss(q, k, method="ot", eps=2e-3, iterations=50_000, tolerance=1e-5, reduction="none")
    for n in range(2):
        i, j = linear_sum_assignment(cost[n, 0])
        assert abs(float(loss[n, 0]) - cost[n, 0][i, j].mean()) < 5e-3

    q, k = tensors(1, 1, 3, 5)  # not an assignment
    cost = (1 - F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).detach().numpy()[0, 0]
    rows = np.kron(np.eye(3), np.ones(5))
    columns = np.kron(np.ones(3), np.eye(5))
    best = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=[1 / 3] * 3 + [1 / 5] * 5).fun
    loss = al.alignment_loss(q, k, method="ot", eps=2e-3, iterations=50_000, tolerance=1e-5)
    assert best - 1e-3 < float(loss) < best + 8e-3


def test_ot_gradient_is_that_of_the_entropic_objective():
    """d/dx min_P <P, C(x)> + eps sum P log P = <P*, dC/dx>: by central differences of the objective."""
    q, k = tensors(1, 1, 4, 5)
    settings = {"eps": 0.1, "iterations": 50_000, "tolerance": 1e-12}

    def objective(query):
        cost = 1 - F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT
        plan = al.sinkhorn_plan(cost, **settings)
        return float((plan * cost).sum() + 0.1 * torch.xlogy(plan, plan).sum())

    key = k.detach()
    (g,) = torch.autograd.grad(al.alignment_loss(q, k, method="ot", **settings), q)
    for _ in range(5):
        direction = torch.randn_like(q)
        with torch.no_grad():
            slope = (objective(q + 1e-4 * direction) - objective(q - 1e-4 * direction)) / 2e-4
        assert math.isclose(slope, float((g * direction).sum()), rel_tol=1e-4, abs_tol=1e-7)


def test_the_sinkhorn_loop_keeps_no_memory():
    q, k = tensors(1, 1, 32, 32, 8)

    def saved(iterations):
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: count.append(x.numel()) or x, lambda x: x):
            al.alignment_loss(q, k, method="ot", iterations=iterations, tolerance=1e-14)
        return sum(count)

    assert saved(1) == saved(300) < 10 * 32 * 32


@pytest.mark.parametrize("method", METHODS)
def test_no_matrix_of_queries_and_keys_waits_for_the_backward_pass(method):
    length = 64
    q, k = tensors(1, 1, length, length, D)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        al.alignment_loss(q, k, padding(1, length), method, **networks(method))
    assert 0 < max(kept) < length * length


# ---------------------------------------------------------------------------------------------- measure


def test_mmd_measure():
    q, k = tensors(3, 2, 5, 6)
    q_pad, k_pad = padding(3, 5), padding(3, 6)
    each = al.alignment_loss(q, k, k_pad, "mmd", q_pad, bandwidth=1.0, reduction="none").detach()
    per_head = al.mmd(q, k, k_pad, q_pad, bandwidth=1.0)
    assert not per_head.requires_grad
    torch.testing.assert_close(per_head, each[:2].mean(0))
    torch.testing.assert_close(al.mmd(q, k, k_pad, q_pad, 1.0, "mean"), each[:2].mean())
    torch.testing.assert_close(al.mmd(q, k, k_pad, q_pad, 1.0, "none"), each)
    assert (al.mmd(q, k, k_pad, q_pad) >= 0).all()
    near = al.mmd(q[:, :, :5], q[:, :, :5] + 1e-3, q_pad).sum()
    far = al.mmd(q[:, :, :5], q[:, :, :5] + 5.0, q_pad).sum()
    assert float(near) < 1e-4 < 0.1 < float(far)


def test_mmd_does_not_lose_digits_far_from_the_origin():
    q, k = (x.detach() for x in tensors(1, 2, 8, 8, dtype=torch.float64))
    expected = al.mmd(q, k, bandwidth=1.0)
    moved = al.mmd((q + 1000).float(), (k + 1000).float(), bandwidth=1.0)
    torch.testing.assert_close(moved.double(), expected, atol=1e-3, rtol=1e-2)


# --------------------------------------------------------------------------------- dtypes, networks, errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_and_autocast(method, network_dtype):
    nets = networks(method, network_dtype)
    q, k = (x.detach().bfloat16().requires_grad_() for x in tensors())
    pad = padding(2, 5)
    leaves = [q, k, *(p for net in nets.values() for p in net.parameters())]
    plain = al.alignment_loss(q, k, pad, method, **nets)
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = al.alignment_loss(q, k, pad, method, **nets)
    assert torch.equal(plain, cast)
    for leaf, g in zip(leaves, torch.autograd.grad(cast, leaves), strict=True):
        assert g.dtype == leaf.dtype
        assert torch.isfinite(g).all()
    wide = {name: copy.deepcopy(net).double() for name, net in nets.items()}
    expected = al.alignment_loss(q.double(), k.double(), pad, method, **wide)
    torch.testing.assert_close(plain.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_non_contiguous_inputs(method):
    nets = networks(method)
    q, k = (torch.randn(2, 5, 2, D, dtype=torch.float64).transpose(1, 2) for _ in range(2))
    assert not q.is_contiguous()
    strided = al.alignment_loss(q, k, padding(2, 5), method, **nets)
    torch.testing.assert_close(
        strided, al.alignment_loss(q.contiguous(), k.contiguous(), padding(2, 5), method, **nets)
    )


@pytest.mark.parametrize("method", ["ct", "gan", "mmd"])
def test_gradcheck(method):
    q, k = tensors(1, 2, 3, 4)
    nets = networks(method)
    k_pad = torch.tensor([[False, False, True, False]])
    assert torch.autograd.gradcheck(lambda q, k: al.alignment_loss(q, k, k_pad, method, **nets, bandwidth=1.0), (q, k))


def test_gradient_reversal():
    x = torch.randn(3, requires_grad=True)
    y = an.gradient_reversal(x, 0.5)
    assert torch.equal(y, x)
    (g,) = torch.autograd.grad((y * torch.arange(3.0)).sum(), x)
    assert torch.equal(g, -0.5 * torch.arange(3.0))


class OwnCritic(an.Critic):
    """No class of ours: autograd differentiates it."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adversary_reverses_its_parameters_gradients_alone(dtype):
    net, x = OwnCritic(D, 6).to(dtype), torch.randn(7, D, requires_grad=True)
    direction = torch.randn(7, D)
    leaves = [x, *net.parameters()]
    want, got = (
        torch.autograd.grad((an.apply_network(net, x, adversary) * direction).sum(), leaves)
        for adversary in (False, True)
    )
    assert want[0].any()
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(g, -w) for g, w in zip(got[1:], want[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adversary", [False, True])
def test_parameters_that_are_there_while_their_module_runs(adversary, dtype):
    """As under DeepSpeed's ZeRO-3, which gathers them in hooks of each module and knows them by `ds_id`."""
    net, x = an.Critic(D, 6).to(dtype), torch.randn(7, D)
    want = net(x.to(dtype)).float()
    for part in net.modules():
        whole = {name: p.data for name, p in part.named_parameters(recurse=False)}

        def put(part, whole=whole, there=True):
            for name, data in whole.items():
                getattr(part, name).data = data if there else data.new_empty(0)

        for p in part.parameters(recurse=False):
            p.ds_id = 1
        put(part, there=False)
        part.register_forward_pre_hook(lambda part, inputs, put=put: put(part))
        part.register_forward_hook(lambda part, inputs, out, put=put: put(part, there=False))
    torch.testing.assert_close(an.apply_network(net, x, adversary), want)


def gradients_of(net, x, direction, apply):
    leaves = [leaf for leaf in (x, *net.parameters()) if leaf.requires_grad]
    out = apply(net, x)
    return [out, *torch.autograd.grad((out * direction).sum(), leaves)]


@pytest.mark.parametrize("frozen", ["nothing", "input", "inner.weight", "outer.bias", "networks"])
@pytest.mark.parametrize("adversary", [False, True])
@pytest.mark.parametrize("kind", [an.Discriminator, an.Navigator, an.Critic])
def test_networks_by_parts_equal_autograd(kind, adversary, frozen, monkeypatch):
    net = kind(D, 6).double()
    x = torch.randn(3, 7, 2, D, dtype=torch.float64).transpose(1, 2).requires_grad_(frozen != "input")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(frozen not in ("networks", name))
    direction = torch.randn_like(net(x))
    want = gradients_of(net, x, direction, lambda net, x: net(x))
    for tokens in (1, 5, 42, 1000):
        monkeypatch.setattr(an, "_TOKENS", tokens)
        got = gradients_of(net, x, direction, lambda net, x: an.apply_network(net, x, adversary))
        count = int(x.requires_grad)
        signs = [1] * (1 + count) + [-1 if adversary else 1] * (len(want) - 1 - count)
        for a, b, sign in zip(got, want, signs, strict=True):
            torch.testing.assert_close(a, sign * b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "part of wider rows", "one row for all", "gradient of a sum"])
@pytest.mark.parametrize("kind", [an.Discriminator, an.Navigator, an.Critic])
def test_networks_in_float32(seed, kind, layout, onednn, monkeypatch):
    """By either library's products, whatever the memory looks like."""
    operator = products.operator() if onednn else None
    if onednn and (operator is None or not torch.backends.mkldnn.is_available()):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_onednn", lambda: operator)
    monkeypatch.setattr(an, "_TOKENS", random.choice([7, 60, 1000]))
    dim, hidden = random.choice([(64, 64), (20, 40), (33, 17), (6, 50)])
    net, exact = kind(dim, hidden), kind(dim, hidden).double()
    exact.load_state_dict(net.state_dict())
    given = torch.randn(3, 2, 37, 2 * dim)
    # The sides of a kink that float32 and float64 see differently would have other slopes.
    given = given.where(kinks(exact, given[..., :dim].double()).amin(-1, keepdim=True) > 1e-5, 0.0)
    x = {"part of wider rows": given[..., :dim], "one row for all": given[:1, :1, :1, :dim].expand(3, 2, 37, dim)}.get(
        layout, given[..., :dim].contiguous()
    )
    x, twin = x.detach().requires_grad_(), x.double().detach().requires_grad_()
    direction = torch.randn_like(net(x)) if layout != "gradient of a sum" else torch.ones(()).expand(net(x).shape)
    leaves, twins = [x, *net.parameters()], [twin, *exact.parameters()]
    found = torch.autograd.grad(an.apply_network(net, x), leaves, direction)
    wanted, sizes = (torch.autograd.grad(exact(twin), twins, d) for d in (direction.double(), direction.double().abs()))
    for a, b, size in zip(found, wanted, sizes, strict=True):
        # Of what cancels, what is added up is to be right to so many digits.
        assert (a - b).norm() <= 1e-5 * max(b.norm(), size.norm())


def kinks(network, x):
    """How far from 0 each vector's activations with a kink are, [..., n]."""
    mixed, distances = x, []
    if hasattr(network, "highway"):
        mixed = network.highway(x)
        distances.append(network.highway.transform(x))
    return torch.cat([*distances, network.inner(mixed)], -1).abs()


class Wrapped(nn.Module):
    """A network of another class, which is left to autograd."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


@pytest.mark.parametrize("frozen", ["", "tokens", "navigator", "critic", "critic.inner.weight", "navigator.outer.bias"])
@pytest.mark.parametrize("critic", [an.Critic, an.Navigator])
@pytest.mark.parametrize("padded", [False, True])
def test_ct_in_one_pass_equals_its_parts(seed, frozen, critic, padded, monkeypatch):
    monkeypatch.setattr(an, "_TOKENS", random.choice([5, 64, 1000]))
    query, key = (torch.randn(3, 2, n, D, dtype=torch.float64) for n in (5, 8))
    nets = nn.ModuleDict({"navigator": an.Navigator(D, 6), "critic": critic(D, 6)}).double()
    for name, parameter in nets.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    for x in (query, key):
        x.requires_grad_(frozen != "tokens")
    masks = {}
    if padded:
        masks = {"key_padding_mask": torch.rand(3, 8) < 0.4, "query_padding_mask": torch.rand(3, 5) < 0.4}
        masks["key_padding_mask"][1] = True  # a sequence without keys
    leaves = [x for x in (query, key, *nets.parameters()) if x.requires_grad]
    weight = torch.randn(3, 2, dtype=torch.float64)

    def gradients(**networks):
        loss = al.alignment_loss(query, key, method="ct", reduction="none", **masks, **networks)
        return [loss, *torch.autograd.grad((loss * weight).sum(), leaves)]

    found, parts = gradients(**nets), gradients(**{name: Wrapped(net) for name, net in nets.items()})
    for a, b in zip(found, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        alone = al.alignment_loss(query, key, method="ct", reduction="none", **masks, **nets)
    torch.testing.assert_close(alone, found[0])


def test_ct_says_that_it_has_no_second_derivative():
    query = torch.randn(1, 1, 4, D, requires_grad=True)
    loss = al.alignment_loss(query, query, method="ct", navigator=an.Navigator(D, 6), critic=an.Critic(D, 6))
    with pytest.raises(RuntimeError, match=r"this alignment loss \(ct\) has no second derivative"):
        torch.autograd.grad(loss, query, create_graph=True)


@pytest.mark.parametrize("then", ["none", "relu", "sigmoid", "leaky_relu"])
@pytest.mark.parametrize("onednn", [True, False])
def test_products_show_nan_and_read_a_bias_as_it_lies(seed, then, onednn, monkeypatch):
    monkeypatch.setattr(products, "_onednn", lambda: products.operator() if onednn else None)
    x, weight = torch.randn(50, 32), torch.randn(20, 32)
    x[3, 1], weight[7, 2] = torch.nan, torch.nan
    found = products.linear(x, weight, torch.randn(20), then).isnan()
    assert found[3].all()
    assert found[:, 7].all()
    assert found.sum() == 20 + 50 - 1
    weight = torch.randn(20, 32)
    for bias in (torch.randn(40)[::2], torch.randn(1).expand(20)):
        wanted = products.linear(x, weight, bias.clone(memory_format=torch.contiguous_format), then)
        torch.testing.assert_close(products.linear(x, weight, bias, then), wanted, equal_nan=True)


@pytest.mark.parametrize("then", ["none", "relu", "sigmoid", "leaky_relu"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (50, 64, 32), (9, 3, 1), (0, 16, 16), (5, 100, 17)])
def test_products(seed, then, shape):
    rows, inner, outer = shape
    x, weight, bias = torch.randn(rows, inner), torch.randn(inner, outer).t(), torch.randn(outer)
    functions = {"none": lambda z: z, "relu": F.relu, "sigmoid": torch.sigmoid, "leaky_relu": F.leaky_relu}
    for given in (bias, None):
        wanted = functions[then](F.linear(x.double(), weight.double(), None if given is None else given.double()))
        torch.testing.assert_close(products.linear(x, weight, given, then).double(), wanted, rtol=1e-4, atol=1e-5)
        exact = products.linear(x.double(), weight.double(), None if given is None else given.double(), then)
        torch.testing.assert_close(exact, wanted)
    with pytest.raises(KeyError, match="gelu"):
        products.linear(x, weight, bias, "gelu")


@pytest.mark.parametrize("adversary", [False, True])
@pytest.mark.parametrize("kind", [an.Discriminator, an.Navigator, an.Critic])
def test_networks_have_second_derivatives(kind, adversary):
    net, x = kind(D, 6).double(), torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(net(x))

    def penalty(out):
        (first,) = torch.autograd.grad((out * direction).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *net.parameters()], allow_unused=True)

    reference = {name: an.gradient_reversal(p) if adversary else p for name, p in net.named_parameters()}
    ours, wanted = penalty(an.apply_network(net, x, adversary)), penalty(functional_call(net, reference, (x,)))
    for got, want in zip(ours, wanted, strict=True):
        assert (got is None) == (want is None) or not (got if want is None else want).any()
        if got is not None and want is not None:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["ct", "ot", "mmd"])
def test_a_second_derivative_that_there_is_not_is_refused(method):
    q, k = tensors()
    loss = al.alignment_loss(q, k, method=method, **networks(method))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss + q.pow(3).sum(), q, create_graph=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_backward_pass_under_autocast(method):
    nets = networks(method, torch.float32)
    q, k = tensors(dtype=torch.float32)
    leaves = [q, k, *(p for net in nets.values() for p in net.parameters())]
    loss = al.alignment_loss(q, k, padding(2, 5), method, **nets)
    outside = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.parametrize("method", ["ct", "gan"])
def test_heads_of_one_number_and_empty_batches(method):
    nets = networks(method, dim=1)
    q, k = tensors(d=1)
    loss = al.alignment_loss(q, k, method=method, **nets)
    expected = oracle.over_problems(q, k, None, None, problem_of(method, nets))
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-9)
    torch.autograd.grad(loss, q)
    assert float(al.alignment_loss(q[:0], k[:0], method=method, **nets, reduction="sum").detach()) == 0


@pytest.mark.parametrize("kind", [an.Discriminator, an.Navigator, an.Critic])
def test_networks_keep_their_input_alone(kind):
    net, x = kind(D, 64), torch.randn(100, D, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        an.apply_network(net, x)
    assert max(kept) == max(x.numel(), *(p.numel() for p in net.parameters()))


def test_networks_with_something_hung_on_are_called():
    """A hook, another class inside, another class altogether: these are the caller's, and must not be passed over."""
    x, seen = torch.randn(5, D), []
    net = an.Critic(D, 6)
    handle = net.inner.register_forward_hook(lambda *_: seen.append(1))
    an.apply_network(net, x)
    assert seen
    handle.remove()
    torch.testing.assert_close(an.apply_network(net, x), net(x))
    net.inner = nn.Sequential(net.inner, nn.Tanh())
    assert torch.equal(an.apply_network(net, x), net(x))

    net = an.Critic(D, 6)
    net.inner.forward = lambda x: 3 * torch.ones(*x.shape[:-1], 6)
    assert torch.equal(an.apply_network(net, x), net(x))
    net = an.Critic(D, 6)
    net.highway.gate.register_full_backward_hook(lambda *_: seen.append(2))
    an.apply_network(net, x).sum().backward()
    assert 2 in seen
    net = an.Navigator(D, 6)
    net.outer = nn.Linear(6, D, bias=False)
    assert torch.equal(an.apply_network(net, x), net(x))

    class Doubled(an.Critic):
        def forward(self, x):
            return 2 * super().forward(x)

    net = Doubled(D, 6)
    torch.testing.assert_close(an.apply_network(net, x), net(x))


@pytest.mark.parametrize("kind", [an.Discriminator, an.Navigator, an.Critic])
def test_networks(kind):
    net = kind(D, 6).double()
    x = torch.randn(2, 3, 5, D, dtype=torch.float64)
    out = net(x)
    assert out.shape == ((2, 3, 5) if kind is an.Discriminator else (2, 3, 5, D))
    one = x[1, 2, 3]
    expected = oracle.mlp(net, one if kind is an.Navigator else oracle.highway(net.highway, one))
    torch.testing.assert_close(out[1, 2, 3], expected.squeeze(0) if kind is an.Discriminator else expected)
    inside = {id(p) for m in net.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    assert {id(p) for p in net.parameters()} == inside  # plain linear layers only
    before = [p.detach().clone() for p in net.parameters()]
    torch.manual_seed(0)
    net.reset_parameters()
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_one_optimiser_trains_both_sides():
    """Plain SGD on the one loss: the discriminator learns to tell fixed q from k, then q and k fool it."""
    torch.manual_seed(0)
    q, k = (x.detach() for x in tensors(4, 2, 8, 8, dtype=torch.float32))
    net = an.Discriminator(D, 16)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    values = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = al.alignment_loss(q, k, method="gan", discriminator=net)
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert values[-1] > values[0] + 0.05
    for p in net.parameters():
        p.requires_grad_(False)
    q.requires_grad_()
    k.requires_grad_()
    optimiser = torch.optim.Adam([q, k], lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        loss = al.alignment_loss(q, k, method="gan", discriminator=net)
        loss.backward()
        optimiser.step()
    assert loss.item() < values[-1] - 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "otr"}, "'ot'"),
        ({"reduction": "avg"}, "mean"),
        ({"method": "gan"}, "needs a discriminator"),
        ({"method": "ot", "critic": an.Critic(D, 4)}, "belong to method='ct'"),
        ({"method": "ct", "discriminator": an.Discriminator(D, 4)}, "belongs to method='gan'"),
        ({"bandwidth": "medain"}, "median"),
        ({"bandwidth": 0.0}, "positive"),
        ({"eps": 0.0}, "positive"),
        ({"key_padding_mask": torch.zeros(2, 5)}, "has to be bool"),
        ({"query_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, "query_padding_mask"),
        ({"query": torch.zeros(2, 2, 5, 3)}, "may differ in length only"),
    ],
)
def test_errors_say_what_is_allowed(change, message):
    q, k = tensors()
    with pytest.raises(SpecError, match=message):
        al.alignment_loss(**{"query": q, "key": k, **change})


def test_measure_errors():
    q, k = tensors()
    with pytest.raises(SpecError, match="head"):
        al.mmd(q, k, reduction="heads")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ct", "gan", "mmd"])
def test_torch_compile(method):
    nets = networks(method, torch.float32)
    q, k = tensors(dtype=torch.float32)
    pad = padding(2, 5)
    leaves = [q, k, *(p for net in nets.values() for p in net.parameters())]
    plain = al.alignment_loss(q, k, pad, method, **nets)
    fast = torch.compile(al.alignment_loss)(q, k, pad, method, **nets)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    for g, w in zip(torch.autograd.grad(fast, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["gan", "ct"])
def test_networks_for_other_heads_are_refused(method):
    query, key = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    parts = {"gan": {"discriminator": an.Discriminator(8, 5)}, "ct": {"navigator": an.Navigator(8, 5)}}
    with pytest.raises(SpecError, match="is for heads of 8, and query and key have 16"):
        al.alignment_loss(query, key, method=method, **parts[method])
