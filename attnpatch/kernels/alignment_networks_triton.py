"""The alignment losses' networks (`attnpatch.kernels.alignment_networks`) fused in Triton, for CUDA.

`attnpatch.kernels.alignment_networks_triton_device` computes; here its kernels are launched, and are a differentiable
function of tokens and weights. The tokens are all that waits for the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from attnpatch.kernels import alignment_networks_triton_device as device
from attnpatch.kernels import alignment_shares_triton_device
from attnpatch.kernels.gradient_reversal import gradient_reversal
from attnpatch.kernels.triton_here import INTERPRETED, why_not_on

MAX_SIZE = 64
"""Of heads and hidden layers: wider weights do not fit registers and shared memory beside the gradients' sums."""

BLOCK_M = 16 if INTERPRETED else 64
PLAIN, LOSS, HALVES, UNIT = (x.value for x in (device.PLAIN, device.LOSS, device.HALVES, device.UNIT))


def why_not(module: nn.Module, *tokens: Tensor) -> str | None:
    """Why these kernels cannot apply a network of ours to these tokens, or None if they can."""
    x = tokens[0]
    # On other GPUs Triton keeps the weights in registers, of which there are too few, or has not been tried.
    if reason := why_not_on(x, "query", major=9):
        return reason
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, and query is {x.dtype}"
    if any(y.device != x.device or y.dtype != x.dtype for y in tokens):
        return "query and key are of several devices or dtypes"
    if any(y.numel() == 0 or y.numel() >= 2**31 for y in tokens):
        return "query or key has no numbers, or more than 32 bits can count"
    if any(not p.is_contiguous() or p.device != x.device for p in module.parameters()):
        return f"a weight is not contiguous, or not on {x.device}"
    inner: Any = module.inner
    hidden, dim = inner.weight.shape
    if dim != x.shape[-1]:
        return f"the network is for heads of {dim}, and these have {x.shape[-1]}"
    if not 2 <= dim <= MAX_SIZE or hidden > MAX_SIZE:
        return f"it takes heads of 2 to {MAX_SIZE} and hidden layers up to {MAX_SIZE}; these have {dim} and {hidden}"
    return None


def weights_of(module: Any) -> list[Tensor]:
    """Weights and biases in the order of the kernels: of gate and transform where there is a highway, inner, outer."""
    layers = [module.inner, module.outer]
    if hasattr(module, "highway"):
        layers = [module.highway.gate, module.highway.transform, *layers]
    return [x for layer in layers for x in (layer.weight, layer.bias)]


