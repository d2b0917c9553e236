"""Non-softmax score kernels fused in Triton, for CUDA: O(T) memory, forward and backward.

Shapes: query [B, H, T, D], key [B, H, S, D], value [B, H, S, D], keep None or bool broadcastable to [B, H, T, S];
D up to 128, padded to a power of two in registers.

`attnpatch.kernels.score_triton_device` computes; here block sizes are chosen and the kernels become operators. The
backward pass is two kernels, of the programs that own keys and of those that own queries: seven matrix products, and
the same bits in every run with the same block sizes. A form with five products, the gradient of the queries added up in
memory by the programs that own keys, was slower (docs/performance.md).

Dropout's seed is read on the device, so that the kernels can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
import os
import threading
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnpatch.kernels import score_triton_device as device
from attnpatch.kernels.once import differentiable_once
from attnpatch.kernels.recorded import is_recorded
from attnpatch.kernels.score import check_name
from attnpatch.kernels.triton_here import INTERPRETED, TUNE_VARIABLE, why_not_on

KERNEL_CODES = {"expressive": 0, "polynomial": 1, "elu": 2}

MAX_HEAD_DIM = 128


def tuning(x: Tensor, measured: bool = True) -> bool:
    """Whether block sizes for tensors like x are timed, each kind of call when it first comes.

    They are (ATTNPATCH_TUNE=1 and 0 ask for it and for the opposite) unless they were measured on a GPU like this one
    (compute capability 9.0): compiling all of them takes half a minute a kind of call. `measured`: for calls like this.
    """
    asked = os.environ.get(TUNE_VARIABLE) or None
    if asked is not None:
        check_name(TUNE_VARIABLE, asked, ("0", "1"))
        return asked == "1"
    return not (measured and x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0))


def why_not(query: Tensor, value: Tensor) -> str | None:
    """Why Triton cannot serve these tensors, or None if it can."""
    if reason := why_not_on(query, "query"):
        return reason
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, and query is {query.dtype}"
    if query.shape[-1] != value.shape[-1]:
        return f"heads of query and value have sizes {query.shape[-1]} and {value.shape[-1]}; one size is needed"
    if not 1 <= query.shape[-1] <= MAX_HEAD_DIM:
        return f"the head size is {query.shape[-1]}, and it takes 1 to {MAX_HEAD_DIM}"
    return None


class Sizes(NamedTuple):
    """Block sizes of queries and keys, warps, stages of the pipeline, and registers a thread may have.

    Fewer registers mean more programs on a multiprocessor. The bounds given are what the usual loops need; beyond
    them those for rows of their own scale spill, which are rare.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# The first is what is used untuned: it fits the 99 KiB of shared memory of consumer GPUs up to D = 128 in half
# precision.
SIZES: dict[str, list[Sizes]] = {
    "forward": [
        Sizes(64, 64, 4, 2),
        Sizes(64, 64, 4, 3, 128),
        Sizes(128, 64, 8, 3, 128),
        Sizes(64, 64, 4, 3, 168),
        Sizes(128, 64, 4, 4),
        Sizes(32, 32, 4, 2),
    ],
    "key": [
        Sizes(64, 64, 4, 2),
        Sizes(64, 64, 4, 3),
        Sizes(32, 64, 4, 3, 168),
        Sizes(32, 128, 8, 3, 128),
        Sizes(32, 64, 4, 3),
        Sizes(32, 32, 4, 2),
    ],
    "query": [
        Sizes(64, 64, 4, 2),
        Sizes(64, 64, 4, 3, 168),
        Sizes(128, 64, 8, 3, 128),
        Sizes(64, 32, 4, 3, 128),
        Sizes(64, 64, 4, 3),
        Sizes(32, 32, 4, 2),
    ],
}
_SMALL = Sizes(16, 32, 4, 1)
_PADDED = 128
_chosen: dict[Any, Sizes] = {}
_tuning_one = threading.Lock()


def _config(sizes: Sizes) -> Any:
    blocks = {"BLOCK_M": sizes.queries, "BLOCK_N": sizes.keys}
    return triton.Config(blocks, num_warps=sizes.warps, num_stages=sizes.stages, maxnreg=sizes.registers)


