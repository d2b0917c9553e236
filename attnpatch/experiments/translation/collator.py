"""Batches of sentence pairs as Marian's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnpatch.training.batching import IGNORE


class TranslationCollator:
    """Pads a batch on the right: input_ids and attention_mask [B, S]; decoder_input_ids [B, T], the labels shifted
    right behind the start token; labels [B, T] with -100 in padding; rows [B], of rows that have a number `row`."""

    def __init__(self, pad_token_id: int, decoder_start_token_id: int) -> None:
        self.pad = pad_token_id
        self.start = decoder_start_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Batch of rows with `input_ids` and, for training and losses, `labels`."""
        batch = {"input_ids": _padded([row["input_ids"] for row in rows], self.pad)}
        batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
        if "labels" in rows[0]:
            if "row" in rows[0]:
                batch["rows"] = torch.tensor([row["row"] for row in rows])
            batch["labels"] = _padded([row["labels"] for row in rows], IGNORE)
            batch["decoder_input_ids"] = _padded([[self.start, *row["labels"][:-1]] for row in rows], self.pad)
        return batch


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *([value] * (width - len(row)))] for row in rows], dtype=torch.long)
