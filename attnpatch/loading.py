"""from_pretrained for patched models: stock checkpoints are converted on the way, damaged ones are refused."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from typing import Any

from attnpatch.errors import CheckpointError, SpecError
from attnpatch.integration import asks_for_attnpatch, spec_of
from attnpatch.spec import AttentionSpec

_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def load_patched(load: Callable[..., Any], source: Any, config: Any, arguments: dict[str, Any]) -> Any:
    """What `from_pretrained` does once attnpatch is imported.

    Args:
        load: transformers' own `from_pretrained`, bound to the class and the checkpoint.
        source: folder or hub id, or None when the weights are given as a state dict.
        config: the config that the caller gave, if any.
        arguments: the other keyword arguments.

    Raises:
        CheckpointError: attention weights are missing or unexpected, or a patched checkpoint would be
            loaded as a stock model.
        SpecError: the config asks for another spec than the checkpoint holds.
    """
    from transformers import PreTrainedConfig

    if config is None:
        return _load_and_check(load, config, arguments)
    by_path = not isinstance(config, PreTrainedConfig)
    asked = _held_spec(config, arguments) if by_path else spec_of(config)
    # AutoModel hands over the checkpoint's own config. A folder is cheap enough to be looked into all the same.
    own = str(getattr(config, "_name_or_path", "")) == str(source)
    if asked is None and own and not os.path.isdir(source):
        return load(config=config, **arguments)
    held = asked if source is None else _held_spec(source, arguments)
    if asked is None and held is None:
        return load(config=config, **arguments)
    if asked is None:
        raise CheckpointError(
            f"{source} is a checkpoint patched with {AttentionSpec.from_dict(held or {})}, but the given config is "
            "stock: its attention weights would be random. Leave the config out, or load it from the checkpoint"
        )
    if held is None and not by_path:
        return _load_stock_and_patch(load, config, arguments)
    if held is not None and not AttentionSpec.from_dict(asked).same_attention(AttentionSpec.from_dict(held)):
        raise SpecError(
            f"the config asks for {AttentionSpec.from_dict(asked)}, but {source} holds "
            f"{AttentionSpec.from_dict(held)}; start from the stock checkpoint, or `attnpatch revert` it first"
        )
    return _load_and_check(load, config, arguments)


def _held_spec(source: Any, arguments: dict[str, Any]) -> Any:
    """The spec in the checkpoint's own config.json."""
    from transformers import PreTrainedConfig

    hub = {name: arguments[name] for name in _HUB_ARGUMENTS if arguments.get(name) is not None}
    try:
        found, _ = PreTrainedConfig.get_config_dict(source, **hub)
    except OSError:
        return None
    return found.get("attnpatch") or None


def _load_stock_and_patch(load: Callable[..., Any], config: Any, arguments: dict[str, Any]) -> Any:
    from transformers.integrations import is_deepspeed_zero3_enabled

    from attnpatch.patching import patch

    if is_deepspeed_zero3_enabled():
        raise CheckpointError(
            "under DeepSpeed ZeRO-3 a stock checkpoint cannot be patched while it loads: its weights, from which the "
            "new parameters are made, are spread over the processes at once. Convert it first (attnpatch convert) and "
            "load the result"
        )
    spec = AttentionSpec.from_dict(config.attnpatch)
    stock = copy.deepcopy(config)
    del stock.attnpatch
    if asks_for_attnpatch(arguments.get("attn_implementation")):
        del arguments["attn_implementation"]  # the config says so, and the model is stock until it is patched
    with_info = arguments.pop("output_loading_info", False)
    model, info = load(config=stock, output_loading_info=True, **arguments)
    _check_stock_keys(model, info)
    training = model.training
    patch(model, spec)
    model.train(training)
    return (model, info) if with_info else model


def _load_and_check(load: Callable[..., Any], config: Any, arguments: dict[str, Any]) -> Any:
    with_info = arguments.pop("output_loading_info", False)
    model, info = load(config=config, output_loading_info=True, **arguments)
    _check_keys(model, info)
    return (model, info) if with_info else model


def _check_stock_keys(model: Any, info: dict[str, Any]) -> None:
    """What is to be patched must have come from the checkpoint: new projections are made from it."""
    from attnpatch.registry import find_sites

    # Cross-attention may be new: an encoder's checkpoint that starts a decoder has none.
    paths = [site.path + "." for site in find_sites(model) if site.kind != "cross"]
    starts = _with_base(model, paths)
    missing = missing_keys(info)
    bad = sorted(key for key in (*missing, *info.get("unexpected_keys", ())) if key.startswith(starts))
    if bad:
        raise CheckpointError(
            f"the checkpoint has no config.json with a spec, and its attention weights are not the stock ones "
            f"({some(bad)}): they would be random or lost"
        )


def missing_keys(info: dict[str, Any]) -> list[str]:
    """Keys whose parameters did not come from the checkpoint: absent ones, and those of another shape."""
    mismatched = [key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys", ())]
    return [*info.get("missing_keys", ()), *mismatched]


def _with_base(model: Any, paths: list[str]) -> tuple[str, ...]:
    """Key prefixes: a checkpoint's may carry the base model's where the model's do not, or the other way round."""
    base = getattr(model, "base_model_prefix", "")
    return tuple(paths + [p.removeprefix(base + ".") for p in paths] + [f"{base}.{p}" for p in paths])


def _check_keys(model: Any, info: dict[str, Any]) -> None:
    """Attention weights of a patched model must all come from the checkpoint, and all be used."""
    from attnpatch.patching import patched_modules
    from attnpatch.registry import find_sites

    if not patched_modules(model):
        return
    prefixes, layers = [], []
    for site in find_sites(model):
        prefixes.append(site.path + ".")
        layers += re.findall(r"^.*?\.\d+\.", site.path)
        prefixes += [site.family.projection_path(site.path, role) + "." for role in site.family.projections]
    # What is missing may be anything in a patched model's layers; heads and poolers may be new.
    missing = sorted(key for key in missing_keys(info) if key.startswith(_with_base(model, prefixes + layers)))
    unexpected = sorted(key for key in info.get("unexpected_keys", ()) if key.startswith(_with_base(model, prefixes)))
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} weights of its layers ({some(missing)})")
    if unexpected:
        parts.append(f"holds {len(unexpected)} attention weights that the spec has no place for ({some(unexpected)})")
    raise CheckpointError(
        f"the checkpoint {' and '.join(parts)}; they would be random or lost. It may have been patched with another "
        "spec, or its weights overwritten: convert it again"
    )


def some(keys: list[str], count: int = 3) -> str:
    """The first keys, in words."""
    shown = ", ".join(keys[:count])
    return f"{shown}, ..." if len(keys) > count else shown
