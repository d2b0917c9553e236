"""results.json files of any experiment, read into runs that can be compared."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnpatch.errors import AttnpatchError, one_line
from attnpatch.experiments.value_aware import report as value_aware_report
from attnpatch.spec import AttentionSpec
from attnpatch.training.smoke import SUFFIX

HIGHER = ("accuracy", "f1", "matthews", "pearson", "spearman", "bleu", "chrf")
LOWER = ("perplexity", "loss", "output_error", "ece", "mmd")
SHOWN = {"bleu": "BLEU", "chrf": "chrF", "f1": "F1", "ece": "ECE", "mmd": "MMD"}
STOCK = "stock"
ORDER = ("translation", "mlm", "clm", "sequences", "value_aware", "classification")
"""Of the sections, paper by paper: neural, expressive, value-aware, alignment; what is not named comes after."""

# Settings that are not part of what is compared, or that are shown by other means.
_IGNORED_SECTIONS = ("spec", "specs", "init", "seed", "seeds", "output", "generation")
_IGNORED = {
    "data.dir",
    "data.about",
    "data.streaming",
    "training.resume",
    "training.log_every",
    "training.keep_checkpoints",
    "training.threads",
    "training.device",
    "training.precision",  # what it came to is shown
    "training.attention",
    "training.stop_after_minutes",
    "training.eval_batch_size",
    "training.save_every",
}
# What makes two scores of one name the same measurement.
_SIGNATURE = (
    "predicted_tokens",
    "sentences",
    "examples",
    "bleu_signature",
    "chrf_signature",
    "num_beams",
    "max_length",
)

# Of a grid's cell: what the grid's own table and figure show.
_SHOWN_CELL = ("spec", "seed", "bases", "delays", "chance", "accuracy", "parameters")


class ReportError(AttnpatchError, ValueError):
    """Results that are broken, or that must not be compared; the message names the files."""


@dataclass(frozen=True)
class Metric:
    """A score: the set it was measured on, its name, and which way is better."""

    test: str
    name: str

    @property
    def higher_is_better(self) -> bool:
        return self.name in HIGHER

    def __str__(self) -> str:
        return f"{self.test}: {SHOWN.get(self.name, self.name.replace('_', ' '))}"


@dataclass
class Run:
    """One trained model of one seed: where it stands, what it is, its scores."""

    path: str
    experiment: str
    variant: str
    seed: int | None
    parameters: int | None
    scores: dict[Metric, float]
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, list[str]] = field(default_factory=dict)  # split -> checksums
    signature: dict[str, Any] = field(default_factory=dict)  # test -> what must be equal
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # name -> (step, loss)
    environment: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, Path] = field(default_factory=dict)  # test -> BLEU's counts, sentence by sentence
    reliability: list[dict[str, Any]] = field(default_factory=list)  # of the dev set: bins of confidence
    details: Sequence[Mapping[str, Any]] = ()  # of a grid its cells, of a sweep the model: what is shown beside
    label: str = ""  # the variant with the settings in which it differs from most other runs

    @property
    def is_stock(self) -> bool:
        return self.variant == STOCK


def find_results(paths: Iterable[str | Path]) -> list[Path]:
    """The results files that are named, or that lie in the folders that are named.

    A run's own folders (the cells of a grid) are not searched; smoke runs beside others are passed over. Raises
    ReportError for a path without any.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise ReportError(f"no file or folder {path}; give results.json files or folders that hold them")
        every = sorted(path.rglob("results.json"))
        inside = [found for found in every if not _is_smoke(found.relative_to(path))] or every
        folders = {candidate.parent for candidate in inside}
        kept = [candidate for candidate in inside if not _is_cell(candidate, folders)]
        if not kept:
            raise ReportError(f"no results.json in the folder {path}: has its run ended?")
        found += kept
    return list(dict.fromkeys(found))


def _is_cell(path: Path, folders: set[Path]) -> bool:
    """Whether it is a part of a grid that has results of its own (RUN/cells/CELL/results.json)."""
    cells = path.parent.parent
    return cells.name == "cells" and cells.parent in folders


