"""LoRA on patched models, and patches on models that carry LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch_of, masked_lm, same_state

import attnpatch
from attnpatch.errors import PatchError, UnsupportedModelError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

STAGES = {"expressive": {}, "top_r": {"r": 4}, "query_value": {}, "alignment": {"weight": 1.0}}


def lora(model: Any, *targets: str) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), r=2, init_lora_weights=False))


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**batch).logits


@pytest.mark.parametrize("family", ["bert", "roberta", "marian"])
def test_lora_on_a_patched_model(family: str, tmp_path: Path) -> None:
    """The linears of a neural projection are called `up` and `down`: PEFT finds them by these names."""
    model = masked_lm(family)
    attnpatch.patch(model, {"neural": {}, **STAGES})
    model.save_pretrained(tmp_path / "base")
    batch = batch_of(model)
    plain = logits(model, batch)
    wrapped = lora(model, "up", "down")
    count = sum("lora_A" in name for name, _ in wrapped.named_parameters())
    assert count == 2 * 3 * len(attnpatch.patched_modules(model))
    adapted = logits(wrapped, batch)
    assert not torch.equal(adapted, plain)
    wrapped.train()
    out = wrapped(**batch)
    extra = attnpatch.auxiliary_loss(wrapped)
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(out.loss, loss + extra, atol=1e-5, rtol=1e-5)
    extra.backward()
    assert all(
        p.grad is not None
        for n, p in wrapped.named_parameters()
        if "lora" in n and "encoder.layers.0.self_attn.q_proj" in n
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    base = type(model).from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, batch), adapted, atol=1e-5, rtol=1e-5)
    with pytest.raises(PatchError, match="hold adapters"):
        attnpatch.unpatch(wrapped)
    assert torch.equal(logits(wrapped, batch), adapted)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), adapted, atol=1e-4, rtol=1e-4)
    attnpatch.unpatch(merged)
    assert not attnpatch.patched_modules(merged)


def test_a_patch_on_a_model_with_lora() -> None:
    model = masked_lm("bert")
    wrapped = lora(model, "query", "value")
    batch = batch_of(model)
    state = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    before = logits(wrapped, batch)
    with pytest.raises(UnsupportedModelError, match="Patch before adding adapters"):
        attnpatch.patch(wrapped, {"neural": {}, **STAGES})
    assert same_state(wrapped, state)
    attnpatch.patch(wrapped, STAGES)
    assert not torch.equal(logits(wrapped, batch), before)
    wrapped.train()(**batch).loss.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if ".navigator." in n)
    attnpatch.unpatch(wrapped)
    assert same_state(wrapped, state)
    assert torch.equal(logits(wrapped, batch), before)


def test_adapters_of_transformers_itself() -> None:
    model = masked_lm("bert")
    model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(UnsupportedModelError, match="Patch before adding adapters"):
        attnpatch.patch(model, "neural")
    attnpatch.patch(model, "elu")
    model(**batch_of(model)).loss.backward()


def test_older_peft_calls_forward_past_the_hooks() -> None:
    """As its tuners did before 0.21: the auxiliary loss is in the loss all the same; stock models are left alone."""
    from types import SimpleNamespace

    from attnpatch.integration import _extend_peft

    class BaseTuner(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            return self.model.forward(**inputs)

    _extend_peft(SimpleNamespace(BaseTuner=BaseTuner))  # type: ignore[arg-type]
    model = masked_lm("bert").train()
    batch, called = batch_of(model), []
    model.register_forward_hook(lambda *_: called.append(1))
    plain = BaseTuner(model)(**batch).loss.detach()
    assert not called
    attnpatch.patch(model, {"alignment": {"weight": 1.0}})
    loss = BaseTuner(model)(**batch).loss.detach()
    torch.testing.assert_close(loss, plain + attnpatch.auxiliary_loss(model).detach(), atol=1e-5, rtol=1e-5)
