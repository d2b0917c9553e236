"""Which implementation computes what: attention with a non-softmax score kernel, and whether Triton's kernels are used.

    triton   fused, on CUDA, where Triton is installed
    flex     FlexAttention with log f for the score: on CUDA heads above 128, and values of another size than keys;
             forward only on the CPU
    blocked  block by block on the CPU, O(T) memory
    plain    the definition, [T, S] weights in memory; serves everything

The choice is automatic; single queries, as in a step of generation, are then computed in C on the CPU
(attnpatch.kernels.decode_native). `ATTNPATCH_KERNEL` in the environment, `use_implementation` or the argument
`implementation` of the functions ask for one by name, and an error says why if it cannot serve. Softmax is plain.

The pairwise sum of query_value and the alignment losses gan and ct are fused in Triton where `triton` or the automatic
choice is asked for and it can serve (on a CPU, in Triton's interpreter, `triton` alone), and torch's elsewhere.

The selections top_r and value_aware (norm, centered) are fused in Triton where `triton` is asked for and can serve;
`auto` and `blocked` select block by block on a CPU; the rest is plain.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnpatch.errors import SpecError
from attnpatch.kernels import compiled, decode_native, products, score_blocked, score_native
from attnpatch.kernels.score import check_name, default_scale, plain_attention
from attnpatch.kernels.score_blocked import blocked_attention_op
from attnpatch.kernels.triton_here import INSTALLED, TUNE_VARIABLE, USABLE, why_not_here

IMPLEMENTATIONS = ("auto", "plain", "blocked", "triton", "flex")
VARIABLE = "ATTNPATCH_KERNEL"

BLOCKED_FROM = 1024
"""Scores of one head from which blocks are faster than the plain form; see docs/performance.md."""

_asked = os.environ.get(VARIABLE) or "auto"

if USABLE:
    from attnpatch.kernels import query_value_triton, score_triton, select_triton
else:
    query_value_triton = score_triton = select_triton = None  # type: ignore[assignment]


def asked() -> str:
    """The implementation that the environment or `use_implementation` asks for."""
    return _asked


@contextlib.contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Within it, the named implementation ("auto" for the automatic choice) computes; see the module."""
    check_name("implementation", name, IMPLEMENTATIONS)
    global _asked
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    kernel: str,
    degree: int,
    implementation: str | None,
) -> Tensor:
    """Output [..., T, Dv]; arguments as `kernel_attention`, which has checked them."""
    name = implementation or _asked
    if name != "auto":
        check_name("implementation" if implementation else VARIABLE, name, IMPLEMENTATIONS)
    factor = default_scale(kernel, query.shape[-1]) if scale is None else float(scale)
    if kernel == "softmax" and implementation is None:
        name = "plain"
    tensors = (query, key, value, attn_mask)
    if name == "auto":
        single = kernel != "softmax" and not is_causal and dropout_p == 0.0 and len(query) == len(key)
        if single and decode_native.why_not(*tensors) is None:
            decoded = decode_native.decode_attention(query, key, value, attn_mask, factor, kernel, degree)
            if decoded is not None:
                return decoded
        name = choose(*tensors, dropout_p, kernel)
    elif name != "plain":
        reason = why_not(name, *tensors, dropout_p, kernel)
        if reason is not None:
            raise SpecError(f"the {name} implementation cannot serve this call: {reason}; 'auto' and 'plain' can")
    if name == "plain":
        return plain_attention(query, key, value, attn_mask, dropout_p, is_causal, factor, kernel=kernel, degree=degree)
    shape = query.shape
    q, k, v, keep = four_dimensions(query, key, value, attn_mask)
    # Drawn where it is read: a seed on the GPU needs no synchronisation, and differs in each replay of a CUDA graph.
    seed_on = query.device if name == "triton" else "cpu"
    seed = torch.randint(2**62, (), device=seed_on) if dropout_p > 0.0 else None
    if name in ("blocked", "triton"):
        training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        arguments = (q, k, v, keep, seed, kernel, degree, factor, is_causal, dropout_p, training)
        blocked = name == "blocked"
        output = blocked_attention_op(*arguments)[0] if blocked else score_triton.triton_attention(*arguments)
    else:
        from attnpatch.kernels.score_flex import flex_attention

        output = flex_attention(q, k, v, keep, is_causal, factor, kernel, degree)
    return output if len(shape) == 4 else output.reshape(*leading_shape(query, key, value), *output.shape[-2:])