def _is_smoke(path: Path) -> bool:
    return any(name.endswith(SUFFIX) for name in path.parts[:-1])


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of all files. Raises ReportError that names every file that is broken, not only the first."""
    runs: list[Run] = []
    broken: list[str] = []
    for path in paths:
        try:
            runs += _read(path)
        except ReportError as error:
            broken.append(f"{path}: {error}")
    if broken:
        raise ReportError(f"{len(broken)} of {len(paths)} results files cannot be used: {'; '.join(broken)}")
    return runs


def _read(path: Path) -> list[Run]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"not valid JSON ({one_line(error)})") from error
    if not isinstance(data, dict):
        raise ReportError(f"a {type(data).__name__}, where an object belongs")
    if "experiment" not in data:
        if "cell" in data:
            raise ReportError("one cell of a grid that is not finished; run its script again")
        raise ReportError("it names no experiment, so no results of attnpatch")
    if (data.get("config") or {}).get("smoke"):
        raise ReportError("results of a smoke run (--smoke), which says that a run works and nothing about its method")
    try:
        runs = _RUNS.get(data["experiment"], _one_run)(path, data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, AttnpatchError):
            raise ReportError(str(error)) from error
        what = f"lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise ReportError(f"not as results of {data['experiment']!r} are ({what})") from error
    for run in runs:
        if not run.scores:
            raise ReportError("it has no scores")
        bad = [str(metric) for metric, value in run.scores.items() if not math.isfinite(value)]
        if bad:
            raise ReportError(f"its scores are not finite: {', '.join(bad)}")
    return runs


def _one_run(path: Path, data: Mapping[str, Any]) -> list[Run]:
    """A run of one model: translation, mlm, clm and whatever has `scores` of that shape."""
    config = data.get("config") or {}
    generation = config.get("generation") or {}
    scores: dict[Metric, float] = {}
    signature: dict[str, Any] = {}
    statistics: dict[str, Path] = {}
    for test, values in data["scores"].items():
        for name in (*HIGHER, *LOWER):
            if name not in values or (name == "loss" and "perplexity" in values):  # the same thing twice
                continue
            value = values[name]
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ReportError(f"its score {test}: {name} is {value!r}, no number")
            scores[Metric(test, name)] = float(value)
        signature[test] = {key: values[key] for key in _SIGNATURE if key in values}
        if "length_penalty" in generation:
            signature[test]["length_penalty"] = generation["length_penalty"]
        kept = path.parent / str(values.get("bleu_statistics", ""))
        if kept.is_file():
            statistics[test] = kept
    if data.get("tokenizer"):
        signature["tokenizer"] = data["tokenizer"]["sha256"]
    settings = _flat(config)
    settings["processes"] = data.get("processes", 1)  # each has a batch of its own
    if "precision" in data:
        settings["precision"] = data["precision"]
    weights = (data.get("pretrained") or {}).get("weights_sha256")
    if weights:  # the same checkpoint may lie elsewhere, and another one in its place
        settings["model.pretrained"] = ", ".join(value[:12] for value in weights)
    return [
        Run(
            str(path),
            data["experiment"],
            _variant(data["spec"], config),
            data["seed"],
            data["parameters"]["trainable"],
            scores,
            settings,
            _checksums(data["data"]),
            signature,
            _curves(data.get("dev", []), data.get("train", [])),
            _environment(data),
            statistics,
        )
    ]


def _sequence_runs(path: Path, data: Mapping[str, Any]) -> list[Run]:
    """A grid: one run for each spec and seed, its cells as its test sets."""
    config = data["config"]
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cell in data["cells"]:
        groups.setdefault((_variant(cell["spec"], {}), cell["seed"]), []).append(cell)
    runs = []
    for (variant, seed), cells in groups.items():
        scores = {Metric("mean of the grid", "accuracy"): statistics.fmean(c["accuracy"] for c in cells)}
        scores |= {Metric(cell["cell"], "accuracy"): float(cell["accuracy"]) for cell in cells}
        steps = [entry["step"] for entry in cells[0]["train"]]
        curve = []
        for i, step in enumerate(steps):
            if all(len(c["train"]) > i for c in cells):
                curve.append((float(step), statistics.fmean(c["train"][i]["loss"] for c in cells)))
        runs.append(
            Run(
                str(path),
                data["experiment"],
                variant,
                seed,
                max(cell["parameters"]["trainable"] for cell in cells),
                scores,
                {key: value for key, value in _flat(config).items() if key not in ("task.bases", "task.delays")},
                _checksums(data["data"]),
                {},
                {"training loss": curve} if curve else {},
                _environment(data),
                details=[{key: cell[key] for key in _SHOWN_CELL} for cell in cells],
            )
        )
    return runs


def _value_aware_runs(path: Path, data: Mapping[str, Any]) -> list[Run]:
    """Sparse evaluations of trained models: a run for each."""
    config = data.get("config") or {}
    runs = []
    for model in data["models"]:
        scores = {Metric("exact", "loss"): float(model["exact"]["loss"])}
        for row in model["rows"]:
            scores |= {
                Metric(f"{row['method']} r={row['r']}", key): float(row[key]) for key in ("output_error", "loss")
            }
        _ = model["head_dim"], model["exact"]["perplexity"], [row["perplexity"] for row in model["rows"]]
        variant = value_aware_report.variant(model)
        settings = {f"masking.{key}": value for key, value in config.get("masking", {}).items()}
        settings["swaps"] = config.get("swaps")
        signature = {"predicted_tokens": model["exact"]["predicted_tokens"]}
        signature |= {key: model[key] for key in ("tokenizer_sha256",) if key in model}
        signature["block_size"] = (config.get("data") or {}).get("block_size")
        runs.append(
            Run(
                str(path),
                f"value_aware {model['objective']}",
                STOCK if variant == "softmax" else variant,
                model.get("seed"),
                model["parameters"]["trainable"],
                scores,
                settings,
                _checksums(data["data"]),
                {"exact": signature},
                {},
                _environment(data),
                details=[model],
            )
        )
    return runs


def _classification_runs(path: Path, data: Mapping[str, Any]) -> list[Run]:
    """A run of one task, which is compared with runs of that task alone."""
    runs = _one_run(path, data)
    for run in runs:
        run.experiment = f"classification-{data['task']}"
        run.reliability = data["reliability"].get("dev", [])
        # Which task it is, and that its files are others, is in the experiment's name.
        run.settings.pop("task.name", None)
    return runs


def _conversions(path: Path, data: Mapping[str, Any]) -> list[Run]:
    """A pretrained checkpoint and what each conversion did to it; nothing is trained, so there is no seed."""
    source = data["source"]
    rows: list[tuple[str, Mapping[str, Any], float, int]] = [(STOCK, {"variant": "source", **source}, 0.0, 0)]
    rows += [(row["variant"], row, row["drift_max"], row["parameters_added"]) for row in data["variants"]]
    runs = []
    for variant, row, drift, added in rows:
        scores = {Metric("last hidden states", "drift"): float(drift)}
        if "spearman" in row:
            scores[Metric("STS-B dev", "spearman")] = float(row["spearman"])
        runs.append(
            Run(
                str(path),
                data["experiment"],
                variant,
                None,
                source["parameters"] + added,
                scores,
                data=_checksums(data["data"]),
                environment=_environment(data),
                details=[row],
            )
        )
    return runs


def _demo(path: Path, data: Mapping[str, Any]) -> list[Run]:
    raise ReportError("results of the demo, which has a report of its own and says nothing about methods")


_RUNS = {
    "conversion": _conversions,
    "classification": _classification_runs,
    "sequences": _sequence_runs,
    "value_aware": _value_aware_runs,
    "demo": _demo,
}


def _variant(spec: Any, config: Mapping[str, Any]) -> str:
    if spec in (None, STOCK):
        return STOCK
    # As it was asked for, when that is known: the resolved form names every default.
    asked = config.get("spec")
    name = str(AttentionSpec.parse(asked) if asked not in (None, STOCK) else AttentionSpec.parse(spec))
    init = config.get("init", "preserve")
    return name if init == "preserve" else f"{name} (init {init})"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if not prefix and key in _IGNORED_SECTIONS:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif name not in _IGNORED and not name.startswith(("data.train", "data.dev", "data.test")):
            flat[name] = value
    return flat


def _checksums(data: Mapping[str, Any]) -> dict[str, list[str]]:
    return {
        split: [file.get("text_sha256") or file["sha256"] for part in parts for file in part["files"]]
        for split, parts in data.items()
    }


def _curves(dev: Sequence[Any], train: Sequence[Any]) -> dict[str, list[tuple[float, float]]]:
    named = {"dev loss": dev, "training loss": train}
    curves = {
        name: [(float(e["step"]), float(e["loss"])) for e in entries if e.get("loss") is not None]
        for name, entries in named.items()
    }
    return {name: points for name, points in curves.items() if points}


def _environment(data: Mapping[str, Any]) -> dict[str, str]:
    about = data.get("machine", {})
    versions = data.get("versions", {})
    return {
        "processor": ", ".join(about.get("gpus") or ()) or str(about.get("cpu") or "unknown"),
        "precision": str(data.get("precision", "unknown")),
        "torch": str(versions.get("torch", "unknown")),
        "transformers": str(versions.get("transformers", "unknown")),
    }


def group(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by experiment, checked: the same data and measurement throughout, no seed of a variant twice.

    Runs of an experiment on other data, from another checkpoint, or measured otherwise, are a group of their own when
    they lie in another folder (FOLDER/RUN/results.json). In the same folder they are refused, or, from another
    checkpoint, variants of their own. Groups are in the papers' order, and named by the experiment, with the folders
    where there are several. Fills each run's `label`. Raises ReportError that names the files that do not belong
    together.
    """
    experiments: dict[str, list[Run]] = {}
    for run in runs:
        experiments.setdefault(run.experiment, []).append(run)
    groups: dict[str, list[Run]] = {}
    for name in sorted(experiments, key=_place):
        for title, members in _studies(name, experiments[name]).items():
            _check_same(title, members)
            _set_labels(members)
            _refuse_twins(title, members)
            groups[title] = members
    return groups


