"""The measure of the alignment paper: the maximum mean discrepancy between keys and queries of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnpatch.functional import mmd
from attnpatch.registry import find_sites


@torch.no_grad()
def query_key_discrepancy(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], bandwidth: float | str = "median"
) -> dict[str, Any]:
    """Squared Gaussian-kernel MMD between the queries and keys of each head of each layer (Zhang et al. 2021).

    One problem for each sequence and head, over its tokens without padding; then the mean over sequences. With the
    heuristic bandwidths a problem's kernel has the width of its own distances, so that shrinking queries and keys
    does not make them look alike.

    Args:
        model: stock or patched, in evaluation mode. BERT and RoBERTa: queries and keys are what the projections give.
        batches: inputs of the model, on its device, with `attention_mask` [B, T].
        bandwidth: as in `attnpatch.functional.mmd`.

    Returns:
        `by_layer` (mean over heads), `mean` (over layers), `sum` (over heads and layers, as in the paper) and
        `examples`.
    """
    sites = find_sites(model)
    seen: dict[tuple[str, str], Tensor] = {}
    totals = {site.path: torch.zeros(site.num_heads, dtype=torch.float64) for site in sites}
    handles = []

    def watch(path: str, role: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[path, role] = output

        return hook

    count = 0
    try:
        for site in sites:
            for role in ("query", "key"):
                projection = model.get_submodule(site.family.projection_path(site.path, role))
                handles.append(projection.register_forward_hook(watch(site.path, role)))
        for batch in batches:
            model(**{name: value for name, value in batch.items() if name != "rows"})
            padding = ~batch["attention_mask"].bool()
            for site in sites:
                query, key = (
                    seen.pop((site.path, role)).unflatten(-1, (site.num_heads, site.head_dim)).transpose(1, 2)
                    for role in ("query", "key")
                )
                per_sequence = mmd(query, key, padding, padding, bandwidth, reduction="none")
                totals[site.path] += per_sequence.double().sum(0).cpu()
            count += len(padding)
    finally:
        for handle in handles:
            handle.remove()
    heads = [totals[site.path] / count for site in sites]
    by_layer = [float(values.mean()) for values in heads]
    return {
        "mean": sum(by_layer) / len(by_layer),
        "sum": float(torch.stack([values.sum() for values in heads]).sum()),
        "by_layer": by_layer,
        "examples": count,
        "bandwidth": bandwidth,
    }
