"""The alignment losses `gan` and `ct` fused in Triton, for CUDA: from queries and keys to the loss and back.

Queries and keys are read where they are, in their own dtype and layout; padding is neither read nor given a
gradient. `gan` is one kernel forward and one backward, and keeps queries and keys alone; `ct` keeps its gradients with
respect to the networks' results beside them, and computes the networks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from attnpatch.kernels import alignment_networks_triton as networks
from attnpatch.kernels import alignment_transport_triton_device as device
from attnpatch.kernels.alignment_networks_triton import HALVES, LOSS, UNIT, Tokens
from attnpatch.kernels.gradient_reversal import gradient_reversal
from attnpatch.kernels.once import differentiable_once
from attnpatch.kernels.triton_here import INTERPRETED

Padding = tuple[Tensor, Tensor] | tuple[None, None]
BLOCK = 16 if INTERPRETED else 64


def adversarial(query: Tensor, key: Tensor, padding: Padding, discriminator: nn.Module, mean: bool) -> Tensor:
    """The loss of `gan`; the discriminator's gradient is reversed.

    Args:
        query: [B, H, T, D]. key: [B, H, S, D]. padding: of queries [B, T] and keys [B, S], True: padding.
        discriminator: one that `attnpatch.kernels.alignment_networks.serves_triton`.
        mean: over sequences that count, and heads; else the sum.
    Returns:
        a scalar in float32.
    """
    return _Adversarial.apply(query, key, padding, mean, *networks.weights_of(discriminator))


def transport(
    query: Tensor, key: Tensor, padding: Padding, navigator: nn.Module, critic: nn.Module, mean: bool
) -> Tensor:
    """The loss of `ct`; the critic's gradient is reversed. Arguments and result as of `adversarial`.

    Not differentiable twice.
    """
    weights = networks.weights_of(navigator), networks.weights_of(critic)
    return _Transport.apply(query, key, padding, mean, torch.is_grad_enabled(), *weights[0], *weights[1])


class _Adversarial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, padding: Padding, mean: bool, *weights: Tensor) -> Tensor:
        tokens = Tokens(query, key, *padding)
        shares = networks.shares(tokens, mean)
        ctx.save_for_backward(query, key, shares, *weights)
        ctx.padding = padding
        return networks.forward(tokens, weights, LOSS, shares)[0].sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, shares, *weights = ctx.saved_tensors
        d_query: Tensor | None
        d_key: Tensor | None
        d_weights: Sequence[Tensor | None]
        with torch.autocast(query.device.type, enabled=False):
            if torch.is_grad_enabled():  # create_graph: the gradient is to be differentiated
                loss = _plain_adversarial(query, key, ctx.padding, shares, weights)
                inputs = [x for x in (query, key, *weights) if x.requires_grad]
                found = iter(torch.autograd.grad(loss, inputs, grad, create_graph=True))
                d_query, d_key, *d_weights = [next(found) if x.requires_grad else None for x in (query, key, *weights)]
            else:
                tokens = Tokens(query, key, *ctx.padding)
                tokens_grad, d_weights = networks.backward(tokens, weights, LOSS, True, None, grad, shares)
                d_query, d_key = tokens_grad
        return d_query, d_key, None, None, *d_weights


def _plain_adversarial(query: Tensor, key: Tensor, padding: Padding, shares: Tensor, weights: list[Tensor]) -> Tensor:
    weights = [gradient_reversal(w.float()) for w in weights]
    loss = shares.new_zeros(())
    for x, off, share, sign in zip((query, key), padding, shares, (1.0, -1.0), strict=True):
        x, share = x.float(), share[:, None, None].expand(*x.shape[:3])
        if off is not None:
            x = x.masked_fill(off[:, None, :, None], 0.0)
            share = share.masked_fill(off[:, None], 0.0)
        loss = loss + (share * F.logsigmoid(sign * networks.plainly(x, weights).squeeze(-1))).sum()
    return loss


class _Transport(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, padding: Padding, mean: bool, training: bool, *weights: Tensor
    ) -> Tensor:
        tokens = Tokens(query, key, *padding)
        navigator, critic = weights[:4], weights[4:]
        shares = networks.shares(tokens, mean)
        moves = networks.forward(tokens, navigator, HALVES)
        *units, inverse = networks.forward(tokens, critic, UNIT)
        lengths = query.shape[2], key.shape[2]
        grid = (tokens.batch * tokens.heads * sum(triton.cdiv(n, BLOCK) for n in lengths),)
        scalars = tokens.batch, tokens.heads, *lengths
        sizes: dict[str, Any] = {"DIM": tokens.dim, "BLOCK_D": max(16, triton.next_power_of_2(tokens.dim))}
        sizes |= {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK, "num_warps": 4}
        sums, means = torch.empty_like(inverse), torch.empty_like(inverse)
        loss = inverse.new_empty(grid[0])
        with torch.cuda.device_of(query):
            device.transport_means[grid](
                *moves, *units, *tokens.padding, shares, sums, means, loss, *scalars,
                MASKED=tokens.masked, **sizes, num_stages=2,
            )  # fmt: skip
            gradients: tuple[Tensor, ...] = ()
            if training:
                gradients = tuple(inverse.new_empty(tokens.rows, tokens.dim) for _ in range(2))
                device.transport_gradients[grid](
                    *moves, *units, shares, sums, means, inverse, *gradients, *scalars, **sizes, num_stages=2
                )  # fmt: skip
        ctx.save_for_backward(query, key, *gradients, *weights)
        ctx.padding = padding
        return loss.sum()

    @staticmethod
    @differentiable_once("this alignment loss (ct, ot or mmd)")
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, d_moves, d_features, *weights = ctx.saved_tensors
        navigator, critic = weights[:4], weights[4:]
        tokens = Tokens(query, key, *ctx.padding)
        before, d_navigator = networks.backward(tokens, navigator, HALVES, False, d_moves, grad, dtype=torch.float32)
        tokens_grad, d_critic = networks.backward(tokens, critic, UNIT, True, d_features, grad, before=before)
        return *tokens_grad, None, None, None, *d_navigator, *d_critic
