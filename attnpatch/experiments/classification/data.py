"""Labelled sentences and pairs of sentences: GLUE's files, parquet, the hub, and AdvGLUE's dev set."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnpatch.errors import one_line
from attnpatch.experiments.classification.tasks import Layout, Task
from attnpatch.training.data_files import missing_file, read_lines
from attnpatch.training.errors import DataError
from attnpatch.training.files import sha256_file, sha256_lines

SAMPLE_SEED = 1
"""Of the draws that all runs share, whatever their own seed: a part of the training set, the examples of the MMD."""


@dataclass
class Examples:
    """Labelled texts; `places[i]` is (index into `files`, number from 1 of the line or row) of example i."""

    name: str
    unit: str = "line"  # what `places` count
    texts: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)  # path, sha256, text_sha256, examples

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, rows: Iterable[int]) -> str:
        """Where examples stand, in words: their files and the numbers of their lines."""
        numbers: dict[int, list[int]] = {}
        for row in rows:
            file, number = self.places[row]
            numbers.setdefault(file, []).append(number)
        return "; ".join(
            f"{'/'.join(Path(str(self.files[file]['path'])).parts[-2:])} {self.unit}{'s' if len(found) > 1 else ''} "
            f"{', '.join(map(str, sorted(found)))}"
            for file, found in sorted(numbers.items())
        )

    def subset(self, count: int | None) -> Examples:
        """`count` examples drawn without regard to the run's seed, in their old order; all for None."""
        if count is None or count >= len(self):
            return self
        rows = sample(len(self), count)
        part = Examples(self.name, self.unit, files=[dict(file) for file in self.files])
        part.texts = [self.texts[row] for row in rows]
        part.labels = [self.labels[row] for row in rows]
        part.places = [self.places[row] for row in rows]
        _seal(part)
        return part


def sample(size: int, count: int) -> list[int]:
    """`count` of `size` rows (all where there are fewer), in order, the same in every run."""
    return sorted(random.Random(SAMPLE_SEED).sample(range(size), min(count, size)))


def _seal(examples: Examples) -> None:
    """Notes the number and checksum of the examples of each file."""
    for number, file in enumerate(examples.files):
        rows = [row for row, (where, _) in enumerate(examples.places) if where == number]
        lines = ["\t".join([repr(examples.labels[row]), *examples.texts[row]]) for row in rows]
        file |= {"text_sha256": sha256_lines(lines), "examples": len(rows)}


def load_files(task: Task, folder: str, entries: Sequence[str], name: str, about: str = "") -> Examples:
    """The examples of tab-separated and parquet files, in their order.

    Raises DataError for a missing file, a malformed line, an empty text or a label that the task does not have; it
    names the file and the line.
    """
    examples = Examples(name)
    for entry in entries:
        path = Path(folder) / entry
        if not path.is_file():
            raise DataError(missing_file(folder, f"no file {Path(folder) / entry}", Path(folder) / entry, about))
        number = len(examples.files)
        examples.files.append({"path": str(path), "sha256": sha256_file(path)})
        rows = _parquet_rows(path, task.hub) if path.suffix == ".parquet" else _tsv_rows(path, task)
        for line, label, texts in rows:
            _add(examples, task, number, line, label, texts, f"{path}, line {line}")
    _seal(examples)
    _refuse_empty(examples)
    return examples


def load_hub(task: Task, hub_id: str, hub_config: str, revision: str | None, split: str) -> Examples:
    """A split of a hub data set, or of a folder laid out as one (CONFIG/SPLIT-*.parquet). Raises DataError."""
    import datasets

    name = f"{hub_id}:{hub_config}:{split}"
    kwargs: dict[str, Any] = {"split": split}
    if Path(hub_id).is_dir():
        kwargs["data_files"] = {split: f"{hub_config}/{split}-*.parquet"}
    else:
        kwargs |= {"name": hub_config, "revision": revision}
    try:
        data = datasets.load_dataset(hub_id, **kwargs)
    except Exception as error:  # of any library underneath
        raise DataError(
            f"cannot read the split {split!r} of the data set {hub_id} ({hub_config}): {one_line(error, 300)}; without "
            "a network, use GLUE's files: data.hub_id=null data.dir=PATH"
        ) from error
    missing = [str(column) for column in task.hub.columns if column not in data.column_names]
    if missing:
        raise DataError(f"{name}: no column {', '.join(missing)}; it has {', '.join(data.column_names)}")
    examples = Examples(name, "row", files=[{"path": name, "revision": revision}])
    for number, row in enumerate(data, 1):
        _add_row(examples, task, number, row, f"{name}, row {number}")
    _seal(examples)
    _refuse_empty(examples)
    return examples


