#!/usr/bin/env python
"""Trains a masked language model (RoBERTa or BERT, stock or patched attention) or its decoder twin; perplexity.

    accelerate launch scripts/train_mlm.py configs/wikitext-cpu.yaml data.dir=PATH/wikitext [key=value ...]

The keys are those of the config file, with dots: training.max_steps=50. `--smoke` does all of it in less than a
minute, with few steps and little data, to see that it works. `--show-config` prints all settings and stops,
`--debug` shows tracebacks, `--plugin MODULE` imports a module that registers variants or families.
Exit code: 0; 2 after an error; 75 when training.stop_after_minutes ended it with a checkpoint (the same command
goes on); 130 after Ctrl-C.
"""

from __future__ import annotations

import sys

from _start import start

if __name__ == "__main__":
    config, run = (
        "attnpatch.experiments.language_models.config:MLMTrainingConfig",
        "attnpatch.experiments.language_models.run:run",
    )
    sys.exit(start(config, run, __doc__))
