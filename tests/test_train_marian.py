"""The whole script on tiny models and fresh random text: end to end, resumed after a kill, and its errors."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from run_script import run_script

import attnpatch
from attnpatch.experiments.translation.config import MarianTrainingConfig
from attnpatch.experiments.translation.run import run
from attnpatch.training.checkpoints import (
    MARKER,
    checkpoints,
    is_complete,
    last_complete,
    load_weights,
    mark_complete,
    rotate,
)
from attnpatch.training.config import load_config
from attnpatch.training.errors import TrainingError
from attnpatch.training.files import sha256_file

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_marian.py"
TINY = [
    "model.d_model=32",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "model.heads=2",
    "model.ffn_dim=64",
    "model.max_positions=64",
    "tokenizer.vocab_size=120",
    "training.max_tokens=128",
    "training.warmup_steps=5",
    "training.log_every=1",
    "training.threads=1",
    "training.precision=fp32",
    "generation.max_length=12",
    "generation.num_beams=2",
    "output.quiet=true",
]


ONLY_TRAIN = [
    "training.evaluate_every=never",
    "training.save_every=never",
    "training.final=last",
    "generation.test=false",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language of 30 words, and another with the words in reverse order."""
    folder = tmp_path_factory.mktemp("corpus")
    german = ["".join(random.choices("aeioudnrstlß", k=random.randint(2, 5))) for _ in range(30)]
    english = ["".join(random.choices("aeioudnrstlw", k=random.randint(2, 5))) for _ in range(30)]
    for name, count in (("train", 300), ("val", 20), ("test", 15)):
        picks = [[random.randrange(30) for _ in range(random.randint(2, 6))] for _ in range(count)]
        (folder / f"{name}.de").write_text("".join(" ".join(german[i] for i in p) + "\n" for p in picks))
        (folder / f"{name}.en").write_text("".join(" ".join(english[i] for i in p[::-1]) + "\n" for p in picks))
    return folder


def settings(data: Path, out: Path, *more: str) -> list[str]:
    return [*TINY, f"data.dir={data}", f"output.dir={out}", *more]


def train(data: Path, out: Path, *more: str) -> dict[str, Any]:
    return run(load_config(MarianTrainingConfig, None, settings(data, out, *more)))


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


