"""Text files as every experiment reads them, and what is said of those that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnpatch.errors import nearest
from attnpatch.training.errors import DataError


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without their ends. Raises DataError naming the first line that is not UTF-8."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With a byte order mark, the positions in the error are those after it.
        start = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        line = raw.count(b"\n", 0, start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[start]:02x}); convert the file to UTF-8 first"
        ) from error
    # Not splitlines(): it also breaks at U+2028 and form feeds, which stand inside sentences of web text.
    lines = text.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def missing_file(folder: str, message: str, path: Path, about: str, present: Sequence[Path] = ()) -> str:
    """A sentence on a data file that is not there: what is missing, the nearest name, where to get it.

    Args:
        folder: data.dir. message: what is missing. path: the file. about: the page or command that provides the data.
        present: files that belong to it and are there, so that none of them is meant.
    """
    if not Path(folder).is_dir():
        message = f"the data folder {folder!r} does not exist: {message}"
    elif path.parent.is_dir():
        guess = nearest(path.name, [other.name for other in path.parent.iterdir() if other not in present])
        message += f"; did you mean {guess!r}?" if guess else ""
    message += "" if message.endswith("?") else "."
    message += " Set the folder with data.dir=PATH or the environment variable ATTNPATCH_DATA"
    return message + (f". What provides it: {' '.join(about.split())}" if about else "")


def refuse_doubles(key: str, names: Sequence[str]) -> None:
    """Raises DataError when two test sets have one name: one's scores and files would take the other's place."""
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise DataError(
            f"{key} has two entries called {doubles[0]!r}, which could not be told apart in the results: name each "
            "once, and give the files names of their own"
        )
