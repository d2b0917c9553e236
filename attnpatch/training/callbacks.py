"""What happens beside the steps: the sampler's epoch, and lines on the screen."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback

from attnpatch.training.batching import TokenBatchSampler
from attnpatch.training.run_trainer import RunTrainer


class EpochCallback(TrainerCallback):
    """Tells the sampler which epoch begins, also in a resumed run whose loader wraps it several times over."""

    def __init__(self, sampler: TokenBatchSampler, steps_per_epoch: int) -> None:
        self.sampler = sampler
        self.steps_per_epoch = steps_per_epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(state.global_step // self.steps_per_epoch)


class TrainerAware(TrainerCallback):
    """A callback that knows its trainer; `trainer` is set once that exists."""

    trainer: RunTrainer | None = None


class ClockCallback(TrainerAware):
    """Starts and stops the trainer's clock."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is not None:
            self.trainer.start_clock()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is not None:
            self.trainer.stop_clock()


class PauseCallback(TrainerAware):
    """Ends training with a checkpoint at the first step behind a point in time (of time.perf_counter())."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        late = torch.tensor(int(time.perf_counter() >= self.deadline), device=args.device)
        if args.world_size > 1 and self.trainer is not None:
            # All processes stop at the same step, or the others would wait for ever.
            late = self.trainer.accelerator.reduce(late, "sum")
        if int(late) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class LineCallback(TrainerAware):
    """One line for each log: step, epoch, loss, learning rate, and tokens a second since the last line."""

    def __init__(self) -> None:
        self._last = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._speed()

    def _speed(self) -> float:
        """Tokens of this process a second of training since the last call."""
        if self.trainer is None:
            return 0.0
        now, count = self.trainer.progress_now().train_seconds, self.trainer.progress_tokens
        seconds, tokens = self._last
        self._last = (now, count)
        return (count - tokens) / max(now - seconds, 1e-9)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        at = f"step {state.global_step}/{state.max_steps} epoch {state.epoch or 0:.2f}"
        if "loss" in logs:
            line = f"{at}  loss {logs['loss']:.4f}  lr {logs.get('learning_rate', 0):.2e}"
            if "grad_norm" in logs:
                line += f"  grad norm {logs['grad_norm']:.2f}"
            if "auxiliary_loss" in logs:
                line += f"  auxiliary {logs['auxiliary_loss']:.4f}"
            unit = "tokens" if self.trainer is None else self.trainer.progress_unit
            print(f"{line}  {self._speed():,.0f} {unit}/s", flush=True)
        elif "eval_loss" in logs:
            scores = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
            print(f"{at}  dev " + "  ".join(f"{name} {value:.5g}" for name, value in scores.items()), flush=True)
