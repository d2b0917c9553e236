"""Decoding by beams: the cache, and attention whose rows share their source."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import PAD, encoder_decoder, masked_lm, tokens, wake
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

import attnpatch
from attnpatch.experiments.translation.beam_cache import FIRST_ROOM, BeamCache, GrowingLayer
from attnpatch.experiments.translation.decoding import (
    IMPLEMENTATION,
    decoding_attention,
    lean_decoding,
    lean_generation,
)
from attnpatch.kernels import compiled, decode_native
from attnpatch.training.errors import TrainingError

CROSS = {"variant": "expressive", "sites": ["cross"]}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("length", "mask"), [(1, "none"), (1, "keys"), (3, "none"), (3, "keys"), (3, "full")])
def test_rows_that_share_their_source(
    seed: int, monkeypatch: pytest.MonkeyPatch, native: bool, length: int, mask: str
) -> None:
    if not native:
        monkeypatch.setattr(decode_native, "library", lambda source: "it is not wanted")
    sentences, beams, keys = 3, 4, 7
    query = torch.randn(sentences * beams, 2, length, 8)
    key, value = torch.randn(sentences, 2, keys, 8), torch.randn(sentences, 2, keys, 8)
    keep = None
    if mask != "none":
        keep = torch.rand(sentences, 1, length if mask == "full" else 1, keys) < 0.6
        keep[..., 0] = True
        keep = keep.repeat_interleave(beams, 0)
    module = torch.nn.Module()
    module.is_causal = True
    found, _ = decoding_attention(module, query, key, value, keep, scaling=0.5, is_causal=False)
    whole = (x.repeat_interleave(beams, 0) for x in (key, value))
    wanted = F.scaled_dot_product_attention(query, *whole, attn_mask=keep, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(found, wanted)


def test_the_growing_layer_is_a_dynamic_one(seed: int) -> None:
    """Whatever is done to it, in whatever order, past its first room too."""
    ours, stock = GrowingLayer(), DynamicLayer()
    rows = 6
    for _ in range(2 * FIRST_ROOM):
        new = [torch.randn(rows, 2, random.choice([1, 1, 1, 3]), 4) for _ in range(2)]
        new[1] = torch.randn_like(new[0])
        for layer in (ours, stock):
            found = layer.update(*new)
            assert found[0] is layer.keys
            assert found[1] is layer.values
        torch.testing.assert_close((ours.keys, ours.values), (stock.keys, stock.values), rtol=0, atol=0)
        act = random.choice(["reorder", "reorder", "reorder", "nothing", "crop", "select"])
        order = torch.randint(rows, (rows,))
        for layer in (ours, stock):
            if act == "reorder":
                layer.reorder_cache(order)
            elif act == "crop":
                layer.crop(-1)
            elif act == "select":
                layer.batch_select_indices(order)
        torch.testing.assert_close((ours.keys, ours.values), (stock.keys, stock.values), rtol=0, atol=0)
        assert ours.get_seq_length() == stock.get_seq_length()
    for layer in (ours, stock):
        layer.reset()
    assert ours.get_seq_length() == stock.get_seq_length()  # which transformers' versions differ in


def test_layers_do_not_write_into_each_other(seed: int) -> None:
    """Reordering hands memory from layer to layer."""
    model = masked_lm("marian")
    cache, stock = BeamCache(model.config, 1), DynamicCache(config=model.config)
    layers = len(stock.layers)
    for _ in range(FIRST_ROOM + 4):
        for i in range(layers):
            new = torch.randn(4, 2, 1, 8), torch.randn(4, 2, 1, 8)
            cache.self_attention_cache.update(*new, i)
            stock.update(*new, i)
        order = torch.randint(4, (4,))
        cache.reorder_cache(order)
        stock.reorder_cache(order)
        for ours, theirs in zip(cache.self_attention_cache.layers, stock.layers, strict=True):
            torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("spec", [None, "neural", "query_value+expressive", CROSS])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_finds_the_same(
    seed: int, monkeypatch: pytest.MonkeyPatch, spec: Any, native: bool, prefix: int, num_beams: int
) -> None:
    if native and compiled.unwanted() is not None:
        pytest.skip(f"no compiled code: {compiled.unwanted()}")
    calls: list[int] = []
    real = decode_native.decode_attention
    counting = lambda query, key, *rest: calls.append(len(key)) or real(query, key, *rest)  # noqa: E731
    monkeypatch.setattr(decode_native, "decode_attention", counting)
    model = masked_lm("marian")
    if spec is not None:
        attnpatch.patch(model, spec)
    wake(model).eval()
    ids = tokens(5, 9)
    mask = torch.ones_like(ids)
    for row in range(1, 5):
        ids[row, -row:], mask[row, -row:] = PAD, 0
    begin = torch.full((5, prefix), PAD) if prefix == 1 else torch.cat([torch.full((5, 1), PAD), tokens(5, 2)], 1)
    options = {"num_beams": num_beams, "max_new_tokens": 2 * FIRST_ROOM, "min_new_tokens": FIRST_ROOM + 2}
    call = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": begin}
    asked = {"return_dict_in_generate": True, "output_scores": True}
    wanted = model.generate(**call, **options, **asked)
    before = model.config._attn_implementation
    calls.clear()
    if not native:
        monkeypatch.setattr(decode_native, "library", lambda source: "it is not wanted")
    with lean_decoding(model, **options, **asked) as arguments:
        assert model.config._attn_implementation == IMPLEMENTATION
        given = arguments()
        found = model.generate(**call, **given)
    assert model.config._attn_implementation == before
    if num_beams > 1:
        # Two beams may be a rounding apart, and change places.
        torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores)
        length = min(found.sequences.shape[1], wanted.sequences.shape[1])
        same = (found.sequences[:, :length] == wanted.sequences[:, :length]).all(1)
        assert same.sum() >= 4
    else:
        assert torch.equal(found.sequences, wanted.sequences)
        for ours, theirs in zip(found.scores, wanted.scores, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    shared = spec in (None, "neural")
    assert {len(layer.keys) for layer in given["past_key_values"].cross_attention_cache.layers} == {
        5 if shared else 5 * num_beams
    }
    # query_value computes its output otherwise, at all sites.
    assert bool(calls) == (native and spec != "query_value+expressive")
    if native and shared:
        assert 5 in calls  # the source's keys


def test_only_a_stock_source_is_shared() -> None:
    for spec, shared in ((None, 3), ({"variant": "neural", "sites": ["decoder"]}, 3), (CROSS, 1)):
        model = masked_lm("marian")
        if spec is not None:
            attnpatch.patch(model, spec)
        with lean_decoding(model, num_beams=3) as arguments:
            cache = arguments()["past_key_values"]
            assert {layer.num_beams for layer in cache.cross_attention_cache.layers} == {shared}
        with lean_decoding(model, own_attention=False, num_beams=3) as arguments:
            assert model.config._attn_implementation != IMPLEMENTATION
            cache = arguments()["past_key_values"]
            assert {layer.num_beams for layer in cache.cross_attention_cache.layers} == {1}


def test_rows_that_are_not_beams_are_refused() -> None:
    cache = BeamCache(masked_lm("marian").config, 4).cross_attention_cache
    rows = torch.randn(9, 2, 5, 8)
    with pytest.raises(TrainingError, match="9 rows are not 4 beams"):
        cache.update(rows, rows, 0)


def test_the_backend_is_restored_after_an_error() -> None:
    model = masked_lm("marian")
    before = model.config._attn_implementation
    with pytest.raises(KeyError), lean_decoding(model, num_beams=2):
        raise KeyError
    assert model.config._attn_implementation == before


@torch.no_grad()
@pytest.mark.parametrize(("name", "value"), [("use_cache", False), ("cache_implementation", "static")])
def test_a_model_that_wants_no_cache_or_another_gets_none_of_ours(seed: int, name: str, value: Any) -> None:
    model, ids = masked_lm("marian"), tokens(4, 7)
    with lean_decoding(model, num_beams=2) as arguments:
        assert "past_key_values" in arguments()
    setattr(model.generation_config, name, value)
    wanted = model.generate(ids, num_beams=2, max_new_tokens=9)
    with lean_decoding(model, num_beams=2, max_new_tokens=9) as arguments:
        assert "past_key_values" not in arguments()
        assert torch.equal(model.generate(ids, **arguments()), wanted)


def test_tokens_that_are_forbidden_in_decoding_stay_so() -> None:
    given = GenerationConfig(bad_words_ids=[[5], [7]], eos_token_id=0)
    lean, processors = lean_generation(given)
    assert lean.bad_words_ids is None
    assert given.bad_words_ids == [[5], [7]]
    scores = torch.randn(3, 9)
    wanted = scores.clone()
    wanted[:, [5, 7]] = float("-inf")
    torch.testing.assert_close(processors(torch.zeros(3, 1, dtype=torch.long), scores), wanted)
    # Of several tokens, the end or a forced one: only bad_words_ids says that.
    others = {"eos_token_id": [0, 4], "forced_eos_token_id": [0, 3], "forced_bos_token_id": 8}
    for words in ([[5, 6]], [[0]], [[4]], [[5], [3]], [[8]]):
        lean, processors = lean_generation(GenerationConfig(bad_words_ids=words, **others))
        assert (lean.bad_words_ids, len(processors)) == (words, 0)
    assert len(lean_generation(GenerationConfig(bad_words_ids=[[5]], **others))[1]) == 1


def test_parts_with_backends_of_their_own_keep_them() -> None:
    model = encoder_decoder("bert")
    model.set_attn_implementation({"encoder": "eager", "decoder": "sdpa"})
    parts = [part for part in model.modules() if hasattr(part, "set_attn_implementation")]
    before = [part.config._attn_implementation for part in parts]
    with lean_decoding(model, num_beams=3):
        pass
    assert [part.config._attn_implementation for part in parts] == before


def test_weights_that_are_asked_for_are_given() -> None:
    model = masked_lm("marian")
    model.set_attn_implementation("eager")
    options = {"num_beams": 2, "max_new_tokens": 3, "output_attentions": True, "return_dict_in_generate": True}
    with lean_decoding(model, **options) as arguments:
        found = model.generate(tokens(2, 5), **arguments())
    assert found.cross_attentions[0][0].shape[-1] == 5
