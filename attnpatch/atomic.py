"""Files and folders written whole or not at all: aside, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnpatch.errors import CheckpointError


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8 beside `path`, then renames: a reader sees the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` beside `path`, then renames."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Writes `value` as readable JSON, as transformers does; `default` turns what JSON has no form for into what it
    has, and without it that is a TypeError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=default) + "\n")


@contextmanager
def writing_aside(target: str | Path, needed: int = 0) -> Iterator[Path]:
    """A new folder beside `target` that takes its place at the end of the block, or vanishes after an exception.

    Args:
        target: what it holds is removed, but only after the new one stands (`checkpoint_files.check_target` guards
            what is a user's).
        needed: bytes that will be written; too little space stops here.

    Raises:
        CheckpointError: no space, or the place cannot be written.
    """
    target = Path(os.path.abspath(target))
    if target.is_symlink():
        target = target.resolve()
    parent = target.parent
    made = _missing_parents(parent)
    aside: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise CheckpointError(f"no space for {target}: it needs {_size(needed)}, and {_size(free)} are free there")
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.attnpatch-", dir=parent))
        yield aside
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o777 & ~umask)
        _put_in_place(aside, target)
    except BaseException as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        for folder in made:
            _remove_if_empty(folder)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"no space left while writing {target}; nothing was left behind. Free some space first"
            ) from error
        raise


def _put_in_place(aside: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        if target.exists():
            target.rmdir()
        aside.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    old.rmdir()
    target.rename(old)
    try:
        aside.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _missing_parents(folder: Path) -> list[Path]:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
