"""The config of scripts/eval_value_aware.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from attnpatch.errors import unknown
from attnpatch.experiments.language_models.config import MaskingConfig, TextConfig
from attnpatch.training.config import at_least, named_once, one_of
from attnpatch.training.errors import ConfigError
from attnpatch.training.extra import DRAWING
from attnpatch.training.run_config import ScriptConfig

METHODS = ("top_r", "norm", "centered", "oracle")
"""OVO; the practical selectors, which need no oracle; OVA."""
KERNELS = ("softmax", "expressive", "polynomial", "elu")
EXACT = "D+1"
"""In `r`: the head's width plus one, at which the oracle is exact."""


@dataclass
class EvaluationOutput:
    """What is written, and where."""

    dir: str = "runs/value-aware"
    quiet: bool = False


@dataclass
class ValueAwareConfig(ScriptConfig):
    """One run of scripts/eval_value_aware.py."""

    packages: ClassVar[tuple[str, ...]] = DRAWING
    again: ClassVar[str] = "goes on with the models that are left"
    smoke_limits: ClassVar[dict[str, int]] = {"r": 2, "blocks": 2}

    # Trained language models, masked or causal: folders (scripts/train_mlm.py writes them as RUN/model) or hub ids.
    models: list[str] = field(default_factory=list)
    # own: the kernel that a model was trained with. Others replace the softmax of a model that was trained with it.
    kernels: list[str] = field(default_factory=lambda: ["own"])
    r: list[Any] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, EXACT])
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    swaps: int = field(default=0, metadata=at_least(0))  # rounds of swap improvement of the oracle
    blocks: int = field(default=16, metadata=at_least(1))  # of data.block_size tokens, from the start of the text
    batch_size: int = field(default=4, metadata=at_least(1))
    data: TextConfig = field(default_factory=TextConfig)  # data.test is scored
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    device: str = field(default="auto", metadata=one_of("auto", "cpu"))
    threads: int | None = field(default=None, metadata=at_least(1))
    output: EvaluationOutput = field(default_factory=EvaluationOutput)

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models is empty: name a trained model or more, models=[runs/wikitext/stock-seed1/model]")
        for name, values, known in (("methods", self.methods, METHODS), ("kernels", self.kernels, ("own", *KERNELS))):
            if not values:
                raise ConfigError(f"{name} is empty: choose of {', '.join(known)}")
            for value in values:
                if value not in known:
                    raise ConfigError(unknown(f"value for {name}:", value, known))
        for name in ("models", "kernels", "methods", "r"):
            named_once(name, getattr(self, name))
        if not self.r:
            raise ConfigError(f"r is empty: name numbers of keys, or {EXACT}")
        for r in self.r:
            if r != EXACT and (not isinstance(r, int) or isinstance(r, bool) or r < 1):
                raise ConfigError(f"r has {r!r}: a whole number of at least 1, or {EXACT}")
        if not self.data.test:
            raise ConfigError("data.test is empty: name the text to score")