def _place(experiment: str) -> tuple[int, str]:
    first = re.split("[ -]", experiment)[0]
    return (ORDER.index(first) if first in ORDER else len(ORDER), experiment)


def _studies(name: str, members: Sequence[Run]) -> dict[str, list[Run]]:
    """What can be compared, by a title; runs of one folder always share a study."""
    studies: list[tuple[set[str], set[Path], list[Run]]] = []
    for run in members:
        key, folder = _measurement(run), Path(run.path).absolute().parent.parent
        mine = [study for study in studies if key in study[0] or folder in study[1]]
        joined = ({key}, {folder}, [run])
        for study in mine:
            studies.remove(study)
        studies.append(
            (
                joined[0].union(*(study[0] for study in mine)),
                joined[1].union(*(study[1] for study in mine)),
                [other for study in mine for other in study[2]] + [run],
            )
        )
    if len(studies) == 1:
        return {name: list(members)}
    titles = [f"{name} ({', '.join(sorted({folder.name for folder in study[1]}))})" for study in studies]
    if len(set(titles)) < len(titles):
        titles = [f"{name} ({', '.join(sorted(map(str, study[1])))})" for study in studies]
    return {title: study[2] for title, study in zip(titles, studies, strict=True)}


def _measurement(run: Run) -> str:
    # Training on from a checkpoint is another study than training from scratch.
    return json.dumps([run.data, run.signature, run.settings.get("model.pretrained")], sort_keys=True, default=str)


