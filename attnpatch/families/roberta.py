"""RoBERTa: encoder, decoder (`is_decoder`) and cross-attention (`add_cross_attention`)."""

from __future__ import annotations

from torch import nn

from attnpatch.families.base import Family
from attnpatch.registry import register_family

_MODELING = "transformers.models.roberta.modeling_roberta"


def _self_attention_kind(module: nn.Module, path: str) -> str:
    return "decoder" if module.is_causal or getattr(module, "is_decoder", False) else "encoder"


ROBERTA = register_family(
    Family(
        name="roberta",
        model_types=("roberta",),
        attention_classes={
            f"{_MODELING}.RobertaSelfAttention": _self_attention_kind,
            f"{_MODELING}.RobertaCrossAttention": "cross",
        },
        projections={"query": "query", "key": "key", "value": "value", "output": "../output.dense"},
        num_heads="num_attention_heads",
        head_dim="attention_head_size",
        defaults={"neural": {"preset": "roberta"}, "linear": {"preset": "roberta"}},
        # Padding has the position pad_token_id.
        first_position=lambda config: 1 + (config.pad_token_id or 0),
    )
)
