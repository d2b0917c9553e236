"""Scores to attention weights: softmax, expressive, polynomial and ELU kernels, plain and differentiable.

Shapes: query [B, H, T, D], key and value [B, H, S, D], weights [B, H, T, S]; any leading dimensions that
broadcast will do.

A kernel f >= 0 turns scores z_ij = scale * q_i . k_j into weights a_ij = f(z_ij) / sum_j f(z_ij). Masks act
*after* f: a boolean mask multiplies f by 0 or 1 (True = may attend), a float mask m by exp(m), which is the
usual additive mask when f = exp. A mask value of -1e4 or less (finfo.min of any dtype, -1e9, -inf) excludes
the key altogether. A row with no visible key has zero weights; a row whose visible keys all have f = 0 is
uniform over them (in proportion to exp(m)).
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpatch.errors import SpecError, unknown

KERNELS: tuple[str, ...] = ("softmax", "expressive", "polynomial", "elu")

# A float mask at -1e4 or below excludes the key: a learned bias never gets there, and every usual "minus
# infinity" does. A little above -1e4, because bfloat16 rounds that to -9984.
EXCLUDED = -9.9e3


def check_name(kind: str, name: str, known: tuple[str, ...]) -> None:
    """Raise SpecError, naming the known names and the nearest one, unless `name` is in `known`."""
    if name not in known:
        raise SpecError(unknown(kind, name, known))


def check_degree(degree: object) -> None:
    """Raise SpecError unless `degree` is a positive even integer."""
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 2 or degree % 2:
        raise SpecError(f"degree is the exponent of the polynomial kernel: a positive even integer; got {degree!r}")


def check_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise SpecError unless the mask is None, bool or floating, and not given with `is_causal`."""
    if attn_mask is None:
        return
    if is_causal:
        raise SpecError("attn_mask and is_causal=True exclude each other: put the causal rule into attn_mask")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise SpecError(
            f"attn_mask is bool (True = may attend) or floating (added to the scores); got {attn_mask.dtype}"
        )


