"""Every head class that transformers ships builds patched, runs, and returns what the stock one returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, PAD, encoder_decoder, head, head_classes, tokens
from torch import Tensor

import attnpatch

HEAD_CLASSES = [(family, name) for family in FAMILIES for name in head_classes(family)]
EVERYTHING = {"neural": {}, "expressive": {}, "top_r": {"r": 4}, "query_value": {}, "alignment": {"weight": 1.0}}


def inputs(name: str) -> dict[str, Tensor]:
    shape = (2, 3, 7) if "MultipleChoice" in name else (2, 7)
    ids = tokens(*shape)
    mask = torch.ones_like(ids)
    mask[1, ..., -2:] = 0
    ids[mask == 0] = PAD
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "MarianModel":
        batch["decoder_input_ids"] = tokens(2, 5)
    if name == "MarianMTModel":
        batch["decoder_input_ids"] = tokens(2, 7)
    return batch


def labels(name: str) -> dict[str, Tensor]:
    if name in ("BertModel", "RobertaModel", "MarianModel"):
        return {}
    if name == "BertForPreTraining":
        return {"labels": tokens(2, 7), "next_sentence_label": torch.tensor([0, 1])}
    if "QuestionAnswering" in name:
        return {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}
    if any(word in name for word in ("SequenceClassification", "NextSentence", "MultipleChoice")):
        return {"labels": torch.tensor([0, 1])}
    return {"labels": torch.randint(0, 2, (2, 7))}


def test_the_list_is_whole() -> None:
    assert len(HEAD_CLASSES) >= 19
    assert {"BertForPreTraining", "RobertaForCausalLM", "MarianMTModel"} <= {name for _, name in HEAD_CLASSES}


@pytest.mark.parametrize(("family", "name"), HEAD_CLASSES, ids=lambda value: str(value))
def test_heads(family: str, name: str) -> None:
    model = head(family, name)
    batch, wanted = inputs(name), {"output_attentions": True, "output_hidden_states": True}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        stock = model(**batch, **wanted)
    model.set_attn_implementation("sdpa")
    attnpatch.patch(model, EVERYTHING)
    with torch.no_grad():
        patched = model(**batch, **wanted)
        as_tuple = model(**batch, **wanted, return_dict=False)
    assert list(patched) == list(stock)
    assert len(as_tuple) == len(patched)

    def shapes(value: Any) -> Any:
        # A cache is no tuple; its content is what the generation tests look at.
        if isinstance(value, Tensor):
            return tuple(value.shape)
        return [shapes(part) for part in value] if isinstance(value, (tuple, list)) else type(value)

    for key in stock:
        assert shapes(patched[key]) == shapes(stock[key]), key
    # A model without cross-attention has an empty tuple for it.
    assert any(len(stock[k]) == 2 for k in stock if "attentions" in k)
    for key in (k for k in stock if "attentions" in k):
        assert len(patched[key]) == len(stock[key])
        for weights in patched[key]:
            rows = weights.sum(-1)
            assert torch.isfinite(weights).all()
            torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-5, rtol=1e-5)
            assert (weights > 0).sum(-1).max() <= 4

    given = labels(name)
    if not given:
        return
    if name == "MarianMTModel":
        batch.pop("decoder_input_ids")
    model.train()
    with_loss = model(**batch, **given)
    extra = attnpatch.auxiliary_loss(model)
    assert float(extra) != 0.0
    tuple_loss = model(**batch, **given, return_dict=False)[0]
    torch.testing.assert_close(with_loss.loss, tuple_loss, atol=1e-5, rtol=1e-5)
    with_loss.loss.backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None and ".self.attnpatch." in n]
    assert not unreached
    # Once, and not twice: without the regularisation the loss is smaller by exactly its value.
    attnpatch.unpatch(model, stages=["regularise"])
    plain = model(**batch, **given).loss
    torch.testing.assert_close(with_loss.loss - extra, plain, atol=2e-5, rtol=1e-5)


def test_pretraining_without_the_next_sentence() -> None:
    """Its forward gives no loss then, and a tuple starts with the logits, which have to stay as they are."""
    model = head("bert", "BertForPreTraining", {"alignment": {"weight": 1.0}}).train()
    batch = {**inputs("BertForPreTraining"), "labels": tokens(2, 7)}
    as_dict, as_tuple = model(**batch), model(**batch, return_dict=False)
    assert as_dict.loss is None
    assert torch.equal(as_dict.prediction_logits, as_tuple[0])


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("from_parts", [True, False])
def test_encoder_decoder_models(family: str, from_parts: bool, tmp_path: Any) -> None:
    """Patched whole, or made of a patched encoder and a patched decoder: the loss has both auxiliary losses."""
    from transformers import AutoModel, AutoModelForCausalLM, EncoderDecoderModel

    model = encoder_decoder(family)
    spec = {"neural": {}, "expressive": {}, "alignment": {"weight": 1.0}}
    if from_parts:
        encoder = AutoModel.from_config(attnpatch.patch_config(model.config.encoder, spec))
        decoder = AutoModelForCausalLM.from_config(attnpatch.patch_config(model.config.decoder, spec))
        built = EncoderDecoderModel(encoder=encoder, decoder=decoder)
        built.config.decoder_start_token_id, built.config.pad_token_id = 0, PAD
        model = built
    else:
        attnpatch.patch(model, spec)
    assert len(attnpatch.patched_modules(model)) == 6
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = tokens(2, 6)
    out = model(input_ids=ids, labels=ids)
    extra = attnpatch.auxiliary_loss(model)
    plain = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), ids.flatten())
    assert float(extra) != 0.0
    torch.testing.assert_close(out.loss, plain + extra, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = EncoderDecoderModel.from_pretrained(tmp_path)
    assert attnpatch.patched_modules(again) == attnpatch.patched_modules(model)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, decoder_input_ids=ids).logits
        assert torch.equal(again(input_ids=ids, decoder_input_ids=ids).logits, expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attentions_on_request(backend: str) -> None:
    model = head("roberta", "RobertaForMaskedLM", "expressive")
    model.set_attn_implementation(backend)
    batch = inputs("RobertaForMaskedLM")
    assert len(model(**batch, output_attentions=True).attentions) == 2
    assert model(**batch).attentions is None
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
    if backend == "eager":
        model.config.output_attentions = True
        assert len(model(**batch).attentions) == 2


def test_attentions_are_those_that_were_used() -> None:
    """Row by row: output = weights @ value, for a variant whose aggregation is stock."""
    model = head("bert", "BertModel", {"expressive": {}, "top_r": {"r": 2}})
    attention = model.encoder.layer[0].attention.self
    seen: dict[str, Tensor] = {}
    attention.value.register_forward_hook(lambda m, a, output: seen.update(value=output))
    attention.register_forward_hook(lambda m, a, output: seen.update(output=output[0]))
    batch = inputs("BertModel")
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[0]
    value = seen["value"].view(2, 7, 2, 16).transpose(1, 2)
    expected = (weights @ value).transpose(1, 2).reshape(2, 7, 32)
    torch.testing.assert_close(seen["output"], expected, atol=1e-5, rtol=1e-5)
