"""The demo: one stock Marian on the synthetic corpus, converted to every variant, checked, trained on, scored.

Training is `attnpatch.experiments.translation.run.run`, which scripts/train_marian.py calls too; conversion is
`attnpatch.convert`.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpatch.demo.config import DemoConfig
from attnpatch.demo.grammar import SYNTHETIC_NOTICE, write_corpus
from attnpatch.demo.report import CONSOLE, write_report
from attnpatch.environment import machine, versions
from attnpatch.experiments.translation.collator import TranslationCollator
from attnpatch.experiments.translation.data import ParallelText, load_split
from attnpatch.experiments.translation.metrics import score_translations
from attnpatch.experiments.translation.run import run
from attnpatch.experiments.translation.tokenizer import encode
from attnpatch.spec import AttentionSpec
from attnpatch.training.batching import IGNORE, length_batches
from attnpatch.training.files import sha256_file
from attnpatch.training.run_folder import check_folder
from attnpatch.training.runs import use_bf16
from attnpatch.training.tokenizers import load_tokenizer

TOLERANCE = 1e-5
"""How far a logit may move where a conversion must keep the model's function: in float64, so that a change shows and
rounding does not; in float32, where a logit of 30 alone is rounded by 2e-6, relative to the largest logit."""

JOINED = 4
"""Sentences in a long row of the drift measurement: more keys than value_aware's default r, which is D + 1."""

LONG_ROWS = 1
"""So few because the oracle's search takes seconds there."""


@dataclass(frozen=True)
class Variant:
    """A row of the demo: what the stock model is converted to, and what must hold then."""

    name: str
    spec: Any
    init: str = "preserve"
    exact: bool = False  # the converted model must compute what the stock one does
    trains: bool = True
    note: str = ""

    @property
    def stages(self) -> list[str]:
        from attnpatch.registry import get_variant

        return [get_variant(name).stage for rule in AttentionSpec.parse(self.spec).rules for name in rule.variants]

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() or c in "+-_=" else "_" for c in self.name.replace(" ", "-"))


KEPT = 4
"""Keys that the sparse variants keep: about a third of a synthetic sentence."""

VARIANTS = (
    Variant("neural (roberta preset)", {"neural": {"preset": "roberta"}}, exact=True),
    Variant(
        "neural (marian preset)", {"neural": {"preset": "marian"}}, init="calibrate", note="fitted on the dev text"
    ),
    Variant("expressive", "expressive"),
    Variant("polynomial", "polynomial"),
    Variant("elu", "elu"),
    Variant(f"top_r (r={KEPT})", {"top_r": {"r": KEPT}}),
    Variant("value_aware (oracle)", "value_aware", exact=True, trains=False, note="r = D+1; inference only"),
    Variant(f"value_aware (r={KEPT})", {"value_aware": {"r": KEPT, "selector": "centered"}}, note="selector=centered"),
    Variant("query_value", "query_value", exact=True),
    Variant("alignment", "alignment", exact=True),
    Variant("neural + expressive + alignment", "neural+expressive+alignment"),
)
STOCK = "stock"


@dataclass
class Row:
    """What came out for one variant.

    `drift`, `drift_mean`: change of a logit by the conversion, in float64, on the test set and on long rows of it.
    `drift_float32`: the largest in float32, on the test set. `largest_logit`: the stock model's.
    `drift_at_conversion`: what `convert` measured, in float32, on random tokens. `before`, `after`: scores before and
    after training on.
    """

    variant: str
    stages: list[str]
    spec: str
    init: str | None = None
    must_be_unchanged: bool = False
    parameters_added: int = 0
    drift: float | None = None
    drift_mean: float | None = None
    drift_float32: float | None = None
    drift_at_conversion: float | None = None
    largest_logit: float = 1.0
    same_translations: int | None = None
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] | None = None
    updates: int = 0
    tokens_per_second: float | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def changed(self) -> bool:
        """Whether something moved that must not. A drift that is not a number counts as moved."""
        in_float32 = TOLERANCE * max(1.0, self.largest_logit)
        limits = ((self.drift, TOLERANCE), (self.drift_float32, in_float32), (self.drift_at_conversion, in_float32))
        return self.must_be_unchanged and not all(value is not None and value <= limit for value, limit in limits)


