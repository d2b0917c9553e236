"""A Seq2SeqTrainer for translation: its own loss, batches by length, exact evaluation, whole checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer

from attnpatch.training.batching import IGNORE, TokenBatchSampler, TranslationCollator, length_batches
from attnpatch.training.checkpoints import mark_complete, rotate
from attnpatch.training.errors import TrainingError


@dataclass
class Progress:
    """Time and tokens of a run, over all its parts when it was resumed."""

    train_seconds: float = 0.0  # forward, backward, optimiser and batches; no evaluation, no saving
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    source_tokens: int = 0  # </s> included, padding not
    target_tokens: int = 0
    resumed_at: list[int] = field(default_factory=list)  # optimiser steps


class TranslationTrainer(Seq2SeqTrainer):
    """Trains on `train_sampler`'s batches of rows with `input_ids` and `labels`.

    Args:
        train_sampler: gives the batches; every process has the same one and takes its share.
        collator: makes the model's inputs of rows.
        label_smoothing: epsilon of the uniform part of the target distribution.
        auxiliary: whether the model is patched, and may have a loss of its own to add.
        eval_max_tokens: padded positions in an evaluation batch.
        keep_checkpoints: how many of the newest checkpoints stay.
        dev_scores: given the trainer, extra figures for an evaluation during training (BLEU of the dev set).

    The loss is the sum over target tokens divided by their number in the whole accumulated batch of all processes;
    Trainer's own would average Marian's averages, because MarianMTModel ignores `num_items_in_batch`.
    """

    def __init__(
        self,
        *args: Any,
        train_sampler: TokenBatchSampler,
        collator: TranslationCollator,
        label_smoothing: float = 0.0,
        auxiliary: bool = False,
        eval_max_tokens: int = 4096,
        keep_checkpoints: int = 2,
        dev_scores: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, data_collator=collator, **kwargs)
        self.train_sampler = train_sampler
        self.label_smoothing = label_smoothing
        self.auxiliary = auxiliary
        self.eval_max_tokens = eval_max_tokens
        self.keep_checkpoints = keep_checkpoints
        self.dev_scores = dev_scores
        self.progress = Progress()
        # Trainer then counts the target tokens of an accumulated batch, and does not divide the loss once more.
        self.model_accepts_loss_kwargs = True
        self._auxiliary_sum = 0.0
        self._auxiliary_count = 0

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
        """Label-smoothed cross-entropy per target token, plus the model's auxiliary loss once while training.

        The labels do not go through the model, so a patched model cannot have added its auxiliary loss already.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        count = (labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        smoothing = self.label_smoothing if model.training else 0.0
        loss = token_loss(logits, labels, smoothing) / count
        if model.training:
            share = 1  # without a count, Trainer itself divides by the number of accumulated batches
            if num_items_in_batch is not None:
                # The count is that of all processes, and DDP takes the mean of their gradients.
                loss = loss * self.accelerator.num_processes
                share = int(getattr(self, "current_gradient_accumulation_steps", 1) or 1)
            if self.auxiliary:
                # A mean over its batch: over accumulated batches, the mean of the means.
                loss = loss + self._auxiliary_loss(model).to(loss.dtype) / share
        return (loss, outputs) if return_outputs else loss

    def _auxiliary_loss(self, model: torch.nn.Module) -> torch.Tensor:
        import attnpatch

        extra = attnpatch.auxiliary_loss(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        self._auxiliary_sum += float(extra.detach())
        self._auxiliary_count += 1
        return extra

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One forward and backward. Raises TrainingError when the loss is not finite."""
        # Counted on the batch as it is, before it goes anywhere.
        self.progress.source_tokens += int(inputs["attention_mask"].sum())
        self.progress.target_tokens += int((inputs["labels"] != IGNORE).sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} (learning rate "
                f"{self._get_learning_rate():.3g}): training stopped; a lower learning rate, a longer warm-up or "
                "training.precision=fp32 may help. The last checkpoint is untouched"
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean auxiliary loss since the last log."""
        if self._auxiliary_count and "loss" in logs:
            logs["auxiliary_loss"] = self._auxiliary_sum / self._auxiliary_count
            self._auxiliary_sum, self._auxiliary_count = 0.0, 0
        super().log(logs, *args, **kwargs)

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Mean negative log-likelihood per target token over the whole set (no smoothing, no auxiliary loss)."""
        started = time.perf_counter()
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        with self._evaluating() as model:
            total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            lengths = [max(a, b) for a, b in zip(data["source_length"], data["target_length"], strict=True)]
            with torch.no_grad():
                for _, batch in self._my_batches(data, lengths, self.eval_max_tokens):
                    labels = batch.pop("labels")
                    with self.accelerator.autocast():
                        logits = model(**batch, use_cache=False)["logits"]
                    total[0] += token_loss(logits, labels, 0.0).double()
                    total[1] += (labels != IGNORE).sum()
            total = self.accelerator.reduce(total, "sum")
            loss = float(total[0] / total[1])
            metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700))}
            if self.dev_scores is not None and metric_key_prefix == "eval":
                metrics |= {f"eval_{name}": value for name, value in self.dev_scores(self).items()}
        if not math.isfinite(loss):
            raise TrainingError(f"the loss on the dev set is {loss} at step {self.state.global_step}: training stopped")
        self.progress.eval_seconds += time.perf_counter() - started
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def translate(self, data: Any, max_tokens: int, **generation: Any) -> list[list[int]]:
        """Token ids of each row's translation, in the rows' order, on every process.

        Batches hold sources of like length; `max_tokens` counts pairs x longest source x beams.
        """
        beams = int(generation.get("num_beams") or self.model.generation_config.num_beams or 1)
        rows: list[tuple[int, list[int]]] = []
        pad = self.model.config.pad_token_id
        with self._evaluating(), torch.no_grad():
            sources = data.select_columns(["input_ids"])
            for indices, batch in self._my_batches(sources, data["source_length"], max(max_tokens // beams, 1)):
                with self.accelerator.autocast():
                    ids = self.model.generate(**batch, **generation)
                for index, row in zip(indices, ids.tolist(), strict=True):
                    rows.append((index, [token for token in row if token != pad]))
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rows = gather_object(rows)
        return [ids for _, ids in sorted(rows)]

    @contextmanager
    def _evaluating(self) -> Iterator[Any]:
        """The unwrapped model in evaluation mode; afterwards it is in the mode that it was in."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        training = model.training
        model.eval()
        try:
            yield model
        finally:
            model.train(training)

    def _my_batches(
        self, data: Any, lengths: Sequence[int], max_tokens: int
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        batches = length_batches(list(lengths), max_tokens)
        for indices in batches[self.args.process_index :: self.args.world_size]:
            batch = self.data_collator(data.select(indices).to_list())
            yield indices, self._prepare_inputs(batch)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Saves, declares the checkpoint whole, and only then deletes older ones."""
        started = time.perf_counter()
        super()._save_checkpoint(model, trial)  # args.save_total_limit is None: it deletes nothing
        self.accelerator.wait_for_everyone()
        self.progress.save_seconds += time.perf_counter() - started
        if self.args.should_save:
            folder = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
            mark_complete(folder, {"progress": asdict(self.progress_now()), "world_size": self.args.world_size})
            rotate(self.args.output_dir, self.keep_checkpoints, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def start_clock(self) -> None:
        """Called when training starts or goes on."""
        self._started = time.perf_counter()
        self._before = self.progress.eval_seconds + self.progress.save_seconds - self.progress.train_seconds

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


def token_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Sum over target tokens of the cross-entropy with labels smoothed by `smoothing` (uniform over the vocabulary).

    logits [B, T, V], labels [B, T] with -100 in padding; float32, unless the logits are float64.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")
