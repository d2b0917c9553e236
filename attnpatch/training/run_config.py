"""What the configs of all scripts have in common: the spec and seed of a run, its training settings, its output."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from attnpatch.training.config import at_least, one_of
from attnpatch.training.errors import ConfigError
from attnpatch.training.extra import TRAINING


@dataclass
class ScriptConfig:
    """The config of a script."""

    packages: ClassVar[tuple[str, ...]] = TRAINING
    """What has to be installed, beside attnpatch's own dependencies."""
    again: ClassVar[str] = "starts afresh"
    """What the same command does after Ctrl-C."""
    smoke_limits: ClassVar[dict[str, int]] = {}
    """What `--smoke` bounds: numbers, or how many items of a list are kept (attnpatch.training.smoke)."""

    is_smoke = False  # no setting: `--smoke` sets it

    def as_dict(self) -> dict[str, Any]:
        """The config as plain nested dicts, as it would stand in YAML; of a smoke run with `smoke: true`."""
        return dataclasses.asdict(self) | ({"smoke": True} if self.is_smoke else {})


@dataclass
class RunConfig(ScriptConfig):
    """The config of one training run; subclasses add `model`, `data`, `training`, `output` and what else they need."""

    again: ClassVar[str] = "resumes from the last checkpoint"

    spec: Any = None  # an attention spec; None or "stock": unchanged attention
    init: str = field(default="preserve", metadata=one_of("preserve", "paper"))
    seed: int = field(default=1, metadata=at_least(0))

    def __post_init__(self) -> None:
        self.spec = none_if_stock(self.spec)
        if self.spec is not None:
            from attnpatch.spec import AttentionSpec  # which loads torch: wrong keys are told before

            AttentionSpec.parse(self.spec)  # a wrong one is told before any data is read


SMOKE_TRAINING = {
    "training.max_steps": 3,
    "training.batch_size": 4,
    "training.gradient_accumulation": 2,
    "training.warmup_steps": 1,
    "training.log_every": 1,
    "training.evaluate_every": 2,
    "training.save_every": 2,
}
"""The `smoke_limits` of `CommonTraining`."""


def none_if_stock(spec: Any) -> Any:
    """None for every way to write the stock attention; any other spec as it is."""
    return None if spec in ("stock", "", "none") else spec


def check_heads(model: Any, width: str) -> None:
    """Raises ConfigError when the heads (`model.heads`) do not divide the model's width (the field called `width`)."""
    size = getattr(model, width)
    if size % model.heads:
        raise ConfigError(
            f"model.{width}={size} does not divide into model.heads={model.heads} heads; choose a {width} that is a "
            "multiple of heads"
        )


@dataclass
class CommonTraining:
    """Optimiser, schedule, checkpoints: what every training run has."""

    epochs: float = field(default=6, metadata=at_least(0))
    max_steps: int | None = field(default=None, metadata=at_least(1))
    batch_size: int = field(default=32, metadata=at_least(1))  # for translation: pairs, under batching: sentences
    gradient_accumulation: int = field(default=1, metadata=at_least(1))
    learning_rate: float = field(default=1e-3, metadata=at_least(0))
    schedule: str = field(default="inverse_sqrt", metadata=one_of("inverse_sqrt", "linear", "constant", "cosine"))
    warmup_steps: int | float = field(default=0, metadata=at_least(0))  # below 1: a share of all steps
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
class OutputConfig:
    """What is written, and where."""

    dir: str = "runs/run"
    overwrite: bool = False  # with resume: never, allow a folder that already holds a run
    report_to: list[str] = field(default_factory=list)  # e.g. [tensorboard]
    quiet: bool = False
