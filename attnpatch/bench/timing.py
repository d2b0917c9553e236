"""Ratios of running times against a peer in the same process: interleaved, median and spread."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpatch.errors import AttnpatchError


class BenchmarkError(AttnpatchError, RuntimeError):
    """A benchmark's sides disagree, so that nothing was timed; or it cannot run here."""


@dataclass(frozen=True)
class Settings:
    """What is the same for every benchmark.

    Attributes:
        repeats: of each timed pair. threads: of torch, on a CPU. device: "cpu" or "cuda".
        data: a folder with Multi30k, for training on real text; None takes the built-in synthetic grammar.
        say: called with a line for each result.
    """

    repeats: int = 5
    threads: int = 1
    device: str = "cpu"
    data: Path | None = None
    say: Callable[[str], None] = print


def child(code: str | Path, *arguments: str) -> Any:
    """What the last line says, in JSON, that a process of its own printed: of code, or of a file with code.

    Raises:
        BenchmarkError: it failed.
    """
    # -P: modules beside the file do not hide those of the same name.
    command = ["-c", code] if isinstance(code, str) else ["-P", str(code)]
    done = subprocess.run(
        [sys.executable, *command, *arguments], capture_output=True, text=True, check=False, env=os.environ
    )
    if done.returncode:
        raise BenchmarkError(f"a benchmark process failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


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


def check_close(name: str, actual: Any, expected: Any, tolerance: float) -> float:
    """The largest difference, relative to the largest expected number; stops the benchmark above the tolerance."""
    actual, expected = actual.detach(), expected.detach()
    difference = float(
        (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    )
    if not difference <= tolerance:
        raise BenchmarkError(f"{name} is off by {difference:.1e}, more than {tolerance:.1e}: nothing was timed")
    return difference