def choose(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, kernel: str) -> str:
    """The fastest implementation that can serve a call."""
    for candidate in ("triton", "flex", "blocked"):
        if why_not(candidate, query, key, value, attn_mask, dropout_p, kernel) is None and _pays(candidate, query, key):
            return candidate
    return "plain"


def why_not(
    name: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, kernel: str
) -> str | None:
    """Why an implementation cannot serve a call, or None if it can."""
    if name == "plain":
        return None
    if kernel == "softmax":
        return "it has no softmax (torch.nn.functional.scaled_dot_product_attention does)"
    if not (query.dtype == key.dtype == value.dtype) or not query.is_floating_point():
        return f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}; one is needed"
    if not (query.device == key.device == value.device):
        return f"query, key and value are on {query.device}, {key.device} and {value.device}"
    if max(query.dim(), key.dim(), value.dim()) > 4:
        return f"it takes up to 4 dimensions, got {query.dim()}"
    if attn_mask is not None and attn_mask.device != query.device:
        return f"attn_mask is on {attn_mask.device}, and query on {query.device}"
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        return f"attn_mask is {attn_mask.dtype}, and it takes bool (True = may attend)"
    if dropout_p >= 1.0:
        return f"dropout_p is {dropout_p}, and it takes less than 1"
    if 0 in (query.shape[-2], key.shape[-2], value.shape[-1]):
        return "there is no query, no key, or no value feature"
    if forward_ad._current_level >= 0:
        # An operator without a rule for it would give a derivative of 0.
        return "forward-mode derivatives (torch.func.jvp, jacfwd) are asked for"
    if torch._C._are_functorch_transforms_active():
        return "transforms of torch.func are active"
    if name == "blocked":
        return None if query.device.type == "cpu" else f"it runs on the CPU, and query is on {query.device}"
    if name == "triton":
        return why_not_here() or score_triton.why_not(query, value)
    if dropout_p > 0.0:
        return "FlexAttention has no dropout"
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "FlexAttention has no gradient on the CPU"
    if query.device.type == "cuda" and not INSTALLED:
        return "FlexAttention on CUDA is compiled by Triton, which is not installed (pip install triton)"
    if query.device.type not in ("cpu", "cuda"):
        return f"FlexAttention runs on cuda and cpu, and query is on {query.device}"
    return None


def why_not_fused_sum(weights: Tensor, value: Tensor) -> str | None:
    """Why the pairwise query_value sum is not fused but computed in blocks of torch operations, or None if it is.

    Of weights [N, T, S] and value [N, S, D], in the dtype of the arithmetic.
    """
    return why_not_triton(value) or query_value_triton.why_not(weights, value)


def why_not_fused_selection(query: Tensor, value: Tensor, r: int) -> str | None:
    """Why attention of query [..., T, D] over r selected rows of value [..., S, Dv] is not fused in Triton, or None."""
    if _asked == "auto" and USABLE:
        return f"it has not been checked on a GPU yet, and is taken only when asked for: {VARIABLE}=triton"
    return why_not_triton(query) or select_triton.why_not(query, value, r)


def why_not_fused_alignment(x: Tensor) -> str | None:
    """Why the losses gan and ct are not fused for heads like those of x [..., D], with networks of default sizes."""
    from attnpatch.kernels.alignment_networks import Discriminator, why_not_triton

    return why_not_triton(Discriminator(x.shape[-1], x.shape[-1]).to(x.device), x)


def why_not_triton(x: Tensor) -> str | None:
    """Why the Triton kernels of query_value, selection and alignment are not to be used on the device of x, or None."""
    if reason := why_not_here():
        return reason
    if _asked not in ("auto", "triton"):
        return f"{_asked} is asked for ({VARIABLE} or use_implementation)"
    if x.device.type == "cpu" and _asked != "triton":
        return "it runs on CUDA, and the tensors are on cpu"
    return None


