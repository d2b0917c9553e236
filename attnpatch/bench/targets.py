"""What the benchmarks aim at, and whether it was reached: one list, and the results held against it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""{benchmark: {part: its results}}, as in NAME-DEVICE.json."""


@dataclass(frozen=True)
class Target:
    """A ratio that should be reached.

    Attributes:
        name, peer: what is measured, and against what.
        part: of a benchmark, such as "score.operator".
        where: a regular expression for each key that leads from the part's results to the summary (or the number).
            Of several that match, the worst counts.
        unit: what the ratio is of. cpu, cuda: the range to be in, None for no bound; None for no aim: a report.
        rate: the results hold times over the peer's, the aim is on the peer's over ours.
        gpu_run: as `where`, from the results of `attnpatch bench-gpu`, which count on a GPU where there are any.
    """

    name: str
    peer: str
    part: str
    where: tuple[str, ...]
    unit: str = "time"
    cpu: tuple[float | None, float | None] | None = None
    cuda: tuple[float | None, float | None] | None = None
    rate: bool = False
    gpu_run: tuple[str, ...] = ()

    def aim(self, device: str) -> tuple[float | None, float | None] | None:
        return self.cpu if device == "cpu" else self.cuda


def _most(limit: float) -> tuple[None, float]:
    return None, limit


def _least(limit: float) -> tuple[float, None]:
    return limit, None


_SDPA = "F.scaled_dot_product_attention"
_LONG = r"expressive \w+, T = (512|1024|2048|4096)"
_BF16 = r"bfloat16, T = \d+"
_LOOP = "transformers' example loop, fp32"
_FILE_ORDER = "generate in file order"

TARGETS = (
    Target(
        "expressive attention, T >= 512, forward",
        _SDPA,
        "score.operator",
        (_LONG, "auto", "forward", "ratio"),
        cpu=_most(1.2),
        cuda=_most(1.0),
        gpu_run=("operator", _BF16, "auto", "forward", "ratio_over_best"),
    ),
    Target(
        "expressive attention, T >= 512, forward + backward",
        _SDPA,
        "score.operator",
        (_LONG, "auto", "both", "ratio"),
        cpu=_most(1.5),
        cuda=_most(1.0),
        gpu_run=("operator", _BF16, "auto", "both", "ratio_over_best"),
    ),
    Target(
        "expressive attention, T >= 512, inputs and outputs included",
        _SDPA,
        "score.operator",
        (_LONG, "auto", "memory"),
        unit="peak memory",
        cpu=_most(1.1),
        cuda=_most(1.05),
        gpu_run=("operator", _BF16, "auto", "memory"),
    ),
    Target(
        "expressive training step, RoBERTa T = 512",
        "the stock step",
        "toolkit.step",
        ("RoBERTa, T = 512", "variants", "expressive", "ratio"),
        cpu=_most(1.15),
        cuda=_most(1.05),
        gpu_run=("roberta", "expressive, RoBERTa-base, 64 x 512 tokens", "ratio"),
    ),
    Target(
        "neural training step, over the ratio of the FLOPs",
        "the stock step",
        "neural.step",
        (".*", "time_ratio_over_flops_ratio"),
        cpu=_most(1.05),
        cuda=_most(1.10),
        gpu_run=("steps", "neural, .*", "time_ratio_over_flops_ratio"),
    ),
    Target(
        "alignment (gan) training step, T = 128",
        "the stock step",
        "alignment.step",
        ("gan float32", "ratio"),
        cpu=_most(1.10),
        cuda=_most(1.10),
        gpu_run=("steps", "alignment gan, RoBERTa, .*", "ratio"),
    ),
    Target(
        "alignment (ct) training step, T = 128",
        "the stock step",
        "alignment.step",
        ("ct float32", "ratio"),
        cpu=_most(1.15),
        cuda=_most(1.15),
        gpu_run=("steps", "alignment ct, RoBERTa, .*", "ratio"),
    ),
    Target(
        "query_value layer, T = 512, forward + backward",
        "the stock layer (SDPA)",
        "layer.attention",
        ("query_value", "both, T = 512", "ratio"),
        cuda=_most(2.5),
        gpu_run=("layer", "query_value, .*", "ratio"),
    ),
    Target(
        "value_aware exact optimum, r = D + 1",
        "a loop of scipy.optimize.nnls",
        "value_aware.exact",
        ("sharpness .*", "ratio"),
        unit="queries/s",
        cpu=_least(20.0),
        cuda=_least(1000.0),
        rate=True,
        gpu_run=("solver", "sharpness .*", "ratio"),
    ),
    Target(
        "Marian training",
        _LOOP,
        "training.marian",
        ("training", "ratio", "example, fp32"),
        unit="target tokens/s",
        cpu=_least(1.5),
        cuda=_least(2.0),
        rate=True,
        gpu_run=("marian", "training", "ratio", "example, fp32"),
    ),
    Target(
        "Marian decoding",
        _FILE_ORDER,
        "training.marian",
        ("decoding", "ratio", "generate in file order, .*"),
        unit="sentences/s",
        cpu=_least(1.5),
        cuda=_least(2.0),
        rate=True,
        gpu_run=("marian", "decoding", "ratio", "generate in file order, .*"),
    ),
    Target(
        "a stock model's step with attnpatch imported",
        "without the import",
        "toolkit.idle",
        ("ratio",),
        cpu=(0.98, 1.02),
        cuda=(0.98, 1.02),
        gpu_run=("idle", "ratio"),
    ),
)


