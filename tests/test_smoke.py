"""`--smoke`: every script through its command line on generated data, small and marked."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from run_script import config_class, run_script

from attnpatch.reports.records import ReportError
from attnpatch.reports.report import write_report
from attnpatch.training.config import load_config
from attnpatch.training.errors import ConfigError
from attnpatch.training.smoke import shrink

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_marian", "train_mlm", "train_classifier", "train_sequences", "eval_value_aware")
MODEL = ["model.hidden_size=16", "model.layers=1", "model.heads=2", "model.ffn_dim=24"]
TRAINING = ["training.threads=1", "training.precision=fp32", "training.device=cpu", "training.epochs=50"]


def smoke(script: str, *words: str) -> int:
    return run_script(script, [*words, "--smoke"])


def sentences(count: int) -> list[str]:
    words = ["".join(random.choices("abcdefgh", k=random.randint(2, 6))) for _ in range(60)]
    return [" ".join(random.choices(words, k=random.randint(4, 9))) for _ in range(count)]


def write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of text, and that of a smoke run of train_mlm over it."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("train", "valid", "test"):
        write(folder / f"{name}.txt", sentences(120))
    words = [f"data.dir={folder}", f"output.dir={folder / 'run'}", "data.block_size=16", "spec={expressive: {}}"]
    assert smoke("train_mlm", *words, *MODEL, *TRAINING, "tokenizer.vocab_size=280") == 0
    return folder, folder / "run-smoke"


def check(out: Path) -> dict[str, Any]:
    """The results of a smoke run: whole, marked, and none for a report."""
    results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["smoke"] is True
    assert not out.with_name(out.name.removesuffix("-smoke")).exists()
    with pytest.raises(ReportError, match=r"results of a smoke run"):
        write_report([out], out / "report")
    assert not (out / "report").exists()
    return results


def test_train_mlm(language_model: tuple[Path, Path]) -> None:
    results = check(language_model[1])
    assert results["steps"] == 3
    assert results["spec"] != "stock"
    assert results["scores"]["test.txt"]["predicted_tokens"] > 0
    assert len(results["dev"]) == 1


def test_eval_value_aware(language_model: tuple[Path, Path], tmp_path: Path) -> None:
    folder, run = language_model
    words = [f"models=[{run / 'model'}]", f"data.dir={folder}", f"output.dir={tmp_path / 'out'}", "threads=1"]
    assert smoke("eval_value_aware", *words, "data.block_size=16", "device=cpu") == 0
    model = check(tmp_path / "out-smoke")["models"][0]
    assert (model["blocks"], model["kernel"]) == (2, "expressive")
    assert {row["r"] for row in model["rows"]} == {1, 2}


def test_train_marian(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        write(tmp_path / f"{name}.de", sentences(150))
        write(tmp_path / f"{name}.en", sentences(150))
    sizes = ["model.d_model=16", "model.encoder_layers=1", "model.decoder_layers=1", "model.heads=2"]
    words = [f"data.dir={tmp_path}", f"output.dir={tmp_path / 'out'}/", "tokenizer.vocab_size=60", "spec=neural"]
    assert smoke("train_marian", *words, *sizes, *TRAINING) == 0
    results = check(tmp_path / "out-smoke")
    assert results["steps"] == 3
    assert results["scores"]["test"]["bleu"] >= 0
    assert results["scores"]["test"]["sentences"] == 8


def test_train_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "dev"):
        lines = [f"{i % 2}\t{text}" for i, text in enumerate(sentences(90))]
        (tmp_path / "SST-2").mkdir(exist_ok=True)
        write(tmp_path / "SST-2" / f"{part}.tsv", ["label\tsentence", *lines])
    words = [f"data.dir={tmp_path}", f"output.dir={tmp_path / 'out'}", "data.adversarial=null", "task.max_length=24"]
    for seed in (1, 2):  # the second is not hindered by what the first left
        assert smoke("train_classifier", *words, *MODEL, *TRAINING, f"seed={seed}", "tokenizer.vocab_size=280") == 0
        assert "training.max_steps=3" in capsys.readouterr().err
        results = check(tmp_path / "out-smoke")
        assert (results["seed"], results["steps"]) == (seed, 3)
    assert results["scores"]["dev"]["examples"] == 48
    assert results["mmd"]["after"]["examples"] == 4
    lines = (tmp_path / "out-smoke" / "dev.predictions.tsv").read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    assert len(rows) == 48
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert right / 48 == pytest.approx(results["scores"]["dev"]["accuracy"])
    given = (tmp_path / "SST-2" / "dev.tsv").read_text(encoding="utf-8").splitlines()
    labels = dict(zip("01", ("negative", "positive"), strict=True))
    for row in rows:
        assert row["label"] == labels[given[int(row["line"]) - 1][0]]
        shares = {name[2:-1]: float(value) for name, value in row.items() if name.startswith("p(")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert shares[row["prediction"]] == max(shares.values())


def test_train_sequences(tmp_path: Path) -> None:
    words = [f"output.dir={tmp_path / 'out'}", "seeds=[3, 4]", "training.threads=1"]
    assert smoke("train_sequences", str(ROOT / "configs" / "nt-cpu.yaml"), *words, "training.device=cpu") == 0
    cells = check(tmp_path / "out-smoke")["cells"]
    assert {(cell["seed"], cell["cell"]) for cell in cells} == {(3, "N2-tau2"), (3, "N2-tau4")}
    assert {cell["steps"] for cell in cells} == {3}


@pytest.mark.parametrize("script", SCRIPTS)
def test_limits_bound_and_keep(script: str) -> None:
    """Each config of the script within its limits; what has no limit stays."""
    kind = config_class(script)
    found = 0
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        try:
            words = ["models=[x]"] if script == "eval_value_aware" else []
            config = load_config(kind, path, words)
        except ConfigError:
            continue  # of another script
        found += 1
        small, changed = shrink(config)
        assert small.as_dict()["smoke"]
        assert "smoke" not in config.as_dict()
        before, after = config.as_dict(), small.as_dict()
        keys = {change.partition("=")[0] for change in changed}
        for section, value in before.items():
            for name, old in value.items() if isinstance(value, dict) else [(None, value)]:
                key, new = (section, after[section]) if name is None else (f"{section}.{name}", after[section][name])
                assert (old != new) == (key in keys)
                limit = kind.smoke_limits.get(key)
                if isinstance(new, (int, float)) and limit is not None:
                    assert new <= limit
                elif isinstance(new, list) and limit is not None:
                    assert new == old[:limit]
        assert small.output.dir == f"{config.output.dir}-smoke"
    assert found


@pytest.mark.parametrize("script", [*SCRIPTS, "demo"])
def test_the_settings_can_be_shown(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is a config file that gives the same settings; nothing else happens."""
    needed = ["models=[x]"] if script == "eval_value_aware" else []
    key = "output" if script == "demo" else "output.dir"
    words = [*needed, f"{key}={tmp_path / 'run'}", "--show-config"]
    assert run_script(script, words) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown, encoding="utf-8")
    loaded = load_config(config_class(script), tmp_path / "shown.yaml")
    assert loaded == load_config(config_class(script), None, words[:-1])
    if script != "demo":  # which has no --smoke
        assert run_script(script, [*words, "--smoke"]) == 0
        (tmp_path / "small.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
        assert load_config(config_class(script), tmp_path / "small.yaml") != loaded
    assert not (tmp_path / "run").exists()


def test_a_script_without_limits_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("demo", [str(ROOT / "configs" / "demo-cpu.yaml"), "--smoke"]) == 2
    assert "has no --smoke" in capsys.readouterr().err
