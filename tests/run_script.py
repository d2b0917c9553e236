"""The scripts of scripts/ in this process, by the config class and function that each hands to the command line."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from attnpatch.training.cli import main

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def entry_points(script: str) -> list[str]:
    """The names of config class and function, module:name, read from the source of scripts/SCRIPT.py."""
    tree = ast.parse((SCRIPTS / f"{script}.py").read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [
        next(text for text in texts if text.startswith("attnpatch.") and text.endswith(end))
        for end in ("Config", ":run")
    ]


def config_class(script: str) -> Any:
    """The config class itself."""
    module, _, name = entry_points(script)[0].partition(":")
    return getattr(import_module(module), name)


def run_script(script: str, words: Sequence[str], usage: str | None = None, default_config: Path | None = None) -> int:
    """The exit code of `python scripts/SCRIPT.py WORDS`."""
    config, run = entry_points(script)
    return main(words, usage, config, run, default_config)
