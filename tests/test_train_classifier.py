"""Classification on GLUE's tasks: metrics against oracles, the data's forms and faults, runs of tiny models."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_script import run_script
from safetensors.torch import save_file

from attnpatch.errors import CheckpointError
from attnpatch.experiments.classification.config import ClassificationConfig
from attnpatch.experiments.classification.data import Examples, load_adversarial, load_files, load_hub
from attnpatch.experiments.classification.discrepancy import query_key_discrepancy
from attnpatch.experiments.classification.metrics import calibration_error, pooled, probabilities, reliability, scores
from attnpatch.experiments.classification.run import run
from attnpatch.experiments.classification.tasks import TASKS
from attnpatch.training.config import load_config
from attnpatch.training.errors import ConfigError, DataError, RunPaused, TrainingError
from attnpatch.training.pretrained import checkpoint_path

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_classifier.py"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "glue"
TINY = [
    "model.hidden_size=16",
    "model.layers=2",
    "model.heads=2",
    "model.ffn_dim=24",
    "task.max_length=32",
    "tokenizer.vocab_size=270",
    "training.batch_size=8",
    "training.epochs=2",
    "training.learning_rate=1e-3",
    "training.log_every=1",
    "training.threads=1",
    "training.precision=fp32",
    "training.device=cpu",
    "discrepancy.examples=5",
    "output.quiet=true",
]


def sentence() -> str:
    return " ".join(
        "".join(random.choices("abcde\u00e9\"'", k=random.randint(1, 5))) for _ in range(random.randint(2, 7))
    )


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLUE's files as they are: headers or none, a byte order mark, more columns than needed, no quoting."""
    folder = tmp_path_factory.mktemp("glue")
    for name in ("SST-2", "CoLA", "RTE", "MRPC", "STS-B", "AdvGLUE"):
        (folder / name).mkdir()

    def write(name: str, lines: list[str]) -> None:
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def label() -> int:
        return random.randint(0, 1)

    write("SST-2/train.tsv", ["label\tsentence", *(f"{label()}\t{sentence()} " for _ in range(20))])
    write("SST-2/dev.tsv", ["label\tcontent", *(f"{i % 2}\t{sentence()}" for i in range(9))])
    for name, count in (("in_domain_train", 20), ("in_domain_dev", 5), ("out_of_domain_dev", 4)):
        write(f"CoLA/{name}.tsv", [f"gj04\t{i % 2}\t{'*' if i % 2 else ''}\t{sentence()}" for i in range(count)])
    for name, count in (("train", 20), ("dev", 9)):
        rows = [f"{sentence()}\t{sentence()}\t{i % 2}\t{i}" for i in range(count)]
        write(f"RTE/{name}.tsv", ["sentence1\tsentence2\tlabel\tidx", *rows])
    for name, count in (("train", 20), ("test", 9)):
        rows = [f"{i % 2}\t1\t2\t{sentence()}\t{sentence()}" for i in range(count)]
        write(f"MRPC/msr_paraphrase_{name}.txt", ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows])
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    rows = [f"{i}\tg\tf\t2012\t1\tn\tn\t{sentence()}\t{sentence()}\t{random.random() * 5:.3f}" for i in range(20)]
    write("STS-B/train.tsv", [header, *rows])
    rows = [f"g\tf\t2012\t{i}\t{i % 6}\t{sentence()}\t{sentence()}" + "\tx\ty" * (i % 2) for i in range(9)]
    write("STS-B/sts-dev.csv", rows)
    adversarial = {
        "sst2": [{"idx": i, "sentence": sentence(), "label": i % 2} for i in range(6)],
        "rte": [{"sentence1": sentence(), "sentence2": sentence(), "label": i % 2} for i in range(5)],
    }
    (folder / "AdvGLUE" / "dev.json").write_text(json.dumps(adversarial), encoding="utf-8")
    return folder


def configured(glue: Path, out: Path, *more: str) -> ClassificationConfig:
    return load_config(ClassificationConfig, None, [*TINY, f"data.dir={glue}", f"output.dir={out}", *more])


def train(glue: Path, out: Path, *more: str) -> dict[str, Any]:
    return run(configured(glue, out, *more))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# ---- metrics ----


