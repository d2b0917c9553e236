"""What the models of all runs share: the spec and backend in their config, and how a checkpoint is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from attnpatch.checkpoint_files import looks_local
from attnpatch.errors import CheckpointError, one_line, unknown
from attnpatch.loading import missing_keys, some
from attnpatch.registry import get_variant
from attnpatch.spec import AttentionSpec
from attnpatch.training.errors import ConfigError
from attnpatch.training.files import sha256_file
from attnpatch.training.pretrained import checkpoint_path


def on_cpu(training: Any) -> bool:
    """Whether a run with these training settings computes on the CPU."""
    return training.device == "cpu" or not torch.cuda.is_available()


def attention_backend(config: Any) -> str | None:
    """transformers' name of the backend for stock attention; None: transformers' own choice.

    `auto` takes eager on a CPU, where the backward of the fused kernel is nearly half of a step over short sentences
    (docs/training.md has the numbers), and transformers' choice elsewhere. So it does for another score than softmax:
    eager has to give the weights, and they would keep the fused score kernels out.
    """
    if config.training.attention != "auto":
        return config.training.attention
    return "eager" if on_cpu(config.training) and "score" not in _stages(config.spec) else None


def _stages(spec: Any) -> set[str]:
    """The stages that a spec replaces somewhere."""
    return {get_variant(name).stage for rule in AttentionSpec.parse(spec).rules for name in rule.variants}


def patched_config(config: Any, model_config: Any) -> Any:
    """A model's config with the spec of a run's config in it."""
    if config.spec is None:
        return model_config
    import attnpatch

    return attnpatch.patch_config(model_config, config.spec, init=config.init)


def from_scratch(config: Any, kind: type, model_config: Any) -> Any:
    """A model of the class `kind` with random weights, patched and with the backend as the run's config says."""
    model_config = patched_config(config, model_config)
    backend = attention_backend(config)
    if backend:
        model_config._attn_implementation = backend
    return kind(model_config)


def check_activation(name: str) -> None:
    """Raises ConfigError when transformers has no activation function of this name (`model.activation`)."""
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(unknown("value for model.activation:", name, ACT2FN))


def hub_arguments(config: Any) -> dict[str, Any]:
    """`model.revision` as an argument of `from_pretrained`, when there is one."""
    return {"revision": config.model.revision} if config.model.revision else {}


def checkpoint_identity(config: Any) -> dict[str, Any] | None:
    """What a run starts from: the name, and of a local folder the SHA-256 of its weights. None: from scratch.

    Raises CheckpointError for what can only be a folder, and is none.
    """
    name = config.model.pretrained
    if name is None:
        return None
    folder = Path(checkpoint_path(name)).expanduser()
    if folder.is_dir():
        weights = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        return {"name": name, "weights_sha256": [sha256_file(path) for path in weights]}
    if looks_local(name):
        raise CheckpointError(f"model.pretrained={name}: no such folder, so there is no checkpoint to start from")
    return {"name": name, "revision": config.model.revision}


def from_checkpoint(
    config: Any,
    auto: Any,
    prepare: Callable[[Any], None],
    patch: bool = True,
    may_be_new: Sequence[str] = (),
    **more: Any,
) -> Any:
    """The checkpoint `model.pretrained` in float32, converted to the run's spec while it loads, unless not `patch`.

    Args:
        auto: the class whose `from_pretrained` builds it.
        prepare: gets the checkpoint's config, may change it, and raises when it is of another kind.
        may_be_new: what may be random, as the checkpoint lacks it: beginnings of parameters' names.
        more: further arguments of `from_pretrained`.

    Raises:
        CheckpointError: it is missing or damaged, or lacks or holds weights that the model does not.
    """
    from transformers import AutoConfig

    path, hub = checkpoint_path(str(config.model.pretrained)), hub_arguments(config)
    with checkpoint_errors(path):
        model_config = AutoConfig.from_pretrained(path, **hub)
        prepare(model_config)
        # Loading converts on the fly: a patched config makes patched modules, filled from the stock weights.
        if patch:
            model_config = patched_config(config, model_config)
        backend = attention_backend(config)
        if backend:
            more["attn_implementation"] = backend
        return load_whole(auto, path, may_be_new, config=model_config, dtype=torch.float32, **hub, **more)


def load_whole(auto: Any, path: str, may_be_new: Sequence[str] = (), **arguments: Any) -> Any:
    """`auto.from_pretrained`, but no weight is random (transformers warns only), and no layer is left out.

    Heads that the model does not have may be in the checkpoint. Raises CheckpointError.
    """
    model, info = auto.from_pretrained(path, output_loading_info=True, **arguments)
    absent = sorted(key for key in missing_keys(info) if not key.startswith(tuple(may_be_new)))
    layers = sorted(key for key in info.get("unexpected_keys", ()) if re.search(r"(^|\.)layers?\.\d+\.", key))
    described = f"a {type(model).__name__} as its config.json describes it"
    if absent:
        raise CheckpointError(
            f"the checkpoint {path} lacks weights of {described} ({len(absent)}: {some(absent)}); they would be random"
        )
    if layers:
        raise CheckpointError(
            f"the checkpoint {path} has layers that are not in {described} ({len(layers)}: {some(layers)}); they "
            "would be lost"
        )
    return model


def override(model_config: Any, values: Mapping[str, Any]) -> None:
    """Sets what is not None in a model's config."""
    for name, value in values.items():
        if value is not None:
            setattr(model_config, name, value)


@contextmanager
def checkpoint_errors(path: str) -> Iterator[None]:
    """For a block that loads the model `path`: what goes wrong in it becomes a CheckpointError of one sentence."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = " (its model is in the folder model)" if (folder / "model" / "config.json").is_file() else ""
        raise CheckpointError(f"the folder {path} has no config.json, so it is not a model checkpoint{inside}")
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the model {path}: {one_line(error, 300)}") from error
