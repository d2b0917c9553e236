"""The config of scripts/demo.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from attnpatch.experiments.translation.config import MarianTrainingConfig
from attnpatch.training.config import at_least, one_of
from attnpatch.training.errors import ConfigError
from attnpatch.training.extra import DRAWING
from attnpatch.training.run_config import ScriptConfig


@dataclass
class CorpusConfig:
    """Pairs of the synthetic corpus."""

    train: int = field(default=40_000, metadata=at_least(1))
    dev: int = field(default=300, metadata=at_least(1))
    test: int = field(default=200, metadata=at_least(1))
    seed: int = field(default=1, metadata=at_least(0))


@dataclass
class FurtherConfig:
    """The equal training of each converted model and of the stock one."""

    updates: int = field(default=40, metadata=at_least(1))
    learning_rate: float = field(default=1e-3, metadata=at_least(0))
    warmup_steps: int = field(default=5, metadata=at_least(0))
    schedule: str = field(default="linear", metadata=one_of("inverse_sqrt", "linear", "constant", "cosine"))


@dataclass
class DemoConfig(ScriptConfig):
    """configs/demo-cpu.yaml."""

    packages: ClassVar[tuple[str, ...]] = DRAWING

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    base: MarianTrainingConfig = field(default_factory=MarianTrainingConfig)
    further: FurtherConfig = field(default_factory=FurtherConfig)
    output: str = "outputs/demo"

    def __post_init__(self) -> None:
        if self.base.spec is not None or self.base.model.pretrained is not None:
            raise ConfigError(
                "base.spec and base.model.pretrained: the demo trains a stock model from scratch; drop them"
            )
