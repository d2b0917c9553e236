"""Attention over r selected keys fused in Triton, for CUDA: no T x S matrix, in memory or for the backward pass.

Shapes: query [B, H, T, D], key [B, H, S, D], value [B, H, S, Dv], mask None, bool or float, broadcastable to
[B, H, T, S]; D and Dv up to 128, padded to powers of two in registers.

`attnpatch.kernels.select_triton_device` computes; here block sizes are chosen and the kernels become operators. Kept
for the backward pass are the indices of the chosen keys and their weights, [B, H, r, T]: the queries last, so that the
program of some keys reads them in a row. The formulas are those of `attnpatch.kernels.select_blocked`.

Scores are formed up to four times (what a row is scaled by, whether it is uniform, the mean of what it sees, the
choice), since a product on tensor cores costs less than the sort that the choice is. The choice may be another than the
plain form's where two keys are apart by less than the rounding of float32; softmax by weight is ranked by its scores,
which tell apart more than its weights do.

What has been checked of them: `attnpatch.kernels.dispatch.why_not_fused_selection`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnpatch.kernels import select_triton_device as device
from attnpatch.kernels.once import differentiable_once
from attnpatch.kernels.recorded import is_recorded
from attnpatch.kernels.score_triton import MAX_HEAD_DIM, _near, _precision
from attnpatch.kernels.select_blocked import Rule
from attnpatch.kernels.triton_here import INTERPRETED, why_not_on

MAX_R = 128
"""Above it the sort of one block of keys would not fit the registers."""

_KERNELS = {"softmax": device.SOFTMAX, "expressive": device.EXPRESSIVE, "polynomial": device.POLYNOMIAL}
_KERNELS |= {"elu": device.ELU}
_CRITERIA = {"weight": device.WEIGHT, "norm": device.NORM, "centered": device.CENTERED}

Forward = tuple[Tensor, Tensor, Tensor, Tensor]
"""Output [B, H, T, Dv]; weights and indices (int32, -1 for none) of the chosen keys [B, H, r, T]; which rows are
uniform, int8 [B, H, T], for kernels other than softmax. All but the output are empty unless a gradient will be wanted.
"""


def why_not(query: Tensor, value: Tensor, r: int) -> str | None:
    """Why Triton cannot select r keys for these tensors, or None if it can."""
    if reason := why_not_on(query, "query"):
        return reason
    if not hasattr(tl, "topk"):
        return f"Triton {triton.__version__} has no topk: a newer one is needed"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, and query is {query.dtype}"
    for what, x in (("query", query), ("value", value)):
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            return f"the head size of {what} is {x.shape[-1]}, and it takes 1 to {MAX_HEAD_DIM}"
    if not 1 <= r <= MAX_R:
        return f"r is {r}, and it takes 1 to {MAX_R}"
    return None


def _power_of_two(n: int, least: int) -> int:
    return max(least, triton.next_power_of_2(n))


# Block sizes, chosen so that (almost) nothing spills when compiled for compute capability 9.0, and not by timing.
_SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


def select_blocks(r: int, block_d: int, centered: bool, single: bool) -> dict[str, int]:
    """Queries and keys at a time of `_select`, whose tiles are sorted, and warps; `single`: float32."""
    keys = max(64, _power_of_two(r, 2))
    if INTERPRETED:
        return _SMALL | {"BLOCK_N": max(32, _power_of_two(r, 2))}
    large = keys > 64 or block_d > 64
    return {
        "BLOCK_M": 16 if large or (single and not centered) else 32,
        "BLOCK_N": keys,
        "num_warps": 8 if large or centered else 4,
        "num_stages": 1 if large else 2,
    }


def statistics_blocks(block_d: int, single: bool) -> dict[str, int]:
    """Queries and keys at a time of `_statistics`, and warps."""
    if INTERPRETED:
        return _SMALL
    if single and block_d > 64:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 32, "BLOCK_N": 32 if single or block_d > 64 else 64, "num_warps": 4, "num_stages": 2}


def list_blocks(r: int, block_d: int) -> dict[str, int]:
    """Queries at a time of `_attend` and `_row_gradients`, whose tiles are [queries, r, D], and warps."""
    area = _power_of_two(r, 2) * block_d
    return {
        "BLOCK_M": min(16, max(1, 4096 // area)),
        "num_warps": 4 if area <= 8192 else 8,
        "num_stages": 1,
    }


def key_blocks() -> dict[str, int]:
    """Queries and keys at a time of `_key_gradients`, and warps."""
    return _SMALL if INTERPRETED else {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}


class _Call:
    """What the kernels of one call share, apart from most of its tensors."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> None:
        n_batch, n_heads, self.n_queries, head_dim = query.shape
        self.n_keys, value_dim = value.shape[2:]
        self.programs = n_batch * n_heads
        self.lengths = (n_heads, self.n_queries, self.n_keys)
        self.rule = rule
        self.block_d = _power_of_two(max(head_dim, value_dim), 16)
        self.mask, kind = query, device.NO_MASK
        self.mask_strides: tuple[int, ...] = (0, 0, 0, 0)
        if mask is not None:
            kind = device.BOOL if mask.dtype == torch.bool else device.BIAS
            full = mask.expand(*query.shape[:3], self.n_keys)
            self.mask = full.view(torch.uint8) if mask.dtype == torch.bool else full
            self.mask_strides = full.stride()
        self.sizes = {
            "HEAD_DIM": head_dim,
            "BLOCK_D": _power_of_two(head_dim, 16),
            "VALUE_DIM": value_dim,
            "BLOCK_V": _power_of_two(value_dim, 16),
        }
        self.lists = {"KEPT": rule.r, "BLOCK_R": _power_of_two(rule.r, 2)}
        self.kernel = {"KERNEL": _KERNELS[rule.kernel].value, "DEGREE": rule.degree}
        self.masks = {"MASK": kind.value}
        self.dropout = {"DROPOUT": rule.dropout_p > 0.0}
        self.precision = _precision(query)

    def grid(self, length: int, block: int) -> tuple[int]:
        return (triton.cdiv(length, block) * self.programs,)


