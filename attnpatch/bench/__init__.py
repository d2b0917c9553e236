"""Benchmarks: what attention and training cost, as ratios against a named peer in the same run.

A benchmark is a module with PARTS, a mapping from a part's name to a function of `Settings` that gives its results.
Each part checks its outputs against its peer before it times them, and times both in turn.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from attnpatch.bench.timing import BenchmarkError, Settings
from attnpatch.errors import SpecError, unknown

# torch's profiler, which counts memory here, would say that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

BENCHMARKS = (
    "score",
    "layer",
    "toolkit",
    "neural",
    "alignment",
    "value_aware",
    "generation",
    "training",
    "query_value",
)
"""By what they measure, the most important first; each is a module of this package."""
EXTRA = ("score.causal", "neural.fused", "query_value.step", "toolkit.convert")
"""Parts that are measured only when they or their benchmark are named: all of the rest is to fit into 15 minutes."""


def parts_of(name: str) -> dict[str, Any]:
    """A benchmark's parts by name.

    Raises:
        SpecError: there is no such benchmark.
    """
    if name not in BENCHMARKS:
        raise SpecError(unknown("benchmark", name, BENCHMARKS))
    parts: dict[str, Any] = importlib.import_module(f"attnpatch.bench.{name}").PARTS
    return parts


def choose(words: Iterable[str], device: str = "cpu") -> list[tuple[str, str]]:
    """(benchmark, part) for words such as "alignment" (all of its parts) and "toolkit.convert"; for none all but
    EXTRA. Parts that have nothing to do with a GPU are left out on one, unless they are named. Each stands once.

    Raises:
        SpecError: an unknown benchmark or part; names the nearest.
    """
    chosen, words = [], list(words)
    for word in words or BENCHMARKS:
        name, dot, part = word.partition(".")
        parts = parts_of(name)
        if dot and not part:
            raise SpecError(f"{word!r} names no part after the dot; parts of {name}: {', '.join(parts)}")
        if part and part not in parts:
            raise SpecError(unknown(f"part of {name}", part, parts))
        apart = importlib.import_module(f"attnpatch.bench.{name}").__dict__.get("CPU_PARTS", ())
        chosen += [(name, p) for p in ([part] if part else parts) if part or device == "cpu" or p not in apart]
    return [(name, part) for name, part in dict.fromkeys(chosen) if words or f"{name}.{part}" not in EXTRA]


def run(words: Iterable[str], settings: Settings, out: Path) -> list[Path]:
    """Measure, and write NAME-DEVICE.json into `out` after each part; parts that were not asked for stay in it.

    Args:
        words: as for `choose`. out: a folder.

    Returns:
        The files written.

    Raises:
        SpecError: an unknown name. BenchmarkError: two sides disagree, there is no such device, or (before anything is
            measured) `out`, a result file in it or the data cannot be used.
    """
    import torch

    from attnpatch.atomic import write_json
    from attnpatch.bench import tables
    from attnpatch.bench.inputs import prepare
    from attnpatch.environment import LIBRARIES, code_commit, machine, versions

    chosen = choose(words, settings.device)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("there is no CUDA device here: use --device cpu")
    prepare(settings, out)
    tables.load(out, settings.device)
    commit = code_commit()
    torch.set_num_threads(settings.threads)
    written: dict[Path, None] = {}
    for name, part in chosen:
        settings.say(f"measuring {name}.{part}")
        started = time.perf_counter()
        result = parts_of(name)[part](settings)
        took = time.perf_counter() - started
        settings.say(f"{name}.{part} took {took:.0f} s")
        path = out / f"{name}-{settings.device}.json"
        results = tables.read(path) if path.is_file() else {}
        about = {
            "date": date.today().isoformat(),
            "repeats": settings.repeats,
            "took_seconds": round(took, 1),
            **machine(),
            **versions(LIBRARIES),
            **({"commit": commit} if commit else {}),
        }
        results[part] = result | {"measured": about}
        write_json(path, results)
        written[path] = None
    return list(written)
