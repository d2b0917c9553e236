"""A Trainer for sentence classification: batches of like length, GLUE's metrics after each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from attnpatch.experiments.classification.data import Examples
from attnpatch.experiments.classification.metrics import scores
from attnpatch.experiments.classification.tasks import Task
from attnpatch.training.run_trainer import RunTrainer


@dataclass
class Encoded(Dataset[int]):
    """Examples as tokens. An item is its row number: the collator makes a batch of rows."""

    examples: Examples
    tokens: list[dict[str, list[int]]]  # input_ids and whatever else the tokenizer gives
    cut: int  # how many were longer than the limit

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> int:
        return row

    @property
    def lengths(self) -> list[int]:
        return [len(row["input_ids"]) for row in self.tokens]

    @property
    def labels(self) -> np.ndarray:
        return np.asarray(self.examples.labels)


def encode(examples: Examples, tokenizer: Any, max_length: int) -> Encoded:
    """Tokens of each text or pair, [CLS] and [SEP] included; of what is too long, the longer text is cut."""
    parts = list(map(list, zip(*examples.texts, strict=True)))
    full = tokenizer(*parts, verbose=False)["input_ids"]
    found = tokenizer(*parts, truncation=True, max_length=max_length)
    names = [name for name in ("input_ids", "token_type_ids") if name in found]
    tokens = [dict(zip(names, row, strict=True)) for row in zip(*(found[name] for name in names), strict=True)]
    return Encoded(examples, tokens, sum(len(ids) > max_length for ids in full))


class RowCollator:
    """A batch of rows, padded on the right: input_ids, attention_mask, token_type_ids [B, T]; labels, rows [B]."""

    def __init__(self, data: Encoded, tokenizer: Any) -> None:
        from transformers import DataCollatorWithPadding

        self.data = data
        self.pad = DataCollatorWithPadding(tokenizer)
        dtype = torch.long if isinstance(data.examples.labels[0], int) else torch.float32
        self.labels = torch.tensor(data.examples.labels, dtype=dtype)

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these rows."""
        chosen = torch.tensor(rows)
        batch = self.pad([self.data.tokens[row] for row in rows])
        return {**batch, "labels": self.labels[chosen], "rows": chosen}


class ClassificationTrainer(RunTrainer):
    """Trains a model for sequence classification.

    Args:
        task: the task. eval_batch_size: examples in an evaluation batch.
        The others are RunTrainer's; `collator` is a RowCollator, `eval_dataset` Encoded.
    """

    data_collator: RowCollator

    def __init__(self, *args: Any, task: Task, eval_batch_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.task = task
        self.eval_batch_size = eval_batch_size

    def count_tokens(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Tokens read (padding not), and examples."""
        return int(inputs["attention_mask"].sum()), len(inputs["labels"])

    def where(self, rows: Any) -> str:
        """The files and lines of a batch."""
        return "" if rows is None else f", in {self.data_collator.data.examples.where(rows.tolist())}"

    def summed_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | int, Any]:
        """Cross-entropy, or the squared error of a regression; the number of examples; the outputs."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs["logits"].float()
        if self.task.is_regression:
            return F.mse_loss(logits.squeeze(-1), labels, reduction="sum"), len(labels), outputs
        return F.cross_entropy(logits, labels, reduction="sum"), len(labels), outputs

    def score(self, data: Encoded) -> dict[str, Any]:
        """The loss and the task's metrics over a whole set."""
        return dict(scores(self.task, self.outputs(data), data.labels))

    def outputs(self, data: Encoded) -> np.ndarray:
        """The model's outputs for a whole set, [N, C], in its order."""
        found = torch.zeros(len(data), self.task.outputs, device=self.args.device)
        collator = RowCollator(data, self.processing_class)
        with self.evaluating() as model, torch.no_grad():
            for rows, counts in self.my_share(_of_like_length(data, self.eval_batch_size)):
                batch = self._inputs(collator, rows)
                with self.accelerator.autocast():
                    logits = model(**batch)["logits"].float()
                if counts:
                    found[rows] = logits
        return self.accelerator.reduce(found, "sum").cpu().numpy()

    def batches(self, data: Encoded, size: int) -> Iterator[dict[str, Tensor]]:
        """A whole set in batches of `size` examples of like length, without labels, on the device."""
        collator = RowCollator(data, self.processing_class)
        for rows in _of_like_length(data, size):
            yield self._inputs(collator, rows)

    def _inputs(self, collator: RowCollator, rows: list[int]) -> dict[str, Tensor]:
        batch = {name: value for name, value in collator(rows).items() if name not in ("labels", "rows")}
        return dict(self._prepare_inputs(batch))


def _of_like_length(data: Encoded, size: int) -> list[list[int]]:
    order = np.argsort(data.lengths, kind="stable")[::-1].tolist()
    return [order[start : start + size] for start in range(0, len(order), size)]