def _refuse_twins(name: str, members: Sequence[Run]) -> None:
    seen: dict[tuple[str, int | None], Run] = {}
    for run in members:
        other = seen.setdefault((run.label, run.seed), run)
        if other is not run:
            raise ReportError(
                f"{other.path} and {run.path} are both {name}, {run.label}, seed {run.seed}: leave one out"
            )


def _check_same(name: str, members: Sequence[Run]) -> None:
    splits = sorted({split for run in members for split in run.data})
    for split in splits:
        _refuse_unless_equal(
            members,
            lambda run, split=split: tuple(run.data.get(split, ())),
            f"{name}: the {split} data differ, so the scores must not be compared",
            "checksums",
        )
    for test in sorted({test for run in members for test in run.signature}):
        _refuse_unless_equal(
            members,
            lambda run, test=test: json.dumps(run.signature.get(test), sort_keys=True),
            f"{name}: {'the tokenizers differ' if test == 'tokenizer' else f'{test} was scored in different ways'}, "
            "so the scores must not be compared",
            "values",
        )


def _refuse_unless_equal(members: Sequence[Run], key: Any, message: str, what: str) -> None:
    kinds: dict[Any, list[str]] = {}
    for run in members:
        kinds.setdefault(key(run), []).append(run.path)
    if len(kinds) < 2:
        return
    listed = "; ".join(f"{', '.join(dict.fromkeys(paths))} ({what} {_short(kind)})" for kind, paths in kinds.items())
    raise ReportError(f"{message}: {listed}. Report them one by one, or keep each kind in a folder of its own")


def _short(kind: Any) -> str:
    return kind if isinstance(kind, str) else ", ".join(value[:12] for value in kind) or "none"


def _set_labels(members: Sequence[Run]) -> None:
    keys = sorted({key for run in members for key in run.settings})
    usual: dict[str, Any] = {}
    for key in keys:
        values = [json.dumps(run.settings[key], default=str) for run in members if key in run.settings]
        usual[key] = Counter(values).most_common(1)[0][0]
    for run in members:
        odd = [
            f"{key}={value}"
            for key, value in sorted(run.settings.items())
            if json.dumps(value, default=str) != usual[key]
        ]
        run.label = run.variant + (f" [{', '.join(odd)}]" if odd else "")


def metrics_of(members: Sequence[Run]) -> Iterator[Metric]:
    """Every metric that some run has, in the order of the files."""
    yield from dict.fromkeys(metric for run in members for metric in run.scores)