def _prune(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Leaves out blocks far longer than the sequences, and for float32 those that would live in spilled registers.

    Those that do not fit the GPU's shared memory Triton leaves out itself.
    """
    longest = max(arguments["n_queries"], arguments["n_keys"], 32)
    area = 128 * 64 if arguments["Query"].dtype != torch.float32 else 64 * 64
    area = area * 64 // constants.get("BLOCK_D", 64) if constants.get("BLOCK_D", 64) > 64 else area * 2
    kept = [
        c
        for c in configs
        if max(c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"]) < 2 * longest
        and c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"] <= area
    ]
    return kept or configs[-1:]


def _bench(call: Any, quantiles: Any) -> Any:
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _tuned(name: str, function: Any) -> Any:
    options: dict[str, Any] = {}
    if not INTERPRETED:
        options = {"prune_configs_by": {"early_config_prune": _prune}, "do_bench": _bench}
    configs = [_config(size) for size in ([_SMALL] if INTERPRETED else SIZES[name])]
    # What the choice hangs on is up to `_launch`.
    return triton.autotune(configs, key=[], **options)(function)


_TUNED = {
    "forward": _tuned("forward", device._forward),
    "key": _tuned("key", device._key_gradients),
    "query": _tuned("query", device._query_gradients),
}


def _launch(name: str, length: int, call: _Call, block: str, *arguments: Any, **constants: Any) -> None:
    """Runs a kernel, one program for each block of `length` and each head, with tuned or fixed block sizes."""
    tuner = _TUNED[name]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(length, meta[block]) * call.programs,)

    query = arguments[0]
    constants |= call.constants
    half = query.dtype != torch.float32
    sizes = None
    if tuning(query, half and constants["BLOCK_D"] <= 64):
        # Once for each power of two of the longer length, not for every length.
        kind = (name, query.device, query.dtype, call.size_class, *constants.values())
        sizes = _chosen.get(kind)
        if sizes is None:
            with _tuning_one:
                tuner.cache.clear()
                tuner[grid](*arguments, **constants)
                best = tuner.best_config
            blocks = best.kwargs["BLOCK_M"], best.kwargs["BLOCK_N"]
            _chosen[kind] = Sizes(*blocks, best.num_warps, best.num_stages, best.maxnreg)
            return
    sizes = sizes or _untuned(name, query, call)
    constants |= {"BLOCK_M": sizes.queries, "BLOCK_N": sizes.keys, "num_warps": sizes.warps}
    if sizes.registers is not None:
        constants["maxnreg"] = sizes.registers
    tuner.fn[grid](*arguments, **constants, num_stages=sizes.stages)


def _untuned(name: str, query: Tensor, call: _Call) -> Sizes:
    if INTERPRETED:
        return _SMALL
    block_d = call.constants["BLOCK_D"]
    if query.dtype == torch.float32:
        return Sizes(32, 32, 4, 1) if block_d > 64 else Sizes(32, 64, 4, 1)
    if block_d <= 64 and torch.cuda.get_device_capability(query.device) == (9, 0):
        # Checked and timed on an H200 (docs/performance.md).
        registers = {"forward": 168 if call.constants["DROPOUT"] else 128, "key": None, "query": 168}[name]
        return Sizes(64, 64, 4, 3, registers)
    return Sizes(32, 64, 4, 2) if name != "forward" and block_d > 64 else SIZES[name][0]


class _Call:
    """What the kernels of one call share, apart from its tensors."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        keep: Tensor | None,
        kernel: str,
        degree: int,
        scale: float,
        is_causal: bool,
        dropout_p: float,
    ) -> None:
        n_batch, self.n_heads, self.n_queries, head_dim = query.shape
        self.n_keys = key.shape[2]
        self.programs = n_batch * self.n_heads
        # A multiple of every block: rows beyond the last are zero in what the backward pass makes for itself.
        self.n_padded = triton.cdiv(self.n_queries, _PADDED) * _PADDED
        self.scale = scale
        threshold = min(round(dropout_p * 2**32), 2**32 - 1)
        self.dropout = (threshold, 2.0**32 / (2**32 - threshold))
        self.size_class = max(self.n_queries, self.n_keys, 128).bit_length()
        self.c, self.slope_factor = _constants(kernel, degree, scale)
        self.finish = scale if query.dtype == torch.float16 else scale * self.slope_factor
        self.mask, self.mask_strides = _mask(keep, query, key)
        self.constants = {
            "KERNEL": KERNEL_CODES[kernel],
            "DEGREE": degree,
            "CAUSAL": is_causal,
            "MASK": keep is not None,
            "DROPOUT": dropout_p > 0.0,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "PRECISION": _precision(query),
        }

    def forward_scalars(self) -> tuple[Any, ...]:
        lengths = (self.n_heads, self.n_queries, self.n_keys)
        return (*lengths, self.scale, self.c, *self.dropout)

    def backward_scalars(self) -> tuple[Any, ...]:
        lengths = (self.n_heads, self.n_queries, self.n_keys, self.n_padded, self.programs * self.n_padded)
        return (*lengths, self.scale, self.c, self.slope_factor, *self.dropout, self.finish)


