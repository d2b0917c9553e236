"""The whole of a classification run: data, model, training, GLUE's metrics, calibration, robustness, the MMD.

`run` is what scripts/train_classifier.py calls; it can be called from Python as well.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from attnpatch.experiments.classification.config import ClassificationConfig
from attnpatch.experiments.classification.data import Examples, load_adversarial, load_files, load_hub, sample
from attnpatch.experiments.classification.discrepancy import query_key_discrepancy
from attnpatch.experiments.classification.metrics import draw_reliability, probabilities, reliability, scores
from attnpatch.experiments.classification.model import build_classifier
from attnpatch.experiments.classification.predictions import write_predictions
from attnpatch.experiments.classification.tasks import TASKS, Task
from attnpatch.experiments.classification.trainer import ClassificationTrainer, Encoded, RowCollator, encode
from attnpatch.experiments.language_models.bpe import build_byte_level
from attnpatch.training.batching import SentenceBatchSampler
from attnpatch.training.checkpoints import checkpoints
from attnpatch.training.distribution import releases_folders
from attnpatch.training.errors import TrainingError
from attnpatch.training.files import read_json, sha256_lines
from attnpatch.training.modeling import checkpoint_identity
from attnpatch.training.results import count_parameters
from attnpatch.training.run_folder import FREE_TRAINING, identity, resume_point
from attnpatch.training.runs import (
    Run,
    build_trainer,
    given_tokenizer,
    start_run,
    tokens_of,
    train_and_score,
    training_arguments,
)
from attnpatch.training.tokenizers import load_fast_tokenizer

EXPERIMENT = "classification"
# Settings that do not change what is trained: they may differ when a run is resumed.
FREE_SETTINGS: dict[str, set[str] | None] = {
    "output": None,
    "discrepancy": None,
    "training": FREE_TRAINING | {"eval_batch_size"},
    "data": {"dir", "about", "adversarial", "adversarial_hub_id"},
}


@releases_folders
def run(config: ClassificationConfig) -> dict[str, Any]:
    """Trains and scores as `config` says, and returns what stands in results.json.

    Raises an AttnpatchError with one sentence for anything a person can mend.
    """
    run = start_run(config)
    task = TASKS[config.task.name]
    train, dev, adversarial = _data(config, task)
    checksums = [file["text_sha256"] for part in (train, dev) for file in part.files]
    pretrained = checkpoint_identity(config)
    known_as = identity(config, FREE_SETTINGS, checksums, pretrained)
    checkpoint = resume_point(config, run.out, known_as, run.state)
    finished = run.out / "results.json"
    if finished.is_file() and checkpoint is None and not (run.out / "model").is_dir():
        results = dict(read_json(finished))
        asked = config.as_dict()
        other = [key for key in ("data", "discrepancy") if _scored(asked[key]) != _scored(results["config"][key])]
        if other:
            raise TrainingError(
                f"{run.out} is finished, with other {' and '.join(other)} settings, and its weights were not kept: "
                "what these settings ask for cannot be measured any more; choose another output.dir"
            )
        run.say(f"this run is finished, and its weights were not kept: {finished}")
        return results
    with run.state.main_process_first():
        tokenizer = _tokenizer(config, train, run.out)
    sets = {
        name: encode(part, tokenizer, config.task.max_length)
        for name, part in {"train": train, "dev": dev, "AdvGLUE": adversarial}.items()
        if part is not None
    }
    run.say(
        f"{task.name}: "
        + ", ".join(f"{len(data):,} {name} examples" for name, data in sets.items())
        + f"; {np.mean(sets['train'].lengths):.1f} tokens on average, {sum(data.cut for data in sets.values())} cut at "
        f"{config.task.max_length}"
    )

    from transformers import set_seed

    set_seed(config.seed)
    model = build_classifier(config, task, tokenizer)
    trainer = _trainer(run, task, model, tokenizer, sets["train"], sets["dev"])
    run.say(
        f"model: {type(model).__name__}, {count_parameters(model)['trainable']:,} trainable parameters, spec "
        f"{config.spec or 'stock'}, precision {'bf16' if trainer.args.bf16 else 'fp32'}; "
        f"{len(trainer.train_sampler)} batches an epoch over {run.state.num_processes} process(es)"
    )
    before = _discrepancy(config, trainer, sets["dev"])
    # Filled while the sets are scored, which is after `describe`.
    diagrams: dict[str, Any] = {}
    discrepancy = {"before": before, "after": before}

    def score(name: str, data: Encoded) -> tuple[dict[str, Any], str]:
        outputs = trainer.outputs(data)
        found: dict[str, Any] = scores(task, outputs, data.labels)
        if not task.is_regression:
            diagrams[name] = reliability(probabilities(outputs), data.labels)
        after = _discrepancy(config, trainer, data) if name == "dev" else None
        if after is not None:
            discrepancy["after"] = after
            found["mmd"] = after["mean"]
        if run.state.is_main_process:
            write_predictions(run.out / f"{name}.predictions.tsv", task, data.examples, outputs)
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
        return found | {"examples": len(data)}, f"{name}: {numbers} over {len(data):,} examples"

    def describe() -> dict[str, Any]:
        found = _describe(task, trainer, tokenizer, sets)
        return found | {"pretrained": pretrained, "reliability": diagrams, "mmd": discrepancy}

    tests = [(name, data) for name, data in sets.items() if name != "train"]
    results = train_and_score(run, trainer, checkpoint, EXPERIMENT, describe, tests, score)
    if run.state.is_main_process:
        if diagrams:
            title = f"{task.name}, {config.spec or 'stock'}, seed {config.seed}"
            draw_reliability(diagrams, run.out / "reliability", title)
        if not config.output.keep_weights:
            for path in [*checkpoints(run.out), run.out / "model"]:
                shutil.rmtree(path)
    run.state.wait_for_everyone()
    return results


def _scored(section: dict[str, Any]) -> dict[str, Any]:
    """Settings that say what is measured, and not where it lies."""
    return {key: value for key, value in section.items() if key not in ("dir", "about")}


# ---- data and tokens ----


def _data(config: ClassificationConfig, task: Task) -> tuple[Examples, Examples, Examples | None]:
    """The training, dev and adversarial sets; None where the task has no adversarial one."""
    data = config.data
    adversarial = None
    if data.hub_id is not None:
        train = load_hub(task, data.hub_id, task.name, data.hub_revision, "train")
        dev = load_hub(task, data.hub_id, task.name, data.hub_revision, "validation")
    else:
        train = load_files(task, data.dir, data.train or task.train, "train", data.about)
        dev = load_files(task, data.dir, data.dev or task.dev, "dev", data.about)
    if task.adversarial is not None and data.adversarial_hub_id is not None:
        adversarial = load_hub(task, data.adversarial_hub_id, f"adv_{task.adversarial}", None, "validation")
    elif task.adversarial is not None and data.adversarial is not None:
        adversarial = load_adversarial(task, Path(data.dir) / data.adversarial, data.about)
    return train.subset(config.task.max_train_examples), dev.subset(config.task.max_dev_examples), adversarial


def _tokenizer(config: ClassificationConfig, train: Examples, out: Path) -> Any:
    given = given_tokenizer(config, load_fast_tokenizer)
    if given is not None:
        return given
    lines = [text for texts in train.texts for text in texts]
    return build_byte_level(config.tokenizer, lines, out / "tokenizer", config.task.max_length)


def _trainer(run: Run, task: Task, model: Any, tokenizer: Any, train: Encoded, dev: Encoded) -> ClassificationTrainer:
    from transformers import TrainingArguments

    config: ClassificationConfig = run.config
    args = training_arguments(TrainingArguments, config)
    sampler = SentenceBatchSampler(train.lengths, config.training.batch_size, config.seed, args.world_size)
    trainer: ClassificationTrainer = build_trainer(
        ClassificationTrainer,
        config,
        args,
        model,
        sampler,
        run.started,
        train_dataset=train,
        eval_dataset=dev,
        processing_class=tokenizer,
        collator=RowCollator(train, tokenizer),
        eval_batch_size=config.training.eval_batch_size,
        task=task,
    )
    return trainer


# ---- measures and results ----


def _discrepancy(config: ClassificationConfig, trainer: ClassificationTrainer, dev: Encoded) -> dict[str, Any] | None:
    """The MMD of keys and queries on the same part of the dev set, in float32; None when it is not asked for."""
    if not config.discrepancy.examples:
        return None
    rows = sample(len(dev), config.discrepancy.examples)
    part = Encoded(dev.examples, [dev.tokens[row] for row in rows], 0)
    with trainer.evaluating() as model:
        # Small batches: a problem has (2 T)^2 distances for each head, and few of them fit into a cache.
        return query_key_discrepancy(model, trainer.batches(part, size=4), config.discrepancy.bandwidth)


def _describe(task: Task, trainer: ClassificationTrainer, tokenizer: Any, sets: dict[str, Encoded]) -> dict[str, Any]:
    read, examples, seconds = tokens_of(trainer)
    return {
        "task": task.name,
        "tokens": {
            "read": read,
            "examples": examples,
            "read_per_second": round(read / seconds, 1),
            "counted": "tokens without padding, of all processes over train_seconds",
        },
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "vocabulary": len(tokenizer),
            "sha256": sha256_lines([tokenizer.backend_tokenizer.to_str()]),
        },
        "data": {
            name: [{"name": data.examples.name, "examples": len(data), "cut": data.cut, "files": data.examples.files}]
            for name, data in sets.items()
        },
    }
