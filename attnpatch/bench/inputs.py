"""What is checked before anything is measured, so that minutes of measuring are not lost to a wrong word."""

from __future__ import annotations

import os
from pathlib import Path

from attnpatch.bench.timing import BenchmarkError, Settings

SPLITS = ("train", "test_2016_flickr")
"""Of Multi30k, as `bench.training` reads them."""


def prepare(settings: Settings, out: Path) -> None:
    """Check the data, and make the folder for the results.

    Raises:
        BenchmarkError: the data is no folder with Multi30k, or `out` is no folder that can be written.
    """
    data = settings.data
    if data is not None:
        if not data.is_dir():
            raise BenchmarkError(f"--data {data} {'is a file' if data.exists() else 'does not exist'}; it is a folder")
        missing = [split for split in SPLITS if not any(data.glob(f"{split}*"))]
        if missing:
            raise BenchmarkError(f"--data {data} has no files of {' and '.join(missing)}; it is a folder with Multi30k")
    if out.exists() and not out.is_dir():
        raise BenchmarkError(f"--output {out} is a file; it must be a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"--output {out} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise BenchmarkError(f"--output {out} cannot be written")
