"""Typed configs for the training scripts: dataclasses, read from YAML and overridden by `key=value` words.

Every key is known: an unknown one is an error that names the nearest. A string may hold `${NAME}` or
`${NAME:-default}`, which is replaced by an environment variable.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from attnpatch.errors import one_line, unknown
from attnpatch.training.errors import ConfigError

T = TypeVar("T")


def one_of(*values: str) -> dict[str, Any]:
    """Field metadata: the values that a string may take."""
    return {"choices": values}


def at_least(low: float, high: float | None = None) -> dict[str, Any]:
    """Field metadata: the range of a number, both ends included."""
    return {"low": low, "high": high}


@dataclass
class ModelConfig:
    """What is trained: a checkpoint (`pretrained`), or a fresh Marian of this size."""

    pretrained: str | None = None  # folder or hub id; the sizes below are then the checkpoint's own
    revision: str | None = None
    d_model: int = field(default=256, metadata=at_least(2))
    encoder_layers: int = field(default=3, metadata=at_least(1))
    decoder_layers: int = field(default=3, metadata=at_least(1))
    heads: int = field(default=4, metadata=at_least(1))
    ffn_dim: int = field(default=1024, metadata=at_least(1))
    activation: str = "swish"
    dropout: float | None = field(default=None, metadata=at_least(0, 0.99))  # None: 0.1, or the checkpoint's
    attention_dropout: float | None = field(default=None, metadata=at_least(0, 0.99))
    activation_dropout: float | None = field(default=None, metadata=at_least(0, 0.99))
    scale_embedding: bool = True
    max_positions: int = field(default=512, metadata=at_least(8))
    init_std: float = field(default=0.02, metadata=at_least(0))


@dataclass
class DataConfig:
    """Where the text is. An entry of `train`, `dev` and `test` is a stem (`train` for train.de and train.en), a
    file (.tsv, .jsonl), a folder, or a mapping {source: FILE, target: FILE}; all relative to `dir`. With `hub_id` it is
    the name of a split (train, validation, test)."""

    dir: str = "."
    source_lang: str = "de"
    target_lang: str = "en"
    train: list[Any] = field(default_factory=lambda: ["train"])
    dev: list[Any] = field(default_factory=lambda: ["val"])
    test: list[Any] = field(default_factory=lambda: ["test"])
    about: str = ""  # what the data is and where it comes from: shown when it is missing
    hub_id: str | None = None  # a hub data set (or a folder of the same shape), read through its parquet form
    hub_config: str | None = None
    hub_revision: str = "refs/convert/parquet"
    source_column: int | str | None = None  # TSV: column number from 0 or header; JSONL: key. None: 0/1, languages
    target_column: int | str | None = None
    header: bool = False  # whether a TSV's first line holds column names
    on_empty: str = field(default="error", metadata=one_of("error", "skip"))
    lowercase: bool = False
    max_source_length: int = field(default=256, metadata=at_least(2))  # tokens, </s> included
    max_target_length: int = field(default=256, metadata=at_least(2))
    too_long: str = field(default="truncate", metadata=one_of("truncate", "skip"))  # training pairs only
    max_train_pairs: int | None = field(default=None, metadata=at_least(1))
    max_dev_pairs: int | None = field(default=None, metadata=at_least(1))
    max_test_pairs: int | None = field(default=None, metadata=at_least(1))


@dataclass
class TokenizerConfig:
    """The SentencePiece model that is trained on the training text when the model starts from scratch."""

    path: str | None = None  # an existing MarianTokenizer folder instead
    type: str = field(default="unigram", metadata=one_of("unigram", "bpe"))
    vocab_size: int = field(default=6000, metadata=at_least(16))  # </s>, <unk> and <pad> included
    joint: bool = True  # one vocabulary for both languages, and one embedding
    character_coverage: float = field(default=1.0, metadata=at_least(0.9, 1.0))


@dataclass
class CommonTraining:
    """Optimiser, schedule, checkpoints: what every training run has."""

    epochs: float = field(default=6, metadata=at_least(0))
    max_steps: int | None = field(default=None, metadata=at_least(1))
    batch_size: int = field(default=32, metadata=at_least(1))  # for translation: pairs, under batching: sentences
    gradient_accumulation: int = field(default=1, metadata=at_least(1))
    learning_rate: float = field(default=1e-3, metadata=at_least(0))
    schedule: str = field(default="inverse_sqrt", metadata=one_of("inverse_sqrt", "linear", "constant", "cosine"))
    warmup_steps: int = field(default=0, metadata=at_least(0))
    optimizer: str = field(default="adamw_torch_fused", metadata=one_of("adamw_torch_fused", "adamw_torch"))
    adam_beta1: float = field(default=0.9, metadata=at_least(0, 0.99999999))
    adam_beta2: float = field(default=0.98, metadata=at_least(0, 0.99999999))
    adam_epsilon: float = field(default=1e-9, metadata=at_least(0))
    weight_decay: float = field(default=0.0, metadata=at_least(0))
    clip_norm: float = field(default=1.0, metadata=at_least(0))  # 0: no clipping
    precision: str = field(default="auto", metadata=one_of("auto", "bf16", "fp32"))
    device: str = field(default="auto", metadata=one_of("auto", "cpu"))
    threads: int | None = field(default=None, metadata=at_least(1))  # None: all CPUs this process may use
    gradient_checkpointing: bool = False
    compile: bool = False
    attention: str = field(default="auto", metadata=one_of("auto", "eager", "sdpa"))  # backend of stock attention
    ddp_find_unused_parameters: bool = False
    log_every: int = field(default=50, metadata=at_least(1))  # optimiser steps
    evaluate_every: int | str = "epoch"  # "epoch", "never", or a number of steps
    save_every: int | str = "epoch"
    keep_checkpoints: int = field(default=2, metadata=at_least(1))  # the newest; the best is kept besides
    final: str = field(default="best", metadata=one_of("best", "last", "average"))
    average: int = field(default=3, metadata=at_least(1))  # checkpoints in final: average
    resume: str = field(default="auto", metadata=one_of("auto", "never"))
    # Save and stop after so many minutes of a process (exit code 75); the same command goes on. None: never.
    stop_after_minutes: float | None = field(default=None, metadata=at_least(0))

    def check(self) -> None:
        """Raises ConfigError when settings contradict each other."""
        for name in ("evaluate_every", "save_every"):
            value = getattr(self, name)
            if value not in ("epoch", "never") and not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"training.{name}={value!r}: allowed are epoch, never, or a number of steps >= 1")
        every = (self.evaluate_every, self.save_every)
        if self.final == "best" and (every[0] != every[1] or "never" in every):
            raise ConfigError(
                "training.final=best needs a checkpoint at each evaluation: give training.evaluate_every and "
                "training.save_every the same value, not never, or choose training.final=last"
            )
        if self.final == "average":
            if self.stop_after_minutes is not None:
                raise ConfigError(
                    "training.final=average with training.stop_after_minutes would average the checkpoints of the "
                    "pauses, too: choose training.final=last or best"
                )
            self.keep_checkpoints = max(self.keep_checkpoints, self.average)


@dataclass
class TrainingConfig(CommonTraining):
    """A translation run: what all have, and batches of pairs."""

    batching: str = field(default="tokens", metadata=one_of("tokens", "sentences"))
    max_tokens: int = field(default=4096, metadata=at_least(1))  # pairs x longest side, padding included
    group_by_length: bool = True  # for batching: sentences
    label_smoothing: float = field(default=0.1, metadata=at_least(0, 0.99))


@dataclass
class GenerationSettings:
    """Beam search and the scores."""

    num_beams: int = field(default=5, metadata=at_least(1))
    max_length: int = field(default=128, metadata=at_least(2))
    length_penalty: float = 1.0
    max_tokens: int = field(default=4096, metadata=at_least(1))  # a batch: pairs x longest source x beams
    dev_bleu: bool = False  # translate the dev set at each evaluation, too
    dev_beams: int = field(default=1, metadata=at_least(1))
    lowercase: bool = False  # score without case: sacrebleu -lc
    tokenize: str = "13a"
    test: bool = True


@dataclass
class OutputConfig:
    """What is written, and where."""

    dir: str = "runs/marian"
    overwrite: bool = False  # with resume: never, allow a folder that already holds a run
    report_to: list[str] = field(default_factory=list)  # e.g. [tensorboard]
    quiet: bool = False


@dataclass
class MarianTrainingConfig:
    """One training run of scripts/train_marian.py."""

    spec: Any = None  # an attention spec; None or "stock": unchanged attention
    init: str = field(default="preserve", metadata=one_of("preserve", "paper", "calibrate"))
    seed: int = field(default=1, metadata=at_least(0))
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        if self.spec in ("stock", "", "none"):
            self.spec = None
        if self.model.d_model % self.model.heads:
            raise ConfigError(
                f"model.d_model={self.model.d_model} does not divide into model.heads={self.model.heads} heads; "
                "choose a d_model that is a multiple of heads"
            )
        if self.init == "calibrate" and self.spec is not None and self.model.pretrained is None:
            raise ConfigError(
                "init=calibrate fits the new projections to those of a checkpoint: name one with model.pretrained, or "
                "leave init out"
            )
        self.training.check()

    def as_dict(self) -> dict[str, Any]:
        """The config as plain nested dicts, as it would stand in YAML."""
        return dataclasses.asdict(self)


def load_config(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Reads the YAML file `path` into the dataclass `cls` and applies `overrides` such as `training.epochs=2`.

    Raises ConfigError for a missing or malformed file, an unknown key, or a value of the wrong type or range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        path = Path(path)
        if not path.is_file():
            beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
            raise ConfigError(f"no config file {path}" + (f"; in {path.parent}: {', '.join(beside)}" if beside else ""))
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {one_line(error)}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{path} must hold a mapping of sections, not a {type(loaded).__name__}")
        tree = loaded or {}
    for word in overrides:
        _override(tree, word)
    return _build(cls, tree, "")


def _override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{word!r} is not an override: write key=value, for example training.epochs=2")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {word!r} is not valid YAML: {one_line(error)}") from error
    *sections, last = key.strip().split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section")
        node = child
    node[last] = value


def _build(cls: type[T], tree: dict[str, Any], prefix: str) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in fields:
            kind = f"key {prefix}{name}:" if prefix else "key"
            raise ConfigError(unknown(kind, name, fields))
        hint = hints[name]
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                known = ", ".join(f.name for f in dataclasses.fields(hint))
                raise ConfigError(f"{key} is a section, not a value; its keys: {known}")
            values[name] = _build(typing.cast(type, hint), value, f"{key}.")
        else:
            values[name] = _check(key, _convert(key, _expand(value), hint), fields[name].metadata)
    return cls(**values)


def _expand(value: Any) -> Any:
    """Replaces ${NAME} and ${NAME:-default} in strings by environment variables."""
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name)
        if found:
            return found
        if default is None:
            raise ConfigError(f"the config needs the environment variable {name}, which is not set")
        return default

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", replace, value)


def _convert(key: str, value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            if option is not type(None):
                try:
                    return _convert(key, value, option)
                except ConfigError:
                    continue
    elif origin is list:
        items = value if isinstance(value, list) else [] if value in (None, "") else [value]
        return [_convert(key, item, typing.get_args(hint)[0]) for item in items]
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif hint is float:
        # YAML 1.1 reads 1e-3 as a string: it wants 1.0e-3.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
    elif hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{key}={value!r}: expected {_describe(hint)}, not {type(value).__name__}")


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if origin is list:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return names.get(hint, str(hint))


def _check(key: str, value: Any, metadata: Any) -> Any:
    if value is None:
        return value
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(unknown(f"value for {key}:", value, choices))
    low, high = metadata.get("low"), metadata.get("high")
    if low is not None and not value >= low:
        raise ConfigError(f"{key}={value}: must be at least {low}")
    if high is not None and not value <= high:
        raise ConfigError(f"{key}={value}: must be at most {high}")
    return value
