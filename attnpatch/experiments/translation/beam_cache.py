"""The cache of an encoder-decoder under beam search, without copies that the stock one makes at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from attnpatch.training.errors import TrainingError

FIRST_ROOM = 16
"""Tokens that there is room for at first; doubled when they are full."""


class BeamCache(EncoderDecoderCache):
    """A cache whose source side stays where it is when beams change places.

    A beam follows another beam of its own sentence, and all beams of a sentence have the same source: reordering its
    keys and values, as transformers does, copies them onto themselves.

    Args:
        config: of the decoder.
        num_beams: for how many rows that follow each other the keys and values of the source are kept once:
            [R / num_beams, H, S, D]. Above 1 it takes an attention function that knows of it
            (`decoding.decoding_attention`).
    """

    def __init__(self, config: Any, num_beams: int = 1) -> None:
        own, source = DynamicCache(config=config), DynamicCache(config=config)
        spare = _Spare()
        # Layers of other kinds stay what they are.
        own.layers = [GrowingLayer(spare) if type(layer) is DynamicLayer else layer for layer in own.layers]
        source.layers = [SourceLayer(num_beams) if type(layer) is DynamicLayer else layer for layer in source.layers]
        super().__init__(own, source)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)


class SourceLayer(DynamicLayer):
    """Keys and values of the source, once for each `num_beams` rows, which have the same."""

    def __init__(self, num_beams: int) -> None:
        super().__init__()
        self.num_beams = num_beams

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raises TrainingError: the rows are not those of whole sentences."""
        if len(key_states) % self.num_beams:
            raise TrainingError(f"{len(key_states)} rows are not {self.num_beams} beams for each of some sentences")
        key_states, value_states = (x[:: self.num_beams] for x in (key_states, value_states))
        return super().update(key_states, value_states, *args, **kwargs)


class _Spare:
    """Memory that reordering writes into, of one layer after the other."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def swap(self, memory: Tensor) -> Tensor:
        """Memory like the one that is given, in exchange for it; what it holds is anything."""
        spare, self._memory = self._memory, memory
        like = spare is not None and (spare.shape, spare.dtype, spare.device) == (
            memory.shape,
            memory.dtype,
            memory.device,
        )
        return spare if spare is not None and like else torch.empty_like(memory)


class _Room:
    """A tensor [R, H, n, D] that grows in n, in memory [room, R, H, D] with room for more: a token is written without
    copying those before it, and beams change places in stretches of H D numbers."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._shown: Tensor | None = None

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """`held` (what this gave last, or another tensor in its place) and `new` [R, H, m, D]."""
        n = held.shape[-2] if held.numel() else 0
        size = n + new.shape[-2]
        if self._memory is None or held is not self._shown or size > len(self._memory):
            batch, heads, _, dim = new.shape
            memory = new.new_empty(max(2 * n, size, FIRST_ROOM), batch, heads, dim)
            if n:
                memory[:n] = held.permute(2, 0, 1, 3)
            self._memory = memory
        self._memory[n:size] = new.permute(2, 0, 1, 3)
        return self._show(size)

    def reorder(self, held: Tensor, rows: Tensor, spare: _Spare) -> Tensor:
        """`held` with the rows in another order, or one in several places."""
        if self._memory is None or held is not self._shown:
            return held.index_select(0, rows.to(held.device))
        n, before = held.shape[-2], self._memory
        self._memory = spare.swap(before)
        torch.index_select(before[:n], 1, rows.to(held.device), out=self._memory[:n])
        return self._show(n)

    def _show(self, n: int) -> Tensor:
        assert self._memory is not None
        self._shown = self._memory[:n].permute(1, 2, 0, 3)
        return self._shown


class GrowingLayer(DynamicLayer):
    """A DynamicLayer that neither copies what it holds to add a token, nor asks for memory to reorder it.

    What `update` has returned is overwritten after `reorder_cache`, by this layer or one that shares its spare memory.
    """

    keys: Any
    values: Any

    def __init__(self, spare: _Spare | None = None) -> None:
        super().__init__()
        self._spare, self._keys, self._values = spare or _Spare(), _Room(), _Room()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._keys.append(self.keys, key_states)
        self.values = self._values.append(self.values, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.get_seq_length() > 0:
            self.keys = self._keys.reorder(self.keys, beam_idx, self._spare)
            self.values = self._values.reorder(self.values, beam_idx, self._spare)
