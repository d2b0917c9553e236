"""The whole of a language-model training: text, tokenizer, blocks, model, training, perplexity, results.

`run` is what scripts/train_mlm.py calls; it can be called from Python as well.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from attnpatch.atomic import writing_aside
from attnpatch.auxiliary import has_loss_hooks
from attnpatch.training.batching import SentenceBatchSampler
from attnpatch.training.blocks import BlockCollator, Blocks, FixedBlocks, make_blocks
from attnpatch.training.bpe import build_byte_level, load_fast_tokenizer
from attnpatch.training.errors import TrainingError
from attnpatch.training.files import sha256_lines
from attnpatch.training.lm_modeling import build_language_model
from attnpatch.training.mlm_config import MaskingConfig, MLMTrainingConfig
from attnpatch.training.results import count_parameters, write_results
from attnpatch.training.runs import (
    FREE_TRAINING,
    callbacks_for,
    connect,
    describe_run,
    final_weights,
    identity,
    prepare_process,
    process_state,
    resume_point,
    speaker,
    training_arguments,
)
from attnpatch.training.runs import train as run_training
from attnpatch.training.text import LineText, load_text, merge_text

EXPERIMENTS = {"masked": "mlm", "causal": "clm"}
# Settings that do not change what is trained: they may differ when a run is resumed.
FREE_SETTINGS = {
    "output": None,
    "training": FREE_TRAINING | {"eval_batch_size"},
    "data": {"dir", "test", "about", "max_test_lines", "streaming"},
}


def run(config: MLMTrainingConfig) -> dict[str, Any]:
    """Trains and scores as `config` says, and returns what stands in results.json.

    Raises an AttnpatchError with one sentence for anything a person can mend.
    """
    started = time.perf_counter()
    prepare_process(config.training)
    state = process_state(config.training)
    out = Path(config.output.dir)
    say = speaker(config.output.quiet, state.is_main_process)

    texts = {split: load_text(config.data, split) for split in ("train", "dev", "test")}
    train = merge_text(texts["train"], "train")
    dev = merge_text(texts["dev"], "dev") if texts["dev"] else None
    if dev is None and config.training.evaluate_every != "never":
        raise TrainingError("data.dev is empty: name a dev set, or set training.evaluate_every=never")
    known_as = identity(config, FREE_SETTINGS, [file["text_sha256"] for file in train.files])
    checkpoint = resume_point(config, out, known_as, state)
    with state.main_process_first():
        tokenizer = _tokenizer(config, train, out)
    masking = config.masking if config.model.objective == "masked" else None
    blocks = _blocks(config, tokenizer, masking, train, training=True)
    dev_blocks = _blocks(config, tokenizer, masking, dev) if dev else None
    tests = {text.name: _blocks(config, tokenizer, masking, text) for text in texts["test"]}
    sizes = [f"{len(test):,} of {name}" for name, test in tests.items()]
    say(
        f"data: {len(blocks):,} training blocks of {config.data.block_size} tokens, "
        f"{len(dev_blocks) if dev_blocks else 0:,} dev blocks, test {', '.join(sizes) or 'none'}; "
        f"vocabulary {len(tokenizer):,}"
    )

    from transformers import set_seed

    set_seed(config.seed)
    model = build_language_model(config, tokenizer)
    parameters = count_parameters(model)
    trainer = _trainer(
        config, model, tokenizer, blocks, FixedBlocks(dev_blocks, tokenizer, masking) if dev_blocks else None, started
    )
    say(
        f"model: {type(model).__name__}, {parameters['trainable']:,} trainable parameters, spec "
        f"{config.spec or 'stock'}, precision {'bf16' if trainer.args.bf16 else 'fp32'}, "
        f"{torch.get_num_threads()} threads; {len(trainer.train_sampler)} batches an epoch over "
        f"{state.num_processes} process(es)"
    )
    setup_seconds = time.perf_counter() - started

    trained = run_training(trainer, checkpoint, say)
    final = final_weights(config.training, trainer, out, trained, say)
    if state.is_main_process:
        with writing_aside(out / "model") as folder:
            trainer.model.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
    state.wait_for_everyone()

    held = {"train": {"train": blocks}, "dev": {"dev": dev_blocks} if dev_blocks else {}, "test": tests}
    results = _describe(config, trainer, tokenizer, parameters, texts, held, final, started)
    results["seconds"]["setup"] = round(setup_seconds, 2)
    test_started = time.perf_counter()
    for name, test in tests.items():
        scores = trainer.score(FixedBlocks(test, tokenizer, masking)) | {"blocks": len(test)}
        results["scores"][name] = scores
        say(f"{name}: perplexity {scores['perplexity']:.3f} over {scores['predicted_tokens']:,} tokens")
    results["seconds"]["test"] = round(time.perf_counter() - test_started, 2)
    results["seconds"]["this_process"] = round(time.perf_counter() - started, 2)
    if state.is_main_process:
        say(f"results: {write_results(out, results)}")
    state.wait_for_everyone()
    return results


def _tokenizer(config: MLMTrainingConfig, train: LineText, out: Path) -> Any:
    if config.tokenizer.path is not None:
        return load_fast_tokenizer(config.tokenizer.path)
    if config.model.pretrained is not None:
        kwargs = {"revision": config.model.revision} if config.model.revision else {}
        return load_fast_tokenizer(config.model.pretrained, **kwargs)
    return build_byte_level(config.tokenizer, train.lines, out / "tokenizer", config.data.block_size)


def _blocks(
    config: MLMTrainingConfig, tokenizer: Any, masking: MaskingConfig | None, text: LineText, training: bool = False
) -> Blocks:
    words = masking is not None and masking.whole_words
    return make_blocks(text, tokenizer, config.data.block_size, keep_last=not training, words=words)


def _trainer(
    config: MLMTrainingConfig, model: Any, tokenizer: Any, blocks: Blocks, dev: FixedBlocks | None, started: float
) -> Any:
    from transformers import TrainingArguments

    from attnpatch.training.lm_trainer import LanguageModelTrainer

    args = training_arguments(TrainingArguments, config)
    lengths = [config.data.block_size] * len(blocks)
    sampler = SentenceBatchSampler(lengths, config.training.batch_size, config.seed, args.world_size, group=False)
    callbacks = callbacks_for(config, sampler, args, started)
    masking = config.masking if config.model.objective == "masked" else None
    trainer = LanguageModelTrainer(
        model=model,
        args=args,
        train_dataset=blocks,
        eval_dataset=dev,
        processing_class=tokenizer,
        callbacks=callbacks,
        train_sampler=sampler,
        collator=BlockCollator(blocks, tokenizer, masking, config.seed, lambda: sampler.epoch),
        # A checkpoint may be patched without the config naming a spec.
        auxiliary=has_loss_hooks(model),
        keep_checkpoints=config.training.keep_checkpoints,
        eval_batch_size=config.training.eval_batch_size,
    )
    connect(trainer, callbacks)
    return trainer


def _describe(
    config: MLMTrainingConfig,
    trainer: Any,
    tokenizer: Any,
    parameters: dict[str, int],
    texts: dict[str, list[LineText]],
    held: dict[str, dict[str, Blocks]],
    final: list[str],
    started: float,
) -> dict[str, Any]:
    progress = trainer.progress_now()
    tokens = torch.tensor([progress.source_tokens, progress.target_tokens], device=trainer.args.device)
    read, predicted = trainer.accelerator.reduce(tokens, "sum").tolist()
    seconds = max(progress.train_seconds, 1e-9)
    experiment = EXPERIMENTS[config.model.objective]
    return describe_run(experiment, config, trainer, parameters, final, started) | {
        "scores": {},
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