def _constants(kernel: str, degree: int, scale: float) -> tuple[float, float]:
    """c of `_strength`, and the factor that `_weights_and_slope` leaves out of the slope."""
    if kernel == "polynomial":
        return 0.0, float(degree)
    if kernel == "elu":
        return 0.0, 1.0
    if not 1e-10 < abs(scale) < 900.0:
        # Outside, x^2 beside c or the slope could leave float32's range: NaN sends every row to the scaled form.
        return math.nan, 1.0
    c = scale**-2
    return c, 2.0 * c / scale


def _precision(query: Tensor) -> str:
    """Of products of float32: as torch's own are set. "tf32x3" is float32 but for its last bits, on tensor cores."""
    if query.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0) else "ieee"


def _mask(keep: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The mask as bytes and its strides over [B, H, T, S]; without a mask, something to point at."""
    if keep is None:
        return query, (0, 0, 0, 0)
    full = keep.expand(*query.shape[:3], key.shape[2]).view(torch.uint8)
    return full, full.stride()


def mask_kinds(keep: Tensor | None, n_queries: int) -> Tensor | None:
    """What a mask [B or 1, H or 1, T or 1, S] shows (see `_mask_kind`), [B or 1, H or 1, T in blocks, 4]."""
    if keep is None:
        return None
    batch, heads, _, n_keys = keep.shape
    rows = device.KIND_ROWS.value
    blocks = triton.cdiv(n_queries, rows)
    kinds = torch.empty((batch, heads, blocks, 4), dtype=torch.int32, device=keep.device)
    strides = keep.expand(batch, heads, n_queries, n_keys).stride()
    with torch.cuda.device_of(keep):
        device._mask_kind[(blocks * batch * heads,)](
            keep.view(torch.uint8), kinds, *strides, heads, n_queries, n_keys, BLOCK=64 if INTERPRETED else 128
        )
    return kinds


def _kind_arguments(kinds: Tensor | None, query: Tensor) -> tuple[Tensor, tuple[int, int]]:
    if kinds is None:
        return query, (0, 0)
    batch, heads, blocks, _ = kinds.shape
    return kinds, (0 if batch == 1 else heads * blocks, 0 if heads == 1 else blocks)


def empty_outputs(query: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised output, residual (see `attnpatch.kernels.score_blocked`), row sums and row scales."""
    rows = query.shape[:3]
    rounded = training and query.dtype != torch.float32
    return (
        torch.empty_like(query),
        torch.empty_like(query) if rounded else query.new_empty(0),
        query.new_empty(rows, dtype=torch.float32),
        query.new_empty(rows, dtype=torch.float32),
    )


def _forward(
    kinds: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    seed: Tensor | None,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, H, T, D] in query's dtype, residual; row sums and row scales [B, H, T] in float32.

    `kinds`: `mask_kinds` of `keep`.
    """
    output, residual, sums, scales = empty_outputs(query, training)
    if output.numel() == 0:
        return output, residual, sums, scales
    call = _Call(query, key, keep, kernel, degree, scale, is_causal, dropout_p)
    kinds, kind_strides = _kind_arguments(kinds, query)
    with torch.cuda.device_of(query):
        _launch(
            "forward", call.n_queries, call, "BLOCK_M",
            query, key, value, call.mask, kinds, query if seed is None else seed, output, residual, sums, scales,
            *query.stride(), *key.stride(), *value.stride(), *call.mask_strides, *output.stride(),
            *kind_strides, *call.forward_scalars(), RESIDUAL=residual.numel() > 0,
        )  # fmt: skip
    return output, residual, sums, scales


def _backward(
    kinds: Tensor | None,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    output: Tensor,
    residual: Tensor,
    sums: Tensor,
    scales: Tensor,
    seed: Tensor | None,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if output.numel() == 0 or key.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad = _near(grad)
    call = _Call(query, key, keep, kernel, degree, scale, is_causal, dropout_p)
    kinds, kind_strides = _kind_arguments(kinds, query)
    padded = (call.programs, call.n_padded)
    rows = torch.empty(padded, dtype=torch.int64, device=query.device)
    row_keys = rows if seed is None else torch.empty((3, *padded), dtype=torch.int32, device=query.device)
    tensors = (query, key, value, call.mask, kinds, grad, rows, scales, row_keys)
    strides = (*query.stride(), *key.stride(), *value.stride(), *call.mask_strides, *grad.stride())
    with torch.cuda.device_of(query):
        device._row_statistics[(call.n_padded // 64 * call.programs,)](
            grad, output, residual, query if seed is None else seed, sums, rows, row_keys,
            *grad.stride(), *output.stride(), call.n_heads, call.n_queries, call.n_padded, rows.numel(),
            HEAD_DIM=call.constants["HEAD_DIM"], BLOCK_D=call.constants["BLOCK_D"], RESIDUAL=residual.numel() > 0,
            DROPOUT=seed is not None, BLOCK_M=64,
        )  # fmt: skip
        arguments = (*tensors, dk, dv, *strides, *dk.stride(), *dv.stride(), *kind_strides, *call.backward_scalars())
        _launch("key", call.n_keys, call, "BLOCK_N", *arguments)
        arguments = (*tensors, dq, *strides, *dq.stride(), *kind_strides, *call.backward_scalars())
        _launch("query", call.n_queries, call, "BLOCK_M", *arguments)
    return dq, dk, dv


def _near(x: Tensor) -> Tensor:
    """x, copied if the offsets within a block of rows do not fit 32 bits."""
    return x.contiguous() if max(x.stride()[2:]) >= 2**24 else x


class _Attention(torch.autograd.Function):
    """The operator below in eager mode, where its calls cost a fraction of a torch.library operator's."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        query, key, value, keep, seed, *options = arguments
        ctx.options = options[:-1]
        ctx.kinds = mask_kinds(keep, query.shape[2])
        output, *rest = _forward(ctx.kinds, query, key, value, keep, seed, *options)
        ctx.save_for_backward(query, key, value, keep, output, *rest, seed)
        return output

    @staticmethod
    @differentiable_once("attention fused in Triton")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx.kinds, grad, *ctx.saved_tensors, *ctx.options), *[None] * 8)


