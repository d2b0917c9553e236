"""The whole of a language-model training: text, tokenizer, blocks, model, training, perplexity, results.

`run` is what scripts/train_mlm.py calls; it can be called from Python as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attnpatch.experiments.language_models.blocks import BlockCollator, Blocks, FixedBlocks, make_blocks
from attnpatch.experiments.language_models.bpe import build_byte_level
from attnpatch.experiments.language_models.config import MaskingConfig, MLMTrainingConfig
from attnpatch.experiments.language_models.model import build_language_model
from attnpatch.experiments.language_models.text import LineText, load_text, merge_text
from attnpatch.training.batching import SentenceBatchSampler
from attnpatch.training.distribution import releases_folders
from attnpatch.training.files import sha256_lines
from attnpatch.training.modeling import checkpoint_identity
from attnpatch.training.results import count_parameters
from attnpatch.training.run_folder import FREE_TRAINING, identity, resume_point
from attnpatch.training.runs import (
    Run,
    build_trainer,
    check_dev,
    given_tokenizer,
    start_run,
    tokens_of,
    train_and_score,
    training_arguments,
)
from attnpatch.training.tokenizers import load_fast_tokenizer

EXPERIMENTS = {"masked": "mlm", "causal": "clm"}
# Settings that do not change what is trained: they may differ when a run is resumed.
FREE_SETTINGS = {
    "output": None,
    "training": FREE_TRAINING | {"eval_batch_size"},
    "data": {"dir", "test", "about", "max_test_lines", "streaming"},
}


@releases_folders
def run(config: MLMTrainingConfig) -> dict[str, Any]:
    """Trains and scores as `config` says, and returns what stands in results.json.

    Raises an AttnpatchError with one sentence for anything a person can mend.
    """
    run = start_run(config)
    texts = {split: load_text(config.data, split) for split in ("train", "dev", "test")}
    train = merge_text(texts["train"], "train")
    dev = merge_text(texts["dev"], "dev") if texts["dev"] else None
    check_dev(config, dev)
    pretrained = checkpoint_identity(config)
    known_as = identity(config, FREE_SETTINGS, [file["text_sha256"] for file in train.files], pretrained)
    checkpoint = resume_point(config, run.out, known_as, run.state)
    with run.state.main_process_first():
        tokenizer = _tokenizer(config, train, run.out)
    masking = config.masking if config.model.objective == "masked" else None
    blocks = _blocks(config, tokenizer, masking, train, training=True)
    dev_blocks = _blocks(config, tokenizer, masking, dev) if dev else None
    tests = {text.name: _blocks(config, tokenizer, masking, text) for text in texts["test"]}
    sizes = [f"{len(test):,} of {name}" for name, test in tests.items()]
    run.say(
        f"data: {len(blocks):,} training blocks of {config.data.block_size} tokens, "
        f"{len(dev_blocks) if dev_blocks else 0:,} dev blocks, test {', '.join(sizes) or 'none'}; "
        f"vocabulary {len(tokenizer):,}"
    )

    from transformers import set_seed

    set_seed(config.seed)
    model = build_language_model(config, tokenizer)
    dev_set = FixedBlocks(dev_blocks, tokenizer, masking) if dev_blocks else None
    trainer = _trainer(run, model, tokenizer, blocks, dev_set)
    run.say(
        f"model: {type(model).__name__}, {count_parameters(model)['trainable']:,} trainable parameters, spec "
        f"{config.spec or 'stock'}, precision {'bf16' if trainer.args.bf16 else 'fp32'}, "
        f"{torch.get_num_threads()} threads; {len(trainer.train_sampler)} batches an epoch over "
        f"{run.state.num_processes} process(es)"
    )

    def score(name: str, test: Blocks) -> tuple[dict[str, Any], str]:
        scores = trainer.score(FixedBlocks(test, tokenizer, masking)) | {"blocks": len(test)}
        return scores, f"{name}: perplexity {scores['perplexity']:.3f} over {scores['predicted_tokens']:,} tokens"

    held = {"train": {"train": blocks}, "dev": {"dev": dev_blocks} if dev_blocks else {}, "test": tests}
    return train_and_score(
        run,
        trainer,
        checkpoint,
        EXPERIMENTS[config.model.objective],
        lambda: _describe(trainer, tokenizer, texts, held) | ({"pretrained": pretrained} if pretrained else {}),
        list(tests.items()),
        score,
    )


def _tokenizer(config: MLMTrainingConfig, train: LineText, out: Path) -> Any:
    given = given_tokenizer(config, load_fast_tokenizer)
    if given is not None:
        return given
    return build_byte_level(config.tokenizer, train.lines, out / "tokenizer", config.data.block_size)


def _blocks(
    config: MLMTrainingConfig, tokenizer: Any, masking: MaskingConfig | None, text: LineText, training: bool = False
) -> Blocks:
    words = masking is not None and masking.whole_words
    return make_blocks(text, tokenizer, config.data.block_size, keep_last=not training, words=words)


def _trainer(run: Run, model: Any, tokenizer: Any, blocks: Blocks, dev: FixedBlocks | None) -> Any:
    from transformers import TrainingArguments

    from attnpatch.experiments.language_models.trainer import LanguageModelTrainer

    config: MLMTrainingConfig = run.config
    args = training_arguments(TrainingArguments, config)
    lengths = [config.data.block_size] * len(blocks)
    sampler = SentenceBatchSampler(lengths, config.training.batch_size, config.seed, args.world_size, group=False)
    masking = config.masking if config.model.objective == "masked" else None
    return build_trainer(
        LanguageModelTrainer,
        config,
        args,
        model,
        sampler,
        run.started,
        train_dataset=blocks,
        eval_dataset=dev,
        processing_class=tokenizer,
        collator=BlockCollator(blocks, tokenizer, masking, config.seed, lambda: sampler.epoch),
        eval_batch_size=config.training.eval_batch_size,
    )


def _describe(
    trainer: Any, tokenizer: Any, texts: dict[str, list[LineText]], held: dict[str, dict[str, Blocks]]
) -> dict[str, Any]:
    read, predicted, seconds = tokens_of(trainer)
    return {
        "tokens": {
            "read": read,
            "predicted": predicted,
            "read_per_second": round(read / seconds, 1),
            "counted": "tokens without padding, <s> and </s> included, of all processes over train_seconds",
        },
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "vocabulary": len(tokenizer),
            "sha256": sha256_lines([tokenizer.backend_tokenizer.to_str()]),
        },
        "data": {
            split: [{"name": text.name, "lines": len(text), "files": text.files} for text in parts]
            for split, parts in texts.items()
        },
        "blocks": {
            split: {name: {"blocks": len(part), "tokens": part.tokens} for name, part in parts.items()}
            for split, parts in held.items()
        },
    }