def test_metrics_are_those_of_their_definitions() -> None:
    n = random.randint(20, 60)
    logits = np.random.randn(n, 2).astype(np.float32) * 3
    labels = np.random.randint(0, 2, n)
    chosen = [int(row[1] > row[0]) for row in logits]
    table = {
        (a, b): sum(x == a and y == b for x, y in zip(labels, chosen, strict=True)) for a in (0, 1) for b in (0, 1)
    }
    tn, fp, fn, tp = table[0, 0], table[0, 1], table[1, 0], table[1, 1]
    found = scores(TASKS["mrpc"], logits, labels)
    assert found["accuracy"] == pytest.approx((tp + tn) / n)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores(TASKS["cola"], logits, labels)["matthews"] == pytest.approx(matthews)
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)

    rated = np.random.randn(n, 1).astype(np.float32)
    truth = np.random.randn(n).round(1)  # with ties, whose ranks are shared
    found = scores(TASKS["stsb"], rated, truth)

    def correlation(x: list[float], y: list[float]) -> float:
        mx, my = sum(x) / n, sum(y) / n
        top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
        return top / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))

    def ranks(x: list[float]) -> list[float]:
        return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]

    x, y = rated[:, 0].astype(float).tolist(), truth.tolist()
    assert found["pearson"] == pytest.approx(correlation(x, y))
    assert found["spearman"] == pytest.approx(correlation(ranks(x), ranks(y)))
    assert "ece" not in found
    with pytest.raises(TrainingError, match="correlation is not defined"):
        scores(TASKS["stsb"], np.ones((n, 1), np.float32), truth)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_calibration_error_is_that_of_a_plain_loop(classes: int) -> None:
    n = random.randint(30, 200)
    given = probabilities(np.random.randn(n, classes) * random.uniform(0.1, 5))
    if classes == 2:
        given[0] = (0.7, 0.3)  # on the edge of a bin, which belongs to the lower one
        given[1] = (1.0, 0.0)
        given[2] = (0.5, 0.5)
    labels = np.random.randint(0, classes, n)
    inside: list[list[tuple[float, bool]]] = [[] for _ in range(10)]
    for row, label in zip(given.tolist(), labels.tolist(), strict=True):
        top = max(row)
        for i in range(10):
            if i / 10 < top <= (i + 1) / 10:
                inside[i].append((top, row.index(top) == label))
    expected = sum(abs(sum(c for c, _ in bin) - sum(r for _, r in bin)) for bin in inside) / n
    rows = reliability(given, labels)
    assert [row["count"] for row in rows] == [len(bin) for bin in inside]
    assert calibration_error(rows) == pytest.approx(expected, abs=1e-12)
    # Two halves pooled are the whole.
    half = n // 2
    halves = [reliability(given[:half], labels[:half]), reliability(given[half:], labels[half:])]
    for one, two in zip(pooled(halves), rows, strict=True):
        for key in ("accuracy", "confidence"):
            assert one["count"] == two["count"]
            assert one[key] is two[key] is None or one[key] == pytest.approx(two[key])


@pytest.mark.parametrize("spec", [None, "neural+query_value", "alignment"])
def test_discrepancy_is_the_mmd_of_what_attention_gets(spec: str | None) -> None:
    """Against attention functions that look at their arguments, one sequence at a time without padding."""
    from transformers import AttentionInterface, BertConfig, BertForSequenceClassification
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    import attnpatch
    from attnpatch.functional import mmd

    config = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=8, vocab_size=50)
    model = BertForSequenceClassification(config).eval()
    if spec:
        attnpatch.patch(model, spec)
    for name, parameter in model.named_parameters():
        if "query" in name or "key" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    lengths = [9, 4, 7]
    ids = torch.randint(1, 50, (3, 9))
    mask = torch.tensor([[1] * n + [0] * (9 - n) for n in lengths])
    found = query_key_discrepancy(model, [{"input_ids": ids, "attention_mask": mask, "rows": torch.arange(3)}])

    seen: list[torch.Tensor] = []

    def watch(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(mmd(query.double(), key.double(), reduction="none")[0])
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    if spec is None or spec == "alignment":  # a stock core runs transformers' own function
        AttentionInterface.register("watching", watch)
        model.set_attn_implementation("watching")
        expected = torch.zeros(2, 3, dtype=torch.float64)
        for row, length in enumerate(lengths):
            seen.clear()
            model(input_ids=ids[row : row + 1, :length])
            expected += torch.stack(seen) / 3
        assert found["by_layer"] == pytest.approx(expected.mean(1).tolist(), rel=1e-4)
        assert found["sum"] == pytest.approx(float(expected.sum()), rel=1e-4)
    assert found["mean"] == pytest.approx(sum(found["by_layer"]) / 2)
    assert found["examples"] == 3
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith(("query", "key")))


