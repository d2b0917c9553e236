"""Softmax against expressive attention on the NT tasks: small decoders over a grid of bases and delays.

`run` is what scripts/train_sequences.py calls; it can be called from Python as well.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from attnpatch.atomic import write_json
from attnpatch.environment import machine, versions
from attnpatch.experiments.sequences.config import CellConfig, SequencesConfig
from attnpatch.experiments.sequences.grid import Cell
from attnpatch.experiments.sequences.model import build_decoder
from attnpatch.experiments.sequences.report import by_spec, draw
from attnpatch.experiments.sequences.tasks import batch_of, ceiling, nt_sequences, scored_labels
from attnpatch.experiments.sequences.trainer import SequenceTrainer
from attnpatch.spec import AttentionSpec
from attnpatch.training.batching import SentenceBatchSampler, generator_for
from attnpatch.training.distribution import check_alone, hold, releases_folders
from attnpatch.training.errors import RunPaused
from attnpatch.training.files import read_json, sha256_lines
from attnpatch.training.results import count_parameters, write_results
from attnpatch.training.run_config import OutputConfig
from attnpatch.training.run_folder import FREE_TRAINING, RUN_FILE, claim, identity, may_go_on, resume_point
from attnpatch.training.runs import (
    Say,
    build_trainer,
    describe_run,
    final_weights,
    process_state,
    speaker,
    start_run,
    training_arguments,
)
from attnpatch.training.runs import train as run_training

# The grid may be extended; what a cell computes may not change. A cell's own part of it is in its folder's name.
FREE_SETTINGS: dict[str, set[str] | None] = {
    "specs": None,
    "seeds": None,
    "output": None,
    "training": FREE_TRAINING,
    "task": {"bases", "delays"},
}


class _Rows(Dataset[int]):
    """Row numbers: a sequence is made when its batch is."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> int:
        return row


@releases_folders
def run(config: SequencesConfig) -> dict[str, Any]:
    """Trains every spec and seed at every cell, and returns what stands in results.json.

    A cell that is finished is not trained again. Raises an AttnpatchError with one sentence for anything a person can
    mend, RunPaused among them.
    """
    check_alone("these models are too small to be shared out")
    run = start_run(config)
    started, out, say = run.started, run.out, run.say
    specs = config.parsed_specs()
    _claim(config, out)
    jobs = [(seed, cell, spec) for seed in config.seeds for cell in config.cells() for spec in specs]
    records = []
    limit = config.training.stop_after_minutes
    worked = False  # however short the limit, each process gets on by a step
    for number, (seed, cell, spec) in enumerate(jobs, 1):
        done = _results_of(out, seed, cell, spec)
        if not done.is_file():
            if worked and limit is not None and time.perf_counter() - started >= 60 * limit:
                raise RunPaused(f"paused after {number - 1} of {len(jobs)}; the same command goes on from there")
            _job(config, seed, cell, spec, done, started)
            worked = True
        record = dict(read_json(done))
        records.append(record)
        say(
            f"{number}/{len(jobs)} {cell.name} seed {seed} {spec}: accuracy {record['accuracy']:.4f} "
            f"(chance {record['chance']:.3f}, ceiling {record['ceiling']:.3f}), {record['parameters']['trainable']:,} "
            f"parameters, {record['seconds']['train']:.1f} s"
        )
    results = _describe(config, specs, records)
    draw(by_spec(records), out / "accuracy")
    say(f"results: {write_results(out, results)}")
    return results


def _claim(config: SequencesConfig, out: Path) -> None:
    """Refuses a folder that holds another study; makes an empty one for `resume: never`."""
    hold(out)
    known_as = identity(config, FREE_SETTINGS, [])
    if not may_go_on(config, out, known_as, holds=(out / RUN_FILE).is_file()):
        shutil.rmtree(out / "cells", ignore_errors=True)
        for old in ("results.json", "accuracy.png", "accuracy.svg"):
            (out / old).unlink(missing_ok=True)
    claim(out, known_as)


def _results_of(out: Path, seed: int, cell: Cell, spec: AttentionSpec) -> Path:
    digest = sha256_lines([repr(spec.to_dict()["rules"])])[:8]
    return out / "cells" / f"{cell.name}-{digest}-seed{seed}" / "results.json"


