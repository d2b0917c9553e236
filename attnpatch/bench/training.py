"""Marian training and decoding against transformers' own example loop, as ratios in one process.

Peer in training: what transformers' `run_translation` example does (Seq2SeqTrainer, DataCollatorForSeq2Seq, pairs in
random order, its default attention backend), with the same model, tokens, label smoothing and threads, and as many
target tokens an update; once in float32, its default, and once with --bf16. Parameters, updates and tokens of both
sides are counted and held against each other. Peer in decoding: `generate` with the same beams in file order, in
batches of 8 in float32 (the example's defaults), and of 64 in bfloat16 (its fastest form).

The sides take turns. Before timing, the dev loss and the translations of both must agree, in float32. The data folder
holds train, val and test_2016_flickr (.de and .en) of Multi30k; without it the built-in synthetic grammar is used.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnpatch.bench.timing import BenchmarkError, Settings, summary
from attnpatch.experiments.translation.config import MarianTrainingConfig
from attnpatch.experiments.translation.data import load_split, merge
from attnpatch.experiments.translation.run import run
from attnpatch.experiments.translation.tokenizer import encode
from attnpatch.training.config import load_config
from attnpatch.training.runs import use_bf16
from attnpatch.training.tokenizers import load_tokenizer

SETTINGS = """
model: {d_model: 256, encoder_layers: 3, decoder_layers: 3, heads: 4, ffn_dim: 1024}
tokenizer: {vocab_size: 6000}
training:
  max_tokens: 2048
  learning_rate: 1.0e-3
  schedule: inverse_sqrt
  warmup_steps: 100
  label_smoothing: 0.1
  final: last
  save_every: never
