#!/usr/bin/env python
"""Fine-tunes BERT or RoBERTa, stock or patched attention, on a task of GLUE; metrics, calibration, robustness, MMD.

    accelerate launch scripts/train_classifier.py configs/glue-cpu.yaml data.dir=PATH/glue task.name=rte [key=value ...]

One run is one task (sst2, cola, rte, mrpc, stsb), one spec and one seed, in a folder of its own (output.dir). The
keys are those of the config file, with dots: training.epochs=2. `--smoke` does all of it in less than a minute,
with few steps and little data, to see that it works. `--show-config` prints all settings and stops, `--debug` shows
tracebacks, `--plugin MODULE` imports a module that registers variants or families.
Exit code: 0; 2 after an error; 75 when training.stop_after_minutes ended it with a checkpoint (the same command
goes on); 130 after Ctrl-C.
"""

from __future__ import annotations

import sys

from _start import start

if __name__ == "__main__":
    config = "attnpatch.experiments.classification.config:ClassificationConfig"
    run = "attnpatch.experiments.classification.run:run"
    sys.exit(start(config, run, __doc__))
