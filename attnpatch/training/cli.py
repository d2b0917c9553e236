"""The command line of the training scripts: arguments in, an exit code out."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from attnpatch.errors import AttnpatchError, one_line

FAILED, PAUSED, INTERRUPTED = 2, 75, 130


def main(
    argv: Sequence[str],
    usage: str | None = None,
    config_class: str = "attnpatch.training.config:MarianTrainingConfig",
    run: str = "attnpatch.training.marian:run",
) -> int:
    """Runs an experiment; its config class and its function are given as module:name, so that a wrong config is
    told before anything heavy is imported.

    Returns 0; 2 after an error, said in one sentence; 75 when it paused at its time limit; 130 after Ctrl-C.
    """
    debug = "--debug" in argv
    words, plugins = _take_plugins([word for word in argv if word != "--debug"])
    if "-h" in words or "--help" in words or not words:
        print((usage or __doc__ or "").strip())
        return 0 if words else FAILED
    try:
        from attnpatch.registry import import_plugin
        from attnpatch.training.config import load_config
        from attnpatch.training.errors import ConfigError, RunPaused
        from attnpatch.training.extra import TRAINING, require

        options = [word for word in words if word.startswith("-")]
        if options:
            raise ConfigError(
                f"unknown option {options[0]}; options: --plugin MODULE, --debug, --help; settings are key=value"
            )
        for name in plugins:
            if not name:
                raise ConfigError("--plugin needs the name of a module: --plugin my_variants")
            import_plugin(name)
        path = None if "=" in words[0] else words[0]
        overrides = words if path is None else words[1:]
        config = load_config(_named(config_class), path, overrides)
        require(TRAINING)
        try:
            _named(run)(config)
        except RunPaused as pause:
            print(pause, file=sys.stderr)
            return PAUSED
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command resumes from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except (AttnpatchError, OSError) as error:
        return _failed(error, debug)
    except Exception as error:  # safetensors has its own class for a full disk, and torch a bare RuntimeError
        if debug or not _is_disk(error):
            raise
        return _failed(error, debug)
    return 0


def _take_plugins(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The other words, and the modules of `--plugin MODULE` and `--plugin=MODULE`; "" where none is named."""
    words, plugins = [], []
    rest = iter(argv)
    for word in rest:
        if word == "--plugin":
            plugins.append(next(rest, ""))
        elif word.startswith("--plugin="):
            plugins.append(word.removeprefix("--plugin="))
        else:
            words.append(word)
    return words, plugins


def _named(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


def _is_disk(error: BaseException) -> bool:
    text = str(error).lower()
    return "no space left" in text or "disk quota" in text or "file write failed" in text


def _failed(error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {one_line(error)}", file=sys.stderr)
    return FAILED
