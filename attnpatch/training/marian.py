"""The whole of a Marian training: data, tokenizer, model, training, test, results.

`run` is what scripts/train_marian.py calls; it can be called from Python as well.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from attnpatch.atomic import write_text, writing_aside
from attnpatch.auxiliary import has_loss_hooks
from attnpatch.training.batching import SentenceBatchSampler, TokenBatchSampler, TranslationCollator
from attnpatch.training.calibration import calibrates, patch_calibrated
from attnpatch.training.config import MarianTrainingConfig
from attnpatch.training.data import ParallelText, load_split, merge
from attnpatch.training.errors import TrainingError
from attnpatch.training.modeling import build_model, checkpoint_identity
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
from attnpatch.training.tokenizer import build_tokenizer, encode, load_tokenizer

# Settings that do not change what is trained: they may differ when a run is resumed.
FREE_SETTINGS = {
    "output": None,
    "generation": None,
    "training": FREE_TRAINING,
    "data": {"dir", "test", "about", "max_test_pairs"},
}
TOKENS = "non-padding tokens, </s> included, of all processes over train_seconds"


def run(config: MarianTrainingConfig) -> dict[str, Any]:
    """Trains and scores as `config` says, and returns what stands in results.json.

    Raises an AttnpatchError with one sentence for anything a person can mend.
    """
    started = time.perf_counter()
    prepare_process(config.training)
    state = process_state(config.training)
    out = Path(config.output.dir)
    say = speaker(config.output.quiet, state.is_main_process)

    texts = {split: load_split(config.data, split) for split in ("train", "dev")}
    texts["test"] = load_split(config.data, "test") if config.generation.test else []
    train = merge(texts["train"], "train")
    dev = merge(texts["dev"], "dev") if texts["dev"] else None
    if dev is None and config.training.evaluate_every != "never":
        raise TrainingError("data.dev is empty: name a dev set, or set training.evaluate_every=never")
    say(f"data: {len(train):,} training pairs, {len(dev) if dev else 0:,} dev pairs, " + _count(texts["test"]))

    pretrained = checkpoint_identity(config)
    checkpoint = resume_point(
        config, out, identity(config, FREE_SETTINGS, [file["sha256"] for file in train.files]), state
    )
    with state.main_process_first():
        tokenizer = _tokenizer(config, train, out)
    from transformers import set_seed

    set_seed(config.seed)
    model = build_model(config, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    rows = _dataset(config, tokenizer, train, positions, training=True)
    calibration = patch_calibrated(config, model, rows) if calibrates(config) else None
    if calibration is not None:
        say("; ".join(calibration["notes"]))
    dev_rows = _dataset(config, tokenizer, dev, positions) if dev else None
    trainer = _trainer(config, model, tokenizer, rows, dev_rows, dev, started)
    parameters = count_parameters(model)
    say(
        f"model: {parameters['trainable']:,} trainable parameters, vocabulary {model.config.vocab_size:,}, "
        f"spec {config.spec or 'stock'}, precision {'bf16' if trainer.args.bf16 else 'fp32'}, "
        f"{torch.get_num_threads()} threads"
    )
    say(f"batches: {len(trainer.train_sampler)} an epoch over {state.num_processes} process(es)")
    setup_seconds = time.perf_counter() - started

    trained = run_training(trainer, checkpoint, say)
    final = final_weights(config.training, trainer, out, trained, say)
    if state.is_main_process:
        with writing_aside(out / "model") as folder:
            trainer.model.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
    state.wait_for_everyone()

    results = _describe(config, trainer, parameters, texts, final, started)
    if calibration is not None:
        results["calibration"] = calibration
    if pretrained is not None:
        results["pretrained"] = pretrained
    results["scores"] = {}
    results["seconds"]["setup"] = round(setup_seconds, 2)
    test_started = time.perf_counter()
    for text in texts["test"]:
        scores = _score(config, trainer, tokenizer, text, out, state.is_main_process)
        results["scores"][text.name] = scores
        say(f"{text.name}: BLEU {scores['bleu']:.2f}  chrF {scores['chrf']:.2f}  ({scores['bleu_signature']})")
    results["seconds"]["test"] = round(time.perf_counter() - test_started, 2)
    results["seconds"]["this_process"] = round(time.perf_counter() - started, 2)
    if state.is_main_process:
        say(f"results: {write_results(out, results)}")
    state.wait_for_everyone()
    return results


def _count(texts: list[ParallelText]) -> str:
    return "test " + (", ".join(f"{text.name} ({len(text):,})" for text in texts) or "none")


def _tokenizer(config: MarianTrainingConfig, train: ParallelText, out: Path) -> Any:
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path)
    if config.model.pretrained is not None:
        kwargs = {"revision": config.model.revision} if config.model.revision else {}
        return load_tokenizer(config.model.pretrained, **kwargs)
    languages = (config.data.source_lang, config.data.target_lang)
    return build_tokenizer(
        config.tokenizer, train.sources, train.targets, languages, out / "tokenizer", config.model.max_positions
    )


def _dataset(
    config: MarianTrainingConfig, tokenizer: Any, text: ParallelText, positions: int, training: bool = False
) -> Any:
    """A datasets.Dataset of token ids, tokenised once: input_ids, labels, and their lengths."""
    import datasets

    # A model without so many positions cannot read more.
    limits = [min(n, positions) for n in (config.data.max_source_length, config.data.max_target_length)]
    extra = 1 if training and config.data.too_long == "skip" else 0
    sources = encode(tokenizer, text.sources, limits[0] + extra)
    targets = encode(tokenizer, text.targets, limits[1] + extra, target=True)
    pairs = [(a, b) for a, b in zip(sources, targets, strict=True) if len(a) < limits[0] + 1 and len(b) < limits[1] + 1]
    if not pairs:
        raise TrainingError(f"no pair of {text.name} is within data.max_source_length and data.max_target_length")
    return datasets.Dataset.from_dict(
        {
            "input_ids": [a for a, _ in pairs],
            "labels": [b for _, b in pairs],
            "source_length": [len(a) for a, _ in pairs],
            "target_length": [len(b) for _, b in pairs],
        }
    )


def _sampler(config: MarianTrainingConfig, rows: Any, processes: int) -> TokenBatchSampler:
    lengths = [max(a, b) for a, b in zip(rows["source_length"], rows["target_length"], strict=True)]
    training = config.training
    if training.batching == "tokens":
        return TokenBatchSampler(lengths, training.max_tokens, config.seed, processes)
    return SentenceBatchSampler(lengths, training.batch_size, config.seed, processes, training.group_by_length)


def _trainer(
    config: MarianTrainingConfig,
    model: Any,
    tokenizer: Any,
    rows: Any,
    dev_rows: Any,
    dev: ParallelText | None,
    started: float,
) -> Any:
    from transformers import Seq2SeqTrainingArguments

    from attnpatch.training.trainer import TranslationTrainer

    args = training_arguments(Seq2SeqTrainingArguments, config, predict_with_generate=True)
    sampler = _sampler(config, rows, args.world_size)
    callbacks = callbacks_for(config, sampler, args, started)
    dev_scores = None
    if config.generation.dev_bleu and dev is not None:

        def dev_scores(trainer: Any) -> dict[str, float]:
            scores = _translate_and_score(config, trainer, tokenizer, dev_rows, dev, config.generation.dev_beams)[1]
            return {"bleu": scores["bleu"], "chrf": scores["chrf"]}

    trainer = TranslationTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=dev_rows,
        processing_class=tokenizer,
        callbacks=callbacks,
        train_sampler=sampler,
        collator=TranslationCollator(model.config.pad_token_id, model.config.decoder_start_token_id),
        label_smoothing=config.training.label_smoothing,
        # A checkpoint may be patched without the config naming a spec.
        auxiliary=has_loss_hooks(model),
        eval_max_tokens=config.generation.max_tokens,
        keep_checkpoints=config.training.keep_checkpoints,
        dev_scores=dev_scores,
        fused_decoding=config.training.attention == "auto",
    )
    connect(trainer, callbacks)
    return trainer


def _translate_and_score(
    config: MarianTrainingConfig, trainer: Any, tokenizer: Any, rows: Any, text: ParallelText, beams: int
) -> tuple[list[str], dict[str, Any]]:
    from attnpatch.training.metrics import score_translations

    generation = config.generation
    ids = trainer.translate(rows, generation.max_tokens, num_beams=beams, max_length=generation.max_length)
    hypotheses = tokenizer.batch_decode(ids, skip_special_tokens=True)
    scores = score_translations(hypotheses, text.references, generation.lowercase, generation.tokenize)
    scores["num_beams"] = beams
    scores["max_length"] = generation.max_length
    return hypotheses, scores


def _score(
    config: MarianTrainingConfig, trainer: Any, tokenizer: Any, text: ParallelText, out: Path, main: bool
) -> dict[str, Any]:
    positions = getattr(trainer.model.config, "max_position_embeddings", None) or 10**9
    rows = _dataset(config, tokenizer, text, positions)
    started = time.perf_counter()
    hypotheses, scores = _translate_and_score(config, trainer, tokenizer, rows, text, config.generation.num_beams)
    scores["seconds"] = round(time.perf_counter() - started, 2)
    stem = Path(text.name).name
    scores["hypotheses"] = f"{stem}.hypotheses.{config.data.target_lang}"
    scores["bleu_statistics"] = f"{stem}.bleu.tsv.gz"
    if main:
        from attnpatch.training.bleu_statistics import bleu_statistics, write_statistics

        lines = [" ".join(line.split()) for line in hypotheses]
        write_text(out / scores["hypotheses"], "".join(f"{line}\n" for line in lines))
        generation = config.generation
        rows = bleu_statistics(hypotheses, text.references, generation.lowercase, generation.tokenize)
        write_statistics(out / scores["bleu_statistics"], rows)
    return scores


def _describe(
    config: MarianTrainingConfig,
    trainer: Any,
    parameters: dict[str, int],
    texts: dict[str, list[ParallelText]],
    final: list[str],
    started: float,
) -> dict[str, Any]:
    progress = trainer.progress_now()
    tokens = torch.tensor([progress.source_tokens, progress.target_tokens], device=trainer.args.device)
    source, target = trainer.accelerator.reduce(tokens, "sum").tolist()
    seconds = max(progress.train_seconds, 1e-9)
    return describe_run("translation", config, trainer, parameters, final, started) | {
        "tokens": {
            "source": source,
            "target": target,
            "target_per_second": round(target / seconds, 1),
            "source_and_target_per_second": round((source + target) / seconds, 1),
            "counted": TOKENS,
        },
        "data": {
            split: [
                {"name": text.name, "pairs": len(text), "skipped_empty": text.skipped, "files": text.files}
                for text in parts
            ]
            for split, parts in texts.items()
        },
    }
