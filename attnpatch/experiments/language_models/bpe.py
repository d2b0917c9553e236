"""A byte-level BPE trained on the spot: a real RoBERTa tokenizer (<s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from attnpatch.experiments.language_models.config import ByteLevelConfig
from attnpatch.training.errors import ConfigError
from attnpatch.training.files import sha256_lines
from attnpatch.training.tokenizers import load_fast_tokenizer, made_once

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"


def build_byte_level(config: ByteLevelConfig, lines: Sequence[str], folder: str | Path, block_size: int) -> Any:
    """Trains a BPE on `lines` and returns a RobertaTokenizerFast saved in `folder`.

    One that is there already is used again when it was made from the same text with the same settings.
    """
    folder = Path(folder)
    key = {
        "text_sha256": sha256_lines(lines),
        "settings": [config.vocab_size, config.min_frequency],
        "block_size": block_size,
    }
    return made_once(
        folder, key, load_fast_tokenizer, lambda aside: _train(config, lines, block_size).save_pretrained(str(aside))
    )


def _train(config: ByteLevelConfig, lines: Sequence[str], block_size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - 1,  # <mask> is ours, behind the rest
        min_frequency=config.min_frequency,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_without_special(lines), trainer=trainer, length=len(lines))
    model = json.loads(bpe.to_str())["model"]
    vocabulary = model["vocab"]
    if len(vocabulary) < config.vocab_size - 1:
        raise ConfigError(
            f"tokenizer.vocab_size={config.vocab_size}: {len(lines)} lines of text give only {len(vocabulary) + 1} "
            f"tokens with tokenizer.min_frequency={config.min_frequency}; choose tokenizer.vocab_size="
            f"{len(vocabulary) + 1} or less"
        )
    vocabulary[MASK] = len(vocabulary)
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return RobertaTokenizerFast(vocab=vocabulary, merges=merges, model_max_length=block_size)


def _without_special(lines: Sequence[str]) -> Iterator[str]:
    """WikiText spells unknown words <unk>, which is a token already and must not become pieces."""
    for line in lines:
        for token in (*SPECIAL, MASK):
            line = line.replace(token, " ")
        yield line + "\n"
