"""Training steps of small models, stock and patched, on the same batch."""

from __future__ import annotations

import contextlib
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


# Options worth a row of their own; a variant that is not named here has one row, with its defaults.
_ROWS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"form": "matched"}],
    "top_r": [{"r": 16}],
    "value_aware": [{"r": 16, "selector": "centered"}],
    "query_value": [{}, {"gate": "query"}],
    "alignment": [{"method": method} for method in ("gan", "ct", "ot", "mmd")],
}


def specs() -> dict[str, Any]:
    """Specs to measure, by label, of every variant: `expressive`, `top_r(r=16)`, ..."""
    import attnpatch

    found: dict[str, Any] = {}
    for name in attnpatch.variants():
        for options in _ROWS.get(name, [{}]):
            shown = ", ".join(f"{key}={value}" for key, value in options.items())
            spec = {"variant": name, "options": {name: options}} if options else name
            found[f"{name}({shown})" if options else name] = spec
    return found


def patched_or_stock(cls: type, config: Any, spec: Any) -> Any:
    """A model of `config` with random weights; stock for None."""
    import attnpatch

    return cls(config if spec is None else attnpatch.patch_config(config, spec))


class TrainingStep:
    """One training step (forward, backward, AdamW) of `model` on a padded batch; gives the loss."""

    def __init__(
        self, architecture: tuple[type, Any], spec: Any, batch: int, tokens: int, device: str, bf16: bool
    ) -> None:
        import torch

        torch.manual_seed(0)
        self.model = patched_or_stock(*architecture, spec).to(device).train()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        ids = torch.randint(5, 2000, (batch, tokens), device=device)
        mask = torch.ones_like(ids)
        mask[::2, -tokens // 8 :] = 0
        self.inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        self.device, self.bf16 = device, bf16

    def __call__(self) -> Any:
        import torch

        precision = torch.autocast(self.device, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with precision:
            loss = self.model(**self.inputs).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach()


def step(
    architecture: tuple[type, Any], spec: Any, batch: int, tokens: int, device: str = "cpu", bf16: bool = False
) -> TrainingStep:
    """A step of the model that `architecture` (class and config) and `spec` (None: stock) describe."""
    return TrainingStep(architecture, spec, batch, tokens, device, bf16)


def over_flops(timed: dict[str, Any], ours: Any, stock: Any, batch: int, tokens: int) -> dict[str, Any]:
    """The ratio of two models' FLOPs, and that of their times (`timed`, of `compare`) over it."""
    flops = matmul_flops(ours, batch, tokens) / matmul_flops(stock, batch, tokens)
    over = {key: value if key == "n" else value / flops for key, value in timed["ratio"].items()}
    return {"flops_ratio": flops, "time_ratio_over_flops_ratio": over}


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