def found(tree: Any, where: tuple[str, ...], path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, float]]]:
    """(label, summary) of every place in `tree` that the expressions lead to; the label has the keys that they left
    open. A plain number is a summary of itself."""
    if not where:
        if isinstance(tree, Mapping) and "median" in tree:
            yield ", ".join(path), dict(tree)
        elif isinstance(tree, int | float):
            yield ", ".join(path), {"median": tree, "min": tree, "max": tree, "n": 1}
        return
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        if re.fullmatch(where[0], key):
            yield from found(value, where[1:], (*path, *([key] if key != where[0] else [])))


def inverse(summary: Mapping[str, float]) -> dict[str, float]:
    """Of the peer's over ours: the slowest of ours is the fewest times the peer's rate."""
    return {**summary, "median": 1 / summary["median"], "min": 1 / summary["max"], "max": 1 / summary["min"]}


def summarise(results: Results, device: str, gpu_run: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """A row for each target: what was measured (None where nothing was), the aim, and whether the median reaches it
    (None without either).

    Args:
        gpu_run: what `attnpatch bench-gpu` found; it counts before `results`, but for stages whose kernels are
            unchecked.
    """
    rows = []
    if gpu_run is not None:
        gpu_run = {stage: found for stage, found in gpu_run.items() if not found.get("unchecked")}
    for target in TARGETS:
        aim = target.aim(device)
        row: dict[str, Any] = {
            "target": target.name,
            "peer": target.peer,
            "unit": target.unit,
            "rate": target.rate,
            "aim": list(aim) if aim else None,
        }
        benchmark, part = target.part.split(".")
        cases = list(found(gpu_run, target.gpu_run)) if gpu_run and target.gpu_run else []
        cases = cases or list(found(results.get(benchmark, {}).get(part, {}), target.where))
        if cases:
            cases = [(label, inverse(value) if target.rate else value) for label, value in cases]
            label, worst = (min if target.rate else max)(cases, key=lambda case: case[1]["median"])
            low, high = aim or (None, None)
            median = worst["median"]
            reached = (low is None or median >= low) and (high is None or median <= high)
            row |= {"measured": worst, "case": label, "reached": reached if aim else None}
        else:
            row |= {"measured": None, "case": "", "reached": None}
        rows.append(row)
    return rows


def aim_text(aim: Any) -> str:
    low, high = aim or (None, None)
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    if high is not None:
        return f"<= {high:g}"
    return f">= {low:g}" if low is not None else "none"
