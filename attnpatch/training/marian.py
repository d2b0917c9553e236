"""The whole of a Marian training: data, tokenizer, model, training, test, results.

`run` is what scripts/train_marian.py calls; it can be called from Python as well.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from attnpatch.atomic import write_json, write_text, writing_aside
from attnpatch.auxiliary import has_loss_hooks
from attnpatch.environment import available_cpus, cpu_has_bf16, machine, versions
from attnpatch.errors import unknown
from attnpatch.training.batching import SentenceBatchSampler, TokenBatchSampler, TranslationCollator
from attnpatch.training.checkpoints import last_complete, load_weights, read_record
from attnpatch.training.config import MarianTrainingConfig
from attnpatch.training.data import ParallelText, load_split, merge
from attnpatch.training.errors import ConfigError, TrainingError
from attnpatch.training.files import read_json
from attnpatch.training.modeling import build_model
from attnpatch.training.results import count_parameters, write_results
from attnpatch.training.tokenizer import build_tokenizer, encode, load_tokenizer

RUN_FILE = "run.json"
# Settings that do not change what is trained: they may differ when a run is resumed.
FREE_SETTINGS = {
    "output": None,
    "generation": None,
    "training": {"resume", "log_every", "keep_checkpoints", "final", "average", "threads"},
    "data": {"dir", "test", "about", "max_test_pairs"},
}
TOKENS = "non-padding tokens, </s> included, of all processes over train_seconds"


def run(config: MarianTrainingConfig) -> dict[str, Any]:
    """Trains and scores as `config` says, and returns what stands in results.json.

    Raises an AttnpatchError with one sentence for anything a person can mend.
    """
    started = time.perf_counter()
    _prepare_process(config)
    from accelerate import PartialState

    state = PartialState(cpu=config.training.device == "cpu" or not torch.cuda.is_available())
    out = Path(config.output.dir)
    say = _speaker(config, state.is_main_process)

    texts = {split: load_split(config.data, split) for split in ("train", "dev")}
    texts["test"] = load_split(config.data, "test") if config.generation.test else []
    train = merge(texts["train"], "train")
    dev = merge(texts["dev"], "dev") if texts["dev"] else None
    if dev is None and config.training.evaluate_every != "never":
        raise TrainingError("data.dev is empty: name a dev set, or set training.evaluate_every=never")
    say(f"data: {len(train):,} training pairs, {len(dev) if dev else 0:,} dev pairs, " + _count(texts["test"]))

    checkpoint = _resume_point(config, out, train, state)
    with state.main_process_first():
        tokenizer = _tokenizer(config, train, out)
    from transformers import set_seed

    set_seed(config.seed)
    model = build_model(config, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    rows = _dataset(config, tokenizer, train, positions, training=True)
    dev_rows = _dataset(config, tokenizer, dev, positions) if dev else None
    trainer = _trainer(config, model, tokenizer, rows, dev_rows, dev)
    parameters = count_parameters(model)
    say(
        f"model: {parameters['trainable']:,} trainable parameters, vocabulary {model.config.vocab_size:,}, "
        f"spec {config.spec or 'stock'}, precision {'bf16' if trainer.args.bf16 else 'fp32'}, "
        f"{torch.get_num_threads()} threads"
    )
    say(f"batches: {len(trainer.train_sampler)} an epoch over {state.num_processes} process(es)")
    setup_seconds = time.perf_counter() - started

    trained = _train(trainer, checkpoint, say)
    final = _final_weights(config, trainer, out, trained, say)
    if state.is_main_process:
        with writing_aside(out / "model") as folder:
            trainer.model.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
    state.wait_for_everyone()

    results = _describe(config, trainer, parameters, texts, final)
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


def _prepare_process(config: MarianTrainingConfig) -> None:
    """Threads and log levels. `accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise, which would leave
    all CPUs but one idle."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    torch.set_num_threads(config.training.threads or max(available_cpus() // max(local, 1), 1))
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _speaker(config: MarianTrainingConfig, main: bool) -> Any:
    def say(line: str) -> None:
        if main and not config.output.quiet:
            print(line, flush=True)

    return say


def _count(texts: list[ParallelText]) -> str:
    return "test " + (", ".join(f"{text.name} ({len(text):,})" for text in texts) or "none")


def _identity(config: MarianTrainingConfig, train: ParallelText) -> dict[str, Any]:
    """What must be equal for a run to be resumed: all settings that bear on training, and the training text."""
    tree = config.as_dict()
    for section, free in FREE_SETTINGS.items():
        if free is None:
            del tree[section]
        else:
            tree[section] = {key: value for key, value in tree[section].items() if key not in free}
    tree["training_text"] = [file["sha256"] for file in train.files]
    return tree


def _resume_point(config: MarianTrainingConfig, out: Path, train: ParallelText, state: Any) -> Path | None:
    identity = _identity(config, train)
    checkpoint = last_complete(out)
    known: Any = None
    if (out / RUN_FILE).is_file():
        known = read_json(out / RUN_FILE)
    if config.training.resume == "never":
        if known is not None and not config.output.overwrite:
            raise TrainingError(
                f"{out} already holds a run: choose another output.dir, resume it (training.resume=auto), or set "
                "output.overwrite=true"
            )
        checkpoint = None
        if state.is_main_process:
            _clear(out)
    elif checkpoint is not None:
        differences = _differences(known, identity)
        if differences:
            raise TrainingError(
                f"{out} holds a run with other settings ({'; '.join(differences[:4])}): choose another output.dir, or "
                "set training.resume=never output.overwrite=true to start afresh"
            )
        world = read_record(checkpoint)["world_size"]
        if world != state.num_processes:
            raise TrainingError(
                f"{checkpoint} was written by {world} process(es), this run has {state.num_processes}: resume with as "
                "many, so that the batches stay the same"
            )
    state.wait_for_everyone()
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RUN_FILE, identity, default=str)
    return checkpoint


def _clear(out: Path) -> None:
    import shutil

    from attnpatch.training.checkpoints import checkpoints

    for folder in checkpoints(out):
        shutil.rmtree(folder)
    (out / "results.json").unlink(missing_ok=True)


def _differences(known: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(known, dict) and isinstance(now, dict):
        found = []
        for key in sorted(known.keys() | now.keys()):
            found += _differences(known.get(key), now.get(key), f"{prefix}{key}.")
        return found
    return [] if known == now else [f"{prefix[:-1]}: {known!r} there, {now!r} here"]


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


def use_bf16(precision: str, on_cpu: bool) -> bool:
    """Whether to train under bfloat16 autocast; `auto` asks the hardware."""
    if precision != "auto":
        return precision == "bf16"
    return cpu_has_bf16() if on_cpu else torch.cuda.is_bf16_supported()


def _check_reporters(names: list[str]) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(unknown("value for output.report_to:", name, INTEGRATION_TO_CALLBACK))
    if "tensorboard" in names and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        raise TrainingError("output.report_to=tensorboard needs the tensorboard package: pip install tensorboard")


def _arguments(config: MarianTrainingConfig) -> Any:
    from transformers import Seq2SeqTrainingArguments

    training = config.training
    _check_reporters(config.output.report_to)
    on_cpu = training.device == "cpu" or not torch.cuda.is_available()

    def when(value: int | str) -> tuple[str, int]:
        names = {"epoch": "epoch", "never": "no"}
        return (names[value], 500) if isinstance(value, str) else ("steps", value)

    evaluate, eval_steps = when(training.evaluate_every)
    save, save_steps = when(training.save_every)
    return Seq2SeqTrainingArguments(
        output_dir=config.output.dir,
        per_device_train_batch_size=training.batch_size,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule if training.schedule != "constant" else "constant_with_warmup",
        warmup_steps=training.warmup_steps,
        optim=training.optimizer,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip_norm,
        label_smoothing_factor=0.0,  # the trainer smooths by itself
        bf16=use_bf16(training.precision, on_cpu),
        use_cpu=on_cpu,
        **({"gradient_checkpointing": True} if training.gradient_checkpointing else {}),
        torch_compile=training.compile,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=training.ddp_find_unused_parameters,
        logging_strategy="steps",
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        eval_strategy=evaluate,
        eval_steps=eval_steps,
        save_strategy=save,
        save_steps=save_steps,
        save_total_limit=None,  # the trainer deletes old checkpoints once the new one is whole
        metric_for_best_model="loss" if evaluate != "no" else None,
        greater_is_better=False,
        predict_with_generate=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=not on_cpu,
        report_to=config.output.report_to or "none",
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=True,
    )


def _trainer(
    config: MarianTrainingConfig, model: Any, tokenizer: Any, rows: Any, dev_rows: Any, dev: ParallelText | None
) -> Any:
    from transformers import PrinterCallback

    from attnpatch.training.callbacks import ClockCallback, EpochCallback, LineCallback, TrainerAware
    from attnpatch.training.trainer import TranslationTrainer

    args = _arguments(config)
    sampler = _sampler(config, rows, args.world_size)
    per_process = len(sampler) // args.world_size
    callbacks = [EpochCallback(sampler, math.ceil(per_process / args.gradient_accumulation_steps)), ClockCallback()]
    if not config.output.quiet:
        callbacks.append(LineCallback())
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
    )
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        if isinstance(callback, TrainerAware):
            callback.trainer = trainer
    return trainer


def _train(trainer: Any, checkpoint: Path | None, say: Any) -> bool:
    """Trains, from the checkpoint if there is one. False: there was nothing left to train, the model is untouched."""
    from attnpatch.training.checkpoints import step_of
    from attnpatch.training.trainer import Progress

    if checkpoint is None:
        trainer.train()
        return True
    step = step_of(checkpoint)
    trainer.progress = Progress(**read_record(checkpoint)["progress"])
    if step >= planned_steps(trainer):
        # Trainer would take one more step before it saw that there are none left.
        say(f"training was finished at step {step}: {checkpoint}")
        from transformers import TrainerState

        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return False
    trainer.progress.resumed_at.append(step)
    say(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return True


def planned_steps(trainer: Any) -> int:
    """Optimiser steps of the whole run."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = len(trainer.train_sampler) // args.world_size
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def _final_weights(config: MarianTrainingConfig, trainer: Any, out: Path, trained: bool, say: Any) -> list[str]:
    """Puts the weights that the run ends with into the model; returns the names of their checkpoints."""
    from attnpatch.training.checkpoints import checkpoints, is_complete

    whole = [folder for folder in checkpoints(out) if is_complete(folder)]
    choice = config.training.final
    chosen: list[Path] = []
    if choice == "best" and trainer.state.best_model_checkpoint:
        best = out / Path(trainer.state.best_model_checkpoint).name  # by name: the folder may have been moved
        chosen = [best] if best in whole else []
    elif choice == "average":
        chosen = whole[-config.training.average :]
    if not chosen and not trained:
        chosen = whole[-1:]
    if chosen:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        load_weights(model, chosen)
        say(f"final weights ({choice}): {', '.join(folder.name for folder in chosen)}")
    return [folder.name for folder in chosen]


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
    path = out / f"{Path(text.name).name}.hypotheses.{config.data.target_lang}"
    scores["hypotheses"] = path.name
    if main:
        write_text(path, "".join(f"{' '.join(line.split())}\n" for line in hypotheses))
    return scores


def _describe(
    config: MarianTrainingConfig,
    trainer: Any,
    parameters: dict[str, int],
    texts: dict[str, list[ParallelText]],
    final: list[str],
) -> dict[str, Any]:
    progress = trainer.progress_now()
    history = trainer.state.log_history
    tokens = torch.tensor([progress.source_tokens, progress.target_tokens], device=trainer.args.device)
    source, target = trainer.accelerator.reduce(tokens, "sum").tolist()
    seconds = max(progress.train_seconds, 1e-9)
    model_config = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).config
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {
        "experiment": "translation",
        "spec": getattr(model_config, "attnpatch", None) or "stock",
        "seed": config.seed,
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "final_train_loss": losses[-1] if losses else None,
        "dev": [
            {key.removeprefix("eval_"): entry[key] for key in entry if key.startswith("eval_")}
            | {"step": entry["step"], "epoch": entry.get("epoch")}
            for entry in history
            if "eval_loss" in entry
        ],
        "final_weights": final or ["the model as it was when training ended"],
        "resumed_at": progress.resumed_at,
        "seconds": {
            "train": round(progress.train_seconds, 2),
            "eval": round(progress.eval_seconds, 2),
            "save": round(progress.save_seconds, 2),
        },
        "tokens": {
            "source": source,
            "target": target,
            "target_per_second": round(target / seconds, 1),
            "source_and_target_per_second": round((source + target) / seconds, 1),
            "counted": TOKENS,
        },
        "precision": "bf16 autocast" if trainer.args.bf16 else "fp32",
        "processes": trainer.args.world_size,
        "versions": versions(),
        "machine": machine(),
        "data": {
            split: [
                {"name": text.name, "pairs": len(text), "skipped_empty": text.skipped, "files": text.files}
                for text in parts
            ]
            for split, parts in texts.items()
        },
        "config": config.as_dict(),
    }
