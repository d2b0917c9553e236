"""Invariant 1: unpatch restores every parameter, buffer, module type, config field and output, bit for bit."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from models import (
    FAMILIES,
    HEADS,
    SPECS,
    batch_of,
    config,
    encoder_decoder,
    head,
    masked_lm,
    same_state,
    spec_for,
    tokens,
)
from torch import nn
from transformers import BertModel

import attnpatch
from attnpatch.errors import PatchError, SpecError, UnsupportedModelError


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
        "config_fields": sorted(vars(model.config)),
        "grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "ids": [(name, id(p)) for name, p in model.named_parameters()],
    }


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**batch).logits


def assert_restored(model: nn.Module, before: dict[str, Any], batch: Any, output: torch.Tensor) -> None:
    after = snapshot(model)
    assert same_state(model, before["state"])
    for part in ("types", "attributes", "config", "config_fields", "grad", "ids"):
        assert after[part] == before[part], part
    assert all(torch.equal(after["buffers"][name], b) for name, b in before["buffers"].items())
    assert torch.equal(logits(model, batch), output)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SPECS)
def test_undo_is_exact(family: str, name: str) -> None:
    model = masked_lm(family)
    batch = batch_of(model)
    before, output = snapshot(model), logits(model, batch)
    report = attnpatch.patch(model, spec_for(name, family))
    assert report.changes
    assert attnpatch.patched_modules(model)
    assert model.config.attnpatch["rules"]
    patched = logits(model, batch)
    if report.exact:
        torch.testing.assert_close(patched, output, atol=2e-5, rtol=1e-5)
    elif name not in ("top_r", "value_aware"):
        assert (patched - output).abs().max() > 1e-4, "the patch does nothing"
    attnpatch.unpatch(model)
    assert_restored(model, before, batch, output)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_nest_and_survive_exceptions(family: str) -> None:
    model = masked_lm(family)
    batch = batch_of(model)
    before, output = snapshot(model), logits(model, batch)
    attnpatch.patch(model, "neural", init="paper")
    outer = middle = logits(model, batch)
    stages: set[str] = set()

    def innermost() -> None:
        with attnpatch.patched(model, {"alignment": {}, "top_r": {"r": 2}}):
            stages.update(*attnpatch.patched_modules(model).values())
            raise KeyError

    def outermost() -> None:
        nonlocal middle
        with attnpatch.patched(model, "expressive"):
            middle = logits(model, batch)
            with pytest.raises(KeyError):
                innermost()
            assert torch.equal(logits(model, batch), middle)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        outermost()
    assert stages == {"project", "score", "select", "regularise"}
    assert torch.equal(logits(model, batch), outer)
    assert not torch.equal(outer, middle)
    assert str(attnpatch.AttentionSpec.parse(model.config.attnpatch)).startswith("neural(")
    attnpatch.unpatch(model)
    assert_restored(model, before, batch, output)


def test_a_patch_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpatch.methods.value_aware import TopR

    model = masked_lm("bert")
    batch = batch_of(model)
    before, output = snapshot(model), logits(model, batch)
    build, calls = TopR.build, []

    def failing(self: Any, options: Any, site: Any) -> Any:
        calls.append(site)
        if len(calls) == 2:
            raise RuntimeError("disk full")
        return build(self, options, site)

    monkeypatch.setattr(TopR, "build", failing)
    with pytest.raises(RuntimeError, match="disk full"):
        attnpatch.patch(model, "neural+top_r+alignment")
    assert_restored(model, before, batch, output)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("neurall", SpecError, "did you mean 'neural'"),
        ("neural+linear", SpecError, "neural and linear both replace the stage 'project'"),
        ({"neural": {"presett": "marian"}}, SpecError, "did you mean 'preset'"),
        ({"variant": "neural", "layers": "7"}, SpecError, "no layer 7; its layers: 0 to 1"),
        ({"variant": "neural", "sites": "cross"}, SpecError, "no cross attention; its sites: encoder"),
        ({"variant": "neural", "sites": "crosss"}, SpecError, "did you mean 'cross'"),
        ({"top_r": {"r": 0}}, SpecError, "1 or more"),
        ({"alignment": {"weight": -1}}, SpecError, "zero or more"),
    ],
)
def test_what_is_refused_changes_nothing(spec: Any, error: type[Exception], words: str) -> None:
    model = masked_lm("bert")
    batch = batch_of(model)
    before, output = snapshot(model), logits(model, batch)
    with pytest.raises(error, match=words):
        attnpatch.patch(model, spec)
    assert_restored(model, before, batch, output)


def test_patching_twice() -> None:
    model = masked_lm("bert")
    attnpatch.patch(model, "neural", layers=0)
    with pytest.raises(PatchError, match="patched with 'neural' already"):
        attnpatch.patch(model, "linear")
    attnpatch.patch(model, "linear", layers=1)
    attnpatch.patch(model, "expressive")
    modules = attnpatch.patched_modules(model)
    assert [m["project"] for m in modules.values()] == ["neural", "linear"]
    assert {m["score"] for m in modules.values()} == {"expressive"}


def test_undo_of_chosen_stages() -> None:
    model = masked_lm("marian")
    batch = batch_of(model)
    attnpatch.patch(model, "expressive", sites="encoder")
    scored = logits(model, batch)
    attnpatch.patch(model, "neural+alignment")
    attnpatch.unpatch(model, stages=["project", "regularise"])
    assert torch.equal(logits(model, batch), scored)
    assert {tuple(m) for m in attnpatch.patched_modules(model).values()} == {("score",)}
    assert str(attnpatch.AttentionSpec.parse(model.config.attnpatch)).startswith("expressive")
    with pytest.raises(SpecError, match="did you mean 'project'"):
        attnpatch.unpatch(model, stages=["projects"])


def test_unpatching_a_stock_model_does_nothing() -> None:
    model = masked_lm("roberta")
    batch = batch_of(model)
    before, output = snapshot(model), logits(model, batch)
    attnpatch.unpatch(model)
    assert_restored(model, before, batch, output)
    attnpatch.patch(model, "stock")
    assert_restored(model, before, batch, output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_in_between_reaches_the_kept_layers(dtype: torch.dtype) -> None:
    model = masked_lm("bert")
    expected = copy.deepcopy(model).to(dtype)
    attnpatch.patch(model, "neural+query_value")
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    attnpatch.unpatch(model)
    assert same_state(model, expected.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_kept(training: bool) -> None:
    model = masked_lm("marian").train(training)
    attnpatch.patch(model, SPECS["all-stages"])
    assert {m.training for m in model.modules()} == {training}
    model.train(not training)
    attnpatch.unpatch(model)
    assert {m.training for m in model.modules()} == {not training}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_copy_stands_alone(family: str) -> None:
    model = masked_lm(family)
    batch = batch_of(model)
    stock = logits(model, batch)
    attnpatch.patch(model, {"neural": {}, "elu": {}, "alignment": {"weight": 1.0}}, init="paper")
    patched = logits(model, batch)
    model.train()(**batch).loss.backward()
    twin = copy.deepcopy(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert torch.equal(logits(twin, batch), patched)
    attnpatch.unpatch(twin)
    assert torch.equal(logits(twin, batch), stock)
    assert not hasattr(twin.config, "attnpatch")
    assert torch.equal(logits(model, batch), patched)
    # The auxiliary loss of each goes to each.
    third = copy.deepcopy(model).train()
    third(**batch)
    assert float(attnpatch.auxiliary_loss(third)) != 0.0
    with torch.no_grad():
        model.eval()(**batch)
    assert float(attnpatch.auxiliary_loss(model)) == 0.0
    assert float(attnpatch.auxiliary_loss(third)) != 0.0


def test_resized_embeddings_and_ties_survive() -> None:
    model = masked_lm("marian")
    attnpatch.patch(model, "neural+alignment")
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.model.shared.weight
    model(input_ids=tokens(2, 5), labels=tokens(2, 5)).loss.backward()
    attnpatch.unpatch(model)
    assert model.lm_head.weight is model.model.shared.weight
    assert model.model.shared.weight.shape[0] == 70


def test_unpatch_inside_a_block_is_seen() -> None:
    model = masked_lm("bert")
    batch = batch_of(model)
    before, output = snapshot(model), logits(model, batch)
    with attnpatch.patched(model, "expressive"):
        attnpatch.unpatch(model)
        attnpatch.patch(model, "elu")
    assert_restored(model, before, batch, output)


def test_without_the_stock_layers_undo_is_refused() -> None:
    model = masked_lm("bert")
    batch = batch_of(model)
    attnpatch.patch(model, "neural+expressive", keep_stock=False)
    patched = logits(model, batch)
    with pytest.raises(PatchError, match="stock projections that 'neural' replaced are not in this model"):
        attnpatch.unpatch(model)
    assert torch.equal(logits(model, batch), patched)
    attnpatch.unpatch(model, stages="score")
    assert {tuple(m) for m in attnpatch.patched_modules(model).values()} == {("project",)}


def test_threads_patch_their_own_models() -> None:
    models = [masked_lm("bert") for _ in range(4)]
    batch = batch_of(models[0])
    outputs = [logits(m, batch) for m in models]
    errors: list[BaseException] = []

    def work(model: Any, output: torch.Tensor) -> None:
        try:
            for _ in range(5):
                with attnpatch.patched(model, "neural+alignment"):
                    torch.testing.assert_close(logits(model, batch), output, atol=2e-5, rtol=1e-5)
                assert torch.equal(logits(model, batch), output)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, outputs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_meta_device_and_half_precision() -> None:
    with torch.device("meta"):
        model = BertModel(config("bert"))
    report = attnpatch.patch(model, SPECS["all-stages"])
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert report.parameters_added > 0
    half = masked_lm("bert").to(torch.bfloat16)
    attnpatch.patch(half, SPECS["all-stages"])
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    batch = batch_of(half)
    half.train()(**batch).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters() if p.grad is not None)


def test_the_report() -> None:
    model = masked_lm("bert")
    count = sum(p.numel() for p in model.parameters())
    report = attnpatch.patch(model, "neural+query_value")
    assert report.parameters_before == count
    assert report.parameters_added == sum(p.numel() for p in model.parameters()) - count
    assert report.flops_added > 0
    assert [c.path for c in report.changes[:4]] == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.self.key",
        "bert.encoder.layer.0.attention.self.value",
        "bert.encoder.layer.1.attention.self.query",
    ]
    assert report.exact
    assert "same function as before" in str(report)
    assert "NOT the same" in str(attnpatch.patch(masked_lm("bert"), "expressive"))
    assert report.to_dict()["parameters_added"] == report.parameters_added


# --- what cannot be patched -----------------------------------------------------------------------------------


def test_compiled_models_are_refused() -> None:
    model = masked_lm("bert")
    with pytest.raises(UnsupportedModelError, match="compiled"):
        attnpatch.patch(torch.compile(model), "expressive")
    model.bert.encoder = torch.compile(model.bert.encoder)
    with pytest.raises(UnsupportedModelError, match=r"patch first, then torch\.compile"):
        attnpatch.patch(model, "expressive")
    model = masked_lm("bert")
    model.compile()
    with pytest.raises(UnsupportedModelError, match="compiled"):
        attnpatch.patch(model, "expressive")


def test_wrapped_models_are_refused(tmp_path: Any) -> None:
    model = masked_lm("bert")
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        attnpatch.patch(nn.DataParallel(model), "expressive")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UnsupportedModelError, match="patch first, then wrap"):
            attnpatch.patch(nn.parallel.DistributedDataParallel(model), "expressive")
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(UnsupportedModelError, match=r"patch the model inside, \.0"):
        attnpatch.patch(nn.Sequential(model), "expressive")


def test_parts_of_models_are_refused() -> None:
    """Their config is the whole model's: it would speak for layers that were not patched."""
    marian = masked_lm("marian")
    with pytest.raises(UnsupportedModelError, match="sites='encoder'"):
        attnpatch.patch(marian.model.encoder, "expressive")
    with pytest.raises(UnsupportedModelError, match="patch the whole model"):
        attnpatch.patch(masked_lm("bert").bert.encoder.layer[0], "expressive")
    with pytest.raises(UnsupportedModelError, match="not str"):
        attnpatch.patch("bert-base-uncased", "expressive")  # type: ignore[arg-type]


