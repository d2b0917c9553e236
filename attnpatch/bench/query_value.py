"""What query_value costs: its pairwise layer against SDPA, and a Marian training step against stock.

layer  pairwise attention, forward and backward, at T = 128 and 512, time and peak memory
step   Marian, T = 32, float32 and bfloat16 autocast, for the pairwise and the query gate
"""

from __future__ import annotations

from typing import Any

from attnpatch.bench.steps import marian, step
from attnpatch.bench.timing import BenchmarkError, Settings, check_close, compare, peak_bytes


def layer(settings: Settings) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from attnpatch.functional import query_value_attention

    heads, dim = 12, 64
    device = settings.device
    square = (heads, dim, dim)
    results: dict[str, Any] = {"peer": "F.scaled_dot_product_attention, forward and backward"}
    for tokens in (128, 512):
        query, key, value = (torch.randn(1, heads, tokens, dim, device=device).requires_grad_() for _ in range(3))
        gates: dict[str, Any] = {
            "gate_query": (torch.randn(square, device=device) * 0.1).requires_grad_(),
            "gate_value": (torch.randn(square, device=device) * 0.1).requires_grad_(),
            "gate_bias": torch.zeros(heads, dim, device=device).requires_grad_(),
            "strength": torch.ones(heads, device=device).requires_grad_(),
        }
        # A few queries in float64 with the T x S x D tensors written out.
        few = [x.detach().double() for x in (query[:, :, :4], key, value)]
        wide = {name: x.detach().double() for name, x in gates.items()}
        weights = torch.softmax(few[0] @ few[1].mT * dim**-0.5, -1)
        gate = few[0] @ wide["gate_query"].mT + wide["gate_bias"][:, None]
        gate = torch.sigmoid(gate.unsqueeze(-2) + (few[2] @ wide["gate_value"].mT).unsqueeze(-3))
        mixed = gate * few[0].unsqueeze(-2) * few[2].unsqueeze(-3) + (1 - gate) * few[2].unsqueeze(-3)
        expected = (weights.unsqueeze(-1) * mixed).sum(-2)
        error = check_close(
            "the pairwise form", query_value_attention(query, key, value, **gates)[:, :, :4], expected, 1e-5
        )

        leaves = [query, key, value, *gates.values()]

        def ours(q: Any = query, k: Any = key, v: Any = value, p: Any = gates, leaves: Any = leaves) -> None:
            torch.autograd.grad(query_value_attention(q, k, v, **p).sum(), leaves)

        def peer(q: Any = query, k: Any = key, v: Any = value) -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v))

        timed = compare(ours, peer, settings.repeats, device)
        results[f"T = {tokens}"] = timed | {
            "relative_error": error,
            "peak_bytes": peak_bytes(ours, device),
            "peer_peak_bytes": peak_bytes(peer, device),
            "bytes_of_one_T_S_D_tensor": 4 * heads * tokens * tokens * dim,
        }
        settings.say(f"T = {tokens}: {timed['ratio']['median']:.1f} times SDPA")
    return results


def steps(settings: Settings) -> dict[str, Any]:
    batch, tokens = 32, 32
    results: dict[str, Any] = {"peer": "the stock model's step", "batch": batch, "tokens": tokens}
    for bf16 in (False, True):
        precision = "bf16" if bf16 else "float32"
        stock = step(marian(), None, batch, tokens, settings.device, bf16)
        for gate in ("pairwise", "query"):
            spec = {"variant": "query_value", "options": {"query_value": {"gate": gate}}}
            gated = step(marian(), spec, batch, tokens, settings.device, bf16)
            if not bool(gated().isfinite()):
                raise BenchmarkError(f"{gate}: the loss is not finite; nothing was timed")
            timed = compare(gated, stock, settings.repeats, settings.device)
            results[f"{gate} {precision}"] = timed
            settings.say(f"{gate} {precision}: {timed['ratio']['median']:.2f} times the stock step")
    return results


PARTS = {"layer": layer, "step": steps}
