"""The config of scripts/train_classifier.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from attnpatch.experiments.classification.tasks import TASKS
from attnpatch.experiments.language_models.config import ByteLevelConfig, EncoderConfig
from attnpatch.training.config import at_least, one_of
from attnpatch.training.extra import CLASSIFYING
from attnpatch.training.run_config import SMOKE_TRAINING, CommonTraining, OutputConfig, RunConfig, check_heads


@dataclass
class TaskConfig:
    """Which task of GLUE, and how much of it."""

    name: str = field(default="sst2", metadata=one_of(*TASKS))
    max_length: int = field(default=128, metadata=at_least(4))  # tokens of a sentence or pair, special ones included
    # Drawn without regard to the run's seed: the same examples in every run.
    max_train_examples: int | None = field(default=None, metadata=at_least(2))
    max_dev_examples: int | None = field(default=None, metadata=at_least(2))


@dataclass
class GlueConfig:
    """Where the data is: GLUE's files under `dir`, or with `hub_id` a hub data set of the same columns."""

    dir: str = "."
    train: list[str] = field(default_factory=list)  # files relative to dir (.tsv, .parquet); none: the task's own
    dev: list[str] = field(default_factory=list)
    adversarial: str | None = "AdvGLUE/dev.json"  # relative to dir; null: not scored
    about: str = ""  # what the data is and where it comes from: shown when it is missing
    hub_id: str | None = None  # a hub data set, or a folder with TASK/SPLIT-*.parquet in it
    hub_revision: str | None = None
    adversarial_hub_id: str | None = None  # the same of AdvGLUE (configs adv_TASK, split validation)


@dataclass
class ClassifierTraining(CommonTraining):
    """Optimiser, schedule, checkpoints; `batch_size` counts examples."""

    learning_rate: float = field(default=2e-5, metadata=at_least(0))
    schedule: str = field(default="linear", metadata=one_of("inverse_sqrt", "linear", "constant", "cosine"))
    adam_beta2: float = field(default=0.999, metadata=at_least(0, 0.99999999))
    adam_epsilon: float = field(default=1e-8, metadata=at_least(0))
    final: str = field(default="last", metadata=one_of("best", "last", "average"))
    eval_batch_size: int = field(default=64, metadata=at_least(1))


@dataclass
class DiscrepancyConfig:
    """The MMD between keys and queries, before and after training, on examples of the dev set."""

    examples: int = field(default=64, metadata=at_least(0))  # drawn without regard to the seed; 0: not measured
    bandwidth: str = field(default="median", metadata=one_of("median", "mean"))


@dataclass
class ClassifierOutput(OutputConfig):
    """What is written, and where."""

    dir: str = "runs/glue"
    keep_weights: bool = True  # false: the model and its checkpoints are deleted once results.json stands


@dataclass
class ClassificationConfig(RunConfig):
    """One training run of scripts/train_classifier.py: one task, one arm, one seed."""

    packages: ClassVar[tuple[str, ...]] = CLASSIFYING
    smoke_limits: ClassVar[dict[str, int]] = SMOKE_TRAINING | {
        "task.max_train_examples": 64,
        "task.max_dev_examples": 48,
        "discrepancy.examples": 4,
    }

    task: TaskConfig = field(default_factory=TaskConfig)
    data: GlueConfig = field(default_factory=GlueConfig)
    model: EncoderConfig = field(default_factory=EncoderConfig)
    tokenizer: ByteLevelConfig = field(default_factory=ByteLevelConfig)
    training: ClassifierTraining = field(default_factory=ClassifierTraining)
    discrepancy: DiscrepancyConfig = field(default_factory=DiscrepancyConfig)
    output: ClassifierOutput = field(default_factory=ClassifierOutput)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.model, "hidden_size")
        self.training.check()
