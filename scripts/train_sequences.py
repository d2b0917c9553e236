#!/usr/bin/env python
"""Trains small decoders on the NT tasks over a grid of bases and delays, with softmax and expressive attention.

    python scripts/train_sequences.py configs/nt-cpu.yaml [key=value ...]

The keys are those of the config file, with dots: task.noise=0.1. `--smoke` does all of it in less than a minute,
with few cells and steps, to see that it works. `--show-config` prints all settings and stops, `--debug` shows
tracebacks, `--plugin MODULE` imports a module that registers variants. Accuracies, heat maps and results.json go to
output.dir; cells that are finished there are not trained again.
Exit code: 0; 2 after an error; 75 when training.stop_after_minutes ended it (the same command goes on); 130 after
Ctrl-C.
"""

from __future__ import annotations

import sys

from _start import start

if __name__ == "__main__":
    config, run = "attnpatch.experiments.sequences.config:SequencesConfig", "attnpatch.experiments.sequences.run:run"
    sys.exit(start(config, run, __doc__))
