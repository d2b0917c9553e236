"""What the toolkit costs, as ratios against a named peer in the same run.

Measures, interleaved, median and spread (min to max):
    import    `import attnpatch` against `import transformers`, whole processes
    idle      a stock model's training step in a process that imported attnpatch, against one that did not, two forks
              of one process in turns on one core
    convert   `attnpatch.convert` against `from_pretrained` + `save_pretrained`, of the source and of the result
              (which writes as many bytes as convert does): time and peak memory
    step      each variant's training step against stock, time and peak memory: Marian at T = 32, RoBERTa-base's
              shape with 2 layers at T = 128 and 512
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from attnpatch.bench.steps import marian, roberta, specs, step
from attnpatch.bench.timing import BenchmarkError, Settings, child, compare, peak_bytes, summary

PAIRS, TURNS, STEPS = 8, 15, 4
"""Of the stock step: pairs of processes on a CPU (at least), turns of each pair, steps in a turn of a process."""

CONVERT = """
import json, re, sys, time
import torch
from transformers import RobertaForMaskedLM
import attnpatch
import attnpatch.checkpoint
def high_water():  # of this process alone: ru_maxrss would start at its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = high_water()
start = time.perf_counter()
if sys.argv[1] == "convert":
    attnpatch.convert(sys.argv[2], sys.argv[3], sys.argv[4])
else:
    RobertaForMaskedLM.from_pretrained(sys.argv[2]).save_pretrained(sys.argv[3])
seconds = time.perf_counter() - start
peak = high_water()
print(json.dumps({"seconds": seconds, "libraries_kib": before, "peak_kib": peak}))
"""


def bench_import(settings: Settings) -> dict[str, Any]:
    code = """
import json, time
start = time.perf_counter()
import {}
print(json.dumps({{"seconds": time.perf_counter() - start}}))
"""
    times: dict[str, list[float]] = {"transformers": [], "attnpatch": []}
    for name in times:
        child(code.format(name))
    for _ in range(settings.repeats):
        for name, values in times.items():
            values.append(child(code.format(name))["seconds"])
    ratios = [a / t for a, t in zip(times["attnpatch"], times["transformers"], strict=True)]
    return {
        "peer": "import transformers",
        "note": "import attnpatch loads neither torch nor transformers; both load when first used",
        "seconds": {name: summary(values) for name, values in times.items()},
        "ratio": summary(ratios),
    }


def bench_idle(settings: Settings, pairs: int | None = None) -> dict[str, Any]:
    """`pairs` of processes; None: as many as there are repeats, and on a CPU at least PAIRS."""
    # By its path: as a module of this package it would import attnpatch.
    script = Path(__file__).with_name("stock_step.py")
    on_cpu = settings.device == "cpu"
    pairs = pairs or max(PAIRS if on_cpu else 1, settings.repeats)
    found = child(script, str(pairs), str(TURNS), str(STEPS), settings.device)
    return {
        "peer": "the same step of a stock RoBERTa in a process without attnpatch",
        "how": f"two forks of one process in turns on one core; {'processor' if on_cpu else 'wall'} time, "
        f"fastest of {STEPS} steps a turn, median of {TURNS} turns; n counts pairs of forks",
        "seconds": {name: summary(values) for name, values in found["seconds"].items()},
        "ratio": summary(found["ratio"]),
    }


def bench_convert(settings: Settings) -> dict[str, Any]:
    from transformers import RobertaConfig, RobertaForMaskedLM

    results: dict[str, Any] = {
        "peers": {
            "source": "from_pretrained + save_pretrained of the RoBERTa-base-shaped source",
            "converted": "the same of the converted model, which writes as many bytes as convert does",
        },
        "memory": "peak over that of the imported libraries, divided by the size of the peer's weights",
    }
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/source"
        RobertaForMaskedLM(RobertaConfig(vocab_size=50265, max_position_embeddings=514)).save_pretrained(source)
        for spec in ("neural", "expressive"):
            converted = f"{folder}/{spec}"
            child(CONVERT, "convert", source, converted, spec)
            rows: dict[str, list[dict[str, float]]] = {"source": [], "converted": [], "convert": []}
            paths = {"source": source, "converted": converted, "convert": source}
            for i in range(settings.repeats):
                for name, values in rows.items():
                    target = f"{folder}/out"
                    values.append(child(CONVERT, name, paths[name], target, spec))
                    shutil.rmtree(target)
                settings.say(f"convert {spec}: {i + 1} of {settings.repeats}")
            table: dict[str, Any] = {"seconds": {n: summary([v["seconds"] for v in vs]) for n, vs in rows.items()}}
            for peer in ("source", "converted"):
                size = _weights_kib(paths[peer])
                table[peer] = {
                    "checkpoint_mib": size / 1024,
                    "time_ratio": summary(
                        [a["seconds"] / b["seconds"] for a, b in zip(rows["convert"], rows[peer], strict=True)]
                    ),
                    "memory": summary([(v["peak_kib"] - v["libraries_kib"]) / size for v in rows["convert"]]),
                    "peer_memory": summary([(v["peak_kib"] - v["libraries_kib"]) / size for v in rows[peer]]),
                }
            results[spec] = table
    return results


def _weights_kib(folder: str) -> float:
    return sum(p.stat().st_size for p in Path(folder).glob("*.safetensors")) / 1024


def bench_step(settings: Settings) -> dict[str, Any]:
    results: dict[str, Any] = {"peer": "stock attention (torch SDPA), same model and batch; float32, with padding"}
    for name, (architecture, batch, tokens) in _shapes().items():
        stock = step(architecture, None, batch, tokens, settings.device)
        table: dict[str, Any] = {}
        peer_peak = peak_bytes(stock, settings.device)
        for label, spec in specs().items():
            variant = step(architecture, spec, batch, tokens, settings.device)
            if not bool(variant().isfinite()):
                raise BenchmarkError(f"{label}: the loss is not finite; nothing was timed")
            timed = compare(variant, stock, settings.repeats, settings.device)
            peak = peak_bytes(variant, settings.device)
            # Of a step over what stays: weights, their averages in AdamW and the batch.
            memory = {"peak_bytes": peak, "peer_peak_bytes": peer_peak, "memory": peak / peer_peak}
            table[label] = timed | memory
            settings.say(
                f"{name}, {label}: {timed['ratio']['median']:.2f} times the stock step, memory {peak / peer_peak:.2f}"
            )
            del variant
        results[name] = {"batch": batch, "tokens": tokens, "variants": table}
    return results


def _shapes() -> dict[str, tuple[Any, int, int]]:
    base = roberta()
    return {
        "Marian, T = 32": (marian(), 64, 32),
        "RoBERTa, T = 128": (base, 8, 128),
        "RoBERTa, T = 512": (base, 2, 512),
    }


CPU_PARTS = ("import", "convert")
PARTS = {"import": bench_import, "idle": bench_idle, "convert": bench_convert, "step": bench_step}
