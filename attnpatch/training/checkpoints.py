"""Which checkpoints of a run are whole, which is the newest, and which weights the run ends with.

A checkpoint is whole once the file `complete.json` stands in it; it is written last and lists every file with its
size. Whatever a killed process left half-written has no such file, or one that does not fit, and is passed over.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnpatch.atomic import write_json
from attnpatch.errors import one_line
from attnpatch.training.errors import TrainingError
from attnpatch.training.files import read_json
from attnpatch.training.sharding import is_sharded, load_state

MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


def mark_complete(folder: str | Path, record: dict[str, Any]) -> None:
    """Declares a checkpoint whole and keeps `record` (times, tokens) with it. To be called after all its files."""
    folder = Path(folder)
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file() and p.name != MARKER}
    write_json(folder / MARKER, {"files": files, "record": record}, default=str)


def is_complete(folder: str | Path) -> bool:
    """Whether every file that the marker lists is there in its full size."""
    folder = Path(folder)
    try:
        files = read_json(folder / MARKER)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return False


def check_readable(folder: Path) -> None:
    """Raises TrainingError when a file of weights in a checkpoint is damaged, though it has its size."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise TrainingError(
                f"{file} is damaged ({one_line(error, 200)}): delete {folder}, and the same command goes on from the "
                "checkpoint before it"
            ) from error


def read_record(folder: str | Path) -> dict[str, Any]:
    """What `mark_complete` was given."""
    return dict(read_json(Path(folder) / MARKER)["record"])


def step_of(folder: str | Path) -> int:
    """The optimiser step in a checkpoint folder's name."""
    match = _NAME.search(Path(folder).name)
    if match is None:
        raise TrainingError(f"{folder} is not a checkpoint folder: its name should be checkpoint-STEP")
    return int(match.group(1))


def checkpoints(run: str | Path) -> list[Path]:
    """All checkpoint folders of a run, whole or not, oldest first."""
    run = Path(run)
    if not run.is_dir():
        return []
    return sorted((p for p in run.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), key=step_of)


def last_complete(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    whole = [p for p in checkpoints(run) if is_complete(p)]
    return whole[-1] if whole else None


def rotate(run: str | Path, keep: int, best: str | Path | None) -> None:
    """Deletes whole checkpoints beyond the newest `keep`, but never the best one."""
    whole = [p for p in checkpoints(run) if is_complete(p)]
    for folder in whole[:-keep]:
        if best is None or folder.resolve() != Path(best).resolve():
            (folder / MARKER).unlink()  # first: a half-deleted checkpoint must not look whole
            shutil.rmtree(folder)


def load_weights(model: torch.nn.Module, folders: Sequence[str | Path]) -> None:
    """Puts the weights of a checkpoint, or the mean of several, into `model`, which may be sharded (FSDP2)."""
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        # from_pretrained rather than the raw file: it ties, converts and refuses missing weights as a user's load does.
        state = _whole_class(model).from_pretrained(str(folder), dtype=torch.float32).state_dict()
        for name, value in state.items():
            if not value.is_floating_point() or len(folders) == 1:
                total[name] = value
            else:
                total[name] = total[name] + value.double() if name in total else value.double()
    own = model.state_dict()
    if total.keys() != own.keys():
        odd = sorted(total.keys() ^ own.keys())
        raise TrainingError(f"the checkpoint {folders[-1]} does not fit the model: {', '.join(odd[:5])}")
    if len(folders) > 1:
        total = {name: value / len(folders) if value.is_floating_point() else value for name, value in total.items()}
    load_state(model, total)


def _whole_class(model: torch.nn.Module) -> Any:
    """The model's class; FSDP2 puts one of its own before it."""
    return type(model).__mro__[2] if is_sharded(model) else type(model)
