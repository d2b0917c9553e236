"""Tiny models of every family, site and head class, with weights large enough that attention matters."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MarianConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaModel,
)

import attnpatch

VOCAB = 64
PAD = 1
HIDDEN = 32
HEADS = 2
FAMILIES = ("bert", "roberta", "marian")

SPECS: dict[str, Any] = {
    "neural": "neural",
    "neural-other-preset": {"neural": {"preset": "OTHER"}},
    "linear": {"linear": {"form": "matched"}},
    "expressive": "expressive",
    "polynomial": {"polynomial": {"degree": 4}},
    "elu": "elu",
    "top_r": {"top_r": {"r": 3}},
    "value_aware": {"value_aware": {"r": 3}},
    "value_aware-centered": {"value_aware": {"r": 3, "selector": "centered"}},
    "query_value": "query_value",
    "query_value-tanh": {"query_value": {"phi": "tanh"}},
    "query_value-pooled": {"query_value": {"gate": "pooled"}, "sites": "encoder"},
    "alignment": "alignment",
    "all-stages": {"neural": {}, "expressive": {}, "top_r": {"r": 4}, "query_value": {}, "alignment": {}},
}
"""One spec for each variant, and for those forms of it that mix tokens differently."""

TRAINABLE = {
    "neural": "neural",
    "linear": "linear",
    "expressive": "expressive",
    "polynomial": "polynomial",
    "elu": "elu",
    "top_r": {"top_r": {"r": 3}},
    "value_aware": {"value_aware": {"r": 3, "selector": "centered"}},
    "query_value": "query_value",
    "alignment": {"alignment": {"weight": 1.0}},
}
"""One spec for each variant, in a form that has a gradient."""


def spec_for(name: str, family: str) -> Any:
    """An entry of SPECS; a family's own preset is the default, the other one is asked for by name."""
    spec = SPECS[name]
    if name == "neural-other-preset":
        return {"neural": {"preset": "roberta" if family == "marian" else "marian"}}
    return spec


def config(family: str, **changes: Any) -> Any:
    if family == "marian":
        values: dict[str, Any] = {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            # Not the encoder's number: nothing may take one for the other.
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 40,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "init_std": 0.3,
            "pad_token_id": PAD,
            "decoder_start_token_id": PAD,
            "eos_token_id": 2,
            "forced_eos_token_id": None,
            "scale_embedding": False,
        }
        return MarianConfig(**(values | changes))
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return {"bert": BertConfig, "roberta": RobertaConfig}[family](**(values | changes))


def head_classes(family: str) -> list[str]:
    """Every model class that transformers exports for a family; a new one is covered the day it appears."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    models = (n for n in modeling.__all__ if isinstance(getattr(modeling, n), type))
    return [
        n for n in models if issubclass(getattr(modeling, n), PreTrainedModel) and not n.endswith("PreTrainedModel")
    ]


def head(family: str, name: str, spec: Any = None, **changes: Any) -> Any:
    """A head class with random weights in evaluation mode, patched if a spec is given."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if name in ("BertLMHeadModel", "RobertaForCausalLM"):
        changes = {"is_decoder": True} | changes
    model = getattr(modeling, name)(config(family, **changes)).eval()
    shake(model)
    if spec is not None:
        attnpatch.patch(model, spec)
    return model


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Random biases and norms, which transformers starts at 0 and 1: a test should not pass because they are."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif "embed_positions" not in name and parameter.requires_grad is False:
            parameter.normal_()


def masked_lm(family: str, **changes: Any) -> Any:
    """The family's usual training head."""
    name = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "marian": "MarianMTModel"}[family]
    return head(family, name, **changes)


def encoder_decoder(family: str = "bert") -> EncoderDecoderModel:
    both = EncoderDecoderConfig.from_encoder_decoder_configs(
        config(family), config(family, is_decoder=True, add_cross_attention=True)
    )
    both.decoder_start_token_id, both.pad_token_id, both.eos_token_id = 0, PAD, 2
    model = EncoderDecoderModel(both).eval()
    shake(model)
    return model


def tokens(*shape: int) -> Tensor:
    """Random token ids without the special ones."""
    return torch.randint(4, VOCAB, shape)


def batch_of(model: Any, length: int = 9, labels: bool = True) -> dict[str, Tensor]:
    """Inputs of a language model or Marian, with padding in the second sequence and labels -100 there."""
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0
    ids[mask == 0] = PAD
    batch = {"input_ids": ids, "attention_mask": mask}
    if labels:
        target = tokens(2, length)
        target[mask == 0] = -100
        batch["labels"] = target
    return batch


@dataclass
class Place:
    """A family's model at one of its sites, and how to run it with some tokens hidden from that site."""

    family: str
    site: str

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        if self.family == "marian":
            model = masked_lm("marian")
        elif self.site == "encoder":
            name = {"bert": BertModel, "roberta": RobertaModel}[self.family].__name__
            model = head(self.family, name)
        else:
            cls = {"bert": BertLMHeadModel, "roberta": RobertaForCausalLM}[self.family]
            model = head(self.family, cls.__name__, is_decoder=True, add_cross_attention=self.site == "cross")
        return model.to(dtype)

    def __str__(self) -> str:
        return f"{self.family}-{self.site}"


PLACES = [Place(family, site) for family in FAMILIES for site in ("encoder", "decoder", "cross")]


def is_defined(spec_name: str, place: Place) -> bool:
    """Whether the spec does something at the place: alignment has no cross-attention, pooling only the encoder."""
    if spec_name == "query_value-pooled":
        return place.site == "encoder"
    return not (spec_name == "alignment" and place.site == "cross")


def cases() -> Iterator[tuple[Place, str]]:
    for place in PLACES:
        for name in SPECS:
            if is_defined(name, place):
                yield place, name


@torch.no_grad()
def wake(model: nn.Module) -> nn.Module:
    """Open the gates that a preserving start leaves shut, so that a query_value model does what it is for."""
    for name, parameter in model.named_parameters():
        if name.endswith("aggregate.strength"):
            parameter.fill_(1.0)
        elif name.endswith("aggregate.gate_bias"):
            parameter.zero_()
    return model


def patched_at(place: Place, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The place's model, patched at that site alone where the spec leaves it open."""
    model = place.build()
    spec = spec_for(name, place.family)
    sites = None if name in ("query_value-pooled",) else place.site
    if name == "all-stages" and place.site == "cross":
        spec = {key: value for key, value in spec.items() if key != "alignment"}
    attnpatch.patch(model, spec, sites=sites)
    return wake(model).to(dtype)


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether names, order, dtypes and bits of the state are as they were."""
    now = model.state_dict()
    return list(now) == list(state) and all(
        torch.equal(now[k], state[k]) and now[k].dtype == state[k].dtype for k in now
    )