# ---- data ----


@pytest.mark.parametrize("name", list(TASKS))
def test_files_parquet_and_hub_are_the_same(glue: Path, name: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    task = TASKS[name]
    plain = load_files(task, str(glue), task.train, "train")
    assert len(plain) == 20
    assert all(len(texts) == len(task.hub.texts) for texts in plain.texts)
    raw = (glue / task.train[0]).read_text(encoding="utf-8-sig").split("\n")
    for row in random.sample(range(20), 3):
        line = raw[plain.places[row][1] - 1].split("\t")
        assert all(text in [cell.strip() for cell in line] for text in plain.texts[row])
        assert f"line {plain.places[row][1]}" in plain.where([row])
    assert len(load_files(task, str(glue), task.dev, "dev")) == 9
    columns: dict[str, Any] = {"label": plain.labels}
    for i, column in enumerate(task.hub.texts):
        columns[str(column)] = [texts[i] for texts in plain.texts]
    (tmp_path / name).mkdir()
    parquet.write_table(pyarrow.table(columns), tmp_path / name / "train-00000-of-00001.parquet")
    for other in (
        load_files(task, str(tmp_path), [f"{name}/train-00000-of-00001.parquet"], "train"),
        load_hub(task, str(tmp_path), name, None, "train"),
    ):
        assert other.texts == plain.texts
        assert other.labels == plain.labels
        assert other.files[0]["text_sha256"] == plain.files[0]["text_sha256"]
    with pytest.raises(DataError, match="cannot read the split 'validation'"):
        load_hub(task, str(tmp_path), name, None, "validation")


def test_subset_is_the_same_in_every_run(glue: Path) -> None:
    task = TASKS["sst2"]
    whole = load_files(task, str(glue), task.train, "train")
    part, again = whole.subset(7), load_files(task, str(glue), task.train, "train").subset(7)
    assert part.texts == again.texts
    assert part.places == sorted(part.places)
    assert part.files[0]["text_sha256"] == again.files[0]["text_sha256"] != whole.files[0]["text_sha256"]
    assert part.files[0]["sha256"] == whole.files[0]["sha256"]
    assert whole.subset(None) is whole.subset(99) is whole


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("sst2", "2\tgood", r"line 4: unknown label '2'; labels of sst2: 0 \(negative\), 1 \(positive\)$"),
        ("sst2", "-1\tgood", r"line 4: .*test sets have no labels"),
        ("sst2", "1", r"line 4: 1 column\(s\), but column 2 is needed"),
        ("sst2", "1\t ", r"line 4: a text is empty"),
        ("rte", "a\tb\tmaybe\t1", r"line 4: unknown label 'maybe'.*1 \(not_entailment\)"),
        ("stsb", "g\tf\t2012\t1\t5.1\ta\tb", r"line 4: the score '5.1' is not a number from 0 to 5"),
        ("stsb", "g\tf\t2012\t1\tnan\ta\tb", r"line 4: the score 'nan' is not"),
    ],
)
def test_bad_lines_are_named(glue: Path, name: str, line: str, message: str, tmp_path: Path) -> None:
    task = TASKS[name]
    lines = (glue / task.dev[0]).read_text(encoding="utf-8").split("\n")
    (tmp_path / "x.tsv").write_text("\n".join([*lines[:3], line, *lines[4:]]), encoding="utf-8")
    with pytest.raises(DataError, match=f"x.tsv, {message}"):
        load_files(task, str(tmp_path), ["x.tsv"], "dev")


