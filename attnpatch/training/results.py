"""What a run leaves behind in results.json, so that its numbers can be read and compared later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attnpatch.atomic import write_json


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Numbers of parameters; tied ones count once, fixed position embeddings are not trainable."""
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def write_results(folder: str | Path, results: dict[str, Any]) -> Path:
    """Writes results.json, aside and renamed."""
    path = Path(folder) / "results.json"
    write_json(path, results, default=str)
    return path
