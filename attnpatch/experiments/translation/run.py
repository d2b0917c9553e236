"""The whole of a Marian training: data, tokenizer, model, training, test, results.

`run` is what scripts/train_marian.py calls; it can be called from Python as well.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from attnpatch.atomic import write_text
from attnpatch.experiments.translation.calibration import calibrates, patch_calibrated
from attnpatch.experiments.translation.collator import TranslationCollator
from attnpatch.experiments.translation.config import MarianTrainingConfig
from attnpatch.experiments.translation.data import ParallelText, load_split, merge
from attnpatch.experiments.translation.model import build_model
from attnpatch.experiments.translation.tokenizer import build_tokenizer, encode
from attnpatch.training.batching import SentenceBatchSampler, TokenBatchSampler
from attnpatch.training.distribution import releases_folders
from attnpatch.training.errors import TrainingError
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
from attnpatch.training.tokenizers import load_tokenizer

# Settings that do not change what is trained: they may differ when a run is resumed.
FREE_SETTINGS = {
    "output": None,
    "generation": None,
    "training": FREE_TRAINING,
    "data": {"dir", "test", "about", "max_test_pairs"},
}
TOKENS = "non-padding tokens, </s> included, of all processes over train_seconds"


@releases_folders
def run(config: MarianTrainingConfig) -> dict[str, Any]:
    """Trains and scores as `config` says, and returns what stands in results.json.

    Raises an AttnpatchError with one sentence for anything a person can mend.
    """
    run = start_run(config)
    texts = {split: load_split(config.data, split) for split in ("train", "dev")}
    texts["test"] = load_split(config.data, "test") if config.generation.test else []
    train = merge(texts["train"], "train")
    dev = merge(texts["dev"], "dev") if texts["dev"] else None
    check_dev(config, dev)
    run.say(f"data: {len(train):,} training pairs, {len(dev) if dev else 0:,} dev pairs, " + _count(texts["test"]))

    pretrained = checkpoint_identity(config)
    known_as = identity(config, FREE_SETTINGS, [file["sha256"] for file in train.files], pretrained)
    checkpoint = resume_point(config, run.out, known_as, run.state)
    with run.state.main_process_first():
        tokenizer = _tokenizer(config, train, run.out)
    from transformers import set_seed

    set_seed(config.seed)
    model = build_model(config, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    rows = _dataset(config, tokenizer, train, positions, training=True)
    calibration = patch_calibrated(config, model, rows) if calibrates(config) else None
    if calibration is not None:
        run.say("; ".join(calibration["notes"]))
    dev_rows = _dataset(config, tokenizer, dev, positions) if dev else None
    trainer = _trainer(run, model, tokenizer, rows, dev_rows, train, dev)
    run.say(
        f"model: {count_parameters(model)['trainable']:,} trainable parameters, vocabulary "
        f"{model.config.vocab_size:,}, spec {config.spec or 'stock'}, "
        f"precision {'bf16' if trainer.args.bf16 else 'fp32'}, {torch.get_num_threads()} threads"
    )
    run.say(f"batches: {len(trainer.train_sampler)} an epoch over {run.state.num_processes} process(es)")

    def score(name: str, text: ParallelText) -> tuple[dict[str, Any], str]:
        scores = _score(run, trainer, tokenizer, text)
        return scores, f"{name}: BLEU {scores['bleu']:.2f}  chrF {scores['chrf']:.2f}  ({scores['bleu_signature']})"

    def describe() -> dict[str, Any]:
        own = {"calibration": calibration, "pretrained": pretrained}
        return _describe(trainer, texts) | {key: value for key, value in own.items() if value is not None}

    tests = [(text.name, text) for text in texts["test"]]
    return train_and_score(run, trainer, checkpoint, "translation", describe, tests, score)


def _count(texts: list[ParallelText]) -> str:
    return "test " + (", ".join(f"{text.name} ({len(text):,})" for text in texts) or "none")


def _tokenizer(config: MarianTrainingConfig, train: ParallelText, out: Path) -> Any:
    given = given_tokenizer(config, load_tokenizer)
    if given is not None:
        return given
    languages = (config.data.source_lang, config.data.target_lang)
    return build_tokenizer(
        config.tokenizer, train.sources, train.targets, languages, out / "tokenizer", config.model.max_positions
    )


def _dataset(
    config: MarianTrainingConfig, tokenizer: Any, text: ParallelText, positions: int, training: bool = False
) -> Any:
    """A datasets.Dataset of token ids, tokenised once: input_ids, labels, and their lengths; of training pairs also
    the number in the text, for an error."""
    import datasets

    # A model without so many positions cannot read more.
    limits = [min(n, positions) for n in (config.data.max_source_length, config.data.max_target_length)]
    extra = 1 if training and config.data.too_long == "skip" else 0
    sources = encode(tokenizer, text.sources, limits[0] + extra)
    targets = encode(tokenizer, text.targets, limits[1] + extra, target=True)
    pairs = [
        (a, b, row)
        for row, (a, b) in enumerate(zip(sources, targets, strict=True))
        if len(a) < limits[0] + 1 and len(b) < limits[1] + 1
    ]
    if not pairs:
        raise TrainingError(f"no pair of {text.name} is within data.max_source_length and data.max_target_length")
    columns = {
        "input_ids": [a for a, _, _ in pairs],
        "labels": [b for _, b, _ in pairs],
        "source_length": [len(a) for a, _, _ in pairs],
        "target_length": [len(b) for _, b, _ in pairs],
    }
    return datasets.Dataset.from_dict(columns | ({"row": [row for _, _, row in pairs]} if training else {}))


def _sampler(config: MarianTrainingConfig, rows: Any, processes: int) -> TokenBatchSampler:
    lengths = [max(a, b) for a, b in zip(rows["source_length"], rows["target_length"], strict=True)]
    training = config.training
    if training.batching == "tokens":
        return TokenBatchSampler(lengths, training.max_tokens, config.seed, processes)
    return SentenceBatchSampler(lengths, training.batch_size, config.seed, processes, training.group_by_length)


def _trainer(
    run: Run, model: Any, tokenizer: Any, rows: Any, dev_rows: Any, train: ParallelText, dev: ParallelText | None
) -> Any:
    from transformers import Seq2SeqTrainingArguments

    from attnpatch.experiments.translation.trainer import TranslationTrainer

    config: MarianTrainingConfig = run.config
    args = training_arguments(Seq2SeqTrainingArguments, config, predict_with_generate=True)
    dev_scores = None
    if config.generation.dev_bleu and dev is not None:

        def dev_scores(trainer: Any) -> dict[str, float]:
            scores = _translate_and_score(config, trainer, tokenizer, dev_rows, dev, config.generation.dev_beams)[1]
            return {"bleu": scores["bleu"], "chrf": scores["chrf"]}

    return build_trainer(
        TranslationTrainer,
        config,
        args,
        model,
        _sampler(config, rows, args.world_size),
        run.started,
        train_dataset=rows,
        eval_dataset=dev_rows,
        processing_class=tokenizer,
        collator=TranslationCollator(model.config.pad_token_id, model.config.decoder_start_token_id),
        label_smoothing=config.training.label_smoothing,
        eval_max_tokens=config.generation.max_tokens,
        dev_scores=dev_scores,
        own_attention=config.training.attention == "auto",
        text=train,
    )


def _translate_and_score(
    config: MarianTrainingConfig, trainer: Any, tokenizer: Any, rows: Any, text: ParallelText, beams: int
) -> tuple[list[str], dict[str, Any]]:
    from attnpatch.experiments.translation.metrics import score_translations

    generation = config.generation
    ids = trainer.translate(rows, generation.max_tokens, num_beams=beams, max_length=generation.max_length)
    hypotheses = tokenizer.batch_decode(ids, skip_special_tokens=True)
    scores = score_translations(hypotheses, text.references, generation.lowercase, generation.tokenize)
    scores["num_beams"] = beams
    scores["max_length"] = generation.max_length
    return hypotheses, scores


def _score(run: Run, trainer: Any, tokenizer: Any, text: ParallelText) -> dict[str, Any]:
    config: MarianTrainingConfig = run.config
    positions = getattr(trainer.model.config, "max_position_embeddings", None) or 10**9
    rows = _dataset(config, tokenizer, text, positions)
    started = time.perf_counter()
    hypotheses, scores = _translate_and_score(config, trainer, tokenizer, rows, text, config.generation.num_beams)
    scores["seconds"] = round(time.perf_counter() - started, 2)
    scores["hypotheses"] = f"{text.stem}.hypotheses.{config.data.target_lang}"
    scores["bleu_statistics"] = f"{text.stem}.bleu.tsv.gz"
    if run.state.is_main_process:
        from attnpatch.experiments.translation.bleu_statistics import bleu_statistics, write_statistics

        lines = [" ".join(line.split()) for line in hypotheses]
        write_text(run.out / scores["hypotheses"], "".join(f"{line}\n" for line in lines))
        generation = config.generation
        counts = bleu_statistics(hypotheses, text.references, generation.lowercase, generation.tokenize)
        write_statistics(run.out / scores["bleu_statistics"], counts)
    return scores


def _describe(trainer: Any, texts: dict[str, list[ParallelText]]) -> dict[str, Any]:
    source, target, seconds = tokens_of(trainer)
    return {
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
