"""The trainer's loss: smoothing, accumulation, the auxiliary loss once, a loss that is not finite; its evaluation."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attnpatch
from attnpatch.experiments.translation.collator import TranslationCollator
from attnpatch.experiments.translation.trainer import TranslationTrainer
from attnpatch.training.batching import IGNORE, SentenceBatchSampler
from attnpatch.training.errors import TrainingError
from attnpatch.training.losses import token_loss

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 40


def rows(count: int = 24) -> Any:
    import datasets

    def ids() -> list[int]:
        return [random.randint(2, VOCAB - 2) for _ in range(random.randint(1, 8))] + [0]

    sources, targets = [ids() for _ in range(count)], [ids() for _ in range(count)]
    return datasets.Dataset.from_dict(
        {
            "input_ids": sources,
            "labels": targets,
            "source_length": [len(s) for s in sources],
            "target_length": [len(t) for t in targets],
        }
    )


def tiny_model(dropout: float = 0.0) -> Any:
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(random.randrange(10**6))
    return MarianMTModel(
        MarianConfig(
            vocab_size=VOCAB,
            decoder_vocab_size=VOCAB,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            dropout=dropout,
            max_position_embeddings=32,
            pad_token_id=VOCAB - 1,
            eos_token_id=0,
            decoder_start_token_id=VOCAB - 1,
            forced_eos_token_id=0,
        )
    )


def make(folder: Path, model: Any, data: Any, **settings: Any) -> TranslationTrainer:
    from transformers import PrinterCallback, Seq2SeqTrainingArguments

    batch, processes = settings.pop("batch", 4), settings.pop("processes", 1)
    arguments = {
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
    } | settings.pop("arguments", {})
    trainer = TranslationTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=data,
        eval_dataset=data,
        train_sampler=SentenceBatchSampler(data["target_length"], batch, 1, processes),
        collator=TranslationCollator(VOCAB - 1, VOCAB - 1),
        **settings,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_loss_equals_the_definition(smoothing: float) -> None:
    logits = torch.randn(3, 5, VOCAB, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (3, 5))
    labels[0, 3:] = labels[2, 1:] = IGNORE
    logs = logits.log_softmax(-1)
    expected = 0.0
    for b, t in (labels != IGNORE).nonzero().tolist():
        expected -= (1 - smoothing) * float(logs[b, t, labels[b, t]]) + smoothing * float(logs[b, t].mean())
    assert float(token_loss(logits, labels, smoothing)) == pytest.approx(expected, rel=1e-12)


def test_token_loss_equals_the_label_smoother_of_transformers() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = torch.randn(3, 5, VOCAB), torch.randint(0, VOCAB, (3, 5))
    labels[1, 2:] = IGNORE
    mean = LabelSmoother(0.1)({"logits": logits}, labels.clone())
    torch.testing.assert_close(token_loss(logits, labels, 0.1) / (labels != IGNORE).sum(), mean)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulation_changes_nothing(tmp_path: Path, smoothing: float) -> None:
    """One batch of 12 pairs and three of 4 give the same step, although their target tokens differ in number."""
    data, first = rows(12), tiny_model()
    second = tiny_model()
    second.load_state_dict(first.state_dict())
    losses = []
    for name, model, batch, accumulation in (("a", first, 12, 1), ("b", second, 4, 3)):
        trainer = make(
            tmp_path / name,
            model,
            data,
            batch=batch,
            label_smoothing=smoothing,
            # SGD: Adam would hide a wrong scale of the gradient.
            arguments={"gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 1.0},
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_auxiliary_loss_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smoothing: float, accumulation: int
) -> None:
    import attnpatch

    monkeypatch.setattr(
        attnpatch, "auxiliary_loss", lambda model: model.final_logits_bias.sum() * 0 + 2.5, raising=False
    )
    data, model = rows(12), tiny_model()
    plain = tiny_model()
    plain.load_state_dict(model.state_dict())
    logged = []
    for name, m, auxiliary in (("a", plain, False), ("b", model, True)):
        trainer = make(
            tmp_path / name,
            m,
            data,
            batch=4,
            label_smoothing=smoothing,
            auxiliary=auxiliary,
            arguments={"gradient_accumulation_steps": accumulation, "learning_rate": 0.0, "logging_steps": 3},
        )
        trainer.train()
        logged.append(trainer.state.log_history[0])
        if auxiliary:  # the dev loss is without it
            trainer.auxiliary = True
            expected = trainer.evaluate()["eval_loss"]
            trainer.auxiliary = False
            assert trainer.evaluate()["eval_loss"] == expected
    if accumulation == 1:
        assert logged[1]["loss"] - logged[0]["loss"] == pytest.approx(2.5, abs=1e-4)
    assert "auxiliary_loss" not in logged[0]


def test_auxiliary_loss_of_a_patched_model_reaches_the_loss_once(tmp_path: Path) -> None:
    model = tiny_model()
    attnpatch.patch(model, "alignment")
    data = rows(8)
    trainer = make(tmp_path, model, data, auxiliary=True)
    batch = trainer.data_collator(data.to_list())
    count = (batch["labels"] != IGNORE).sum()
    model.train()
    torch.manual_seed(5)
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    extra = attnpatch.auxiliary_loss(model).detach()
    torch.manual_seed(5)
    labels = batch.pop("labels")
    plain = token_loss(model(**batch, use_cache=False).logits, labels, 0.0) / count
    assert float(extra) != 0
    assert loss.item() == pytest.approx((plain + extra).item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = make(tmp_path, model, rows(12))

    class Breaker(type(trainer.callback_handler.callbacks[0])):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    model.model.shared.weight[5:] = math.nan

    trainer.add_callback(Breaker())
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3 "):
        trainer.train()


def test_evaluation_is_exact_whatever_the_batches(tmp_path: Path) -> None:
    data, model = rows(30), tiny_model(dropout=0.3)
    total, count = 0.0, 0
    model.eval()
    collate = TranslationCollator(VOCAB - 1, VOCAB - 1)
    for row in data.to_list():
        batch = collate([row])
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        total += F.cross_entropy(logits, batch["labels"][0], reduction="sum").item()
        count += len(row["labels"])
    for budget in (10, 1000):
        trainer = make(tmp_path, model.train(), data, eval_max_tokens=budget, label_smoothing=0.1)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-5)
        assert model.training  # as it was before


@pytest.mark.parametrize("spec", [None, "neural", "query_value+expressive"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_translations_are_those_of_generate_in_order(tmp_path: Path, spec: str | None, backend: str) -> None:
    data, model = rows(15), tiny_model()
    if spec:
        attnpatch.patch(model, spec)
    model.set_attn_implementation(backend)
    model.generation_config.bad_words_ids = [[VOCAB - 1], [random.randint(2, VOCAB - 2)]]
    trainer = make(tmp_path, model, data, own_attention=True)
    expected = []
    model.eval()
    for row in data.to_list():
        ids = model.generate(torch.tensor([row["input_ids"]]), num_beams=2, max_length=12)[0].tolist()
        expected.append([token for token in ids if token != VOCAB - 1])
    for budget in (20, 1000):
        assert trainer.translate(data, budget, num_beams=2, max_length=12) == expected
        assert model.config._attn_implementation == backend  # as it was before


@pytest.mark.parametrize(
    ("spec", "backend"), [(None, "eager"), ("neural", "eager"), ("expressive", None), ("neural+elu", None)]
)
def test_backend_on_a_cpu(spec: str | None, backend: str | None) -> None:
    from types import SimpleNamespace

    from attnpatch.training.modeling import attention_backend

    training = SimpleNamespace(attention="auto", device="cpu")
    assert attention_backend(SimpleNamespace(spec=spec, training=training)) == backend
    training.attention = "sdpa"
    assert attention_backend(SimpleNamespace(spec=spec, training=training)) == "sdpa"


def test_the_line_of_an_evaluation_has_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from attnpatch.training.callbacks import LineCallback

    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=9, epoch=0.5)
    LineCallback().on_log(None, state, None, logs={"eval_loss": 1.25, "eval_accuracy": 0.75, "epoch": 0.5})
    LineCallback().on_log(None, state, None, logs={"eval_loss": 2.0, "eval_perplexity": 7.38906, "eval_bleu": 31.4})
    assert capsys.readouterr().out.splitlines() == [
        "step 3/9 epoch 0.50  dev loss 1.25  accuracy 0.75",
        "step 3/9 epoch 0.50  dev loss 2  perplexity 7.3891  bleu 31.4",
    ]


def test_the_clock_of_a_resumed_run_goes_on_from_the_first_part() -> None:
    import time
    from types import SimpleNamespace

    from attnpatch.training.run_trainer import Progress, RunTrainer

    trainer: Any = SimpleNamespace(progress=Progress(train_seconds=100.0, eval_seconds=10.0, save_seconds=2.0))
    RunTrainer.start_clock(trainer)
    time.sleep(0.05)
    trainer.progress.eval_seconds += 0.02
    assert 100.02 < RunTrainer.progress_now(trainer).train_seconds < 101
    trainer.progress_now = lambda: RunTrainer.progress_now(trainer)
    RunTrainer.stop_clock(trainer)
    assert 100.02 < trainer.progress.train_seconds < 101
