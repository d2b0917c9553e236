"""Alignment attention: a training loss that brings the queries and keys of each head together
(Zhang, Fan, Zheng, Tanwisuth, Zhou, NeurIPS 2021, arXiv 2110.12567).

For each batch entry and head, over the valid tokens of the sequence:

    ct    t_phi: navigator, t_eta: critic;  S_ij = t_phi(q_i) . t_phi(k_j)
          C_ij = 1 - cos(t_eta(q_i), t_eta(k_j))
          1/2 mean_i sum_j softmax_j(S)_ij C_ij + 1/2 mean_j sum_i softmax_i(S)_ij C_ij
    gan   mean_i log D(q_i) + mean_j log(1 - D(k_j))
    ot    <P, C>, C_ij = 1 - cos(q_i, k_j), P the entropic transport plan between uniform marginals
    mmd   biased squared Gaussian-kernel maximum mean discrepancy (the paper's measure, here also a loss)

Signs: the loss is *minimised* by one optimiser. Queries, keys and navigator descend. The critic and the
discriminator are adversaries and ascend: the gradient of their *parameters* alone is reversed, while the
gradient that reaches queries and keys through them is not.

Padding is replaced by zeros first and excluded everywhere: what it holds changes neither the value nor a
gradient, and its own gradient is exactly zero. Arithmetic is in float32 (float64 for float64), also under
autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SpecError, unknown
from .alignment_networks import (
    Critic,
    Discriminator,
    Navigator,
    apply_network,
    check_width,
    loss_of_pair,
    serves_pair,
    serves_triton,
)
from .once import differentiable_once
from .triton_here import USABLE

if USABLE:
    from . import alignment_triton

METHODS = ("ct", "gan", "ot", "mmd")
REDUCTIONS = ("mean", "sum", "none")
BANDWIDTHS = ("median", "mean")
_TINY_NORM = 1e-6


# ----------------------------------------------------------------------------------------- shared pieces


@dataclass(frozen=True)
class _Tokens:
    """Queries and keys of every problem in one tensor, so that each network is called once."""

    x: Tensor  # [B, H, T + S, D], zero where padding
    length: int  # T
    q_valid: Tensor | None  # [B, T]; None (then both are): all
    k_valid: Tensor | None  # [B, S]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, T + S, ...] -> the queries' part and the keys' part, as views."""
        return x[:, :, : self.length], x[:, :, self.length :]


def _checked(
    query: Tensor, key: Tensor, key_padding_mask: Tensor | None, query_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The masks of queries and keys, both or neither."""
    if query.dim() != 4 or key.dim() != 4 or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise SpecError(
            "query and key have to be [batch, heads, length, head_dim] and may differ in length only;"
            f" got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query_padding_mask is None and query.shape[2] == key.shape[2]:
        query_padding_mask = key_padding_mask
    for name, mask, x in (
        ("key_padding_mask", key_padding_mask, key),
        ("query_padding_mask", query_padding_mask, query),
    ):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (x.shape[0], x.shape[2])):
            raise SpecError(
                f"{name} has to be bool (True: padding) of shape {(x.shape[0], x.shape[2])} (batch, length);"
                f" got {mask.dtype} {tuple(mask.shape)}"
            )
    if query_padding_mask is None and key_padding_mask is None:
        return None, None
    q_padding, k_padding = (
        torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device) if mask is None else mask
        for x, mask in ((query, query_padding_mask), (key, key_padding_mask))
    )
    return q_padding, k_padding


def _prepare(query: Tensor, key: Tensor, padding: tuple[Tensor, Tensor] | tuple[None, None]) -> _Tokens:
    dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    tokens = torch.cat([query, key], dim=2).to(dtype)
    q_padding, k_padding = padding
    if q_padding is None or k_padding is None:
        return _Tokens(tokens, query.shape[2], None, None)
    tokens = tokens.masked_fill_(torch.cat([q_padding, k_padding], dim=1)[:, None, :, None], 0.0)
    return _Tokens(tokens, query.shape[2], ~q_padding, ~k_padding)


class _WithGradients(torch.autograd.Function):
    """A loss [B, H] whose gradients with respect to its inputs [B, H, L, D] were computed along with it.

    Nothing of size T x S waits for the backward pass, which is one product.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *inputs_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs_and_gradients[count:])
        ctx.count = count
        return loss.view_as(loss)

    @staticmethod
    @differentiable_once("this alignment loss (ct, ot or mmd)")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad[..., None, None]
        return (None, None, *(scale * x for x in ctx.saved_tensors), *[None] * ctx.count)


