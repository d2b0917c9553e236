"""Tokenizers: loaded from a folder or the hub, and kept beside a run that makes its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnpatch.atomic import write_json, writing_aside
from attnpatch.errors import one_line
from attnpatch.training.errors import TrainingError
from attnpatch.training.files import read_json

CACHE_FILE = "made_from.json"


def load_tokenizer(path: str | Path, **kwargs: Any) -> Any:
    """A tokenizer from a folder or the hub. Raises TrainingError when there is none, or a damaged one."""
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        # MarianTokenizer asks for sacremoses, which only its normalize() uses, and nothing here calls that.
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
        try:
            return AutoTokenizer.from_pretrained(str(path), **kwargs)
        except Exception as error:  # a damaged file: RuntimeError of SentencePiece, a bare Exception of tokenizers
            raise TrainingError(f"no usable tokenizer at {path}: {one_line(error, 300)}") from error


def load_fast_tokenizer(path: str, **kwargs: Any) -> Any:
    """A tokenizer of the tokenizers library from a folder or the hub; RoBERTa's two files alone will do.

    Raises TrainingError when there is none, or it lacks what a language model's blocks need.
    """
    folder = Path(path)
    bare = folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "config.json"))
    if bare and (folder / "merges.txt").is_file() and not (folder / "tokenizer_config.json").is_file():
        from transformers import RobertaTokenizerFast

        tokenizer: Any = RobertaTokenizerFast.from_pretrained(path)
    else:
        tokenizer = load_tokenizer(path, **kwargs)
    if not getattr(tokenizer, "is_fast", False):
        raise TrainingError(f"the tokenizer {path} is {type(tokenizer).__name__}, not one of the tokenizers library")
    lacking = [name for name in ("cls", "sep", "pad") if getattr(tokenizer, f"{name}_token_id") is None]
    if lacking:
        raise TrainingError(f"the tokenizer {path} has no {' and no '.join(lacking)} token, which blocks need")
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        # transformers makes an empty one where there are only a config and weights.
        raise TrainingError(f"{path} has no tokenizer of its own: name one with tokenizer.path")
    return tokenizer


def made_once(folder: Path, key: dict[str, Any], load: Callable[[Any], Any], make: Callable[[Path], Any]) -> Any:
    """The tokenizer in `folder`, if it was made from the same text with the same settings (`key`), or a new one there.

    Args:
        load: reads a tokenizer from a folder. make: writes one into a folder.
    """
    try:
        if read_json(folder / CACHE_FILE) == key:
            return load(str(folder))
    except (TrainingError, OSError, json.JSONDecodeError):  # none, or damaged
        pass
    with writing_aside(folder) as aside:
        make(aside)
        write_json(aside / CACHE_FILE, key)
    return load(str(folder))
