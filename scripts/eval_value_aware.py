#!/usr/bin/env python
"""Scores trained language models with r keys for each query: top-r (OVO), practical selectors, the oracle (OVA).

    python scripts/eval_value_aware.py configs/value-aware-cpu.yaml models=[RUN/model,...] data.dir=PATH/wikitext [...]

Loss, perplexity and output error against r, exact attention as the floor: results.json and a figure in output.dir.
A model that was evaluated with the same settings is not evaluated again.

`--smoke` does all of it in less than a minute, with two blocks and two r, to see that it works. `--show-config`
prints all settings and stops, `--debug` shows tracebacks, `--plugin MODULE` imports a module that registers
variants or families.
Exit code: 0; 2 after an error; 130 after Ctrl-C.
"""

from __future__ import annotations

import sys

from _start import start

if __name__ == "__main__":
    config, run = (
        "attnpatch.experiments.value_aware.config:ValueAwareConfig",
        "attnpatch.experiments.value_aware.run:run",
    )
    sys.exit(start(config, run, __doc__))
