"""What the toolkit costs, as ratios against a named peer in the same run.

Measures, interleaved, median and spread (min to max):
    import    `import attnpatch` against `import transformers`, whole processes
    idle      a stock model's training step in a process that imported attnpatch, against one that did not
    convert   `attnpatch.convert` against `from_pretrained` + `save_pretrained`, of the source and of the result
              (which writes as many bytes as convert does): time and peak memory
    step      each variant's training step against stock: Marian at T = 32, RoBERTa at T = 128 and 512
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from attnpatch.bench.steps import marian, roberta, step
from attnpatch.bench.timing import BenchmarkError, Settings, compare, summary

STEP_SPECS: list[Any] = [
    "neural",
    {"variant": "linear", "options": {"linear": {"form": "matched"}}},
    "expressive",
    "polynomial",
    "elu",
    {"variant": "top_r", "options": {"top_r": {"r": 16}}},
    {"variant": "value_aware", "options": {"value_aware": {"r": 16, "selector": "centered"}}},
    "query_value",
    {"variant": "query_value", "options": {"query_value": {"gate": "query"}}},
    {"variant": "alignment", "options": {"alignment": {"method": "gan"}}},
    {"variant": "alignment", "options": {"alignment": {"method": "ct"}}},
    {"variant": "alignment", "options": {"alignment": {"method": "ot"}}},
    {"variant": "alignment", "options": {"alignment": {"method": "mmd"}}},
]
IDLE_STEP = """
import json, sys, time
if sys.argv[1] == "with":
    import attnpatch
import torch
from transformers import RobertaConfig, RobertaForMaskedLM
torch.manual_seed(0)
model = RobertaForMaskedLM(RobertaConfig(vocab_size=2000, hidden_size=256, num_hidden_layers=4,
    num_attention_heads=4, intermediate_size=1024, max_position_embeddings=200)).train()
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
ids = torch.randint(5, 2000, (8, 128))
times = []
for step in range(14):
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    times.append(time.perf_counter() - start)
print(json.dumps({"seconds": sorted(times[4:])[len(times[4:]) // 2]}))
"""

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


def child(code: str, *arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=os.environ
    )
    if done.returncode:
        raise BenchmarkError(f"a benchmark process failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


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


def bench_idle(settings: Settings) -> dict[str, Any]:
    times: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(settings.repeats):
        for name, values in times.items():
            values.append(child(IDLE_STEP, name)["seconds"])
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    return {
        "peer": "the same step of a stock RoBERTa in a process without attnpatch",
        "seconds": {name: summary(values) for name, values in times.items()},
        "ratio": summary(ratios),
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
        for spec in STEP_SPECS:
            label = spec if isinstance(spec, str) else _label(spec)
            variant = step(architecture, spec, batch, tokens, settings.device)
            if not bool(variant().isfinite()):
                raise BenchmarkError(f"{label}: the loss is not finite; nothing was timed")
            table[label] = compare(variant, stock, settings.repeats, settings.device)
            settings.say(f"{name}, {label}: {table[label]['ratio']['median']:.2f} times the stock step")
            del variant
        results[name] = {"batch": batch, "tokens": tokens, "variants": table}
    return results


def _shapes() -> dict[str, tuple[Any, int, int]]:
    base = roberta(layers=4)
    return {
        "Marian, T = 32": (marian(), 64, 32),
        "RoBERTa, T = 128": (base, 8, 128),
        "RoBERTa, T = 512": (base, 2, 512),
    }


def _label(spec: dict[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for o in spec["options"].values() for k, v in o.items())
    return f"{spec['variant']}({options})"


CPU_PARTS = ("import", "idle", "convert")
PARTS = {"import": bench_import, "idle": bench_idle, "convert": bench_convert, "step": bench_step}
