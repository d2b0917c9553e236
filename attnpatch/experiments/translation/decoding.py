"""What makes decoding a test set cheaper without changing what `generate` finds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache


class BeamCache(EncoderDecoderCache):
    """The cache of an encoder-decoder, whose source side stays where it is when beams change places.

    A beam follows another beam of its own sentence, and all beams of a sentence have the same source: reordering its
    keys and values, as transformers does, copies them onto themselves at every step.
    """

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)


def empty_cache(model: Any, config: Any) -> dict[str, BeamCache]:
    """The argument of `generate` that brings a `BeamCache`; none if `config` wants no cache, or one of another kind."""
    if config.use_cache is False or config.cache_implementation is not None:
        return {}
    decoder = model.config.get_text_config(decoder=True)
    return {"past_key_values": BeamCache(DynamicCache(config=decoder), DynamicCache(config=decoder))}


@contextmanager
def attention_of_decoding(model: Any) -> Iterator[None]:
    """Decode with the fused kernel where training uses `eager`: only its backward is slow over short sentences."""
    before = model.config._attn_implementation
    if before != "eager":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def lean_generation(config: Any) -> Any:
    """A copy of a generation config that forbids the same single tokens by a cheaper processor.

    `bad_words_ids` adds a whole matrix of zeros and -inf to the scores of every step, `suppress_tokens` writes -inf.
    """
    config = copy.deepcopy(config)
    words = config.bad_words_ids
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # `bad_words_ids` lets the end and forced tokens through, `suppress_tokens` would not.
    allowed = {*ends, config.forced_bos_token_id, config.forced_eos_token_id}
    if words and config.suppress_tokens is None and all(len(word) == 1 and word[0] not in allowed for word in words):
        config.bad_words_ids, config.suppress_tokens = None, [word[0] for word in words]
    return config
