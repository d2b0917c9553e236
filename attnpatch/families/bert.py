"""BERT: encoder, decoder (`is_decoder`) and cross-attention (`add_cross_attention`)."""

from __future__ import annotations

from torch import nn

from attnpatch.families.base import Family
from attnpatch.registry import register_family

_MODELING = "transformers.models.bert.modeling_bert"


def _self_attention_kind(module: nn.Module, path: str) -> str:
    return "decoder" if module.is_causal or getattr(module, "is_decoder", False) else "encoder"


BERT = register_family(
    Family(
        name="bert",
        model_types=("bert",),
        attention_classes={
            f"{_MODELING}.BertSelfAttention": _self_attention_kind,
            f"{_MODELING}.BertCrossAttention": "cross",
        },
        projections={"query": "query", "key": "key", "value": "value", "output": "../output.dense"},
        num_heads="num_attention_heads",
        head_dim="attention_head_size",
        defaults={"neural": {"preset": "roberta"}, "linear": {"preset": "roberta"}},
    )
)
