"""The packages of the `train` extra, which the training scripts need and the rest of attnpatch does not."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from attnpatch.training.errors import TrainingError

TRAINING = ("accelerate", "datasets", "evaluate", "sacrebleu", "sentencepiece")
DRAWING = (*TRAINING, "matplotlib")
CLASSIFYING = (*DRAWING, "scipy", "sklearn")
REPORT = ("matplotlib", "scipy")


def require(packages: Sequence[str]) -> None:
    """Stops before the work starts, and not when the first of them is imported in the middle of it.

    Raises:
        TrainingError: some are not installed; names them, and the extra that brings them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise TrainingError(f"not installed: {', '.join(missing)}; pip install 'attnpatch[train]' brings what it needs")
