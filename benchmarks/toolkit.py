"""What the toolkit costs, as ratios against a named peer in the same run.

    python benchmarks/toolkit.py [--out results/benchmarks/toolkit-cpu.json] [--only import,step,...] [--repeats 5]

Measures, interleaved, median and spread (min to max):
    import    `import attnpatch` against `import transformers`, whole processes
    idle      a stock model's training step in a process that imported attnpatch, against one that did not
    convert   `attnpatch.convert` against `from_pretrained` + `save_pretrained`, of the source and of the result
              (which writes as many bytes as convert does): time and peak memory
    step      each variant's training step against stock: Marian at T = 32, RoBERTa at T = 128 and 512
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import machine, summary, write

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
SHAPES = {
    "marian-32": {"family": "marian", "tokens": 32, "batch": 64},
    "roberta-128": {"family": "roberta", "tokens": 128, "batch": 8},
    "roberta-512": {"family": "roberta", "tokens": 512, "batch": 2},
}

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
        raise SystemExit(f"a benchmark process failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def bench_import(repeats: int) -> dict[str, Any]:
    code = """
import json, time
start = time.perf_counter()
import {}
print(json.dumps({{"seconds": time.perf_counter() - start}}))
"""
    times: dict[str, list[float]] = {"transformers": [], "attnpatch": []}
    for name in times:
        child(code.format(name))
    for _ in range(repeats):
        for name, values in times.items():
            values.append(child(code.format(name))["seconds"])
    ratios = [a / t for a, t in zip(times["attnpatch"], times["transformers"], strict=True)]
    return {
        "peer": "import transformers",
        "note": "import attnpatch loads neither torch nor transformers; both load when first used",
        "seconds": {name: summary(values) for name, values in times.items()},
        "ratio": summary(ratios),
    }


def bench_idle(repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(repeats):
        for name, values in times.items():
            values.append(child(IDLE_STEP, name)["seconds"])
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    return {
        "peer": "the same step of a stock RoBERTa in a process without attnpatch",
        "seconds": {name: summary(values) for name, values in times.items()},
        "ratio": summary(ratios),
    }


def bench_convert(repeats: int) -> dict[str, Any]:
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
            for i in range(repeats):
                for name, values in rows.items():
                    target = f"{folder}/out"
                    values.append(child(CONVERT, name, paths[name], target, spec))
                    shutil.rmtree(target)
                print(f"convert {spec}: {i + 1} of {repeats}", file=sys.stderr)
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


def stepper(shape: dict[str, Any], spec: Any) -> Callable[[], float]:
    """A function that does one float32 training step (forward, backward, AdamW) and returns its seconds."""
    import torch
    from transformers import MarianConfig, MarianMTModel, RobertaConfig, RobertaForMaskedLM

    import attnpatch

    torch.manual_seed(0)
    tokens, batch = shape["tokens"], shape["batch"]
    config: Any
    if shape["family"] == "marian":
        config = MarianConfig(
            vocab_size=6000,
            d_model=256,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=1024,
            decoder_ffn_dim=1024,
            max_position_embeddings=512,
            pad_token_id=5999,
            decoder_start_token_id=5999,
            eos_token_id=0,
        )
        cls: Any = MarianMTModel
    else:
        config = RobertaConfig(
            vocab_size=8000,
            hidden_size=768,
            num_hidden_layers=4,
            num_attention_heads=12,
            intermediate_size=3072,
            max_position_embeddings=514,
        )
        cls = RobertaForMaskedLM
    model = cls(attnpatch.patch_config(config, spec)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(5, 5000, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[::2, -tokens // 8 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}

    def step() -> float:
        start = time.perf_counter()
        model(**inputs).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return time.perf_counter() - start

    return step


def bench_step(repeats: int, shapes: list[str]) -> dict[str, Any]:
    import torch

    results: dict[str, Any] = {
        "peer": "stock attention (torch SDPA), same model and batch, in the same process; float32, with padding",
        "threads": torch.get_num_threads(),
    }
    for name in shapes:
        shape = SHAPES[name]
        stock = stepper(shape, None)
        table: dict[str, Any] = {}
        for spec in STEP_SPECS:
            label = spec if isinstance(spec, str) else _label(spec)
            variant = stepper(shape, spec)
            stock(), variant()
            pairs = [(variant(), stock()) for _ in range(repeats)]
            table[label] = {
                "ratio": summary([a / b for a, b in pairs]),
                "seconds": statistics.median(a for a, _ in pairs),
                "stock_seconds": statistics.median(b for _, b in pairs),
            }
            print(f"{name}  {label}: {table[label]['ratio']['median']:.2f}x", file=sys.stderr)
            del variant
        results[name] = {"shape": shape, "variants": table}
    return results


def _label(spec: dict[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for o in spec["options"].values() for k, v in o.items())
    return f"{spec['variant']}({options})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/toolkit-cpu.json"))
    parser.add_argument("--only", default="import,idle,convert,step", help="comma-separated parts")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="for step")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "import": lambda: bench_import(arguments.repeats),
        "idle": lambda: bench_idle(arguments.repeats),
        "convert": lambda: bench_convert(arguments.repeats),
        "step": lambda: bench_step(arguments.repeats, arguments.shapes.split(",")),
    }
    chosen = arguments.only.split(",")
    for name in chosen:
        if name not in parts:
            parser.error(f"unknown part {name!r}; known: {', '.join(parts)}")
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in chosen:
        print(f"measuring {name}", file=sys.stderr)
        results[name] = parts[name]() | {"machine": machine()}
        write(arguments.out, results)
    print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
