"""Ratios of running times against a peer in the same process: interleaved, median and spread."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def seconds(function: Callable[[], Any], device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, the work it left on the device included."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    start = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def compare(
    function: Callable[[], Any],
    peer: Callable[[], Any],
    repeats: int,
    device: str = "cpu",
    scale: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time both in turn, after one call of each to warm up.

    `scale`: the peer's work over the function's, where the peer does a part of it. The ratio is function over peer
    for the same work; the speed-up is its inverse.
    """
    function(), peer()
    pairs = [(seconds(function, device, clock), seconds(peer, device, clock) / scale) for _ in range(repeats)]
    return {
        "ratio": summary([a / b for a, b in pairs]),
        "speedup": summary([b / a for a, b in pairs]),
        "seconds": summary([a for a, _ in pairs]),
        "peer_seconds": summary([b for _, b in pairs]),
    }


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """Most memory that tensors took at once during one call, above what there was before it."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    most = now = 0
    for event in profile.profiler.kineto_results.events() if profile.profiler is not None else ():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def machine() -> dict[str, Any]:
    import torch
    import transformers

    import attnpatch

    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attnpatch": attnpatch.__version__,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def run(name: str, doc: str | None, parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]]) -> None:
    """The command line of a benchmark: measures the parts asked for and writes results/benchmarks/NAME-DEVICE.json."""
    import torch

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(parts), help="comma-separated parts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    out: Path = arguments.out or Path(f"results/benchmarks/{name}-{arguments.device}.json")
    torch.set_num_threads(arguments.threads)
    chosen = arguments.only.split(",")
    for part in chosen:
        if part not in parts:
            parser.error(f"unknown part {part!r}; known: {', '.join(parts)}")
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for part in chosen:
        print(f"measuring {part}", file=sys.stderr)
        results[part] = parts[part](arguments) | {"machine": machine()}
        write(out, results)
    print(f"wrote {out}", file=sys.stderr)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.replace(path)


def check_close(name: str, actual: Any, expected: Any, tolerance: float) -> float:
    """The largest difference, relative to the largest expected number; stops the benchmark above the tolerance."""
    actual, expected = actual.detach(), expected.detach()
    difference = float(
        (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    )
    if not difference <= tolerance:
        raise SystemExit(f"{name} is off by {difference:.1e}, more than {tolerance:.1e}: nothing was timed")
    return difference
