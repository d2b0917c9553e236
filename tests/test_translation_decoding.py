"""Decoding by beams: the cache, and attention whose rows share their source."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import PAD, masked_lm, tokens, wake
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import attnpatch
from attnpatch.experiments.translation.beam_cache import FIRST_ROOM, BeamCache, GrowingLayer, _Spare
from attnpatch.experiments.translation.decoding import IMPLEMENTATION, decoding_attention, lean_decoding
from attnpatch.kernels import decode

CROSS = {"variant": "expressive", "sites": ["cross"]}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("length", "mask"), [(1, "none"), (1, "keys"), (3, "none"), (3, "keys"), (3, "full")])
def test_rows_that_share_their_source(
    seed: int, monkeypatch: pytest.MonkeyPatch, native: bool, length: int, mask: str
) -> None:
    if not native:
        monkeypatch.setattr(decode, "library", lambda source: "it is not wanted")
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
    ours, stock = GrowingLayer(_Spare()), DynamicLayer()
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
    ours.reset()
    assert ours.get_seq_length() == 0


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
def test_generate_finds_the_same(
    seed: int, monkeypatch: pytest.MonkeyPatch, spec: Any, native: bool, prefix: int
) -> None:
    if not native:
        monkeypatch.setattr(decode, "library", lambda source: "it is not wanted")
    model = masked_lm("marian")
    if spec is not None:
        attnpatch.patch(model, spec)
    wake(model).eval()
    ids = tokens(5, 9)
    mask = torch.ones_like(ids)
    for row in range(1, 5):
        ids[row, -row:], mask[row, -row:] = PAD, 0
    begin = torch.full((5, prefix), PAD) if prefix == 1 else torch.cat([torch.full((5, 1), PAD), tokens(5, 2)], 1)
    options = {"num_beams": 3, "max_new_tokens": 2 * FIRST_ROOM, "min_new_tokens": FIRST_ROOM + 2}
    call = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": begin, **options}
    wanted = model.generate(**call, return_dict_in_generate=True, output_scores=True)
    before = model.config._attn_implementation
    with lean_decoding(model, 3) as arguments:
        assert model.config._attn_implementation == IMPLEMENTATION
        found = model.generate(**call, **arguments(), return_dict_in_generate=True, output_scores=True)
    assert model.config._attn_implementation == before
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores)


def test_only_a_stock_source_is_shared() -> None:
    for spec, shared in ((None, 3), ({"variant": "neural", "sites": ["decoder"]}, 3), (CROSS, 1)):
        model = masked_lm("marian")
        if spec is not None:
            attnpatch.patch(model, spec)
        with lean_decoding(model, 3) as arguments:
            cache = arguments()["past_key_values"]
            assert {layer.beams for layer in cache.cross_attention_cache.layers} == {shared}
        with lean_decoding(model, 3, choose_attention=False) as arguments:
            assert model.config._attn_implementation != IMPLEMENTATION
            assert {layer.beams for layer in arguments()["past_key_values"].cross_attention_cache.layers} == {1}
