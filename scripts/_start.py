"""What the scripts share: they run in a checkout that is not installed, and say in one line when they cannot start."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

if importlib.util.find_spec("attnpatch") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# torch's large tensors on a CPU in huge pages: they are given back to the system and taken again all the time, and
# filling pages of 4 KiB was a fifth of a training step. Read when torch is loaded; a value from outside stays.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def start(config: str, run: str, usage: str | None, default_config: Path | None = None) -> int:
    """The exit code of the script with this config class and function, both as module:name; `usage` is its --help.

    A missing or unsupported torch or transformers shows at attnpatch's import: one sentence and exit code 2.
    """
    try:
        from attnpatch.training.cli import main
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return main(sys.argv[1:], usage, config, run, default_config)
