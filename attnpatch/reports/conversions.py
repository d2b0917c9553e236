"""What conversion does to a pretrained checkpoint, as a figure and a table: results of check_pretrained_bert.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnpatch import figures

HEADINGS = (
    "variant",
    "keeps the function",
    "drift max",
    "drift mean",
    "parameters added",
    "verify",
    "revert bit-identical",
    "Spearman",
)
_UNSEEN = 1e-8
"""A drift of 0 has no place on a logarithmic axis: it is drawn here."""


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: the source, then a row for each variant."""
    lines = [f"| {' | '.join(HEADINGS)} |", "| --- | --- | ---: | ---: | ---: | --- | --- | ---: |"]
    return [*lines, *(f"| {' | '.join(_cells(row))} |" for row in rows), ""]


def _cells(row: Mapping[str, Any]) -> list[str]:
    spearman = f"{row['spearman']:.6f}" if "spearman" in row else "-"
    if "exact" not in row:
        return [row["variant"], *["-"] * 6, spearman]
    reverted = {True: "yes", False: "**no**", None: "not recoverable"}[row["revert_bit_identical"]]
    return [
        row["variant"],
        "yes" if row["exact"] else "no",
        f"{row['drift_max']:.1e}",
        f"{row['drift_mean']:.1e}",
        f"{row['parameters_added']:,}",
        "pass" if row["verify_passed"] else "**fail**",
        reverted,
        spearman,
    ]


def draw(rows: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
    """STEM.png and .svg: the drift of each conversion, logarithmic; those that claim to keep the function in blue."""
    figure, axes = figures.pyplot().subplots(figsize=(7.2, 4.2), layout="constrained")
    shown = [row for row in rows if "exact" in row]
    for place, row in enumerate(shown):
        color = figures.COLORS[1 if row["exact"] else 2]
        for key, marker in (("drift_mean", "o"), ("drift_max", "v")):
            axes.plot(max(row[key], _UNSEEN), place, marker=marker, color=color, linestyle="none")
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [row["variant"] for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"drift of the last hidden states: mean (o), max (v); 0 is drawn at {_UNSEEN:.0e}")
    axes.set_title("blue: the conversion keeps the function; red: it changes it by design", fontsize=9)
    figures.plain(axes)
    return figures.save(figure, stem)