def _pays(name: str, query: Tensor, key: Tensor) -> bool:
    """Whether the automatic choice takes an implementation that can serve."""
    if name == "blocked":
        return query.shape[-2] * key.shape[-2] >= BLOCKED_FROM
    return query.device.type == "cuda"


def leading_shape(query: Tensor, key: Tensor, value: Tensor) -> torch.Size:
    """What is before the last two dimensions, broadcast."""
    return torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])


def four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query, key and value expanded to [B, H, ...]; mask [1 or B, 1 or H, 1 or T, S].

    Raises:
        SpecError: the mask does not broadcast to the scores, or query, key and value do not belong together.
    """
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise SpecError(
            f"query, key and value of shapes {shapes} do not fit: query and key need one head size, and key and value"
            " one length"
        )
    batch = tuple(query.shape[:2])
    if query.dim() == 4 and batch == key.shape[:-2] == value.shape[:-2]:
        q, k, v = query, key, value
    else:
        leading = leading_shape(query, key, value)
        batch = (1,) * (2 - len(leading)) + tuple(leading)
        q, k, v = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    if mask is None:
        return q, k, v, None
    full = (*batch, query.shape[-2], key.shape[-2])
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False)):
        raise SpecError(f"attn_mask of shape {tuple(mask.shape)} does not broadcast to the scores' {full}")
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    return q, k, v, mask.expand(*mask.shape[:-1], key.shape[-2])


def _gets(x: Tensor) -> str:
    """The implementation of expressive attention with x for query, key and value, or the error that a call is."""
    if _asked == "auto":
        return choose(x, x, x, None, 0.0, "expressive")
    reason = why_not(_asked, x, x, x, None, 0.0, "expressive")
    return _asked if reason is None else f"an error: {_asked} cannot serve it ({reason})"


def _selects(x: Tensor) -> str:
    """How top_r and value_aware select 16 keys with x for query, key and value."""
    if x.device.type == "cpu" and _asked in ("auto", "blocked"):
        return "blocked"
    reason = why_not_fused_selection(x, x, 16)
    return "fused (triton)" if reason is None else f"plain ({reason})"


def describe() -> dict[str, object]:
    """What `attnpatch env` shows of it: what a call gets on each device and in each dtype.

    Raises:
        SpecError: ATTNPATCH_KERNEL or ATTNPATCH_NATIVE has no such value.
    """
    check_name(VARIABLE, _asked, IMPLEMENTATIONS)
    found: dict[str, object] = {"asked for": f"{_asked} ({VARIABLE} asks for another)"}
    for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = torch.empty(1, 1, 512, 64, dtype=dtype, device=device)
            found[f"{device} {str(dtype).removeprefix('torch.')}"] = _gets(x)
        x = torch.empty(1, 512, 64, device=device)
        reason = why_not_fused_sum(x, x)
        found[f"query_value on {device}"] = "fused (triton)" if reason is None else f"torch, in blocks ({reason})"
        found[f"top_r, value_aware on {device}"] = _selects(x)
        reason = why_not_fused_alignment(x)
        found[f"alignment gan, ct on {device}"] = "fused (triton)" if reason is None else f"torch ({reason})"
    if _asked == "auto":
        found["below"] = f"{BLOCKED_FROM} scores a head the CPU takes plain"
    whole = "without dropout whole attention" if score_native.products() else "elementwise passes (torch has no MKL)"
    wanted = f"from {score_blocked.COMPILED_FROM} scores a call, in float32; {whole}"
    found["compiled code of blocked"] = compiled.why_not("score_native") or wanted
    found["compiled attention of single queries"] = compiled.why_not("decode_native") or "yes"
    found["compiled search of value_aware"] = compiled.why_not("select_exact") or "yes"
    reason = products.why_not_onednn()
    found["products of alignment on cpu"] = "oneDNN" if reason is None else f"torch ({reason})"
    if reason := why_not_here():
        found["triton"] = reason
    else:
        for device in (f"cuda:{i}" for i in range(torch.cuda.device_count())):
            timed = score_triton.tuning(torch.empty(0, device=device))
            found[f"block sizes on {device}"] = (
                f"{'timed when a kind of call first comes' if timed else 'fixed'} ({TUNE_VARIABLE})"
            )
    return found