def _exact(x: Tensor) -> str:
    """The precision of products of float32 that are subtracted from each other."""
    return "tf32x3" if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0) else "ieee"


class _Statistics(NamedTuple):
    """What `_select` wants beside the inputs; what a call has no use for is a tensor to point at."""

    norm: Tensor  # of values, [B, H, S]
    scale: Tensor  # what a row's scores are divided or shifted by, [B, H, T]
    peak: Tensor  # a row's largest bias, [B, H, T]
    uniform: Tensor  # whether its weights do not depend on scores, int8 [B, H, T]
    mean: Tensor  # of the values that it sees, [B, H, T, Dv]


def _statistics(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> _Statistics:
    rule, rows = call.rule, query.shape[:3]
    norm = scale = peak = uniform = mean = query
    if rule.criterion != "weight":
        norm = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32).contiguous()
    if rule.kernel == "softmax" and rule.criterion == "weight":
        return _Statistics(norm, scale, peak, uniform, mean)
    scale = query.new_empty(rows, dtype=torch.float32)
    if rule.kernel != "softmax":
        uniform = query.new_empty(rows, dtype=torch.int8)
        peak = query.new_empty(rows, dtype=torch.float32)
    if rule.criterion == "centered":
        mean = query.new_empty(*rows, value.shape[-1], dtype=torch.float32)
    blocks = statistics_blocks(call.block_d, query.dtype == torch.float32)
    device._statistics[call.grid(call.n_queries, blocks["BLOCK_M"])](
        query, key, value, call.mask, norm, scale, peak, uniform, mean,
        *query.stride(), *key.stride(), *value.stride(), *call.mask_strides, *call.lengths, rule.scale,
        **call.kernel, CRITERION=_CRITERIA[rule.criterion].value, CAUSAL=rule.is_causal, **call.masks, **call.sizes,
        **blocks, PRECISION=call.precision,
    )  # fmt: skip
    return _Statistics(norm, scale, peak, uniform, mean)


def empty_outputs(query: Tensor, key: Tensor, value: Tensor, rule: Rule, training: bool) -> Forward:
    """Uninitialised; the output in query's memory layout where the shapes agree."""
    same = query.shape[-1] == value.shape[-1]
    output = torch.empty_like(query) if same else query.new_empty(*query.shape[:-1], value.shape[-1])
    lists = (*query.shape[:2], rule.r, query.shape[2]) if training else (0,)
    rows = query.shape[:3] if training and rule.kernel != "softmax" else (0,)
    return (
        output,
        query.new_empty(lists, dtype=torch.float32),
        query.new_empty(lists, dtype=torch.int32),
        query.new_empty(rows, dtype=torch.int8),
    )


def selected_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kept: Tensor | None, rule: Rule, training: bool
) -> Forward:
    """`kept`: None or bool [B, H, r, T], True where dropout leaves a weight."""
    output, weights, index, uniform = empty_outputs(query, key, value, rule, training)
    if output.numel() == 0:
        return output, weights, index, uniform
    query, key, value = _near(query), _near(key), _near(value)
    with torch.cuda.device_of(query):
        call = _Call(query, key, value, mask, rule)
        found = _statistics(call, query, key, value)
        chosen = index if training else query.new_empty(*query.shape[:2], rule.r, query.shape[2], dtype=torch.int32)
        inputs = (*query.stride(), *key.stride(), *value.stride(), *call.mask_strides)
        blocks = select_blocks(rule.r, call.block_d, rule.criterion == "centered", query.dtype == torch.float32)
        device._select[call.grid(call.n_queries, blocks["BLOCK_M"])](
            query, key, value, call.mask, *found, chosen, *inputs, *call.lengths, rule.scale,
            **call.kernel, CRITERION=_CRITERIA[rule.criterion].value, CAUSAL=rule.is_causal, **call.masks,
            **call.sizes, **call.lists, **blocks, PRECISION=call.precision, EXACT=_exact(query),
        )  # fmt: skip
        blocks = list_blocks(rule.r, call.block_d)
        device._attend[call.grid(call.n_queries, blocks["BLOCK_M"])](
            query, key, value, call.mask, found.uniform, chosen, _bytes(kept, query), output, weights,
            *inputs, *output.stride(), *call.lengths, rule.scale, rule.dropout_factor,
            **call.kernel, **call.masks, **call.dropout, TRAINING=training, **call.sizes, **call.lists, **blocks,
        )  # fmt: skip
    return output, weights, index, found.uniform if uniform.numel() else uniform


