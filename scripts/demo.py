#!/usr/bin/env python
"""Trains a tiny Marian on a synthetic corpus, converts it to every variant, checks, trains on and scores each.

    python scripts/demo.py [CONFIG.yaml] [key=value ...]

CONFIG is configs/demo-cpu.yaml unless given; the keys are those of the file, with dots: further.updates=100. The
table, the plot and results.json go to outputs/demo (output=PATH). `--show-config` prints all settings and stops,
`--debug` shows tracebacks, `--plugin MODULE` imports a module that registers variants or families.
Exit code: 0; 1 when a conversion changed what it must not change; 2 after an error; 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from _start import start

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo-cpu.yaml"

if __name__ == "__main__":
    # transformers reads these when it is imported.
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from a hub
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config, run = "attnpatch.demo.config:DemoConfig", "attnpatch.demo.command:run"
    sys.exit(start(config, run, __doc__, CONFIG))
