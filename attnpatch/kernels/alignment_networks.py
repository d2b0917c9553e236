"""The networks of the alignment losses `ct` and `gan` (Zhang et al., NeurIPS 2021, arXiv 2110.12567), and how they
are applied.

The tokens of a layer are many and the networks narrow: on a CPU, memory traffic is most of their price. There they
take some thousand tokens at a time, which stay in the cache, keep the input alone (`ct` also its loss's gradients), and
compute the rest again in the backward pass; on CUDA Triton's kernels do
(`attnpatch.kernels.alignment_networks_triton`). Everywhere else, and for networks of other classes, it is autograd's
business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import SpecError
from . import dispatch
from .gradient_reversal import gradient_reversal
from .once import differentiable_once
from .products import LEAKY_SLOPE, linear
from .triton_here import USABLE

if USABLE:
    from . import alignment_networks_triton

# Tokens of one pass: with two threads 1,024 and all at once were slower by some percent of a training step.
_TOKENS = 4096


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
        return torch.lerp(x, F.relu(self.transform(x)), gate)


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


# -------------------------------------------------------------------------------------------- application


def apply_network(module: nn.Module | None, x: Tensor, adversary: bool = False) -> Tensor:
    """module(x) with its parameters in the dtype of x, their gradient reversed for an adversary; None: x.

    Args:
        module: `Discriminator`, `Navigator`, `Critic`, or any other module.
        x: [..., head_dim].
        adversary: reverse the gradient of the parameters, and not that of x.
    """
    if module is None:
        return x
    if x.dtype == torch.float32 and serves_triton(module, x):
        return alignment_networks_triton.apply_fused(module, x, adversary, type(module) is Discriminator)
    if _is_fused(module, x):
        weights = (None if p is None else p.to(x.dtype) for p in _ordered(module))
        return _Narrow.apply(x, adversary, type(module) is Discriminator, *weights)
    if not adversary:
        return _called(module, x)
    # Twice reversed for x, once for the parameters, which stay the module's own: ZeRO-3 knows no others.
    return gradient_reversal(_called(module, gradient_reversal(x)))


def _called(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), computed in the dtype of x."""
    others = [p.dtype for p in module.parameters() if p.dtype != x.dtype]
    if not others:
        return module(x)
    if any(hasattr(p, "ds_id") for p in module.parameters()):
        # DeepSpeed's ZeRO-3 gathers a parameter when its module is called: before, there is nothing to cast.
        return module(x.to(others[0])).to(x.dtype)
    return functional_call(module, {name: p.to(x.dtype) for name, p in module.named_parameters()}, (x,))


def serves_triton(module: nn.Module, *tokens: Tensor) -> bool:
    """True if the Triton kernels compute what `module` would of these tokens [..., D], of one device and dtype."""
    return why_not_triton(module, *tokens) is None


def why_not_triton(module: nn.Module, *tokens: Tensor) -> str | None:
    """Why not, or None if they do."""
    if reason := dispatch.why_not_triton(tokens[0]):
        return reason
    if not _is_ours(module):
        return "the network is not a plain Discriminator, Navigator or Critic, or is compiled or transformed"
    return alignment_networks_triton.why_not(module, *tokens)


def check_width(module: nn.Module | None, head_dim: int) -> None:
    """Raises SpecError if a network of ours is for heads of another size."""
    network: Any = module
    if type(module) in _NETWORKS:
        inner = network.inner
        if inner.in_features != head_dim:
            name = type(module).__name__.lower()
            raise SpecError(f"the {name} is for heads of {inner.in_features}, and query and key have {head_dim}")


def _is_fused(module: nn.Module, x: Tensor) -> bool:
    """True if `_Narrow` computes what `module` would."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.numel() == 0:
        return False
    return _is_ours(module)


def _is_ours(module: nn.Module) -> bool:
    """True if there is nothing to `module` but its weights: our own classes, with nothing put in or hung on."""
    if torch.compiler.is_compiling() or type(module) not in _NETWORKS or nn.modules.module._has_any_global_hook():
        return False
    for part in module.modules():
        hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
        if type(part) not in (nn.Linear, Highway, type(module)) or "forward" in vars(part) or any(hooks):
            return False
        if type(part) is nn.Linear and (part.bias is None or type(part.weight) not in (Tensor, nn.Parameter)):
            return False
    return not torch._C._are_functorch_transforms_active()


_WEIGHTS = 6  # that `_ordered` gives


def _ordered(module: Any) -> list[Tensor | None]:
    """Weights and biases in the order of `_Narrow`: the highway's two layers as one, or None, then inner and outer."""
    both: list[Tensor | None] = [None, None]
    if hasattr(module, "highway"):
        gate, transform = module.highway.gate, module.highway.transform
        both = [torch.cat([gate.weight, transform.weight]), torch.cat([gate.bias, transform.bias])]
    return [*both, module.inner.weight, module.inner.bias, module.outer.weight, module.outer.bias]


