"""The NT tasks and the grid over them: fresh random tasks, tiny models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from run_script import run_script

from attnpatch.experiments.sequences.config import CellConfig, SequencesConfig
from attnpatch.experiments.sequences.grid import Cell
from attnpatch.experiments.sequences.model import build_decoder
from attnpatch.experiments.sequences.run import eval_sets, run
from attnpatch.experiments.sequences.tasks import batch_of, ceiling, nt_sequences, scored_labels
from attnpatch.training.batching import IGNORE
from attnpatch.training.config import load_config
from attnpatch.training.errors import ConfigError, RunPaused, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TINY = [
    "model.hidden_size=16",
    "model.layers=1",
    "model.ffn_dim=16",
    "task.length=12",
    "task.eval_sequences=20",
    "task.bases=[3]",
    "task.delays=[2]",
    "training.max_steps=4",
    "training.batch_size=8",
    "training.schedule=constant",
    "training.log_every=1",
    "training.threads=1",
    "training.device=cpu",
    "training.precision=fp32",
    "training.evaluate_every=never",
    "training.save_every=never",
    "training.final=last",
    "output.quiet=true",
]


def configured(out: Path, *more: str) -> SequencesConfig:
    return load_config(SequencesConfig, None, [*TINY, f"output.dir={out}", *more])


def random_task() -> tuple[int, int]:
    return random.randint(2, 9), random.randint(1, 6)


# ---- the tasks ----


def test_sequences_follow_the_rule() -> None:
    base, delay = random_task()
    x = nt_sequences(base, delay, 40, 200, 0.0, torch.Generator().manual_seed(random.randrange(999))).tolist()
    for row in x:
        for t in range(delay, 40):
            assert row[t] == (row[t - 1] + row[t - delay]) % base
    assert {symbol for row in x for symbol in row} == set(range(base))
    assert len({tuple(row[:delay]) for row in x}) > min(base**delay, 50) / 2  # random initial conditions


def test_base_two_is_exclusive_or() -> None:
    x = nt_sequences(2, 3, 20, 10, 0.0, torch.Generator())
    assert torch.equal(x[:, 3:], x[:, 2:-1] ^ x[:, :-3])


def test_noise_flips_as_often_as_it_says_and_stays_in_the_history() -> None:
    base, delay = random_task()
    noise = random.uniform(0.05, 0.4)
    x = nt_sequences(base, delay, 200, 100, noise, torch.Generator().manual_seed(random.randrange(999)))
    predicted = (x[:, delay - 1 : -1] + x[:, :-delay]) % base
    right = (predicted == x[:, delay:]).float().mean().item()
    assert right == pytest.approx(1 - noise, abs=0.02)
    wrong = (x[:, delay:] - predicted)[predicted != x[:, delay:]] % base
    counts = torch.bincount(wrong, minlength=base)[1:].float()
    assert (counts / counts.sum() - 1 / (base - 1)).abs().max() < 0.05
    assert ceiling(base, noise) == max(1 - noise, noise / (base - 1))


def test_a_mixture_holds_all_its_tasks_and_labels_are_the_next_symbols() -> None:
    cell = Cell((2, 5), (1, 3))
    batch = batch_of(cell, 30, 400, 0.0, torch.Generator().manual_seed(random.randrange(999)))
    ids, labels = batch["input_ids"], batch["labels"]
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    whole = torch.cat([ids[:, :1], labels], 1)
    nonzero = whole[whole.any(1)]  # all zeros fit every task
    fits = {
        (base, delay): [
            bool(row.max() < base and torch.equal(row[delay:], (row[delay - 1 : -1] + row[:-delay]) % base))
            for row in nonzero
        ]
        for base, delay in cell.tasks
    }
    assert all(map(any, zip(*fits.values(), strict=True)))
    for (base, delay), found in fits.items():
        share = (1 - base**-delay) / len(cell.tasks)  # a task's rows start at random, and at zeros stay there
        assert abs(sum(found) - 400 * share) < 6 * (400 * share * (1 - share)) ** 0.5
    scored = scored_labels(labels, cell)
    assert (scored[:, : 2 * 3 - 1] == IGNORE).all()
    assert torch.equal(scored[:, 5:], whole[:, 6:])


@pytest.mark.parametrize("spec", ["stock", "expressive", "expressive+query_value"])
def test_the_decoder_sees_no_later_symbol(tmp_path: Path, spec: str) -> None:
    config = configured(tmp_path)
    own = CellConfig(spec=spec, training=config.training)
    model = build_decoder(config, own, Cell((5,), (2,))).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that attention matters
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ids = torch.randint(5, (3, 12))
    at = random.randint(1, 10)
    other = ids.clone()
    other[:, at + 1 :] = (other[:, at + 1 :] + 1) % 5
    one, two = model(input_ids=ids).logits, model(input_ids=other).logits
    torch.testing.assert_close(one[:, : at + 1], two[:, : at + 1], atol=0, rtol=0)
    assert (one[:, at + 1 :] - two[:, at + 1 :]).abs().max() > 1e-3
    earlier = ids.clone()
    earlier[:, 0] = (earlier[:, 0] + 1) % 5
    assert (model(input_ids=earlier).logits[:, -1] - one[:, -1]).abs().max() > 1e-6  # and every earlier one


def test_specs_have_equal_parameters_and_the_same_test_set(tmp_path: Path) -> None:
    config = configured(tmp_path)
    cell = Cell((4,), (2,))
    counts = []
    for spec in (None, {"expressive": {"scale": 1.0}}):
        own = CellConfig(spec=spec, training=config.training)
        counts.append(sum(p.numel() for p in build_decoder(config, own, cell).parameters()))
    assert counts[0] == counts[1]
    one, two = eval_sets(config, cell), eval_sets(config, cell)
    assert all(torch.equal(one[name][key], two[name][key]) for name in one for key in one[name])


# ---- runs ----


def test_a_small_model_learns_a_small_task(tmp_path: Path) -> None:
    more = ("training.max_steps=150", "training.learning_rate=0.01", "model.init_std=0.2", "training.batch_size=32")
    results = run(configured(tmp_path, *more, "task.bases=[2]", "task.delays=[2]", "specs=[stock]"))
    assert results["cells"][0]["accuracy"] > 0.9
    assert results["cells"][0]["loss"] < 0.5


def test_grid_and_its_extension(tmp_path: Path) -> None:
    more = ("task.bases=[2,[2,3]]", "task.delays=[2,3]", "training.evaluate_every=2")
    results = run(configured(tmp_path, *more))
    assert results == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    records = results["cells"]
    assert len(records) == 2 * 2 * 2
    assert results["specs"] == ["stock", "expressive(scale=1.0)"]
    for record in records:
        tasks = [(b, d) for b in record["bases"] for d in record["delays"]]
        assert record["accuracy"] == pytest.approx(sum(record["accuracy_by_task"].values()) / len(tasks))
        assert record["initial_conditions"] == [b**d for b, d in tasks]
        assert [entry["step"] for entry in record["dev"]] == [2, 4]
        assert record["dev"][-1]["accuracy"] == record["accuracy"]
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "accuracy.svg").read_text(encoding="utf-8")
    assert not list(tmp_path.rglob("checkpoint-*"))
    # More seeds: the cells that are there stay as they are.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/results.json")}
    more_results = run(configured(tmp_path, *more, "seeds=[1,2]"))
    assert len(more_results["cells"]) == 16
    assert all(path.stat().st_mtime_ns == at for path, at in times.items())
    with pytest.raises(TrainingError, match=r"training\.learning_rate"):
        run(configured(tmp_path, *more, "training.learning_rate=0.5"))


def test_results_say_the_precision_that_was_used(tmp_path: Path) -> None:
    from attnpatch.environment import cpu_has_bf16

    used = run(configured(tmp_path, "training.precision=auto"))["precision"]
    assert used == ("bf16 autocast" if cpu_has_bf16() else "fp32")


@pytest.mark.parametrize("how", ["paused", "stopped"])
def test_resume_is_exact(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpatch.training.run_trainer import RunTrainer

    more = ("training.save_every=2", "training.max_steps=5", "task.noise=0.1")
    whole = run(configured(tmp_path / "whole", *more))
    part = tmp_path / "part"
    if how == "paused":
        with pytest.raises(RunPaused, match="paused at step 1 of 5"):
            run(configured(part, *more, "training.stop_after_minutes=0"))
        assert not (part / "results.json").exists()
    else:
        save = RunTrainer._save_checkpoint

        def save_then_stop(self: Any, model: Any, trial: Any) -> None:
            save(self, model, trial)
            if self.state.global_step == 4:
                raise KeyboardInterrupt

        monkeypatch.setattr(RunTrainer, "_save_checkpoint", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            run(configured(part, *more))
        monkeypatch.undo()
    again = run(configured(part, *more))
    assert again["cells"][0]["resumed_at"] == ([1] if how == "paused" else [4])
    for one, two in zip(whole["cells"], again["cells"], strict=True):
        assert (one["accuracy"], one["loss"]) == (two["accuracy"], two["loss"])
        assert [e["loss"] for e in one["train"]] == [e["loss"] for e in two["train"]]


def test_errors_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*words: str) -> str:
        assert run_script("train_sequences", [*TINY, f"output.dir={tmp_path}", *words]) == 2
        return capsys.readouterr().err

    assert "did you mean 'task.delays'" in fails("task.delay=[2]")
    assert "too short for the delay 9" in fails("task.delays=[9]")
    assert "task.delays has 1: a whole number of at least 2" in fails("task.delays=[1]")
    assert "whole number of at least 2" in fails("task.bases=[1]")
    assert "names each number once" in fails("task.bases=[[2,2]]")
    for words in (["task.bases=[2,3,2]"], ["task.delays=[2,[2,3],[3,2]]"], ["seeds=[1,1]"], ["specs=[stock,stock]"]):
        message = fails(*words)
        assert f"{words[0].partition('=')[0]} has an item twice" in message
    assert "did you mean 'expressive'" in fails("specs=[expresive]")
    assert "max_steps" in fails("training.max_steps=null")


@pytest.mark.parametrize("name", ["nt-cpu", "nt-gpu", "nt-paper"])
def test_configs_load(name: str) -> None:
    config = load_config(SequencesConfig, CONFIGS / f"{name}.yaml")
    assert len(config.cells()) >= 9
    with pytest.raises(ConfigError, match="task"):
        load_config(SequencesConfig, CONFIGS / f"{name}.yaml", ["task.length=4"])
