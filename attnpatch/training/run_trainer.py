"""The Trainer under every run: losses per item, one auxiliary loss, a clock, whole checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from attnpatch.atomic import writing_aside
from attnpatch.training.batching import TokenBatchSampler
from attnpatch.training.checkpoints import mark_complete, rotate
from attnpatch.training.distribution import SHARDING, check_accelerator
from attnpatch.training.errors import ConfigError, TrainingError
from attnpatch.training.sharding import is_sharded, plugin_options, shard

T = TypeVar("T")


@dataclass
class Progress:
    """Time and tokens of a run, over all its parts when it was resumed.

    Source tokens are those read (without padding), target tokens those predicted.
    """

    train_seconds: float = 0.0  # forward, backward, optimiser and batches; no evaluation, no saving
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    source_tokens: int = 0
    target_tokens: int = 0
    resumed_at: list[int] = field(default_factory=list)  # optimiser steps


class RunTrainer(Trainer):
    """Trains on `train_sampler`'s batches; subclasses say what the loss of a batch is.

    Args:
        train_sampler: gives the batches; every process has the same one and takes its share.
        collator: makes the model's inputs, `labels` among them, of rows.
        auxiliary: whether the model is patched, and may have a loss of its own to add.
        keep_checkpoints: how many of the newest checkpoints stay.

    The loss is the sum over predicted tokens divided by their number in the whole accumulated batch of all
    processes, plus the auxiliary loss once: the mean over the sequences of that batch.
    """

    progress_unit = "tokens"

    def __init__(
        self,
        *args: Any,
        train_sampler: TokenBatchSampler,
        collator: Any,
        auxiliary: bool = False,
        keep_checkpoints: int = 2,
        **kwargs: Any,
    ) -> None:
        arguments = kwargs.get("args")
        if auxiliary and arguments is not None:
            if arguments.ddp_find_unused_parameters and arguments.world_size > 1:
                raise ConfigError(
                    "training.ddp_find_unused_parameters=true takes the networks of the alignment loss for unused, "
                    "because that loss is added behind the model's outputs: leave it false"
                )
            arguments.ddp_find_unused_parameters = False  # where it is not given, Trainer takes it to be true
        super().__init__(*args, data_collator=collator, **kwargs)
        check_accelerator(self.accelerator)
        self.train_sampler = train_sampler
        self.auxiliary = auxiliary
        self.keep_checkpoints = keep_checkpoints
        self.progress = Progress()
        # Trainer then counts the labels of an accumulated batch, and does not divide the loss once more.
        self.model_accepts_loss_kwargs = True
        # Our labels are in place; models with a causal loss of their own would have the first of them not counted.
        self._loss_shifts_labels = False
        self._auxiliary_sum = 0.0  # weighted, like the loss
        self._auxiliary_weight = 0.0
        self._sequences = 0

    # ---- what subclasses say ----

    def summed_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | int, Any]:
        """A batch's loss summed over its predicted tokens, their number, and the model's outputs."""
        raise NotImplementedError(f"{type(self).__name__} must define summed_loss()")

    def count_tokens(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Tokens of a batch that are read, and that are predicted."""
        raise NotImplementedError(f"{type(self).__name__} must define count_tokens()")

    def score(self, data: Any) -> dict[str, Any]:
        """The model's `loss` per predicted token over a whole set (no auxiliary loss), and what else is measured."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    @property
    def progress_tokens(self) -> int:
        """The tokens that lines on the screen count."""
        return self.progress.source_tokens

    def where(self, rows: Any) -> str:
        """Which data a batch was made of, for an error; "" when that is not known."""
        return ""

    # ---- batches ----

    def get_train_dataloader(self) -> DataLoader:
        """The sampler's batches; accelerate deals them out to the processes in turn."""
        loader: DataLoader = DataLoader(
            self.train_dataset,
            batch_sampler=self.train_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    # ---- loss ----

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss per predicted token, plus the model's auxiliary loss once while training.

        The labels do not go through the model, so a patched model cannot have added its auxiliary loss already.
        """
        total, own_count, outputs = self.summed_loss(model, dict(inputs))
        count = own_count if num_items_in_batch is None else num_items_in_batch
        loss = total / max(count, 1)
        if model.training:
            share = 1.0  # without a count, Trainer itself divides by the number of accumulated batches
            if num_items_in_batch is not None:
                # The count is that of all processes, and DDP takes the mean of their gradients.
                loss = loss * self.accelerator.num_processes
                share = 1 / int(getattr(self, "current_gradient_accumulation_steps", 1) or 1)
                if self._sequences:
                    share = len(inputs["labels"]) * self.accelerator.num_processes / self._sequences
            if self.auxiliary:
                # A mean over its batch's sequences: of accumulated batches, the mean over all their sequences.
                loss = loss + self._auxiliary_loss(model, share).to(loss.dtype) * share
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; with an auxiliary loss it also counts the sequences of an accumulated batch of all processes."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        if self.auxiliary:
            count = torch.tensor(sum(len(sample["labels"]) for sample in samples), device=self.args.device)
            self._sequences = int(self.accelerator.reduce(count, "sum"))
        return samples, items

    def _auxiliary_loss(self, model: torch.nn.Module, share: float) -> torch.Tensor:
        import attnpatch

        extra = attnpatch.auxiliary_loss(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        self._auxiliary_sum += float(extra.detach()) * share
        self._auxiliary_weight += share
        return extra

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One forward and backward. Raises TrainingError when the loss is not finite."""
        # Counted on the batch as it is, before it goes anywhere.
        read, predicted = self.count_tokens(inputs)
        self.progress.source_tokens += read
        self.progress.target_tokens += predicted
        rows = inputs.pop("rows", None)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._stop_unless_finite(loss.item(), rows)
        return loss

    def _stop_unless_finite(self, loss: float, rows: Any) -> None:
        """All processes stop at the same step: one alone would leave the others waiting for it."""
        step, finite = self.state.global_step + 1, math.isfinite(loss)
        stopped = [] if finite else [self.args.process_index]
        several = self.args.world_size > 1
        if several:
            flags = self.accelerator.gather(torch.tensor([int(finite)], device=self.args.device))
            stopped = (flags == 0).nonzero().flatten().tolist()
        if not stopped:
            return
        if finite:
            raise TrainingError(
                f"the loss of process {stopped[0]} is not finite at step {step}: training stopped; that process says "
                "where"
            )
        here = f" in process {self.args.process_index}" if several else ""
        raise TrainingError(
            f"the loss is {loss} at step {step}{here}{self.where(rows)} (learning rate "
            f"{self._get_learning_rate():.3g}): training stopped; a lower learning rate, a longer warm-up or "
            "training.precision=fp32 may help. The last checkpoint is untouched"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean auxiliary loss since the last log, over the sequences of all processes."""
        if self._auxiliary_weight and "loss" in logs:
            own = torch.tensor([self._auxiliary_sum, self._auxiliary_weight], device=self.args.device)
            total, weight = self.accelerator.reduce(own, "sum").tolist()
            logs["auxiliary_loss"] = total / weight
            self._auxiliary_sum, self._auxiliary_weight = 0.0, 0.0
        super().log(logs, *args, **kwargs)

    # ---- sharded models ----

    @property
    def sharded(self) -> bool:
        """Whether no process holds the whole model: FSDP or DeepSpeed, which compute only when all processes do."""
        return str(self.accelerator.distributed_type).rsplit(".", 1)[-1] in SHARDING

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Shards the model first where accelerate would do it next."""
        if self.sharded and getattr(self.accelerator, "is_fsdp2", False) and not is_sharded(self.model):
            shard(self.model, **plugin_options(self.accelerator.state.fsdp_plugin))
        return super().create_optimizer(*args, **kwargs)

    def save_weights(self, folder: Path) -> None:
        """Writes the model as `save_pretrained` does. To be called by every process; the main one writes."""
        state = None
        if self.sharded and (is_sharded(self.model) or self.model_wrapped is not self.model):
            state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.process_index == 0:
            with writing_aside(folder) as aside:
                model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
                model.save_pretrained(str(aside), state_dict=state)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(str(aside))
        self.accelerator.wait_for_everyone()

    # ---- evaluation ----

    @contextmanager
    def evaluating(self) -> Iterator[Any]:
        """The unwrapped model in evaluation mode; afterwards it is in the mode that it was in."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.sharded and self.model_wrapped is self.model and not is_sharded(model):
            model.to(self.args.device)  # there was nothing to train: nobody has put it there
        training = model.training
        model.eval()
        try:
            yield model
        finally:
            model.train(training)

    def my_share(self, batches: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This process's part of the batches, and whether a batch counts.

        Each process gets as many, for a sharded model is computed by all or by none; what makes up the number is
        marked False.
        """
        mine = batches[self.args.process_index :: self.args.world_size]
        yield from ((batch, True) for batch in mine)
        if len(mine) < math.ceil(len(batches) / self.args.world_size):
            yield batches[-1], False

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Logs the scores of the dev set, or of the one that is given, and returns them with their prefix.

        Raises TrainingError when the loss is not finite.
        """
        started = time.perf_counter()
        scores = self.score(self.eval_dataset if eval_dataset is None else eval_dataset)
        if not math.isfinite(scores["loss"]):
            raise TrainingError(
                f"the loss on the dev set is {scores['loss']} at step {self.state.global_step}: training stopped"
            )
        numbers = {name: value for name, value in scores.items() if isinstance(value, (int, float))}
        metrics: dict[str, float] = {f"{metric_key_prefix}_{name}": value for name, value in numbers.items()}
        self.progress.eval_seconds += time.perf_counter() - started
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints ----

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Saves, declares the checkpoint whole, and only then deletes older ones."""
        started = time.perf_counter()
        super()._save_checkpoint(model, trial)  # args.save_total_limit is None: it deletes nothing
        self.accelerator.wait_for_everyone()
        self.progress.save_seconds += time.perf_counter() - started
        own = torch.tensor([[self.progress.source_tokens, self.progress.target_tokens]], device=self.args.device)
        tokens = self.accelerator.gather(own).tolist()
        if self.args.should_save:
            folder = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
            record = {"progress": asdict(self.progress_now()), "world_size": self.args.world_size, "tokens": tokens}
            mark_complete(folder, record)
            rotate(self.args.output_dir, self.keep_checkpoints, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def take_up(self, record: dict[str, Any]) -> None:
        """Goes on counting from where a checkpoint's record, of all processes, says that this one was."""
        self.progress = Progress(**record["progress"])
        if "tokens" in record:
            self.progress.source_tokens, self.progress.target_tokens = record["tokens"][self.args.process_index]

    def start_clock(self) -> None:
        """Called when training starts or goes on."""
        self._started = time.perf_counter()
        self._before = self.progress.eval_seconds + self.progress.save_seconds + self.progress.train_seconds

    def progress_now(self) -> Progress:
        """The record of time and tokens up to now."""
        aside = self.progress.eval_seconds + self.progress.save_seconds
        if hasattr(self, "_started"):
            self.progress.train_seconds = time.perf_counter() - self._started - (aside - self._before)
        return self.progress

    def stop_clock(self) -> None:
        """Called when training has ended."""
        self.progress_now()
        if hasattr(self, "_started"):
            del self._started
