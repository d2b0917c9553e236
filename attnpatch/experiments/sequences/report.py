"""The NT tasks' results as a figure and a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnpatch import figures
from attnpatch.experiments.sequences.grid import label
from attnpatch.spec import AttentionSpec

Numbers = tuple[int, ...]
Grids = Mapping[str, Sequence[Mapping[str, Any]]]
"""By what a spec is to be called: its cells, of all seeds, as they stand in results.json."""


def by_spec(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The cells of one results.json as `Grids`, in their order."""
    grids: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        name = "stock" if cell["spec"] == "stock" else str(AttentionSpec.from_dict(cell["spec"]))
        grids.setdefault(name, []).append(cell)
    return grids


def draw(grids: Grids, stem: Path) -> list[Path]:
    """STEM.png and .svg: a heat map for each spec, side by side; means over seeds."""
    plt = figures.pyplot()
    rows, columns = _axes(grids)
    figure, panels = plt.subplots(
        1,
        len(grids),
        figsize=(1.6 + len(grids) * max(0.75 * len(columns), 2.2), 1.6 + 0.55 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    image = None
    for panel, (name, cells) in zip(panels[0], grids.items(), strict=True):
        grid = [[math.nan] * len(columns) for _ in rows]
        for i, bases in enumerate(rows):
            for j, delays in enumerate(columns):
                found = _accuracies(cells, bases, delays)
                if not found:
                    continue
                grid[i][j] = statistics.fmean(found)
                text = f"{grid[i][j]:.2f}" + (f"\n\u00b1{statistics.stdev(found):.2f}" if len(found) > 1 else "")
                dark = grid[i][j] < 0.6
                panel.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        counts = sorted({cell["parameters"]["trainable"] for cell in cells})
        span = f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")
        panel.set_title(f"{'softmax (stock)' if name == 'stock' else name}\n{span} parameters", fontsize=9)
        panel.set_xticks(range(len(columns)), [label(delays) for delays in columns])
        panel.set_yticks(range(len(rows)), [label(bases) for bases in rows])
        panel.set_xlabel("delay tau")
    panels[0][0].set_ylabel("base N")
    figure.colorbar(image, ax=panels[0].tolist(), label="next-symbol accuracy")
    return figures.save(figure, stem)


def table(grids: Grids) -> list[str]:
    """Lines of Markdown: a row for each base and delay, accuracies as means over seeds, with their number."""
    rows, columns = _axes(grids)
    seeds = [len({cell["seed"] for cell in cells}) for cells in grids.values()]
    names = [f"{name} (n = {count})" for name, count in zip(grids, seeds, strict=True)]
    lines = [f"| base N | delay tau | chance | {' | '.join(names)} |", "| ---: " * (3 + len(names)) + "|"]
    chances = {_place(cell): cell["chance"] for cells in grids.values() for cell in cells}
    for bases in rows:
        for delays in columns:
            found = [_accuracies(cells, bases, delays) for cells in grids.values()]
            if any(found):
                means = [f"{statistics.fmean(values):.3f}" if values else "-" for values in found]
                start = f"| {label(bases)} | {label(delays)} | {chances[bases, delays]:.3f} |"
                lines.append(f"{start} {' | '.join(means)} |")
    return [*lines, ""]


def _axes(grids: Grids) -> tuple[list[Numbers], list[Numbers]]:
    """The bases and the delays, in the order of the cells."""
    places = [_place(cell) for cells in grids.values() for cell in cells]
    return list(dict.fromkeys(bases for bases, _ in places)), list(dict.fromkeys(delays for _, delays in places))


def _place(cell: Mapping[str, Any]) -> tuple[Numbers, Numbers]:
    return tuple(cell["bases"]), tuple(cell["delays"])


def _accuracies(cells: Sequence[Mapping[str, Any]], bases: Numbers, delays: Numbers) -> list[float]:
    return [cell["accuracy"] for cell in cells if _place(cell) == (bases, delays)]
