"""Invariant 4: padding changes nothing, no later token is seen: every variant, family, site, dtype and backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import PAD, PLACES, Place, cases, patched_at, tokens
from torch import Tensor

import attnpatch

LENGTH = 9
CASES = [pytest.param(place, name, id=f"{place}-{name}") for place, name in cases()]
CAUSAL = [pytest.param(place, name, id=f"{place}-{name}") for place, name in cases() if place.site == "decoder"]
BACKENDS = ("sdpa", "eager")
DTYPES = (torch.float32, torch.bfloat16)

Run = Callable[[Any, Tensor, Tensor], Tensor]


def run_encoder(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


def run_decoder(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    memory = torch.linspace(-1, 1, 2 * 5 * 32).view(2, 5, 32).to(model.dtype)
    if model.config.model_type == "marian":
        return model(encoder_outputs=(memory,), decoder_input_ids=ids, decoder_attention_mask=mask).logits
    return model(input_ids=ids, attention_mask=mask).logits


def run_cross(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The source's tokens as random vectors, a function of their ids; hidden ones are large garbage, not zeros."""
    table = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)).to(model.dtype)
    table[60:] *= 1e4
    memory, target = table[ids], torch.arange(8, 14).expand(2, 6)
    if model.config.model_type == "marian":
        return model(encoder_outputs=(memory,), attention_mask=mask, decoder_input_ids=target).logits
    return model(input_ids=target, encoder_hidden_states=memory, encoder_attention_mask=mask).logits


RUN: dict[str, Run] = {"encoder": run_encoder, "decoder": run_decoder, "cross": run_cross}


def shown(place: Place, output: Tensor, mask: Tensor) -> Tensor:
    """The outputs that matter: those of tokens that are no padding. At cross sites the queries are all real."""
    return output if place.site == "cross" else output[mask.bool()]


def encoder_of(place: Place, model: Any) -> Any:
    return model.model.encoder if (place.family, place.site) == ("marian", "encoder") else model


@pytest.mark.parametrize(("place", "name"), CASES)
@torch.no_grad()
def test_padding_changes_nothing(place: Place, name: str) -> None:
    for dtype in DTYPES:
        model = patched_at(place, name, dtype)
        inner, run = encoder_of(place, model), RUN[place.site]
        for backend in BACKENDS:
            model.set_attn_implementation(backend)
            for hidden in (slice(LENGTH - 3, None), slice(0, 3)):  # right and left padding
                # Not the padding token itself, from which RoBERTa derives positions.
                ids, mask = tokens(2, LENGTH).clamp(max=59), torch.ones(2, LENGTH, dtype=torch.long)
                mask[1, hidden] = 0
                other = ids.clone()
                other[1, hidden] = torch.randint(60, 64, (3,))
                before, after = run(inner, ids, mask), run(inner, other, mask)
                assert torch.isfinite(before).all()
                assert torch.equal(shown(place, before, mask), shown(place, after, mask)), (dtype, backend, hidden)
            if name in ("neural", "expressive", "elu"):
                # A token that is not hidden is seen, so the test can fail (first tokens are seen at every site).
                seen = run(inner, other, torch.ones_like(mask))
                assert not torch.equal(shown(place, seen, mask), shown(place, after, mask))


@pytest.mark.parametrize(("place", "name"), CAUSAL)
@torch.no_grad()
def test_no_later_token_is_seen(place: Place, name: str) -> None:
    for dtype in DTYPES:
        model = patched_at(place, name, dtype)
        for backend in BACKENDS:
            model.set_attn_implementation(backend)
            ids = tokens(2, LENGTH)
            padded = torch.ones_like(ids)
            padded[1, :2] = 0
            for mask in (None, torch.ones_like(ids), padded):
                cut = int(torch.randint(3, LENGTH - 1, ()))
                other = ids.clone()
                other[:, cut:] = (ids[:, cut:] + 1 + torch.randint(0, 20, (2, LENGTH - cut)) - 4) % 60 + 4
                before, after = run_decoder(model, ids, mask), run_decoder(model, other, mask)
                assert torch.equal(before[0, :cut], after[0, :cut]), (dtype, backend)
                assert torch.equal(before[1, 2:cut], after[1, 2:cut]), (dtype, backend)
                assert not torch.equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize(("place", "name"), [p for p in CASES if p.values[0].site != "cross"])
