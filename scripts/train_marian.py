#!/usr/bin/env python
"""Trains a Marian translation model, with stock or patched attention, and scores it.

    accelerate launch scripts/train_marian.py configs/multi30k-cpu.yaml data.dir=PATH/multi30k [key=value ...]

The keys are those of the config file, with dots: training.max_steps=50. `--debug` shows tracebacks.
Exit code: 0; 2 after an error; 75 when training.stop_after_minutes ended it with a checkpoint (the same command goes
on); 130 after Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("attnpatch") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run() -> int:
    """Trains. A missing or unsupported torch or transformers shows at attnpatch's import, and is said in one line."""
    try:
        from attnpatch.training.cli import main
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return main(sys.argv[1:], __doc__)


if __name__ == "__main__":
    sys.exit(run())
