"""What a GPU run is for, in order of importance and within a budget: the kernels checked, then timed.

check     the Triton kernels of attention, selection, query_value and alignment against float64, outputs and gradients
operator  expressive attention, D = 64, over F.scaled_dot_product_attention and its best backend; plain, FlexAttention
roberta   a RoBERTa-base training step at T = 512 in bf16, expressive over stock: time and memory
steps     a training step of neural, alignment and query_value models over stock
layer     the query_value attention layer at T = 512 in bf16 over the stock one, forward and backward
solver    the exact value-aware solver over scipy's non-negative least squares
marian    Marian training and decoding over transformers' own loops
selection a training step of top_r and value_aware models over stock, fused and plain
idle      a stock model's step with attnpatch imported over one without

Each stage writes its results before the next starts. One that fails is written down with its error, and one that the
budget leaves no time for with that reason. A dry run takes the same way with tiny shapes on a CPU, the kernels in
Triton's interpreter: it shows that the script works, and its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from attnpatch.bench.timing import BenchmarkError, Settings, compare, peak_bytes

SINGLE = "float32"


@dataclass
class GpuRun:
    """What is measured with, how long it may take, and the file that grows; `unchecked` when the kernels were not found
    right, by kind: the stages that time them are marked with it."""

    settings: Settings
    path: Path
    seconds: float
    dry: bool
    unchecked: set[str] = field(default_factory=set)
    results: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def write(self) -> None:
        from attnpatch.atomic import write_json

        for name, kinds in KINDS.items():
            if name in self.results and self.unchecked & kinds:
                self.results[name]["unchecked"] = True
        write_json(self.path, self.results)


def run(settings: Settings, out: Path, minutes: float, dry: bool = False) -> tuple[Path, list[str]]:
    """Run the stages that `minutes` suffice for; write gpu-DEVICE.json into `out` after each (dry: gpu-dry.json). The
    file of an earlier run stays as gpu-DEVICE.previous.json (previous-2 and so on), a dry run's does not.

    Returns:
        The file, and the stages that failed; "check" also when the budget left no time for it. The timings that follow
        are then marked `"unchecked": true`.

    Raises:
        BenchmarkError: no CUDA device, no Triton, a dry run without Triton's interpreter, or (before anything is
            measured) `out` or the data cannot be used.
    """
    import torch

    from attnpatch.bench.inputs import prepare
    from attnpatch.environment import LIBRARIES, code_commit, machine, versions
    from attnpatch.kernels import triton_here

    if not dry and not torch.cuda.is_available():
        raise BenchmarkError("there is no CUDA device here; --dry-run tries the script on a CPU")
    if not triton_here.INSTALLED:
        raise BenchmarkError("Triton is not installed (pip install triton)")
    if not triton_here.USABLE or (dry and not triton_here.INTERPRETED):
        raise BenchmarkError("a dry run needs TRITON_INTERPRET=1 in the environment before attnpatch is imported")
    prepare(settings, out)
    gpu_run = GpuRun(settings, out / f"gpu-{'dry' if dry else settings.device}.json", 60 * minutes, dry)
    gpu_run.results["measured"] = {
        "date": date.today().isoformat(),
        "dry_run": dry,
        "repeats": settings.repeats,
        **machine(),
        **versions((*LIBRARIES, "triton")),
    }
    if commit := code_commit():
        gpu_run.results["measured"]["commit"] = commit
    if not dry:
        _set_aside(gpu_run.path)
    failed = []
    for name, (stage, least) in STAGES.items():
        if gpu_run.left() < least and not dry:
            gpu_run.results[name] = {"left_out": f"{gpu_run.left():.0f} s of the budget were left; it takes {least}"}
            if name == "check":
                failed.append(name)
                gpu_run.unchecked = set().union(*KINDS.values())
            gpu_run.write()
            continue
        start = time.monotonic()
        try:
            stage(gpu_run)
        except Exception as error:
            # The stages after it are worth having, whatever it was: out of memory, a compiler's error, a wrong result.
            failed.append(name)
            if name == "check" and not gpu_run.unchecked:
                gpu_run.unchecked = set().union(*KINDS.values())
            gpu_run.results.setdefault(name, {})["failed"] = f"{type(error).__name__}: {error}"[:2000]
            settings.say(f"{name} failed: {error}\n{traceback.format_exc(limit=-4)}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        gpu_run.results.setdefault(name, {})["seconds"] = round(time.monotonic() - start, 1)
        gpu_run.write()
        settings.say(f"{name}: {gpu_run.results[name]['seconds']} s, {gpu_run.left():.0f} s left")
    return gpu_run.path, failed


def _set_aside(path: Path) -> None:
    """An earlier run's file under the first free name: a run that fails must not cost what another found."""
    if path.exists():
        names = (path.with_suffix(f".previous{f'-{n}' if n > 1 else ''}.json") for n in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def check(gpu_run: GpuRun) -> None:
    """Raises BenchmarkError for kernels that are wrong; what was found is in the results, whatever comes."""
    import torch

    from attnpatch.bench import gpu_checks

    device = gpu_run.settings.device
    found, compiled, wrong = gpu_checks.run(device, gpu_run.dry)
    gpu_run.results["check"] = {
        "cases": found,
        "compiled": compiled,
        "wrong": wrong,
    }
    gpu_run.unchecked = {kind for kind, lines in wrong.items() if lines}
    gpu_run.settings.say(f"{len(found)} cases checked, {sum(map(len, wrong.values()))} wrong")
    if gpu_run.unchecked:
        raise BenchmarkError("; ".join(line for lines in wrong.values() for line in lines))
    if torch.cuda.is_available():
        gpu_run.results["check"]["cuda_graph"] = gpu_checks.graph(device)


# --- measurements ------------------------------------------------------------------------------------------------


def _backends(device: str) -> dict[str, Any]:
    """SDPA's backends by name, apart from its own choice."""
    from torch.nn.attention import SDPBackend

    if device == "cpu":
        return {"flash": SDPBackend.FLASH_ATTENTION}
    names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    return {name: getattr(SDPBackend, value) for name, value in names.items()}


def operator(gpu_run: GpuRun) -> None:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import sdpa_kernel

    from attnpatch.bench import score

    device, dry = gpu_run.settings.device, gpu_run.dry
    # As many tokens times heads as keep a GPU busy for longer than it takes to start its kernels.
    lengths, tokens, dim = ((16,), 32, 16) if dry else ((512, 2048, 1024, 4096), 2**20, 64)
    table = gpu_run.results["operator"] = {"peer": "F.scaled_dot_product_attention", "head_dim": dim}
    rows: list[tuple[int, str, tuple[str, ...]]] = [(n, SINGLE if dry else "bfloat16", ()) for n in lengths]
    if not dry:
        rows.append((2048, "bfloat16", ("flex",)))
    for length, name, others in rows:
        if gpu_run.left() < 20 and not dry:
            table["left_out"] = f"from T = {length} {name} on: the budget was spent"
            return
        dtype = getattr(torch, name)
        tensors = score.inputs(length, dim, device, dtype, heads=max(2, tokens // length))
        grad = torch.randn_like(tensors[0])
        # The plain form's scores of long sequences fill the memory.
        chosen = others or (("auto", "plain") if length <= 1024 else ("auto",)) if not dry else ("triton", "plain")
        forms: dict[str, Any] = {"sdpa": score.form("expressive", "sdpa", False)}
        for backend, value in _backends(device).items():

            def only(q: Any, k: Any, v: Any, value: Any = value) -> Any:
                with sdpa_kernel(value):
                    return F.scaled_dot_product_attention(q, k, v)

            with contextlib.suppress(RuntimeError):  # a backend that does not take this dtype
                score.passes(only, tensors, grad)
                forms[f"sdpa {backend}"] = only
        # The dry run's stage before has checked them, in sizes that the interpreter can bear.
        error = None if dry else score.check("expressive", chosen[0], False, dim, device, dtype)
        forms |= {form: score.form("expressive", form, False) for form in chosen}
        row: dict[str, Any] = {"shape": list(tensors[0].shape), "relative_error": error}
        for what, given in (("forward", None), ("both", grad)):
            timed = score.compare(forms, tensors, given, device, gpu_run.settings.repeats)
            best = min(timed[form]["milliseconds"] for form in forms if form.startswith("sdpa"))
            for form, found in timed.items():
                row.setdefault(form, {})[what] = found | {"ratio_over_best": found["milliseconds"] / best}
        for form, attend in forms.items():
            row[form]["peak_bytes"] = peak_bytes(partial(score.passes, attend, tensors, grad), device)
        held = 4 * grad.numel() * grad.element_size()  # query, key, value and the output's gradient
        for form in forms:
            row[form]["memory"] = (row[form]["peak_bytes"] + held) / (row["sdpa"]["peak_bytes"] + held)
        label = f"{name}, T = {length}" + (f" ({', '.join(others)})" if others else "")
        table[label] = row
        shown = "  ".join(f"{what} {row[chosen[0]][what]['ratio_over_best']:.2f}" for what in ("forward", "both"))
        gpu_run.settings.say(f"{label}: {shown} over SDPA's best, memory {row[chosen[0]]['memory']:.2f}")
        gpu_run.write()


@contextlib.contextmanager
def _with_triton(gpu_run: GpuRun) -> Iterator[None]:
    """In a dry run the automatic choice on a CPU would not be the kernels that are tried."""
    from attnpatch.kernels import dispatch

    with dispatch.use_implementation("triton") if gpu_run.dry else contextlib.nullcontext():
        yield


def step_label(word: str, model: str, batch: int, tokens: int) -> str:
    """By which `attnpatch.bench.targets` finds a step."""
    return f"{word}, {model}, {batch} x {tokens} tokens"


def _step(
    gpu_run: GpuRun,
    stage: str,
    word: str,
    model: str,
    architecture: tuple[type, Any],
    spec: Any,
    batch: int,
    tokens: int,
) -> None:
    import torch

    from attnpatch.bench.steps import over_flops, step

    settings, label = gpu_run.settings, step_label(word, model, batch, tokens)
    stock = step(architecture, None, batch, tokens, settings.device, bf16=True)
    ours = step(architecture, spec, batch, tokens, settings.device, bf16=True)
    if not bool(ours().isfinite()):
        raise BenchmarkError(f"{label}: the loss is not finite; nothing was timed")
    stock()
    timed = compare(ours, stock, settings.repeats, settings.device)
    peaks = [peak_bytes(run, settings.device) for run in (ours, stock)]
    held = 0 if settings.device == "cpu" else torch.cuda.memory_allocated() / 2
    timed["memory"] = {"ratio": (peaks[0] + held) / (peaks[1] + held), "peak_bytes": peaks}
    if spec == "neural":
        timed |= over_flops(timed, ours.model, stock.model, batch, tokens)
    gpu_run.results.setdefault(stage, {})[label] = timed
    gpu_run.settings.say(f"{label}: {timed['ratio']['median']:.3f} times the stock step")
    gpu_run.write()


ROBERTA_BATCHES = (64, 16)
"""The first keeps an H200 busy; with the second starting kernels takes longer than they do."""


def roberta_base(gpu_run: GpuRun) -> None:
    from attnpatch.bench.steps import roberta

    layers, hidden, tokens = (1, 64, 16) if gpu_run.dry else (12, 768, 512)
    with _with_triton(gpu_run):
        for batch in (2,) if gpu_run.dry else ROBERTA_BATCHES:
            model = roberta(layers, hidden)
            _step(gpu_run, "roberta", "expressive", "RoBERTa-base", model, "expressive", batch, tokens)


def steps(gpu_run: GpuRun) -> None:
    from attnpatch.bench.steps import marian, roberta

    layers, hidden, batch, tokens = (1, 64, 2, 16) if gpu_run.dry else (12, 768, 256, 128)
    pairs = 2 if gpu_run.dry else 1024
    # What the stages after this one want.
    reserved = sum(STAGES[name][1] for name in list(STAGES)[list(STAGES).index("steps") + 1 :])
    specs: dict[str, Any] = {"neural": "neural"}
    alignment = {
        m: {"variant": "alignment", "options": {"alignment": {"method": m}}} for m in ("gan", "ct", "ot", "mmd")
    }
    specs |= {f"alignment {m}": alignment[m] for m in ("gan", "ct")} | {"query_value": "query_value"}
    specs["query gate"] = {"variant": "query_value", "options": {"query_value": {"gate": "query"}}}
    specs |= {"expressive": "expressive"} | {f"alignment {m}": alignment[m] for m in ("ot", "mmd")}
    for word, spec in itertools.islice(specs.items(), 2 if gpu_run.dry else None):
        for model, architecture, rows, length in (
            ("RoBERTa", roberta(layers, hidden), batch, tokens),
            ("Marian", marian(), pairs, 8 if gpu_run.dry else 32),
        ):
            if gpu_run.left() < 15 + reserved and not gpu_run.dry:
                gpu_run.results.setdefault("steps", {})["left_out"] = f"from {word}, {model} on: the budget was spent"
                return
            if not (gpu_run.dry and model == "Marian"):
                _step(gpu_run, "steps", word, model, architecture, spec, rows, length)


def selection(gpu_run: GpuRun) -> None:
    """Each selector by either form, which tells whether the fused one deserves to be what is taken."""
    from attnpatch.bench.steps import roberta, specs
    from attnpatch.kernels import dispatch

    layers, hidden, batch, tokens = (1, 64, 2, 40) if gpu_run.dry else (12, 768, 64, 512)
    model = roberta(layers, hidden)
    selectors = {word: spec for word, spec in specs().items() if word.startswith(("top_r", "value_aware"))}
    for word, spec in selectors.items():
        for form in ("triton", "plain"):
            if gpu_run.left() < 15 and not gpu_run.dry:
                gpu_run.results.setdefault("selection", {})["left_out"] = (
                    f"from {word}, {form} on: the budget was spent"
                )
                return
            with dispatch.use_implementation(form):
                _step(gpu_run, "selection", f"{word}, {form}", "RoBERTa", model, spec, batch, tokens)


def layer(gpu_run: GpuRun) -> None:
    import torch

    from attnpatch.bench.layer import ALLOWED, AttentionLayer

    settings, dry = gpu_run.settings, gpu_run.dry
    batch, tokens = (1, 16) if dry else (64, 512)
    exact = AttentionLayer("query_value", 1, tokens, settings.device)
    with _with_triton(gpu_run):
        error = exact.relative_error()
    if not error <= ALLOWED:
        raise BenchmarkError(f"query_value: relative error {error:.1e} > {ALLOWED:.0e}; nothing was timed")
    ours, stock = (
        AttentionLayer(spec, batch, tokens, settings.device, torch.bfloat16) for spec in ("query_value", None)
    )
    with _with_triton(gpu_run):
        timed = compare(ours.both, stock.both, settings.repeats, settings.device)
    label = f"query_value, {batch} x {tokens} tokens"
    gpu_run.results["layer"] = {label: timed | {"relative_error_float32": error}}
    settings.say(f"{label}: {timed['ratio']['median']:.2f} times the stock layer")


def solver(gpu_run: GpuRun) -> None:
    from attnpatch.bench import value_aware

    sizes = {"HEAD_DIM": 4, "KEYS": 16, "QUERIES": 4, "PEER_QUERIES": 4} if gpu_run.dry else {}
    before = {name: getattr(value_aware, name) for name in sizes}
    try:
        vars(value_aware).update(sizes)
        gpu_run.results["solver"] = value_aware.exact(gpu_run.settings)
    finally:
        vars(value_aware).update(before)


def marian_training(gpu_run: GpuRun) -> None:
    if gpu_run.dry:
        gpu_run.results["marian"] = {"left_out": "a dry run; `attnpatch bench training` does the same on a CPU"}
        return
    from attnpatch.bench import training

    once = Settings(1, gpu_run.settings.threads, gpu_run.settings.device, gpu_run.settings.data, gpu_run.settings.say)
    gpu_run.results["marian"] = training.train_and_decode(once)


def idle(gpu_run: GpuRun) -> None:
    from attnpatch.bench.toolkit import bench_idle

    settings = gpu_run.settings
    # Few: two processes that start CUDA are most of what a pair takes.
    found = bench_idle(settings, pairs=1 if gpu_run.dry else 3)
    gpu_run.results["idle"] = found
    settings.say(f"a stock step with attnpatch imported: {found['ratio']['median']:.3f} times that without")


KINDS = {
    "operator": {"score"},
    "roberta": {"score"},
    "steps": {"score", "query_value", "alignment"},
    "layer": {"query_value"},
    "selection": {"select"},
}
"""The kernels, as `attnpatch.bench.gpu_checks` names them, that a stage times."""

STAGES: dict[str, tuple[Callable[[GpuRun], None], int]] = {
    "check": (check, 60),
    "operator": (operator, 60),
    "roberta": (roberta_base, 40),
    "steps": (steps, 30),
    "layer": (layer, 10),
    "solver": (solver, 10),
    "marian": (marian_training, 85),
    "selection": (selection, 20),
    "idle": (idle, 30),
}
"""The stages, and the seconds below which one is not begun."""
