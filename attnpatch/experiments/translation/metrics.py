"""BLEU and chrF as `evaluate` metrics over the sacrebleu library. `evaluate.load` would fetch their code from a hub;
these classes need no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

_FEATURES = [
    datasets.Features({"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}),
    datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}),
]


class _SacrebleuMetric(evaluate.Metric):
    """Corpus scores of sentences: `predictions` are strings, `references` strings or lists of equally many strings."""

    _citation = "Post 2018, A Call for Clarity in Reporting BLEU Scores (W18-6319)"
    _name = ""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", True)  # no cache file that parallel runs could share
        super().__init__(config_name="default", **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=f"{self._name}, computed by sacrebleu",
            citation=self._citation,
            inputs_description="predictions: list of str; references: list of str or of lists of str",
            features=_FEATURES,
        )

    def _streams(self, references: Sequence[Any]) -> list[list[str]]:
        rows = [[row] if isinstance(row, str) else list(row) for row in references]
        if len({len(row) for row in rows}) != 1:
            raise ValueError("every prediction must have the same number of references")
        return [list(stream) for stream in zip(*rows, strict=True)]


class Bleu(_SacrebleuMetric):
    """BLEU with sacrebleu's signature. `lowercase` is `sacrebleu -lc`."""

    _name = "BLEU"

    def _compute(
        self, predictions: list[str], references: list[Any], lowercase: bool = False, tokenize: str = "13a"
    ) -> dict[str, Any]:
        from sacrebleu.metrics import BLEU

        bleu = BLEU(lowercase=lowercase, tokenize=tokenize)
        score = bleu.corpus_score(predictions, self._streams(references))
        return {
            "bleu": score.score,
            "signature": str(bleu.get_signature()),
            "precisions": score.precisions,
            "brevity_penalty": score.bp,
            "hypothesis_length": score.sys_len,
            "reference_length": score.ref_len,
        }


class ChrF(_SacrebleuMetric):
    """chrF (word_order 0; 2 gives chrF++) with sacrebleu's signature."""

    _name = "chrF"
    _citation = "Popovic 2015, chrF: character n-gram F-score for automatic MT evaluation (W15-3049)"

    def _compute(
        self, predictions: list[str], references: list[Any], lowercase: bool = False, word_order: int = 0
    ) -> dict[str, Any]:
        from sacrebleu.metrics import CHRF

        chrf = CHRF(lowercase=lowercase, word_order=word_order)
        score = chrf.corpus_score(predictions, self._streams(references))
        return {"chrf": score.score, "signature": str(chrf.get_signature())}


def score_translations(
    predictions: Sequence[str], references: Sequence[str], lowercase: bool = False, tokenize: str = "13a"
) -> dict[str, Any]:
    """BLEU and chrF of whole-corpus translations, with signatures."""
    bleu = Bleu().compute(
        predictions=list(predictions), references=list(references), lowercase=lowercase, tokenize=tokenize
    )
    chrf = ChrF().compute(predictions=list(predictions), references=list(references), lowercase=lowercase)
    return {
        "bleu": round(bleu["bleu"], 4),
        "bleu_signature": bleu["signature"],
        "brevity_penalty": round(bleu["brevity_penalty"], 4),
        "chrf": round(chrf["chrf"], 4),
        "chrf_signature": chrf["signature"],
        "sentences": len(predictions),
    }
