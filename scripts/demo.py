#!/usr/bin/env python
"""Trains a tiny Marian on a synthetic corpus, converts it to every variant, checks, trains on and scores each.

    python scripts/demo.py [CONFIG.yaml] [key=value ...]

CONFIG is configs/demo-cpu.yaml unless given; the keys are those of the file, with dots: further.updates=100.
The table, the plot and results.json go to outputs/demo (output=PATH). `--debug` shows tracebacks.
Exit code: 0; 1 when a conversion changed what it must not change; 2 after an error; 130 after Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("attnpatch") is None:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))


def run() -> int:
    """Sets what transformers reads when it is imported, and runs the demo."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from a hub
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from attnpatch.training.demo_cli import main
    except ImportError as error:  # torch or transformers is missing or unsupported
        print(f"error: {error}", file=sys.stderr)
        return 2
    return main(sys.argv[1:], ROOT / "configs" / "demo-cpu.yaml", __doc__)


if __name__ == "__main__":
    sys.exit(run())
