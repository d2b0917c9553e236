"""Means over seeds, and paired tests against the stock attention."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from attnpatch.reports.records import ReportError

TEST = "two-sided paired t-test over common seeds (scipy.stats.ttest_rel)"


@dataclass(frozen=True)
class Comparison:
    """Differences variant - stock over the seeds that both have; `better` counts those in the variant's favour.

    p is None, and `reason` says why, when no test is possible.
    """

    seeds: tuple[int, ...]
    mean: float
    deviation: float | None
    better: int
    t: float | None
    p: float | None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summary(values: Mapping[Any, float]) -> tuple[float, float | None, int]:
    """Mean, standard deviation (n - 1; None of one value) and number of the values."""
    numbers = list(values.values())
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return statistics.fmean(numbers), deviation, len(numbers)


def compare(variant: Mapping[int, float], stock: Mapping[int, float], higher_is_better: bool) -> Comparison | None:
    """Scores by seed of a variant against those of stock; None when they have no seed in common."""
    seeds = tuple(sorted(variant.keys() & stock.keys()))
    if not seeds:
        return None
    differences = [variant[seed] - stock[seed] for seed in seeds]
    mean, deviation, n = summary(dict(zip(seeds, differences, strict=True)))
    better = sum((d > 0) == higher_is_better and d != 0 for d in differences)
    if n == 1:
        return Comparison(seeds, mean, None, better, None, None, "no test is possible with one common seed")
    # Equal but for rounding: a test would find that certain.
    if deviation is None or deviation <= 1e-9 * max(abs(score) for s in seeds for score in (variant[s], stock[s])):
        return Comparison(seeds, mean, deviation, better, None, None, "no test: all differences are equal")
    try:
        from scipy.stats import ttest_rel
    except ImportError as error:
        raise ReportError("a paired test needs scipy: pip install 'attnpatch[train]'") from error
    test = ttest_rel([variant[seed] for seed in seeds], [stock[seed] for seed in seeds])
    return Comparison(seeds, mean, deviation, better, float(test.statistic), float(test.pvalue))
