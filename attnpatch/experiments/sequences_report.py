"""The NT tasks' results as a figure and a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnpatch import figures
from attnpatch.experiments.sequence_tasks import label
from attnpatch.spec import AttentionSpec


def draw(results: Mapping[str, Any], stem: Path) -> list[Path]:
    """STEM.png and .svg: a heat map for each spec, side by side; means over seeds."""
    plt = figures.pyplot()
    records = results["cells"]
    rows, columns = _axes(records)
    names = results["specs"]
    figure, panels = plt.subplots(
        1,
        len(names),
        figsize=(1.6 + len(names) * max(0.75 * len(columns), 2.2), 1.6 + 0.55 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    image = None
    for panel, name in zip(panels[0], names, strict=True):
        grid = [[math.nan] * len(columns) for _ in rows]
        for i, bases in enumerate(rows):
            for j, delays in enumerate(columns):
                found = _accuracies(records, name, bases, delays)
                if not found:
                    continue
                grid[i][j] = statistics.fmean(found)
                text = f"{grid[i][j]:.2f}" + (f"\n\u00b1{statistics.stdev(found):.2f}" if len(found) > 1 else "")
                dark = grid[i][j] < 0.6
                panel.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        counts = sorted({r["parameters"]["trainable"] for r in records if _name(r) == name})
        span = f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")
        panel.set_title(f"{'softmax (stock)' if name == 'stock' else name}\n{span} parameters", fontsize=9)
        panel.set_xticks(range(len(columns)), [label(delays) for delays in columns])
        panel.set_yticks(range(len(rows)), [label(bases) for bases in rows])
        panel.set_xlabel("delay tau")
    panels[0][0].set_ylabel("base N")
    figure.colorbar(image, ax=panels[0].tolist(), label="next-symbol accuracy")
    return figures.save(figure, stem)


def table(results: Mapping[str, Any]) -> list[str]:
    """The grid as lines of Markdown: a row for each base and delay, accuracies as means over seeds."""
    records, names = results["cells"], results["specs"]
    rows, columns = _axes(records)
    lines = [
        f"| base N | delay tau | chance | {' | '.join(names)} |",
        "| --- " * 2 + "| ---: " * (1 + len(names)) + "|",
    ]
    for bases in rows:
        for delays in columns:
            found = [_accuracies(records, name, bases, delays) for name in names]
            if not any(found):
                continue
            means = [f"{statistics.fmean(values):.3f}" if values else "-" for values in found]
            chance = next(r["chance"] for r in records if (tuple(r["bases"]), tuple(r["delays"])) == (bases, delays))
            lines.append(f"| {label(bases)} | {label(delays)} | {chance:.3f} | {' | '.join(means)} |")
    return lines


Numbers = tuple[int, ...]


def _axes(records: Sequence[Mapping[str, Any]]) -> tuple[list[Numbers], list[Numbers]]:
    """The bases and the delays of a grid, in its order."""
    rows = list(dict.fromkeys(tuple(record["bases"]) for record in records))
    return rows, list(dict.fromkeys(tuple(record["delays"]) for record in records))


def _name(record: Mapping[str, Any]) -> str:
    return "stock" if record["spec"] == "stock" else str(AttentionSpec.from_dict(record["spec"]))


def _accuracies(
    records: Sequence[Mapping[str, Any]], name: str, bases: tuple[int, ...], delays: tuple[int, ...]
) -> list[float]:
    return [
        record["accuracy"]
        for record in records
        if _name(record) == name and tuple(record["bases"]) == bases and tuple(record["delays"]) == delays
    ]