class _Narrow(torch.autograd.Function):
    """outer(leaky_relu(inner(highway(x)))) [..., D] -> [..., out], `squeezed` [...]; the highway may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, adversary: bool, squeezed: bool, *weights: Any) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.sign = -1.0 if adversary else 1.0
        out = _applied(x, weights)
        return out.squeeze(-1) if squeezed else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        # A backward pass may be called under autocast.
        with torch.autocast("cpu", enabled=False):
            again = torch.is_grad_enabled()  # create_graph: the gradient is to be differentiated
            gradients = (_by_autograd if again else _by_parts)(x, weights, grad, needed, ctx.sign)
        return gradients[0], None, None, *gradients[1:]


def serves_pair(navigator: nn.Module, critic: nn.Module, query: Tensor, key: Tensor) -> bool:
    """Whether `loss_of_pair` is to be used: two plain networks on a CPU, and a gradient is wanted."""
    if not torch.is_grad_enabled() or query.device.type != "cpu" or 0 in (query.numel(), key.numel()):
        return False
    leaves = (query, key, *navigator.parameters(), *critic.parameters())
    return any(leaf.requires_grad for leaf in leaves) and _is_ours(navigator) and _is_ours(critic)


def loss_of_pair(
    navigator: nn.Module,
    critic: nn.Module,
    query: Tensor,
    key: Tensor,
    x: Tensor,
    loss: Callable[[Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]],
) -> Tensor:
    """A loss [B, H] of navigator(x) and critic(x), with the gradient of the critic's parameters reversed.

    Args:
        query, key: [B, H, T, D] and [B, H, S, D], which get gradients.
        x: [B, H, T + S, D], both in the dtype of the arithmetic, zero at padding, without a gradient of its own. What
            the networks make of padding must not count, so that nothing of a gradient arrives there.
        loss: of both results, gives it and its gradients with respect to them.
    """
    weights = (None if p is None else p.to(x.dtype) for network in (navigator, critic) for p in _ordered(network))
    return _Pair.apply(query, key, x, loss, *weights)


class _Pair(torch.autograd.Function):
    """See `loss_of_pair`: what two `_Narrow` and a product of gradients would be, in one pass over the tokens each."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, x: Tensor, loss: Any, *weights: Any) -> Tensor:
        value, gradients = loss(_applied(x, weights[:_WEIGHTS]), _applied(x, weights[_WEIGHTS:]))
        ctx.save_for_backward(x, *weights, *gradients)
        ctx.length, ctx.dtypes = query.shape[2], (query.dtype, key.dtype)
        return value

    @staticmethod
    @differentiable_once("this alignment loss (ct)")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved, d_moves, d_features = ctx.saved_tensors
        of_query, of_key, _, _, *needed = ctx.needs_input_grad
        of_navigator, of_critic = ([of_query or of_key, *half] for half in (needed[:_WEIGHTS], needed[_WEIGHTS:]))
        scale = grad[..., None].expand(x.shape[:-1]).reshape(-1, 1)
        with torch.autocast("cpu", enabled=False):
            first = _by_parts(x, saved[:_WEIGHTS], d_moves, of_navigator, 1.0, scale)
            second = _by_parts(x, saved[_WEIGHTS:], d_features, of_critic, -1.0, scale, onto=first[0])
        d_query = d_key = None
        if first[0] is not None:
            parts = first[0][:, :, : ctx.length], first[0][:, :, ctx.length :]
            d_query, d_key = (part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True))
        return d_query, d_key, None, None, *first[1:], *second[1:]


def _applied(x: Tensor, weights: Sequence[Any]) -> Tensor:
    """A network of these weights: [..., D] -> [..., out]."""
    rows = x.reshape(-1, x.shape[-1])
    w_out, b_out = weights[4:]
    out = rows.new_empty(rows.shape[0], w_out.shape[0])
    for part in _parts(rows):
        *_, hidden = _hidden(rows[part], weights)
        # In its place: a copy would cost what a faster product gains.
        torch.addmm(b_out, hidden, w_out.t(), out=out[part])
    return out.view(*x.shape[:-1], w_out.shape[0])


