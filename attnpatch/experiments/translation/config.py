"""The config of scripts/train_marian.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from attnpatch.training.config import at_least, one_of
from attnpatch.training.errors import ConfigError
from attnpatch.training.run_config import SMOKE_TRAINING, CommonTraining, OutputConfig, RunConfig, check_heads


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
class MarianTrainingConfig(RunConfig):
    """One training run of scripts/train_marian.py."""

    smoke_limits: ClassVar[dict[str, int]] = SMOKE_TRAINING | {
        "training.max_tokens": 512,
        "data.max_train_pairs": 1000,
        "data.max_dev_pairs": 16,
        "data.max_test_pairs": 8,
        "tokenizer.vocab_size": 1000,  # what so few pairs can fill
        "generation.max_length": 16,
        "generation.max_tokens": 1024,
    }

    init: str = field(default="preserve", metadata=one_of("preserve", "paper", "calibrate"))
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    output: OutputConfig = field(default_factory=lambda: OutputConfig(dir="runs/marian"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.model, "d_model")
        if self.init == "calibrate" and self.spec is not None and self.model.pretrained is None:
            raise ConfigError(
                "init=calibrate fits the new projections to those of a checkpoint: name one with model.pretrained, or "
                "leave init out"
            )
        self.training.check()