class QuantisedLinear(nn.Linear):
    """As bitsandbytes and others have it: a Linear whose weight means something else."""


def test_other_linears_are_refused() -> None:
    model = masked_lm("bert")
    attention = model.bert.encoder.layer[1].attention.self
    attention.key = QuantisedLinear(32, 32)
    batch = batch_of(model)
    before, output = snapshot(model), logits(model, batch)
    with pytest.raises(UnsupportedModelError, match="QuantisedLinear, not a plain"):
        attnpatch.patch(model, "expressive+neural")
    assert_restored(model, before, batch, output)
    attnpatch.patch(model, "expressive")


def test_models_without_a_family_are_refused() -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(UnsupportedModelError, match=r"gpt2.*register_family"):
        attnpatch.patch(model, "expressive")
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        attnpatch.patch_config(model.config, "expressive")


def test_heads_of_different_number() -> None:
    """Marian's decoder has four heads and its encoder two: every module takes its own."""
    model = masked_lm("marian")
    attnpatch.patch(model, "query_value")
    shapes = {name.split(".")[1]: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("gate_value")}
    assert shapes == {"encoder": (HEADS, 16, 16), "decoder": (4, 8, 8)}


def test_models_made_of_models() -> None:
    model = encoder_decoder()
    ids = tokens(2, 6)
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    before, output = snapshot(model), logits(model, batch)
    attnpatch.patch(model, "neural+alignment")
    torch.testing.assert_close(logits(model, batch), output, atol=2e-5, rtol=1e-5)
    assert {s for m in attnpatch.patched_modules(model).values() for s in m} == {"project", "regularise"}
    attnpatch.unpatch(model)
    assert_restored(model, before, batch, output)


def test_layer_drop() -> None:
    model = head("marian", "MarianMTModel", encoder_layerdrop=0.8, decoder_layerdrop=0.8)
    attnpatch.patch(model, "neural+alignment")
    model.train()
    batch = batch_of(model)
    for _ in range(6):
        model(**batch).loss.backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_leaves_the_symmetric_point(family: str) -> None:
    model = masked_lm(family)
    batch = batch_of(model)
    before, output = snapshot(model), logits(model, batch)
    assert not attnpatch.patch(model, {"neural": {"noise": 0.05}}).exact
    up = next(p for name, p in model.named_parameters() if name.endswith(".up.weight"))
    assert (up[:32] + up[32:]).abs().max() > 0.01
    attnpatch.unpatch(model)
    assert_restored(model, before, batch, output)
