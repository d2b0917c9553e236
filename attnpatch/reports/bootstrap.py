"""Paired bootstrap resampling over test sentences (Koehn 2004, W04-3250), by sacrebleu, from counts kept by runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attnpatch.experiments.translation.bleu_statistics import Rows, StoredBLEU, bleu_of, read_statistics
from attnpatch.reports.records import ReportError
from attnpatch.training.errors import DataError

SAMPLES = 1000
TEST = "paired bootstrap resampling over the test sentences (Koehn 2004; sacrebleu.significance.PairedTest)"


@dataclass(frozen=True)
class Bootstrap:
    """BLEU of a variant less that of its baseline, both of one seed, and how often chance alone gives as much."""

    seed: int | None
    difference: float
    p: float
    sentences: int
    samples: int
    random_seed: str  # of the resampling: sacrebleu's SACREBLEU_SEED


def load(path: str | Path, bleu: float) -> Rows:
    """A run's counts. Raises ReportError when they are broken, or do not give the run's `bleu`."""
    try:
        rows = read_statistics(path)
    except DataError as error:
        raise ReportError(str(error)) from error
    if not rows or abs(bleu_of(rows) - bleu) > 1e-3:
        found = f"{bleu_of(rows):.4f}" if rows else "no sentence"
        raise ReportError(f"{path} gives a BLEU of {found}, the results.json beside it has {bleu:.4f}: leave it out")
    return rows


def compare_systems(
    baseline: Rows, systems: Mapping[str, Rows], seed: int | None, samples: int = SAMPLES
) -> dict[str, Bootstrap]:
    """Each system against the baseline, on the same resamples.

    Raises ReportError when they are not of the same sentences, which the lengths of the references tell.
    """
    from sacrebleu.significance import PairedTest

    for name, rows in systems.items():
        if [row[1] for row in rows] != [row[1] for row in baseline]:
            raise ReportError(f"{name}, seed {seed}: its BLEU statistics are of other sentences than the baseline's")
    named = [("", baseline), *systems.items()]
    signatures, scores = PairedTest(named, {"BLEU": StoredBLEU()}, None, "bs", samples)()
    start, *results = scores["BLEU"]
    return {
        name: Bootstrap(
            seed,
            result.score - start.score,
            float(result.p_value),
            len(baseline),
            samples,
            str(signatures["BLEU"].info["seed"]),
        )
        for name, result in zip(systems, results, strict=True)
    }
