"""A Trainer for the NT tasks: fresh sequences in training, next-symbol accuracy on fixed ones."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from attnpatch.experiments.sequences.grid import Cell
from attnpatch.training.batching import IGNORE
from attnpatch.training.losses import token_loss
from attnpatch.training.run_trainer import RunTrainer

EVAL_BATCH = 256


class SequenceTrainer(RunTrainer):
    """Trains on fresh sequences of a cell; evaluates next-symbol accuracy on a fixed set of each of its tasks."""

    progress_unit = "symbols"

    def __init__(self, *args: Any, cell: Cell, eval_sets: dict[str, dict[str, torch.Tensor]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cell = cell
        self.eval_sets = eval_sets

    def count_tokens(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Symbols read and predicted."""
        return inputs["input_ids"].numel(), inputs["labels"].numel()

    def where(self, rows: Any) -> str:
        """The cell, and the numbers of a batch's sequences."""
        return "" if rows is None else f", in sequences {', '.join(map(str, rows.tolist()))} of {self.cell.name}"

    def summed_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | int, Any]:
        """Cross-entropy of every next symbol, the random first ones included, as a language model has it."""
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        return token_loss(outputs["logits"], labels, 0.0), (labels != IGNORE).sum(), outputs

    def score(self, data: Any = None) -> dict[str, Any]:
        """accuracy, loss, and accuracy_by_task ("N2-tau3": ...) over the scored positions; a mixture's are the means
        over its tasks. The sequences are always those of `eval_sets`."""
        accuracy: dict[str, float] = {}
        losses: list[float] = []
        with self.evaluating() as model, torch.no_grad():
            for name, sequences in self.eval_sets.items():
                total = torch.zeros(3, dtype=torch.float64, device=self.args.device)
                for start in range(0, len(sequences["labels"]), EVAL_BATCH):
                    batch = self._prepare_inputs(
                        {key: value[start : start + EVAL_BATCH] for key, value in sequences.items()}
                    )
                    labels = batch.pop("labels")
                    with self.accelerator.autocast():
                        logits = model(**batch, use_cache=False)["logits"]
                    scored = labels != IGNORE
                    total[0] += token_loss(logits, labels, 0.0).double()
                    total[1] += ((logits.argmax(-1) == labels) & scored).sum()
                    total[2] += scored.sum()
                loss, right, count = total.tolist()
                accuracy[name] = right / count
                losses.append(loss / count)
        return {
            "accuracy": statistics.fmean(accuracy.values()),
            "loss": statistics.fmean(losses),
            "accuracy_by_task": accuracy,
        }
