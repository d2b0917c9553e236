"""What a GPU run is for, in order of importance and within a budget: the kernels checked, then timed.

check     every form of the Triton kernels against the plain form in float64, output and gradients
operator  expressive attention, D = 64, over F.scaled_dot_product_attention and its best backend; plain, FlexAttention
roberta   a RoBERTa-base training step at T = 512 in bf16, expressive over stock: time and memory
steps     a training step of neural, alignment and query_value models over stock
layer     the query_value attention layer at T = 512 in bf16 over the stock one, forward and backward, after its fused
          sum was checked in float32, output and gradients
solver    the exact value-aware solver over scipy's non-negative least squares
marian    Marian training and decoding over transformers' own loops

Each stage writes its results before the next starts. One that fails is written down with its error, and one that the
budget leaves no time for with that reason. A dry run takes the same way with tiny shapes on a CPU, the kernels in
Triton's interpreter: it shows that the script works, and its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from attnpatch.bench.timing import BenchmarkError, Settings, compare, peak_bytes

HALF, SINGLE = ("bfloat16", "float16"), "float32"
CASES = ("none", "causal", "padding", "range", "rows", "dropout")


@dataclass
class GpuRun:
    """What is measured with, how long it may take, and the file that grows; `unchecked` when the kernels were not found
    right, which every stage after the check is then marked with."""

    settings: Settings
    path: Path
    seconds: float
    dry: bool
    unchecked: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def write(self) -> None:
        from attnpatch.atomic import write_json

        if self.unchecked:
            for name in STAGES:
                if name != "check" and name in self.results:
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
    from attnpatch.kernels import dispatch

    if not dry and not torch.cuda.is_available():
        raise BenchmarkError("there is no CUDA device here; --dry-run tries the script on a CPU")
    if dispatch.score_triton is None and importlib.util.find_spec("triton") is None:
        raise BenchmarkError("Triton is not installed (pip install triton)")
    if dispatch.score_triton is None or (dry and not os.environ.get("TRITON_INTERPRET")):
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
                gpu_run.unchecked = True
            gpu_run.write()
            continue
        start = time.monotonic()
        try:
            stage(gpu_run)
        except Exception as error:
            # The stages after it are worth having, whatever it was: out of memory, a compiler's error, a wrong result.
            failed.append(name)
            gpu_run.unchecked |= name == "check"
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


# --- check ------------------------------------------------------------------------------------------------------


def cases(dry: bool) -> list[tuple[str, int, int, str, str]]:
    """(kernel, degree, D, dtype, case): everything for D = 64, and what a head size may break for the others."""
    if dry:
        return [("expressive", 2, 16, SINGLE, case) for case in CASES] + [("elu", 2, 20, "bfloat16", "rows")]
    found = [("expressive", 2, 64, dtype, case) for dtype in (*HALF, SINGLE) for case in CASES]
    found += [("expressive", 2, dim, dtype, "rows") for dim in (32, 80, 96, 128) for dtype in (*HALF, SINGLE)]
    found += [("expressive", 2, dim, "bfloat16", "dropout") for dim in (32, 80, 96, 128)]
    others = (("polynomial", 2), ("polynomial", 4), ("elu", 2))
    found += [(*kernel, 64, dtype, "rows") for kernel in others for dtype in ("bfloat16", SINGLE)]
    return found


def check_case(case: tuple[str, int, int, str, str], device: str, dry: bool) -> dict[str, Any]:
    """Relative errors (norms) of output, dq, dk and dv; block sizes are not tuned, which would take minutes."""
    import torch

    from attnpatch.kernels import score

    kernel, degree, dim, name, kind = case
    dtype = getattr(torch, name)
    torch.manual_seed(zlib.crc32(repr(case).encode()))  # hash() differs from process to process
    n_queries, n_keys = ((20, 20) if dry else (333, 333)) if kind == "causal" else ((20, 35) if dry else (333, 517))
    heads = 1 if dry else 3
    q, k, v, g = (torch.randn(2, heads, n, dim, device=device) for n in (n_queries, n_keys, n_keys, n_queries))
    # Scores of both signs, away from 0: f'/f is unbounded there, and magnifies rounding where few keys are visible.
    q, k = q.abs() + 0.5, (k.abs() + 0.5) * torch.randn(n_keys, 1, device=device).sign()
    # Heads beside features in memory, as models have them.
    q, k, v, g = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, g))
    mask, p = None, 0.3 if kind == "dropout" else 0.0
    if kind == "padding":
        mask = torch.rand(2, 1, 1, n_keys, device=device) < 0.6
    if kind == "range":
        mask = (torch.arange(n_keys, device=device) < torch.tensor([[n_keys // 3], [n_keys - 7]], device=device))[
            :, None, None
        ]
    if kind == "rows":
        mask = torch.rand(2, heads, n_queries, n_keys, device=device) < 0.5
        mask[0, :, 0] = False
    arguments: dict[str, Any] = {
        "is_causal": kind == "causal",
        "scale": 1.0 / dim,
        "kernel": kernel,
        "degree": degree,
    }
    if p:
        # With the unit matrix for values the output is the weights, which shows what was dropped.
        seen = torch.eye(dim, device=device, dtype=dtype).expand(2, heads, -1, -1)
        k, v = k[:, :, :dim], v[:, :, :dim]
        torch.manual_seed(5)
        shown = score.kernel_attention(q, k, seen, None, p, implementation="triton", **arguments)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(5)
    output = score.kernel_attention(leaves[0], leaves[1], leaves[2], mask, p, implementation="triton", **arguments)
    found = (output, *torch.autograd.grad(output, leaves, g))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    if p:
        weights = score.attention_weights(exact[0], exact[1], **arguments) * (shown != 0) / (1.0 - p)
        kept = float((shown != 0).double().mean())
        if not abs(kept - (1.0 - p)) < 0.02 + 2 * dry:
            raise BenchmarkError(f"{case}: {kept:.3f} of the weights are kept, not {1.0 - p}")
        wanted = weights @ exact[2]
    else:
        wanted = score.kernel_attention(exact[0], exact[1], exact[2], mask, implementation="plain", **arguments)
    expected = (wanted, *torch.autograd.grad(wanted, exact, g.double()))
    errors = {
        what: float(((a.double() - b).norm() / b.norm()).detach())
        for what, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True)
    }
    return {"case": " ".join(map(str, case)), **errors}


def _checked(work: tuple[Any, ...]) -> dict[str, Any]:
    """In a process of its own: a check, or the compilation of one set of block sizes for what is timed later."""
    kind, case, device, dry = work
    os.environ["ATTNPATCH_TUNE"] = "0"
    try:
        if kind == "check":
            return check_case(case, device, dry)
        return _compile(case, device)
    except Exception as error:
        return {"case": " ".join(map(str, case)), "error": f"{type(error).__name__}: {error}"[:600]}


def _compile(case: tuple[Any, ...], device: str) -> dict[str, Any]:
    import torch

    from attnpatch.kernels import dispatch, score

    sizes, dtype, masked, dropout_p = case
    q, k, v = (torch.randn(1, 2, 256, 64, device=device, dtype=getattr(torch, dtype)) for _ in range(3))
    for x in (q, k, v):
        x.requires_grad_()
    mask = torch.ones(1, 1, 256, 256, device=device, dtype=torch.bool) if masked else None
    with dispatch.score_triton.fixed_sizes(sizes):
        output = score.expressive_attention(q, k, v, mask, dropout_p)
        torch.autograd.grad(output.sum(), (q, k, v))
    return {"case": " ".join(map(str, case)), "compiled": True}


def check(gpu_run: GpuRun) -> None:
    import torch

    from attnpatch.environment import available_cpus
    from attnpatch.kernels import dispatch

    device, dry = gpu_run.settings.device, gpu_run.dry
    work: list[tuple[Any, ...]] = [("check", case, device, dry) for case in cases(dry)]
    if dry:
        done = [_untuned(item) for item in work]
    else:
        ways = (("bfloat16", False, 0.0), ("bfloat16", True, 0.1))
        work += [("compile", (s, *w), device, dry) for w in ways for s in dispatch.score_triton.all_sizes()]
        # Most of the time is the compiler's, which takes one core a process; what it makes stays in Triton's cache.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(12, available_cpus()), mp_context=spawn) as pool:
            done = list(pool.map(_checked, work))
    results = dict(zip([item[1] for item in work], done, strict=True))
    wrong = []
    for case, found in results.items():
        if "error" in found:
            # Block sizes that do not fit the device are no error: tuning passes over them.
            wrong += [f"{found['case']}: {found['error']}"] if len(case) == 5 else []
        elif "compiled" not in found:
            allowed = 1e-5 if case[3] == SINGLE else 1e-2
            off = {what: found[what] for what in ("output", "dq", "dk", "dv") if not found[what] <= allowed}
            if off:
                wrong.append(f"{found['case']}: " + ", ".join(f"{w} {e:.1e} > {allowed:.0e}" for w, e in off.items()))
    gpu_run.results["check"] = {"cases": list(results.values()), "wrong": wrong}
    gpu_run.settings.say(f"{len(results)} cases checked, {len(wrong)} wrong")
    if wrong:
        raise BenchmarkError("; ".join(wrong))
    if torch.cuda.is_available():
        gpu_run.results["check"]["cuda_graph"] = _graph(device)


def _untuned(work: tuple[Any, ...]) -> dict[str, Any]:
    with _without_tuning():
        return _checked(work)


@contextlib.contextmanager
def _without_tuning() -> Iterator[None]:
    before = os.environ.get("ATTNPATCH_TUNE")
    os.environ["ATTNPATCH_TUNE"] = "0"
    try:
        yield
    finally:
        os.environ.pop("ATTNPATCH_TUNE") if before is None else os.environ.__setitem__("ATTNPATCH_TUNE", before)


def _graph(device: str) -> str:
    """Captured in a CUDA graph, with dropout: each replay drops other weights."""
    import torch

    from attnpatch.functional import expressive_attention

    x = torch.randn(1, 2, 256, 64, device=device, dtype=torch.bfloat16)
    expressive_attention(x, x, x, None, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = expressive_attention(x, x, x, None, 0.5)
    graph.replay()
    first = output.clone()
    graph.replay()
    if not bool(first.isfinite().all()) or torch.equal(first, output):
        raise BenchmarkError("two replays of a CUDA graph drop the same weights, or are not finite")
    return "captured; replays drop different weights"


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
    flex = [] if dry else [(2048, "bfloat16", ("flex",))]
    rows = [(n, dtype, ()) for dtype in (("bfloat16", SINGLE) if not dry else (SINGLE,)) for n in lengths]
    for length, name, others in (*rows, *flex):
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


def _step(gpu_run: GpuRun, label: str, architecture: tuple[type, Any], spec: Any, batch: int, tokens: int) -> None:
    import torch

    from attnpatch.bench.steps import over_flops, step

    settings = gpu_run.settings
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
    gpu_run.results.setdefault("roberta" if "base" in label else "steps", {})[label] = timed
    gpu_run.settings.say(f"{label}: {timed['ratio']['median']:.3f} times the stock step")
    gpu_run.write()


def roberta_base(gpu_run: GpuRun) -> None:
    from attnpatch.bench.steps import roberta

    layers, hidden, tokens = (1, 64, 16) if gpu_run.dry else (12, 768, 512)
    with _with_triton(gpu_run):
        for name, batch in (
            (("expressive", 2),) if gpu_run.dry else (("expressive", 64), ("expressive", 16), ("polynomial", 64))
        ):
            label = f"{name}, RoBERTa-base, {batch} x {tokens} tokens"
            _step(gpu_run, label, roberta(layers, hidden), name, batch, tokens)


def steps(gpu_run: GpuRun) -> None:
    from attnpatch.bench.steps import marian, roberta

    layers, hidden, batch, tokens = (1, 64, 2, 16) if gpu_run.dry else (12, 768, 256, 128)
    pairs = 2 if gpu_run.dry else 1024
    specs: list[Any] = [
        "neural",
        *({"variant": "alignment", "options": {"alignment": {"method": m}}} for m in ("gan", "ct", "ot", "mmd")),
        "query_value",
        {"variant": "query_value", "options": {"query_value": {"gate": "query"}}},
        "expressive",
    ]
    words = ["neural", "alignment gan", "alignment ct", "alignment ot", "alignment mmd", "query_value", "query gate"]
    for word, spec in itertools.islice(zip((*words, "expressive"), specs, strict=True), 2 if gpu_run.dry else None):
        for model, architecture, rows, length in (
            ("RoBERTa", roberta(layers, hidden), batch, tokens),
            ("Marian", marian(), pairs, 8 if gpu_run.dry else 32),
        ):
            if gpu_run.left() < 15 and not gpu_run.dry:
                gpu_run.results.setdefault("steps", {})["left_out"] = f"from {word}, {model} on: the budget was spent"
                return
            if not (gpu_run.dry and model == "Marian"):
                _step(gpu_run, f"{word}, {model}, {rows} x {length} tokens", architecture, spec, rows, length)


def _pairwise_errors(phi: str, sizes: tuple[int, int, int, int], device: str) -> dict[str, float]:
    """Relative errors (norms) of the pairwise query_value form, output and gradients, against itself in float64.

    `sizes` are heads, queries, keys and head size.
    """
    import torch

    from attnpatch.kernels.query_value import pairwise_aggregate

    torch.manual_seed(0)
    heads, n_queries, n_keys, dim = sizes
    shapes: dict[str, tuple[int, ...]] = {"query": (2, heads, n_queries, dim)}
    shapes |= {"weights": (2, heads, n_queries, n_keys)}
    shapes |= {"value": (2, heads, n_keys, dim), "gate_query": (heads, dim, dim), "gate_value": (heads, dim, dim)}
    shapes |= {"gate_bias": (heads, dim), "strength": (heads,)}
    if phi == "tanh":
        shapes |= {"phi_query": (heads, dim, dim), "phi_value": (heads, dim, dim), "phi_bias": (heads, dim)}
    inputs = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    inputs = {name: x / dim**0.5 if x.shape[1:] == (dim, dim) else x for name, x in inputs.items()}
    inputs["weights"] = inputs["weights"].softmax(-1)
    found = []
    for exact in (False, True):
        leaves = {name: (x.double() if exact else x).requires_grad_() for name, x in inputs.items()}
        arguments: dict[str, Any] = {**leaves, "phi": phi}
        out = pairwise_aggregate(**arguments)
        grad = torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype, device=device).view_as(out)
        found.append((out, *torch.autograd.grad(out, list(leaves.values()), grad)))
    pairs = zip(("output", *inputs), *found, strict=True)
    return {name: float(((a.double() - b).norm() / b.norm()).detach()) for name, a, b in pairs}


def layer(gpu_run: GpuRun) -> None:
    import torch

    from attnpatch.bench.layer import ALLOWED, AttentionLayer

    settings, dry = gpu_run.settings, gpu_run.dry
    batch, tokens = (1, 16) if dry else (16, 512)
    with _with_triton(gpu_run), _without_tuning():
        sizes = [(1, 5, 7, 8)] if dry else [(3, 333, 517, 64), (3, 65, 33, 80), (2, 1, 40, 128)]
        errors = {f"{phi} {s}": _pairwise_errors(phi, s, settings.device) for phi in ("product", "tanh") for s in sizes}
    gpu_run.results["layer"] = {"fused": errors}
    if off := {name: found for name, found in errors.items() if not all(x <= 1e-4 for x in found.values())}:
        raise BenchmarkError(f"query_value, fused: relative errors {off}; nothing was timed")
    exact = AttentionLayer("query_value", 1, tokens, settings.device)
    if not (error := exact.relative_error()) <= ALLOWED:
        raise BenchmarkError(f"query_value: relative error {error:.1e} > {ALLOWED:.0e}; nothing was timed")
    ours, stock = (
        AttentionLayer(spec, batch, tokens, settings.device, torch.bfloat16) for spec in ("query_value", None)
    )
    timed = compare(ours.both, stock.both, settings.repeats, settings.device)
    gpu_run.results["layer"][f"query_value, T = {tokens}"] = timed | {"relative_error_float32": error}
    settings.say(f"query_value layer, T = {tokens}: {timed['ratio']['median']:.2f} times the stock layer")


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


STAGES: dict[str, tuple[Callable[[GpuRun], None], int]] = {
    "check": (check, 60),
    "operator": (operator, 60),
    "roberta": (roberta_base, 40),
    "steps": (steps, 30),
    "layer": (layer, 40),
    "solver": (solver, 20),
    "marian": (marian_training, 90),
}
"""The stages, and the seconds below which one is not begun."""
