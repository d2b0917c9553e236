"""convert, inspect, revert: what is written, what stays, and that nothing bad is left behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import EXACT, HEADS, VARIANTS, WORDS, add_tokenizer, minilm, save, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, GPT2Config

import attnpatch
from attnpatch import atomic, checkpoint_files
from attnpatch.checkpoint import load_model, open_checkpoint
from attnpatch.errors import AttnpatchError, CheckpointError, PatchError, SpecError, UnsupportedModelError
from attnpatch.probes import drift, length_for, make_probe, outputs_of


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    return save(tmp_path / "stock")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def spec_for(variant: str) -> Any:
    # Few enough keys that the selection does select on a probe of twelve tokens.
    return {"variant": variant, "options": {variant: {"r": 3}}} if variant in ("top_r", "value_aware") else variant


# --- converting and reverting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForSequenceClassification", "MarianMTModel"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_convert_reload_revert(tmp_path: Path, name: str, variant: str) -> None:
    src = save(tmp_path / "stock", name)
    before = tree(src)
    report = attnpatch.convert(src, tmp_path / "new", spec_for(variant))
    assert tree(src) == before
    if report.patch.exact:
        assert report.drift.max <= 1e-5
    elif variant != "neural":
        assert report.drift.max > 1e-3
    model, notes = load_model(open_checkpoint(tmp_path / "new"))
    source, _ = load_model(open_checkpoint(src))
    probe = make_probe(source, length=length_for(open_checkpoint(tmp_path / "new").spec, source))
    moved = drift(outputs_of(source, probe), outputs_of(model, probe))
    assert moved.max == pytest.approx(report.drift.max, abs=1e-7)
    assert not notes
    assert attnpatch.patched_modules(model)
    result = attnpatch.revert(tmp_path / "new", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == before["model.safetensors"]
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads(before["config.json"])
    assert not result.from_source
    assert {p.name for p in tmp_path.iterdir()} == {"stock", "new", "back"}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_keeps_its_function(tmp_path: Path, name: str) -> None:
    extra = {"add_cross_attention": True} if name in ("BertLMHeadModel", "RobertaForCausalLM") else {}
    src = save(tmp_path / "stock", name, **extra)
    spec = {"variant": "neural+query_value+alignment", "options": {"neural": {"preset": "roberta"}}}
    report = attnpatch.convert(src, tmp_path / "new", spec)
    assert report.model_class == name
    assert report.drift.max <= 1e-5
    assert report.drift.outputs
    assert attnpatch.convert(src, tmp_path / "other", "expressive").drift.max > 1e-4
    attnpatch.revert(tmp_path / "new", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (src / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    src = save(tmp_path / "stock", "MarianMTModel", dtype)
    report = attnpatch.convert(src, tmp_path / "new", {"neural": {"preset": "roberta"}, "query_value": {}})
    assert report.drift.max <= 1e-5
    assert report.dtype == str(dtype).removeprefix("torch.")
    new, old = load_file(tmp_path / "new/model.safetensors"), load_file(src / "model.safetensors")
    assert {t.dtype for t in new.values()} == {dtype}
    shared = new.keys() & old.keys()
    assert len(shared) > 40
    assert all(torch.equal(new[key], old[key]) for key in shared)
    attnpatch.revert(tmp_path / "new", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (src / "model.safetensors").read_bytes()


def test_weights_beat_the_dtype_in_the_config(stock: Path, tmp_path: Path) -> None:
    config = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert attnpatch.convert(stock, tmp_path / "new", "neural").drift.max <= 1e-5
    assert {t.dtype for t in load_file(tmp_path / "new/model.safetensors").values()} == {torch.float32}


def test_shards_stay_shards(tmp_path: Path) -> None:
    src = tmp_path / "stock"
    tiny_model("BertForMaskedLM").save_pretrained(src, max_shard_size="6KB")
    shards = sorted(p.name for p in src.glob("model-*.safetensors"))
    assert len(shards) > 2
    report = attnpatch.convert(src, tmp_path / "new", "neural+query_value")
    assert sorted(p.name for p in (tmp_path / "new").glob("model-*.safetensors")) == shards
    assert report.drift.max <= 1e-5
    AutoModelForMaskedLM.from_pretrained(tmp_path / "new")
    attnpatch.revert(tmp_path / "new", tmp_path / "back")
    for shard in shards:
        assert (tmp_path / "back" / shard).read_bytes() == (src / shard).read_bytes()


def to_bin(folder: Path, name: str, **options: Any) -> dict[str, torch.Tensor]:
    """Replace the weights by an old file, tied weights under each of their names."""
    state = tiny_model(name).state_dict()
    torch.save(state, folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()
    return state


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("name", ["MarianMTModel", "BertForMaskedLM"])
def test_old_bin_files(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    src = save(tmp_path / "stock", name)
    expected = load_file(src / "model.safetensors")
    to_bin(src, name, **options)
    report = attnpatch.convert(src, tmp_path / "new", {"neural": {"preset": "roberta"}})
    assert report.drift.max <= 1e-5
    assert not list((tmp_path / "new").glob("*.bin"))
    attnpatch.revert(tmp_path / "new", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(back[key], value) for key, value in expected.items() if key in back)
    load_model(open_checkpoint(tmp_path / "back"))


def test_sharded_bin(tmp_path: Path) -> None:
    src = save(tmp_path / "stock", "BertModel")
    state = list(load_file(src / "model.safetensors").items())
    (src / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((state[: len(state) // 2], state[len(state) // 2 :]), start=1):
        name = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save(dict(part), src / name)
        weight_map.update({key: name for key, _ in part})
    (src / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert attnpatch.convert(src, tmp_path / "new", "neural").drift.max <= 1e-5
    assert (tmp_path / "new/model-00002-of-00002.safetensors").is_file()
    AutoModel.from_pretrained(tmp_path / "new")


def test_names_without_the_base_prefix(tmp_path: Path) -> None:
    # A base model's file read by a head's class, and the reverse.
    src = save(tmp_path / "stock", "BertForMaskedLM")
    state = load_file(src / "model.safetensors")
    bare = {key.removeprefix("bert."): value for key, value in state.items()}
    save_file(bare, src / "model.safetensors", {"format": "pt"})
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    report = attnpatch.convert(src, tmp_path / "new", "neural+query_value")
    new = load_file(tmp_path / "new/model.safetensors")
    assert "encoder.layer.0.attention.self.query.up.weight" in new
    assert "encoder.layer.1.attention.self.attnpatch.aggregate.gate_query" in new
    assert "cls.predictions.bias" in new  # the class has no place for it
    assert any("without a place" in note for note in report.notes)
    save_file(state, src / "model.safetensors", {"format": "pt"})
    attnpatch.convert(src, tmp_path / "prefixed", "neural")
    assert "bert.encoder.layer.0.attention.self.query.up.weight" in load_file(tmp_path / "prefixed/model.safetensors")


def test_config_without_architectures(stock: Path, tmp_path: Path) -> None:
    config = json.loads((stock / "config.json").read_text())
    del config["architectures"]
    (stock / "config.json").write_text(json.dumps(config))
    state = load_file(stock / "model.safetensors")
    report = attnpatch.convert(stock, tmp_path / "new", "neural")
    assert report.model_class == "BertModel"
    new = load_file(tmp_path / "new/model.safetensors")
    assert torch.equal(new["cls.predictions.bias"], state["cls.predictions.bias"])
    assert any("pooler" in note for note in report.notes)


def test_layers_and_sites(tmp_path: Path) -> None:
    src = save(tmp_path / "stock", "MarianMTModel")
    report = attnpatch.convert(src, tmp_path / "new", "neural", layers="1", sites="cross,decoder")
    assert {(c.site, c.layer) for c in report.patch.changes} == {("cross", 1), ("decoder", 1)}
    info = attnpatch.inspect(tmp_path / "new")
    patched = {row["path"] for row in info.sites if row["stages"]}
    assert patched == {"model.decoder.layers.1.self_attn", "model.decoder.layers.1.encoder_attn"}


@pytest.mark.parametrize("variant", ["top_r", "value_aware"])
def test_drift_is_measured_where_the_method_shows(stock: Path, tmp_path: Path, variant: str) -> None:
    # A selection of 20 keys does nothing to a sequence of 8.
    options = {"r": 20, "selector": "norm"} if variant == "value_aware" else {"r": 20}
    assert attnpatch.convert(stock, tmp_path / "new", {variant: options}).drift.max > 1e-4
    drifts = {c.name: c.value for c in attnpatch.verify(tmp_path / "new", stock).checks if c.name.startswith("drift")}
    assert drifts["drift in float32: max"] > 1e-4


def test_a_patched_source_gets_more(stock: Path, tmp_path: Path) -> None:
    attnpatch.convert(stock, tmp_path / "a", "neural")
    report = attnpatch.convert(tmp_path / "a", tmp_path / "b", "query_value")
    assert report.drift.max <= 1e-5
    info = attnpatch.inspect(tmp_path / "b")
    assert info.sites[0]["stages"] == {"project": "neural", "aggregate": "query_value"}
    assert info.source == "stock"
    attnpatch.revert(tmp_path / "b", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()
    with pytest.raises(PatchError, match=r"'neural' already, so 'linear'"):
        attnpatch.convert(tmp_path / "a", tmp_path / "c", "linear")
    assert not (tmp_path / "c").exists()


def test_inits(stock: Path, tmp_path: Path) -> None:
    add_tokenizer(stock)
    text = tmp_path / "text.txt"
    lines = [" ".join(WORDS[i % 5 : i % 5 + 4 + i % 7]) for i in range(200)]
    text.write_text("\n\n".join(lines), encoding="utf-8")
    norm = {"neural": {"preset": "marian"}}
    preserve = attnpatch.convert(stock, tmp_path / "preserve", norm)
    fitted = attnpatch.convert(stock, tmp_path / "fit", norm, "calibrate", calibration_text=text)
    paper = [attnpatch.convert(stock, tmp_path / f"p{i}", norm, "paper", seed=s) for i, s in enumerate((1, 1, 2))]
    assert fitted.drift.max < 0.7 * preserve.drift.max
    same, again, other = (load_file(tmp_path / f"p{i}/model.safetensors") for i in range(3))
    assert all(torch.equal(same[key], again[key]) for key in same)
    assert not all(torch.equal(same[key], other[key]) for key in same)
    assert paper[0].drift.max > 0.1
    # Calibration leaves what the stock projections can be read from; a fresh start does not.
    attnpatch.revert(tmp_path / "fit", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="they are in stock"):
        attnpatch.revert(tmp_path / "p0", tmp_path / "none")


def test_calibration_of_a_translator(tmp_path: Path) -> None:
    src = save(tmp_path / "stock", "MarianMTModel")
    add_tokenizer(src)
    text, target = tmp_path / "a.txt", tmp_path / "b.txt"
    lines = [" ".join(WORDS[i % 9 : i % 9 + 3 + i % 5]) for i in range(120)]
    text.write_text("\n".join(lines), encoding="utf-8")
    target.write_text("\n".join(reversed(lines)), encoding="utf-8")
    preserve = attnpatch.convert(src, tmp_path / "preserve", "neural")
    for name, given in (("one", None), ("two", target)):
        options = {"calibration_text": text, "calibration_target": given}
        fitted = attnpatch.convert(src, tmp_path / name, "neural", "calibrate", **options)
        assert fitted.drift.mean < preserve.drift.mean
    target.write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(SpecError, match="120 lines"):
        attnpatch.convert(src, tmp_path / "x", "neural", "calibrate", calibration_text=text, calibration_target=target)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"\n\n", "no text"), (b"good\nb\xffd\n", "line 2: not UTF-8")],
)
def test_bad_calibration_text(stock: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(SpecError, match=message):
        attnpatch.convert(stock, tmp_path / "new", "neural", "calibrate", calibration_text=text)
    with pytest.raises(SpecError, match="belong together"):
        attnpatch.convert(stock, tmp_path / "new", "neural", "calibrate")
    with pytest.raises(SpecError, match="belong together"):
        attnpatch.convert(stock, tmp_path / "new", "neural", calibration_text=text)


# --- the other files --------------------------------------------------------------------------------------------


def test_small_files_and_card(stock: Path, tmp_path: Path) -> None:
    add_tokenizer(stock)
    extra = {
        "generation_config.json": '{"num_beams": 4}',
        "source.spm": "x",
        "merges.txt": "a b",
        "LICENSE": "free",
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}]),
        "1_Pooling/config.json": "{}",
        "onnx/model.json": "{}",
        "modeling_own.py": "raise SystemExit",
        "optimizer.pt": "x",
        "training_args.bin": "x",
        "trainer_state.json": "{}",
        "tf_model.h5": "x",
        ".gitattributes": "x",
        "README.md": "---\nlicense: mit\nlanguage: de\ntags:\n- t\n---\nold text\n",
    }
    for name, content in extra.items():
        (stock / name).parent.mkdir(exist_ok=True)
        (stock / name).write_text(content, encoding="utf-8")
    report = attnpatch.convert(stock, tmp_path / "new", "neural+alignment")
    kept = {"generation_config.json", "source.spm", "merges.txt", "LICENSE", "modules.json", "1_Pooling/config.json"}
    own = {"config.json", "model.safetensors", "README.md", "attnpatch_manifest.json"}
    assert set(tree(tmp_path / "new")) == kept | own | {"vocab.txt", "tokenizer_config.json"} == set(report.files)
    for name in kept:
        assert (tmp_path / "new" / name).read_text() == extra[name]
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("the cat").input_ids == [2, 5, 6, 3]
    card = (tmp_path / "new/README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "mit"
    assert head["base_model"] == "stock"
    assert head["tags"] == ["t", "attnpatch", "neural", "alignment"]
    for part in ("preserve", "AutoModelForMaskedLM", "import attnpatch", "2310.11398", attnpatch.__version__, "drift"):
        assert part in card
    assert "old text" not in card
    attnpatch.revert(tmp_path / "new", tmp_path / "back")
    assert set(tree(tmp_path / "back")) == (kept | {"vocab.txt", "tokenizer_config.json"} | own) - {
        "README.md",
        "attnpatch_manifest.json",
    }
    attnpatch.revert(tmp_path / "new", tmp_path / "back2", source=stock)
    assert (tmp_path / "back2/README.md").read_text() == extra["README.md"]


def test_no_local_path_is_published(stock: Path, tmp_path: Path) -> None:
    attnpatch.convert(stock, tmp_path / "new", "neural")
    for name, content in tree(tmp_path / "new").items():
        assert str(tmp_path).encode() not in content, name
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["attn_implementation"] == "attnpatch"
    assert config["attnpatch"]["source"] == "stock"


def test_hub_id_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "cache/models--org--tiny"
    save(folder / "snapshots/abc123")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc123")
    monkeypatch.chdir(tmp_path)
    # snapshot_download reads its default folder when it is called.
    import huggingface_hub

    stock_download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **kwargs: stock_download(*args, cache_dir=tmp_path / "cache", local_files_only=True, **kwargs),
    )
    report = attnpatch.convert("org/tiny", tmp_path / "new", "neural")
    assert report.source == "org/tiny"
    assert attnpatch.inspect(tmp_path / "new").source == "org/tiny"
    assert "base_model: org/tiny" in (tmp_path / "new/README.md").read_text()
    assert open_checkpoint(folder / "snapshots/abc123").name == "org/tiny"
    with pytest.raises(CheckpointError, match=r"no folder here.*hub"):
        attnpatch.convert("org/other", tmp_path / "x", "neural")


# --- reverting what was trained ---------------------------------------------------------------------------------


def train_a_little(folder: Path, only: str = "") -> None:
    """Save the model again as the Trainer does, its parameters moved (those with `only` in their names)."""
    model, _ = load_model(open_checkpoint(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    shutil.rmtree(folder)
    model.save_pretrained(folder)


def test_trained_projections_need_the_source(stock: Path, tmp_path: Path) -> None:
    attnpatch.convert(stock, tmp_path / "new", "neural+query_value")
    train_a_little(tmp_path / "new")
    trained = load_file(tmp_path / "new/model.safetensors")
    with pytest.raises(CheckpointError, match=r"'neural' replaced are gone.*stock.*--source"):
        attnpatch.revert(tmp_path / "new", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    report = attnpatch.revert(tmp_path / "new", tmp_path / "back", source=stock)
    assert len(report.from_source) == 12
    assert any("came from stock" in note for note in report.notes)
    source, back = load_file(stock / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == source.keys()
    for key, value in back.items():
        assert torch.equal(value, source[key] if key in report.from_source else trained[key])


def test_projections_saved_again_but_not_trained(stock: Path, tmp_path: Path) -> None:
    # As after training of everything else: no manifest, and the mirrored form still shows the stock weights.
    attnpatch.convert(stock, tmp_path / "new", "neural+alignment")
    train_a_little(tmp_path / "new", only="LayerNorm")
    report = attnpatch.revert(tmp_path / "new", tmp_path / "back")
    source, back = load_file(stock / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert len(report.recovered) == 12
    assert all(torch.equal(back[key], source[key]) for key in report.recovered)


@pytest.mark.parametrize("form", ["reinit", "matched"])
def test_linear_controls(stock: Path, tmp_path: Path, form: str) -> None:
    attnpatch.convert(stock, tmp_path / "new", {"linear": {"form": form}})
    attnpatch.revert(tmp_path / "new", tmp_path / "a")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()
    (tmp_path / "new/attnpatch_manifest.json").unlink()
    if form == "matched":
        attnpatch.revert(tmp_path / "new", tmp_path / "b")
        assert (tmp_path / "b/model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()
    else:  # whether a single layer was trained cannot be seen
        with pytest.raises(CheckpointError, match="'linear' replaced are gone"):
            attnpatch.revert(tmp_path / "new", tmp_path / "b")
    train_a_little(tmp_path / "new", "attention.self")
    with pytest.raises(CheckpointError, match="'linear' replaced are gone"):
        attnpatch.revert(tmp_path / "new", tmp_path / "c")


def test_training_with_mirrored_gradients_is_seen(stock: Path, tmp_path: Path) -> None:
    # Without a ReLU the two halves of `up` stay each other's mirror in training.
    attnpatch.convert(stock, tmp_path / "new", {"linear": {"form": "matched"}})
    model, _ = load_model(open_checkpoint(tmp_path / "new"))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = make_probe(model).inputs["input_ids"]
    for _ in range(3):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    up = model.bert.encoder.layer[0].attention.self.query.up.weight
    assert torch.allclose(up[:16], -up[16:])
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(CheckpointError, match="'linear' replaced are gone"):
        attnpatch.revert(tmp_path / "trained", tmp_path / "back")


def test_wrong_source_is_refused(stock: Path, tmp_path: Path) -> None:
    attnpatch.convert(stock, tmp_path / "new", "neural", "paper")
    other = save(tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["bert.encoder.layer.1.attention.self.key.bias"][0] += 1
    save_file(state, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"other is not the checkpoint.*key\.bias differs"):
        attnpatch.revert(tmp_path / "new", tmp_path / "back", source=other)
    with pytest.raises(CheckpointError, match="wrong source"):
        attnpatch.revert(tmp_path / "new", tmp_path / "back", source=save(tmp_path / "m", "MarianMTModel"))
    with pytest.raises(CheckpointError, match="patched itself"):
        attnpatch.revert(tmp_path / "new", tmp_path / "back", source=tmp_path / "new")
    with pytest.raises(CheckpointError, match="nothing to revert"):
        attnpatch.revert(stock, tmp_path / "back")


def test_revert_of_a_model_saved_in_memory(tmp_path: Path) -> None:
    model = tiny_model("RobertaForMaskedLM")
    model.save_pretrained(tmp_path / "stock")
    attnpatch.patch(model, "neural+expressive")
    model.save_pretrained(tmp_path / "new")
    attnpatch.revert(tmp_path / "new", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "stock/model.safetensors").read_bytes()


# --- inspecting -------------------------------------------------------------------------------------------------


def test_inspect(stock: Path, tmp_path: Path) -> None:
    plain = attnpatch.inspect(stock)
    assert (plain.spec, plain.family, plain.record, plain.parameters["added"]) == ("stock", "bert", None, 0)
    assert plain.files["model.safetensors"]["checksum"] == "not recorded"
    report = attnpatch.convert(stock, tmp_path / "new", "neural+query_value", layers=1)
    info = attnpatch.inspect(tmp_path / "new")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "new")
    assert info.parameters["now"] == model.num_parameters()
    assert info.parameters["added"] == report.patch.parameters_added
    assert info.record == json.loads((tmp_path / "new/config.json").read_text())["attnpatch"]
    assert [row["stages"] for row in info.sites] == [{}, {"project": "neural", "aggregate": "query_value"}]
    assert (info.exact, info.source, info.init) == (True, "stock", "preserve")
    assert info.versions["attnpatch"] == attnpatch.__version__
    assert info.files["model.safetensors"]["checksum"] == "ok"
    assert not info.missing
    assert not info.unexpected
    assert json.loads(json.dumps(info.to_dict()))["dtype"] == "float32"


def test_inspect_sees_changed_and_missing_weights(stock: Path, tmp_path: Path) -> None:
    attnpatch.convert(stock, tmp_path / "new", "neural")
    path = tmp_path / "new/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 4
    path.write_bytes(raw)
    assert attnpatch.inspect(tmp_path / "new").files["model.safetensors"]["checksum"] == "changed"
    state = load_file(path)
    lost = "bert.encoder.layer.0.attention.self.query.up.weight"
    state["bert.encoder.layer.0.attention.self.query.weight"] = state.pop(lost)[:16].clone()
    save_file(state, path, {"format": "pt"})
    info = attnpatch.inspect(tmp_path / "new")
    assert info.missing == (lost,)
    assert info.unexpected == ("bert.encoder.layer.0.attention.self.query.weight",)
    with pytest.raises(CheckpointError, match="lacks"):
        load_model(open_checkpoint(tmp_path / "new"))


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("neurall", {}, "did you mean 'neural'"),
        ({"neural": {"prest": "marian"}}, {}, "did you mean 'preset'"),
        ({"neural": {"preset": "marien"}}, {}, "did you mean 'marian'"),
        ("neural+linear", {}, "neural and linear both replace the stage 'project'"),
        ({"top_r": {"r": 0}}, {}, "1 or more"),
        ({"alignment": {"weight": -1.0}}, {}, "zero or more"),
        ("neural", {"layers": "7"}, "no layer 7; its layers: 0 to 1"),
        ("neural", {"layers": "5-1"}, "backwards"),
        ("neural", {"sites": "encodr"}, "did you mean 'encoder'"),
        ("neural", {"sites": "cross"}, "no cross attention; its sites: encoder"),
        ("neural", {"init": "preserv"}, "did you mean 'preserve'"),
        ("stock", {}, "nothing to convert"),
        (Path("nowhere.yaml"), {}, "does not exist"),
    ],
)
def test_bad_specs(stock: Path, tmp_path: Path, spec: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        attnpatch.convert(stock, tmp_path / "new", spec, **options)
    assert {p.name for p in tmp_path.iterdir()} == {"stock"}


def refused(src: Path | str, tmp_path: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    kept = {p.name for p in tmp_path.iterdir()}
    for run in (lambda: attnpatch.convert(src, tmp_path / "target", "neural"), lambda: attnpatch.inspect(src)):
        with pytest.raises(error, match=message) as caught:
            run()
        assert isinstance(caught.value, AttnpatchError)
        assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == kept


def test_sources_that_are_none(stock: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path, "does not exist")
    refused("./nowhere", tmp_path, "does not exist")
    refused(stock / "config.json", tmp_path, "is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, r"no config\.json: not a transformers checkpoint")
    (tmp_path / "empty/adapter_config.json").write_text("{}")
    refused(tmp_path / "empty", tmp_path, "PEFT adapter")
    (tmp_path / "empty/config.json").write_text("{]")
    refused(tmp_path / "empty", tmp_path, "not valid JSON")
    (tmp_path / "empty/config.json").write_text("[]")
    refused(tmp_path / "empty", tmp_path, "an object belongs")
    (tmp_path / "empty/config.json").write_text("{}")
    refused(tmp_path / "empty", tmp_path, "model_type")


def test_unsupported_models(stock: Path, tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    refused(tmp_path / "gpt2", tmp_path, r"unknown model type 'gpt2'.*bert, marian, roberta", UnsupportedModelError)
    config = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    refused(stock, tmp_path, "quantised", UnsupportedModelError)
    (stock / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskdLM"]}))
    refused(stock, tmp_path, "did you mean 'BertForMaskedLM'", UnsupportedModelError)


def test_a_newer_format(stock: Path, tmp_path: Path) -> None:
    attnpatch.convert(stock, tmp_path / "new", "neural")
    config = json.loads((tmp_path / "new/config.json").read_text())
    config["attnpatch"] |= {"format": 2, "version": "9.9", "something": {}}
    (tmp_path / "new/config.json").write_text(json.dumps(config))
    refused(tmp_path / "new", tmp_path, r"format 2, written by attnpatch 9\.9.*upgrade", SpecError)
    with pytest.raises(SpecError, match="upgrade"):
        attnpatch.revert(tmp_path / "new", tmp_path / "back")


@pytest.mark.parametrize("keep", [0, 4, 8, 300, -1])
def test_truncated_safetensors(stock: Path, tmp_path: Path, keep: int) -> None:
    path = stock / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(stock, tmp_path, r"model\.safetensors is damaged")


@pytest.mark.parametrize("at", [0, 3, 7, 8, 40])
def test_flipped_header(stock: Path, tmp_path: Path, at: int) -> None:
    path = stock / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)
    refused(stock, tmp_path, "is damaged|lacks|dtype")


def test_flipped_shape(stock: Path, tmp_path: Path) -> None:
    path = stock / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].replace(b'"shape":[20,16]', b'"shape":[16,20]')
    path.write_bytes(raw[:8] + header + raw[8 + length :])
    with pytest.raises(CheckpointError, match=r"cannot be loaded|damaged"):
        attnpatch.convert(stock, tmp_path / "new", "neural")


def test_weights_that_are_not_finite(stock: Path, tmp_path: Path) -> None:
    state = load_file(stock / "model.safetensors")
    state["bert.encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(state, stock / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        attnpatch.convert(stock, tmp_path / "new", "neural")


@pytest.mark.parametrize("lost", ["attention.self.key.bias", "intermediate.dense.weight", "cls.predictions.bias"])
def test_missing_weights(stock: Path, tmp_path: Path, lost: str) -> None:
    state = load_file(stock / "model.safetensors")
    gone = [key for key in state if key.endswith(lost)]
    assert gone
    save_file({k: v for k, v in state.items() if k not in gone}, stock / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \d weights of BertForMaskedLM"):
        attnpatch.convert(stock, tmp_path / "new", "neural")
    assert not (tmp_path / "new").exists()


def test_shards_that_are_missing(tmp_path: Path) -> None:
    src = tmp_path / "stock"
    tiny_model("BertModel").save_pretrained(src, max_shard_size="6KB")
    shard = sorted(src.glob("model-*.safetensors"))[1]
    raw = shard.read_bytes()
    shard.unlink()
    refused(src, tmp_path, f"lacks the shard {shard.name}")
    shard.write_bytes(raw)
    index = json.loads((src / "model.safetensors.index.json").read_text())
    index["weight_map"]["something.else"] = shard.name
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(src, tmp_path, "something.else")
    index["weight_map"]["something.else"] = "../../model.safetensors"
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(src, tmp_path, "not a plain file name")
    (src / "model.safetensors.index.json").write_text("{}")
    refused(src, tmp_path, "weight_map")


def test_no_weights(stock: Path, tmp_path: Path) -> None:
    (stock / "model.safetensors").rename(stock / "tf_model.h5")
    refused(stock, tmp_path, r"no weights.*only tf_model\.h5")


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "nested"])
def test_bin_with_code_is_refused_and_not_run(stock: Path, tmp_path: Path, form: str) -> None:
    state: dict[str, Any] = to_bin(stock, "BertForMaskedLM")
    marker = stock / "was-run"
    path = stock / "pytorch_model.bin"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Code(marker)))
    else:
        state["bert.pooler"] = [Code(marker)] if form == "nested" else Code(marker)
        torch.save(state, path, _use_new_zipfile_serialization=form != "legacy")
    refused(stock, tmp_path, "never runs what a checkpoint brings")
    assert not marker.exists()
    # The file is what it claims to be: an unguarded load does run the command.
    if form != "pickle":
        torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_truncated_bin(stock: Path, tmp_path: Path, keep: int) -> None:
    to_bin(stock, "BertForMaskedLM")
    path = stock / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    refused(stock, tmp_path, r"pytorch_model\.bin is damaged")


def test_bin_with_something_else(stock: Path, tmp_path: Path) -> None:
    to_bin(stock, "BertForMaskedLM")
    torch.save([1, 2], stock / "pytorch_model.bin")
    refused(stock, tmp_path, "holds a list")
    torch.save({"step": 3}, stock / "pytorch_model.bin")
    refused(stock, tmp_path, "only tensors belong")


# --- targets ----------------------------------------------------------------------------------------------------


def test_targets_that_are_refused(stock: Path, tmp_path: Path) -> None:
    before = tree(stock)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for target, force, message in (
        (full, False, "not empty"),
        (full, True, "holds no checkpoint"),
        (tmp_path / "file", True, "is a file"),
        (stock, True, "same folder"),
        (stock / "inside", False, "in one another"),
    ):
        with pytest.raises(CheckpointError, match=message):
            attnpatch.convert(stock, target, "neural", force=force)
    assert tree(stock) == before
    assert tree(full) == {"thesis.txt": b"x"}
    link = tmp_path / "link"
    link.symlink_to(stock)
    with pytest.raises(CheckpointError, match="same folder"):
        attnpatch.convert(stock, link, "neural", force=True)


def test_force_and_empty_targets(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    attnpatch.convert(stock, tmp_path / "empty", "neural")
    with pytest.raises(CheckpointError, match="--force"):
        attnpatch.convert(stock, tmp_path / "empty", "expressive")
    (tmp_path / "empty/old.txt").write_text("x")
    attnpatch.convert(stock, tmp_path / "empty", "expressive", force=True)
    assert attnpatch.inspect(tmp_path / "empty").spec.startswith("expressive")
    assert not (tmp_path / "empty/old.txt").exists()
    attnpatch.convert(stock, tmp_path / "a/b/c", "neural")
    assert (tmp_path / "a/b/c/config.json").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"stock", "empty", "a"}
    mode = (tmp_path / "empty").stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o777 & ~umask


class Stop:
    """Raises while the weights are written."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, what: str, fraction: float) -> None:
        if what == "write":
            self.calls += 1
            if self.calls == 10:
                raise self.error


