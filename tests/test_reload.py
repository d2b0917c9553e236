"""Invariants 2 and 3: the same function where it is promised, and save -> load -> the same logits or an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, SPECS, batch_of, config, head, masked_lm, same_state, spec_for, tokens
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    MarianForCausalLM,
    MarianMTModel,
)

import attnpatch
from attnpatch.errors import AttnpatchError, CheckpointError, PatchError, SpecError

AUTO = {"bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM, "marian": AutoModelForSeq2SeqLM}


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**batch).logits


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Any, Path]:
    """A BERT patched with neural+expressive, and its folder."""
    model = masked_lm("bert")
    model.save_pretrained(tmp_path / "stock")
    attnpatch.patch(model, "neural+expressive")
    model.save_pretrained(tmp_path / "patched")
    return model, tmp_path / "patched"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SPECS)
def test_save_and_load(family: str, name: str, tmp_path: Path) -> None:
    model = masked_lm(family)
    attnpatch.patch(model, spec_for(name, family), init="paper")
    batch = batch_of(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    for cls in (AUTO[family], type(model)):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is type(model)
        assert attnpatch.patched_modules(again) == attnpatch.patched_modules(model)
        assert same_state(again, model.state_dict())
        assert torch.equal(logits(again, batch), expected)
    # Twice gives the same files.
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SPECS)
def test_a_stock_checkpoint_with_a_patched_config(family: str, name: str, tmp_path: Path) -> None:
    """The second way in gives what patching in memory gives, for Auto and concrete classes."""
    stock = masked_lm(family)
    stock.save_pretrained(tmp_path / "stock")
    batch = batch_of(stock)
    before = logits(stock, batch)
    spec = spec_for(name, family)
    report = attnpatch.patch(stock, spec)
    expected = logits(stock, batch)
    if report.exact:
        torch.testing.assert_close(expected, before, atol=1e-5, rtol=1e-5)
    patched = attnpatch.patch_config(AutoConfig.from_pretrained(tmp_path / "stock"), spec)
    for cls in (AUTO[family], type(stock)):
        model = cls.from_pretrained(tmp_path / "stock", config=patched)
        assert not model.training
        assert attnpatch.patched_modules(model) == attnpatch.patched_modules(stock)
        if name != "alignment" and "all" not in name and "tanh" not in name:  # whose networks start random
            torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path / "out")
        assert torch.equal(logits(cls.from_pretrained(tmp_path / "out"), batch), logits(model, batch))
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "stock"), "attnpatch")


@pytest.mark.parametrize("name", ["neural", "linear", "query_value", "alignment"])
@pytest.mark.parametrize("family", FAMILIES)
def test_preserve_keeps_the_function(family: str, name: str) -> None:
    spec = {"neural": {"neural": {"preset": "roberta"}}}.get(name, SPECS[name])
    model = masked_lm(family)
    batch = batch_of(model)
    before = logits(model, batch)
    assert attnpatch.patch(model, spec).exact
    # Relative to logits of size 10 here.
    assert (logits(model, batch) - before).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))
    attnpatch.unpatch(model)
    if name != "alignment":
        report = attnpatch.patch(model, spec, init="paper")
        assert not report.exact
        assert (logits(model, batch) - before).abs().max() > 1e-3


def test_building_from_a_config() -> None:
    for family, cls in AUTO.items():
        patched = attnpatch.patch_config(config(family), SPECS["all-stages"])
        model = cls.from_config(patched)
        assert len(attnpatch.patched_modules(model)) == (6 if family == "marian" else 2)
        assert model.config.attnpatch == patched.attnpatch
        model(**batch_of(model)).loss.backward()
        assert not hasattr(config(family), "attnpatch")
    only_cross = attnpatch.patch_config(config("marian"), "expressive", layers=1, sites="cross")
    assert list(attnpatch.patched_modules(MarianMTModel(only_cross))) == ["model.decoder.layers.1.encoder_attn"]
    with pytest.raises(SpecError, match="no layer 5"):
        attnpatch.patch_config(config("bert"), "expressive", layers=5)
    twice = attnpatch.patch_config(attnpatch.patch_config(config("bert"), "expressive"), "neural")
    assert set(next(iter(attnpatch.patched_modules(BertModel(twice)).values()))) == {"score", "project"}


def test_from_scratch_starts_as_the_paper_says() -> None:
    big = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=20)
    model = BertModel(attnpatch.patch_config(big, "neural+query_value"))
    attention = model.encoder.layer[0].attention.self
    assert abs(float(attention.query.up.weight.detach().std()) - 0.02) < 0.004
    assert not torch.equal(attention.query.up.weight[:64], -attention.query.up.weight[64:])
    assert torch.equal(attention.attnpatch.aggregate.gate_bias, torch.full((2, 32), -4.0))
    assert torch.equal(attention.attnpatch.aggregate.strength, torch.ones(2))


# --- the mark and the backend ----------------------------------------------------------------------------------


def test_the_mark_is_in_every_saved_config(checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = checkpoint
    written = json.loads((folder / "config.json").read_text())
    assert written["attn_implementation"] == "attnpatch"
    assert written["model_type"] == "bert"
    model.config.save_pretrained(tmp_path / "alone")
    assert json.loads((tmp_path / "alone/config.json").read_text())["attn_implementation"] == "attnpatch"
    assert model.config._attn_implementation == "sdpa"
    attnpatch.unpatch(model)
    model.save_pretrained(tmp_path / "undone")
    written = json.loads((tmp_path / "undone/config.json").read_text())
    assert "attnpatch" not in written
    assert "attn_implementation" not in written


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_backend_is_the_users(backend: str, checkpoint: tuple[Any, Path]) -> None:
    model, folder = checkpoint
    batch = batch_of(model)
    expected = logits(model, batch)
    for cls in (AutoModelForMaskedLM, BertForMaskedLM):
        again = cls.from_pretrained(folder, attn_implementation=backend)
        assert again.config._attn_implementation == backend
        assert attnpatch.patched_modules(again) == attnpatch.patched_modules(model)
        torch.testing.assert_close(logits(again, batch), expected, atol=1e-5, rtol=1e-5)
        weights = again(**batch, output_attentions=True).attentions
        assert len(weights) == 2
    built = AutoModelForMaskedLM.from_config(
        attnpatch.patch_config(config("bert"), "neural"), attn_implementation=backend
    )
    assert built.config._attn_implementation == backend


def test_switching_the_backend_at_run_time(checkpoint: tuple[Any, Path]) -> None:
    model, folder = checkpoint
    again = BertForMaskedLM.from_pretrained(folder)
    assert again.config._attn_implementation == "sdpa"
    batch = batch_of(model)
    expected = logits(model, batch)
    for backend in ("eager", "sdpa", "eager"):
        again.set_attn_implementation(backend)
        assert again.config._attn_implementation == backend
        torch.testing.assert_close(logits(again, batch), expected, atol=1e-5, rtol=1e-5)


PLAIN = """
import sys
from transformers import AutoModelForMaskedLM, BertForMaskedLM
for cls in (AutoModelForMaskedLM, BertForMaskedLM):
    try:
        cls.from_pretrained(sys.argv[1])
    except ValueError as error:
        print("REFUSED", error)
