"""Models whose weights are spread over processes: how they are split (FSDP2), filled and collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def layers(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost nn.ModuleLists: a transformer's layers, encoder's and decoder's."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else layers(child)
    return found


def shard(model: nn.Module, reshard_after_forward: bool | None = None, **options: Any) -> nn.Module:
    """Spreads every parameter over all processes with torch's `fully_shard`, in place, one group a layer.

    All that is outside the layers is one group with the model itself. accelerate 1.15 would give the embeddings a
    group of their own, and torch refuses that where weights are tied across it, as those of a Marian or a RoBERTa are,
    stock or patched.

    Args:
        reshard_after_forward: whether a layer's weights are given up between forward and backward; None is torch's
            choice (yes for layers, no for the rest).
        options: others of `fully_shard`: mesh, mp_policy, offload_policy.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in layers(model):
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, **options)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was here, or accelerate's FSDP2."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def plugin_options(plugin: Any) -> dict[str, Any]:
    """What accelerate's FSDP plugin was configured with, as arguments of `shard`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }
    return options | ({"offload_policy": plugin.cpu_offload} if plugin.cpu_offload else {})


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts whole tensors, which every process has, into a model that may be sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    own = model.state_dict()
    for name, value in state.items():
        target = own[name]
        value = value.to(target.dtype)
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)
