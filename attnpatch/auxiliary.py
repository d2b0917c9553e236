"""The training loss of the regularise stage: how it gets from the attention modules into `outputs.loss`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from attnpatch.errors import PatchError
from attnpatch.pipeline import AttentionPipeline, pipeline_of

_HOOKS = "_attnpatch_hooks"
_PARAMETERS = "_attnpatch_parameters"
_COUNTS_ITEMS = "_attnpatch_counts_items"
_NO_DATA_PARALLEL = (
    "a regularised model cannot train under torch.nn.DataParallel, whose replicas would share one loss: launch one "
    "process for each GPU (accelerate launch, torchrun)"
)
_LABELS = ("labels", "next_sentence_label", "start_positions")


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The weighted regularisation loss of the model's latest forward pass in training, summed over layers.

    It is part of `outputs.loss` already when labels were given to the model. A loop that forms its loss from the
    logits instead (a label smoother, say) has to add it.

    Args:
        model: a patched model, or any wrapper of one (DistributedDataParallel, PEFT, torch.compile).

    Returns:
        A scalar; zero when nothing regularises or the last forward pass was in evaluation mode.
    """
    if isinstance(model, nn.DataParallel):
        raise PatchError(_NO_DATA_PARALLEL)
    total: Tensor | None = None
    for pipeline in _pipelines(model):
        loss = pipeline.slot.loss
        if loss is not None:
            total = loss if total is None else total + loss.to(total.device)
    if total is None:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=parameter.device if parameter is not None else None)
    if model.training and torch.is_grad_enabled() and not total.requires_grad and _trains_attention(model):
        raise PatchError(
            "the regularisation loss lost its gradient: reentrant gradient checkpointing runs the layers without one. "
            "Use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    return total


def install_loss_hooks(model: nn.Module) -> None:
    """Make `outputs.loss` of `model` carry the auxiliary loss. Hooks of models inside it are replaced."""
    remove_loss_hooks(model)
    if not any(pipeline.regularise is not None for pipeline in _pipelines(model)):
        return
    model.__dict__[_PARAMETERS] = tuple(inspect.signature(model.forward).parameters)
    model.__dict__[_COUNTS_ITEMS] = _counts_items(type(model))
    model.__dict__[_HOOKS] = [
        model.register_forward_pre_hook(_before_forward, with_kwargs=True),
        model.register_forward_hook(_after_forward, with_kwargs=True),
    ]


def has_loss_hooks(model: Any) -> bool:
    """Whether calling `model` adds an auxiliary loss."""
    return _HOOKS in getattr(model, "__dict__", {})


def remove_loss_hooks(model: nn.Module) -> None:
    """Take the hooks out of `model` and of every model inside it."""
    for module in model.modules():
        for handle in module.__dict__.pop(_HOOKS, ()):
            handle.remove()
        module.__dict__.pop(_PARAMETERS, None)
        module.__dict__.pop(_COUNTS_ITEMS, None)


def _pipelines(model: nn.Module) -> list[AttentionPipeline]:
    return [p for p in map(pipeline_of, model.modules()) if p is not None]


# The hooks take the model from their arguments and nothing from a closure, so that a deep copy of a model
# reads its own slots.


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Empty the slots (layer drop may skip a layer), and tell decoder sites which target tokens are padding:
    Marian's training gives the decoder no mask, as causality hides right padding from the stock attention."""
    if getattr(model, "_is_replica", False) and model.training:
        raise PatchError(_NO_DATA_PARALLEL)
    target_valid = _target_valid(model, args, kwargs)
    for pipeline in _pipelines(model):
        pipeline.slot.loss = None
        pipeline.query_valid = target_valid if pipeline.kind == "decoder" else None


def _target_valid(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    names = model.__dict__.get(_PARAMETERS, ())
    if "decoder_input_ids" not in names:
        return None
    given = dict(zip(names, args, strict=False)) | kwargs
    mask = given.get("decoder_attention_mask")
    if mask is not None:
        return mask.bool() if mask.dim() == 2 else None
    labels, ids = given.get("labels"), given.get("decoder_input_ids")
    if labels is not None and labels.dim() == 2:
        # Some collators pad labels with the padding token.
        pad = getattr(model.config, "pad_token_id", None)
        valid = labels != -100
        return valid if pad is None else valid & (labels != pad)
    pad = getattr(model.config, "pad_token_id", None)
    if ids is None or pad is None:
        return None
    # Marian starts its targets with the padding token; that one is real.
    valid = ids != pad
    valid[:, 0] = True
    return valid


def _after_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if not model.training:
        return None
    names = model.__dict__.get(_PARAMETERS, ())
    given = dict(zip(names, args, strict=False)) | kwargs
    loss = getattr(output, "loss", None)
    is_tuple = isinstance(output, tuple)
    if is_tuple and any(given.get(name) is not None for name in _LABELS):
        loss = output[0]
    # Some heads give no loss for some labels (pretraining without the next sentence): a tuple then has logits first.
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        return None
    extra = auxiliary_loss(model)
    if model.__dict__.get(_COUNTS_ITEMS):
        extra = extra * _share_of_items(model, given)
    loss = loss + extra.to(loss.device)
    if is_tuple:
        return (loss, *output[1:])
    output.loss = loss
    return output


def _counts_items(cls: type) -> bool:
    """Whether the model's loss is a sum over `num_items_in_batch`, the labels of a whole optimiser step."""
    forwards = [inspect.unwrap(base.__dict__["forward"]) for base in cls.__mro__ if "forward" in base.__dict__]
    return any("loss_function" in f.__code__.co_names for f in forwards if hasattr(f, "__code__"))


def _share_of_items(model: nn.Module, given: dict[str, Any]) -> Any:
    """This batch's part of an optimiser step that gathers several (`gradient_accumulation_steps`), else 1."""
    items, labels = given.get("num_items_in_batch"), given.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    if str(getattr(model, "loss_type", "")).startswith("ForCausalLM"):
        labels = labels[..., 1:]
    return (labels != -100).sum() / items


def _trains_attention(model: nn.Module) -> bool:
    return any(
        parameter.requires_grad
        for module in model.modules()
        if (pipeline := pipeline_of(module)) is not None and pipeline.slot.loss is not None
        for parameter in module.parameters()
    )
