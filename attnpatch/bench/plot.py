"""All measured ratios in one figure: a dot for the median, a line for the spread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def ratios(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Every summary (median, min, max) under a key "ratio" or "time_ratio", with the names that lead there."""
    for key, value in tree.items():
        if not isinstance(value, Mapping):
            continue
        if "median" in value:
            if not {"ratio", "time_ratio"}.isdisjoint((*path, key)):
                yield ", ".join(part for part in (*path, key) if part not in ("ratio", "time_ratio", "variants")), value
        else:
            yield from ratios(value, (*path, key))


def draw(folder: Path, device: str) -> list[Path]:
    """Write ratios-DEVICE.png and .svg beside the results in `folder`; nothing without ratios to show.

    Raises:
        BenchmarkError: a file is no JSON.
    """
    from attnpatch.bench.tables import load
    from attnpatch.figures import plain, pyplot, save

    groups = {name: found for name, tree in load(folder, device).items() if (found := list(ratios(tree)))}
    if not groups:
        return []
    plt = pyplot()
    count = sum(len(rows) + 1 for rows in groups.values())
    figure, axes = plt.subplots(figsize=(9, 0.22 * count + 1))
    labels: list[str] = []
    for name, rows in groups.items():
        labels.append(name)
        for label, value in rows:
            at = len(labels)
            axes.plot([value["min"], value["max"]], [at, at], color="#9db8d9", linewidth=3, solid_capstyle="round")
            axes.plot(value["median"], at, "o", color="#2f6db3", markersize=4)
            labels.append(f"{label}  {value['median']:.2f}")
    axes.axvline(1.0, color="#4d4d4d", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time over the peer's (median, min to max)")
    figure.tight_layout()
    return save(plain(axes).figure, folder / f"ratios-{device}")
