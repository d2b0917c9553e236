"""The demo, with a model far too small to learn: every step, every file, and the exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_script import run_script
from safetensors.torch import load_file

from attnpatch.demo import run as demo
from attnpatch.demo.config import DemoConfig
from attnpatch.demo.run import VARIANTS, Demo, Row, Variant
from attnpatch.experiments.translation import trainer
from attnpatch.experiments.translation.tokenizer import encode
from attnpatch.training.config import load_config

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo-cpu.yaml"


def main(argv: list[str], usage: str | None = None) -> int:
    return run_script("demo", argv, usage, CONFIG)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def words(out: Path, *more: str) -> list[str]:
    small = [
        "corpus.train=300",
        "corpus.dev=40",
        "corpus.test=10",
        "base.model.d_model=16",
        "base.model.encoder_layers=1",
        "base.model.decoder_layers=1",
        "base.model.heads=2",
        "base.model.ffn_dim=16",
        "base.tokenizer.vocab_size=120",
        "base.training.max_steps=2",
        "base.training.max_tokens=256",
        "base.training.threads=1",
        "base.training.precision=fp32",
        "base.generation.max_length=8",
        "further.updates=2",
    ]
    return [*small, f"output={out}", *more]


def results_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    auxiliary: list[float] = []
    log = trainer.TranslationTrainer.log

    def watch(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        log(self, logs, *args, **kwargs)
        if "alignment" in Path(self.args.output_dir).name and "auxiliary_loss" in logs:
            auxiliary.append(logs["auxiliary_loss"])

    monkeypatch.setattr(trainer.TranslationTrainer, "log", watch)
    assert main(words(tmp_path, "base.training.log_every=1")) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert "Warning" not in printed.err
    found = results_of(tmp_path)
    assert found["synthetic"] is True
    assert found["unchanged"]["failed"] == []
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == ["stock", *(variant.name for variant in VARIANTS)]

    # Each variant of the registry that is no control is shown.
    import attnpatch

    shown = {name for variant in VARIANTS for name in str(rows[variant.name]["spec"]).replace("(", "+").split("+")}
    assert set(attnpatch.variants()) - {"linear"} <= shown

    exact = {"neural (roberta preset)", "value_aware (oracle)", "query_value", "alignment"}
    for name, row in rows.items():
        assert row["must_be_unchanged"] == (name in exact)
        if name in exact:
            assert row["drift"] <= 1e-10
            assert row["drift_float32"] <= 1e-5
            assert row["same_translations"] == 10
        elif name != "stock":
            assert row["drift"] > 0
        assert (row["after"] is None) == (name == "value_aware (oracle)")
        assert row["updates"] == (2 if row["after"] else 0)
    assert rows["query_value"]["parameters_added"] > 0
    assert rows["neural + expressive + alignment"]["stages"] == ["project", "score", "regularise"]

    # The losses of a converted model's own are trained: two logs a run, two runs.
    assert len(auxiliary) == 4
    assert all(value != 0 for value in auxiliary)

    # The demo's own scoring is the training script's.
    test = found["base"]["scores"]["test"]
    assert {key: test[key] for key in rows["stock"]["before"]} == rows["stock"]["before"]
    assert test["bleu_signature"].startswith("nrefs:1")

    # Every row was trained on the same batches.
    runs = [json.loads(path.read_text()) for path in (tmp_path / "trained_on").glob("*/results.json")]
    assert len(runs) == len(VARIANTS)
    assert len({(run["tokens"]["source"], run["tokens"]["target"], run["seed"]) for run in runs}) == 1
    assert all(run["spec"] == "stock" or run["spec"]["variants"] for run in runs if "variants" in run["spec"])

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    for text in (table, printed.out, (tmp_path / "bleu.svg").read_text(encoding="utf-8")):
        assert "ynthetic" in text
        assert all(name in text for name in rows)
    assert found["summary"] in table
    assert "Not shown" in found["summary"]
    assert (tmp_path / "bleu.png").read_bytes().startswith(b"\x89PNG")


def test_oracle_is_measured_where_it_has_to_choose(tmp_path: Path) -> None:
    """With no more keys than r, any selection would keep the function."""
    config = load_config(DemoConfig, CONFIG, [f"output={tmp_path}", "corpus.train=2000"])
    steps = Demo(config)
    steps.write_corpus()
    from attnpatch.experiments.translation.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(
        config.base.tokenizer, steps.test.sources, steps.test.targets, ("de", "en"), tmp_path / "t"
    )
    head_dim = config.base.model.d_model // config.base.model.heads
    lengths = [len(ids) for ids in encode(tokenizer, demo.long_rows(steps.test.sources), 10**6)]
    assert min(lengths) > head_dim + 1
    assert max(lengths) <= config.base.model.max_positions


def test_a_change_fails_the_demo_and_repeats_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "VARIANTS", (Variant("expressive", "expressive", exact=True),))
    weights, drifts = [], []
    for name in ("one", "two"):
        out = tmp_path / name
        assert main(words(out)) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("error: the conversion must not change the model, but did: expressive (")
        assert printed.err.count("\n") == 1
        assert "CHANGED" in printed.out
        assert results_of(out)["unchanged"]["failed"] == ["expressive"]
        assert "0 of 1" in results_of(out)["summary"]
        weights.append(load_file(out / "trained_on" / "expressive" / "model" / "model.safetensors"))
        drifts.append(results_of(out)["rows"][1]["drift"])
    assert drifts[0] == drifts[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


NAN = float("nan")


@pytest.mark.parametrize(
    ("drift", "in_float32", "at_conversion", "changed"),
    [
        (0.0, 0.0, 0.0, False),
        (1e-5, 2.9e-4, 2.9e-4, False),
        (1.1e-5, 0.0, 0.0, True),
        (0.0, 3.1e-4, 0.0, True),
        (0.0, 0.0, 3.1e-4, True),
        (NAN, 0.0, 0.0, True),
        (0.0, NAN, 0.0, True),
        (None, 0.0, 0.0, True),
    ],
)
def test_what_counts_as_changed(drift: float | None, in_float32: float, at_conversion: float, changed: bool) -> None:
    row = Row("x", [], "x", must_be_unchanged=True, largest_logit=30.0)
    row.drift, row.drift_float32, row.drift_at_conversion = drift, in_float32, at_conversion
    assert row.changed is changed
    row.must_be_unchanged = False
    assert not row.changed


def test_distance() -> None:
    one, two = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.0, 1.5], [2.0, 3.0]])
    assert demo.distance(one, two) == (0.5, 0.125)
    two[0, 0] = float("nan")
    assert demo.distance(one, two)[0] == float("inf")
    assert demo.distance(two, two)[0] == float("inf")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["further.update=1"], "did you mean 'further.updates'"),
        (["corpus.test=0"], "corpus.test=0"),
        (["nothing.yaml"], "no config file nothing.yaml"),
        (["--fast"], "unknown option --fast"),
        (["base.spec=neural"], "base.spec"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: str
) -> None:
    arguments = [*more, *words(tmp_path)] if more[0].endswith(".yaml") else [*words(tmp_path), *more]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "results.json").exists()


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert main(words(tmp_path / "run")) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: not installed: sacrebleu, matplotlib; pip install 'attnpatch[train]'")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(words(tmp_path / "file")) == 2
    assert "is a file, not a folder; choose another output\n" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_help_and_interrupt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--help"], "usage text") == 0
    assert capsys.readouterr().out == "usage text\n"

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "write_corpus", interrupted)
    assert main(words(tmp_path)) == 130
    assert "stopped" in capsys.readouterr().err
