"""Plain text for language models: lines of local text or parquet files, or of a hub data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnpatch.errors import one_line
from attnpatch.experiments.language_models.config import TextConfig
from attnpatch.training.data_files import missing_file, read_lines, refuse_doubles
from attnpatch.training.errors import DataError
from attnpatch.training.files import sha256_file, sha256_lines


@dataclass
class LineText:
    """Lines that are not blank, as they stand in their file, each with the number that it has there.

    `places[i]` is (index into `files`, line number from 1) of `lines[i]`.
    """

    name: str
    lines: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)  # path, sha256, text_sha256, lines

    def __len__(self) -> int:
        return len(self.lines)

    def span(self, first: int, last: int) -> str:
        """Where lines first..last stand, in words."""
        (a, start), (b, end) = self.places[first], self.places[last]
        name = Path(str(self.files[a]["path"])).name
        if a != b:
            return f"{name} line {start} to {Path(str(self.files[b]['path'])).name} line {end}"
        return f"{name} line {start}" if start == end else f"{name} lines {start}-{end}"


def load_text(config: TextConfig, split: str) -> list[LineText]:
    """Reads the entries of `config.<split>` (train, dev or test), one LineText each.

    Raises DataError for what is missing, is not UTF-8, lacks the column or holds no text.
    """
    entries = getattr(config, split)
    if not entries and split == "train":
        raise DataError("data.train is empty: name at least one training text")
    limit = getattr(config, f"max_{split}_lines")
    load = _load_entry if config.hub_id is None else _load_hub
    texts = [load(config, entry, limit) for entry in entries]
    if split == "test":
        refuse_doubles("data.test", [text.name for text in texts])
    for text in texts:
        if not len(text):
            raise DataError(f"{text.name}: no text in it, only blank lines")
    return texts


def merge_text(texts: Sequence[LineText], name: str) -> LineText:
    """One text of several."""
    merged = LineText(name)
    for text in texts:
        offset = len(merged.files)
        merged.lines += text.lines
        merged.places += [(number + offset, line) for number, line in text.places]
        merged.files += text.files
    return merged


def _collect(name: str, path: str, rows: Iterable[str], limit: int | None, record: dict[str, Any]) -> LineText:
    """Keeps what is not blank. A row may end with its line break, as the hub's WikiText does."""
    text = LineText(name)
    lines = (line for row in rows for line in row.removesuffix("\n").split("\n"))
    for number, line in enumerate(lines, 1):
        if line and not line.isspace():
            text.lines.append(line)
            text.places.append((0, number))
            if limit is not None and len(text.lines) == limit:
                break
    text.files = [{"path": path} | record | {"text_sha256": sha256_lines(text.lines), "lines": len(text)}]
    return text


def _load_entry(config: TextConfig, entry: str, limit: int | None) -> LineText:
    path = Path(config.dir) / entry
    if path.is_dir():
        parts = sorted(path.glob("*.parquet")) or sorted(p for p in path.iterdir() if p.is_file())
        if not parts:
            raise DataError(f"the folder {path} is empty: it should hold text or parquet files")
        texts = [_load_file(config, part.name, part, limit) for part in parts]
        merged = merge_text(texts, entry)
        if limit is not None:
            merged.lines, merged.places = merged.lines[:limit], merged.places[:limit]
        return merged
    if not path.is_file():
        raise DataError(missing_file(config.dir, f"no file {path} (data entry {entry!r})", path, config.about))
    return _load_file(config, entry, path, limit)


def _load_file(config: TextConfig, name: str, path: Path, limit: int | None) -> LineText:
    rows: Iterable[str] = _parquet_rows(path, config.column) if path.suffix == ".parquet" else read_lines(path)
    return _collect(name, str(path), rows, limit, {"sha256": sha256_file(path)})


def _parquet_rows(path: Path, column: str) -> Iterable[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(f"{path}: no column {column!r}; it has {', '.join(names)}. Choose with data.column=NAME")
    rows = (row for batch in file.iter_batches(columns=[column]) for row in batch.column(0).to_pylist())
    for number, row in enumerate(rows, 1):
        if not isinstance(row, str):
            raise DataError(f"{path}, row {number}: column {column!r} holds {type(row).__name__}, not text")
        yield row


def _load_hub(config: TextConfig, split: str, limit: int | None) -> LineText:
    import datasets

    hub_id = str(config.hub_id)
    name = f"{hub_id}:{config.hub_config or 'default'}:{split}"
    kwargs: dict[str, Any] = {"split": split, "streaming": config.streaming}
    if Path(hub_id).is_dir():
        folder = f"{config.hub_config}/" if config.hub_config else ""
        kwargs["data_files"] = {split: f"{folder}{split}-*.parquet"}
    else:
        kwargs |= {"name": config.hub_config, "revision": config.hub_revision}
    try:
        data = datasets.load_dataset(hub_id, **kwargs)
        first = next(iter(data), None)
    except Exception as error:
        reason = one_line(error, 300)
        raise DataError(
            f"cannot read the split {split!r} of the data set {hub_id} ({config.hub_config or 'default'}): {reason}; "
            "without a network, use a local copy: data.hub_id=null with data.dir, data.train, data.dev and data.test"
        ) from error
    if first is not None and config.column not in first:
        raise DataError(f"{name}: no column {config.column!r}; it has {', '.join(first)}. Choose with data.column=NAME")
    rows = (row[config.column] for row in data)
    return _collect(name, name, rows, limit, {"revision": config.hub_revision})
