"""What a score kernel costs over softmax: ratios against F.scaled_dot_product_attention in the same process.

    python benchmarks/operator.py [--device cpu] [--dtypes float32] [--lengths 128,512,2048]
        [--kernels expressive] [--implementations auto,plain] [--causal] [--threads 2] [--repeats 7] [--out FILE]

Every output and gradient is checked against the plain form in float64 (on a short input of the same kind) before
it is timed. The forms are timed in turn; the ratio is that of a turn, its median and spread (min to max) over the
turns. With one thread, processor time is reported too, which other processes on the core do not add to. Memory is
the peak of one forward and backward pass over what was there before, in a fresh process on the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpatch.kernels import dispatch, score

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
    tensors = inputs(300, head_dim, device, dtype, heads=2)
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
        raise SystemExit(f"{kernel} {implementation} {dtype}: relative error {error:.1e} > {allowed:.0e}; not timed")
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
    result = {}
    for name, taken in times.items():
        ratios = [a[0] / b[0] for a, b in zip(taken, times["sdpa"], strict=True)]
        result[name] = {
            "milliseconds": 1e3 * statistics.median(t[0] for t in taken),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
        if device == "cpu" and torch.get_num_threads() == 1:
            cpu_ratios = [a[1] / b[1] for a, b in zip(taken, times["sdpa"], strict=True)]
            result[name]["cpu_ratio"] = statistics.median(cpu_ratios)
    return result


def resident(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
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
    command = [sys.executable, __file__, "--peak", json.dumps([*arguments, torch.get_num_threads()])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--lengths", default="128,512,2048,4096")
    parser.add_argument("--kernels", default="expressive,polynomial,elu")
    parser.add_argument("--implementations", default="auto")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        *arguments, threads = json.loads(options.peak)
        torch.set_num_threads(threads)
        print(peak(*arguments))
        return
    torch.set_num_threads(options.threads)
    device, causal, head_dim = options.device, options.causal, options.head_dim
    rows = []
    for dtype_name in options.dtypes.split(","):
        dtype = getattr(torch, dtype_name)
        for kernel in options.kernels.split(","):
            names = options.implementations.split(",")
            errors = {name: check(kernel, name, causal, head_dim, device, dtype) for name in names}
            for length in map(int, options.lengths.split(",")):
                forms = {name: form(kernel, name, causal) for name in ["sdpa", *names]}
                tensors = inputs(length, head_dim, device, dtype)
                grad = torch.randn_like(tensors[0])
                forward = compare(forms, tensors, None, device, options.repeats)
                both = compare(forms, tensors, grad, device, options.repeats)
                measure = peak if device == "cuda" else peak_apart
                bytes_of = {n: measure(kernel, n, causal, length, head_dim, device, dtype_name) for n in forms}
                given = 4 * grad.numel() * grad.element_size()  # query, key, value and the output's gradient
                for name in names:
                    memory = (bytes_of[name] + given) / (bytes_of["sdpa"] + given)
                    row = {
                        "kernel": kernel,
                        "implementation": name,
                        "dtype": dtype_name,
                        "length": length,
                        "shape": list(tensors[0].shape),
                        "causal": causal,
                        "relative error": errors[name],
                        "forward": forward[name],
                        "forward and backward": both[name],
                        "sdpa forward ms": forward["sdpa"]["milliseconds"],
                        "sdpa forward and backward ms": both["sdpa"]["milliseconds"],
                        "peak bytes": bytes_of[name],
                        "sdpa peak bytes": bytes_of["sdpa"],
                        "memory ratio": memory,
                    }
                    rows.append(row)
                    shown = "  ".join(
                        f"{what} {r['ratio']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f}"
                        + (f", processor time {r['cpu_ratio']:.2f})" if "cpu_ratio" in r else ")")
                        for what, r in (("forward", forward[name]), ("both", both[name]))
                    )
                    print(f"{dtype_name} {kernel} {name} T={length}: {shown}  memory {memory:.2f}", flush=True)
    record = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": options.repeats,
        "rows": rows,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        aside = options.out.with_suffix(".tmp")
        aside.write_text(json.dumps(record, indent=1) + "\n")
        aside.replace(options.out)


if __name__ == "__main__":
    main()
