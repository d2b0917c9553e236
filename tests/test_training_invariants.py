"""Invariant 7: checkpointing, autocast, compilation, DDP and accumulation change nothing but rounding, and the
auxiliary loss reaches the optimiser in all of them."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, PAD, TRAINABLE, batch_of, head, masked_lm, tokens
from torch import Tensor, nn

import attnpatch
from attnpatch.errors import PatchError

EVERYTHING = {"neural": {}, "expressive": {}, "query_value": {}, "alignment": {"weight": 1.0}}


def trained(family: str, spec: Any = None) -> Any:
    model = masked_lm(family)
    attnpatch.patch(model, EVERYTHING if spec is None else spec)
    return model.train()


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Equal up to `tolerance` times the largest gradient of each tensor."""
    assert first.keys() == second.keys()
    for name, expected in first.items():
        size = max(float(expected.abs().max()), 1e-3)
        assert (second[name] - expected).abs().max() <= tolerance * size, name


def navigators(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of parameters that only the auxiliary loss reaches."""
    found = {name: g for name, g in grads.items() if ".regularise." in name}
    assert found
    return found


# --- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auxiliary_loss_is_in_the_loss_once(family: str) -> None:
    model = trained(family, {"alignment": {"weight": 1.0}})
    batch = batch_of(model)
    out = model(**batch)
    extra = attnpatch.auxiliary_loss(model).detach()
    vocabulary = out.logits.shape[-1]
    plain = nn.functional.cross_entropy(out.logits.view(-1, vocabulary), batch["labels"].view(-1)).detach()
    assert abs(float(extra)) > 1e-3
    torch.testing.assert_close(out.loss.detach(), plain + extra, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(**batch, return_dict=False)[0].detach(), plain + extra, atol=1e-5, rtol=1e-5)
    # Labels given by position.
    import inspect

    names = list(inspect.signature(type(model).forward).parameters)[1:]
    positional = [batch.get(name) for name in names[: names.index("labels") + 1]]
    torch.testing.assert_close(model(*positional).loss.detach(), plain + extra, atol=1e-5, rtol=1e-5)
    as_tuple = model(*positional, return_dict=False)
    torch.testing.assert_close(as_tuple[0].detach(), plain + extra, atol=1e-5, rtol=1e-5)
    # Without labels there is no loss, and logits are left alone.
    unlabelled = {k: v for k, v in batch.items() if k != "labels"}
    if family == "marian":
        unlabelled["decoder_input_ids"] = tokens(2, 5)
    assert model(**unlabelled).loss is None
    assert torch.equal(model(**unlabelled).logits, model(**unlabelled, return_dict=False)[0])
    assert float(attnpatch.auxiliary_loss(model).detach()) != 0.0
    # In evaluation mode the loss is the stock one.
    model.eval()
    torch.testing.assert_close(model(**batch).loss.detach(), plain, atol=1e-5, rtol=1e-5)
    assert float(attnpatch.auxiliary_loss(model)) == 0.0


def test_the_signs() -> None:
    """Query and key descend on the loss, the critic ascends."""
    model = trained("bert", {"alignment": {"weight": 1.0}})
    batch = batch_of(model)
    pipeline = model.bert.encoder.layer[0].attention.self.attnpatch

    def value() -> float:
        with torch.no_grad():
            model(**batch)
        return float(pipeline.slot.loss)

    start = value()
    grads = gradients(model, batch)
    for part, sign in (("navigator", -1), ("critic", 1)):
        saved = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.startswith("bert.encoder.layer.0") and part in name:
                    p -= 1e-2 * grads[name] / (grads[name].norm() + 1e-12)
        moved = value()
        assert (moved - start) * sign > 0, part
        model.load_state_dict(saved, strict=False)


# --- checkpointing, autocast, accumulation -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TRAINABLE)
def test_gradient_checkpointing(family: str, name: str) -> None:
    model = trained(family, {**_as_dict(TRAINABLE[name]), **({} if name == "alignment" else {"alignment": {}})})
    batch = batch_of(model)
    expected = gradients(model, batch)
    loss = float(attnpatch.auxiliary_loss(model).detach())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(expected, gradients(model, batch), 1e-5)
    model(**batch)
    assert float(attnpatch.auxiliary_loss(model).detach()) == pytest.approx(loss, rel=1e-5)
    model.gradient_checkpointing_disable()


def _as_dict(spec: Any) -> dict[str, Any]:
    return {spec: {}} if isinstance(spec, str) else spec


def test_reentrant_checkpointing_is_refused_where_it_would_lose_the_loss() -> None:
    model = trained("marian")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(PatchError, match="use_reentrant': False"):
        model(**batch_of(model))
    model.enable_input_require_grads()
    with pytest.raises(PatchError, match="use_reentrant': False"):
        model(**batch_of(model))
    # Without a loss of its own, reentrant checkpointing is as good as ever.
    attnpatch.unpatch(model, stages="regularise")
    batch = batch_of(model)
    checkpointed = gradients(model, batch)
    model.gradient_checkpointing_disable()
    assert_close(gradients(model, batch), checkpointed, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TRAINABLE)
def test_autocast(family: str, name: str) -> None:
    model = trained(family, TRAINABLE[name])
    batch = batch_of(model)
    full = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(**batch)
    assert torch.isfinite(half.loss)
    assert abs(float((half.loss - full.loss).detach())) < 0.2 * max(1.0, float(full.loss.detach()))
    half.loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None
    )
    if name == "alignment":
        navigators({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_gradients_are_the_batchs(family: str) -> None:
    """The mean of two halves' gradients is the whole's: for the alignment too, a mean over sequences."""
    model = trained(family)
    batch = {k: torch.cat([v, v.flip(0)]) for k, v in batch_of(model).items()}
    whole = gradients(model, batch)
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (model(**{k: v[half] for k, v in batch.items()}).loss / 2).backward()
    halves = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close(whole, halves, 1e-3)


@pytest.mark.parametrize(("family", "cls"), [("bert", "BertLMHeadModel"), ("roberta", "RobertaForCausalLM")])
def test_accumulation_by_items(family: str, cls: str) -> None:
    """The Trainer lets some heads divide by the labels of a whole step: the auxiliary loss takes the same share."""
    model = head(family, cls, EVERYTHING).train()
    ids = tokens(4, 8)
    batch = {"input_ids": ids, "labels": ids}
    # As the Trainer counts: it knows by its name that RoBERTa's loss shifts the labels, and of BERT's it does not.
    items = torch.tensor((ids[:, 1:] if family == "roberta" else ids).numel())
    whole = gradients(model, {**batch, "num_items_in_batch": items})
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        model(**{k: v[half] for k, v in batch.items()}, num_items_in_batch=items).loss.backward()
    halves = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_close(whole, halves, 1e-3)


def test_the_trainers_own_accumulation(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    start = head("bert", "BertLMHeadModel", EVERYTHING).train()
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]
    results = []
    for steps in (1, 2):
        model = copy.deepcopy(start)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=1e-2,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=1,
        )
        Trainer(model, arguments, train_dataset=data).train()
        before = dict(start.named_parameters())
        results.append({n: (p - before[n]).detach() for n, p in model.named_parameters()})
    navigators({n: d for n, d in results[0].items() if d.abs().max() > 0})
    for name, moved in results[0].items():
        torch.testing.assert_close(results[1][name], moved, atol=1e-6, rtol=1e-2)


def test_a_label_smoother_can_add_it() -> None:
    """The Trainer's label smoother forms its loss from the logits: auxiliary_loss is there to be added."""
    model = trained("marian")
    batch = batch_of(model)
    labels = batch.pop("labels")
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    model(**batch, decoder_input_ids=shifted)
    extra = attnpatch.auxiliary_loss(model)
    assert extra.requires_grad
    extra.backward()
    navigators({n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0})


def test_frozen_attention_is_fine() -> None:
    model = trained("bert")
    for p in model.bert.parameters():
        p.requires_grad_(False)
    model(**batch_of(model)).loss.backward()


# --- copies and pickles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles(family: str) -> None:
    model = trained(family)
    batch = batch_of(model)
    for step in range(2):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        expected = gradients(model, batch)
        for twin in twins:
            assert_close(expected, gradients(twin, batch), 1e-6)
            attnpatch.unpatch(twin)
            assert not attnpatch.patched_modules(twin)
        if step == 0:
            torch.optim.SGD(model.parameters(), lr=1e-3).step()


# --- compilation ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [("marian", "expressive"), ("bert", "neural"), ("roberta", "alignment")])
def test_compiled_without_code_generation(family: str, name: str) -> None:
    """Dynamo traces the patched model as it is; the compiler behind it is torch's affair (see the slow test)."""
    model = trained(family, TRAINABLE[name])
    batch = batch_of(model)
    expected = gradients(model, batch)
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(expected, gradients(compiled._orig_mod, batch), 1e-5)
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    assert_close(expected, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, 1e-4)
    torch._dynamo.reset()


def test_expressive_compiles_in_one_graph() -> None:
    model = head("bert", "BertModel", "expressive")
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRAINABLE, "everything"])
def test_compiled(name: str) -> None:
    spec = EVERYTHING if name == "everything" else TRAINABLE[name]
    for family in FAMILIES:
        model = trained(family, spec)
        batch = batch_of(model)
        expected = gradients(model, batch)
        model.zero_grad()
        torch.compile(model)(**batch).loss.backward()
        assert_close(expected, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, 1e-3)
        torch._dynamo.reset()


