"""Invariant 5: generating with a cache equals generating without; beams, left padding and batch size do not matter.

In float64, where two candidates are never within rounding of each other.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import PAD, SPECS, encoder_decoder, head, masked_lm, spec_for, tokens, wake
from torch import Tensor

import attnpatch

NAMES = [name for name in SPECS if name not in ("query_value-pooled", "neural-other-preset")]
# The oracle is an analysis tool, slow by nature: it is generated with once.
FAST = [name for name in NAMES if name != "value_aware"]
NEW = 6


def patched(model: Any, name: str, family: str) -> Any:
    attnpatch.patch(model, spec_for(name, family))
    return wake(model).double()


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """(tokens, logits of each step [steps, batch, vocabulary])"""
    result = model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=PAD,
        **options,
    )
    return result.sequences, torch.stack(result.logits)


def assert_same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1], second[1], atol=1e-9, rtol=1e-9)


def padded(left: bool) -> dict[str, Tensor]:
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    where = slice(0, 3) if left else slice(4, None)
    mask[1, where] = 0
    ids[1, where] = PAD
    return {"input_ids": ids, "attention_mask": mask}


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sequence of the batch without its padding."""
    keep = inputs["attention_mask"][row].bool()
    return {name: tensor[row : row + 1, keep] for name, tensor in inputs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_marian(name: str) -> None:
    model = patched(masked_lm("marian"), name, "marian")
    inputs = padded(left=False)
    for beams in (1, 3):
        cached = generate(model, inputs, num_beams=beams, use_cache=True)
        assert_same(cached, generate(model, inputs, num_beams=beams, use_cache=False))
        for row in (0, 1):
            single = generate(model, alone(inputs, row), num_beams=beams)
            assert torch.equal(single[0][0], cached[0][row]), (beams, row)
    model.set_attn_implementation("eager")
    assert torch.equal(generate(model, inputs, num_beams=3)[0], cached[0])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_decoders_with_left_padding(family: str, name: str) -> None:
    cls = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM"}[family]
    model = patched(head(family, cls), name, family)
    inputs = padded(left=True)
    for beams in (1, 2):
        cached = generate(model, inputs, num_beams=beams, use_cache=True)
        assert_same(cached, generate(model, inputs, num_beams=beams, use_cache=False))
    single = generate(model, {k: v[:1] for k, v in inputs.items()}, num_beams=2)
    assert torch.equal(single[0][0], cached[0][0])
    # These models count positions from the left edge, padding included; the same positions, the same tokens.
    row = {k: v[1:2] for k, v in inputs.items()}
    changed = {**row, "input_ids": row["input_ids"].masked_fill(row["attention_mask"] == 0, 9)}
    if family == "bert":
        assert torch.equal(generate(model, row)[0][0, 7:], generate(model, changed)[0][0, 7:])


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("name", FAST)
def test_encoder_decoder_models(family: str, name: str) -> None:
    model = patched(encoder_decoder(family), name, family)
    inputs = padded(left=False)
    for beams in (1, 2):
        cached = generate(model, inputs, num_beams=beams, use_cache=True)
        assert_same(cached, generate(model, inputs, num_beams=beams, use_cache=False))
    single = generate(model, alone(inputs, 1), num_beams=2)
    assert torch.equal(single[0][0], cached[0][1])


@pytest.mark.parametrize("name", ["expressive", "top_r", "query_value"])
def test_chunks_on_a_cache(name: str) -> None:
    """Several tokens at once on a filled cache see what one at a time would."""
    model = patched(head("bert", "BertLMHeadModel"), name, "bert")
    ids = tokens(2, 9)
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)
        with torch.no_grad():
            whole = model(ids).logits
            first = model(ids[:, :4], use_cache=True)
            rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["neural", "expressive"])
def test_static_caches(name: str) -> None:
    model = patched(masked_lm("marian"), name, "marian")
    inputs = padded(left=False)
    expected = generate(model, inputs)
    static = generate(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(static[0], expected[0])
