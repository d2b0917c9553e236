"""The results of the value-aware sweep as a figure and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnpatch import figures
from attnpatch.spec import AttentionSpec

LABELS = {"top_r": "top-r (OVO)", "norm": "weight x norm", "centered": "weight x distance", "oracle": "oracle (OVA)"}


def draw(models: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
    """STEM.png and .svg: for each model a column, perplexity above and output error below, against r."""
    plt = figures.pyplot()
    figure, panels = plt.subplots(
        2, len(models), figsize=(3.2 * len(models) + 1, 6), layout="constrained", squeeze=False, sharex="col"
    )
    for column, model in enumerate(models):
        for key, axes in zip(("perplexity", "output_error"), panels[:, column], strict=True):
            for i, method in enumerate(dict.fromkeys(row["method"] for row in model["rows"])):
                rows = [row for row in model["rows"] if row["method"] == method]
                axes.plot(
                    [row["r"] for row in rows],
                    [row[key] for row in rows],
                    color=figures.COLORS[(i + 1) % len(figures.COLORS)],
                    marker=figures.MARKERS[i % len(figures.MARKERS)],
                    markersize=4,
                    label=LABELS[method],
                )
            figures.plain(axes).set_xscale("log", base=2)
            ticks = sorted({row["r"] for row in model["rows"]})
            axes.set_xticks(ticks, [str(r) for r in ticks], fontsize=7)
        upper, lower = panels[:, column]
        upper.axhline(model["exact"]["perplexity"], color="black", linestyle=":", label="exact attention")
        upper.set_yscale("log")
        upper.set_title(f"{title(model)}\nD = {model['head_dim']}", fontsize=9)
        lower.set_xlabel("keys kept, r")
    panels[0][0].set_ylabel("perplexity")
    panels[1][0].set_ylabel("output error ||o - o~|| / ||o||")
    panels[0][0].legend(frameon=False, fontsize=8)
    return figures.save(figure, stem)


def title(model: Mapping[str, Any]) -> str:
    """What was evaluated: its attention, the objective, the seed."""
    words = [variant(model), model["objective"]]
    if model.get("seed") is not None:
        words.append(f"seed {model['seed']}")
    return ", ".join(words)


def variant(model: Mapping[str, Any]) -> str:
    """Its attention in words: the spec that it was trained with, and the kernel, if that was exchanged."""
    spec = model.get("spec", "stock" if model["kernel_trained"] == "softmax" else model["kernel_trained"])
    trained = "softmax" if spec == "stock" else str(AttentionSpec.parse(spec))
    if model["kernel"] == model["kernel_trained"]:
        return trained
    return f"{model['kernel']} in place of softmax" + ("" if trained == "softmax" else f" in {trained}")


def tables(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """`table` of each."""
    return [line for model in models for line in table(model)]


def table(model: Mapping[str, Any]) -> list[str]:
    """One model's sweep as lines of Markdown: perplexity and output error of each method against r."""
    kept = sorted({row["r"] for row in model["rows"]})
    lines = [
        f"{title(model)}: exact perplexity {model['exact']['perplexity']:.4g} over "
        f"{model['exact']['predicted_tokens']:,} tokens, D = {model['head_dim']}",
        "",
        f"| | method | {' | '.join(f'r = {r}' for r in kept)} |",
        "| --- | --- " + "| ---: " * len(kept) + "|",
    ]
    for key, shown in (("perplexity", "perplexity"), ("output_error", "output error")):
        for method in dict.fromkeys(row["method"] for row in model["rows"]):
            values = {row["r"]: row[key] for row in model["rows"] if row["method"] == method}
            cells = [_number(key, values[r]) if r in values else "-" for r in kept]
            lines.append(f"| {shown} | {LABELS[method]} | {' | '.join(cells)} |")
    return [*lines, ""]


def _number(key: str, value: float) -> str:
    if key == "perplexity":
        return f"{value:.4g}"
    return f"{value:.3f}" if value >= 5e-4 else f"{value:.1g}"
