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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import SpecError, unknown

METHODS = ("ct", "gan", "ot", "mmd")
REDUCTIONS = ("mean", "sum", "none")
BANDWIDTHS = ("median", "mean")
_TINY_NORM = 1e-6


# ------------------------------------------------------------------------------------- gradient reversal


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * -ctx.scale, None


def gradient_reversal(x: Tensor, scale: float = 1.0) -> Tensor:
    """The identity, whose gradient is multiplied by `-scale`."""
    return _GradientReversal.apply(x, scale)


def reversed_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of `module` by name, with reversed gradients: for `torch.func.functional_call`."""
    return {name: gradient_reversal(parameter) for name, parameter in module.named_parameters()}


def _call(module: nn.Module | None, x: Tensor, adversary: bool = False) -> Tensor:
    """module(x) with its parameters in the dtype of x, their gradient reversed for an adversary; None: x."""
    if module is None:
        return x
    parameters = reversed_parameters(module) if adversary else dict(module.named_parameters())
    return functional_call(module, {name: p.to(x.dtype) for name, p in parameters.items()}, (x,))


# ---------------------------------------------------------------------------------------------- networks


class _Network(nn.Module):
    """Linear layers on [..., head_dim], one network for all heads of a layer."""

    def reset_parameters(self) -> None:
        """Initialise every linear layer as `nn.Linear` does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()


class Highway(_Network):
    """t = sigmoid(A x); t * relu(B x) + (1 - t) * x. A and B are linear layers with a bias."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(head_dim, head_dim)
        self.transform = nn.Linear(head_dim, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return gate * F.relu(self.transform(x)) + (1 - gate) * x


class Discriminator(_Network):
    """[..., head_dim] -> [...]: the logit of D(x); highway, Linear, LeakyReLU, Linear (D is its sigmoid)."""

    def __init__(self, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.highway = Highway(head_dim)
        self.inner = nn.Linear(head_dim, hidden)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.leaky_relu(self.inner(self.highway(x)))).squeeze(-1)


class Navigator(_Network):
    """[..., head_dim] -> [..., head_dim]: Linear, LeakyReLU, Linear (t_phi of `ct`)."""

    def __init__(self, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(head_dim, hidden)
        self.outer = nn.Linear(hidden, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.leaky_relu(self.inner(x)))


class Critic(_Network):
    """[..., head_dim] -> [..., head_dim]: highway, Linear, LeakyReLU, Linear (t_eta of `ct`)."""

    def __init__(self, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.highway = Highway(head_dim)
        self.inner = nn.Linear(head_dim, hidden)
        self.outer = nn.Linear(hidden, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.leaky_relu(self.inner(self.highway(x))))


# ----------------------------------------------------------------------------------------- shared pieces


def _prepare(
    query: Tensor, key: Tensor, key_padding_mask: Tensor | None, query_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Checked and upcast query and key with zeros for padding, and their valid tokens [B, L] (None: all)."""
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
    dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    query, key = query.to(dtype), key.to(dtype)
    if query_padding_mask is None and key_padding_mask is None:
        return query, key, None, None
    none_padded = [torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device) for x in (query, key)]
    q_padding = none_padded[0] if query_padding_mask is None else query_padding_mask
    k_padding = none_padded[1] if key_padding_mask is None else key_padding_mask
    query = query.masked_fill(q_padding[:, None, :, None], 0.0)
    key = key.masked_fill(k_padding[:, None, :, None], 0.0)
    return query, key, ~q_padding, ~k_padding


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


def _unit(x: Tensor) -> Tensor:
    """x / |x|; a vector shorter than 1e-6 has no direction: 0, with zero gradient, so that its cosine is 0."""
    square = x.square().sum(-1, keepdim=True)
    tiny = square <= _TINY_NORM**2
    return (x * torch.where(tiny, 1.0, square).rsqrt()).masked_fill(tiny, 0.0)


# ---------------------------------------------------------------------------------------------- methods


def _conditional_transport(
    query: Tensor,
    key: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    navigator: nn.Module | None,
    critic: nn.Module | None,
) -> Tensor:
    """sum_j p_ij (1 - e_qi . e_kj) = 1 - e_qi . sum_j p_ij e_kj: each direction is one fused attention with
    values e, and nothing of size T x S is kept."""
    q_nav, k_nav = _call(navigator, query), _call(navigator, key)
    q_unit = _unit(_call(critic, query, adversary=True))
    k_unit = _unit(_call(critic, key, adversary=True))

    def direction(a: Tensor, b: Tensor, a_unit: Tensor, b_unit: Tensor, b_valid: Tensor | None) -> Tensor:
        mask = None
        if b_valid is not None:
            # A sequence without a valid token is dropped later, and must not give NaN here.
            mask = (b_valid | ~b_valid.any(-1, keepdim=True))[:, None, None, :]
        moved = F.scaled_dot_product_attention(a, b, b_unit, attn_mask=mask, scale=1.0)
        return 1 - (a_unit * moved).sum(-1)

    forward = _mean(direction(q_nav, k_nav, q_unit, k_unit, k_valid), q_valid)
    backward = _mean(direction(k_nav, q_nav, k_unit, q_unit, q_valid), k_valid)
    return (forward + backward) / 2


def _adversarial(
    query: Tensor, key: Tensor, q_valid: Tensor | None, k_valid: Tensor | None, discriminator: nn.Module
) -> Tensor:
    q_logit = _call(discriminator, query, adversary=True)
    k_logit = _call(discriminator, key, adversary=True)
    return _mean(F.logsigmoid(q_logit), q_valid) + _mean(F.logsigmoid(-k_logit), k_valid)


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
        tolerance: stop when the row marginals of every problem are off by less than this, as the sum of
            absolute
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


