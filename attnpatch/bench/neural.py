"""What neural projections cost beyond their arithmetic.

step   a neural model's training step over the stock step, divided by the ratio of their FLOPs
fused  the first layers of q, k and v as one product of concatenated weights, against three products
"""

from __future__ import annotations

from typing import Any

from attnpatch.bench.steps import marian, over_flops, roberta, step
from attnpatch.bench.timing import BenchmarkError, Settings, check_close, compare


def steps(settings: Settings) -> dict[str, Any]:
    results: dict[str, Any] = {"peer": "the stock model's step"}
    cases = {
        "roberta preset, RoBERTa T = 128": (roberta(), "roberta", 4, 128),
        "marian preset, Marian T = 32": (marian(), "marian", 32, 32),
    }
    for name, (architecture, preset, batch, tokens) in cases.items():
        spec = {"variant": "neural", "options": {"neural": {"preset": preset}}}
        for bf16 in (False, True):
            stock = step(architecture, None, batch, tokens, settings.device, bf16)
            neural = step(architecture, spec, batch, tokens, settings.device, bf16)
            if not bool(neural().isfinite()):
                raise BenchmarkError(f"{name}: the loss is not finite; nothing was timed")
            timed = compare(neural, stock, settings.repeats, settings.device)
            over = over_flops(timed, neural.model, stock.model, batch, tokens)
            label = f"{name}, {'bf16' if bf16 else 'float32'}"
            results[label] = timed | over
            median = over["time_ratio_over_flops_ratio"]["median"]
            settings.say(f"{label}: {timed['ratio']['median']:.2f} times stock, {median:.2f} over the FLOPs' ratio")
    return results


def fused(settings: Settings) -> dict[str, Any]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    results: dict[str, Any] = {"peer": "three separate first layers; forward and backward of three MLPs"}
    for width, rows in ((768, 512), (256, 2048)):
        x = torch.randn(rows, width, device=settings.device).requires_grad_()
        ups = [nn.Linear(width, 2 * width, device=settings.device) for _ in range(3)]
        downs = [nn.Linear(2 * width, width, device=settings.device) for _ in range(3)]
        leaves = [x, *(p for layer in ups + downs for p in layer.parameters())]

        def separate(x: Any = x, ups: Any = ups, downs: Any = downs) -> Any:
            return torch.cat([down(torch.relu(up(x))) for up, down in zip(ups, downs, strict=True)], -1)

        def together(x: Any = x, ups: Any = ups, downs: Any = downs) -> Any:
            weight, bias = torch.cat([up.weight for up in ups]), torch.cat([up.bias for up in ups])
            parts = torch.relu(F.linear(x, weight, bias)).chunk(3, -1)
            return torch.cat([down(part) for down, part in zip(downs, parts, strict=True)], -1)

        check_close("the fused form", together(), separate(), 1e-5)
        timed = compare(
            lambda: torch.autograd.grad(together().sum(), leaves),  # noqa: B023 - called before the next round
            lambda: torch.autograd.grad(separate().sum(), leaves),  # noqa: B023
            settings.repeats,
            settings.device,
        )
        results[f"width {width}, {rows} tokens"] = timed
        settings.say(f"width {width}: one product takes {timed['ratio']['median']:.2f} times three")
    return results


PARTS = {"step": steps, "fused": fused}
