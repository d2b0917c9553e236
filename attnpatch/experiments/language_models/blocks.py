"""Text as blocks of equally many tokens, and how they become a model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from attnpatch.experiments.language_models.config import MaskingConfig
from attnpatch.experiments.language_models.text import LineText
from attnpatch.training.batching import IGNORE, generator_for
from attnpatch.training.errors import TrainingError

CHUNK = 2000  # lines that are tokenised at once


@dataclass
class Blocks(Dataset[int]):
    """n blocks of T tokens: <s>, T - 2 tokens of running text, </s>; only the last one may be padded.

    ids [n, T] int32; word_starts [n, T] bool, or None when words are of no interest; lines [n, 2]: the first and the
    last line of the text that a block holds tokens of; last_length: tokens of the last block without its padding.
    A row is a number; the collator has the blocks.
    """

    text: LineText
    ids: Any
    lines: Any
    last_length: int
    word_starts: Any = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> int:
        return row

    @property
    def tokens(self) -> int:
        """Tokens without padding, <s> and </s> included."""
        return (len(self.ids) - 1) * self.ids.shape[1] + self.last_length

    def attention_mask(self, rows: Sequence[int]) -> Tensor | None:
        """[B, T], or None when nothing is padded: attention without a mask is quicker."""
        size, last = self.ids.shape[1], len(self.ids) - 1
        if self.last_length == size or last not in rows:
            return None
        mask = torch.ones(len(rows), size, dtype=torch.long)
        mask[[i for i, row in enumerate(rows) if row == last], self.last_length :] = 0
        return mask

    def where(self, rows: Sequence[int]) -> str:
        """Block and line numbers, for an error."""
        shown = [f"{row} ({self.text.span(*self.lines[row].tolist())})" for row in rows[:8]]
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        return f"blocks {', '.join(shown)}{more}"


def make_blocks(text: LineText, tokenizer: Any, block_size: int, keep_last: bool = True, words: bool = False) -> Blocks:
    """Tokenises lines, each with its line break, and cuts the running text into blocks.

    Args:
        keep_last: keep what is left at the end, padded. Without it, training has blocks of one length only.
        words: note where words start, for whole-word masking.

    Raises TrainingError when the text does not fill a single block that is to be kept.
    """
    pieces: list[Any] = []
    starts: list[Any] = []
    counts: list[int] = []
    for at in range(0, len(text), CHUNK):
        lines = [f"{line}\n" for line in text.lines[at : at + CHUNK]]
        encoded = tokenizer(
            lines,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=words,
            verbose=False,
        )
        counts += map(len, encoded["input_ids"])
        pieces += [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]
        if words:
            starts += [_word_starts(offsets) for offsets in encoded["offset_mapping"]]
    flat = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    body = block_size - 2
    full, rest = divmod(len(flat), body)
    number = full + (1 if rest and keep_last else 0)
    if not number:
        raise TrainingError(
            f"{text.name}: its {len(flat)} tokens do not fill one block of data.block_size={block_size}; choose a "
            "smaller one or more text"
        )
    ids = np.full((number, block_size), tokenizer.pad_token_id, dtype=np.int32)
    used = min(len(flat), number * body)
    _fill(ids[:, 1:-1], flat[:used])
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    last_length = block_size
    if number > full:
        last_length = rest + 2
        ids[-1, rest + 1 :] = tokenizer.pad_token_id
        ids[-1, rest + 1] = tokenizer.sep_token_id
    ends = np.cumsum(counts)
    first = np.arange(number) * body
    last = np.minimum(first + body, used) - 1
    lines_of = np.stack([np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last, side="right")], 1)
    word_starts = None
    if words:
        word_starts = np.ones((number, block_size), dtype=bool)
        _fill(word_starts[:, 1:-1], np.concatenate(starts)[:used])
    return Blocks(text, ids, lines_of, last_length, word_starts)


def _fill(target: Any, values: Any) -> None:
    """Puts a flat array into a rectangle, row by row; what is left over stays."""
    width = target.shape[1]
    whole = len(values) // width
    target[:whole] = values[: whole * width].reshape(whole, width)
    if whole < len(target):
        target[whole, : len(values) - whole * width] = values[whole * width :]


def _word_starts(offsets: Sequence[tuple[int, int]]) -> Any:
    """A token starts a word unless it begins where the one before it ended, or within it: the pieces of one character
    share its place. Space counts as a word of its own."""
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    new = np.ones(len(spans), dtype=bool)
    new[1:] = (spans[1:, 0] > spans[:-1, 1]) | (spans[1:, 0] == spans[1:, 1])
    return new


class BlockCollator:
    """Rows of blocks -> input_ids [B, T], labels [B, T] (-100: not predicted), rows [B], perhaps attention_mask.

    Args:
        masking: which tokens are masked; None for the causal objective, whose labels are the next tokens.
        seed, epoch: the mask of a row depends on these and on the row alone, so that masks are new in each epoch, and
            the same in a run that was resumed and in one over more processes.
    """

    def __init__(
        self, blocks: Blocks, tokenizer: Any, masking: MaskingConfig | None, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.blocks = blocks
        self.seed = seed
        self.epoch = epoch
        self.masker = None if masking is None else Masker(tokenizer, masking)
        self.special = torch.tensor(sorted(set(tokenizer.all_special_ids)))

    def __call__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these rows."""
        ids = torch.from_numpy(self.blocks.ids[list(rows)]).long()
        special = torch.isin(ids, self.special)
        if self.masker is None:
            inputs, labels = ids, next_tokens(ids, special)
        else:
            inputs, labels = self._masked(self.masker, ids, special, rows)
        batch = {"input_ids": inputs, "labels": labels, "rows": torch.tensor(list(rows))}
        mask = self.blocks.attention_mask(rows)
        return batch if mask is None else batch | {"attention_mask": mask}

    def _masked(self, masker: Masker, ids: Tensor, special: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Row by row: it does not matter who shares a batch, nor how many processes share the batches."""
        epoch = self.epoch()
        parts = [
            masker(
                ids[i : i + 1],
                special[i : i + 1],
                _starts_of(self.blocks, [row]),
                generator_for(self.seed, epoch, row),
            )
            for i, row in enumerate(rows)
        ]
        return torch.cat([inputs for inputs, _ in parts]), torch.cat([labels for _, labels in parts])


class FixedBlocks:
    """Blocks whose masks are drawn once, block by block: neither batches nor processes nor the run's seed matter."""

    def __init__(self, blocks: Blocks, tokenizer: Any, masking: MaskingConfig | None) -> None:
        self.blocks = blocks
        ids = torch.from_numpy(blocks.ids).long()
        special = torch.isin(ids, torch.tensor(sorted(set(tokenizer.all_special_ids))))
        if masking is None:
            self.inputs, self.labels = ids, next_tokens(ids, special)
        else:
            masker = Masker(tokenizer, masking)
            self.inputs, self.labels = ids.clone(), ids.clone()
            for row in range(len(blocks)):
                one = slice(row, row + 1)
                generator = generator_for(masking.eval_seed, -1, row)
                self.inputs[one], self.labels[one] = masker(
                    ids[one], special[one], _starts_of(blocks, [row]), generator
                )
        self.predicted = int((self.labels != IGNORE).sum())
        if not self.predicted:
            raise TrainingError(f"{blocks.text.name}: not one of its tokens is masked; take more text")

    def __len__(self) -> int:
        return len(self.blocks)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """input_ids and labels [B, T], and attention_mask where something is padded."""
        index = list(rows)
        batch = {"input_ids": self.inputs[index], "labels": self.labels[index]}
        mask = self.blocks.attention_mask(index)
        return batch if mask is None else batch | {"attention_mask": mask}


class Masker:
    """transformers' DataCollatorForLanguageModeling over ready tensors, with a generator for each call."""

    def __init__(self, tokenizer: Any, masking: MaskingConfig) -> None:
        from transformers import DataCollatorForLanguageModeling

        if tokenizer.mask_token is None:
            raise TrainingError(
                f"{type(tokenizer).__name__} has no mask token: choose another tokenizer, or model.objective=causal"
            )
        # transformers masks whole words with <mask> alone, and warns when told otherwise.
        shares = (1.0, 0.0) if masking.whole_words else (masking.mask_share, masking.random_share)
        self.collator = DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=masking.probability,
            mask_replace_prob=shares[0],
            random_replace_prob=shares[1],
            whole_word_mask=masking.whole_words,
        )

    def __call__(
        self, ids: Tensor, special: Tensor, word_starts: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """ids, special, word_starts [B, T] -> masked inputs and labels [B, T]."""
        offsets = None
        if word_starts is not None:
            # The collator wants character spans, and looks only at where there is a gap between two of them.
            start = word_starts.long().cumsum(1) + torch.arange(ids.shape[1])
            offsets = torch.stack([start, start + 1], dim=-1)
        self.collator.generator = generator
        inputs, labels = self.collator.torch_mask_tokens(
            ids.clone(), special_tokens_mask=special.long(), offset_mapping=offsets
        )
        return inputs, labels


def next_tokens(ids: Tensor, special: Tensor) -> Tensor:
    """Labels of the causal objective: at each place the token after it, special ones left out."""
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = ids[:, 1:].masked_fill(special[:, 1:], IGNORE)
    return labels


def _starts_of(blocks: Blocks, rows: Sequence[int]) -> Tensor | None:
    return None if blocks.word_starts is None else torch.from_numpy(blocks.word_starts[list(rows)])
