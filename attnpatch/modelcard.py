"""The README.md that a converted checkpoint gets: what it is, what changed, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from attnpatch.checkpoint_files import CARD
from attnpatch.environment import LIBRARIES, versions
from attnpatch.patch_report import PatchReport
from attnpatch.probes import Drift
from attnpatch.registry import variants as registered

_KEPT = ("language", "license", "license_name", "license_link", "library_name", "pipeline_tag", "datasets")


def read_front_matter(folder: Path) -> dict[str, Any]:
    """The YAML at the head of a checkpoint's README.md; empty where there is none that can be read."""
    path = folder / CARD
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    head, found, _ = text[4:].partition("\n---")
    try:
        data = yaml.safe_load(head) if found else None
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def model_card(
    source: str,
    source_card: Mapping[str, Any],
    spec: str,
    report: PatchReport,
    drift: Drift,
    model_class: str,
    dtype: str,
    seed: int,
) -> str:
    """The text of the card.

    Args:
        source: name of the checkpoint that was converted. source_card: the YAML of its own card.
        spec: the resolved spec in words. report, drift: what the conversion did and changed.
        model_class, dtype, seed: as in `ConvertReport`.
    """
    names = list(dict.fromkeys(change.variant for change in report.changes))
    head: dict[str, Any] = {key: source_card[key] for key in _KEPT if key in source_card}
    head["base_model"] = source
    tags = source_card.get("tags")
    head["tags"] = list(dict.fromkeys([*(tags if isinstance(tags, list) else []), "attnpatch", *names]))
    known = registered()
    share = 100 * report.parameters_added / max(report.parameters_before, 1)
    rows = [
        ("source", f"`{source}`"),
        ("spec", f"`{spec}`"),
        ("initialisation of new parameters", f"`{report.init}`, seed {seed}"),
        ("same function as the source", "yes, up to rounding" if report.exact else "no: fine-tune it before use"),
        ("drift of the outputs", f"max {drift.max:.2e}, mean {drift.mean:.2e} (float32, random padded tokens)"),
        ("parameters", f"{report.parameters_before:,} {report.parameters_added:+,} ({share:+.1f} %)"),
        ("weights", dtype),
        ("written by", ", ".join(f"{name} {version}" for name, version in versions(LIBRARIES).items())),
    ]
    methods = [f"- `{name}`: {known[name].summary} ({known[name].paper})" for name in names if name in known]
    auto = _auto_class(model_class)
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {source} with `{'+'.join(names)}` attention",
        "",
        f"This is `{source}` with its attention changed by attnpatch. All weights that the spec does not replace "
        "are the source's, byte for byte.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "## Methods",
        "",
        *methods,
        "",
        *(f"Note: {note}\n" for note in report.notes),
        "## How to load it",
        "",
        "```python",
        "import attnpatch  # teaches transformers the changed attention; without it, loading stops with an error",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("path/to/this/checkpoint")',
        "```",
        "",
        "`attnpatch inspect` lists what is patched, `attnpatch verify` checks it, and `attnpatch revert` gives the "
        "stock checkpoint back.",
        "",
    ]
    return "\n".join(lines)


def _auto_class(model_class: str) -> str:
    """The Auto class that loads a class, or the class itself where none does."""
    for ending, auto in (
        ("ForMaskedLM", "AutoModelForMaskedLM"),
        ("ForPreTraining", "AutoModelForPreTraining"),
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
        ("MTModel", "AutoModelForSeq2SeqLM"),
        ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ForTokenClassification", "AutoModelForTokenClassification"),
        ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("ForMultipleChoice", "AutoModelForMultipleChoice"),
        ("ForNextSentencePrediction", "AutoModelForNextSentencePrediction"),
    ):
        if model_class.endswith(ending):
            return auto
    return "AutoModel" if model_class.endswith("Model") else model_class