def test_end_to_end(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ("training.epochs=2", "generation.dev_bleu=true", "output.report_to=[tensorboard]", "seed=3")
    results = train(data, out, *more)
    assert results == json.loads((out / "results.json").read_text(encoding="utf-8"))
    scores = results["scores"]["test"]
    assert scores["sentences"] == 15
    assert 0 <= scores["bleu"] <= 100
    assert "case:mixed" in scores["bleu_signature"]
    hypotheses = (out / "test.hypotheses.en").read_text(encoding="utf-8").splitlines()
    assert len(hypotheses) == 15
    import sacrebleu

    references = (data / "test.en").read_text(encoding="utf-8").splitlines()
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-4)

    assert (results["seed"], results["spec"]) == (3, "stock")
    assert [round(entry["epoch"]) for entry in results["dev"]] == [1, 2]
    assert results["dev"][1]["loss"] < results["dev"][0]["loss"]
    assert {"bleu", "chrf"} <= results["dev"][0].keys()
    assert results["data"]["train"][0]["files"][0]["sha256"] == sha256_file(data / "train.de")
    assert results["data"]["train"][0]["pairs"] == 300
    assert results["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert os.uname().nodename not in json.dumps(results["machine"])
    assert results["parameters"]["trainable"] > 0
    assert list(out.glob("runs/*/events*")) or list(out.rglob("events.out*"))

    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    sources = (data / "test.de").read_text(encoding="utf-8").splitlines()
    ids = model.generate(**tokenizer(sources[:3], return_tensors="pt", padding=True))
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == hypotheses[:3]

    # Tokens: of the training text, every epoch.
    encoded = tokenizer(text_target=(data / "train.en").read_text(encoding="utf-8").splitlines())["input_ids"]
    assert results["tokens"]["target"] == 2 * sum(map(len, encoded))

    # A finished run, called again: nothing is trained, the scores are the same.
    again = train(data, out, *more)
    assert again["scores"]["test"]["bleu"] == scores["bleu"]
    assert again["steps"] == results["steps"]
    assert again["tokens"]["target"] == results["tokens"]["target"]

    # Other settings in the same folder are refused, by name.
    with pytest.raises(TrainingError, match=r"training\.learning_rate: 0\.001 there, 0\.5 here"):
        train(data, out, *more, "training.learning_rate=0.5")
    with pytest.raises(TrainingError, match="already holds a run"):
        train(data, out, *more, "training.resume=never")


def test_from_checkpoint_and_average(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "a", "training.epochs=1", "generation.test=false")
    before = weights(tmp_path / "a")
    more = [
        f"model.pretrained={tmp_path / 'a' / 'model'}",
        "training.batching=sentences",
        "training.max_steps=4",
        "training.evaluate_every=2",
        "training.save_every=2",
        "training.final=average",
        "training.average=2",
        "training.schedule=constant",
        "data.lowercase=true",
        "generation.lowercase=true",
    ]
    results = train(data, tmp_path / "b", *more)
    assert results["final_weights"] == ["checkpoint-2", "checkpoint-4"]
    assert "case:lc" in results["scores"]["test"]["bleu_signature"]
    after = weights(tmp_path / "b")
    from safetensors.torch import load_file, save_file

    parts = [load_file(tmp_path / "b" / name / "model.safetensors") for name in results["final_weights"]]
    for name, value in after.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2)
    assert any(not torch.equal(before[name], after[name]) for name in before)

    from attnpatch.errors import CheckpointError

    partial = {name: value for name, value in before.items() if "fc1" not in name}
    save_file(partial, tmp_path / "a" / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights of a MarianMTModel .* model\.decoder\.layers\.0\.fc1"):
        train(data, tmp_path / "c", *more)


def test_a_calibrated_start_is_closest_to_the_checkpoint(data: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the dev loss is that of the start."""
    train(data, tmp_path / "base", "training.max_steps=200", *ONLY_TRAIN)
    base = f"model.pretrained={tmp_path / 'base' / 'model'}"
    arms = {
        "stock": ("spec=stock", "init=calibrate"),
        "calibrated": ("spec=neural", "init=calibrate"),
        "preserved": ("spec=neural",),
        "paper": ("spec=neural", "init=paper"),
        "matched": ("spec={linear: {form: matched}}",),
    }
    still = ("training.learning_rate=0", "training.max_steps=1", "generation.test=false")
    found = {name: train(data, tmp_path / name, base, *arm, *still) for name, arm in arms.items()}
    losses = {name: results["dev"][-1]["loss"] for name, results in found.items()}
    assert losses["matched"] == pytest.approx(losses["stock"], abs=1e-4)  # exact without LayerNorm
    drift = {name: abs(loss - losses["stock"]) for name, loss in losses.items()}
    assert drift["calibrated"] < drift["preserved"] < drift["paper"]

    (note,) = found["calibrated"]["calibration"]["notes"]
    assert found["calibrated"]["calibration"]["pairs"] == 300
    assert "relative error on the calibration data: worst" in note
    assert found["calibrated"]["spec"]["init"] == "calibrate"
    assert "calibration" not in found["stock"]
    started = {results["pretrained"]["weights_sha256"][0] for results in found.values()}
    assert started == {sha256_file(tmp_path / "base" / "model" / "model.safetensors")}
    from transformers import AutoModelForSeq2SeqLM

    assert attnpatch.patched_modules(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "calibrated" / "model"))


def test_calibration_sees_no_padding(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every position that the fit counts is one of a real token, on both sides."""
    train(data, tmp_path / "base", "training.max_steps=1", *ONLY_TRAIN)
    from attnpatch import calibrate
    from attnpatch.experiments.translation import calibration

    batches: list[dict[str, torch.Tensor]] = []
    rows: list[int] = []
    made, add = calibration._batches, calibrate._Normal.add

    def watch_batches(*args: Any) -> list[dict[str, torch.Tensor]]:
        batches.extend(made(*args))
        return batches

    def watch_rows(self: Any, features: torch.Tensor, targets: torch.Tensor) -> None:
        rows.append(len(features))
        add(self, features, targets)

    monkeypatch.setattr(calibration, "_batches", watch_batches)
    monkeypatch.setattr(calibrate._Normal, "add", watch_rows)
    arm = (f"model.pretrained={tmp_path / 'base' / 'model'}", "spec=neural", "init=calibrate")
    train(data, tmp_path / "arm", *arm, "training.max_steps=1", "generation.test=false")
    source = sum(int(batch["attention_mask"].sum()) for batch in batches)
    target = sum(int(batch["decoder_attention_mask"].sum()) for batch in batches)
    padded = sum(batch["decoder_attention_mask"].numel() for batch in batches)
    assert target < padded
    # Query, key and output of the encoder and of the decoder; of the cross-attention, only the key reads the source.
    assert sum(rows) == 4 * source + 5 * target


@pytest.mark.parametrize("spec", ["neural", "expressive+alignment", "query_value"])
def test_patched_training(data: Path, tmp_path: Path, spec: str) -> None:
    out = tmp_path / "run"
    results = train(data, out, f"spec={spec}", "training.epochs=1", "data.max_train_pairs=100")
    assert results["spec"] != "stock"
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(out / "model")
    assert attnpatch.patched_modules(model)
    if "alignment" in spec:
        state = json.loads((sorted(out.glob("checkpoint-*"))[-1] / "trainer_state.json").read_text())
        assert all("auxiliary_loss" in entry for entry in state["log_history"] if "loss" in entry)


def test_bf16_autocast_is_active(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The projections compute in bfloat16, the loss and the weights stay float32."""
    from transformers.models.marian import modeling_marian

    seen = set()
    forward = modeling_marian.MarianEncoderLayer.forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = self.fc1.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        try:
            return forward(self, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(modeling_marian.MarianEncoderLayer, "forward", spy)
    results = train(data, tmp_path / "run", "training.precision=bf16", "training.epochs=1", "data.max_train_pairs=60")
    assert seen == {torch.bfloat16}
    assert results["precision"] == "bf16 autocast"
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())


def launch(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *settings(data, out, *more, "output.quiet=false")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=data
    )


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(data: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, a torn checkpoint besides; then the same command again."""
    # Dropout, accumulation and a clock of checkpoints that does not divide the epoch: all states have to come back.
    more = (
        "training.epochs=3",
        "training.evaluate_every=5",
        "training.save_every=5",
        "training.gradient_accumulation=2",
        "model.dropout=0.3",
    )
    process = launch(data, tmp_path / "whole", *more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())

    out = tmp_path / "killed"
    process = launch(data, out, *more)
    deadline = time.monotonic() + 300
    while not (last_complete(out) and "checkpoint-10" in [p.name for p in checkpoints(out)]):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "results.json").exists()
    newest = last_complete(out)
    assert newest is not None
    torn = out / "checkpoint-9999"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:100])

    process = launch(data, out, *more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"resuming from {newest}" in output
    resumed = json.loads((out / "results.json").read_text())
    assert resumed["resumed_at"] == [int(newest.name.partition("-")[2])]
    assert resumed["final_train_loss"] == whole["final_train_loss"]
    assert [e["loss"] for e in resumed["dev"]] == [e["loss"] for e in whole["dev"]]
    assert resumed["tokens"]["target"] == whole["tokens"]["target"]
    one, two = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(data: Path, tmp_path: Path) -> None:
    """The same pairs in each update."""
    more = ("training.batching=sentences", "model.dropout=0", "training.epochs=1")
    one = train(data, tmp_path / "one", *more, "training.batch_size=20")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command = [*launcher, *settings(data, tmp_path / "two", *more, "training.batch_size=10")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["steps"] == two["steps"] == 15
    assert one["tokens"]["target"] == two["tokens"]["target"]
    assert [e["loss"] for e in one["dev"]] == pytest.approx([e["loss"] for e in two["dev"]], rel=1e-5)
    assert one["final_train_loss"] == pytest.approx(two["final_train_loss"], rel=1e-4)
    assert two["scores"]["test"]["sentences"] == 15
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stop", [3, 6])
def test_resume_in_process_is_bitwise(data: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a second process: stopped by an exception right after a checkpoint."""
    from attnpatch.experiments.translation import trainer as module

    more = ("training.max_steps=9", "training.evaluate_every=3", "training.save_every=3", "model.dropout=0.3")
    whole = train(data, tmp_path / "whole", *more)
    save = module.TranslationTrainer._save_checkpoint

    def save_then_stop(self: Any, model: Any, trial: Any) -> None:
        save(self, model, trial)
        if self.state.global_step == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.TranslationTrainer, "_save_checkpoint", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "part", *more)
    monkeypatch.undo()
    part = train(data, tmp_path / "part", *more)
    assert part["resumed_at"] == [stop]
    assert part["final_train_loss"] == whole["final_train_loss"]
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_whole_and_torn_checkpoints(tmp_path: Path) -> None:
    for step in (5, 10, 20, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * step)
        mark_complete(folder, {"n": step})
    (tmp_path / "checkpoint-100" / MARKER).unlink()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-20"
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"x")
    assert not is_complete(tmp_path / "checkpoint-20")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / MARKER).write_text("{")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-5"
    mark_complete(tmp_path / "checkpoint-10", {})
    mark_complete(tmp_path / "checkpoint-20", {})
    rotate(tmp_path, 1, best=tmp_path / "checkpoint-5")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    assert last_complete(tmp_path / "nowhere") is None


def test_weights_of_another_model_are_refused(data: Path, tmp_path: Path) -> None:
    from transformers import MarianConfig, MarianMTModel

    small = {"vocab_size": 9, "pad_token_id": 8, "d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 8}
    one = MarianMTModel(MarianConfig(encoder_layers=1, decoder_layers=1, **small, **heads))
    two = MarianMTModel(MarianConfig(encoder_layers=2, decoder_layers=1, **small, **heads))
    one.save_pretrained(tmp_path / "one")
    with pytest.raises(TrainingError, match="does not fit the model"):
        load_weights(two, [tmp_path / "one"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["training.epoch=1"], "did you mean 'training.epochs'"),
        (["data.dir=/nowhere/at/all"], "does not exist"),
        (["nothing.yaml"], "no config file"),
        (["--fast"], "unknown option --fast"),
        (["model.pretrained=/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["model.pretrained=runs/base/model"], "runs/base/model: no such folder"),
        (["generation.max_length=900"], "64 positions"),
        (["output.report_to=[tensorbord]"], "tensorbord"),
    ],
)
def test_errors_are_one_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    words = words if words[0].endswith(".yaml") else [*settings(data, tmp_path / "run"), *words]
    assert run_script("train_marian", words) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("package", ["accelerate", "datasets", "evaluate", "sacrebleu", "sentencepiece"])
def test_a_missing_package_is_named_with_its_remedy(data: Path, tmp_path: Path, package: str) -> None:
    """In a process of its own, in which nothing has imported the package yet."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{package!r}] = None")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(SCRIPT.parents[1])))}
    command = [sys.executable, str(SCRIPT), *settings(data, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: not installed: {package}; pip install 'attnpatch[train]' brings what it needs\n"
    assert not (tmp_path / "run").exists()


PLUGIN = """
from attnpatch import register_variant
from attnpatch.methods.base import StageVariant
from attnpatch.stages.score import SoftmaxScore

@register_variant
class Mine(StageVariant):
    name, stage, summary, paper = "mine", "score", "softmax again", "none"

    def build(self, options, site):
        return type("MineScore", (SoftmaxScore,), {})()
"""


@pytest.mark.parametrize("way", [["--plugin", "my_scores"], ["--plugin=my_scores"]])
def test_a_plugins_variant_is_trained(
    data: Path, tmp_path: Path, way: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnpatch import registry

    (tmp_path / "my_scores.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    registry.variants()
    monkeypatch.setattr(registry, "_variants", dict(registry._variants))
    words = settings(data, tmp_path / "run", "spec=mine", "training.max_steps=1", "output.quiet=true")
    assert run_script("train_marian", words) == 2
    assert "unknown variant 'mine'" in capsys.readouterr().err
    try:
        assert run_script("train_marian", [*way, *words]) == 0
    finally:
        sys.modules.pop("my_scores", None)
    assert "mine" in json.dumps(json.loads((tmp_path / "run" / "results.json").read_text())["spec"])
    for wrong, expected in (
        (["--plugin", "my_score"], "plugin 'my_score' cannot be imported"),
        (["--plugin"], "needs"),
    ):
        assert run_script("train_marian", [*words, *wrong]) == 2
        assert expected in capsys.readouterr().err


def test_an_unsupported_transformers_is_one_sentence(tmp_path: Path) -> None:
    fake = "real = metadata.version; metadata.version = lambda n: '4.40.0' if n == 'transformers' else real(n)"
    (tmp_path / "sitecustomize.py").write_text(f"from importlib import metadata; {fake}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(SCRIPT.parents[1])))}
    scripts = ("train_marian", "train_mlm", "train_sequences", "eval_value_aware", "demo")
    for script in (SCRIPT.with_name(f"{name}.py") for name in scripts):
        command = [sys.executable, str(script), "output.dir=x"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 2
        assert "4.40.0 is installed" in done.stderr
        assert done.stderr.count("\n") == 1


def test_help_and_interrupt(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script("train_marian", ["--help"], "usage text") == 0
    assert capsys.readouterr().out == "usage text\n"
    from attnpatch.experiments.translation import run as module

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "load_split", interrupted)
    assert run_script("train_marian", settings(data, tmp_path / "run")) == 130
    assert "resumes" in capsys.readouterr().err