def load_adversarial(task: Task, path: Path, about: str = "") -> Examples:
    """The task's part of AdvGLUE's dev.json: {task: [{text columns, label}, ...]}. Raises DataError."""
    if not path.is_file():
        raise DataError(
            missing_file(str(path.parent), f"no file {path}", path, about)
            + "; or leave it out with data.adversarial=null"
        )
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({one_line(error)})") from error
    if not isinstance(parts, dict) or not isinstance(parts.get(str(task.adversarial)), list):
        has = f"it has {', '.join(parts)}" if isinstance(parts, dict) else f"it holds a {type(parts).__name__}"
        raise DataError(f"{path}: no list under the key {task.adversarial!r}; {has}")
    examples = Examples("AdvGLUE", "row", files=[{"path": str(path), "sha256": sha256_file(path)}])
    for number, row in enumerate(parts[str(task.adversarial)], 1):
        _add_row(examples, task, number, row, f"{path}, {task.adversarial} row {number}")
    _seal(examples)
    _refuse_empty(examples)
    return examples


# ---- rows ----


def _tsv_rows(path: Path, task: Task) -> Iterable[tuple[int, Any, list[Any]]]:
    """Line number, label and texts of each line. No quoting, as GLUE has it: a quote is text."""
    lines = read_lines(path)
    layout, columns = _layout_of(path, task, lines[0].split("\t") if lines else [])
    first = 1 if layout.has_header else 0
    for number, line in enumerate(lines[first:], first + 1):
        cells = line.split("\t")
        if len(cells) <= max(columns):
            raise DataError(
                f"{path}, line {number}: {len(cells)} column(s), but column {max(columns) + 1} is needed "
                f"(label in column {columns[0] + 1}, text in {', '.join(str(c + 1) for c in columns[1:])})"
            )
        yield number, cells[columns[0]], [cells[column] for column in columns[1:]]


def _layout_of(path: Path, task: Task, header: list[str]) -> tuple[Layout, list[int]]:
    """The layout that fits a file's first line, and the numbers of its columns."""
    names = [name.strip() for name in header]
    for layout in task.layouts:
        if layout.has_header and all(column in names for column in layout.columns):
            return layout, [names.index(str(column)) for column in layout.columns]
    for layout in task.layouts:
        if not layout.has_header:
            return layout, [int(column) for column in layout.columns]
    wanted = " or ".join(", ".join(map(str, layout.columns)) for layout in task.layouts)
    raise DataError(
        f"{path}, line 1: a file of {task.name} starts with the names of its columns, {wanted} among them; this one "
        f"has {', '.join(names)[:200] or 'nothing'}"
    )


def _parquet_rows(path: Path, layout: Layout) -> Iterable[tuple[int, Any, list[Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {one_line(error, 200)}") from error
    missing = [str(column) for column in layout.columns if column not in table.column_names]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
    for number, row in enumerate(table.select([str(column) for column in layout.columns]).to_pylist(), 1):
        yield number, row[str(layout.label)], [row[str(column)] for column in layout.texts]


def _add_row(examples: Examples, task: Task, number: int, row: Any, where: str) -> None:
    wanted = [str(column) for column in task.hub.columns]
    if not isinstance(row, Mapping) or any(column not in row for column in wanted):
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise DataError(f"{where}: needs {', '.join(wanted)}; it has {has}")
    _add(examples, task, 0, number, row[wanted[0]], [row[column] for column in wanted[1:]], where)


def _add(examples: Examples, task: Task, file: int, number: int, label: Any, texts: Sequence[Any], where: str) -> None:
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: a text is {'empty' if isinstance(text, str) else type(text).__name__}")
    examples.texts.append(tuple(text.strip() for text in texts))
    examples.labels.append(_label(task, label, where))
    examples.places.append((file, number))


def _label(task: Task, label: Any, where: str) -> float:
    if not task.is_regression and str(label).strip() in task.labels:
        return task.labels.index(str(label).strip())
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if task.span is not None:
        low, high = task.span
        if low <= value <= high:
            return value
        raise DataError(f"{where}: the score {label!r} is not a number from {low:g} to {high:g}")
    if value in range(len(task.labels)):
        return int(value)
    known = ", ".join(f"{i} ({name})" for i, name in enumerate(task.labels))
    hint = "; GLUE's test sets have no labels: score its dev set" if value == -1 else ""
    raise DataError(f"{where}: unknown label {label!r}; labels of {task.name}: {known}{hint}")


def _refuse_empty(examples: Examples) -> None:
    for file in examples.files:
        if not file["examples"]:
            raise DataError(f"{file['path']}: no examples in it")
