"""The config of scripts/train_sequences.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from attnpatch.experiments.sequences.grid import Cell
from attnpatch.training.config import at_least, named_once
from attnpatch.training.errors import ConfigError
from attnpatch.training.extra import DRAWING
from attnpatch.training.run_config import (
    SMOKE_TRAINING,
    CommonTraining,
    OutputConfig,
    RunConfig,
    ScriptConfig,
    check_heads,
    none_if_stock,
)

if TYPE_CHECKING:
    from attnpatch.spec import AttentionSpec


@dataclass
class TaskConfig:
    """The grid: every base with every delay. A list among them is a mixture: delays: [2, 4, [2, 4]].

    Delays begin at 2: with 1 a sequence doubles its symbol, and ends in zeros for every even base.
    """

    bases: list[Any] = field(default_factory=lambda: [2, 4])
    delays: list[Any] = field(default_factory=lambda: [2, 4])
    length: int = field(default=32, metadata=at_least(2))  # symbols that the model reads
    noise: float = field(default=0.0, metadata=at_least(0, 0.99))  # probability that a symbol is another one
    eval_sequences: int = field(default=256, metadata=at_least(1))  # for each task of a cell
    eval_seed: int = field(default=1, metadata=at_least(0))


@dataclass
class DecoderConfig:
    """A small causal decoder (BertLMHeadModel)."""

    hidden_size: int = field(default=32, metadata=at_least(2))
    layers: int = field(default=2, metadata=at_least(1))
    heads: int = field(default=1, metadata=at_least(1))
    ffn_dim: int = field(default=128, metadata=at_least(1))
    activation: str = "gelu"
    init_std: float = field(default=0.02, metadata=at_least(0))


@dataclass
class SequencesConfig(ScriptConfig):
    """One run of scripts/train_sequences.py: all specs and seeds over the grid."""

    packages: ClassVar[tuple[str, ...]] = DRAWING
    again: ClassVar[str] = RunConfig.again
    smoke_limits: ClassVar[dict[str, int]] = SMOKE_TRAINING | {
        "seeds": 1,
        "task.bases": 1,
        "task.delays": 2,
        "task.eval_sequences": 8,
    }

    specs: list[Any] = field(default_factory=lambda: ["stock", {"expressive": {"scale": 1.0}}])
    seeds: list[int] = field(default_factory=lambda: [1])
    task: TaskConfig = field(default_factory=TaskConfig)
    model: DecoderConfig = field(default_factory=DecoderConfig)
    training: CommonTraining = field(
        default_factory=lambda: CommonTraining(
            max_steps=1000, evaluate_every="never", save_every="never", final="last", precision="fp32"
        )
    )
    output: OutputConfig = field(default_factory=lambda: OutputConfig(dir="runs/sequences"))

    def __post_init__(self) -> None:
        check_heads(self.model, "hidden_size")
        if self.training.max_steps is None:
            raise ConfigError("training.max_steps is missing: sequences are drawn anew for ever, there are no epochs")
        for name in ("specs", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: name at least one")
        named_once("seeds", self.seeds)
        named_once("specs", [str(spec) for spec in self.parsed_specs()])
        for cell in self.cells():
            if cell.scored_from + 1 > self.task.length:
                raise ConfigError(
                    f"task.length={self.task.length} is too short for the delay {max(cell.delays)}: the first scored "
                    f"symbol is at {cell.scored_from}; choose task.length={2 * cell.scored_from} or so"
                )
        self.training.check()

    def parsed_specs(self) -> list[AttentionSpec]:
        """The specs, in their order."""
        from attnpatch.spec import AttentionSpec  # which loads torch: wrong keys are told before

        return [AttentionSpec.parse(none_if_stock(spec)) for spec in self.specs]

    def cells(self) -> list[Cell]:
        """The grid, base by base."""
        bases = [_numbers("task.bases", item, 2) for item in self.task.bases]
        delays = [_numbers("task.delays", item, 2) for item in self.task.delays]
        if not bases or not delays:
            raise ConfigError("task.bases and task.delays must each name at least one number")
        for name, items in (("task.bases", bases), ("task.delays", delays)):
            named_once(name, [sorted(item) for item in items])
        return [Cell(base, delay) for base in bases for delay in delays]


@dataclass
class CellConfig(RunConfig):
    """The run of one spec and seed at one cell of the grid."""

    training: CommonTraining = field(default_factory=CommonTraining)
    output: OutputConfig = field(default_factory=OutputConfig)


def _numbers(key: str, item: Any, low: int) -> tuple[int, ...]:
    items = item if isinstance(item, list) else [item]
    for number in items:
        if not isinstance(number, int) or isinstance(number, bool) or number < low:
            raise ConfigError(f"{key} has {number!r}: a whole number of at least {low}, or a list of such (a mixture)")
    if not items or len(set(items)) < len(items):
        raise ConfigError(f"{key} has {item!r}: a mixture names each number once")
    return tuple(items)
