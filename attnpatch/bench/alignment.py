"""What the alignment losses cost: a training step with each of them over the stock step.

step    RoBERTa-base shapes with 2 layers, T = 128, float32 and bfloat16 autocast
memory  what a loss leaves for its backward pass at T = 512, against the T x S matrix that is not kept
"""

from __future__ import annotations

from typing import Any

from attnpatch.bench.steps import roberta, step
from attnpatch.bench.timing import BenchmarkError, Settings, compare

METHODS = ("gan", "ct", "ot", "mmd")


def spec(method: str) -> dict[str, Any]:
    return {"variant": "alignment", "options": {"alignment": {"method": method}}}


def steps(settings: Settings) -> dict[str, Any]:
    batch, tokens = (4, 128) if settings.device == "cpu" else (32, 128)
    results: dict[str, Any] = {"peer": "the stock model's step", "batch": batch, "tokens": tokens}
    for bf16 in (False, True):
        precision = "bf16" if bf16 else "float32"
        stock = step(roberta(), None, batch, tokens, settings.device, bf16)
        for method in METHODS:
            aligned = step(roberta(), spec(method), batch, tokens, settings.device, bf16)
            # Same seed: in the first step the models differ by the loss alone.
            aligned.model.load_state_dict(stock.model.state_dict(), strict=False)
            if not bool(aligned().isfinite()):
                raise BenchmarkError(f"{method}: the loss is not finite; nothing was timed")
            timed = compare(aligned, stock, settings.repeats, settings.device)
            results[f"{method} {precision}"] = timed
            settings.say(f"{method} {precision}: {timed['ratio']['median']:.2f} times the stock step")
    return results


def memory(settings: Settings) -> dict[str, Any]:
    import torch

    from attnpatch.kernels.alignment import alignment_loss
    from attnpatch.kernels.alignment_networks import Critic, Discriminator, Navigator

    heads, tokens, dim = 4, 512, 64
    networks: dict[str, dict[str, Any]] = {
        "ct": {"navigator": Navigator(dim, dim), "critic": Critic(dim, dim)},
        "gan": {"discriminator": Discriminator(dim, dim)},
    }
    query, key = (torch.randn(1, heads, tokens, dim, device=settings.device).requires_grad_() for _ in range(2))
    results: dict[str, Any] = {"shape": [1, heads, tokens, dim], "matrix_elements": heads * tokens * tokens}
    for method in METHODS:
        extra = {name: net.to(settings.device) for name, net in networks.get(method, {}).items()}
        kept: dict[int, int] = {}

        def pack(x: Any, kept: dict[int, int] = kept) -> Any:
            kept[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            alignment_loss(query, key, method=method, **extra)
        results[method] = {"kept_elements": sum(kept.values()), "largest": max(kept.values())}
        settings.say(f"{method}: keeps {sum(kept.values()) / (heads * tokens * dim):.1f} times the queries' size")
        if max(kept.values()) >= heads * tokens * tokens:
            raise BenchmarkError(f"{method} keeps a T x S matrix")
    return results


PARTS = {"step": steps, "memory": memory}