generation: {num_beams: 5, max_length: 64}
"""
BEAMS, LONGEST = 5, 64


class Sides:
    """Ours and the example's way of training and decoding, on the same pairs and the same model."""

    def __init__(self, data: Path, folder: Path, splits: dict[str, str], threads: int, device: str) -> None:
        settings = folder / "settings.yaml"
        settings.write_text(SETTINGS, encoding="utf-8")
        self.settings, self.folder, self.device, self.kept = settings, folder, device, folder / "kept"
        self.words = [f"data.dir={data}", *(f"data.{k}={v}" for k, v in splits.items())]
        self.words += [
            f"training.threads={threads}",
            "output.quiet=true",
            f"data.max_train_pairs={PAIRS}",
            f"data.max_test_pairs={SENTENCES}",
            f"data.max_dev_pairs={SENTENCES}",
            f"output.dir={folder / 'run'}",
        ]
        self.words += [
            f"training.device={'cpu' if device == 'cpu' else 'auto'}",
            "training.resume=never",
            "output.overwrite=true",
        ]
        config = self.config()
        self.texts = {split: merge(load_split(config.data, split), split) for split in ("train", "test")}

    def config(self, **settings: Any) -> MarianTrainingConfig:
        words = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        return load_config(MarianTrainingConfig, str(self.settings), [*self.words, *words])

    def ours(self, steps: int, precision: str, **settings: Any) -> dict[str, Any]:
        """results.json of a run; its model stays in the folder run/model."""
        evaluate = settings.pop("training__evaluate_every", "never")
        return run(
            self.config(
                training__max_steps=steps, training__precision=precision, training__evaluate_every=evaluate, **settings
            )
        )

    def of_the_kept(self) -> dict[str, Any]:
        """Settings of a run that translates the test text with the model in `kept`: one update that changes nothing."""
        words = {"model__pretrained": str(self.kept), "tokenizer__path": str(self.kept), "generation__test": "true"}
        return {**words, "training__learning_rate": 0.0}

    def load(self) -> tuple[Any, Any]:
        """The model that the last run of ours saved, and its tokenizer, as the example loads them."""
        from transformers import AutoModelForSeq2SeqLM

        path = self.folder / "run" / "model"
        model = AutoModelForSeq2SeqLM.from_pretrained(path, attn_implementation="sdpa")
        return model, load_tokenizer(path)

    def rows(self, split: str, tokenizer: Any) -> Any:
        import datasets

        text = self.texts[split]
        sources = encode(tokenizer, text.sources, 256)
        targets = encode(tokenizer, text.targets, 256, target=True)
        return datasets.Dataset.from_dict({"input_ids": sources, "labels": targets})

    def example(self, steps: int, bf16: bool, pairs: int) -> dict[str, float]:
        """The example's loop for `steps` updates of `pairs` pairs: updates, target tokens, seconds, parameters."""
        from transformers import (
            DataCollatorForSeq2Seq,
            PrinterCallback,
            Seq2SeqTrainer,
            Seq2SeqTrainingArguments,
            TrainerCallback,
        )

        model, tokenizer = self.load()
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(self.folder / "example"),
            per_device_train_batch_size=pairs,
            max_steps=steps,
            learning_rate=1e-3,
            label_smoothing_factor=0.1,
            bf16=bf16,
            use_cpu=self.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        pad = DataCollatorForSeq2Seq(tokenizer, model=model)
        counts: list[int] = []
        clock: list[float] = []

        def collate(batch: list[dict[str, Any]]) -> Any:
            counts.append(sum(len(row["labels"]) for row in batch))
            return pad(batch)

        class Clock(TrainerCallback):
            """As our own seconds: from the first batch to the last update, without building the optimiser."""

            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.append(time.perf_counter())

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                clock.append(time.perf_counter())

        trainer = Seq2SeqTrainer(
            model=model,
            args=arguments,
            train_dataset=self.rows("train", tokenizer),
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return {
            "updates": trainer.state.global_step,
            # The loader is a batch ahead of the updates.
            "target_tokens": sum(counts[:steps]),
            "seconds": clock[1] - clock[0],
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def file_order(self, precision: str, sentences: int) -> tuple[list[str], float]:
        """The test set's translations by `generate` in file order, and the seconds they took."""
        model, tokenizer = self.load()
        model = model.eval().to(self.device)
        sources = self.texts["test"].sources
        ids = encode(tokenizer, sources, 256)
        out: list[str] = []
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            for at in range(0, len(ids), sentences):
                batch = tokenizer.pad({"input_ids": ids[at : at + sentences]}, return_tensors="pt").to(model.device)
                produced = model.generate(**batch, num_beams=BEAMS, max_length=LONGEST)
                out += tokenizer.batch_decode(produced, skip_special_tokens=True)
        return out, time.perf_counter() - start

    def loss(self) -> float:
        """Negative log-likelihood per target token of the test set, in file order, float32."""
        model, tokenizer = self.load()
        model.eval()
        rows, total, count = self.rows("test", tokenizer), 0.0, 0
        from transformers import DataCollatorForSeq2Seq

        pad = DataCollatorForSeq2Seq(tokenizer, model=model)
        with torch.no_grad():
            for at in range(0, len(rows), 16):
                batch = pad(rows.select(range(at, min(at + 16, len(rows)))).to_list())
                tokens = int((batch["labels"] != -100).sum())
                total += float(model(**batch).loss) * tokens
                count += tokens
        return total / count


def check(sides: Sides, steps: int) -> dict[str, Any]:
    """Trains the model that is to be decoded, into `sides.kept`, and holds both sides' loss and translations of the
    test text against each other, in float32.

    Raises:
        BenchmarkError: they disagree.
    """
    trained = sides.ours(steps, "auto", generation__test="false")
    (sides.folder / "run" / "model").rename(sides.kept)
    first = sides.ours(1, "fp32", training__evaluate_every=1, **sides.of_the_kept())
    gap = abs(first["dev"][-1]["loss"] - sides.loss())
    if not gap < 1e-4:
        raise BenchmarkError(f"the sides disagree: the losses of one model on one text differ by {gap:.2e}")
    scores = next(iter(first["scores"].values()))
    ours = (sides.folder / "run" / scores["hypotheses"]).read_text("utf-8").splitlines()
    peer = [" ".join(line.split()) for line in sides.file_order("fp32", 8)[0]]
    same = sum(a == b for a, b in zip(ours, peer, strict=True)) / len(peer)
    if same < 0.99:
        raise BenchmarkError(f"the sides disagree: only {same:.1%} of the translations are equal in float32")
    pairs = max(round(len(sides.texts["train"]) * trained["epochs"] / trained["steps"]), 1)
    return {"updates": steps, "loss_gap": gap, "equal_translations": same, "pairs_per_update": pairs}


def measure(sides: Sides, steps: int, repeats: int, trained: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Both sides in turn, `repeats` times; rates, and the ratio of our time to each peer's.

    Raises:
        BenchmarkError: the sides disagree in what they compute, or do not do the same work.
    """
    checked = check(sides, trained)
    fast = "bf16" if use_bf16("auto", sides.device == "cpu") else "fp32"
    rates: dict[str, list[float]] = {"ours": [], "example, fp32": [], "example, bf16": []}
    tokens: dict[str, list[float]] = {name: [] for name in rates}
    for i in range(repeats):
        result = sides.ours(steps, "auto", generation__test="false")
        rates["ours"].append(result["tokens"]["target_per_second"])
        tokens["ours"].append(result["tokens"]["target"] / steps)
        for name, bf16 in (("example, fp32", False), ("example, bf16", True)):
            peer = sides.example(steps, bf16, checked["pairs_per_update"])
            rates[name].append(peer["target_tokens"] / peer["seconds"])
            tokens[name].append(peer["target_tokens"] / steps)
            _same_work(result, peer)
        say("training, target tokens/s: " + _last(rates))
        shutil.rmtree(sides.folder / "run" / "model") if i + 1 < repeats else None
    per_update = {name: summary(values) for name, values in tokens.items()}
    training = {"updates": steps, "precision_of_ours": fast, "target_tokens_per_update": per_update}
    training |= _ratios(rates)

    decoding_rates: dict[str, list[float]] = {"ours": []}
    count = len(sides.texts["test"])
    for _ in range(repeats):
        result = sides.ours(1, "auto", **sides.of_the_kept())
        scores = next(iter(result["scores"].values()))
        decoding_rates["ours"].append(count / scores["seconds"])
        for precision, size in PEERS_IN_DECODING:
            name = f"generate in file order, {precision}, batches of {size}"
            decoding_rates.setdefault(name, []).append(count / sides.file_order(precision, size)[1])
        say("decoding, sentences/s: " + _last(decoding_rates))
    decoding = {"sentences": count, "num_beams": BEAMS, "precision_of_ours": fast} | _ratios(decoding_rates)
    return {"check": checked, "training": training, "decoding": decoding}


def _same_work(ours: dict[str, Any], peer: dict[str, float]) -> None:
    """Refuse to compare other models, or another number of updates; and updates of another size, but for what chance
    makes of them: batches hold as many pairs on average, and few batches are drawn."""
    for name, mine, its, allowed in (
        # All: the fixed positions of a loaded Marian count as trainable in transformers, those of a fresh one do not.
        ("parameters", ours["parameters"]["total"], peer["parameters"], 0.0),
        ("updates", ours["steps"], peer["updates"], 0.0),
        ("target tokens", ours["tokens"]["target"], peer["target_tokens"], 0.25),
    ):
        if abs(mine - its) > allowed * its:
            raise BenchmarkError(f"the sides do not do the same work: {mine} {name} against {its}")


def _last(rates: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {values[-1]:,.0f}" for name, values in rates.items())


def _ratios(rates: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "per_second": {name: summary(values) for name, values in rates.items()},
        "ratio": {
            name: summary([b / a for a, b in zip(rates["ours"], values, strict=True)])
            for name, values in rates.items()
            if name != "ours"
        },
    }


def synthetic(folder: Path) -> Path:
    """The built-in grammar's pairs, as files."""
    from attnpatch.demo.grammar import write_corpus

    write_corpus(folder, 20_000, 100, 500, 1)
    return folder


UPDATES, TRAINED, SENTENCES, PAIRS = 10, 300, 300, 8000
"""Timed updates of each side in each repeat, those of the model that is decoded (enough that its translations are about
as long as they should be: with 120 many run to the longest allowed), sentences that it translates, and pairs that there
are to train on."""
PEERS_IN_DECODING = (("fp32", 8), ("bf16", 64))
"""The example's defaults, and the fastest form of the same."""


def train_and_decode(settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if settings.data is None:
            data, splits = synthetic(folder), {"train": "train", "dev": "test", "test": "[test]"}
        else:
            data = settings.data
            splits = {"train": "train", "dev": "test_2016_flickr", "test": "[test_2016_flickr]"}
        sides = Sides(data, folder, splits, settings.threads, settings.device)
        # On a GPU ten updates are over before its clocks are up.
        updates = UPDATES if settings.device == "cpu" else 6 * UPDATES
        result = measure(sides, updates, settings.repeats, TRAINED, settings.say)
    return {"data": "Multi30k" if settings.data else "synthetic grammar"} | result


PARTS = {"marian": train_and_decode}