"""


def test_a_process_without_attnpatch_refuses(checkpoint: tuple[Any, Path]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PLAIN, str(checkpoint[1])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    refusals = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(refusals) == 2, done.stderr
    assert all("attnpatch" in line for line in refusals)


# --- other classes and dtypes ------------------------------------------------------------------------------------


def test_other_heads_on_the_same_checkpoint(checkpoint: tuple[Any, Path]) -> None:
    model, folder = checkpoint
    classifier, info = BertForSequenceClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert any("classifier" in key for key in info["missing_keys"])
    assert len(attnpatch.patched_modules(classifier)) == 2
    bare = BertModel.from_pretrained(folder, add_pooling_layer=False)
    wanted = model.bert.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in bare.state_dict().items())
    ids = tokens(2, 5)
    with torch.no_grad():
        assert torch.equal(bare(ids).last_hidden_state, model.bert(ids).last_hidden_state)
    # And the other way: a head on a saved base model.
    bare.save_pretrained(folder / "bare")
    wrapped = BertForMaskedLM.from_pretrained(folder / "bare")
    assert torch.equal(
        wrapped.bert.encoder.layer[1].attention.self.key.up.weight, bare.encoder.layer[1].attention.self.key.up.weight
    )


def test_the_decoder_of_a_marian(tmp_path: Path) -> None:
    model = masked_lm("marian")
    attnpatch.patch(model, "neural+alignment+query_value")
    model.save_pretrained(tmp_path)
    decoder = MarianForCausalLM.from_pretrained(tmp_path)
    assert len(attnpatch.patched_modules(decoder)) == 4
    decoder(input_ids=tokens(2, 5), labels=tokens(2, 5)).loss.backward()


@pytest.mark.parametrize("keywords", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_loading_options(keywords: dict[str, Any], checkpoint: tuple[Any, Path]) -> None:
    model, folder = checkpoint
    dtype = keywords.get("dtype", torch.float32)
    again = AutoModelForMaskedLM.from_pretrained(folder, **keywords)
    assert same_state(again, model.to(dtype).state_dict())
    converted = AutoModelForMaskedLM.from_pretrained(
        folder.parent / "stock",
        config=attnpatch.patch_config(AutoConfig.from_pretrained(folder.parent / "stock"), "neural+expressive"),
        **keywords,
    )
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert attnpatch.patched_modules(converted) == attnpatch.patched_modules(model)


def test_loading_in_bfloat16_and_saving_keeps_it(checkpoint: tuple[Any, Path], tmp_path: Path) -> None:
    model = BertForMaskedLM.from_pretrained(checkpoint[1], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in AutoModelForMaskedLM.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}


def test_undo_after_a_reload_names_the_source(checkpoint: tuple[Any, Path]) -> None:
    folder = checkpoint[1]
    source = BertForMaskedLM.from_pretrained(folder.parent / "stock")
    attnpatch.patch(source, "neural+expressive")
    source.save_pretrained(folder.parent / "named")
    assert str(folder.parent).encode() not in (folder.parent / "named/config.json").read_bytes()
    again = BertForMaskedLM.from_pretrained(folder.parent / "named")
    with pytest.raises(PatchError, match="the checkpoint that it was converted from, stock"):
        attnpatch.unpatch(again)
    assert len(attnpatch.patched_modules(again)) == 2
    attnpatch.unpatch(again, stages=["score"])
    again.save_pretrained(folder.parent / "half")
    half = BertForMaskedLM.from_pretrained(folder.parent / "half")
    assert {tuple(m) for m in attnpatch.patched_modules(half).values()} == {("project",)}


# --- what has to be refused ------------------------------------------------------------------------------------


def edit(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("cls", [AutoModelForMaskedLM, BertForMaskedLM, BertModel, BertForSequenceClassification])
@pytest.mark.parametrize(
    "key",
    [
        "bert.encoder.layer.1.attention.self.key.up.weight",
        "bert.encoder.layer.0.attention.output.dense.bias",
        "bert.encoder.layer.1.intermediate.dense.weight",
    ],
)
def test_missing_weights(cls: Any, key: str, checkpoint: tuple[Any, Path]) -> None:
    edit(checkpoint[1], lambda weights: weights.pop(key))
    with pytest.raises(CheckpointError, match=r"lacks 1 .*" + key.removeprefix("bert.").replace(".", r"\.")):
        cls.from_pretrained(checkpoint[1])


def test_unexpected_weights(checkpoint: tuple[Any, Path]) -> None:
    name = "bert.encoder.layer.1.attention.self.attnpatch.aggregate.strength"
    edit(checkpoint[1], lambda weights: weights.update({name: torch.ones(2)}))
    with pytest.raises(CheckpointError, match="holds 1 attention weights that the spec has no place for"):
        BertForMaskedLM.from_pretrained(checkpoint[1])


def test_a_stock_file_under_a_patched_config(checkpoint: tuple[Any, Path]) -> None:
    folder = checkpoint[1]
    (folder / "model.safetensors").write_bytes((folder.parent / "stock/model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="lacks 24 weights"):
        AutoModelForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize("cls", [AutoModelForMaskedLM, BertForMaskedLM])
def test_a_stock_config_for_a_patched_checkpoint(cls: Any, checkpoint: tuple[Any, Path]) -> None:
    folder = checkpoint[1]
    own = AutoConfig.from_pretrained(folder)
    del own.attnpatch
    for stock in (config("bert"), BertConfig.from_pretrained(folder.parent / "stock"), own):
        with pytest.raises(CheckpointError, match="the given config is stock"):
            cls.from_pretrained(folder, config=stock)
    if cls is BertForMaskedLM:
        with pytest.raises(CheckpointError, match="the given config is stock"):
            cls.from_pretrained(folder, config=str(folder.parent / "stock"))


def test_another_spec_for_a_patched_checkpoint(checkpoint: tuple[Any, Path]) -> None:
    folder = checkpoint[1]
    other = attnpatch.patch_config(config("bert"), "expressive")
    with pytest.raises(SpecError, match="the config asks for expressive"):
        AutoModelForMaskedLM.from_pretrained(folder, config=other)
    same = attnpatch.patch_config(config("bert"), "expressive+neural")
    assert len(attnpatch.patched_modules(BertForMaskedLM.from_pretrained(folder, config=same))) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 99, "version": "7.1"}, "format 99, written by attnpatch 7.1.*upgrade"),
        ({"format": "x"}, "format is 'x'"),
        ({"rules": "neural"}, "must be a list"),
        ({"rules": [{"variants": {"nural": {}}}]}, "did you mean 'neural'"),
        ({"rules": [{"variants": {"neural": {"presets": "marian"}}}]}, "did you mean 'preset'"),
        ({"mystery": 1}, "unknown key 'mystery'"),
    ],
)
def test_a_spec_that_cannot_be_read(change: dict[str, Any], words: str, checkpoint: tuple[Any, Path]) -> None:
    path = checkpoint[1] / "config.json"
    data = json.loads(path.read_text())
    data["attnpatch"].update(change)
    path.write_text(json.dumps(data))
    with pytest.raises(AttnpatchError, match=words):
        AutoModelForMaskedLM.from_pretrained(checkpoint[1])


def test_stock_checkpoints_load_as_ever(tmp_path: Path) -> None:
    model = masked_lm("bert")
    model.save_pretrained(tmp_path)
    again, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert same_state(again, model.state_dict())
    assert not info["missing_keys"]
    assert not attnpatch.patched_modules(again)
    assert type(again.bert.encoder.layer[0].attention.self.config) is BertConfig
    assert AutoModel.from_pretrained(tmp_path, config=BertConfig.from_pretrained(tmp_path)).config.model_type == "bert"
    assert BertForMaskedLM.from_pretrained(None, config=model.config, state_dict=model.state_dict()) is not None


# --- the Trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "marian"])
def test_trainer_checkpoints(family: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = masked_lm(family)
    attnpatch.patch(model, {"neural": {}, "expressive": {}, "alignment": {"weight": 1.0}})
    data = [{name: tensor[i] for name, tensor in batch_of(model).items()} for i in (0, 1) for _ in range(4)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    batch = batch_of(model)
    for folder in (tmp_path / "checkpoint-2",):
        again = AUTO[family].from_pretrained(folder)
        assert attnpatch.patched_modules(again) == attnpatch.patched_modules(model)
        assert same_state(again, model.state_dict())
        # Without the autocast that the Trainer put around its forward pass.
        trained = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        torch.testing.assert_close(logits(again, batch), logits(trained, batch), atol=1e-5, rtol=1e-5)
    resumed = Trainer(head_like(model, family), arguments, train_dataset=data)
    resumed.args.max_steps = 3
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3


def head_like(model: Any, family: str) -> Any:
    fresh = head(family, type(model).__name__)
    attnpatch.patch(fresh, {"neural": {}, "expressive": {}, "alignment": {"weight": 1.0}})
    return fresh
