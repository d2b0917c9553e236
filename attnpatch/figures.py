"""Figures as files: PNG and SVG, the same bytes for the same numbers, drawn without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = ("#4d4d4d", "#2f6db3", "#c8553d", "#4f9d69", "#8a5fb0", "#d19a2a", "#3aa6a6", "#b04f79")
"""Of the variants, in their order; the first is for the stock attention."""
MARKERS = "osD^vP*X"


def pyplot() -> Any:
    """matplotlib's pyplot, set up for files."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text in an SVG, and its ids do not change from one run to the next.
    matplotlib.rcParams.update({"svg.hashsalt": "attnpatch", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, stem: Path) -> list[Path]:
    """Writes STEM.png and STEM.svg and closes the figure."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")]
    settings: tuple[dict[str, Any], ...] = ({"dpi": 150}, {"metadata": {"Date": None}})
    for path, extra in zip(paths, settings, strict=True):
        aside = path.with_name(f".{path.name}")
        figure.savefig(aside, format=path.suffix[1:], **extra)
        aside.replace(path)
    pyplot().close(figure)
    return paths


def plain(axes: Any) -> Any:
    """Takes the frame's upper and right side away."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes
