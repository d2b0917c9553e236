"""verify: sound models pass, in every form; each fault that it is there to find makes it fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import HEADS, save, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import attnpatch
from attnpatch.errors import CheckpointError, SpecError
from attnpatch.methods.expressive import KernelScore
from attnpatch.methods.neural import NeuralProjection
from attnpatch.methods.query_value import QueryValueSum
from attnpatch.probes import computing_in_float32, make_probe, outputs_of
from attnpatch.verification import VerifyReport


def status(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def failed(report: VerifyReport) -> set[str]:
    return {check.name.split(":")[0] for check in report.checks if check.status == "failed"}


@pytest.mark.parametrize("name", HEADS)
def test_sound_models_pass(tmp_path: Path, name: str) -> None:
    decoder = name in ("BertLMHeadModel", "RobertaForCausalLM")
    src = save(tmp_path / "stock", name, **({"add_cross_attention": True} if decoder else {}))
    attnpatch.convert(src, tmp_path / "new", "neural+expressive+query_value+alignment")
    report = attnpatch.verify(tmp_path / "new", src)
    assert report.passed, str(report)
    found = status(report)
    causal = decoder or name.startswith("Marian")
    generates = decoder or name in ("MarianMTModel", "MarianForCausalLM")
    assert found["causality: a later token and earlier outputs"] == ("passed" if causal else "skipped")
    for check in ("cached logits against uncached", "beams cached against uncached"):
        assert found[f"generation: {check}"] == ("passed" if generates else "skipped")
    assert found["padding: what stands in it"] == "passed"
    amount = "on the left" if decoder or name == "MarianForCausalLM" else "how much there is"
    assert found[f"padding: {amount}"] == ("skipped" if name == "MarianForCausalLM" else "passed")
    for check in ("attentions: returned, and rows sum to 1", "save and load", "gradients reach every new parameter"):
        assert found[check] == "passed"
    assert found["drift in float32: max"] == "measured"
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("MarianMTModel", "neural"),
        ("RobertaForCausalLM", {"neural": {"preset": "roberta"}, "alignment": {"method": "mmd"}}),
        ("BertForMaskedLM", "linear"),
        ("RobertaForCausalLM", "polynomial"),
        ("MarianMTModel", "elu"),
        ("RobertaForCausalLM", {"top_r": {"r": 3}}),
        ("MarianMTModel", {"value_aware": {"r": 3, "selector": "norm"}}),
        ("RobertaForCausalLM", "value_aware"),
        ("MarianMTModel", {"query_value": {"phi": "tanh"}}),
        ("BertForMaskedLM", {"query_value": {"gate": "pooled", "pooling": "additive"}}),
        ("MarianMTModel", {"alignment": {"method": "gan"}}),
    ],
    ids=str,
)
def test_variants_pass(tmp_path: Path, name: str, spec: Any) -> None:
    src = save(tmp_path / "stock", name)
    converted = attnpatch.convert(src, tmp_path / "new", spec)
    report = attnpatch.verify(tmp_path / "new", src)
    assert report.passed, str(report)
    assert status(report)["drift in float32: max"] == ("passed" if converted.patch.exact else "measured")
    brings = any(c.parameters_added or c.stage == "project" for c in converted.patch.changes)
    assert status(report)["gradients reach every new parameter"] == ("passed" if brings else "skipped")
    generates = name != "BertForMaskedLM"
    assert status(report)["generation: beams cached against uncached"] == ("passed" if generates else "skipped")


def test_the_oracle_has_no_gradient_by_design(tmp_path: Path) -> None:
    src = save(tmp_path / "stock")
    attnpatch.convert(src, tmp_path / "new", "neural+value_aware")
    report = attnpatch.verify(tmp_path / "new", src)
    assert report.passed
    check = next(c for c in report.checks if c.name.startswith("gradients"))
    assert check.status == "skipped"
    assert "inference" in check.detail


def test_a_stock_checkpoint_passes(tmp_path: Path) -> None:
    src = save(tmp_path / "stock", "MarianMTModel")
    report = attnpatch.verify(src, src)
    assert report.passed, str(report)
    assert status(report)["drift in float32: max"] == "passed"
    assert status(report)["checksums of the weights"] == "skipped"


# --- faults in the files ----------------------------------------------------------------------------------------


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Path, Path]:
    src = save(tmp_path / "stock", "BertForMaskedLM")
    attnpatch.convert(src, tmp_path / "new", "neural+query_value")
    return tmp_path / "new", src


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the weights, and take away the checksums that would tell."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "attnpatch_manifest.json").unlink()


@pytest.mark.parametrize("at", [-1, -3000])
def test_a_flipped_bit_in_the_weights(converted: tuple[Path, Path], at: int) -> None:
    path = converted[0] / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    report = attnpatch.verify(converted[0])
    assert "checksums of the weights" in failed(report)
    assert "weight" in next(c.detail for c in report.checks if c.status == "failed")


def test_lost_and_surplus_weights(converted: tuple[Path, Path]) -> None:
    edit(converted[0], lambda state: state.pop("bert.encoder.layer.0.attention.self.attnpatch.aggregate.gate_query"))
    report = attnpatch.verify(converted[0], converted[1])
    assert failed(report) == {"weights complete"}
    assert status(report)["save and load"] == "skipped"
    assert "gate_query" in str(report)


def test_weights_that_are_not_finite(converted: tuple[Path, Path]) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        state["bert.encoder.layer.1.output.dense.bias"][3] = float("inf")

    edit(converted[0], spoil)
    report = attnpatch.verify(converted[0], converted[1])
    assert {"outputs finite"} <= failed(report)


def test_drift_beyond_what_was_promised(converted: tuple[Path, Path]) -> None:
    path, src = converted
    assert attnpatch.verify(path, src).passed
    other = save(src.parent / "other")
    state = load_file(other / "model.safetensors")
    state["bert.encoder.layer.0.output.dense.bias"][0] += 0.01
    save_file(state, other / "model.safetensors", {"format": "pt"})
    assert failed(attnpatch.verify(path, other)) == {"drift in float32"}
    assert attnpatch.verify(path, other, tolerance=10.0).passed
    (path / "attnpatch_manifest.json").unlink()
    assert attnpatch.verify(path, other).passed  # nothing promises the function any more
    assert failed(attnpatch.verify(path, other, tolerance=1e-5)) == {"drift in float32"}


def test_what_cannot_be_compared(converted: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"inputs|in common"):
        attnpatch.verify(converted[0], save(tmp_path / "m", "MarianMTModel"))
    with pytest.raises(SpecError, match="did you mean 'float32'"):
        attnpatch.verify(converted[0], dtypes=("flot32",))
    with pytest.raises(CheckpointError, match="does not exist"):
        attnpatch.verify(tmp_path / "nowhere")


# --- faults in the attention ------------------------------------------------------------------------------------


def sabotaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, spec: str, cls: type, method: str, broken: Any
) -> set[str]:
    """Names of the checks that fail on a model whose method is broken."""
    src = save(tmp_path / "stock", name)
    attnpatch.convert(src, tmp_path / "new", spec)
    assert attnpatch.verify(tmp_path / "new").passed
    monkeypatch.setattr(cls, method, broken(getattr(cls, method)))
    return failed(attnpatch.verify(tmp_path / "new"))


def without_mask(original: Any) -> Any:
    def attend(self: Any, query: Any, key: Any, value: Any, mask: Any, dropout: Any, causal: Any, scale: Any) -> Any:
        return original(self, query, key, value, None, dropout, causal and mask is None, scale)

    return attend


def test_attention_to_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sabotaged(tmp_path, monkeypatch, "BertForMaskedLM", "expressive", KernelScore, "attend", without_mask)
    assert found == {"padding"}


def test_attention_to_later_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(original: Any) -> Any:
        def attend(self: Any, query: Any, key: Any, value: Any, mask: Any, dropout: Any, *rest: Any) -> Any:
            return original(self, query, key, value, None, dropout, False, rest[-1])

        return attend

    found = sabotaged(tmp_path, monkeypatch, "MarianMTModel", "expressive", KernelScore, "attend", leaky)
    assert {"padding", "causality", "generation"} <= found


def test_weights_that_are_not_normalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(original: Any) -> Any:
        return lambda self, *args: 2.0 * original(self, *args)

    found = sabotaged(tmp_path, monkeypatch, "BertForMaskedLM", "expressive", KernelScore, "weights", doubled)
    assert "attentions" in found


def test_a_state_that_the_cache_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_length(original: Any) -> Any:
        def attend(self: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
            return original(self, query, key, value, *rest) * (1.0 + 0.1 * query.shape[2])

        return attend

    found = sabotaged(tmp_path, monkeypatch, "MarianMTModel", "expressive", KernelScore, "attend", by_length)
    assert "generation" in found


@pytest.mark.parametrize(
    ("spec", "cls", "part"), [("neural", NeuralProjection, "up"), ("query_value", QueryValueSum, "gate_query")]
)
def test_parameters_without_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, cls: type, part: str
) -> None:
    def cut(original: Any) -> Any:
        def forward(self: Any, *args: Any) -> Any:
            held = getattr(self, part)
            for parameter in held.parameters() if isinstance(held, torch.nn.Module) else [held]:
                parameter.requires_grad_(False)
            return original(self, *args)

        return forward

    found = sabotaged(tmp_path, monkeypatch, "BertForMaskedLM", spec, cls, "forward", cut)
    assert found == {"gradients reach every new parameter"}


def test_verifying_leaves_no_trace(converted: tuple[Path, Path]) -> None:
    before = {p: p.read_bytes() for p in converted[0].iterdir()}
    state = torch.random.get_rng_state()
    first, second = attnpatch.verify(*converted), attnpatch.verify(*converted)
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {p: p.read_bytes() for p in converted[0].iterdir()} == before


# --- the probes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_probes(name: str) -> None:
    model = tiny_model(name)
    probe = make_probe(model, seed=3)
    again = make_probe(model, seed=3)
    assert all(torch.equal(probe.inputs[key], again.inputs[key]) for key in probe.inputs)
    mask = probe.inputs["attention_mask"]
    assert mask.shape[-1] == 12
    assert not bool(mask.all())
    assert all(value.isfinite().all() for value in outputs_of(model, probe).values())
    other = outputs_of(model, make_probe(model, seed=4))
    assert any(not torch.equal(value, other[key]) for key, value in outputs_of(model, probe).items())


@pytest.mark.parametrize("name", ["BertForPreTraining", "RobertaForCausalLM", "MarianMTModel"])
def test_computing_in_float32(name: str) -> None:
    model = tiny_model(name).to(torch.bfloat16)
    attnpatch.patch(model, "query_value", init="paper")
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    probe = make_probe(model)
    with computing_in_float32(model):
        wide = outputs_of(model, probe, torch.float32)
    narrow = outputs_of(model, probe)
    state = model.state_dict()
    assert all(value.dtype == kept[key].dtype and torch.equal(value, kept[key]) for key, value in state.items())
    reference = outputs_of(model.float(), probe)
    for key, value in reference.items():
        assert torch.equal(wide[key], value)
        assert not torch.equal(narrow[key], value)