def _optimal_transport(
    query: Tensor,
    key: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    eps: float,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """<P, C> with P held fixed: by the envelope theorem its gradient is that of the entropic objective."""
    cost = 1 - torch.matmul(_unit(query), _unit(key).transpose(-1, -2))
    rows = None if q_valid is None else q_valid[:, None]
    columns = None if k_valid is None else k_valid[:, None]
    plan = sinkhorn_plan(cost.detach(), rows, columns, eps, iterations, tolerance)
    return (plan * cost).sum((-1, -2))


def _mean_discrepancy(
    query: Tensor,
    key: Tensor,
    q_valid: Tensor | None,
    k_valid: Tensor | None,
    bandwidth: float | str,
) -> Tensor:
    """mean k(q, q') + mean k(k, k') - 2 mean k(q, k), k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2))."""
    tokens = torch.cat([query, key], dim=2)
    batch, _, length, _ = query.shape
    total = tokens.shape[2]
    valid = None
    if q_valid is not None and k_valid is not None:
        valid = torch.cat([q_valid, k_valid], dim=1)
    # Distances do not depend on the origin; a near one avoids cancellation in |x|^2 + |y|^2 - 2 x.y.
    centre = _mean(tokens.detach().transpose(2, 3).flatten(1, 2), valid).unflatten(1, (tokens.shape[1], -1))
    tokens = tokens - centre.unsqueeze(2)
    if valid is not None:
        tokens = tokens.masked_fill(~valid[:, None, :, None], 0.0)
    norm = tokens.square().sum(-1)
    square = norm.unsqueeze(-1) + norm.unsqueeze(-2) - 2 * torch.matmul(tokens, tokens.transpose(-1, -2))
    same = torch.eye(total, dtype=torch.bool, device=tokens.device)
    square = square.clamp(min=0.0).masked_fill(same, 0.0)
    pair = None if valid is None else (valid.unsqueeze(-1) & valid.unsqueeze(-2))[:, None]

    if isinstance(bandwidth, str):
        if bandwidth == "median":
            skipped = same if pair is None else same | ~pair
            seen = square.detach().masked_fill(skipped, float("nan"))
            scale = seen.flatten(2).nanmedian(-1).values.nan_to_num(0.0)
        else:  # the tokens are centred, so the mean over pairs i != j is 2 sum |x|^2 / (n - 1)
            count = total if valid is None else valid.sum(-1)[:, None]
            scale = 2 * norm.detach().sum(-1) / torch.as_tensor(count - 1, device=norm.device).clamp(min=1)
        two_sigma_square = 2 * torch.where(scale > _TINY_NORM**2, scale, 1.0)[..., None, None]
        kernel = torch.exp(-square / two_sigma_square)
    else:
        kernel = torch.exp(square * (-0.5 / bandwidth**2))

    # One signed weight a token, +1/n for queries and -1/m for keys: the loss is weight' kernel weight.
    if valid is None:
        weight = tokens.new_ones(batch, total)
    else:
        weight = valid.to(tokens.dtype)
    q_weight, k_weight = weight.split([length, total - length], dim=1)
    signed = torch.cat(
        [
            q_weight / q_weight.sum(-1, keepdim=True).clamp(min=1),
            -k_weight / k_weight.sum(-1, keepdim=True).clamp(min=1),
        ],
        dim=1,
    )[:, None]
    return (torch.matmul(kernel, signed.unsqueeze(-1)).squeeze(-1) * signed).sum(-1)


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
        bandwidth: of "mmd": sigma of the kernel, or its heuristic, sigma^2 = the "median" (None) or the
            cheaper
            "mean" of the squared distances between distinct valid tokens of the problem, without gradient.
        reduction: "mean", "sum" or "none" ([B, H]).
    Returns:
        A scalar in float32 (float64 for float64).
    Raises:
        SpecError: for an unknown method or reduction, shapes that do not fit, and a network or a missing
            network
            that the method has no use for or needs.
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
        q, k, q_valid, k_valid = _prepare(query, key, key_padding_mask, query_padding_mask)
        if method == "ct":
            loss = _conditional_transport(q, k, q_valid, k_valid, navigator, critic)
        elif method == "ot":
            loss = _optimal_transport(q, k, q_valid, k_valid, eps, iterations, tolerance)
        elif method == "mmd":
            loss = _mean_discrepancy(q, k, q_valid, k_valid, width)
        elif discriminator is None:
            raise SpecError("method='gan' needs a discriminator, for instance Discriminator(head_dim, hidden)")
        else:
            loss = _adversarial(q, k, q_valid, k_valid, discriminator)
        return _reduce(loss, q_valid, k_valid, reduction)


@torch.no_grad()
def mmd(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    bandwidth: float | str | None = None,
    reduction: str = "head",
) -> Tensor:
    """The paper's measure: squared MMD between queries and keys, without gradient; [H], to be summed over
    heads.

    Args as in `alignment_loss`; reduction: "head" ([H], mean over the counted sequences), "mean" (scalar) or
    "none" ([B, H]). For numbers that compare between models give a fixed bandwidth.
    """
    allowed = ("head", "mean", "none")
    if reduction not in allowed:
        raise SpecError(unknown("reduction", reduction, allowed))
    width = _check_bandwidth(bandwidth)
    with torch.autocast(query.device.type, enabled=False):
        q, k, q_valid, k_valid = _prepare(query, key, key_padding_mask, query_padding_mask)
        return _reduce(_mean_discrepancy(q, k, q_valid, k_valid, width), q_valid, k_valid, reduction)