@dataclass
class DemoResult:
    """All that the report shows."""

    rows: list[Row]
    base: dict[str, Any]
    corpus: dict[str, Any]
    config: DemoConfig
    seconds: float

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.changed]

    @property
    def complaint(self) -> str:
        names = ", ".join(
            f"{row.variant} (logits moved by {row.drift:.1e}, in float32 by {row.drift_float32:.1e})"
            for row in self.failed
        )
        return f"the conversion must not change the model, but did: {names}; the tolerance is {TOLERANCE:.0e}"

    @property
    def summary(self) -> str:
        """What the numbers show, and what not."""
        kept = [row for row in self.rows if row.must_be_unchanged]
        good = len(kept) - len(self.failed)
        moved = [row.drift for row in self.rows if row.drift is not None and not row.must_be_unchanged]
        others = f"the {len(moved)} others moved them by {min(moved):.1g} to {max(moved):.1g}; " if moved else ""
        trained = sum(row.after is not None for row in self.rows)
        return (
            f"Shown: {good} of {len(kept)} conversions that must keep the stock model's function kept it (logits "
            f"within {TOLERANCE:.0e}); {others}{trained} models were trained on, {self.config.further.updates} updates "
            "each, by the code behind scripts/train_marian.py. Not shown: which attention is better. The corpus is "
            f"synthetic, the model tiny ({self.base['parameters']['trainable']:,} parameters), and there is one seed: "
            "small differences in BLEU mean nothing, and no score says anything about translating real text."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "experiment": "demo",
            "synthetic": True,
            "notice": SYNTHETIC_NOTICE,
            "summary": self.summary,
            "unchanged": {"tolerance": TOLERANCE, "failed": [row.variant for row in self.failed]},
            "rows": [asdict(row) for row in self.rows],
            "base": self.base,
            "corpus": self.corpus,
            "seconds": round(self.seconds, 1),
            "config": asdict(self.config),
            "versions": versions(),
            "machine": machine(),
        }


