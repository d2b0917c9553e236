"""What makes decoding a test set cheaper without changing what `generate` finds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from attnpatch.experiments.translation.beam_cache import BeamCache
from attnpatch.kernels import decode_native

IMPLEMENTATION = "attnpatch_decoding"
"""The name under which `decoding_attention` is registered."""


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' `sdpa`, faster for single queries on a CPU, and for rows of queries that share their keys.

    Args:
        query: [R, H, T, D].
        key, value: [R / n, H, S, D], each row of which serves n rows of queries that follow each other, as `BeamCache`
            keeps the source of n beams.
        attention_mask: None or [1 or R, 1, 1 or T, S]; n rows of queries that share their keys have one mask.

    Returns:
        Output [R, T, H, D], and None for the weights.
    """
    beams, length = query.shape[0] // key.shape[0], query.shape[2]
    mask = attention_mask
    if beams > 1 and mask is not None and mask.shape[0] > 1:
        mask = mask[::beams]
    if dropout == 0.0 and decode_native.why_not(query, key, value, mask) is None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        decoded = decode_native.decode_attention(query, key, value, mask, scale)
        if decoded is not None:
            return decoded.transpose(1, 2), None
    if beams > 1:
        # The beams of a sentence as queries of one row, whose order is not that of time.
        query = query.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)
        mask = mask if mask is None or mask.shape[2] == 1 else mask.repeat(1, 1, beams, 1)
        kwargs["is_causal"] = False
    output, weights = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    if beams > 1:
        output = output.unflatten(1, (beams, length)).flatten(0, 1)
    return output, weights


AttentionInterface.register(IMPLEMENTATION, decoding_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@contextmanager
def lean_decoding(model: Any, own_attention: bool = True, **generation: Any) -> Iterator[Callable[[], dict[str, Any]]]:
    """Within it, `generate` is cheaper; gives a function that makes the arguments that each call of it is to have,
    beside the inputs.

    Args:
        own_attention: whether attention of the backends `eager` and `sdpa` may be `decoding_attention`.
        generation: settings in the place of those in the model's generation config, such as `num_beams`.
    """
    config = copy.deepcopy(model.generation_config)
    config.update(**generation)
    config, processors = lean_generation(config)
    before = model.config._attn_implementation
    # Parts of a model may have backends of their own, and weights are asked of `eager`.
    backends = {part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)}
    own = own_attention and backends in ({"eager"}, {"sdpa"}) and not config.output_attentions
    decoder = model.config.get_text_config(decoder=True)
    # A config that wants no cache, or one of another kind, has its way.
    cached = config.use_cache is not False and config.cache_implementation is None
    num_beams = int(config.num_beams or 1) if own and _may_share_source(model) else 1

    def arguments() -> dict[str, Any]:
        cache = {"past_key_values": BeamCache(decoder, num_beams)} if cached else {}
        return {"generation_config": config, "logits_processor": processors, **cache}

    try:
        if own:
            model.set_attn_implementation(IMPLEMENTATION)
        yield arguments
    finally:
        if own:
            model.set_attn_implementation(before)


def _may_share_source(model: nn.Module) -> bool:
    """Whether attention over the source, by its name in Marian and its relatives, is stock everywhere: a patched one
    takes its keys for each beam."""
    over_source = [module for name, module in model.named_modules() if name.endswith("encoder_attn")]
    return bool(over_source) and not any(hasattr(module, "attnpatch") for module in over_source)


class ForbidTokens(LogitsProcessor):
    """Gives some tokens the score -inf, in place; transformers' own processors pass over all scores for it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.tokens = self.tokens.to(scores.device)
        return scores.index_fill_(-1, self.tokens, float("-inf"))


def lean_generation(config: Any) -> tuple[Any, LogitsProcessorList]:
    """A generation config, and processors that do what was taken out of the one that was given.

    `bad_words_ids` adds a whole matrix of zeros and -inf to the scores of every step. Of single tokens it is replaced.
    """
    config = copy.deepcopy(config)
    words = config.bad_words_ids
    # `bad_words_ids` lets the end and forced tokens through.
    allowed: set[Any] = set()
    for tokens in (config.eos_token_id, config.forced_bos_token_id, config.forced_eos_token_id):
        allowed |= set(torch.as_tensor([] if tokens is None else tokens).flatten().tolist())
    if words and all(len(word) == 1 and word[0] not in allowed for word in words):
        config.bad_words_ids = None
        return config, LogitsProcessorList([ForbidTokens([word[0] for word in words])])
    return config, LogitsProcessorList()
