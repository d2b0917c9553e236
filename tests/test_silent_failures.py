"""Ways in which a patched model once went wrong silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
)

import attnpatch
from attnpatch.errors import CheckpointError, PatchError, SpecError

SIZE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
IDS = torch.arange(14).view(2, 7) + 5


def test_a_patched_part_keeps_its_weights_in_a_composite_model() -> None:
    encoder = BertModel(BertConfig(**SIZE)).eval()
    attnpatch.patch(encoder, "neural+query_value+alignment")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model = EncoderDecoderModel(
        encoder=encoder, decoder=BertLMHeadModel(BertConfig(**SIZE, is_decoder=True, add_cross_attention=True))
    )
    after = model.encoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_patching_a_model_leaves_the_callers_config_alone() -> None:
    config = BertConfig(**SIZE)
    first, second = BertForMaskedLM(config), BertForMaskedLM(config)
    attnpatch.patch(first, "neural")
    assert not hasattr(config, "attnpatch")
    assert not attnpatch.patched_modules(BertForMaskedLM(config))
    assert not hasattr(second.config, "attnpatch")
    assert first.config.attnpatch["rules"]
    attnpatch.patch(second, "expressive")
    second.set_attn_implementation("eager")
    assert second(input_ids=IDS).logits.shape == (2, 7, 60)


ASKS = "'attnpatch' chooses no variant.*stock.*attnpatch.patch.*patch_config.*convert"


def test_asking_a_stock_model_for_attnpatch_is_refused(tmp_path: Path) -> None:
    """Once it loaded a stock model, or failed at the first forward pass with an AttributeError."""
    config = BertConfig(**SIZE)
    stock = BertForMaskedLM(config).eval()
    stock.save_pretrained(tmp_path)
    asked: dict[str, Any] = {"attn_implementation": "attnpatch"}
    for attempt in (
        lambda: BertForMaskedLM.from_pretrained(tmp_path, **asked),
        lambda: AutoModelForMaskedLM.from_pretrained(tmp_path, **asked),
        lambda: BertForMaskedLM.from_pretrained(tmp_path, config=config, **asked),
        lambda: AutoModelForMaskedLM.from_pretrained(tmp_path, config=config, **asked),
        lambda: AutoModelForMaskedLM.from_config(config, **asked),
        lambda: AutoConfig.from_pretrained(tmp_path, **asked),
        lambda: BertConfig(**SIZE, **asked),
        lambda: setattr(config, "_attn_implementation", "attnpatch"),
        lambda: stock.set_attn_implementation("attnpatch"),
        lambda: stock.bert.set_attn_implementation({"": "attnpatch"}),
    ):
        with pytest.raises(SpecError, match=ASKS):
            attempt()
    assert stock.config._attn_implementation == config._attn_implementation == "sdpa"
    assert stock(input_ids=IDS).logits.isfinite().all()
    attnpatch.patch(stock, "neural")
    attnpatch.unpatch(stock)
    with pytest.raises(SpecError, match=ASKS):
        stock.set_attn_implementation("attnpatch")


def test_asking_a_patched_model_for_attnpatch_is_not(tmp_path: Path) -> None:
    config = BertConfig(**SIZE)
    BertForMaskedLM(config).save_pretrained(tmp_path / "stock")
    attnpatch.convert(tmp_path / "stock", tmp_path / "new", "neural+expressive")
    asked: dict[str, Any] = {"attn_implementation": "attnpatch"}
    given = attnpatch.patch_config(config, "neural+expressive")
    models = [
        BertForMaskedLM.from_pretrained(tmp_path / "new", **asked),
        AutoModelForMaskedLM.from_pretrained(tmp_path / "new", **asked),
        AutoModelForMaskedLM.from_pretrained(tmp_path / "stock", config=given, **asked),
        BertForMaskedLM.from_pretrained(tmp_path / "stock", config=given, **asked),
    ]
    logits = [model.eval()(input_ids=IDS).logits for model in models]
    for model, value in zip(models, logits, strict=True):
        assert model.config._attn_implementation == "sdpa"
        assert len(attnpatch.patched_modules(model)) == 2
        torch.testing.assert_close(value, logits[0], atol=1e-5, rtol=1e-5)
        model.set_attn_implementation("eager")
        model.set_attn_implementation("attnpatch")
        assert model.config._attn_implementation == "sdpa"
    assert len(attnpatch.patched_modules(AutoModelForMaskedLM.from_config(given, **asked))) == 2
    # A part that is patched makes the whole one that is: its config has the spec.
    whole = EncoderDecoderModel(
        encoder=BertModel.from_pretrained(tmp_path / "new"),
        decoder=BertLMHeadModel(BertConfig(**SIZE, is_decoder=True, add_cross_attention=True)),
    )
    whole.save_pretrained(tmp_path / "whole")
    again = EncoderDecoderModel.from_pretrained(tmp_path / "whole")
    assert len(attnpatch.patched_modules(again)) == 2


def test_a_folder_without_config_that_holds_patched_weights_is_refused(tmp_path: Path) -> None:
    config = BertConfig(**SIZE)
    model = BertForMaskedLM(config)
    attnpatch.patch(model, "neural")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="not the stock ones"):
        BertForMaskedLM.from_pretrained(tmp_path, config=attnpatch.patch_config(config, "neural"))


def test_mismatched_attention_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = BertForMaskedLM(attnpatch.patch_config(BertConfig(**SIZE), "neural"))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = next(name for name in state if name.endswith("query.up.weight"))
    state[key] = state[key][:10].contiguous()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"query\.up\.weight"):
        BertForMaskedLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_failure_inside_a_module_leaves_it_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpatch.methods.neural import Neural

    model = BertForMaskedLM(BertConfig(**SIZE))
    build, calls = Neural.build, []

    def failing(self: Neural, *args: Any) -> nn.Module:
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return build(self, *args)

    monkeypatch.setattr(Neural, "build", failing)
    with pytest.raises(MemoryError):
        attnpatch.patch(model, "neural", init="paper")
    assert len(calls) == 5
    assert not attnpatch.patched_modules(model)
    assert {type(m.query) for m in model.modules() if hasattr(m, "query")} == {nn.Linear}


def test_pooled_refuses_a_mask_that_differs_by_query() -> None:
    model = BertForMaskedLM(BertConfig(**SIZE)).eval()
    attnpatch.patch(model, {"query_value": {"gate": "pooled"}}, init="paper")
    causal = torch.ones(7, 7).tril().bool()[None, None].expand(2, 1, 7, 7)
    with pytest.raises(PatchError, match="pairwise"):
        model(input_ids=IDS, attention_mask=causal)
    padded = torch.ones(2, 7, dtype=torch.long)
    padded[1, 4:] = 0
    assert model(input_ids=IDS, attention_mask=padded).logits.isfinite().all()


def test_weight_decay_is_not_mistaken_for_an_untrained_projection() -> None:
    from attnpatch.methods.neural import Neural, NeuralOptions

    variant, linear = Neural(), nn.Linear(16, 16)
    for preset in ("roberta", "marian"):
        options = NeuralOptions(preset=preset)
        module = variant.build(options, 16, 16)
        variant.preserve(module, linear, options)
        recovered = variant.recover(module, options, "preserve")
        assert recovered is not None
        assert torch.equal(recovered.weight, linear.weight)
        with torch.no_grad():
            for layer in (module.up, module.down):
                layer.weight.mul_(0.9)
        assert variant.recover(module, options, "preserve") is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"neural": False}, "options of neural are False"),
        ({"variant": "neural", "options": []}, "options are"),
        ({"format": 1, "rules": [{"variants": {"neural": {}}, "layer": [0]}]}, "layer"),
    ],
)
def test_specs_that_were_read_as_something_else(spec: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        attnpatch.AttentionSpec.parse(spec)


@pytest.mark.parametrize("layers", ["²", "0-1000000000", "1-"])
def test_layers_that_are_no_numbers(layers: str) -> None:
    with pytest.raises(SpecError, match="layers are numbers"):
        attnpatch.AttentionSpec.parse("neural", layers=layers)


def test_a_revision_belongs_to_the_hub(tmp_path: Path) -> None:
    from attnpatch.checkpoint import open_checkpoint
    from attnpatch.verification import verify

    (tmp_path / "some").mkdir()
    with pytest.raises(CheckpointError, match="belongs to a name on the hub"):
        open_checkpoint(tmp_path / "some", "main")
    with pytest.raises(CheckpointError, match="needs the checkpoint"):
        verify(tmp_path / "some", against_revision="main")
