"""What a score kernel costs over softmax: ratios against F.scaled_dot_product_attention in the same process.

Every output and gradient is checked against the plain form in float64 (on a short input of the same kind) before
it is timed. The forms are timed in turn; the ratio is that of a turn, its median and spread (min to max) over the
turns. With one thread, processor time is reported too, which other processes on the core do not add to. Memory is
the peak of one forward and backward pass over what was there before, in a fresh process on the CPU.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpatch.bench.timing import BenchmarkError, Settings, child, summary
from attnpatch.kernels import dispatch, score

KERNELS = ("expressive", "polynomial", "elu")
LENGTHS = (128, 512, 2048)
HEAD_DIM = 64
TOKENS = 16384
"""Tokens times heads of one call: long sequences come in smaller batches."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def form(kernel: str, implementation: str, causal: bool) -> Attend:
    """The peer ("sdpa") or one implementation of a kernel, both with scale 1/sqrt(D)."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if implementation == "sdpa":
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        scale = query.shape[-1] ** -0.5
        with dispatch.use_implementation(implementation):
            return score.kernel_attention(query, key, value, None, 0.0, causal, scale, kernel=kernel)

    return attend


def inputs(length: int, head_dim: int, device: str, dtype: torch.dtype, heads: int | None = None) -> list[Tensor]:
    heads = heads or max(4, TOKENS // length)
    shape = (1, heads, length, head_dim)
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]


def passes(attend: Attend, tensors: list[Tensor], grad: Tensor | None) -> None:
    if grad is None:
        with torch.no_grad():
            attend(*tensors)
    else:
        torch.autograd.grad(attend(*tensors), tensors, grad)


def check(kernel: str, implementation: str, causal: bool, head_dim: int, device: str, dtype: torch.dtype) -> float:
    """The largest relative error of output and gradients; raises if it is too large to be worth timing."""
    # Large enough for what large calls alone take, such as the compiled loop on the CPU; no multiple of the blocks.
    tensors = inputs(740, head_dim, device, dtype, heads=2)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    grad = torch.randn_like(tensors[0])
    found = form(kernel, implementation, causal)(*tensors)
    wanted = form(kernel, "plain", causal)(*exact)
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad(found, tensors, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    )
    error = max(float(((a.double() - b).norm() / b.norm()).detach()) for a, b in pairs)
    # A causal row that sees one key has gradient 0 / z: float32 rounding shows in it.
    allowed = 1e-4 if dtype == torch.float32 else 2e-2
    if not error <= allowed:
        raise BenchmarkError(
            f"{kernel} {implementation} {dtype}: relative error {error:.1e} > {allowed:.0e}; not timed"
        )
    return error


def clock(device: str) -> tuple[float, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.thread_time()


def compare(
    forms: dict[str, Attend], tensors: list[Tensor], grad: Tensor | None, device: str, repeats: int
) -> dict[str, Any]:
    """{form: milliseconds, ratio, ratio_min, ratio_max, [cpu_ratio]} of each form over the peer."""
    calls = 1
    for attend in forms.values():
        for _ in range(3):
            passes(attend, tensors, grad)
    if device == "cuda":
        before = clock(device)[0]
        passes(forms["sdpa"], tensors, grad)
        calls = max(1, int(0.02 / (clock(device)[0] - before)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, attend in forms.items():
            wall, cpu = clock(device)
            for _ in range(calls):
                passes(attend, tensors, grad)
            end_wall, end_cpu = clock(device)
            times[name].append(((end_wall - wall) / calls, (end_cpu - cpu) / calls))
    result: dict[str, Any] = {}
    for name, taken in times.items():
        result[name] = {
            "milliseconds": 1e3 * summary([t[0] for t in taken])["median"],
            "ratio": summary([a[0] / b[0] for a, b in zip(taken, times["sdpa"], strict=True)]),
        }
        if device == "cpu" and torch.get_num_threads() == 1:
            result[name]["processor_time"] = {
                "ratio": summary([a[1] / b[1] for a, b in zip(taken, times["sdpa"], strict=True)])
            }
    return result


def resident(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    if match is None:
        raise BenchmarkError(f"/proc/self/status has no {field}, so peaks of memory cannot be measured here")
    return 1024 * int(match[1])


def peak(kernel: str, implementation: str, causal: bool, length: int, head_dim: int, device: str, dtype: str) -> int:
    """Bytes that one forward and backward pass takes over its inputs, its results included."""
    attend = form(kernel, implementation, causal)
    tensors = inputs(length, head_dim, device, getattr(torch, dtype))
    grad = torch.randn_like(tensors[0])
    # Libraries and compiled kernels are not what is asked about.
    passes(
        attend, inputs(64, head_dim, device, getattr(torch, dtype), heads=2), torch.randn(1, 2, 64, head_dim).to(grad)
    )
    if device == "cuda":
        passes(attend, tensors, grad)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        passes(attend, tensors, grad)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    passes(attend, tensors, grad)
    return resident("VmHWM") - before


def peak_apart(*arguments: Any) -> int:
    """`peak` in a fresh process, so that nothing freed before is there to be used again."""
    code = f"import torch; from attnpatch.bench.score import peak; torch.set_num_threads({torch.get_num_threads()})"
    return int(child(f"{code}; print(peak(*{arguments!r}))"))


def operator(settings: Settings, causal: bool = False) -> dict[str, Any]:
    device = settings.device
    implementations = ("auto", "plain") if device == "cpu" else ("auto", "flex", "plain")
    results: dict[str, Any] = {
        "peer": "F.scaled_dot_product_attention, D = 64, 16,384 tokens times heads",
        "causal": causal,
    }
    for dtype_name in ("float32",) if device == "cpu" else ("bfloat16", "float32"):
        dtype = getattr(torch, dtype_name)
        for kernel in KERNELS:
            # The plain form stands beside the headline kernel only: it shows what the fused forms gain.
            names = implementations if kernel == "expressive" else ("auto",)
            errors = {name: check(kernel, name, causal, HEAD_DIM, device, dtype) for name in names}
            for length in LENGTHS:
                row = _row(kernel, names, causal, length, dtype_name, settings)
                for name in names:
                    row[name]["relative_error"] = errors[name]
                    shown = "  ".join(
                        f"{what} {row[name][what]['ratio']['median']:.2f}" for what in ("forward", "both")
                    )
                    settings.say(
                        f"{dtype_name} {kernel} ({name}) T = {length}: {shown}  memory {row[name]['memory']:.2f}"
                    )
                results[f"{kernel} {dtype_name}, T = {length}"] = row
    return results


def _row(
    kernel: str, names: tuple[str, ...], causal: bool, length: int, dtype_name: str, settings: Settings
) -> dict[str, Any]:
    device, dtype = settings.device, getattr(torch, dtype_name)
    forms = {name: form(kernel, name, causal) for name in ("sdpa", *names)}
    tensors = inputs(length, HEAD_DIM, device, dtype)
    grad = torch.randn_like(tensors[0])
    forward = compare(forms, tensors, None, device, settings.repeats)
    both = compare(forms, tensors, grad, device, settings.repeats)
    measure = peak if device == "cuda" else peak_apart
    taken = {name: measure(kernel, name, causal, length, HEAD_DIM, device, dtype_name) for name in forms}
    given = 4 * grad.numel() * grad.element_size()  # query, key, value and the output's gradient
    row: dict[str, Any] = {"shape": list(tensors[0].shape)}
    for name in forms:
        timed = {"forward": forward[name], "both": both[name]}
        if name == "sdpa":
            timed = {what: {"milliseconds": found["milliseconds"]} for what, found in timed.items()}
        row[name] = {
            **timed,
            "peak_bytes": taken[name],
            "memory": (taken[name] + given) / (taken["sdpa"] + given),
        }
    return row


PARTS = {"operator": operator, "causal": lambda settings: operator(settings, causal=True)}