def _bytes(kept: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if kept is None else kept.view(torch.uint8)


def selected_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor | None,
    weights: Tensor,
    index: Tensor,
    uniform: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if index.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad, query, key, value = _near(grad), _near(query), _near(key), _near(value)
    dz = torch.empty_like(weights)
    with torch.cuda.device_of(query):
        call = _Call(query, key, value, None, rule)
        blocks = list_blocks(rule.r, call.block_d)
        device._row_gradients[call.grid(call.n_queries, blocks["BLOCK_M"])](
            query, key, value, grad, uniform, index, _bytes(kept, query), weights, dz, dq,
            *query.stride(), *key.stride(), *value.stride(), *grad.stride(), *dq.stride(),
            *call.lengths, rule.scale, rule.dropout_factor,
            **call.kernel, **call.dropout, **call.sizes, **call.lists, **blocks,
        )  # fmt: skip
        blocks = key_blocks()
        device._key_gradients[call.grid(call.n_keys, blocks["BLOCK_N"])](
            query, grad, index, _bytes(kept, query), weights, dz, dk, dv,
            *query.stride(), *grad.stride(), *dk.stride(), *dv.stride(), *call.lengths, rule.dropout_factor,
            CAUSAL=rule.is_causal, **call.dropout, **call.sizes, KEPT=rule.r, **blocks, PRECISION=call.precision,
        )  # fmt: skip
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    """The operator below in eager mode, where its calls cost a fraction of a torch.library operator's."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        query, key, value, mask, kept, *options, training = arguments
        ctx.rule = Rule(*options)
        output, *rest = selected_forward(query, key, value, mask, kept, ctx.rule, training)
        if training:
            ctx.save_for_backward(query, key, value, kept, *rest)
        return output

    @staticmethod
    @differentiable_once("attention over selected keys, fused in Triton,")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, kept, weights, index, uniform = ctx.saved_tensors
        gradients = selected_backward(grad, query, key, value, kept, weights, index, uniform, ctx.rule)
        return (*gradients, *[None] * 10)


def selected_attention(*arguments: Any) -> Tensor:
    """Attention over r selected keys, for what `why_not` has no objection to.

    Args (in this order):
        query: [B, H, T, D]. key: [B, H, S, D]. value: [B, H, S, Dv], of query's dtype and device; S at least r.
        mask: bool (True = may attend) or floating, [1 or B, 1 or H, 1 or T, S]; or None.
        kept: bool [B, H, r, T], True where dropout leaves a weight; or None.
        kernel, degree, scale, is_causal, r, criterion, dropout_p: as `attnpatch.kernels.select_blocked.Rule`.
        training: whether a gradient will be wanted.
    Returns:
        [B, H, T, Dv] in query's dtype.
    """
    if is_recorded(*arguments[:5]):
        return selected_attention_op(*arguments)[0]
    return _Attention.apply(*arguments)


@torch.library.custom_op("attnpatch::triton_selected_attention", mutates_args=())
def selected_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kept: Tensor | None,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    r: int,
    criterion: str,
    dropout_p: float,
    training: bool,
) -> Forward:
    """As `selected_forward`, for torch.compile, exports and dispatch modes."""
    rule = Rule(kernel, degree, scale, is_causal, r, criterion, dropout_p)
    return selected_forward(query, key, value, mask, kept, rule, training)


@torch.library.custom_op("attnpatch::triton_selected_attention_backward", mutates_args=())
def selected_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor | None,
    weights: Tensor,
    index: Tensor,
    uniform: Tensor,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    r: int,
    criterion: str,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `selected_backward`."""
    rule = Rule(kernel, degree, scale, is_causal, r, criterion, dropout_p)
    return selected_backward(grad, query, key, value, kept, weights, index, uniform, rule)


@selected_attention_op.register_fake
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> Forward:
    return empty_outputs(query, key, value, Rule(*arguments[2:-1]), arguments[-1])


@selected_attention_backward_op.register_fake
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    query, key, value, _, kept, *ctx.options, _ = inputs
    ctx.save_for_backward(query, key, value, kept, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*selected_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options), *[None] * 10)


torch.library.register_autograd(selected_attention_op, _gradients, setup_context=_save)