def check_call(kernel: str, degree: int, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise SpecError for what `attention_weights` does not take."""
    check_name("kernel", kernel, KERNELS)
    if kernel == "polynomial":
        check_degree(degree)
    check_mask(attn_mask, is_causal)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 for float16 and bfloat16 inputs, else the widest floating dtype among the tensors."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keep autocast from rounding float32 scores back to half precision."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device_type=device.type, enabled=False)
    return contextlib.nullcontext()


def default_scale(kernel: str, head_dim: int) -> float:
    """1.0 for the expressive kernel (its scale sits at |z| = 1), 1/sqrt(head_dim) for the others."""
    return 1.0 if kernel == "expressive" else 1.0 / math.sqrt(head_dim)


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kernel: str = "softmax",
    degree: int = 2,
) -> Tensor:
    """Normalised attention weights a_ij of one kernel.

    Args:
        query: [B, H, T, D].
        key: [B, H, S, D].
        attn_mask: None, or broadcastable to [B, H, T, S]: bool (True = may attend) or float (added to softmax
            scores; every other kernel is multiplied by its exponential).
        is_causal: query i sees the keys j <= i (aligned top-left); only without `attn_mask`.
        scale: factor on q . k; default 1/sqrt(D), and 1.0 for "expressive".
        kernel: "softmax" exp(z); "expressive" z^2/(1+z^2) (Gros 2024, arXiv 2407.18601); "polynomial"
            z^degree; "elu" elu(z)+1 (Katharopoulos et al. 2020).
        degree: positive even exponent of "polynomial".

    Returns:
        [B, H, T, S], rows summing to 1, or to 0 where no key is visible. float32 for float16 and bfloat16
        inputs, so that selection and aggregation see unrounded weights.

    Raises:
        SpecError (a ValueError): unknown kernel, odd or non-positive degree, both `attn_mask` and
        `is_causal`, a mask that is neither bool nor float.
    """
    check_name("kernel", kernel, KERNELS)
    dtype = compute_dtype(query, key)
    factor = default_scale(kernel, query.shape[-1]) if scale is None else scale
    with no_autocast(query.device):
        # In float32 before the product: a half-precision score overflows beyond 65504, masked keys included.
        scores = torch.matmul(query.to(dtype) * factor, key.to(dtype).transpose(-2, -1))
        return weights_from_scores(scores, attn_mask, is_causal, kernel, degree)


def weights_from_scores(
    scores: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    kernel: str = "softmax",
    degree: int = 2,
) -> Tensor:
    """The same as `attention_weights`, from scaled scores z [B, H, T, S] (float32 or float64)."""
    check_name("kernel", kernel, KERNELS)
    keep, bias = _read_mask(scores, attn_mask, is_causal)
    if kernel == "softmax":
        return _softmax(scores, keep, bias)
    if keep is not None:
        # Before f: an excluded score then has value and gradient zero, whatever it was.
        scores = scores.masked_fill(~keep, 0.0)
    if kernel == "expressive":
        strength = _expressive(scores)
    elif kernel == "polynomial":
        check_degree(degree)
        strength = _polynomial(scores, degree)
    else:
        strength = _elu(scores, keep)
    return _normalise(strength, keep, bias)


def _read_mask(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """(visible keys or None for all, finite log weights or None), both broadcastable to the scores."""
    check_mask(attn_mask, is_causal)
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return keep, None
    if attn_mask is None:
        return None, None
    if attn_mask.dtype == torch.bool:
        return attn_mask, None
    bias = attn_mask.to(scores.dtype)
    keep = bias > EXCLUDED
    return keep, bias.masked_fill(~keep, 0.0)


def _softmax(scores: Tensor, keep: Tensor | None, bias: Tensor | None) -> Tensor:
    if bias is not None:
        scores = scores + bias
    if keep is None:
        return torch.softmax(scores, dim=-1)
    # The lowest finite number and not -inf, so that a row without keys is finite (and then set to zero).
    weights = torch.softmax(scores.masked_fill(~keep, torch.finfo(scores.dtype).min), dim=-1)
    return weights.masked_fill(~keep, 0.0)


def _row_scale(scores: Tensor, smallest: float) -> Tensor:
    """Detached largest |z| of each row, at least `smallest`; dividing by it cancels in the normalisation."""
    return scores.detach().abs().amax(dim=-1, keepdim=True).clamp(min=smallest)


def _expressive(scores: Tensor) -> Tensor:
    """z^2/(1+z^2), up to a factor per row; value and gradient are right from z = 0 to overflow of z^2."""
    # Rows of tiny scores are scaled up, so that neither z^2 nor its normaliser underflows.
    scale = _row_scale(scores, math.sqrt(torch.finfo(scores.dtype).tiny)).clamp(max=1.0)
    large = scores.abs() > 1.0
    small_z = scores.masked_fill(large, 1.0)
    inverse = scores.masked_fill(~large, 1.0).reciprocal()
    small = (small_z / scale).square() / (1.0 + small_z.square())
    return torch.where(large, 1.0 / (1.0 + inverse.square()), small)


def _polynomial(scores: Tensor, degree: int) -> Tensor:
    """(z / max |z|)^degree: homogeneous, so it normalises to the weights of z^degree without overflow."""
    return (scores / _row_scale(scores, math.sqrt(torch.finfo(scores.dtype).tiny))).pow(degree)


def _elu(scores: Tensor, keep: Tensor | None) -> Tensor:
    """elu(z)+1 up to a factor per row; in a row of negative scores it is exp(z), shifted as softmax does."""
    if scores.shape[-1] == 0:
        return scores
    lowest = torch.finfo(scores.dtype).min
    visible = scores.detach() if keep is None else scores.detach().masked_fill(~keep, lowest)
    peak = visible.amax(dim=-1, keepdim=True)
    shift = peak.clamp(max=0.0)
    if keep is not None:
        # An excluded score could overflow the shifted exponential; at the shift it is 1, and dropped later.
        scores = torch.where(keep, scores, shift)
    height = peak.clamp(min=0.0) + 1.0
    # exp(z) and not elu(z)+1, which is 0 below z = -17 in float32.
    low = torch.exp(scores.clamp(max=0.0) - shift)
    return torch.where(scores > 0.0, scores.clamp(min=0.0) + 1.0, low) / height


def _normalise(strength: Tensor, keep: Tensor | None, bias: Tensor | None) -> Tensor:
    """Rows of strength * keep * exp(bias), summing to 1.

    A row of zero strength is exp(bias) normalised; a row that keeps nothing is zero.
    """
    if keep is None:
        prior = torch.ones_like(strength)
    elif bias is None:
        prior = keep.to(strength.dtype).expand_as(strength)
    else:
        # Shifted by the row's largest bias, which cancels, as in a softmax.
        lowest = torch.finfo(strength.dtype).min
        peak = bias.detach().masked_fill(~keep, lowest).amax(dim=-1, keepdim=True)
        peak = peak.clamp(min=EXCLUDED)
        prior = (torch.exp(bias.masked_fill(~keep, EXCLUDED) - peak)).masked_fill(~keep, 0.0).expand_as(strength)
    mass = strength * prior
    # Below this 1/total would overflow in the gradient: the row counts as zero.
    empty = mass.detach().sum(dim=-1, keepdim=True) < math.sqrt(torch.finfo(strength.dtype).tiny)
    mass = torch.where(empty, prior, mass)
    total = mass.sum(dim=-1, keepdim=True)
    return mass / total.masked_fill(total == 0.0, 1.0)


def aggregate(weights: Tensor, value: Tensor, dropout_p: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """sum_j a_ij v_j, [B, H, T, Dv], in `dtype` (default: value's); dropout whenever dropout_p > 0."""
    if dropout_p > 0.0:
        weights = F.dropout(weights, p=dropout_p, training=True)
    work = compute_dtype(weights, value)
    with no_autocast(value.device):
        return torch.matmul(weights.to(work), value.to(work)).to(dtype or value.dtype)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    kernel: str = "softmax",
    degree: int = 2,
) -> Tensor:
    """Attention output by way of the weights; arguments as `kernel_attention`."""
    weights = attention_weights(query, key, attn_mask, is_causal, scale, kernel, degree)
    return aggregate(weights, value, dropout_p, query.dtype)


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    kernel: str = "softmax",
    degree: int = 2,
    implementation: str | None = None,
) -> Tensor:
    """Attention output [B, H, T, D] of any kernel, with the signature of F.scaled_dot_product_attention.

    Arguments and errors as `attention_weights`; `dropout_p` acts whenever it is positive, as in SDPA. The
    output has query's dtype. `implementation` names one of `attnpatch.kernels.dispatch.IMPLEMENTATIONS`; by
    default the fastest that can serve is taken. Only "plain" can be differentiated twice.
    """
    from attnpatch.kernels.dispatch import attend

    check_call(kernel, degree, attn_mask, is_causal)
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, kernel, degree, implementation)


def expressive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention with a_ij proportional to z^2/(1+z^2) and default scale 1.0; see `kernel_attention`.

    Source: Expressive Attention (Gros 2024, arXiv 2407.18601).
    """
    return kernel_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, kernel="expressive")


def polynomial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    degree: int = 2,
) -> Tensor:
    """Attention with a_ij proportional to z^degree, degree even; see `kernel_attention`."""
    return kernel_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, kernel="polynomial", degree=degree
    )


def elu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention with a_ij proportional to elu(z)+1 of the score z = q . k; see `kernel_attention`."""
    return kernel_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, kernel="elu")
