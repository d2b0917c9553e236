"""The command line of scripts/demo.py: arguments in, an exit code out."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from attnpatch.errors import AttnpatchError, one_line

CHANGED, FAILED, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str], default_config: Path, usage: str | None = None) -> int:
    """Runs the demo. Returns 0; 1 when something changed that must not; 2 after an error; 130 after Ctrl-C."""
    words = [word for word in argv if word != "--debug"]
    debug = len(words) != len(argv)
    if "-h" in words or "--help" in words:
        print((usage or __doc__ or "").strip())
        return 0
    try:
        from attnpatch.training.config import load_config
        from attnpatch.training.errors import ConfigError
        from attnpatch.training.extra import DEMO, require

        options = [word for word in words if word.startswith("-")]
        if options:
            raise ConfigError(f"unknown option {options[0]}; options: --debug, --help; settings are key=value")
        path = default_config
        if words and "=" not in words[0]:
            path = Path(words.pop(0))
        require(DEMO)
        print("attnpatch demo: loading torch and transformers", flush=True)
        from attnpatch.training.demo import DemoConfig, run_demo

        result = run_demo(load_config(DemoConfig, path, words))
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command starts afresh", file=sys.stderr)
        return INTERRUPTED
    except (AttnpatchError, OSError) as error:
        if debug:
            traceback.print_exception(error)
        print(f"error: {one_line(error)}", file=sys.stderr)
        return FAILED
    if not result.failed:
        return 0
    print(f"error: {result.complaint}", file=sys.stderr)
    return CHANGED
