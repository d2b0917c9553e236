"""What a classifier says of each example, for tests between runs and for looking at its errors. No text is in it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from attnpatch.atomic import write_text
from attnpatch.experiments.classification.data import Examples
from attnpatch.experiments.classification.metrics import probabilities
from attnpatch.experiments.classification.tasks import Task


def write_predictions(path: Path, task: Task, examples: Examples, outputs: np.ndarray) -> Path:
    """A TSV with a line for each example: file, line, label, prediction, and each class's probability.

    Args:
        outputs: logits [N, C], or ratings [N, 1] of a regression, whose rows have no probabilities.
    """
    lines = io.StringIO()
    table = csv.writer(lines, delimiter="\t", lineterminator="\n")
    names = [] if task.is_regression else [f"p({name})" for name in task.labels]
    table.writerow(["file", "line", "label", "prediction", *names])
    shares = probabilities(outputs) if names else np.empty((len(outputs), 0))
    for (file, line), label, output, share in zip(examples.places, examples.labels, outputs, shares, strict=True):
        found = f"{output[0]:.6f}" if task.is_regression else task.labels[int(output.argmax())]
        given = label if task.is_regression else task.labels[int(label)]
        place = Path(str(examples.files[file]["path"])).name
        table.writerow([place, line, given, found, *(f"{value:.6f}" for value in share)])
    write_text(path, lines.getvalue())
    return path
