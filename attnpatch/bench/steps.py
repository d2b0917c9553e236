"""Training steps of small models, stock and patched, on the same batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


def roberta(layers: int = 2, hidden: int = 768) -> tuple[type, Any]:
    """RoBERTa-base shaped, with few layers and a small vocabulary, whose share of a step would hide the attention."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM, RobertaConfig(
        vocab_size=2000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=514,
    )


def marian() -> tuple[type, Any]:
    from transformers import MarianConfig, MarianMTModel

    return MarianMTModel, MarianConfig(
        vocab_size=6000,
        d_model=256,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=1024,
        decoder_ffn_dim=1024,
        max_position_embeddings=512,
        pad_token_id=5999,
        decoder_start_token_id=5999,
        eos_token_id=0,
    )


def step(
    architecture: tuple[type, Any], spec: Any, batch: int, tokens: int, device: str = "cpu", bf16: bool = False
) -> Callable[[], Any]:
    """A function that does one training step (forward, backward, AdamW) on a padded batch; it holds its `model`."""
    import torch

    import attnpatch

    torch.manual_seed(0)
    cls, config = architecture
    model = cls(attnpatch.patch_config(config, spec) if spec is not None else config).to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(5, 2000, (batch, tokens), device=device)
    mask = torch.ones_like(ids)
    mask[::2, -tokens // 8 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}

    def run() -> Any:
        precision = torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()
        with precision:
            loss = model(**inputs).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    run.model = model  # type: ignore[attr-defined]
    return run


def matmul_flops(model: Any, batch: int, tokens: int) -> int:
    """FLOPs of the matrix products in one forward pass, counted as they run."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    ids = torch.randint(5, 2000, (batch, tokens), device=device)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=ids, labels=ids)
    return int(counter.get_total_flops())
