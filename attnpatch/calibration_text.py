"""A text file -> batches of model inputs for init="calibrate"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attnpatch.errors import CheckpointError, SpecError
from attnpatch.probes import parameters_of

MAX_LENGTH = 128
BATCH = 16
MAX_LINES = 4096
"""Lines that are read at most: the fit is of one layer at a time, and more text changes it little."""


def read_lines(path: str | Path) -> list[str]:
    """All lines of a UTF-8 text file, stripped; empty ones stay, as the other side's lines are counted, too.

    Raises:
        SpecError: the file is missing, not UTF-8 (with the line), or has no text.
    """
    path = Path(path).expanduser()
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise SpecError(f"calibration text {str(path)!r} does not exist") from None
    except OSError as error:
        raise SpecError(f"calibration text {str(path)!r} cannot be read: {error.strerror or error}") from error
    lines = []
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise SpecError(f"calibration text {path}, line {number}: not UTF-8") from None
        lines.append(text.removeprefix("\ufeff"))
    if not any(lines):
        raise SpecError(f"calibration text {path} has no text")
    return lines


def text_batches(
    folder: Path, model: Any, text: str | Path, target: str | Path | None = None
) -> list[dict[str, torch.Tensor]]:
    """Tokenised batches, shortest lines first, at most 128 tokens a line.

    Args:
        folder: of the checkpoint, with its tokenizer. model: whose forward pass will get them.
        text: a line a sentence. target: for sequence-to-sequence models, its translation line by line; the text
            itself if None.

    Raises:
        SpecError: a bad file, or sides of different length. CheckpointError: the checkpoint has no tokenizer.
    """
    from transformers import AutoTokenizer

    lines = read_lines(text)
    takes = parameters_of(model)
    seq2seq = "decoder_input_ids" in takes
    if target is not None and not seq2seq:
        raise SpecError(f"a calibration target is for sequence-to-sequence models; {type(model).__name__} is none")
    targets = read_lines(target) if target is not None else lines
    if len(targets) != len(lines):
        raise SpecError(f"calibration text {text} has {len(lines)} lines, its target {target} has {len(targets)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{folder} has no usable tokenizer, which calibration needs: {error}") from error
    filled = [pair for pair in zip(lines, targets, strict=True) if all(pair)][:MAX_LINES]
    if not filled:
        raise SpecError(f"calibration text {text} and its target {target} have no line in common that is not empty")
    pairs = sorted(filled, key=lambda pair: len(pair[0]))
    longest = min(MAX_LENGTH, int(getattr(model.config, "max_position_embeddings", MAX_LENGTH)) - 2)
    batches = []
    for at in range(0, len(pairs), BATCH):
        chosen = pairs[at : at + BATCH]
        encoded = tokenizer(
            [line for line, _ in chosen], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        batch = {name: value for name, value in encoded.items() if name in takes}
        if seq2seq:
            batch.update(_decoder_inputs(tokenizer, [line for _, line in chosen], longest, model.config))
        if type(model).__name__.endswith("ForMultipleChoice"):
            batch = {name: value.unsqueeze(1) for name, value in batch.items()}
        batches.append(batch)
    return batches


def _decoder_inputs(tokenizer: Any, lines: list[str], longest: int, config: Any) -> dict[str, torch.Tensor]:
    encoded = tokenizer(text_target=lines, padding=True, truncation=True, max_length=longest - 1, return_tensors="pt")
    start = torch.full((len(lines), 1), int(config.decoder_start_token_id))
    mask = encoded["attention_mask"]
    return {
        "decoder_input_ids": torch.cat([start, encoded["input_ids"]], dim=1),
        "decoder_attention_mask": torch.cat([torch.ones_like(start), mask], dim=1),
    }
