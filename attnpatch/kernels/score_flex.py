"""Non-softmax score kernels through FlexAttention: a softmax of log f(z), which is f normalised."""

from __future__ import annotations

import torch
from torch import Tensor


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    is_causal: bool,
    scale: float,
    kernel: str,
    degree: int,
) -> Tensor:
    """Output [B, H, T, Dv] of query [B, H, T, D], key and value [B, H, S, ...], `keep` bool or None.

    Compiled on CUDA; on the CPU it runs uncompiled, as a second opinion. Rows without visible keys are zero.
    """
    from torch.nn.attention import flex_attention as flex

    batch, heads, n_queries, n_keys = *query.shape[:3], key.shape[2]
    smallest = torch.finfo(torch.float32).tiny
    mask = None if keep is None else keep.expand(batch, heads, n_queries, n_keys)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        size = score.abs().clamp(min=smallest)
        if kernel == "polynomial":
            return degree * size.log()
        if kernel == "elu":
            return torch.where(score > 0.0, torch.log1p(score.clamp(min=0.0)), score)
        # log(z^2 / (1 + z^2)), whose square does not overflow.
        small = size.clamp(max=1.0)
        inverse = size.clamp(min=1.0).reciprocal()
        return torch.where(size > 1.0, -torch.log1p(inverse * inverse), 2.0 * small.log() - torch.log1p(small * small))

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j if mask is None else mask[b, h, i, j]

    block_mask = None
    if is_causal or mask is not None:
        per_head = mask is not None and keep is not None and keep.shape[1] > 1
        block_mask = flex.create_block_mask(
            mask_mod,
            batch if mask is not None else None,
            heads if per_head else None,
            n_queries,
            n_keys,
            device=str(query.device),
        )
    function = flex.flex_attention if query.device.type == "cpu" else torch.compile(flex.flex_attention)
    output = function(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale)
    assert isinstance(output, Tensor)
    return output
