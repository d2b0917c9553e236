#!/usr/bin/env python
"""Trains small decoders on the NT tasks over a grid of bases and delays, with softmax and expressive attention.

    python scripts/train_sequences.py configs/nt-cpu.yaml [key=value ...]

The keys are those of the config file, with dots: task.noise=0.1. `--debug` shows tracebacks. Accuracies, heat maps and
results.json go to output.dir; cells that are finished there are not trained again.
Exit code: 0; 2 after an error; 75 when training.stop_after_minutes ended it (the same command goes on); 130 after
Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("attnpatch") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from attnpatch.training.cli import main

if __name__ == "__main__":
    config = "attnpatch.experiments.sequences_config:SequencesConfig"
    sys.exit(main(sys.argv[1:], __doc__, config, "attnpatch.experiments.sequences:run"))
