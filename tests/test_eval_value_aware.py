"""Sparse evaluation of tiny random language models: the floor, the order of the methods, the numbers themselves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from run_script import run_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

import attnpatch
from attnpatch.experiments.language_models.blocks import FixedBlocks, make_blocks
from attnpatch.experiments.language_models.bpe import build_byte_level
from attnpatch.experiments.language_models.config import ByteLevelConfig, MaskingConfig, TextConfig
from attnpatch.experiments.language_models.text import load_text
from attnpatch.experiments.value_aware.config import ValueAwareConfig
from attnpatch.experiments.value_aware.run import run
from attnpatch.reports.report import write_report
from attnpatch.training.config import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WIDTH, LENGTH = 6, 14


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = ["".join(random.choices("abcdef ", k=40)).strip() + "." for _ in range(60)]
    (folder / "test.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    lines = load_text(TextConfig(dir=str(data)), "test")[0].lines
    return build_byte_level(ByteLevelConfig(vocab_size=280), lines, tmp_path_factory.mktemp("t") / "t", LENGTH)


def saved(folder: Path, tokenizer: Any, spec: Any = None, causal: bool = False, family: str = "roberta") -> str:
    """A model with weights so large that attention matters."""
    import transformers

    kinds = {
        "roberta": ("RobertaConfig", "RobertaForCausalLM", "RobertaForMaskedLM"),
        "bert": ("BertConfig", "BertLMHeadModel", "BertForMaskedLM"),
    }
    config = getattr(transformers, kinds[family][0])(
        vocab_size=280,
        hidden_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH + 2,
        initializer_range=0.5,
        pad_token_id=1,
        is_decoder=causal,
    )
    if spec:
        config = attnpatch.patch_config(config, spec)
    model = getattr(transformers, kinds[family][1 if causal else 2])(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def evaluate(data: Path, out: Path, models: list[str], *more: str) -> dict[str, Any]:
    words = [
        f"models={json.dumps(models)}",
        f"data.dir={data}",
        "data.test=[test.txt]",
        f"data.block_size={LENGTH}",
        "blocks=5",
        "batch_size=2",
        f"output.dir={out}",
        "output.quiet=true",
        "device=cpu",
        "threads=1",
    ]
    return run(load_config(ValueAwareConfig, None, [*words, *more]))


@pytest.mark.parametrize(
    ("spec", "causal", "family"),
    [
        (None, False, "roberta"),
        ("expressive", False, "bert"),
        ("polynomial", True, "roberta"),
        ("neural+elu", True, "bert"),
    ],
)
def test_the_oracle_reaches_the_floor_and_never_loses(
    data: Path, tokenizer: Any, tmp_path: Path, spec: Any, causal: bool, family: str
) -> None:
    folder = saved(tmp_path / "m", tokenizer, spec, causal, family)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model = evaluate(data, tmp_path / "out", [folder], "r=[1,2,4,D+1]")["models"][0]
    assert model["kernel"] == (spec.rpartition("+")[2] if spec else "softmax")
    assert model["objective"] == ("causal" if causal else "masked")
    rows = {(row["method"], row["r"]): row for row in model["rows"]}
    assert {r for _, r in rows} == {1, 2, 4, WIDTH + 1}
    exact = model["exact"]["loss"]
    full = rows["oracle", WIDTH + 1]
    assert full["loss"] == pytest.approx(exact, abs=2e-5)
    assert full["output_error"] < 1e-5
    for r in (1, 2, 4):
        for method in ("top_r", "norm", "centered"):
            pairs = zip(
                rows["oracle", r]["output_error_by_layer"], rows[method, r]["output_error_by_layer"], strict=True
            )
            assert all(a <= b + 1e-6 for a, b in pairs)
        assert rows["oracle", r]["output_error"] > 1e-4
    assert abs(rows["top_r", 1]["loss"] - exact) > 1e-4
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "out" / "value-aware.png").stat().st_size > 1000


def test_a_finished_model_is_not_evaluated_again(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnpatch.experiments.value_aware import run as module

    folders = [saved(tmp_path / name, tokenizer, spec) for name, spec in (("a", None), ("b", "elu"))]
    evaluated: list[str] = []
    real = module._evaluate

    def watch(config: Any, name: str, *rest: Any) -> Any:
        if len(evaluated) == 1 and stop:
            raise KeyboardInterrupt
        evaluated.append(Path(name).name)
        return real(config, name, *rest)

    monkeypatch.setattr(module, "_evaluate", watch)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        evaluate(data, tmp_path / "out", folders, "r=[2]")
    stop = False
    resumed = evaluate(data, tmp_path / "out", folders, "r=[2]")
    assert evaluated == ["a", "b"]
    whole = evaluate(data, tmp_path / "other", folders, "r=[2]")
    assert evaluated == ["a", "b", "a", "b"]
    for one, other in zip(resumed["models"], whole["models"], strict=True):
        assert one["rows"] == other["rows"]
    # Another setting or other weights are another record.
    evaluate(data, tmp_path / "out", folders[:1], "r=[3]")
    evaluate(data, tmp_path / "out", folders[:1], "r=[2]", "masking.eval_seed=5")
    saved(tmp_path / "a", tokenizer)
    evaluate(data, tmp_path / "out", folders[:1], "r=[2]")
    assert evaluated[4:] == ["a", "a", "a"]
    # So are the same weights under another config: an option of the spec is no weight.
    scaled = [saved(tmp_path / str(scale), tokenizer, {"expressive": {"scale": scale}}) for scale in (0.25, 4.0)]
    weights = [(Path(folder) / "model.safetensors").read_bytes() for folder in scaled]
    (Path(scaled[1]) / "model.safetensors").write_bytes(weights[0])
    one, other = evaluate(data, tmp_path / "out", scaled, "r=[2]")["models"]
    assert one["sha256"] == other["sha256"]
    assert one["exact"] != other["exact"]
    document = write_report([tmp_path / "out"], tmp_path / "report")
    runs = document["experiments"]["value_aware masked"]["runs"]
    names = ["expressive(scale=0.25)", "expressive(scale=4.0)"]
    assert [run["variant"] for run in runs] == names
    table = document["tables"]["value_aware masked / details"]
    assert all(f"{name}, masked: exact perplexity" in table for name in names)


def test_whole_words(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The masks of the sweep are those of whole words: of a word all pieces are predicted, or none."""
    from attnpatch.experiments.value_aware.run import _blocks

    model = AutoModelForMaskedLM.from_pretrained(saved(tmp_path / "m", tokenizer))
    words = [
        "models=[x]",
        f"data.block_size={LENGTH}",
        "blocks=7",
        "masking.whole_words=true",
        "masking.probability=0.5",
    ]
    config = load_config(ValueAwareConfig, None, words)
    text = load_text(TextConfig(dir=str(data)), "test")[0]
    fixed = _blocks(config, model, tokenizer, text)
    labels = fixed.batch(range(7))["labels"]
    starts = make_blocks(text, tokenizer, LENGTH, keep_last=False, words=True).word_starts
    several = 0
    for row in range(7):
        # The first token, <s>, belongs to no word; a word's start is marked.
        groups: list[list[int]] = []
        for place in range(1, LENGTH - 1):
            groups = [*groups, [place]] if starts[row, place] or not groups else [*groups[:-1], [*groups[-1], place]]
        for group in groups:
            assert len({bool(labels[row, place] != -100) for place in group}) == 1
            several += len(group) > 1 and bool(labels[row, group[0]] != -100)
    assert several


