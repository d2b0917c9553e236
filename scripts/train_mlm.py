#!/usr/bin/env python
"""Trains a masked language model (RoBERTa or BERT, stock or patched attention) or its decoder twin; perplexity.

    accelerate launch scripts/train_mlm.py configs/wikitext-cpu.yaml data.dir=PATH [key=value ...]

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

from attnpatch.training.cli import main

if __name__ == "__main__":
    config = "attnpatch.training.mlm_config:MLMTrainingConfig"
    sys.exit(main(sys.argv[1:], __doc__, config, "attnpatch.training.mlm:run"))
