"""The command line of the scripts: arguments in, an exit code out."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnpatch.errors import AttnpatchError, one_line

WRONG, FAILED, PAUSED, INTERRUPTED = 1, 2, 75, 130
FLAGS = ("--smoke", "--show-config", "--debug")


def main(
    argv: Sequence[str],
    usage: str | None,
    config_class: str,
    run: str,
    default_config: Path | None = None,
) -> int:
    """Runs an experiment.

    Args:
        argv: a config file, settings `key=value`, `--plugin MODULE`, `--smoke`, `--show-config`, `--debug`,
            `--help`.
        usage: what `--help` prints.
        config_class, run: its config class (a ScriptConfig) and its function, as module:name, so that a wrong config
            is told before anything heavy is imported.
        default_config: read when argv names no config file.

    Returns 0; 1 when a run found a result that must not be; 2 after an error, said in one sentence; 75 when it paused
    at its time limit; 130 after Ctrl-C.
    """
    debug = "--debug" in argv
    smoke, show = "--smoke" in argv, "--show-config" in argv
    words, plugins = _take_plugins([word for word in argv if word not in FLAGS])
    if "-h" in words or "--help" in words or not (words or default_config):
        print((usage or __doc__ or "").strip())
        return 0 if words else FAILED
    again = "starts afresh"
    try:
        from attnpatch.registry import import_plugin
        from attnpatch.training.config import load_config
        from attnpatch.training.errors import ConfigError, RunPaused, WrongResult
        from attnpatch.training.extra import require

        options = [word for word in words if word.startswith("-")]
        if options:
            raise ConfigError(
                f"unknown option {options[0]}; options: --plugin MODULE, {', '.join(FLAGS)}, --help; settings are "
                "key=value"
            )
        for name in plugins:
            if not name:
                raise ConfigError("--plugin needs the name of a module: --plugin my_variants")
            import_plugin(name)
        path: str | Path | None = default_config
        if words and "=" not in words[0]:
            path = words.pop(0)
        kind = _named(config_class)
        config = load_config(kind, path, words)
        again = kind.again
        if smoke:
            from attnpatch.training.smoke import shrink

            config, changed = shrink(config)
            if os.environ.get("RANK", "0") == "0":
                print(f"smoke run: {' '.join(changed)}", file=sys.stderr)
        if show:
            import yaml

            if os.environ.get("RANK", "0") == "0":
                print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True), end="")
            return 0
        require(kind.packages)
        try:
            _named(run)(config)
        except RunPaused as pause:
            print(pause, file=sys.stderr)
            return PAUSED
        except WrongResult as error:
            return _failed(error, debug, WRONG)
    except KeyboardInterrupt:
        print(f"stopped by Ctrl-C; the same command {again}", file=sys.stderr)
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


def _failed(error: BaseException, debug: bool, code: int = FAILED) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {one_line(error)}", file=sys.stderr)
    return code
