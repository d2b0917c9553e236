"""Readers of parallel text: two aligned files, TSV, JSONL, and the XML and tagged files of the IWSLT campaigns.

Each gives lists of sentences and where each came from, so that an error can name the file and the line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from attnpatch.training.data_files import read_lines
from attnpatch.training.errors import DataError


@dataclass
class Side:
    """Sentences of one language; `lines[i]` is the line number (from 1) of `sentences[i]` in `path`."""

    path: Path
    sentences: list[str]
    lines: list[int]


def read_text(path: Path) -> Side:
    """One sentence a line."""
    sentences = [line.strip() for line in read_lines(path)]
    return Side(path, sentences, list(range(1, len(sentences) + 1)))


def read_tagged(path: Path) -> Side:
    """IWSLT training files (train.tags.*): the lines that do not start with a tag."""
    kept = [(i, line.strip()) for i, line in enumerate(read_lines(path), 1) if not line.lstrip().startswith("<")]
    return Side(path, [line for _, line in kept], [i for i, _ in kept])


def read_iwslt_xml(path: Path) -> Side:
    """IWSLT evaluation files: the text of each <seg>, in order."""
    lines = read_lines(path)
    text = "\n".join(lines)
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise DataError(f"{path}, line {error.position[0]}: not valid XML ({error.msg})") from error
    sentences = [" ".join("".join(seg.itertext()).split()) for seg in root.iter("seg")]
    if not sentences:
        raise DataError(f"{path}: no <seg> element in it, so not an IWSLT evaluation file")
    # The parser does not keep positions; a <seg cannot stand in text (it would be &lt;), so count the tags.
    starts = [text.count("\n", 0, match.start()) + 1 for match in re.finditer(r"<seg[\s>]", text)]
    if len(starts) != len(sentences):  # comments or CDATA: no line numbers then, but the right sentences
        starts = [0] * len(sentences)
    return Side(path, sentences, starts)


def read_tsv(path: Path, source: int | str, target: int | str, header: bool) -> tuple[Side, Side]:
    """Two columns (numbers from 0, or names when `header`) of a tab-separated file. No quoting: a quote is text."""
    lines = read_lines(path)
    first = 1
    columns: list[str] = []
    if header:
        if not lines:
            raise DataError(f"{path}: empty, although it should start with a line of column names")
        columns = [name.strip() for name in lines[0].split("\t")]
        lines, first = lines[1:], 2
    indices = []
    for column in (source, target):
        if isinstance(column, str):
            if not header:
                raise DataError(f"{path}: column {column!r} is a name, but data.header is false; give a number from 0")
            if column not in columns:
                raise DataError(f"{path}: no column {column!r}; it has {', '.join(columns)}")
            indices.append(columns.index(column))
        else:
            indices.append(column)
    needed = max(indices) + 1
    sides: tuple[list[str], list[str]] = ([], [])
    for number, line in enumerate(lines, first):
        cells = line.split("\t")
        if len(cells) < needed:
            raise DataError(
                f"{path}, line {number}: {len(cells)} column(s), but column {needed - 1} (from 0) is needed"
            )
        for side, index in zip(sides, indices, strict=True):
            side.append(cells[index].strip())
    numbers = list(range(first, first + len(lines)))
    return Side(path, sides[0], numbers), Side(path, sides[1], list(numbers))


def read_jsonl(path: Path, source: str, target: str) -> tuple[Side, Side]:
    """One JSON object a line with the keys `source` and `target`, at the top or under "translation"."""
    sides: tuple[list[str], list[str]] = ([], [])
    numbers = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            raise DataError(f"{path}, line {number}: empty; each line must hold a JSON object")
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
        if isinstance(row, dict) and isinstance(row.get("translation"), dict):
            row = row["translation"]
        for side, key in zip(sides, (source, target), strict=True):
            if not isinstance(row, dict) or key not in row:
                has = f"it has {', '.join(map(str, row))}" if isinstance(row, dict) else "it is not an object"
                raise DataError(f"{path}, line {number}: no key {key!r}; {has}")
            if not isinstance(row[key], str):
                raise DataError(f"{path}, line {number}: the value of {key!r} is {type(row[key]).__name__}, not text")
            side.append(" ".join(row[key].split("\n")).strip())
        numbers.append(number)
    return Side(path, sides[0], numbers), Side(path, sides[1], list(numbers))
