"""What every training run shares: its process, its folder and how it is resumed, its arguments, its final weights."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from attnpatch.atomic import write_json
from attnpatch.environment import available_cpus, cpu_has_bf16, machine, versions
from attnpatch.errors import unknown
from attnpatch.training.checkpoints import checkpoints, is_complete, last_complete, load_weights, read_record, step_of
from attnpatch.training.config import CommonTraining
from attnpatch.training.errors import ConfigError, RunPaused, TrainingError
from attnpatch.training.files import read_json

RUN_FILE = "run.json"
FREE_TRAINING = {"resume", "log_every", "keep_checkpoints", "final", "average", "threads", "stop_after_minutes"}
"""Keys of `training` that do not change what is trained."""

Say = Callable[[str], None]


def prepare_process(training: CommonTraining) -> None:
    """Threads and log levels. `accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise, which would leave
    all CPUs but one idle."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    torch.set_num_threads(training.threads or max(available_cpus() // max(local, 1), 1))
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def process_state(training: CommonTraining) -> Any:
    """accelerate's state of this process, on the device that the config asks for."""
    from accelerate import PartialState

    return PartialState(cpu=on_cpu(training))


def on_cpu(training: CommonTraining) -> bool:
    return training.device == "cpu" or not torch.cuda.is_available()


def speaker(quiet: bool, main: bool) -> Say:
    """Prints lines, on the main process of a run that is not quiet."""

    def say(line: str) -> None:
        if main and not quiet:
            print(line, flush=True)

    return say


# ---- the folder ----


def identity(config: Any, free: Mapping[str, set[str] | None], training_text: list[str]) -> dict[str, Any]:
    """What must be equal for a run to be resumed: all settings that bear on training, and the training text.

    `free` names the keys of each section that may differ; None is the whole section.
    """
    tree: dict[str, Any] = config.as_dict()
    for section, keys in free.items():
        if keys is None:
            del tree[section]
        else:
            tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    tree["training_text"] = training_text
    return tree


def resume_point(config: Any, out: Path, known_as: dict[str, Any], state: Any) -> Path | None:
    """The checkpoint to go on from, if any; notes in the folder what runs in it.

    Raises TrainingError when the folder holds another run.
    """
    checkpoint = last_complete(out)
    known: Any = None
    if (out / RUN_FILE).is_file():
        try:
            known = read_json(out / RUN_FILE)
        except ValueError as error:
            raise TrainingError(f"{out / RUN_FILE} is damaged ({error}): choose another output.dir") from error
    holds = checkpoint is not None or any((out / name).exists() for name in ("results.json", "model"))
    if config.training.resume == "never":
        if known is not None and not config.output.overwrite:
            raise TrainingError(
                f"{out} already holds a run: choose another output.dir, resume it (training.resume=auto), or set "
                "output.overwrite=true"
            )
        checkpoint = None
        if state.is_main_process:
            clear(out)
    elif holds:
        if known is None:
            raise TrainingError(f"{out} holds a run, but not its {RUN_FILE}: choose another output.dir")
        found = differences(known, known_as)
        if found:
            raise TrainingError(
                f"{out} holds a run with other settings ({'; '.join(found[:4])}): choose another output.dir, or "
                "set training.resume=never output.overwrite=true to start afresh"
            )
        world = read_record(checkpoint)["world_size"] if checkpoint is not None else state.num_processes
        if world != state.num_processes:
            raise TrainingError(
                f"{checkpoint} was written by {world} process(es), this run has {state.num_processes}: resume with as "
                "many, so that the batches stay the same"
            )
    state.wait_for_everyone()
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RUN_FILE, known_as, default=str)
    return checkpoint


def clear(out: Path) -> None:
    """Deletes what an earlier run left behind."""
    for folder in checkpoints(out):
        shutil.rmtree(folder)
    (out / "results.json").unlink(missing_ok=True)


def differences(known: Any, now: Any, prefix: str = "") -> list[str]:
    """Where two trees of settings differ, in words."""
    if isinstance(known, dict) and isinstance(now, dict):
        found = []
        for key in sorted(known.keys() | now.keys()):
            found += differences(known.get(key), now.get(key), f"{prefix}{key}.")
        return found
    return [] if known == now else [f"{prefix[:-1]}: {known!r} there, {now!r} here"]


# ---- arguments ----


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


def training_arguments(kind: Any, config: Any, **more: Any) -> Any:
    """transformers' arguments (`kind`: TrainingArguments or a subclass) for the settings that all runs share."""
    training: CommonTraining = config.training
    _check_reporters(config.output.report_to)
    cpu = on_cpu(training)

    def when(value: int | str) -> tuple[str, int]:
        names = {"epoch": "epoch", "never": "no"}
        return (names[value], 500) if isinstance(value, str) else ("steps", value)

    evaluate, eval_steps = when(training.evaluate_every)
    save, save_steps = when(training.save_every)
    return kind(
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
        bf16=use_bf16(training.precision, cpu),
        use_cpu=cpu,
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
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=not cpu,
        report_to=config.output.report_to or "none",
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=True,
        **more,
    )


def steps_per_epoch(sampler: Any, args: Any) -> int:
    """Optimiser steps of an epoch of one process."""
    return math.ceil(len(sampler) // args.world_size / args.gradient_accumulation_steps)


def connect(trainer: Any, callbacks: list[Any]) -> None:
    """Tells the callbacks their trainer, and keeps transformers' printer out of it."""
    from transformers import PrinterCallback

    from attnpatch.training.callbacks import TrainerAware

    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        if isinstance(callback, TrainerAware):
            callback.trainer = trainer


def callbacks_for(config: Any, sampler: Any, args: Any, started: float) -> list[Any]:
    """The callbacks of a run. `started`: time.perf_counter() at its beginning."""
    from attnpatch.training.callbacks import ClockCallback, EpochCallback, LineCallback, PauseCallback

    callbacks: list[Any] = [EpochCallback(sampler, steps_per_epoch(sampler, args)), ClockCallback()]
    if config.training.stop_after_minutes is not None:
        callbacks.append(PauseCallback(started + 60 * config.training.stop_after_minutes))
    if not config.output.quiet:
        callbacks.append(LineCallback())
    return callbacks


# ---- training ----


def train(trainer: Any, checkpoint: Path | None, say: Say) -> bool:
    """Trains, from the checkpoint if there is one. False: there was nothing left to train, the model is untouched.

    Raises RunPaused when `training.stop_after_minutes` ended it early.
    """
    from attnpatch.training.run_trainer import Progress

    if checkpoint is None:
        trainer.train()
    else:
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
    done, planned = trainer.state.global_step, planned_steps(trainer)
    if done < planned:
        raise RunPaused(f"paused at step {done} of {planned}; the same command goes on from there")
    return True


def planned_steps(trainer: Any) -> int:
    """Optimiser steps of the whole run."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = len(trainer.train_sampler) // args.world_size
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def final_weights(training: CommonTraining, trainer: Any, out: Path, trained: bool, say: Say) -> list[str]:
    """Puts the weights that the run ends with into the model; returns the names of their checkpoints."""
    whole = [folder for folder in checkpoints(out) if is_complete(folder)]
    choice = training.final
    chosen: list[Path] = []
    if choice == "best" and trainer.state.best_model_checkpoint:
        best = out / Path(trainer.state.best_model_checkpoint).name  # by name: the folder may have been moved
        chosen = [best] if best in whole else []
    elif choice == "average":
        chosen = whole[-training.average :]
    if not chosen and not trained:
        chosen = whole[-1:]
    if chosen:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        load_weights(model, chosen)
        say(f"final weights ({choice}): {', '.join(folder.name for folder in chosen)}")
    return [folder.name for folder in chosen]


# ---- results ----


def describe_run(
    experiment: str, config: Any, trainer: Any, parameters: dict[str, int], final: list[str], started: float
) -> dict[str, Any]:
    """What results.json says of every training run; data, tokens and scores are the experiment's own to add."""
    progress = trainer.progress_now()
    history = trainer.state.log_history
    model_config = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).config
    losses = [
        {"step": entry["step"], "epoch": entry.get("epoch"), "loss": entry["loss"]}
        for entry in history
        if "loss" in entry
    ]
    return {
        "experiment": experiment,
        "spec": getattr(model_config, "attnpatch", None) or "stock",
        "seed": config.seed,
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "final_train_loss": losses[-1]["loss"] if losses else None,
        "train": losses,
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
            "this_process": round(time.perf_counter() - started, 2),
        },
        "precision": "bf16 autocast" if trainer.args.bf16 else "fp32",
        "processes": trainer.args.world_size,
        "versions": versions(),
        "machine": machine(),
        "config": config.as_dict(),
    }
