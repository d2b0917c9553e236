"""The config of scripts/train_mlm.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from attnpatch.training.config import at_least, one_of
from attnpatch.training.errors import ConfigError
from attnpatch.training.run_config import SMOKE_TRAINING, CommonTraining, OutputConfig, RunConfig, check_heads


@dataclass
class EncoderConfig:
    """What is trained: a checkpoint (`pretrained`), or a fresh model of this family and size."""

    family: str = field(default="roberta", metadata=one_of("roberta", "bert"))
    # A folder, a hub id, or package:NAME/FOLDER in a Python package; family and sizes are then the checkpoint's own.
    pretrained: str | None = None
    revision: str | None = None
    hidden_size: int = field(default=256, metadata=at_least(2))
    layers: int = field(default=4, metadata=at_least(1))
    heads: int = field(default=4, metadata=at_least(1))
    ffn_dim: int = field(default=1024, metadata=at_least(1))
    activation: str = "gelu"
    dropout: float | None = field(default=None, metadata=at_least(0, 0.99))  # None: 0.1, or the checkpoint's
    attention_dropout: float | None = field(default=None, metadata=at_least(0, 0.99))
    init_std: float = field(default=0.02, metadata=at_least(0))


@dataclass
class LanguageModelConfig(EncoderConfig):
    """An encoder with a language-model head, or a decoder."""

    # masked: RobertaForMaskedLM, BertForMaskedLM; causal: their decoder twins, which predict the next token
    objective: str = field(default="masked", metadata=one_of("masked", "causal"))


@dataclass
class TextConfig:
    """Where the text is. An entry of `train`, `dev` and `test` is a text file, a parquet file or a folder of either,
    relative to `dir`; with `hub_id` it is the name of a split (train, validation, test)."""

    dir: str = "."
    train: list[str] = field(default_factory=lambda: ["train.txt"])
    dev: list[str] = field(default_factory=lambda: ["valid.txt"])
    test: list[str] = field(default_factory=lambda: ["test.txt"])
    about: str = ""  # what the data is and where it comes from: shown when it is missing
    column: str = "text"  # of parquet files and hub data sets
    hub_id: str | None = None  # a hub data set, or a folder with CONFIG/SPLIT-*.parquet in it
    hub_config: str | None = None
    hub_revision: str | None = None
    streaming: bool = False  # read the hub's rows as they come, without a copy on the disk
    block_size: int = field(default=128, metadata=at_least(4))  # tokens, <s> and </s> included
    max_train_lines: int | None = field(default=None, metadata=at_least(1))
    max_dev_lines: int | None = field(default=None, metadata=at_least(1))
    max_test_lines: int | None = field(default=None, metadata=at_least(1))


@dataclass
class ByteLevelConfig:
    """The byte-level BPE that is trained on the training text when the model starts from scratch."""

    path: str | None = None  # an existing tokenizer, folder or hub id, instead
    vocab_size: int = field(default=8000, metadata=at_least(262))  # 256 bytes and the special tokens included
    min_frequency: int = field(default=2, metadata=at_least(1))


@dataclass
class MaskingConfig:
    """Which tokens are to be predicted, and what stands in their place (objective: masked)."""

    probability: float = field(default=0.15, metadata=at_least(0.001, 0.999))
    mask_share: float = field(default=0.8, metadata=at_least(0, 1))  # of the chosen: becomes <mask>
    random_share: float = field(default=0.1, metadata=at_least(0, 1))  # becomes a random token; the rest stays
    whole_words: bool = False  # all tokens of a chosen word; all of them become <mask>
    eval_seed: int = field(default=1, metadata=at_least(0))  # evaluation masks: the same in every run


@dataclass
class LanguageModelTraining(CommonTraining):
    """Optimiser, schedule, checkpoints; `batch_size` counts blocks."""

    eval_batch_size: int = field(default=32, metadata=at_least(1))  # blocks


@dataclass
class MLMTrainingConfig(RunConfig):
    """One training run of scripts/train_mlm.py."""

    smoke_limits: ClassVar[dict[str, int]] = SMOKE_TRAINING | {
        "training.eval_batch_size": 4,
        "data.max_train_lines": 1000,
        "data.max_dev_lines": 30,
        "data.max_test_lines": 30,
    }

    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: TextConfig = field(default_factory=TextConfig)
    tokenizer: ByteLevelConfig = field(default_factory=ByteLevelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    training: LanguageModelTraining = field(default_factory=LanguageModelTraining)
    output: OutputConfig = field(default_factory=lambda: OutputConfig(dir="runs/mlm"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.model, "hidden_size")
        if self.masking.mask_share + self.masking.random_share > 1 + 1e-9:
            raise ConfigError(
                f"masking.mask_share={self.masking.mask_share} and masking.random_share={self.masking.random_share} "
                "add up to more than 1"
            )
        if self.data.streaming and self.data.hub_id is None:
            raise ConfigError("data.streaming=true reads from a hub: name the data set with data.hub_id")
        self.training.check()