def _job(config: SequencesConfig, seed: int, cell: Cell, spec: AttentionSpec, done: Path, started: float) -> None:
    """Trains and scores one model; its record goes to the file `done`."""
    folder = done.parent
    own = CellConfig(
        spec=spec if spec else None,
        seed=seed,
        training=dataclasses.replace(config.training, resume="auto"),
        output=OutputConfig(dir=str(folder), quiet=True),
    )
    from transformers import set_seed

    set_seed(seed)
    model = build_decoder(config, own, cell)
    checkpoint = resume_point(own, folder, {}, process_state(config.training))
    trainer = _trainer(config, own, model, cell, started)
    quiet: Say = speaker(True, True)
    trained = run_training(trainer, checkpoint, quiet)
    final_weights(own.training, trainer, folder, trained, quiet)
    described = describe_run("sequences", own, trainer, count_parameters(model), [], started)
    record = {
        key: described[key]
        for key in ("seed", "parameters", "steps", "train", "dev", "resumed_at", "seconds", "precision")
    }
    record |= {
        "spec": spec.to_dict() if spec else "stock",
        "bases": list(cell.bases),
        "delays": list(cell.delays),
        "cell": cell.name,
        "scored_from": cell.scored_from,
        "initial_conditions": [base**delay for base, delay in cell.tasks],
        "chance": statistics.fmean(1 / base for base, _ in cell.tasks),
        "ceiling": statistics.fmean(ceiling(base, config.task.noise) for base, _ in cell.tasks),
        "eval_sha256": _checksum(trainer.eval_sets),
        **trainer.score(),
    }
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    write_json(done, record, default=str)


def eval_sets(config: SequencesConfig, cell: Cell) -> dict[str, dict[str, torch.Tensor]]:
    """For each task of the cell its test sequences: the same for every spec and seed."""
    sets = {}
    for base, delay in cell.tasks:
        generator = generator_for(config.task.eval_seed, -1, base, delay)
        x = nt_sequences(base, delay, config.task.length + 1, config.task.eval_sequences, config.task.noise, generator)
        labels = scored_labels(x[:, 1:], cell)
        sets[f"N{base}-tau{delay}"] = {"input_ids": x[:, :-1], "labels": labels}
    return sets


def _trainer(config: SequencesConfig, own: CellConfig, model: Any, cell: Cell, started: float) -> SequenceTrainer:
    from transformers import TrainingArguments

    training, task = own.training, config.task
    count = int(training.max_steps or 0) * training.batch_size * training.gradient_accumulation
    args = training_arguments(TrainingArguments, own)
    sampler = SentenceBatchSampler([task.length] * count, training.batch_size, own.seed, group=False)

    def collate(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        # By seed and rows alone: every spec sees the same sequences, and so does a run that was resumed.
        batch = batch_of(cell, task.length, len(rows), task.noise, generator_for(own.seed, *rows))
        return batch | {"rows": torch.tensor(list(rows))}

    return build_trainer(
        SequenceTrainer,
        own,
        args,
        model,
        sampler,
        started,
        train_dataset=_Rows(count),
        eval_dataset=_Rows(task.eval_sequences),
        collator=collate,
        cell=cell,
        eval_sets=eval_sets(config, cell),
    )


def _checksum(sets: dict[str, dict[str, torch.Tensor]]) -> str:
    return sha256_lines(repr(data[key].tolist()) for data in sets.values() for key in sorted(data))


def _describe(config: SequencesConfig, specs: Sequence[AttentionSpec], records: list[dict[str, Any]]) -> dict[str, Any]:
    tests = {record["cell"]: record["eval_sha256"] for record in records}
    # What each cell computed in; one that another version left does not say.
    used = {record.get("precision", config.training.precision) for record in records}
    return {
        "experiment": "sequences",
        "specs": [str(spec) for spec in specs],
        "seeds": config.seeds,
        "cells": records,
        "precision": ", ".join(sorted(used)),
        "versions": versions(),
        "machine": machine(),
        "data": {
            "test": [
                {"name": name, "files": [{"path": "generated", "sha256": digest}]} for name, digest in tests.items()
            ]
        },
        "config": config.as_dict(),
    }
