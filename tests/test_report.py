"""`attnpatch report`: arithmetic against numbers worked out by hand, refusals, files."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from attnpatch.cli import main
from attnpatch.reports.records import Metric, ReportError, find_results, group, load_runs
from attnpatch.reports.report import write_report
from attnpatch.reports.statistics import compare, summary

RESULTS = Path(__file__).resolve().parents[1] / "results"


def result(spec: Any = "stock", seed: int = 1, value: float = 20.0, **changes: Any) -> dict[str, Any]:
    """A results.json of train_mlm.py, as small as it can be."""
    if spec != "stock":
        from attnpatch.spec import AttentionSpec

        resolved: Any = AttentionSpec.parse(spec).to_dict()
    else:
        resolved = "stock"
    tree = {
        "experiment": "mlm",
        "spec": resolved,
        "seed": seed,
        "parameters": {"total": 120, "trainable": 100 if spec == "stock" else 150},
        "dev": [{"step": 10, "epoch": 1.0, "loss": 3.0}, {"step": 20, "epoch": 2.0, "loss": math.log(value)}],
        "train": [{"step": 5, "epoch": 0.5, "loss": 4.0}],
        "scores": {"test": {"loss": math.log(value), "perplexity": value, "predicted_tokens": 50}},
        "tokenizer": {"class": "RobertaTokenizer", "vocabulary": 300, "sha256": "t" * 64},
        "data": {
            split: [{"name": split, "files": [{"path": f"/somewhere/{seed}/{split}", "sha256": split * 8}]}]
            for split in ("train", "dev", "test")
        },
        "machine": {"cpu": "a CPU"},
        "versions": {"torch": "2"},
        "precision": "fp32",
        "config": {
            "spec": None if spec == "stock" else spec,
            "init": "preserve",
            "seed": seed,
            "model": {"layers": 2},
            "training": {"learning_rate": 0.1, "threads": seed},
            "output": {"dir": f"out{seed}"},
        },
    }
    for path, new in changes.items():
        node: Any = tree
        *parents, last = path.split("__")
        for name in parents:
            node = node[name]
        node[last] = new
    return tree


def put(folder: Path, *results: dict[str, Any]) -> list[str]:
    paths = []
    for i, tree in enumerate(results):
        path = folder / f"run{i}" / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree), encoding="utf-8")
        paths.append(str(path))
    return paths


def test_arithmetic_by_hand(tmp_path: Path) -> None:
    stock, neural = {1: 21.0, 2: 24.0, 3: 24.0}, {1: 19.0, 2: 23.0, 3: 21.0, 4: 10.0}
    runs = [result(seed=s, value=v) for s, v in stock.items()] + [result("neural", s, v) for s, v in neural.items()]
    random.shuffle(runs)
    document = write_report(put(tmp_path, *runs), tmp_path / "out")
    table = document["experiments"]["mlm"]["metrics"]["test: perplexity"]
    assert table["higher_is_better"] is False
    rows = {row["variant"]: row for row in table["rows"]}
    assert [row["variant"] for row in table["rows"]] == ["stock", "neural"]
    assert rows["stock"]["mean"] == pytest.approx(23.0)
    assert rows["stock"]["deviation"] == pytest.approx(math.sqrt(3))  # (4 + 1 + 1) / 2
    assert rows["stock"]["against"] is None
    assert rows["neural"]["mean"] == pytest.approx(18.25)
    assert rows["neural"]["parameters"] == 150
    against = rows["neural"]["against"]
    assert against["seeds"] == (1, 2, 3)  # seed 4 has no partner
    assert against["mean"] == pytest.approx(-2.0)  # -2, -1, -3
    assert against["deviation"] == pytest.approx(1.0)
    assert against["better"] == 3
    t = -2 / (1 / math.sqrt(3))
    assert against["t"] == pytest.approx(t)
    assert against["p"] == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))  # Student's t with 2 degrees of freedom
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| neural | 150 | 4 | 18.25 |" in text
    assert "| -2 | 3 of 3 | 0.0742 (n=3) |" in text
    assert "paired t-test" in text
    assert json.loads((tmp_path / "out" / "report.json").read_text())["experiments"]["mlm"]["runs"][0]["scores"]
    for name in ("mlm-dev-loss", "mlm-training-loss", "mlm-parameters"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000
        assert "<svg" in (tmp_path / "out" / f"{name}.svg").read_text(encoding="utf-8")
    assert not list((tmp_path / "out").glob(".*"))


def test_one_seed_and_equal_differences_allow_no_test() -> None:
    one = compare({1: 3.0}, {1: 2.0, 2: 5.0}, True)
    assert one is not None
    assert (one.p, one.t, one.better, one.mean) == (None, None, 1, 1.0)
    assert "no test is possible" in one.reason
    equal = compare({1: 3.0, 2: 4.0}, {1: 2.0, 2: 3.0}, False)
    assert equal is not None
    assert (equal.p, equal.better) == (None, 0)
    assert "equal" in equal.reason
    assert compare({1: 3.0}, {2: 3.0}, True) is None
    assert summary({1: 4.0}) == (4.0, None, 1)


def test_one_seed_says_so_in_the_report(tmp_path: Path) -> None:
    write_report(put(tmp_path, result(), result("neural", value=19.0)), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "- neural: no test is possible with one common seed." in text
    assert "no test |" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__train": [{"files": [{"path": "x", "sha256": "other"}]}]}, "mlm: the train data differ"),
        ({"data__test": [{"files": [{"path": "x", "sha256": "other"}]}]}, "mlm: the test data differ"),
        ({"tokenizer__sha256": "u" * 64}, "the tokenizers differ"),
        ({"scores__test__predicted_tokens": 51}, "test was scored in different ways"),
    ],
)
def test_runs_on_other_data_are_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    paths = put(tmp_path, result(), result(seed=2), result("neural", **changes))
    with pytest.raises(ReportError, match=expected) as caught:
        write_report(paths, tmp_path / "out")
    assert all(path in str(caught.value) for path in paths)
    assert "must not be compared" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_same_text_in_another_form_is_the_same_data(tmp_path: Path) -> None:
    files = [{"path": "a.parquet", "sha256": "p", "text_sha256": "same"}], [{"path": "a.txt", "sha256": "q"}]
    other = copy.deepcopy(files[1])
    other[0]["text_sha256"] = "same"
    a = result(data__train=[{"files": files[0]}])
    b = result("neural", data__train=[{"files": other}])
    assert write_report(put(tmp_path, a, b), tmp_path / "out")


def test_other_settings_are_another_variant(tmp_path: Path) -> None:
    runs = [result(seed=s) for s in (1, 2)] + [result("neural", s) for s in (1, 2)]
    runs += [result("neural", 1, 18.0, config__training__learning_rate=0.2)]
    runs += [result("neural", 1, 18.0, config__init="paper"), result(seed=1, value=19.0, config__model__layers=3)]
    members = group(load_runs(find_results(put(tmp_path, *runs))))["mlm"]
    assert {run.label for run in members} == {
        "stock",
        "neural",
        "neural [training.learning_rate=0.2]",
        "neural (init paper)",
        "stock [model.layers=3]",
    }


def test_broken_and_mixed_files_are_named(tmp_path: Path) -> None:
    good = put(tmp_path, result())[0]
    bad = {
        "torn": ("{", "not valid JSON"),
        "list": ("[1]", "a list"),
        "other": ('{"a": 1}', "names no experiment"),
        "cell": ('{"cell": "N2-tau2"}', "not finished"),
        "demo": ('{"experiment": "demo"}', "the demo"),
        "lacking": (json.dumps({k: v for k, v in result().items() if k != "seed"}), "lacks 'seed'"),
        "nan": (json.dumps(result(scores__test__perplexity=math.nan)), "not finite"),
        "empty": (json.dumps(result(scores={})), "no scores"),
    }
    for name, (text, _) in bad.items():
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    with pytest.raises(ReportError) as caught:
        write_report([good, *(str(tmp_path / f"{name}.json") for name in bad)], tmp_path / "out")
    message = str(caught.value)
    assert f"{len(bad)} of {len(bad) + 1} results files cannot be used" in message
    for name, (_, reason) in bad.items():
        part = message.split(f"{name}.json: ")[1].split(";")[0]
        assert reason in part
    with pytest.raises(ReportError, match="are both mlm, stock, seed 1: leave one out"):
        write_report(put(tmp_path, result(), result()), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=r"no results\.json in the folder"):
        write_report([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ReportError, match="no file or folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")


def test_folders_are_searched_but_not_inside_a_run(tmp_path: Path) -> None:
    paths = put(tmp_path, result(), result(seed=2))
    inner = tmp_path / "run0" / "cells" / "a" / "results.json"
    inner.parent.mkdir(parents=True)
    inner.write_text("{}")
    assert [str(path) for path in find_results([tmp_path])] == paths


def test_a_real_file_of_train_marian(tmp_path: Path) -> None:
    document = write_report([RESULTS / "multi30k-float32"], tmp_path)
    (row,) = document["experiments"]["translation"]["metrics"]["test_2016_flickr: BLEU"]["rows"]
    assert row["mean"] == pytest.approx(38.5179)
    assert row["parameters"] == 4977664
    assert row["against"] is None


def test_smoke_runs_beside_others_are_passed_over(tmp_path: Path) -> None:
    real = put(tmp_path, result())[0]
    smoke = tmp_path / "run-smoke" / "results.json"
    smoke.parent.mkdir()
    smoke.write_text(Path(real).read_text())
    assert smoke not in find_results([tmp_path])
    assert find_results([smoke.parent]) == [smoke]  # asked for by name, it is refused when read


def test_tables_of_a_page_are_written_anew(tmp_path: Path) -> None:
    paths, out = put(tmp_path, result(), result("neural", value=19.0)), tmp_path / "out"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table mlm / test: perplexity -->\nold\n<!-- end -->\nafter\n")
    write_report(paths, out, page)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "| neural |" in text
    assert "-1 | 1 of 1 | no test |" in text
    write_report(paths, out, page)
    assert page.read_text() == text
    for words, message in (
        ("<!-- table mlm / test: perplexiti -->\n<!-- end -->\n", "did you mean 'mlm / test: perplexity'"),
        ("<!-- table mlm / test: perplexity -->\n", "line 1 of the page"),
        ("nothing", "no marker"),
    ):
        page.write_text(words)
        with pytest.raises(ReportError, match=message):
            write_report(paths, out, page)
        assert page.read_text() == words
    with pytest.raises(ReportError, match="cannot be read"):
        write_report(paths, tmp_path / "new", tmp_path / "nowhere.md")
    assert not (tmp_path / "new").exists()


def test_the_repositorys_own_runs(tmp_path: Path) -> None:
    document = write_report([RESULTS / "multi30k"], tmp_path)
    translation = document["experiments"]["translation"]
    assert [Path(run["path"]).parent.name for run in translation["runs"]] == sorted(
        f"{run['variant']}-seed1" for run in translation["runs"]
    )
    rows = {row["variant"]: row for row in translation["metrics"]["test_2016_flickr: BLEU"]["rows"]}
    stock = rows["stock"]
    assert stock["mean"] == pytest.approx(38.5346)
    assert len(rows) >= 4
    for name, row in rows.items():
        if name != "stock":
            assert row["against"]["mean"] == pytest.approx(row["mean"] - stock["mean"])


def test_the_page_has_the_numbers_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = RESULTS.parent / "docs" / "results.md"
    page = tmp_path / "results.md"
    page.write_bytes(kept.read_bytes())
    monkeypatch.setattr("attnpatch.reports.report._draw", lambda section, out: [])  # half a minute
    write_report([RESULTS], tmp_path / "out", page)
    assert page.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8"), (
        "run: attnpatch report results --output results/report --markdown docs/results.md"
    )
    for figure in re.findall(r"\]\((\.\./results/report/[^)]+)\)", kept.read_text(encoding="utf-8")):
        assert (kept.parent / figure).is_file(), figure


def test_other_processors_are_noted(tmp_path: Path) -> None:
    gpus = {"cpu": "a CPU", "gpus": ["NVIDIA H200", "NVIDIA H200"]}
    runs = result(), result("neural", machine=gpus), result("elu", machine={"cpu": "a CPU", "gpus": []})
    about = write_report(put(tmp_path, *runs), tmp_path / "out")["experiments"]["mlm"]
    assert about["notes"] == ["The runs differ in processor: NVIDIA H200, NVIDIA H200; a CPU."]
    assert "differ in processor" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    same = write_report(put(tmp_path, runs[0], result("neural")), tmp_path / "out")["experiments"]["mlm"]
    assert same["notes"] == []


def test_a_grid_of_sequences(tmp_path: Path) -> None:
    def cell(spec: Any, seed: int, name: str, accuracy: float) -> dict[str, Any]:
        return {
            "spec": spec,
            "seed": seed,
            "cell": name,
            "bases": [int(name[1])],
            "delays": [2],
            "chance": 1 / int(name[1]),
            "accuracy": accuracy,
            "parameters": {"trainable": 10},
            "train": [{"step": 1, "loss": 1.0}],
        }

    from attnpatch.spec import AttentionSpec

    ea = AttentionSpec.parse({"expressive": {"scale": 1.0}}).to_dict()
    values = {("stock", 1): (0.4, 0.6), ("stock", 2): (0.5, 0.7), ("ea", 1): (0.8, 1.0), ("ea", 2): (0.6, 0.9)}
    cells = [
        cell("stock" if spec == "stock" else ea, seed, name, accuracy)
        for (spec, seed), pair in values.items()
        for name, accuracy in zip(("N2-tau2", "N4-tau2"), pair, strict=True)
    ]
    data = {"test": [{"name": "N2-tau2", "files": [{"sha256": "a"}]}]}
    tree = {"experiment": "sequences", "specs": ["stock", "expressive(scale=1.0)"], "cells": cells, "data": data}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(tree | {"config": {}}))
    runs = load_runs([path])
    means = {(run.variant, run.seed): run.scores[Metric("mean of the grid", "accuracy")] for run in runs}
    assert means["stock", 1] == pytest.approx(0.5)
    assert means["expressive(scale=1.0)", 2] == pytest.approx(0.75)
    document = write_report([path], tmp_path / "out")
    row = document["experiments"]["sequences"]["metrics"]["mean of the grid: accuracy"]["rows"][1]
    assert row["against"]["mean"] == pytest.approx(((0.9 - 0.5) + (0.75 - 0.6)) / 2)
    assert row["against"]["better"] == 2
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| base N | delay tau | chance | stock (n = 2) | expressive(scale=1.0) (n = 2) |" in text
    assert "| 2 | 2 | 0.500 | 0.450 | 0.700 |\n| 4 | 2 | 0.250 | 0.650 | 0.950 |" in text
    assert (tmp_path / "out" / "sequences-accuracy.png").stat().st_size > 1000


def test_other_data_in_another_folder_is_another_section(tmp_path: Path) -> None:
    ours = put(tmp_path / "ours", result(), result("neural", value=19.0))
    other = [{"files": [{"path": "x", "sha256": "other"}]}]
    put(tmp_path / "theirs", result(data__test=other), result("neural", value=30.0, data__test=other))
    document = write_report([tmp_path], tmp_path / "out")
    assert list(document["experiments"]) == ["mlm (ours)", "mlm (theirs)"]
    differences = [
        section["metrics"]["test: perplexity"]["rows"][1]["against"]["mean"]
        for section in document["experiments"].values()
    ]
    assert differences == [pytest.approx(-1.0), pytest.approx(10.0)]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "they are not compared" in text
    # A third folder with both kinds ties them together, and cannot be reported.
    put(tmp_path / "mixed", result(seed=3), result(seed=4, data__test=other))
    with pytest.raises(ReportError, match="the test data differ"):
        write_report([tmp_path], tmp_path / "again")
    # The same data in two folders is one section.
    put(tmp_path / "more", result(seed=2))
    together = write_report([tmp_path / "more", *ours], tmp_path / "again")
    assert list(together["experiments"]) == ["mlm"]


def test_from_a_checkpoint_and_from_scratch_are_sections_of_their_own(tmp_path: Path) -> None:
    put(tmp_path / "scratch", result(), result("neural", value=19.0))
    weights = {"weights_sha256": ["a" * 64]}
    put(tmp_path / "arms", result(pretrained=weights), result("neural", value=19.5, pretrained=weights))
    document = write_report([tmp_path], tmp_path / "out")
    assert list(document["experiments"]) == ["mlm (arms)", "mlm (scratch)"]
    for section in document["experiments"].values():
        assert [row["variant"] for row in section["metrics"]["test: perplexity"]["rows"]] == ["stock", "neural"]


def test_links_lead_to_the_figures(tmp_path: Path) -> None:
    tree = result(experiment="value_aware masked")
    write_report(put(tmp_path, tree), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((.+)\)", text)
    assert len(links) == 3
    assert all(" " not in link and (tmp_path / "out" / link).is_file() for link in links)


def test_a_comparison_across_settings_says_so(tmp_path: Path) -> None:
    fast = {"config__training__learning_rate": 0.2}
    runs = [result(seed=1), result(seed=2), result("neural", value=19.0), result("neural", value=18.0, **fast)]
    write_report(put(tmp_path / "a", *runs), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    name = "neural [training.learning_rate=0.2]"
    assert f"- {name}: no stock run has the same settings, so it is compared with stock" in text
    write_report(put(tmp_path / "b", *runs, result(seed=1, **fast)), tmp_path / "out")
    assert "no stock run has" not in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    write_report(put(tmp_path / "c", result("neural")), tmp_path / "out")
    assert "- neural: no stock run to compare with." in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_another_checkpoint_is_another_setting(tmp_path: Path) -> None:
    def from_checkpoint(sha: str, folder: str, **changes: Any) -> dict[str, Any]:
        start = {"name": folder, "weights_sha256": [sha * 64]}
        return result(**changes, pretrained=start, config__model={"pretrained": folder})

    runs = from_checkpoint("a", "here", seed=1), from_checkpoint("a", "there", seed=2), from_checkpoint("b", "here")
    labels = [run.label for run in group(load_runs(find_results(put(tmp_path, *runs))))["mlm"]]
    assert labels == ["stock", "stock", f"stock [model.pretrained={'b' * 12}]"]


def test_the_whole_results_folder(tmp_path: Path) -> None:
    """Files of other kinds lie in it, and runs of several studies."""
    document = write_report([RESULTS], tmp_path)
    assert {Path(name).name for name in document["files"]} == {"results.json"}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for section in document["experiments"].values():
        for name in section["figures"]:
            assert f"({name}.png)" in text
            assert (tmp_path / f"{name}.svg").stat().st_size > 1000
    rows = {
        row["variant"]: row
        for name, section in document["experiments"].items()
        if name.startswith("translation")
        for metric, table in section["metrics"].items()
        if metric == "test_2016_flickr: BLEU"
        for row in table["rows"]
    }
    (found,) = rows["neural"]["bootstrap"]
    assert found["difference"] == pytest.approx(rows["neural"]["against"]["mean"], abs=1e-3)
    assert found["sentences"] == 1000


def test_a_missing_package_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    put(tmp_path / "runs", result())
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == "attnpatch: not installed: matplotlib; pip install 'attnpatch[train]' brings what it needs\n"
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "runs", result(), result("neural", value=19.0))
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experiments"]["mlm"]["runs"]
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    assert "mlm: 2 runs" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no file or folder" in capsys.readouterr().err


def test_conversions(tmp_path: Path) -> None:
    """Nothing is trained, so nothing is said of seeds."""
    row = {"variant": "neural", "exact": True, "drift_max": 0.0, "drift_mean": 0.0, "parameters_added": 12}
    row |= {"verify_passed": True, "spearman": 0.8671, "revert_bit_identical": True}
    other = row | {"variant": "elu", "exact": False, "drift_max": 1.5, "drift_mean": 0.25, "verify_passed": False}
    other |= {"revert_bit_identical": None}
    del other["spearman"]
    document = {
        "experiment": "conversion",
        "source": {"parameters": 100, "spearman": 0.8672},
        "variants": [row, other],
        "data": {"test": [{"files": [{"sha256": "0" * 64}]}]},
    }
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "results.json").write_text(json.dumps(document))
    found = write_report([tmp_path / "runs"], tmp_path / "out")
    lines = found["tables"]["conversion / details"].splitlines()
    assert lines[2:] == [
        "| source | - | - | - | - | - | - | 0.867200 |",
        "| neural | yes | 0.0e+00 | 0.0e+00 | 12 | pass | yes | 0.867100 |",
        "| elu | no | 1.5e+00 | 2.5e-01 | 12 | **fail** | not recoverable | - |",
    ]
    assert "seed in common" not in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "conversion-drift.svg").stat().st_size > 1000


def test_what_makes_runs_differ(tmp_path: Path) -> None:
    """Processes have a batch each; translations of another length penalty are another measurement."""
    runs = [result(seed=1), result(seed=2), result("neural", processes=2), result("neural", seed=2)]
    labels = [run.label for run in group(load_runs(find_results(put(tmp_path / "p", *runs))))["mlm"]]
    assert labels == ["stock", "stock", "neural [processes=2]", "neural"]
    scores = {"test": {"bleu": 20.0, "sentences": 5}}
    runs = [result(scores=scores, config__generation={"length_penalty": value}) for value in (1.0, 0.2)]
    with pytest.raises(ReportError, match="length_penalty"):
        group(load_runs(find_results(put(tmp_path / "l", runs[0], result("neural") | runs[1] | {"seed": 2}))))


def test_a_run_above_others_hides_none(tmp_path: Path) -> None:
    put(tmp_path, result(), result("neural"))
    (tmp_path / "results.json").write_text(json.dumps(result("elu")))
    cells = tmp_path / "cells" / "N2-tau2"
    cells.mkdir(parents=True)
    (cells / "results.json").write_text("{}")
    found = find_results([tmp_path])
    assert len(found) == 3
    assert cells / "results.json" not in found


@pytest.mark.parametrize("value", [None, "20.0", True])
def test_a_score_is_a_number(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ReportError, match=r"its score test: perplexity is .*, no number"):
        load_runs(find_results(put(tmp_path, result(scores={"test": {"perplexity": value}}))))


def test_rounding_is_no_certainty() -> None:
    from attnpatch.reports.statistics import compare

    found = compare({1: 0.3, 2: 0.4, 3: 0.5}, {1: 0.2, 2: 0.3, 3: 0.4}, True)
    assert found is not None
    assert found.p is None
    real = compare({1: 0.31, 2: 0.4, 3: 0.5}, {1: 0.2, 2: 0.3, 3: 0.4}, True)
    assert real is not None
    assert 0 < real.p < 0.05  # type: ignore[operator]
