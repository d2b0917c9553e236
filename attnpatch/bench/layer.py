"""What one attention layer costs: each variant's over the stock layer (torch SDPA), of RoBERTa-base's shape.

attention  the self-attention module, projections included, without padding, at T = 128 and 512: forward in
           evaluation, forward and backward in training with the auxiliary loss where there is one, and its
           peak memory
"""

from __future__ import annotations

import copy
from typing import Any

from attnpatch.bench.steps import patched_or_stock, specs
from attnpatch.bench.timing import BenchmarkError, Settings, compare, peak_bytes

HIDDEN = 768
LENGTHS = (128, 512)
TOKENS = 512
ALLOWED = 1e-3
"""Relative error in float32 of all but TIES of the queries."""
TIES = 0.002
"""Of a few queries in thousands a near tie in the selection of keys may fall the other way in float32."""


class AttentionLayer:
    """One RobertaSelfAttention, stock or patched, with inputs to run it on."""

    def __init__(self, spec: Any, batch: int, tokens: int, device: str, dtype: Any = None) -> None:
        import torch
        from transformers import RobertaConfig, RobertaModel

        config = RobertaConfig(
            vocab_size=100,
            hidden_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=HIDDEN // 64,
            intermediate_size=4 * HIDDEN,
            max_position_embeddings=LENGTHS[-1] + 2,
            attention_probs_dropout_prob=0.0,
        )
        torch.manual_seed(0)
        model = patched_or_stock(RobertaModel, config, spec)
        self.module = model.encoder.layer[0].attention.self.to(device, dtype)
        self.hidden = torch.randn(batch, tokens, HIDDEN, device=device, dtype=dtype).requires_grad_()

    def forward(self) -> Any:
        import torch

        with torch.no_grad():
            return self.module(self.hidden)[0]

    def both(self) -> Any:
        """Gradients of the input and of all parameters."""
        import torch

        from attnpatch.auxiliary import auxiliary_loss

        loss = self.module(self.hidden)[0].sum()
        extra = auxiliary_loss(self.module)
        leaves = [self.hidden, *self.module.parameters()]
        return torch.autograd.grad(loss + extra if extra.requires_grad else loss, leaves, allow_unused=True)

    def relative_error(self) -> float:
        """Of the output in float32, against the same module in float64: of the worst query but for TIES of them."""
        import torch

        exact = copy.deepcopy(self.module).double()
        with torch.no_grad():
            expected = exact(self.hidden[:1].double())[0]
            errors = (self.module(self.hidden[:1])[0] - expected).norm(dim=-1) / expected.norm(dim=-1)
            return float(errors.flatten().quantile(1.0 - TIES, interpolation="higher"))


def attention(settings: Settings) -> dict[str, Any]:
    results: dict[str, Any] = {"peer": "the stock layer (torch SDPA)", "tokens": TOKENS}
    for tokens in LENGTHS:
        batch = TOKENS // tokens * (1 if settings.device == "cpu" else 8)
        stock = AttentionLayer(None, batch, tokens, settings.device)
        peer_peak = peak_bytes(stock.both, settings.device)
        for label, spec in specs().items():
            layer = AttentionLayer(spec, batch, tokens, settings.device)
            layer.module.eval()
            error = layer.relative_error()
            if not error <= ALLOWED:
                raise BenchmarkError(f"{label}: relative error {error:.1e} > {ALLOWED:.0e}; nothing was timed")
            row = results.setdefault(label, {})
            shown = []
            for what in ("forward", "both"):
                for side in (layer, stock):
                    side.module.train(what == "both")
                timed = compare(getattr(layer, what), getattr(stock, what), settings.repeats, settings.device)
                row[f"{what}, T = {tokens}"] = timed | {"relative_error": error}
                shown.append(f"{what} {timed['ratio']['median']:.2f}")
            peak = peak_bytes(layer.both, settings.device)
            memory = {"peak_bytes": peak, "peer_peak_bytes": peer_peak, "memory": peak / peer_peak}
            row[f"both, T = {tokens}"] |= memory
            settings.say(f"T = {tokens}, {label}: {', '.join(shown)}, memory {peak / peer_peak:.2f}")
    return results


PARTS = {"attention": attention}
