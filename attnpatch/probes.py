"""Inputs that any model of a family accepts, and its outputs on them: how conversion and verification measure."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnpatch.registry import find_sites, get_variant
from attnpatch.spec import AttentionSpec

LENGTH = 12
"""Tokens of the longest probe sequence."""
SHORT = 8
"""The same where time counts: conversion should cost little over copying."""

_OUTPUTS = (
    "logits",
    "prediction_logits",
    "seq_relationship_logits",
    "start_logits",
    "end_logits",
    "last_hidden_state",
    "pooler_output",
)


@dataclass(frozen=True)
class Probe:
    """Random inputs for one model.

    Attributes:
        kind: "encoder", "decoder" (causal, no source side) or "seq2seq".
        inputs: keyword arguments of the model's forward pass; the second sequence is padded on the right.
        valid: tokens of the model's output side that are no padding, [B, T].
        has_cross: whether a decoder also attends to given encoder states.
    """

    kind: str
    inputs: dict[str, Tensor]
    valid: Tensor
    has_cross: bool = False


def length_for(spec: AttentionSpec, model: nn.Module) -> int:
    """Tokens of a probe that are few, and yet enough for every variant of a spec to differ from the stock form."""
    least = SHORT
    for site in find_sites(model):
        for rule in spec.rules:
            for name in rule.variants:
                shows_at = get_variant(name).shows_at(rule.options(name, site.family), site)
                least = max(least, shows_at + 4 if shows_at > 1 else 0)
    return least


def parameters_of(model: nn.Module) -> set[str]:
    """Names of the arguments that the model's forward pass takes."""
    return set(inspect.signature(model.forward).parameters)


def make_probe(model: Any, seed: int = 0, length: int = LENGTH, batch: int = 2) -> Probe:
    """Random tokens with padding, of the form that the model's head takes.

    Args:
        model: a transformers model of a supported family.
        seed: of the tokens. length: of the longest sequence. batch: number of sequences; those after the first
            are padded.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    kind = _kind(model)
    positions = int(getattr(config, "max_position_embeddings", 0) or 512)
    # RoBERTa counts its positions from pad_token_id + 1; Marian's padding is the last token of its vocabulary.
    offset = _pad_token(config) + 1 if _pad_token(config) < positions // 2 else 0
    length = max(2, min(length, positions - offset))
    size = int(config.vocab_size)
    if kind == "decoder":
        size = int(getattr(config, "decoder_vocab_size", None) or size)
    ids = random_tokens(config, (batch, length), size, generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        kept = max(1, length - 2 - row)
        mask[row, kept:] = 0
    pad = _pad_token(config)
    ids = torch.where(mask.bool(), ids, torch.full_like(ids, pad))
    inputs = {"input_ids": ids, "attention_mask": mask}
    valid = mask.bool()
    has_cross = False
    if kind == "seq2seq":
        target_size = int(getattr(config, "decoder_vocab_size", None) or size)
        target = random_tokens(config, (batch, length - 1), target_size, generator)
        start = getattr(config, "decoder_start_token_id", None)
        target[:, 0] = pad if start is None else start
        inputs["decoder_input_ids"] = target
        valid = torch.ones_like(target, dtype=torch.bool)
    elif "encoder_hidden_states" in parameters_of(model) and any(s.kind == "cross" for s in find_sites(model)):
        has_cross = True
        width = int(config.hidden_size)
        inputs["encoder_hidden_states"] = torch.randn(batch, length + 1, width, generator=generator)
        cross_mask = torch.ones(batch, length + 1, dtype=torch.long)
        cross_mask[1:, length - 2 :] = 0
        inputs["encoder_attention_mask"] = cross_mask
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: value.unsqueeze(0) for name, value in inputs.items()}
    return Probe(kind, inputs, valid, has_cross)


def random_tokens(config: Any, shape: tuple[int, ...], size: int, generator: torch.Generator) -> Tensor:
    """Token ids [shape] below `size` that are no special tokens, as far as the config names them."""
    special: set[Any] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"):
        value = getattr(config, name, None)
        special.update(value if isinstance(value, (list, tuple)) else [value])
    allowed = torch.tensor([i for i in range(min(size, 4096)) if i not in special] or [0])
    return allowed[torch.randint(len(allowed), shape, generator=generator)]


def _pad_token(config: Any) -> int:
    pad = getattr(config, "pad_token_id", None)
    return 0 if pad is None else int(pad)


def _kind(model: Any) -> str:
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters_of(model):
        return "seq2seq"
    kinds = {site.kind for site in find_sites(model)}
    return "decoder" if "decoder" in kinds and "encoder" not in kinds else "encoder"


@torch.no_grad()
def outputs_of(model: Any, probe: Probe, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What the model gives for a probe, in float32; token outputs [N, ...] without the padded positions.

    `dtype` is that of floating-point inputs; None is the model's own.
    """
    model.eval()
    device = next(model.parameters()).device
    if dtype is None:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs: dict[str, Any] = {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        for name, value in probe.inputs.items()
    }
    if "use_cache" in parameters_of(model):
        inputs["use_cache"] = False
    return collect(model(**inputs), probe.valid)


def collect(result: Mapping[str, Any], valid: Tensor | None) -> dict[str, Tensor]:
    """The named outputs of a model, valid tokens only."""
    found: dict[str, Tensor] = {}
    for name in _OUTPUTS:
        value = result.get(name)
        if not isinstance(value, Tensor):
            continue
        value = value.float().cpu()
        if valid is not None and value.shape[:2] == valid.shape and name != "pooler_output":
            value = value[valid]
        found[name] = value
    return found


@dataclass(frozen=True)
class Drift:
    """Absolute difference of two models' outputs: the largest, the mean, and the largest of each output by name."""

    max: float
    mean: float
    outputs: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {"max": self.max, "mean": self.mean, "outputs": self.outputs}


def drift(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Drift:
    """Compare two models' outputs on one probe; a value that is not finite counts as infinitely far."""
    shared = [name for name in first if name in second and first[name].shape == second[name].shape]
    if not shared:
        return Drift(float("inf"), float("inf"), {})
    gaps = {name: (first[name].double() - second[name].double()).abs().nan_to_num(nan=float("inf")) for name in shared}
    count = sum(gap.numel() for gap in gaps.values())
    return Drift(
        max=max(float(gap.max()) for gap in gaps.values()),
        mean=sum(float(gap.sum()) for gap in gaps.values()) / count,
        outputs={name: float(gap.max()) for name, gap in gaps.items()},
    )


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Let a bf16 or fp16 model compute in float32: each module's own weights are widened while it runs.

    The weights stay what they are, and no second copy of the model is made.
    """
    handles = []
    kept: dict[tuple[nn.Module, str], Tensor] = {}

    def widen(module: nn.Module, args: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                kept[module, name] = parameter.data
                parameter.data = parameter.data.float()
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                kept[module, name] = buffer
                module._buffers[name] = buffer.float()

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, value in own.items():
            original = kept.pop((module, name), None)
            if original is None:
                continue
            if isinstance(value, nn.Parameter):
                value.data = original
            else:
                module._buffers[name] = original

    narrow = any(t.is_floating_point() and t.dtype != torch.float32 for t in [*model.parameters(), *model.buffers()])
    if narrow:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None or module._buffers:
                handles.append(module.register_forward_pre_hook(widen))
                handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