def plainly(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The network by torch's own functions, where a gradient is to be differentiated: [..., D] -> [..., OUT]."""
    w_in, b_in, w_out, b_out = weights[-4:]
    if len(weights) > 4:
        gate, transformed = F.linear(x, *weights[:2]), F.linear(x, *weights[2:4])
        x = torch.lerp(x, F.relu(transformed), torch.sigmoid(gate))
    return F.linear(F.leaky_relu(F.linear(x, w_in, b_in)), w_out, b_out)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


class Tokens:
    """Queries [B, H, T, D] and keys [B, H, S, D], and what the kernels have to know of them; keys may be missing.

    query_padding [B, T] and key_padding [B, S]: bool, True where padding; both or neither.
    """

    def __init__(
        self, query: Tensor, key: Tensor | None, query_padding: Tensor | None = None, key_padding: Tensor | None = None
    ) -> None:
        self.query = _laid_out(query)
        self.two_sided = key is not None
        self.key = self.query if key is None else _laid_out(key)
        self.masked = query_padding is not None and key_padding is not None
        self.padding = self.query, self.key  # something to point at
        if query_padding is not None and key_padding is not None:
            self.padding = query_padding.contiguous().view(torch.uint8), key_padding.contiguous().view(torch.uint8)
        self.batch, self.heads, length, self.dim = query.shape
        lengths = length, self.key.shape[2]
        rows = self.batch * self.heads * length, 0 if key is None else self.batch * self.heads * lengths[1]
        self.rows = sum(rows)
        self.blocks = [triton.cdiv(n, BLOCK_M) for n in rows]
        self.whole = all(n % BLOCK_M == 0 for n in lengths)
        strides = (*self.query.stride()[:3], *self.key.stride()[:3])
        self.scalars = (*strides, self.heads, *lengths, *rows)

    def programs(self, each: int) -> tuple[int, int]:
        """How many programs take queries and how many keys, of `each` on every multiprocessor."""
        of_queries, of_keys = self.blocks
        programs = _multiprocessors(self.query.device) * each
        share = programs * of_queries // (of_queries + of_keys)
        if of_keys:
            share = min(max(share, 1), programs - 1)
        return min(of_queries, share), min(of_keys, programs - share)


def _laid_out(x: Tensor) -> Tensor:
    """x in a layout that an empty tensor like it has, too, and whose last dimension is contiguous."""
    return x if x.is_contiguous() or x.transpose(1, 2).is_contiguous() else x.contiguous()


def shares(tokens: Tokens, mean: bool) -> Tensor:
    """[2, B]: the share of a valid query and of a valid key in a loss of means, summed or (mean) averaged."""
    result = torch.empty(2, tokens.batch, dtype=torch.float32, device=tokens.query.device)
    lengths = tokens.query.shape[2], tokens.key.shape[2]
    with torch.cuda.device_of(result):
        alignment_shares_triton_device.token_shares[(1,)](
            *tokens.padding, result, tokens.batch, tokens.heads, *lengths,
            MASKED=tokens.masked, MEAN=mean, BLOCK_B=32, BLOCK_T=128,
        )  # fmt: skip
    return result


def _constants(tokens: Tokens, weights: Sequence[Tensor], result: int) -> dict[str, Any]:
    out, hidden = weights[-2].shape
    return {
        "MASKED": tokens.masked,
        "WHOLE": tokens.whole,
        "HIGHWAY": len(weights) > 4,
        "RESULT": result,
        "DIM": tokens.dim,
        "HIDDEN": hidden,
        "OUT": out,
        "BLOCK_D": max(16, triton.next_power_of_2(tokens.dim)),
        "BLOCK_H": max(16, triton.next_power_of_2(hidden)),
        "BLOCK_M": BLOCK_M,
        "num_warps": 4,
        "num_stages": 1,
    }


def _eight(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(weights) if len(weights) == 8 else (*weights, *weights)


def forward(
    tokens: Tokens, weights: Sequence[Tensor], result: int, token_shares: Tensor | None = None
) -> tuple[Tensor, ...]:
    """LOSS: (each program's part of the loss); PLAIN: (the result); HALVES: its (high, low); UNIT: and inverse lengths.

    Of float32 tokens high is the whole, and low anything.
    """
    x, out = tokens.query, weights[-2].shape[0]
    programs = tokens.programs(2)
    of_all = (tokens.rows, out)
    results: tuple[Tensor, ...]
    if result == LOSS:
        results = (x.new_empty(sum(programs), dtype=torch.float32),)
    elif result == PLAIN:
        results = (x.new_empty(of_all, dtype=torch.float32),)
    else:
        if x.dtype == torch.float32:
            whole = x.new_empty(of_all)
            results = whole, whole
        else:
            results = tuple(x.new_empty(of_all, dtype=torch.bfloat16) for _ in range(2))
        results += (x.new_empty(tokens.rows, dtype=torch.float32),) if result == UNIT else ()
    three = (*results, x, x)[:3]
    with torch.cuda.device_of(x):
        device.network_forward[(sum(programs),)](
            x, tokens.key, *tokens.padding, x if token_shares is None else token_shares, *three, *_eight(weights),
            *tokens.scalars, *programs, **_constants(tokens, weights, result),
        )  # fmt: skip
    return results


def backward(
    tokens: Tokens,
    weights: Sequence[Tensor],
    result: int,
    adversary: bool,
    grad: Tensor | None,
    factor: Tensor | None,
    token_shares: Tensor | None = None,
    before: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Gradients of queries and keys (in `dtype`, and of their layout), and of the weights.

    grad: [all rows, OUT] for HALVES, UNIT and PLAIN. factor: on the device, multiplies the gradient.
    before: gradients of queries and keys, in float32 and their layout, to which these are added.
    """
    x, key = tokens.query, tokens.key
    d_x = torch.empty_like(x, dtype=dtype)
    grads = d_x, torch.empty_like(key, dtype=dtype) if tokens.two_sided else d_x
    sizes = [w.numel() for w in weights]
    roles = 1 if len(weights) == 4 else 2 if weights[-2].shape[0] == 1 else 3
    programs = tokens.programs(2 if roles == 1 else 1)
    sums = x.new_empty(sum(programs), sum(sizes), dtype=torch.float32)
    pointers = (
        x if token_shares is None else token_shares,
        x if grad is None else grad,
        x if factor is None else factor,
    )
    with torch.cuda.device_of(x):
        device.network_backward[(sum(programs) * roles,)](
            x, key, *tokens.padding, *pointers, *(grads if before is None else before), *grads, sums, *_eight(weights),
            *tokens.scalars, *programs, ADDED=before is not None, SIGN=-1.0 if adversary else 1.0, SIZE=sum(sizes),
            **_constants(tokens, weights, result),
        )  # fmt: skip
    parts = sums.sum(0).split(sizes)
    return grads, [part.view_as(w).to(w.dtype) for part, w in zip(parts, weights, strict=True)]


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, adversary: bool, squeezed: bool, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.adversary = adversary
        (out,) = forward(_one_side(x), weights, PLAIN)
        return out.view(x.shape[:-1] if squeezed else (*x.shape[:-1], -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated
                scale = 1.0 if ctx.adversary else -1.0
                out = plainly(x, [gradient_reversal(w, scale) for w in weights])
                inputs = [y for y in (x, *weights) if y.requires_grad]
                found = iter(torch.autograd.grad(out, inputs, grad.reshape(out.shape), create_graph=True))
                again = [next(found) if y.requires_grad else None for y in (x, *weights)]
                return again[0], None, None, *again[1:]
            (d_x, _), d_weights = backward(_one_side(x), weights, PLAIN, ctx.adversary, grad.contiguous(), None)
        return d_x.view(x.shape), None, None, *d_weights


def _one_side(x: Tensor) -> Tokens:
    return Tokens(x.reshape(1, 1, -1, x.shape[-1]), None)


def apply_fused(module: nn.Module, x: Tensor, adversary: bool, squeezed: bool) -> Tensor:
    """module(x) of a network of ours, x [..., D] float32; the gradient of an adversary's parameters is reversed.

    squeezed: the result has no last dimension.
    """
    return _Apply.apply(x, adversary, squeezed, *weights_of(module))
