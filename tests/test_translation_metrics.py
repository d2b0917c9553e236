"""BLEU and chrF equal sacrebleu's own, without a network."""

from __future__ import annotations

import random
import socket

import pytest

from attnpatch.experiments.translation.metrics import Bleu, ChrF, score_translations


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def sentences(count: int) -> tuple[list[str], list[str]]:
    words = ["Der", "Hund", "läuft", "durch", "das", "Gras", ",", "schnell", "und", "Weit"]
    references = [" ".join(random.choices(words, k=random.randint(4, 12))) + "." for _ in range(count)]
    return [" ".join(r.split()[:-1] + random.choices(words, k=1)).lower() for r in references], references


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("tokenize", ["13a", "char"])
def test_equal_to_sacrebleu(lowercase: bool, tokenize: str) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    predictions, references = sentences(40)
    bleu = BLEU(lowercase=lowercase, tokenize=tokenize)
    chrf = CHRF(lowercase=lowercase)
    scores = score_translations(predictions, references, lowercase, tokenize)
    assert scores["bleu"] == pytest.approx(bleu.corpus_score(predictions, [references]).score, abs=1e-4)
    assert scores["chrf"] == pytest.approx(chrf.corpus_score(predictions, [references]).score, abs=1e-4)
    assert scores["bleu_signature"] == str(bleu.get_signature())
    assert scores["chrf_signature"] == str(chrf.get_signature())
    assert ("case:lc" in scores["bleu_signature"]) == lowercase


def test_several_references() -> None:
    from sacrebleu.metrics import BLEU, CHRF

    predictions, first = sentences(10)
    second = sentences(10)[1]
    both = [list(pair) for pair in zip(first, second, strict=True)]
    expected = BLEU().corpus_score(predictions, [first, second]).score
    assert Bleu().compute(predictions=predictions, references=both)["bleu"] == pytest.approx(expected)
    expected = CHRF(word_order=2).corpus_score(predictions, [first, second]).score
    result = ChrF().compute(predictions=predictions, references=both, word_order=2)
    assert result["chrf"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="same number of references"):
        Bleu().compute(predictions=["a", "b"], references=[["a"], ["a", "b"]])


def test_are_evaluate_metrics() -> None:
    import evaluate

    metric = Bleu()
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=["ein Haus am See"], references=["ein Haus am See"])
    assert metric.compute()["bleu"] == pytest.approx(100.0)