def test_names_of_labels_are_labels(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text(
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n"
    )
    assert load_files(TASKS["rte"], str(tmp_path), ["x.tsv"], "dev").labels == [1, 0]


def test_other_files_are_refused(glue: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"starts with the names of its columns, label, sentence or label, content"):
        load_files(TASKS["sst2"], str(glue), ["MRPC/msr_paraphrase_train.txt"], "train")
    with pytest.raises(DataError, match=r"did you mean 'train.tsv'.*ATTNPATCH_DATA.*What provides it: GLUE"):
        load_files(TASKS["sst2"], str(glue), ["SST-2/trian.tsv"], "train", "GLUE's files")
    with pytest.raises(DataError, match="does not exist"):
        load_files(TASKS["sst2"], str(tmp_path / "none"), ["SST-2/train.tsv"], "train")
    (tmp_path / "dev.json").write_text('{"sst2": [{"sentence": "a", "label": 3}], "rte": [{"sentence1": "a"}]}')
    with pytest.raises(DataError, match=r"sst2 row 1: unknown label 3"):
        load_adversarial(TASKS["sst2"], tmp_path / "dev.json")
    with pytest.raises(DataError, match=r"rte row 1: needs label, sentence1, sentence2; it has sentence1"):
        load_adversarial(TASKS["rte"], tmp_path / "dev.json")
    with pytest.raises(DataError, match=r"data.adversarial=null"):
        load_adversarial(TASKS["rte"], tmp_path / "none.json")


def test_the_real_files() -> None:
    if not SHARED.is_dir():
        pytest.skip("no shared data beside the checkout")
    sizes = {"sst2": (67349, 872, 148), "cola": (8551, 1043, 0), "rte": (2490, 277, 81)}
    sizes |= {"mrpc": (4076, 1725, 0), "stsb": (5749, 1500, 0)}
    for name, (train_size, dev_size, adversarial_size) in sizes.items():
        task = TASKS[name]
        assert len(load_files(task, str(SHARED), task.train, "train")) == train_size
        assert len(load_files(task, str(SHARED), task.dev, "dev")) == dev_size
        if task.adversarial:
            assert len(load_adversarial(task, SHARED / "AdvGLUE" / "dev.json")) == adversarial_size


# ---- runs ----


@pytest.mark.parametrize(
    ("name", "family", "spec"),
    [
        ("sst2", "bert", "stock"),
        ("rte", "roberta", "{alignment: {method: gan}}"),
        ("mrpc", "bert", "query_value"),
        ("cola", "roberta", "{alignment: {method: ot}}"),
        ("stsb", "bert", "alignment"),
    ],
)
def test_end_to_end(glue: Path, tmp_path: Path, name: str, family: str, spec: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    task = TASKS[name]
    # Wide weights, as a correlation of outputs that hardly differ is a matter of rounding.
    more = (f"task.name={name}", f"model.family={family}", f"spec={spec}", "model.init_std=0.2")
    results = train(glue, tmp_path, *more)
    assert results == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["experiment"] == "classification"
    assert results["steps"] == 6
    assert [entry["step"] for entry in results["dev"]] == [3, 6]
    assert set(results["scores"]) == ({"dev", "AdvGLUE"} if task.adversarial else {"dev"})
    assert results["tokens"]["examples"] == 40
    assert len(results["mmd"]["before"]["by_layer"]) == 2
    assert results["scores"]["dev"]["mmd"] == results["mmd"]["after"]["mean"] != results["mmd"]["before"]["mean"]
    assert ("auxiliary" in spec or "alignment" in spec) == ("alignment" in json.dumps(results["spec"]))
    assert {"sha256", "text_sha256"} <= results["data"]["train"][0]["files"][0].keys()
    assert (tmp_path / "reliability.png").is_file() == (not task.is_regression)

    # The scores again, with a reloaded model, one example at a time.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    dev = load_files(task, str(glue), task.dev, "dev")
    with torch.no_grad():
        rows = [
            model(**tokenizer(*texts, truncation=True, max_length=32, return_tensors="pt")).logits[0].tolist()
            for texts in dev.texts
        ]
    again = scores(task, np.array(rows), np.array(dev.labels))
    for key, value in again.items():
        assert results["scores"]["dev"][key] == pytest.approx(value, abs=1e-4)


def test_a_pretrained_checkpoint(glue: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    train(glue, tmp_path / "first", "task.name=sst2")
    pretrained = f"model.pretrained={tmp_path / 'first' / 'model'}"
    with pytest.raises(TrainingError, match=r"of 2 output\(s\), and stsb has 1"):
        train(glue, tmp_path / "second", "task.name=stsb", pretrained)
    with pytest.raises(TrainingError, match=r"task.max_length=33 is more than the model's 32 positions"):
        train(glue, tmp_path / "third", "task.name=sst2", pretrained, "task.max_length=33")
    encoder = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first" / "model").base_model
    bare = tmp_path / "bare"
    encoder.save_pretrained(bare)
    more = (f"model.pretrained={bare}", f"tokenizer.path={tmp_path / 'first' / 'model'}", "training.learning_rate=0")
    results = train(glue, tmp_path / "fourth", "task.name=stsb", "spec=alignment", *more)
    one, two = weights(bare), weights(tmp_path / "fourth" / "model")
    assert two["classifier.out_proj.weight"].shape == (1, 16)
    assert all(torch.equal(one[name], two[f"roberta.{name}"]) for name in one)
    assert len(results["pretrained"]["weights_sha256"]) == 1
    save_file({k: v for k, v in one.items() if "layer.0.output" not in k}, bare / "model.safetensors", {"format": "pt"})
    for spec in ("stock", "query_value"):
        with pytest.raises(CheckpointError, match=r"lacks weights of a RobertaForSequenceClassification"):
            train(glue, tmp_path / "fifth", "task.name=stsb", f"spec={spec}", *more)


def test_what_was_not_measured_is_not_said_to_be(glue: Path, tmp_path: Path) -> None:
    """A finished run whose weights were not kept cannot be scored in another way."""
    kept = ("task.name=sst2", "output.keep_weights=false")
    first = train(glue, tmp_path / "a", *kept, "discrepancy.examples=0")
    assert train(glue, tmp_path / "a", *kept, "discrepancy.examples=0") == json.loads(json.dumps(first, default=str))
    with pytest.raises(TrainingError, match=r"is finished, with other discrepancy settings"):
        train(glue, tmp_path / "a", *kept, "discrepancy.examples=4")


def test_packages_hold_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package" / "model").mkdir(parents=True)
    (tmp_path / "some_package" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    (tmp_path / "some_package" / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert checkpoint_path("package:some_package/model") == str(tmp_path / "some_package" / "model")
    assert checkpoint_path("bert-base-uncased") == "bert-base-uncased"
    with pytest.raises(CheckpointError, match=r"has no folder 'modle' with a config.json; it has model"):
        checkpoint_path("package:some_package/modle")
    with pytest.raises(CheckpointError, match=r"'no_such_thing', which is not installed: pip install"):
        checkpoint_path("package:no_such_thing/model")


@pytest.mark.parametrize("spec", ["stock", "alignment"])
def test_a_paused_run_ends_like_one_that_went_through(glue: Path, tmp_path: Path, spec: str) -> None:
    more = ("task.name=rte", f"spec={spec}")
    whole = train(glue, tmp_path / "whole", *more)
    pauses = 0
    while True:
        try:
            parts = train(glue, tmp_path / "parts", *more, "training.stop_after_minutes=0")
            break
        except RunPaused:
            pauses += 1
    assert pauses >= 3
    assert parts["resumed_at"]
    assert parts["scores"] == whole["scores"]
    assert parts["mmd"] == whole["mmd"]
    one, two = weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(TrainingError, match="holds a run with other settings"):
        train(glue, tmp_path / "parts", "task.name=sst2", f"spec={spec}")


def test_a_killed_run_ends_like_one_that_went_through(glue: Path, tmp_path: Path) -> None:
    more = [*TINY, f"data.dir={glue}", "task.name=sst2", "training.epochs=6", "training.save_every=2"]
    whole = train(glue, tmp_path / "whole", *more)
    out = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), *more, f"output.dir={out}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    end = time.monotonic() + 300
    while not list(out.glob("checkpoint-*/complete.json")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    resumed = train(glue, out, *more)
    assert resumed["scores"] == whole["scores"]
    one, two = weights(tmp_path / "whole" / "model"), weights(out / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weights_that_are_not_kept(glue: Path, tmp_path: Path) -> None:
    first = train(glue, tmp_path, "task.name=sst2", "output.keep_weights=false")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["tokenizer"]
    began = time.time()
    assert train(glue, tmp_path, "task.name=sst2", "output.keep_weights=false") == json.loads(json.dumps(first))
    assert (tmp_path / "results.json").stat().st_mtime < began


def test_a_loss_that_is_not_finite_names_files_and_lines(glue: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+, in SST-2/train.tsv lines \d+, \d+"):
        train(
            glue, tmp_path, "task.name=sst2", "training.learning_rate=1e30", "training.clip_norm=0", "training.epochs=9"
        )


def test_the_command_line(glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "glue-cpu.yaml")
    assert run_script("train_classifier", [config, "task.max_train_exmples=3"]) == 2
    assert "did you mean 'task.max_train_examples'" in capsys.readouterr().err
    assert run_script("train_classifier", [config, "task.name=sst3"]) == 2
    assert "did you mean 'sst2'" in capsys.readouterr().err
    assert run_script("train_classifier", [config, f"data.dir={tmp_path}", f"output.dir={tmp_path / 'o'}"]) == 2
    assert "no file" in (error := capsys.readouterr().err)
    assert "nyu-mll/glue" in error


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("glue*.yaml")), ids=lambda path: path.stem)
def test_configs_of_the_study(path: Path) -> None:
    config = load_config(ClassificationConfig, path)
    assert config.task.name in TASKS
    assert config.data.about
    with pytest.raises(ConfigError, match="does not divide"):
        load_config(ClassificationConfig, path, ["model.heads=7"])


def test_report_compares_by_task(glue: Path, tmp_path: Path) -> None:
    from attnpatch.reports.report import write_report

    for name in ("sst2", "stsb"):
        for spec in ("stock", "alignment"):
            for seed in (1, 2):
                out = tmp_path / "runs" / f"{name}-{spec}-{seed}"
                train(glue, out, f"task.name={name}", f"spec={spec}", f"seed={seed}", "training.epochs=1")
    document = write_report([tmp_path / "runs"], tmp_path / "report")
    assert set(document["experiments"]) == {"classification-sst2", "classification-stsb"}
    metrics = document["experiments"]["classification-sst2"]["metrics"]
    assert set(metrics) == {f"dev: {m}" for m in ("accuracy", "ECE", "loss", "MMD")} | {
        f"AdvGLUE: {m}" for m in ("accuracy", "ECE", "loss")
    }
    rows = metrics["dev: MMD"]["rows"]
    assert [row["variant"] for row in rows] == ["stock", "alignment"]
    assert rows[1]["against"]["seeds"] == (1, 2)
    assert (tmp_path / "report" / "classification-sst2-reliability.svg").is_file()
    assert not (tmp_path / "report" / "classification-stsb-reliability.svg").exists()


def test_examples_in_two_files_are_named() -> None:
    files = [{"path": "a/x.tsv"}, {"path": "b/y.tsv"}]
    examples = Examples("dev", texts=[("a",)] * 3, labels=[0, 1, 0], places=[(1, 4), (0, 9), (1, 2)], files=files)
    assert examples.where([0, 1, 2]) == "a/x.tsv line 9; b/y.tsv lines 2, 4"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "spec"), [("sst2", "spec=stock"), ("stsb", "spec={alignment: {method: ct, weight: 1.0}}")]
)
def test_two_processes_equal_one_with_twice_the_batch(glue: Path, tmp_path: Path, task: str, spec: str) -> None:
    """20 examples: the last update of an epoch has fewer for each. Losses, scores, the MMD and the predictions."""
    more = (f"task.name={task}", spec, "model.dropout=0", "model.attention_dropout=0")
    one = train(glue, tmp_path / "one", *more, "training.batch_size=8")
    words = [*TINY, f"data.dir={glue}", f"output.dir={tmp_path / 'two'}", *more, "training.batch_size=4"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"]["read"] == two["tokens"]["read"]
    for before, after in zip(one["train"], two["train"], strict=True):
        assert before["loss"] == pytest.approx(after["loss"], rel=1e-4)
    for name, found in one["scores"].items():
        assert found == pytest.approx(two["scores"][name], rel=1e-3, abs=1e-4)
    assert one["mmd"]["after"]["mean"] == pytest.approx(two["mmd"]["after"]["mean"], rel=1e-3)
    tables = [(tmp_path / name / "dev.predictions.tsv").read_text().splitlines() for name in ("one", "two")]
    assert [row.split("\t")[:3] for row in tables[0]] == [row.split("\t")[:3] for row in tables[1]]
