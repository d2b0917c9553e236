#!/usr/bin/env python
"""Trains a Marian translation model, with stock or patched attention, and scores it.

    accelerate launch scripts/train_marian.py configs/multi30k-cpu.yaml data.dir=PATH/multi30k [key=value ...]

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
    config = "attnpatch.experiments.translation.config:MarianTrainingConfig"
    run = "attnpatch.experiments.translation.run:run"
    sys.exit(start(config, run, __doc__))
