"""A family and a variant of a third party: one file each, and nothing else has to know."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import masked_lm, tokens
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration

import attnpatch
from attnpatch import registry
from attnpatch.errors import SpecError, UnsupportedModelError
from attnpatch.families.base import Family
from attnpatch.methods.base import StageVariant

ROOT = Path(__file__).parent.parent
EXAMPLE, GUIDE = ROOT / "examples" / "bart_family.py", ROOT / "docs" / "extending.md"


FAMILY, VARIANT = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
"""The guide's two blocks of code, which the tests run as they stand there."""


def run_as_module(name: str, code: str) -> ModuleType:
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, name, "exec"), module.__dict__)
    return module


@pytest.fixture(params=["example", "guide"])
def bart(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A small BART, with the family registered for the length of the test."""
    run_as_module("bart_family", EXAMPLE.read_text(encoding="utf-8") if request.param == "example" else FAMILY)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=40,
            init_std=0.3,
            forced_eos_token_id=None,
            dropout=0.0,
        )
    )
    yield model.eval()
    del registry._families["bart"]
    sys.modules.pop("bart_family", None)


def test_the_example_is_short() -> None:
    code = [
        line for line in EXAMPLE.read_text().splitlines() if line.strip() and not line.startswith(("import", "from"))
    ]
    assert len(code) <= 22


def test_a_fourth_family(bart: Any, tmp_path: Path) -> None:
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens(2, 5)}
    state = {name: tensor.clone() for name, tensor in bart.state_dict().items()}
    with torch.no_grad():
        stock = bart(**batch).logits
    report = attnpatch.patch(bart, {"neural": {"preset": "roberta"}, "query_value": {}, "alignment": {"weight": 1.0}})
    assert report.exact
    assert len(attnpatch.patched_modules(bart)) == 6
    with torch.no_grad():
        torch.testing.assert_close(bart(**batch).logits, stock, atol=1e-4, rtol=1e-4)
    attnpatch.patch(bart, "expressive")
    with torch.no_grad():
        expected = bart(**batch).logits
        changed = {**batch, "input_ids": ids.masked_fill(mask == 0, 9)}
        assert torch.equal(bart(**changed).logits, expected)
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(
        bart.generate(**inputs, **options, use_cache=True), bart.generate(**inputs, **options, use_cache=False)
    )
    bart.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)
    bart.train()(input_ids=ids, labels=ids).loss.backward()
    attnpatch.unpatch(bart)
    assert all(torch.equal(tensor, state[name]) for name, tensor in bart.state_dict().items())


def test_family_defaults(bart: Any) -> None:
    attnpatch.patch(bart, "neural")
    assert bart.config.attnpatch["rules"][0]["variants"]["neural"]["preset"] == "marian"
    assert bart.model.encoder.layers[0].self_attn.out_proj.norm is not None


def test_without_the_family() -> None:
    with pytest.raises(UnsupportedModelError, match="unknown model type 'bart'"):
        attnpatch.patch_config(BartConfig(), "neural")


def test_names_that_are_taken(bart: Any) -> None:
    with pytest.raises(SpecError, match="'bart' is registered already"):
        attnpatch.register_family(registry.families()["bart"])
    with pytest.raises(SpecError, match="belongs to family 'bert'"):
        attnpatch.register_family(Family("mine", ("bert",), {}, {}, "h", "d"))


@pytest.fixture
def window() -> Iterator[ModuleType]:
    """The guide's variant, registered for the length of the test."""
    yield run_as_module("window_variant", VARIANT)
    del registry._variants["window"]
    sys.modules.pop("window_variant", None)


def test_a_variant_of_ones_own(window: ModuleType, tmp_path: Path) -> None:
    assert "window" in attnpatch.variants()
    model = masked_lm("marian")
    report = attnpatch.patch(model, {"window": {"width": 1}, "expressive": {}, "query_value": {}})
    assert any("window is not defined for cross" in note for note in report.notes)
    ids = tokens(2, 7)
    attentions = model(input_ids=ids, decoder_input_ids=ids, output_attentions=True)
    assert ((attentions.encoder_attentions[0] > 0).sum(-1) <= 3).all()
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        assert torch.equal(again(input_ids=ids, decoder_input_ids=ids).logits, expected)
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))
    with pytest.raises(SpecError, match="window and top_r both replace"):
        attnpatch.AttentionSpec.parse("window+top_r")
    with pytest.raises(SpecError, match="zero or more"):
        attnpatch.AttentionSpec.parse({"window": {"width": -1}})
    with pytest.raises(SpecError, match="registered already"):
        attnpatch.register_variant(window.WindowVariant)
    with pytest.raises(SpecError, match="window is not defined for cross"):
        attnpatch.patch(masked_lm("marian"), "window", sites="cross")


def test_variants_that_cannot_be() -> None:
    for change, words in (
        ({"name": "a+b"}, "cannot be called 'a\\+b'"),
        ({"name": "stock"}, "cannot be called 'stock'"),
        ({"name": "odd", "stage": "selects"}, "did you mean 'select'"),
        ({"name": "odd", "Options": int}, "must be a dataclass"),
    ):
        with pytest.raises(SpecError, match=words):
            attnpatch.register_variant(type("Odd", (StageVariant,), {"stage": "select", **change}))
