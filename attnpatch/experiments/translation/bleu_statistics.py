"""BLEU's sufficient statistics, sentence by sentence: numbers that a small file can hold where the texts may not lie.

They give BLEU of any selection of sentences, and so the paired bootstrap of `reports.bootstrap`.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU

from attnpatch.atomic import write_bytes
from attnpatch.errors import one_line
from attnpatch.training.errors import DataError

ORDERS = 4
COLUMNS = (
    "hypothesis_length",
    "reference_length",
    *(f"correct_{n}" for n in range(1, ORDERS + 1)),
    *(f"total_{n}" for n in range(1, ORDERS + 1)),
)
"""Tokens of both sides; n-grams of the hypothesis that the reference has, and all. The order is sacrebleu's."""

Rows = list[list[int]]


class StoredBLEU(BLEU):
    """sacrebleu's BLEU (smoothing exp) that takes rows of counts for sentences, where there are no references."""

    def __init__(self) -> None:
        super().__init__(max_ngram_order=ORDERS)
        self.num_refs = 1  # else known once texts were counted, and asked for by the signature

    def _extract_corpus_statistics(self, hypotheses: Any, references: Any) -> Any:
        return hypotheses if references is None else super()._extract_corpus_statistics(hypotheses, references)


def bleu_statistics(
    hypotheses: Sequence[str], references: Sequence[str], lowercase: bool = False, tokenize: str = "13a"
) -> Rows:
    """One row of `COLUMNS` for each sentence, counted by sacrebleu."""
    metric = BLEU(lowercase=lowercase, tokenize=tokenize, max_ngram_order=ORDERS)
    return [[int(n) for n in row] for row in metric._extract_corpus_statistics(list(hypotheses), [list(references)])]


def bleu_of(rows: Rows) -> float:
    """Corpus BLEU (smoothing exp), as sacrebleu computes it from the texts."""
    return float(StoredBLEU()._aggregate_and_compute(rows).score)


def write_statistics(path: str | Path, rows: Rows) -> None:
    """Gzipped text, a header and a line for each sentence; the same bytes for the same rows."""
    lines = ["\t".join(COLUMNS), *("\t".join(map(str, row)) for row in rows)]
    write_bytes(path, gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def read_statistics(path: str | Path) -> Rows:
    """What `write_statistics` wrote. Raises DataError, which names the file, for anything else."""
    path = Path(path)
    try:
        header, *lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
        if tuple(header.split("\t")) != COLUMNS:
            raise ValueError(f"its columns are {header[:80]!r}")
        rows = [[int(value) for value in line.split("\t")] for line in lines]
        odd = next((i for i, row in enumerate(rows) if len(row) != len(COLUMNS) or min(row) < 0), None)
        if odd is not None:
            raise ValueError(f"line {odd + 2} is no row of {len(COLUMNS)} counts")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} holds no BLEU statistics of sentences ({one_line(error)})") from error
    return rows
