"""Query-value interaction and alignment losses as the formulas read: loops over batch, head, query and key.

No blocks, no masks inside tensors, no shared code with attnpatch. Differentiable, for float64 inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sdpa_weights(query: Tensor, key: Tensor, visible: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Softmax over the visible keys of each row, one row at a time; visible and bias are full [B, H, T, S]."""
    batch, heads, length, dim = query.shape
    scale = 1 / math.sqrt(dim) if scale is None else scale
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = [j for j in range(key.shape[2]) if bool(visible[b, h, i, j])]
                row = [query.new_zeros(()) for _ in range(key.shape[2])]
                if seen:
                    scores = [scale * (query[b, h, i] * key[b, h, j]).sum() for j in seen]
                    if bias is not None:
                        scores = [z + bias[b, h, i, j] for z, j in zip(scores, seen, strict=True)]
                    for j, w in zip(seen, torch.softmax(torch.stack(scores), 0), strict=True):
                        row[j] = w
                rows.append(torch.stack(row))
    return torch.stack(rows).view(batch, heads, length, key.shape[2])


def _phi(p: dict[str, Tensor], phi: str, h: int, q: Tensor, v: Tensor) -> Tensor:
    if phi == "product":
        return q * v
    return torch.tanh(p["phi_query"][h] @ q + p["phi_value"][h] @ v + p["phi_bias"][h])


def _gated(p: dict[str, Tensor], phi: str, h: int, q: Tensor, v: Tensor) -> Tensor:
    logit = p["gate_query"][h] @ q + p["gate_bias"][h]
    if "gate_value" in p:
        logit = logit + p["gate_value"][h] @ v
    gate = p["strength"][h] / (1 + torch.exp(-logit))
    return gate * _phi(p, phi, h, q, v) + (1 - gate) * v


def pairwise(query: Tensor, weights: Tensor, value: Tensor, p: dict[str, Tensor], phi: str = "product") -> Tensor:
    """Also the oracle of gate="query", when p has no gate_value."""
    batch, heads, length, dim = query.shape
    out = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                total = query.new_zeros(dim)
                for j in range(value.shape[2]):
                    total = total + weights[b, h, i, j] * _gated(p, phi, h, query[b, h, i], value[b, h, j])
                out.append(total)
    return torch.stack(out).view(batch, heads, length, dim)


def pooled(
    query: Tensor,
    weights: Tensor,
    value: Tensor,
    p: dict[str, Tensor],
    phi: str = "product",
    query_valid: Tensor | None = None,
    pool_query: Tensor | None = None,
) -> Tensor:
    batch, heads, length, dim = query.shape
    out = []
    for b in range(batch):
        tokens = [i for i in range(length) if query_valid is None or bool(query_valid[b, i])]
        for h in range(heads):
            values = []
            for j in range(value.shape[2]):
                if pool_query is None:
                    shares = [weights[b, h, i, j] for i in tokens]
                else:
                    shares = [torch.exp((pool_query[h] * query[b, h, i]).sum()) for i in tokens]
                mixed, total = query.new_zeros(dim), query.new_zeros(())
                for share, i in zip(shares, tokens, strict=True):
                    mixed, total = mixed + share * query[b, h, i], total + share
                if total.item() > 0:
                    mixed = mixed / total
                values.append(_gated(p, phi, h, mixed, value[b, h, j]))
            for i in range(length):
                out.append(sum(weights[b, h, i, j] * v for j, v in enumerate(values)))
    return torch.stack(out).view(batch, heads, length, dim)


# ------------------------------------------------------------------------------------------- alignment


def _leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.01 * x)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer.weight @ x + layer.bias


def highway(net: nn.Module, x: Tensor) -> Tensor:
    t = 1 / (1 + torch.exp(-_linear(net.gate, x)))
    return t * torch.clamp(_linear(net.transform, x), min=0) + (1 - t) * x


def mlp(net: nn.Module, x: Tensor) -> Tensor:
    return _linear(net.outer, _leaky(_linear(net.inner, x)))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt())


def ct_problem(qs: list[Tensor], ks: list[Tensor], navigator: nn.Module | None, critic: nn.Module | None) -> Tensor:
    def nav(x: Tensor) -> Tensor:
        return x if navigator is None else mlp(navigator, x)

    def eta(x: Tensor) -> Tensor:
        return x if critic is None else mlp(critic, highway(critic.highway, x))

    s = torch.stack([torch.stack([(nav(q) * nav(k)).sum() for k in ks]) for q in qs])
    c = torch.stack([torch.stack([1 - cosine(eta(q), eta(k)) for k in ks]) for q in qs])
    forward = sum((torch.softmax(s[i], 0) * c[i]).sum() for i in range(len(qs))) / len(qs)
    backward = sum((torch.softmax(s[:, j], 0) * c[:, j]).sum() for j in range(len(ks))) / len(ks)
    return (forward + backward) / 2


def gan_problem(qs: list[Tensor], ks: list[Tensor], discriminator: nn.Module) -> Tensor:
    def d(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-mlp(discriminator, highway(discriminator.highway, x)).squeeze(0)))

    return sum(torch.log(d(q)) for q in qs) / len(qs) + sum(torch.log(1 - d(k)) for k in ks) / len(ks)


def mmd_problem(qs: list[Tensor], ks: list[Tensor], bandwidth: float | str) -> Tensor:
    def square(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().sum()

    tokens = qs + ks
    if isinstance(bandwidth, str):
        pairs = [(i, j) for i in range(len(tokens)) for j in range(len(tokens)) if i != j]
        seen = sorted(square(tokens[i], tokens[j]).item() for i, j in pairs)
        variance = seen[(len(seen) - 1) // 2] if bandwidth == "median" else sum(seen) / len(seen)
    else:
        variance = bandwidth**2

    def mean(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        return sum(torch.exp(-square(x, y) / (2 * variance)) for x in xs for y in ys) / (len(xs) * len(ys))

    return mean(qs, qs) + mean(ks, ks) - 2 * mean(qs, ks)


def over_problems(query: Tensor, key: Tensor, q_padding: Tensor | None, k_padding: Tensor | None, problem) -> Tensor:
    """problem(list of valid queries, list of valid keys), averaged over counted sequences and heads."""
    losses = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            qs = [query[b, h, i] for i in range(query.shape[2]) if q_padding is None or not bool(q_padding[b, i])]
            ks = [key[b, h, j] for j in range(key.shape[2]) if k_padding is None or not bool(k_padding[b, j])]
            if qs and ks:
                losses.append(problem(qs, ks))
    return sum(losses) / len(losses) if losses else query.sum() * 0