@pytest.mark.parametrize(
    ("error", "caught", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError, "no space left while writing"),
        (RuntimeError("boom"), RuntimeError, "boom"),
    ],
)
def test_what_goes_wrong_while_writing(
    stock: Path, tmp_path: Path, error: BaseException, caught: type[BaseException], message: str | None
) -> None:
    before = tree(stock)
    attnpatch.convert(stock, tmp_path / "old", "expressive")
    old = tree(tmp_path / "old")
    for target, force in ((tmp_path / "old", True), (tmp_path / "new/deep", False)):
        stop = Stop(error)
        with pytest.raises(caught, match=message):
            attnpatch.convert(stock, target, "neural", force=force, progress=stop)
        assert stop.calls == 10
    assert tree(stock) == before
    assert tree(tmp_path / "old") == old
    assert {p.name for p in tmp_path.iterdir()} == {"stock", "old"}
    with pytest.raises(caught, match=message):
        attnpatch.revert(tmp_path / "old", tmp_path / "back", progress=Stop(error))
    assert {p.name for p in tmp_path.iterdir()} == {"stock", "old"}


def test_old_target_comes_back_when_the_new_one_cannot_take_its_place(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attnpatch.convert(stock, tmp_path / "old", "expressive")
    old = tree(tmp_path / "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".attnpatch-" in self.name:
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="broken"):
        attnpatch.convert(stock, tmp_path / "old", "neural", force=True)
    assert tree(tmp_path / "old") == old
    assert {p.name for p in tmp_path.iterdir()} == {"stock", "old"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "results.json"
    atomic.write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        atomic.write_json(path, {"a": 2})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_too_little_space_is_seen_before(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="no space for"):
        attnpatch.convert(stock, tmp_path / "new", "neural")
    assert {p.name for p in tmp_path.iterdir()} == {"stock"}


def test_full_disk(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real ENOSPC, from the kernel: the weights go to /dev/full."""
    if not Path("/dev/full").is_char_device():
        pytest.skip("needs /dev/full")
    write = checkpoint_files.write_weights

    def to_full(folder: Path, *args: Any) -> dict[str, Any]:
        (folder / "model.safetensors").symlink_to("/dev/full")
        return write(folder, *args)

    monkeypatch.setattr(checkpoint_files, "write_weights", to_full)
    with pytest.raises(CheckpointError, match="no space left while writing"):
        attnpatch.convert(stock, tmp_path / "new", "neural")
    assert {p.name for p in tmp_path.iterdir()} == {"stock"}


# --- a real model -----------------------------------------------------------------------------------------------


def check_minilm(tmp_path: Path, variant: str) -> None:
    src = minilm()
    report = attnpatch.convert(src, tmp_path / "new", variant)
    assert (tmp_path / "new/1_Pooling/config.json").is_file()
    if variant in EXACT:
        assert report.drift.max <= 1e-5
    result = attnpatch.verify(tmp_path / "new", src)
    assert result.passed, str(result)
    attnpatch.revert(tmp_path / "new", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (src / "model.safetensors").read_bytes()


def test_minilm(tmp_path: Path) -> None:
    check_minilm(tmp_path, "neural+expressive+alignment")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS[:-1])
def test_minilm_variants(tmp_path: Path, variant: str) -> None:
    check_minilm(tmp_path, variant)
