#!/usr/bin/env python
"""Scores trained language models with r keys for each query: top-r (OVO), practical selectors, the oracle (OVA).

    python scripts/eval_value_aware.py configs/value-aware.yaml models=[RUN/model,...] data.dir=PATH [key=value ...]

Loss, perplexity and output error against r, exact attention as the floor: results.json and a figure in output.dir.
`--debug` shows tracebacks. Exit code: 0; 2 after an error; 130 after Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("attnpatch") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attnpatch.training.cli import main

if __name__ == "__main__":
    config = "attnpatch.experiments.value_aware_config:ValueAwareConfig"
    sys.exit(main(sys.argv[1:], __doc__, config, "attnpatch.experiments.value_aware:run"))