@torch.no_grad()
def test_masks_of_four_dimensions(place: Place, name: str) -> None:
    """A [B, 1, T, T] mask that says what the [B, T] mask says gives the same outputs; bool or additive."""
    model = patched_at(place, name)
    inner, run = encoder_of(place, model), RUN[place.site]
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    visible = mask[:, None, None, :].bool().expand(2, 1, LENGTH, LENGTH)
    if place.site == "decoder":
        visible = visible & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    for backend, dense in (("sdpa", visible), ("sdpa", additive), ("eager", additive)):
        model.set_attn_implementation(backend)
        expected, given = run(inner, ids, mask), run(inner, ids, dense)
        torch.testing.assert_close(shown(place, given, mask), shown(place, expected, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("name", ["expressive", "top_r"])
@torch.no_grad()
def test_flex_attention(place: Place, name: str) -> None:
    """With transformers' flex attention as the backend (which compiles its masks) the outputs are those of sdpa."""
    model = patched_at(place, name)
    inner, run = encoder_of(place, model), RUN[place.site]
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    expected = run(inner, ids, mask)
    model.set_attn_implementation("flex_attention")
    given = run(inner, ids, mask)
    torch.testing.assert_close(shown(place, given, mask), shown(place, expected, mask), atol=1e-4, rtol=1e-4)


def test_flex_masks() -> None:
    """A BlockMask is read exactly, through its function."""
    from torch.nn.attention.flex_attention import create_block_mask

    from attnpatch.integration import _dense_mask

    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    block = create_block_mask(lambda b, h, i, j: (j <= i + 2) & valid[b, j], 2, None, 3, 5, device="cpu")
    dense = _dense_mask(block, torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8), True, "flex_attention")
    assert dense.shape == (2, 1, 3, 5)
    assert torch.equal(dense[:, 0], torch.ones(3, 5, dtype=torch.bool).tril(2) & valid[:, None])


@pytest.mark.parametrize("kind", ["rows without a key", "one key"])
@torch.no_grad()
def test_extreme_masks_stay_finite(kind: str) -> None:
    for place, name in cases():
        if place.site != "encoder" or place.family != "bert":
            continue
        model = patched_at(place, name)
        ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, 0 if kind == "rows without a key" else 1 :] = 0
        for backend in BACKENDS:
            model.set_attn_implementation(backend)
            output = run_encoder(model, ids, mask)
            assert torch.isfinite(output).all(), (name, backend)
            alone = run_encoder(model, ids[:1], mask[:1])
            torch.testing.assert_close(output[:1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["ct", "gan", "ot", "mmd"])
@pytest.mark.parametrize("family", ["bert", "roberta", "marian"])
def test_the_alignment_loss_ignores_padding(family: str, method: str) -> None:
    from models import batch_of, masked_lm

    model = masked_lm(family)
    attnpatch.patch(model, {"alignment": {"method": method, "weight": 1.0}})
    model.train()
    batch = batch_of(model)
    losses = []
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        for content in (PAD, 7, 40):
            batch["input_ids"][batch["attention_mask"] == 0] = content
            model(**batch)
            losses.append(float(attnpatch.auxiliary_loss(model).detach()))
    assert losses[0] != 0.0
    assert max(losses) - min(losses) <= 5e-6 * max(1.0, abs(losses[0])), losses
    full = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    model(**full)
    assert abs(float(attnpatch.auxiliary_loss(model).detach()) - losses[0]) > 1e-5


def test_marian_targets_without_a_mask() -> None:
    """Training gives Marian's decoder no mask: its padding is told by the labels, and ignored by the alignment."""
    from models import masked_lm

    model = masked_lm("marian")
    attnpatch.patch(model, {"alignment": {"method": "ot"}}, sites="decoder")
    model.train()
    source, labels = tokens(2, 6), tokens(2, 8)
    losses = []
    for extra in (0, 5):
        padded = torch.cat([labels, torch.full((2, extra), -100)], dim=1)
        model(input_ids=source, labels=padded)
        losses.append(float(attnpatch.auxiliary_loss(model).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@torch.no_grad()
def test_flash_masks() -> None:
    """flash attention passes the padding [B, S] or nothing; read densely, they mean what they mean there."""
    from attnpatch.integration import _dense_mask

    query, key = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 5, 4)
    corner = torch.ones(3, 5, dtype=torch.bool).tril(2)
    assert torch.equal(_dense_mask(None, query, key, True, "flash_attention_2")[0, 0], corner)
    assert _dense_mask(None, query, key, True, "sdpa") is None
    assert _dense_mask(None, query, key, False, "flash_attention_2") is None
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert torch.equal(_dense_mask(padding, query, key, True, "flash_attention_2")[1, 0], corner & padding[1].bool())
    dense = _dense_mask(padding, query, key, False, "flash_attention_2")
    assert torch.equal(dense.expand(2, 1, 3, 5)[1, 0], padding[1].bool().expand(3, 5))
