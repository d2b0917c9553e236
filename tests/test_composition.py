"""Invariant 8: every pair of variants on different stages builds, trains a step and reloads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, TRAINABLE, batch_of, masked_lm

import attnpatch
from attnpatch.errors import SpecError
from attnpatch.registry import get_variant

NAMES = attnpatch.variants()
PAIRS = [
    (first, second)
    for first, second in itertools.combinations(NAMES, 2)
    if get_variant(first).stage != get_variant(second).stage
]
SAME_STAGE = [
    (first, second)
    for first, second in itertools.combinations(NAMES, 2)
    if get_variant(first).stage == get_variant(second).stage
]


def combined(*names: str) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    for name in names:
        form = TRAINABLE[name]
        spec.update({form: {}} if isinstance(form, str) else form)
    return spec


def test_the_table_has_every_variant() -> None:
    # A variant that another test file registers and removes again is none of ours.
    assert set(TRAINABLE) <= set(NAMES)
    assert {"neural", "linear", "expressive", "polynomial", "elu", "top_r", "value_aware", "query_value"} <= set(
        TRAINABLE
    )


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name)
def test_pairs(first: str, second: str, tmp_path: Path) -> None:
    family = FAMILIES[(NAMES.index(first) + NAMES.index(second)) % 3]
    check(family, combined(first, second), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_five_stages(family: str, tmp_path: Path) -> None:
    check(family, combined("neural", "elu", "value_aware", "query_value", "alignment"), tmp_path)


def test_different_variants_at_different_places(tmp_path: Path) -> None:
    rules = [
        {"variant": "neural+elu", "sites": "encoder", "layers": 0},
        {"variant": "linear", "sites": "encoder", "layers": 1},
        {"variant": "polynomial+query_value", "sites": "decoder"},
        {"variant": "expressive", "sites": "cross", "layers": "1"},
        {"variant": "alignment", "options": {"alignment": {"method": "gan", "weight": 1.0}}},
    ]
    check("marian", rules, tmp_path)


def check(family: str, spec: Any, folder: Path) -> None:
    model = masked_lm(family)
    attnpatch.patch(model, spec)
    batch = batch_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    new = [n for n in before if ".attnpatch." in n or ".up." in n or ".down." in n]
    still = [n for n in new if torch.equal(before[n], dict(model.named_parameters())[n])]
    # A gate of strength zero hides the weights behind it from the first step.
    assert not [n for n in still if ".aggregate." not in n or n.endswith("strength")], still
    model.eval()
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert attnpatch.patched_modules(again) == attnpatch.patched_modules(model)


@pytest.mark.parametrize(("first", "second"), SAME_STAGE, ids=lambda name: name)
def test_two_for_one_stage(first: str, second: str) -> None:
    with pytest.raises(SpecError, match=f"{first} and {second} both replace the stage"):
        attnpatch.AttentionSpec.parse(f"{first}+{second}")