# --- several processes --------------------------------------------------------------------------------------------

DDP = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
import attnpatch
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model, batch = torch.load(f"{folder}/start.pt", weights_only=False)
model = DistributedDataParallel(model)
model(**{k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()}).loss.backward()
assert attnpatch.auxiliary_loss(model).requires_grad
if rank == 0:
    torch.save({n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}, f"{folder}/grads.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "marian"])
def test_two_processes(family: str, tmp_path: Path) -> None:
    """DDP over two processes gives the gradients of the whole batch, the auxiliary loss's among them."""
    model = trained(family)
    batch = {k: torch.cat([v, v.flip(0)]) for k, v in batch_of(model).items()}
    torch.save((model, batch), tmp_path / "start.pt")
    expected = gradients(model, batch)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DDP]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    assert [w.wait(timeout=300) for w in workers] == [0, 0]
    parallel = torch.load(tmp_path / "grads.pt")
    navigators({n: g for n, g in parallel.items() if g.abs().max() > 0})
    assert_close(expected, parallel, 1e-3)


def test_one_process_of_ddp(tmp_path: Path) -> None:
    model = trained("marian")
    batch = batch_of(model)
    expected = gradients(model, batch)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        assert_close(expected, {n.removeprefix("module."): g for n, g in gradients(wrapped, batch).items()}, 1e-5)
        assert float(attnpatch.auxiliary_loss(wrapped).detach()) != 0.0
    finally:
        torch.distributed.destroy_process_group()


def test_attention_dropout_acts() -> None:
    model = head("bert", "BertForMaskedLM", "expressive", attention_probs_dropout_prob=0.5)
    ids = torch.full((1, 6), PAD + 4)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