class Demo:
    """The steps of one demo, each shown by a line."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.out = Path(config.output)
        check_folder("output", self.out)
        self.started = time.perf_counter()
        self.marian = copy.deepcopy(config.base)
        self.marian.data.dir = str(self.out / "corpus")
        self.marian.data.train, self.marian.data.dev, self.marian.data.test = ["train"], ["dev"], ["test"]
        self.marian.data.about = "the synthetic corpus that scripts/demo.py writes"
        self.marian.generation.test = True
        self.marian.training.resume = "never"
        self.marian.output.overwrite = True
        self.stock = self.out / "base" / "model"
        self.test = ParallelText("test")
        self.tokenizer: Any = None
        self.stock_logits: dict[torch.dtype, Tensor] = {}
        self.stock_hypotheses: list[str] = []

    def say(self, line: str) -> None:
        CONSOLE.print(f"[{time.perf_counter() - self.started:6.1f} s] {line}", markup=False, highlight=False)

    def run(self) -> DemoResult:
        for name in ("results.json", "table.md", "bleu.png", "bleu.svg"):
            (self.out / name).unlink(missing_ok=True)  # of an earlier demo, should this one fail
        corpus = self.write_corpus()
        base = self.train_base()
        rows = [self.stock_row()]
        CONSOLE.print(f"         {rows[0].variant}: {_outcome(rows[0])}", markup=False, highlight=False)
        for number, variant in enumerate(VARIANTS, start=1):
            self.say(
                f"{number}/{len(VARIANTS)} {variant.name}: convert, check, "
                + ("train on, score" if variant.trains else "score")
            )
            row = self.variant_row(variant)
            CONSOLE.print(f"{'':11}{_outcome(row)}", markup=False, highlight=False)
            rows.append(row)
        return DemoResult(rows, base, corpus, self.config, time.perf_counter() - self.started)

    def write_corpus(self) -> dict[str, Any]:
        sizes = self.config.corpus
        self.say(f"writing the synthetic corpus: {sizes.train:,} training, {sizes.dev} dev, {sizes.test} test pairs")
        folder = self.out / "corpus"
        written = write_corpus(folder, sizes.train, sizes.dev, sizes.test, sizes.seed)
        self.test = load_split(self.marian.data, "test")[0]
        files = {path.name: sha256_file(path) for pair in written.values() for path in pair}
        return {"synthetic": True, "folder": str(folder), "sha256": files}

    def train_base(self) -> dict[str, Any]:
        """Trains the stock model and keeps what the variants are compared with."""
        config = copy.deepcopy(self.marian)
        config.output.dir = str(self.out / "base")
        self.say(f"training the stock model from scratch: {config.training.max_steps or 'all'} updates")
        results = run(config)
        self.tokenizer = load_tokenizer(self.stock)
        model = self.load(self.stock)
        self.stock_hypotheses = self.translate(model)
        self.stock_logits = self.logits(model)
        return results

    def stock_row(self) -> Row:
        """The baseline: the stock model, trained on like the others."""
        self.say("stock, the baseline: train on, score")
        started = time.perf_counter()
        row = Row(STOCK, [], "stock", before=self.scores(self.stock_hypotheses), note="the baseline")
        self.train_on(row, self.stock, STOCK)
        row.seconds = round(time.perf_counter() - started, 2)
        return row

    def variant_row(self, variant: Variant) -> Row:
        import attnpatch

        started = time.perf_counter()
        folder = self.out / "converted" / variant.folder
        calibration: dict[str, Any] = {}
        if variant.init == "calibrate":
            corpus = self.out / "corpus"
            calibration = {"calibration_text": corpus / "dev.de", "calibration_target": corpus / "dev.en"}
        # What stands there is an earlier demo's.
        shutil.rmtree(folder, ignore_errors=True)
        report = attnpatch.convert(self.stock, folder, variant.spec, variant.init, seed=self.marian.seed, **calibration)
        model = self.load(folder)
        row = Row(
            variant.name,
            variant.stages,
            report.patch.spec,
            variant.init,
            must_be_unchanged=variant.exact,
            parameters_added=report.patch.parameters_added,
            drift_at_conversion=report.drift.max,
            note=variant.note,
        )
        hypotheses = self.translate(model)
        row.before = self.scores(hypotheses)
        row.same_translations = sum(a == b for a, b in zip(hypotheses, self.stock_hypotheses, strict=True))
        self.measure(row, model)
        if variant.trains:
            self.train_on(row, folder, variant.folder)
        row.seconds = round(time.perf_counter() - started, 2)
        return row

    def measure(self, row: Row, model: Any) -> None:
        """How far the model's logits are from the stock model's."""
        stock, logits = self.stock_logits, self.logits(model)
        row.drift, row.drift_mean = distance(stock[torch.float64], logits[torch.float64])
        row.drift_float32, _ = distance(stock[torch.float32], logits[torch.float32])
        row.largest_logit = float(stock[torch.float64].abs().max())

    def train_on(self, row: Row, model: Path, name: str) -> None:
        """The same updates on the same batches for every row."""
        config, further = copy.deepcopy(self.marian), self.config.further
        config.model.pretrained = str(model)
        training = config.training
        training.max_steps = further.updates
        training.learning_rate = further.learning_rate
        training.warmup_steps = further.warmup_steps
        training.schedule = further.schedule
        training.evaluate_every = training.save_every = "never"
        training.final = "last"
        # No more text than the updates see, as reading it costs time; hardly a pair has fewer than 8 tokens.
        config.data.max_train_pairs = max(further.updates * training.max_tokens // 8, 1)
        config.data.dev = []
        config.output.dir = str(self.out / "trained_on" / name)
        config.output.quiet = True
        results = run(config)
        row.after = _scores(results["scores"]["test"])
        row.updates = results["steps"]
        row.tokens_per_second = results["tokens"]["source_and_target_per_second"]

    def load(self, folder: Path) -> Any:
        """A model in float32 on the CPU, as anybody would load it."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, model: Any) -> dict[torch.dtype, Tensor]:
        """Logits [N, vocabulary] of the test set's target tokens, in float32 and float64; of a few long rows in float64
        only. The model is left in float64."""

        def compute(sources: list[str], targets: list[str]) -> Iterator[Tensor]:
            for _, batch in self.batches(model, sources, targets, 2 * self.marian.training.max_tokens):
                wanted = batch.pop("labels") != IGNORE
                yield model(**batch, use_cache=False).logits[wanted]

        sources, targets = self.test.sources, self.test.targets
        single = torch.cat(list(compute(sources, targets)))
        model.double()
        double = [*compute(sources, targets), *compute(long_rows(sources), long_rows(targets))]
        return {torch.float32: single, torch.float64: torch.cat(double)}

    @torch.no_grad()
    def translate(self, model: Any) -> list[str]:
        generation = self.marian.generation
        translated: dict[int, str] = {}
        bf16 = use_bf16(self.marian.training.precision, on_cpu=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # as the trained models are scored
            for indices, batch in self.batches(model, self.test.sources, None, generation.max_tokens):
                ids = model.generate(**batch, num_beams=generation.num_beams, max_length=generation.max_length)
                lines = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
                translated.update(zip(indices, lines, strict=True))
        return [translated[index] for index in range(len(self.test))]

    def batches(self, model: Any, sources: list[str], targets: list[str] | None, max_tokens: int) -> Any:
        limit = model.config.max_position_embeddings
        rows = [{"input_ids": ids} for ids in encode(self.tokenizer, sources, limit)]
        for row, labels in zip(rows, encode(self.tokenizer, targets or [], limit, target=True), strict=False):
            row["labels"] = labels
        collate = TranslationCollator(model.config.pad_token_id, model.config.decoder_start_token_id)
        lengths = [max(len(ids) for ids in row.values()) for row in rows]
        for indices in length_batches(lengths, max_tokens):
            yield indices, collate([rows[index] for index in indices])

    def scores(self, hypotheses: list[str]) -> dict[str, Any]:
        generation = self.marian.generation
        return _scores(score_translations(hypotheses, self.test.references, generation.lowercase, generation.tokenize))


def long_rows(sentences: list[str]) -> list[str]:
    """Neighbouring sentences joined."""
    starts = range(0, min(len(sentences), LONG_ROWS * JOINED), JOINED)
    return [" ".join(sentences[start : start + JOINED]) for start in starts]


def _scores(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: scores[key] for key in ("bleu", "bleu_signature", "chrf", "chrf_signature", "sentences")}


def distance(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Largest and mean absolute difference; infinite where a logit is not finite."""
    gaps = (first.double() - second.double()).abs().nan_to_num(nan=math.inf)
    return float(gaps.max()), float(gaps.mean())


def _outcome(row: Row) -> str:
    parts = []
    if row.drift is not None:
        verdict = ("CHANGED" if row.changed else "unchanged") if row.must_be_unchanged else "as expected"
        parts.append(f"{row.parameters_added:+,} parameters, logits moved by {row.drift:.1e} ({verdict})")
    before = f"BLEU {row.before['bleu']:.1f}"
    parts.append(before if row.after is None else f"{before} -> {row.after['bleu']:.1f}")
    return ", ".join([*parts, f"{row.seconds:.1f} s"])


def run_demo(config: DemoConfig) -> DemoResult:
    """Runs all steps and writes results.json, table.md and the plot into `config.output`.

    Raises an AttnpatchError with one sentence for anything a person can mend.
    """
    demo = Demo(config)
    result = demo.run()
    write_report(result, demo.out)
    return result
