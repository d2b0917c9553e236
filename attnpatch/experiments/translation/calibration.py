"""init="calibrate" in a training run: new projections fitted to the checkpoint's own, on the training text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attnpatch
from attnpatch.experiments.translation.collator import TranslationCollator
from attnpatch.experiments.translation.config import MarianTrainingConfig
from attnpatch.training.batching import IGNORE, length_batches

PAIRS = 1024
"""Training pairs that the fit sees, evenly spaced: some 25,000 tokens, for at most 2 d_model features a projection."""
BATCH_TOKENS = 4096


def calibrates(config: MarianTrainingConfig) -> bool:
    """Whether the run fits new projections to those of its checkpoint."""
    return config.init == "calibrate" and config.spec is not None


def patch_calibrated(config: MarianTrainingConfig, model: Any, rows: Any) -> dict[str, Any]:
    """Patches the stock `model` with the run's spec, fitted on some of the training rows.

    Returns what results.json says of it: `pairs`, and in `notes` the relative errors of the fit. The choice of pairs
    depends on the text alone, so all seeds start from the same fit.
    """
    chosen = rows.select(range(0, len(rows), max(len(rows) // PAIRS, 1))[:PAIRS])
    collator = TranslationCollator(model.config.pad_token_id, model.config.decoder_start_token_id)
    report = attnpatch.patch(
        model, config.spec, init="calibrate", calibration=_batches(chosen, collator), keep_stock=False
    )
    return {"pairs": len(chosen), "notes": list(report.notes)}


def _batches(rows: Any, collator: TranslationCollator) -> list[dict[str, Any]]:
    lengths: Sequence[int] = [max(a, b) for a, b in zip(rows["source_length"], rows["target_length"], strict=True)]
    batches = []
    for indices in length_batches(lengths, BATCH_TOKENS):
        batch = collator(rows.select(indices).to_list())
        # Without this mask the fit would see the decoder's padding, too.
        batch["decoder_attention_mask"] = (batch.pop("labels") != IGNORE).long()
        batches.append(batch)
    return batches