def test_numbers_against_a_plain_computation(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The exact loss, the loss of a patched model, and the first layer's output error at top-r, each done by hand."""
    folder = saved(tmp_path / "m", tokenizer)
    r = random.randint(2, 5)
    record = evaluate(data, tmp_path / "out", [folder], f"r=[{r}]")["models"][0]
    blocks = make_blocks(load_text(TextConfig(dir=str(data)), "test")[0], tokenizer, LENGTH, keep_last=False)
    fixed = FixedBlocks(blocks, tokenizer, MaskingConfig())
    batch = fixed.batch(range(5))
    labels = batch.pop("labels")
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten()))

    assert record["exact"]["loss"] == pytest.approx(loss(), rel=1e-5)
    attention = model.roberta.encoder.layer[0].attention.self
    with torch.no_grad():
        hidden = model.roberta.embeddings(input_ids=batch["input_ids"])
        q, k, v = (
            layer(hidden).double().view(5, LENGTH, 2, WIDTH).transpose(1, 2)
            for layer in (attention.query, attention.key, attention.value)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / WIDTH**0.5, -1)
        errors = []
        for b in range(5):
            for h in range(2):
                for t in range(LENGTH):
                    row = weights[b, h, t]
                    best = sorted(range(LENGTH), key=lambda j: -row[j].item())[:r]
                    exact = row @ v[b, h]
                    sparse = sum(row[j] * v[b, h, j] for j in best) / sum(row[j] for j in best)
                    errors.append(float((exact - sparse).norm() / exact.norm()))
    row = next(row for row in record["rows"] if row["method"] == "top_r")
    assert row["output_error_by_layer"][0] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    for name, spec in (("top_r", {"top_r": {"r": r}}), ("centered", {"value_aware": {"r": r, "selector": "centered"}})):
        with attnpatch.patched(model, spec):
            found = next(row for row in record["rows"] if row["method"] == name)
            assert found["loss"] == pytest.approx(loss(), rel=1e-5)


