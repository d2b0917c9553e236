"""What generating costs: each variant's Marian over the stock one, with the cache, greedy and with 5 beams.

queries attention of single queries, those of a step, in C over F.scaled_dot_product_attention; keys lie in memory as
        the cache of translation has them, for each row or once for the beams of a sentence
marian  both sides generate the same number of tokens (min_length = max_length) of a batch with padding, the models
        with random weights: time, tokens a second, peak memory. Variants that only add a training loss are left out
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

from attnpatch.bench.steps import marian, patched_or_stock, specs
from attnpatch.bench.timing import BenchmarkError, Settings, check_close, compare, peak_bytes
from attnpatch.registry import get_variant

SOURCES, LENGTH, NEW_TOKENS = 8, 24, 16
BEAMS = {"greedy": 1, "5 beams": 5}


class Generation:
    """A Marian, stock or patched, that generates NEW_TOKENS tokens for each source."""

    def __init__(self, spec: Any, device: str) -> None:
        import torch

        torch.manual_seed(0)
        cls, config = marian()
        # Larger than usual, so that the best token of a random model does not hang on rounding.
        config.init_std = 0.1
        self.model = patched_or_stock(cls, config, spec).to(device).eval()
        ids = torch.randint(5, 2000, (SOURCES, LENGTH), device=device)
        mask = torch.ones_like(ids)
        mask[::2, -LENGTH // 4 :] = 0
        self.inputs = {"input_ids": ids, "attention_mask": mask}

    def __call__(self, beams: int, use_cache: bool = True) -> Any:
        """Token ids [SOURCES, 1 + NEW_TOKENS], the first of them the start of the decoder."""
        longest = 1 + NEW_TOKENS
        return self.model.generate(
            **self.inputs, num_beams=beams, min_length=longest, max_length=longest, use_cache=use_cache, do_sample=False
        )

    def check(self, label: str) -> float:
        """The share of sources whose greedy tokens are the same without the cache.

        Raises:
            BenchmarkError: too few, or not as many tokens as asked for.
        """
        cached, plain = (self(1, use_cache) for use_cache in (True, False))
        if cached.shape != (SOURCES, 1 + NEW_TOKENS):
            raise BenchmarkError(f"{label} generated {tuple(cached.shape)} tokens; nothing was timed")
        same = float((cached == plain).all(-1).float().mean())
        if same < 0.9:
            raise BenchmarkError(f"{label}: with the cache {1 - same:.0%} of the outputs differ; nothing was timed")
        return same


def generate(settings: Settings) -> dict[str, Any]:
    count = SOURCES * NEW_TOKENS
    results: dict[str, Any] = {"peer": "the stock model's generate", "sources": SOURCES, "tokens": count}
    stock = Generation(None, settings.device)
    stock.check("stock")
    peer_peak = peak_bytes(partial(stock, BEAMS["5 beams"]), settings.device)
    for label, spec in specs().items():
        name = spec if isinstance(spec, str) else spec["variant"]
        if get_variant(name).stage == "regularise":
            continue
        variant = Generation(spec, settings.device)
        same = variant.check(label)
        results[label] = {}
        for how, beams in BEAMS.items():
            timed = compare(partial(variant, beams), partial(stock, beams), settings.repeats, settings.device)
            results[label][how] = timed | {
                "tokens_per_second": count / timed["seconds"]["median"],
                "peer_tokens_per_second": count / timed["peer_seconds"]["median"],
                "same_without_cache": same,
            }
        peak = peak_bytes(partial(variant, BEAMS["5 beams"]), settings.device)
        results[label]["5 beams"] |= {"peak_bytes": peak, "peer_peak_bytes": peer_peak, "memory": peak / peer_peak}
        shown = ", ".join(f"{how} {results[label][how]['ratio']['median']:.2f}" for how in BEAMS)
        settings.say(f"{label}: {shown} times the stock model's time")
    return results


ROWS, HEADS, HEAD_DIM, SHARED = 240, 4, 64, 5
"""Of single queries: beams of a batch, as the training script translates a test set, and how many share a source."""


def queries(settings: Settings) -> dict[str, Any]:
    """Raises BenchmarkError: a result is wrong."""
    import torch
    import torch.nn.functional as F

    from attnpatch.kernels import compiled, decode_native
    from attnpatch.kernels.score import plain_attention

    if reason := compiled.why_not("decode_native"):
        return {"left_out": f"attention of single queries is not compiled: {reason}"}
    results: dict[str, Any] = {"peer": "F.scaled_dot_product_attention, softmax, of the same dtype, keys once a row"}
    torch.manual_seed(0)
    scale = HEAD_DIM**-0.5
    kinds = (("softmax", 1), ("softmax", SHARED), ("expressive", 1))
    for dtype, keys, (kernel, shared) in itertools.product((torch.float32, torch.bfloat16), (16, 48, 256), kinds):
        query = torch.randn(ROWS, HEADS, 1, HEAD_DIM).to(dtype)
        key, value = (
            torch.randn(keys, ROWS // shared, HEADS, HEAD_DIM).to(dtype).permute(1, 2, 0, 3) for _ in range(2)
        )
        mask = torch.ones(ROWS // shared, 1, 1, keys, dtype=torch.bool)
        mask[::2, ..., -keys // 4 :] = False
        keys_of_all, values_of_all, mask_of_all = (x.repeat_interleave(shared, 0) for x in (key, value, mask))
        ours = partial(decode_native.decode_attention, query, key, value, mask, scale, kernel)
        peer = partial(F.scaled_dot_product_attention, query, keys_of_all, values_of_all, mask_of_all)
        name = f"{kernel}, keys once for {shared} rows" if shared > 1 else kernel
        label = f"{name}, {str(dtype).removeprefix('torch.')}, {keys} keys"
        q, k, v = (x.double() for x in (query, keys_of_all, values_of_all))
        wanted = plain_attention(q, k, v, mask_of_all, 0.0, False, scale, kernel=kernel)
        check_close(label, ours(), wanted, 1e-5 if dtype == torch.float32 else 1e-2)
        results[label] = compare(_often(ours), _often(peer), settings.repeats)
        settings.say(f"{label}: {results[label]['ratio']['median']:.2f} times SDPA")
    return results


def _often(function: Callable[[], Any], times: int = 20) -> Callable[[], None]:
    """A call is over in parts of a millisecond."""

    def calls() -> None:
        for _ in range(times):
            function()

    return calls


CPU_PARTS = ("queries",)
PARTS = {"queries": queries, "marian": generate}
