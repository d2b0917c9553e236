"""What the scripts share: they run in a checkout that is not installed, and say in one line when they cannot start."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

if importlib.util.find_spec("attnpatch") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# torch's large tensors on a CPU in huge pages: they are given back to the system and taken again all the time, and
# filling pages of 4 KiB was a fifth of a training step. Read when torch is loaded; a value from outside stays.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def start(module: str, *arguments: Any) -> int:
    """The exit code of a module's `main`. A missing or unsupported torch or transformers shows at attnpatch's import:
    one sentence and exit code 2."""
    try:
        main = importlib.import_module(module).main
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(main(*arguments))
