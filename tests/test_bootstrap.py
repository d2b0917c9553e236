"""The paired bootstrap from kept counts, against sacrebleu's own from the texts; broken counts; the report's table."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from attnpatch.experiments.translation.bleu_statistics import (
    COLUMNS,
    bleu_of,
    bleu_statistics,
    read_statistics,
    write_statistics,
)
from attnpatch.reports.bootstrap import compare_systems, load
from attnpatch.reports.records import ReportError
from attnpatch.reports.report import write_report
from attnpatch.training.errors import DataError


def texts(count: int = 120) -> tuple[list[str], dict[str, list[str]]]:
    """References, and three systems that get ever more words wrong; some hypotheses are empty."""
    words = ["The", "cat", "sat", "on", "a", "Mat", "and", "saw", "nothing", "again", ",", "it's"]
    references = [" ".join(random.choices(words, k=random.randint(1, 14))) + "." for _ in range(count)]
    systems = {}
    for name, wrong in (("stock", 0.2), ("near", 0.22), ("far", 0.5)):
        systems[name] = [
            " ".join(w if random.random() > wrong else random.choice(words).lower() for w in line.split())
            for line in references
        ]
        systems[name][random.randrange(count)] = ""
    return references, systems


@pytest.mark.parametrize("lowercase", [False, True])
def test_equal_to_sacrebleu_on_the_texts(tmp_path: Path, lowercase: bool) -> None:
    references, systems = texts()
    kept = {}
    for name, hypotheses in systems.items():
        write_statistics(tmp_path / name, bleu_statistics(hypotheses, references, lowercase))
        kept[name] = read_statistics(tmp_path / name)
        whole = BLEU(lowercase=lowercase).corpus_score(hypotheses, [references]).score
        assert bleu_of(kept[name]) == pytest.approx(whole, abs=1e-9)
    named = [(name, systems[name]) for name in ("stock", "near", "far")]
    _, expected = PairedTest(named, {"BLEU": BLEU(lowercase=lowercase, references=[references])}, None, "bs", 200)()
    found = compare_systems(kept["stock"], {name: kept[name] for name in ("near", "far")}, 1, samples=200)
    stock, *others = expected["BLEU"]
    for name, result in zip(("near", "far"), others, strict=True):
        assert found[name].p == result.p_value  # type: ignore[union-attr]
        assert found[name].difference == pytest.approx(result.score - stock.score)  # type: ignore[union-attr]
    assert found["far"].p < 0.05
    assert (found["far"].samples, found["far"].sentences) == (200, 120)


def test_a_system_against_itself_is_no_finding() -> None:
    references, systems = texts()
    rows = bleu_statistics(systems["near"], references)
    found = compare_systems(rows, {"same": rows}, None, samples=50)["same"]
    assert found.difference == 0
    assert found.p > 0.5 or found.p == pytest.approx(1 / 51)  # sacrebleu counts differences strictly above


def test_files_are_small_equal_and_without_words(tmp_path: Path) -> None:
    references, systems = texts(2000)
    rows = bleu_statistics(systems["near"], references)
    for name in "ab":
        write_statistics(tmp_path / name, rows)
    raw = (tmp_path / "a").read_bytes()
    assert raw == (tmp_path / "b").read_bytes()
    assert len(raw) < 20 * 2000
    header, *lines = gzip.decompress(raw).decode().splitlines()
    assert header.split("\t") == list(COLUMNS)
    assert all(value.isdigit() for line in lines for value in line.split("\t"))


def test_broken_counts_are_named(tmp_path: Path) -> None:
    references, systems = texts(10)
    rows = bleu_statistics(systems["far"], references)
    path = tmp_path / "x.bleu.tsv.gz"
    write_statistics(path, rows)
    whole = path.read_bytes()
    header = "\t".join(COLUMNS)
    for raw in (
        whole[:-9],
        b"no gzip",
        gzip.compress(b"a\tb\n1\t2\n"),
        gzip.compress(f"{header}\n1\t2\n".encode()),
        gzip.compress((header + "\n" + "\t".join(["-1"] * 10) + "\n").encode()),
        b"",
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"x\.bleu\.tsv\.gz holds no BLEU statistics"):
            read_statistics(path)
        with pytest.raises(ReportError, match=r"x\.bleu\.tsv\.gz"):
            load(path, 1.0)
    path.write_bytes(whole)
    assert load(path, bleu_of(rows)) == rows
    with pytest.raises(ReportError, match=r"the results\.json beside it has 99\.0000"):
        load(path, 99.0)
    other = bleu_statistics(systems["far"][::-1], references[::-1])
    other[0][1] += 1
    with pytest.raises(ReportError, match="far, seed 3: its BLEU statistics are of other sentences"):
        compare_systems(rows, {"far": other}, 3)


def translation(folder: Path, spec: Any, seed: int, hypotheses: list[str], references: list[str]) -> None:
    rows = bleu_statistics(hypotheses, references)
    write_statistics(folder / "test.bleu.tsv.gz", rows)
    results = {
        "experiment": "translation",
        "spec": spec,
        "seed": seed,
        "parameters": {"trainable": 100},
        "scores": {"test": {"bleu": round(bleu_of(rows), 4), "bleu_statistics": "test.bleu.tsv.gz"}},
        "data": {"test": [{"files": [{"sha256": "a"}]}]},
        "config": {"spec": spec},
    }
    (folder / "results.json").write_text(json.dumps(results))


def test_the_report_compares_within_each_seed(tmp_path: Path) -> None:
    references, systems = texts()
    for seed in (1, 2):
        for name, spec in (("stock", "stock"), ("far", "neural")):
            folder = tmp_path / "runs" / f"{name}-{seed}"
            folder.mkdir(parents=True)
            translation(folder, spec, seed, texts_of(systems[name]), references)
    document = write_report([tmp_path / "runs"], tmp_path / "out")
    (row,) = [r for r in document["experiments"]["translation"]["metrics"]["test: BLEU"]["rows"] if r["bootstrap"]]
    assert row["variant"] == "neural"
    assert [entry["seed"] for entry in row["bootstrap"]] == [1, 2]
    assert all(entry["p"] < 0.05 for entry in row["bootstrap"])
    for seed, difference in zip(row["against"]["seeds"], [e["difference"] for e in row["bootstrap"]], strict=True):
        assert seed in (1, 2)
        assert difference < 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "1,000 resamples of 120 sentences" in text
    assert "| neural | 2 | -" in text

    torn = tmp_path / "runs" / "far-2" / "test.bleu.tsv.gz"
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(ReportError, match=r"far-2/test\.bleu\.tsv\.gz holds no BLEU statistics"):
        write_report([tmp_path / "runs"], tmp_path / "again")
    torn.unlink()  # counts that are not there leave that seed out
    document = write_report([tmp_path / "runs"], tmp_path / "again")
    rows = {r["variant"]: r for r in document["experiments"]["translation"]["metrics"]["test: BLEU"]["rows"]}
    assert [entry["seed"] for entry in rows["neural"]["bootstrap"]] == [1]


def texts_of(hypotheses: list[str]) -> list[str]:
    """The same system with another seed: a few sentences differ."""
    return [line if random.random() > 0.05 else line.upper() for line in hypotheses]