def _with_gradients(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    return _WithGradients.apply(loss, len(inputs), *inputs, *gradients)


def _blocks(count: int, elements: int, device: torch.device) -> list[slice]:
    """`count` problems of `elements` numbers each in parts that a CPU's cache holds."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        size = max(1, (1 << 27) // elements)
    else:
        size = max(1, (1 << 18) // elements)
    return [slice(i, i + size) for i in range(0, count, size)]


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """[B, H, L] -> [B, H]: the mean over valid tokens, 0 where there is none."""
    if valid is None:
        return x.mean(-1)
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    return x.masked_fill(~valid[:, None], 0.0).sum(-1) / count


def _reduce(loss: Tensor, q_valid: Tensor | None, k_valid: Tensor | None, reduction: str) -> Tensor:
    """[B, H] losses reduced; a sequence without a valid query or key contributes 0 and is not counted."""
    counted = None
    if q_valid is not None and k_valid is not None:
        counted = q_valid.any(-1) & k_valid.any(-1)
        loss = loss.masked_fill(~counted[:, None], 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    per_head = loss.mean(0) if counted is None else loss.sum(0) / counted.sum().clamp(min=1)
    return per_head if reduction == "head" else per_head.mean()


def _unit_and_inverse(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| and 1 / |x|, both 0 for a vector shorter than 1e-6: it has no direction, its cosine is 0."""
    square = x.square().sum(-1, keepdim=True)
    tiny = square <= _TINY_NORM**2
    inverse = torch.where(tiny, 1.0, square).rsqrt().masked_fill(tiny, 0.0)
    return x * inverse, inverse


# ---------------------------------------------------------------------------------------------- methods


def _shares(tokens: _Tokens, queries: bool) -> Tensor:
    """1 / n at the n valid tokens of a sequence, 0 at padding: [B, L]."""
    valid = tokens.q_valid if queries else tokens.k_valid
    if valid is None:
        length = tokens.length if queries else tokens.x.shape[2] - tokens.length
        return tokens.x.new_full((tokens.x.shape[0], length), 1.0 / max(length, 1))
    return valid.to(tokens.x.dtype) / valid.sum(-1, keepdim=True).clamp(min=1)


def _conditional_transport(tokens: _Tokens, navigator: nn.Module | None, critic: nn.Module | None) -> Tensor:
    """Loss [B, H]; with W = 1/2 (a_i softmax_j(S)_ij + b_j softmax_i(S)_ij) it is sum_ij W_ij (1 - cos_ij).

    Both directions share S and the cosines. Their gradients are taken at once, so that the T x S matrices of a
    few problems at a time are all that ever exists.
    """
    moves = apply_network(navigator, tokens.x)
    features = apply_network(critic, tokens.x, adversary=True)
    needs = torch.is_grad_enabled() and (moves.requires_grad or features.requires_grad)
    with torch.no_grad():
        loss, gradients = _transport_losses(tokens, moves.detach(), features.detach(), needs)
    return _with_gradients(loss, (moves, features), gradients) if needs else loss


def _transport_losses(
    tokens: _Tokens, moves: Tensor, features: Tensor, needs_gradients: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss [B, H] of moved tokens and features [B, H, T + S, D], and its gradients with respect to both, or ()."""
    batch, heads, total, dim = tokens.x.shape
    length, many = tokens.length, batch * heads
    a = _shares(tokens, queries=True).repeat_interleave(heads, 0).unsqueeze(-1) / 2  # [B H, T, 1]
    b = _shares(tokens, queries=False).repeat_interleave(heads, 0).unsqueeze(-2) / 2  # [B H, 1, S]
    off = None
    if tokens.q_valid is not None and tokens.k_valid is not None:
        # A sequence without a valid token is dropped later, and must not give NaN here: a finite number.
        off = ~(tokens.q_valid[:, :, None] & tokens.k_valid[:, None]).repeat_interleave(heads, 0)
    moves, features = moves.reshape(many, total, dim), features.reshape(many, total, dim)
    loss = features.new_empty(many)
    d_moves, d_features = (torch.empty_like(x) if needs_gradients else None for x in (moves, features))
    for part in _blocks(many, length * (total - length), features.device):
        q_move, k_move = moves[part, :length], moves[part, length:]
        unit, inverse = _unit_and_inverse(features[part])
        q_unit, k_unit = unit[:, :length], unit[:, length:]
        scores = torch.bmm(q_move, k_move.mT)
        if off is not None:
            # Their weights are then 0; of rows and columns that are padding as a whole a or b is 0.
            scores.masked_fill_(off[part], torch.finfo(scores.dtype).min)
        cosine = torch.bmm(q_unit, k_unit.mT)
        forward = torch.softmax(scores, -1).mul_(a[part])
        backward = torch.softmax(scores, -2).mul_(b[part])
        plan = forward + backward
        forward_gain, backward_gain = forward * cosine, backward * cosine
        row_gain, column_gain = forward_gain.sum(-1, keepdim=True), backward_gain.sum(-2, keepdim=True)
        loss[part] = plan.sum((-1, -2)) - row_gain.sum((-1, -2)) - column_gain.sum((-1, -2))
        if d_moves is None or d_features is None:
            continue
        # sum_j forward_ij cos_ij = a_i E_i[cos], and the softmax's gradient is forward (cos - E[cos]).
        row_mean, column_mean = _ratio(row_gain, a[part]), _ratio(column_gain, b[part])
        d_scores = forward.mul_(row_mean).addcmul_(backward, column_mean).sub_(forward_gain).sub_(backward_gain)
        d_moves[part, :length] = torch.bmm(d_scores, k_move)
        d_moves[part, length:] = torch.bmm(d_scores.mT, q_move)
        for place, e, g in (
            (slice(None, length), q_unit, torch.bmm(plan, k_unit)),
            (slice(length, None), k_unit, torch.bmm(plan.mT, q_unit)),
        ):
            # Through x / |x|, with the sign of -cos: (e (e . g) - g) / |x|.
            along = (e * g).sum(-1, keepdim=True)
            torch.mul((e * along).sub_(g), inverse[:, place], out=d_features[part, place])
    shape = (batch, heads, total, dim)
    if d_moves is None or d_features is None:
        return loss.view(batch, heads), ()
    return loss.view(batch, heads), (d_moves.view(shape), d_features.view(shape))


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0."""
    return (x / y.masked_fill(y == 0, 1.0)).masked_fill(y == 0, 0.0)


def _fused(network: nn.Module, kinds: tuple[type, ...], query: Tensor, key: Tensor) -> bool:
    """Whether a network is one of those that the fused losses know in its place, and can be served."""
    return type(network) in kinds and serves_triton(network, query, key)


def _adversarial(tokens: _Tokens, discriminator: nn.Module) -> Tensor:
    q_logit, k_logit = tokens.split(apply_network(discriminator, tokens.x, adversary=True))
    return _mean(F.logsigmoid(q_logit), tokens.q_valid) + _mean(F.logsigmoid(-k_logit), tokens.k_valid)


def _scale_rows(matrix: Tensor, a: Tensor, b: Tensor, row_off: Tensor, steps: int) -> Tensor:
    """Plain Sinkhorn scaling of a matrix whose columns sum to b: log u after `steps` steps.

    The floor keeps a row or column that has underflown finite; its potential is set right in the log domain.
    """
    floor = torch.finfo(matrix.dtype).tiny / torch.finfo(matrix.dtype).eps
    transposed = matrix.transpose(-1, -2)
    u = a / matrix.sum(-1, keepdim=True).clamp(min=floor)
    for _ in range(steps - 1):
        v = b / torch.matmul(transposed, u).clamp(min=floor)
        u = a / torch.matmul(matrix, v).clamp(min=floor)
    return u.clamp(min=floor).log().masked_fill(row_off, 0.0)


@torch.no_grad()
def sinkhorn_plan(
    cost: Tensor,
    row_valid: Tensor | None = None,
    column_valid: Tensor | None = None,
    eps: float = 0.01,
    iterations: int = 500,
    tolerance: float = 1e-2,
) -> Tensor:
    """Plan of entropic optimal transport between uniform marginals over the valid rows and columns.

    Stabilised Sinkhorn iterations: potentials are kept in the log domain and taken into the matrix every few
    steps, between which a step is two matrix-vector products. The regularisation falls to `eps` in stages,
    each starting from the potentials of the one before.

    Args:
        cost: [..., T, S]. row_valid [..., T], column_valid [..., S]: bool, broadcastable to it; None: all.
        eps: strength of the entropy, in units of the cost.
        iterations: at most about this many at the final `eps`.
        tolerance: stop when the row marginals of every problem are off by less than this, as the sum of absolute
            differences (the column marginals are exact up to rounding).
    Returns:
        [..., T, S] without gradient; zero where a row or column is not valid.
    """
    if row_valid is None:
        row_valid = torch.ones(cost.shape[-2], dtype=torch.bool, device=cost.device)
    if column_valid is None:
        column_valid = torch.ones(cost.shape[-1], dtype=torch.bool, device=cost.device)
    off = ~(row_valid.unsqueeze(-1) & column_valid.unsqueeze(-2))
    row_off, column_off = ~row_valid.unsqueeze(-1), ~column_valid.unsqueeze(-2)
    ones = torch.ones((), dtype=cost.dtype, device=cost.device)
    a = (ones / row_valid.sum(-1).clamp(min=1)[..., None, None]).masked_fill(row_off, 0.0)
    b = (ones / column_valid.sum(-1).clamp(min=1)[..., None, None]).masked_fill(column_off.mT, 0.0)
    a, b = a.expand(*cost.shape[:-1], 1), b.expand(*cost.shape[:-2], cost.shape[-1], 1)
    log_b = b.clamp(min=torch.finfo(cost.dtype).tiny).log().mT
    excluded = torch.finfo(cost.dtype).min / 4  # finite: no inf - inf in a problem without valid tokens
    f, g = torch.zeros_like(a), torch.zeros_like(b.mT)

    stage = max(float(eps), 1.0)
    while True:
        kernel = (cost / -stage).masked_fill(off, excluded)
        f = f / stage  # potentials in units of the regularisation
        done, steps = 0, 10
        final = stage <= eps
        while True:
            g = (log_b - (kernel + f).logsumexp(-2, keepdim=True)).masked_fill(column_off, 0.0)
            plan = (kernel + f).add_(g).exp_()
            if final:
                error = (plan.sum(-1, keepdim=True) - a).abs().sum((-1, -2))
                if done >= iterations or bool((error < tolerance).all()):
                    return plan.masked_fill_(off, 0.0)
            elif done > 0:
                break
            f = f + _scale_rows(plan, a, b, row_off, steps)
            done, steps = done + steps, 20
        f = f * stage
        stage = max(float(eps), stage / 4)


def _optimal_transport(tokens: _Tokens, eps: float, iterations: int, tolerance: float) -> Tensor:
    """<P, C> with P held fixed: by the envelope theorem its gradient is that of the entropic objective."""
    with torch.no_grad():
        unit, inverse = _unit_and_inverse(tokens.x.detach())
        q_unit, k_unit = tokens.split(unit)
        cost = 1 - torch.matmul(q_unit, k_unit.mT)
        rows = None if tokens.q_valid is None else tokens.q_valid[:, None]
        columns = None if tokens.k_valid is None else tokens.k_valid[:, None]
        plan = sinkhorn_plan(cost, rows, columns, eps, iterations, tolerance)
        loss = (plan * cost).sum((-1, -2))
        other = torch.cat([torch.matmul(plan, k_unit), torch.matmul(plan.mT, q_unit)], dim=2)
        gradient = (unit * (unit * other).sum(-1, keepdim=True)).sub_(other).mul_(inverse)
    return _with_gradients(loss, (tokens.x,), (gradient,))


def _mean_discrepancy(tokens: _Tokens, bandwidth: float | str) -> Tensor:
    """mean k(q, q') + mean k(k, k') - 2 mean k(q, k), k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2))."""
    with torch.no_grad():
        loss, gradient = _discrepancies(tokens, bandwidth)
    return _with_gradients(loss, (tokens.x,), (gradient,))


def _discrepancies(tokens: _Tokens, bandwidth: float | str) -> tuple[Tensor, Tensor]:
    """Loss [B, H] and its gradient with respect to the tokens."""
    x = tokens.x.detach()
    total = x.shape[2]
    valid = None
    if tokens.q_valid is not None and tokens.k_valid is not None:
        valid = torch.cat([tokens.q_valid, tokens.k_valid], dim=1)
    # Distances do not depend on the origin; a near one avoids cancellation in |x|^2 + |y|^2 - 2 x.y.
    centre = _mean(x.transpose(2, 3).flatten(1, 2), valid).unflatten(1, (x.shape[1], -1))
    x = x - centre.unsqueeze(2)
    if valid is not None:
        x = x.masked_fill(~valid[:, None, :, None], 0.0)
    norm = x.square().sum(-1)
    square = norm.unsqueeze(-1) + norm.unsqueeze(-2) - 2 * torch.matmul(x, x.mT)
    same = torch.eye(total, dtype=torch.bool, device=x.device)
    square = square.clamp_(min=0.0).masked_fill_(same, 0.0)
    pair = None if valid is None else (valid.unsqueeze(-1) & valid.unsqueeze(-2))[:, None]

    if isinstance(bandwidth, str):
        if bandwidth == "median":
            skipped = same if pair is None else same | ~pair
            seen = square.masked_fill(skipped, float("nan"))
            scale = seen.flatten(2).nanmedian(-1).values.nan_to_num(0.0)
        else:  # the tokens are centred, so the mean over pairs i != j is 2 sum |x|^2 / (n - 1)
            count = total if valid is None else valid.sum(-1)[:, None]
            scale = 2 * norm.sum(-1) / torch.as_tensor(count - 1, device=norm.device).clamp(min=1)
        two_sigma_square = 2 * torch.where(scale > _TINY_NORM**2, scale, 1.0)[..., None, None]
    else:
        two_sigma_square = torch.as_tensor(2 * bandwidth**2, dtype=x.dtype, device=x.device)
    kernel = square.div_(-two_sigma_square).exp_()

    # One signed weight a token, +1/n for queries and -1/m for keys: the loss is weight' kernel weight.
    signed = torch.cat([_shares(tokens, queries=True), -_shares(tokens, queries=False)], dim=1)[:, None, :, None]
    pull = torch.matmul(kernel, signed)
    loss = (pull * signed).sum((-1, -2))
    gradient = (torch.matmul(kernel, signed * x) - pull * x).mul_(signed).mul_(4 / two_sigma_square)
    return loss, gradient


# ---------------------------------------------------------------------------------------------- public


def _check_bandwidth(bandwidth: float | str | None) -> float | str:
    if bandwidth is None:
        return "median"
    if isinstance(bandwidth, str):
        if bandwidth not in BANDWIDTHS:
            raise SpecError(unknown("bandwidth", bandwidth, BANDWIDTHS) + ", or a positive number")
    elif not bandwidth > 0:
        raise SpecError(f"bandwidth has to be positive, 'median' or 'mean'; got {bandwidth}")
    return bandwidth


def alignment_loss(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    method: str = "ct",
    query_padding_mask: Tensor | None = None,
    navigator: nn.Module | None = None,
    critic: nn.Module | None = None,
    discriminator: nn.Module | None = None,
    eps: float = 0.01,
    iterations: int = 500,
    tolerance: float = 1e-2,
    bandwidth: float | str | None = None,
    reduction: str = "mean",
) -> Tensor:
    """How far queries and keys are apart, to be *minimised* (weight 0.01 in the paper) while training.

    One problem for each batch entry and head, over its valid tokens; then the mean over batch and heads. A
    sequence without a valid token contributes 0 and is not counted. See the module for the four methods, and
    for the signs: the optimiser that minimises this loss makes the critic and the discriminator ascend.

    Args:
        query: [B, H, T, D]. key: [B, H, S, D].
        key_padding_mask: bool [B, S], True where the key is padding (as in `nn.MultiheadAttention`).
        method: "ct", "gan", "ot" or "mmd".
        query_padding_mask: bool [B, T]; None: the mask of the keys when T == S, else no padding.
        navigator, critic: networks of "ct"; None is the identity.
        discriminator: network of "gan", which needs one; it returns a logit of shape [...].
        eps, iterations, tolerance: of "ot", see `sinkhorn_plan`.
        bandwidth: of "mmd": sigma of the kernel, or its heuristic, sigma^2 = the "median" (None) or the cheaper
            "mean" of the squared distances between distinct valid tokens of the problem, without gradient.
        reduction: "mean", "sum" or "none" ([B, H]).
    Returns:
        A scalar in float32 (float64 for float64).
    Raises:
        SpecError: for an unknown method or reduction, shapes that do not fit, a network that the method has no use
            for, or a missing one that it needs.
    """
    if method not in METHODS:
        raise SpecError(unknown("alignment method", method, METHODS))
    if reduction not in REDUCTIONS:
        raise SpecError(unknown("reduction", reduction, REDUCTIONS))
    if method != "ct" and (navigator is not None or critic is not None):
        raise SpecError(f"navigator and critic belong to method='ct'; method={method!r} has none")
    if method != "gan" and discriminator is not None:
        raise SpecError(f"a discriminator belongs to method='gan'; method={method!r} has none")
    if not (eps > 0 and tolerance > 0 and iterations >= 1):
        raise SpecError(
            f"eps and tolerance have to be positive and iterations at least 1; got {eps}, {tolerance} and {iterations}"
        )
    width = _check_bandwidth(bandwidth)
    with torch.autocast(query.device.type, enabled=False):
        padding = _checked(query, key, key_padding_mask, query_padding_mask)
        for network in (navigator, critic, discriminator):
            check_width(network, query.shape[-1])
        if reduction != "none":
            # What cannot be averaged afterwards is averaged in there.
            mean = reduction == "mean"
            if discriminator is not None and _fused(discriminator, (Discriminator,), query, key):
                return alignment_triton.adversarial(query, key, padding, discriminator, mean)
            if (
                navigator is not None
                and critic is not None
                and _fused(navigator, (Navigator,), query, key)
                and _fused(critic, (Critic, Navigator), query, key)
            ):
                return alignment_triton.transport(query, key, padding, navigator, critic, mean)
        if navigator is not None and critic is not None and serves_pair(navigator, critic, query, key):
            tokens = _prepare(query.detach(), key.detach(), padding)
            transport = functools.partial(_transport_losses, tokens, needs_gradients=True)
            loss = loss_of_pair(navigator, critic, query, key, tokens.x, transport)
            return _reduce(loss, tokens.q_valid, tokens.k_valid, reduction)
        tokens = _prepare(query, key, padding)
        if method == "ct":
            loss = _conditional_transport(tokens, navigator, critic)
        elif method == "ot":
            loss = _optimal_transport(tokens, eps, iterations, tolerance)
        elif method == "mmd":
            loss = _mean_discrepancy(tokens, width)
        elif discriminator is None:
            raise SpecError("method='gan' needs a discriminator (attnpatch.kernels.alignment_networks.Discriminator)")
        else:
            loss = _adversarial(tokens, discriminator)
        return _reduce(loss, tokens.q_valid, tokens.k_valid, reduction)


@torch.no_grad()
def mmd(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    bandwidth: float | str | None = None,
    reduction: str = "head",
) -> Tensor:
    """The paper's measure: squared MMD between queries and keys, without gradient; [H], to be summed over heads.

    Args as in `alignment_loss`; reduction: "head" ([H], mean over the counted sequences), "mean" (scalar) or
    "none" ([B, H]). For numbers that compare between models give a fixed bandwidth.
    """
    allowed = ("head", "mean", "none")
    if reduction not in allowed:
        raise SpecError(unknown("reduction", reduction, allowed))
    width = _check_bandwidth(bandwidth)
    with torch.autocast(query.device.type, enabled=False):
        tokens = _prepare(query, key, _checked(query, key, key_padding_mask, query_padding_mask))
        return _reduce(_mean_discrepancy(tokens, width), tokens.q_valid, tokens.k_valid, reduction)
