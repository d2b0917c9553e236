"""What every training run shares: its process, its arguments, the training itself, its final weights and results."""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnpatch.atomic import write_json
from attnpatch.auxiliary import has_loss_hooks
from attnpatch.environment import available_cpus, cpu_has_bf16, machine, versions
from attnpatch.errors import one_line, unknown
from attnpatch.training.checkpoints import check_readable, checkpoints, is_complete, load_weights, read_record, step_of
from attnpatch.training.distribution import check_before, check_launch, zero_stage
from attnpatch.training.errors import ConfigError, RunPaused, TrainingError
from attnpatch.training.modeling import hub_arguments, on_cpu
from attnpatch.training.pretrained import checkpoint_path
from attnpatch.training.results import count_parameters, write_results
from attnpatch.training.run_config import CommonTraining
from attnpatch.training.run_folder import PAUSED_FILE, check_folder

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A run in this process."""

    config: Any
    started: float  # time.perf_counter()
    state: Any  # accelerate's PartialState
    out: Path
    say: Say


def start_run(config: Any) -> Run:
    """Sets the process up for the run of a config with `training` and `output`."""
    started = time.perf_counter()
    check_folder("output.dir", Path(config.output.dir))
    prepare_process(config.training)
    state = process_state(config.training)
    return Run(config, started, state, Path(config.output.dir), speaker(config.output.quiet, state.is_main_process))


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
    """accelerate's state of this process, on the device that the config asks for.

    Raises TrainingError when the processes are not as distributed as the launch asked for, or do not find each other.
    """
    from accelerate import PartialState

    environment = dict(os.environ)
    check_before(on_cpu(training), environment)
    try:
        state = PartialState(cpu=on_cpu(training))
    except (RuntimeError, ValueError, ImportError) as error:
        raise TrainingError(f"the processes of this run do not find each other: {one_line(error, 300)}") from error
    check_launch(state, environment)
    return state


def speaker(quiet: bool, main: bool) -> Say:
    """Prints lines, on the main process of a run that is not quiet."""

    def say(line: str) -> None:
        if main and not quiet:
            print(line, flush=True)

    return say


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
    if training.final != "last" and zero_stage(os.environ) == 3:
        raise ConfigError(
            f"training.final={training.final} reads a checkpoint back into the model, which ZeRO-3 keeps in parts: "
            "choose training.final=last, or configs/accelerate/zero2.yaml"
        )
    cpu = on_cpu(training)
    bf16 = use_bf16(training.precision, cpu)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", "bf16") or (launched == "bf16" and not bf16):
        raise ConfigError(
            f"the launch asked for mixed_precision={launched}, training.precision={training.precision} is "
            f"{'bf16' if bf16 else 'fp32'} here: say --mixed_precision no to accelerate launch, or give "
            "training.precision=bf16"
        )

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
        bf16=bf16,
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


def build_trainer(kind: Any, config: Any, args: Any, model: Any, sampler: Any, started: float, **more: Any) -> Any:
    """A RunTrainer of the class `kind` with the callbacks of a run. `more`: its other arguments."""
    callbacks = callbacks_for(config, sampler, args, started)
    trainer = kind(
        model=model,
        args=args,
        callbacks=callbacks,
        train_sampler=sampler,
        # A checkpoint may be patched without the config naming a spec.
        auxiliary=has_loss_hooks(model),
        keep_checkpoints=config.training.keep_checkpoints,
        **more,
    )
    connect(trainer, callbacks)
    return trainer


def check_dev(config: Any, dev: Any) -> None:
    """Raises TrainingError when there is no dev set to evaluate on."""
    if dev is None and config.training.evaluate_every != "never":
        raise TrainingError("data.dev is empty: name a dev set, or set training.evaluate_every=never")


def given_tokenizer(config: Any, load: Callable[..., Any]) -> Any | None:
    """The tokenizer that `tokenizer.path` or the checkpoint brings; None when one is to be made."""
    if config.tokenizer.path is not None:
        return load(config.tokenizer.path)
    if config.model.pretrained is not None:
        return load(checkpoint_path(config.model.pretrained), **hub_arguments(config))
    return None


# ---- training ----


def train(trainer: Any, checkpoint: Path | None, say: Say) -> bool:
    """Trains, from the checkpoint if there is one. False: there was nothing left to train, the model is untouched.

    Raises RunPaused when `training.stop_after_minutes` ended it early.
    """
    if checkpoint is None:
        trainer.train()
    else:
        step = step_of(checkpoint)
        trainer.take_up(read_record(checkpoint))
        if step >= planned_steps(trainer):
            # Trainer would take one more step before it saw that there are none left.
            say(f"training was finished at step {step}: {checkpoint}")
            from transformers import TrainerState

            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            return False
        trainer.progress.resumed_at.append(step)
        say(f"resuming from {checkpoint}")
        check_readable(checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint))
    done, planned = trainer.state.global_step, planned_steps(trainer)
    if done < planned:
        if trainer.is_world_process_zero():  # the launchers of several processes turn every exit code into 1
            write_json(Path(trainer.args.output_dir) / PAUSED_FILE, {"step": done, "steps": planned})
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


def train_and_score(
    run: Run,
    trainer: Any,
    checkpoint: Path | None,
    experiment: str,
    describe: Callable[[], dict[str, Any]],
    tests: Sequence[tuple[str, Any]],
    score: Callable[[str, Any], tuple[dict[str, Any], str]],
) -> dict[str, Any]:
    """The second half of a run: trains, keeps the final model, scores it, writes results.json and returns its content.

    Args:
        checkpoint: to go on from.
        describe: called when training is over; what results.json says beside `describe_run`.
        tests: the test sets and their names.
        score: the scores of one of them, and a line about them for the screen.
    """
    parameters = count_parameters(trainer.model)
    setup_seconds = time.perf_counter() - run.started
    trained = train(trainer, checkpoint, run.say)
    final = final_weights(run.config.training, trainer, run.out, trained, run.say)
    trainer.save_weights(run.out / "model")
    results = describe_run(experiment, run.config, trainer, parameters, final, run.started) | describe()
    results["scores"] = {}
    results["seconds"]["setup"] = round(setup_seconds, 2)
    test_started = time.perf_counter()
    for name, test in tests:
        results["scores"][name], line = score(name, test)
        run.say(line)
    results["seconds"]["test"] = round(time.perf_counter() - test_started, 2)
    results["seconds"]["this_process"] = round(time.perf_counter() - run.started, 2)
    if run.state.is_main_process:
        run.say(f"results: {write_results(run.out, results)}")
    run.state.wait_for_everyone()
    return results


def tokens_of(trainer: Any) -> tuple[int, int, float]:
    """Tokens read and predicted by all processes, and the seconds of training proper."""
    progress = trainer.progress_now()
    tokens = torch.tensor([progress.source_tokens, progress.target_tokens], device=trainer.args.device)
    read, predicted = trainer.accelerator.reduce(tokens, "sum").tolist()
    return read, predicted, max(progress.train_seconds, 1e-9)


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