def _by_autograd(
    x: Tensor, weights: Sequence[Any], grad: Tensor, needed: Sequence[bool], sign: float
) -> list[Tensor | None]:
    """The same as `_by_parts`, by operations that can be differentiated again."""
    used: list[Any] = [None if w is None else gradient_reversal(w, -sign) for w in weights]
    w_both, b_both, w_in, b_in, w_out, b_out = used
    mixed = x
    if w_both is not None:
        gate, transformed = F.linear(x, w_both, b_both).chunk(2, -1)
        mixed = torch.lerp(x, F.relu(transformed), torch.sigmoid(gate))
    out = F.linear(F.leaky_relu(F.linear(mixed, w_in, b_in), LEAKY_SLOPE), w_out, b_out)
    inputs = [tensor for tensor, wanted in zip((x, *weights), needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(out, inputs, grad.reshape(out.shape), create_graph=True))
    return [next(found) if wanted else None for wanted in needed]


def _by_parts(
    x: Tensor,
    weights: Sequence[Any],
    grad: Tensor,
    needed: Sequence[bool],
    sign: float,
    scale: Tensor | None = None,
    onto: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients of x and of the weights, those times `sign`; None where not needed.

    Args:
        scale: what `grad` is to be multiplied by, a number for each token [n, 1].
        onto: what the gradient of x is added to, in place.
    """
    w_both, _, w_in, _, w_out, _ = weights
    rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, w_out.shape[0])
    d_rows = None
    if needed[0]:
        d_rows = torch.empty_like(rows) if onto is None else onto.view(rows.shape)
    sums: list[Any] = [torch.zeros_like(w) if wanted else None for w, wanted in zip(weights, needed[1:], strict=True)]

    def add(index: int, d_out: Tensor, inputs: Tensor, half: slice = slice(None)) -> None:
        """The gradients of weight `index` and its bias, or of half of their rows, of a linear layer's output gradient
        and inputs."""
        if sums[index] is not None:
            sums[index][half].addmm_(d_out.t(), inputs, alpha=sign)
        if sums[index + 1] is not None:
            sums[index + 1][half].add_(d_out.sum(0), alpha=sign)

    aten = torch.ops.aten
    for part in _parts(rows):
        x_part, d_out = rows[part], grad[part] if scale is None else grad[part] * scale[part]
        gate, transformed, mixed, hidden = _hidden(x_part, weights)
        add(4, d_out, hidden)
        d_hidden = aten.leaky_relu_backward(linear(d_out, w_out.t()), hidden, LEAKY_SLOPE, True)
        add(2, d_hidden, mixed)
        if gate is not None or d_rows is not None:
            d_mixed = linear(d_hidden, w_in.t())
        if gate is not None and transformed is not None:
            d_gate = aten.sigmoid_backward((transformed - x_part).mul_(d_mixed), gate)
            through = d_mixed * gate
            d_transformed = aten.threshold_backward(through, transformed, 0)
            first, second = _halves(w_both)
            add(0, d_gate, x_part, first)
            add(0, d_transformed, x_part, second)
            if d_rows is not None:
                d_mixed.sub_(through).add_(linear(d_gate, w_both[first].t()))
                d_mixed.add_(linear(d_transformed, w_both[second].t()))
        if d_rows is not None and onto is None:
            d_rows[part].copy_(d_mixed)
        elif d_rows is not None:
            d_rows[part].add_(d_mixed)
    return [None if d_rows is None else d_rows.view(x.shape), *sums]


def _parts(rows: Tensor) -> list[slice]:
    return [slice(i, i + _TOKENS) for i in range(0, rows.shape[0], _TOKENS)]


def _halves(both: Tensor) -> tuple[slice, slice]:
    """The gate's rows and the transform's."""
    half = both.shape[0] // 2
    return slice(None, half), slice(half, None)


def _hidden(x: Tensor, weights: Any) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The highway's gate and transformed input, what it mixes, the hidden layer after its LeakyReLU."""
    w_both, b_both, w_in, b_in = weights[:4]
    gate, transformed, mixed = None, None, x
    if w_both is not None:
        first, second = _halves(w_both)
        gate = linear(x, w_both[first], b_both[first], "sigmoid")
        transformed = linear(x, w_both[second], b_both[second], "relu")
        mixed = torch.lerp(x, transformed, gate)
    return gate, transformed, mixed, linear(mixed, w_in, b_in, "leaky_relu")


_NETWORKS = (Discriminator, Navigator, Critic)