def triton_attention(*arguments: Any) -> Tensor:
    """Attention with a non-softmax score kernel, for what `why_not` has no objection to.

    Args (in this order):
        query: [B, H, T, D]. key, value: [B, H, S, D], of query's dtype and device.
        keep: bool, [1 or B, 1 or H, 1 or T, S], True where a query may attend; or None.
        seed: of dropout, an int64 scalar on the device; or None.
        kernel, degree: as in `attnpatch.kernels.score.kernel_attention`. scale: of the scores.
        is_causal: query i sees keys up to i; not together with `keep`. dropout_p: in [0, 1).
        training: whether a gradient will be wanted.
    Returns:
        [B, H, T, D] in query's dtype.
    """
    arguments = (*map(_near, arguments[:3]), *arguments[3:])
    if is_recorded(*arguments[:5]):
        return triton_attention_op(*arguments)[0]
    return _Attention.apply(*arguments)


@torch.library.custom_op("attnpatch::triton_attention", mutates_args=())
def triton_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    seed: Tensor | None,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_forward`, for torch.compile, exports and dispatch modes."""
    kinds = mask_kinds(keep, query.shape[2])
    return _forward(kinds, query, key, value, keep, seed, kernel, degree, scale, is_causal, dropout_p, training)


@torch.library.custom_op("attnpatch::triton_attention_backward", mutates_args=())
def triton_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    output: Tensor,
    residual: Tensor,
    sums: Tensor,
    scales: Tensor,
    seed: Tensor | None,
    kernel: str,
    degree: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_backward`."""
    tensors = (query, key, value, keep, output, residual, sums, scales, seed)
    kinds = mask_kinds(keep, query.shape[2])
    return _backward(kinds, grad, *tensors, kernel, degree, scale, is_causal, dropout_p)


@triton_attention_op.register_fake
def _fake_forward(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_outputs(query, arguments[-1])


@triton_attention_backward_op.register_fake
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, keep, seed, *options = inputs
    ctx.options = options[:-1]
    ctx.save_for_backward(query, key, value, keep, *output, seed)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = triton_attention_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 8)


torch.library.register_autograd(triton_attention_op, _gradients, setup_context=_save)
