"""GLUE's metrics (scikit-learn, scipy), the expected calibration error, and reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnpatch import figures
from attnpatch.experiments.classification.tasks import Task
from attnpatch.training.errors import TrainingError

BINS = 10


def scores(task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics, the loss that is trained (mean), and for classes the ECE.

    Args:
        outputs: logits [N, C], or ratings [N, 1] of a regression.
        labels: [N].
    Raises TrainingError when a correlation is not defined, as all ratings are equal.
    """
    found: dict[str, float] = {}
    if task.is_regression:
        from scipy.stats import pearsonr, spearmanr

        ratings = outputs[:, 0].astype(np.float64)
        found["loss"] = float(np.mean((ratings - labels) ** 2))
        if np.ptp(ratings) == 0 or np.ptp(labels) == 0:
            raise TrainingError(
                f"all {'ratings' if np.ptp(ratings) == 0 else 'labels'} of {len(labels)} examples are equal, so the "
                "correlation is not defined: train longer, or with a lower learning rate"
            )
        measures = {"pearson": pearsonr, "spearman": spearmanr}
        return found | {name: float(measures[name](ratings, labels).statistic) for name in task.metrics}

    from scipy.special import log_softmax
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    classes = labels.astype(np.int64)
    chosen = outputs.argmax(axis=1)
    log_probabilities = log_softmax(outputs.astype(np.float64), axis=1)
    found["loss"] = float(-log_probabilities[np.arange(len(classes)), classes].mean())
    measured = {
        "accuracy": lambda: accuracy_score(classes, chosen),
        "f1": lambda: f1_score(classes, chosen, zero_division=0.0),  # of class 1, as GLUE has it
        "matthews": lambda: matthews_corrcoef(classes, chosen),
    }
    found |= {name: float(measured[name]()) for name in task.metrics}
    found["ece"] = calibration_error(reliability(probabilities(outputs), classes))
    return found


def probabilities(outputs: np.ndarray) -> np.ndarray:
    """Of each class, from logits [N, C]."""
    from scipy.special import softmax

    found: np.ndarray = softmax(outputs.astype(np.float64), axis=1)
    return found


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """Predictions by confidence, the largest probability, in bins of equal width (low, high].

    Args:
        probabilities: [N, C]. labels: [N].
    Returns:
        For each bin low, high, count, and the means accuracy and confidence (None where it is empty).
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, bins + 1)
    which = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, bins - 1)
    rows = []
    for i in range(bins):
        inside = which == i
        count = int(inside.sum())
        rows.append(
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "count": count,
                "accuracy": float(right[inside].mean()) if count else None,
                "confidence": float(confidence[inside].mean()) if count else None,
            }
        )
    return rows


def calibration_error(rows: Sequence[Mapping[str, Any]]) -> float:
    """Expected calibration error (Guo et al. 2017): the mean |accuracy - confidence|, bins weighted by their counts."""
    total = sum(row["count"] for row in rows)
    return sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows if row["count"]) / total


def pooled(diagrams: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One diagram of several over the same bins, of different seeds for instance."""
    rows = []
    for bins in zip(*diagrams, strict=True):
        count = sum(row["count"] for row in bins)
        row = {"low": bins[0]["low"], "high": bins[0]["high"], "count": count}
        for key in ("accuracy", "confidence"):
            row[key] = sum(b["count"] * b[key] for b in bins if b["count"]) / count if count else None
        rows.append(row)
    return rows


def draw_reliability(diagrams: Mapping[str, Sequence[Mapping[str, Any]]], stem: Path, title: str) -> list[Path]:
    """STEM.png and .svg: accuracy against confidence for each named diagram, and how many predictions each bin has."""
    plt = figures.pyplot()
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(4.8, 5.6), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    upper.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="calibrated")
    for i, (name, rows) in enumerate(diagrams.items()):
        color, marker = figures.COLORS[i % len(figures.COLORS)], figures.MARKERS[i % len(figures.MARKERS)]
        filled = [row for row in rows if row["count"]]
        total = sum(row["count"] for row in filled)
        upper.plot(
            [row["confidence"] for row in filled],
            [row["accuracy"] for row in filled],
            color=color,
            marker=marker,
            markersize=4,
            label=f"{name} (ECE {calibration_error(rows):.3f})",
        )
        edges = [row["low"] for row in rows] + [rows[-1]["high"]]
        lower.stairs([row["count"] / total for row in rows], edges, color=color)
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1.02)
    upper.set_title(title, fontsize=10)
    lower.set_ylabel("share")
    lower.set_xlabel("confidence")
    figures.plain(upper).legend(frameon=False, fontsize=8)
    figures.plain(lower)
    return figures.save(figure, stem)