def test_other_kernels_for_a_softmax_model_and_the_report(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", tokenizer)
    results = evaluate(data, tmp_path / "out", [folder], "kernels=[own,elu]", "r=[2]", "methods=[top_r,centered]")
    assert [(m["kernel"], m["kernel_trained"]) for m in results["models"]] == [("softmax",) * 2, ("elu", "softmax")]
    assert results["models"][0]["exact"] != results["models"][1]["exact"]
    document = write_report([tmp_path / "out"], tmp_path / "report")
    metrics = document["experiments"]["value_aware masked"]["metrics"]
    assert {"exact: loss", "top_r r=2: loss", "centered r=2: output error"} <= metrics.keys()
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    for model in results["models"]:
        row = next(row for row in model["rows"] if row["method"] == "centered")
        trained = "" if model["kernel"] == "softmax" else " in place of softmax"
        assert f"{model['kernel']}{trained}, masked: exact perplexity {model['exact']['perplexity']:.4g} over" in text
        assert f"| perplexity | weight x distance | {row['perplexity']:.4g} |" in text
        assert f"| output error | weight x distance | {row['output_error']:.3f} |" in text
    assert (tmp_path / "report" / "value_aware-masked-sweep.svg").stat().st_size > 1000


def test_errors_are_sentences(data: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "run" / "model", tokenizer, "expressive+top_r")

    def fails(*words: str) -> str:
        base = [f"data.dir={data}", "data.test=[test.txt]", f"data.block_size={LENGTH}", "device=cpu", "threads=1"]
        assert (
            run_script("eval_value_aware", [*base, f"output.dir={tmp_path / 'out'}", f"models=[{folder}]", *words]) == 2
        )
        return capsys.readouterr().err

    assert "is sparse already (top_r)" in fails("blocks=2")
    assert "did you mean 'oracle'" in fails("methods=[orakel]")
    assert "r has 0" in fails("r=[0]")
    assert "models is empty" in fails("models=[]")
    assert "its model is in the folder model" in fails(f"models=[{tmp_path / 'run'}]")
    plain = saved(tmp_path / "elu", tokenizer, "elu")
    assert "has only" in fails(f"models=[{plain}]", "blocks=9999")
    partly = saved(tmp_path / "partly", tokenizer, {"expressive": {}, "layers": "0"})
    assert "layers with different kernels (expressive, softmax)" in fails(f"models=[{partly}]")
    aware = saved(tmp_path / "aware", tokenizer, "query_value")
    assert "has the variant query_value" in fails(f"models=[{aware}]")
    weights = load_file(Path(plain) / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "lm_head" not in k}, Path(plain) / "model.safetensors", {"format": "pt"}
    )
    assert "lacks weights of a RobertaForMaskedLM" in fails(f"models=[{plain}]")
    plain = saved(tmp_path / "elu", tokenizer, "elu")
    assert "cannot be exchanged" in fails(f"models=[{plain}]", "kernels=[softmax]", "blocks=2")


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
def test_config_loads(scale) -> None:
    config = load_config(ValueAwareConfig, CONFIGS / f"value-aware-{scale}.yaml", ["models=[a]"])
    assert config.r[-1] == "D+1"
