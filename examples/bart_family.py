"""BART as a fourth family: import this file, and BART models can be patched, saved and loaded as patched."""

from __future__ import annotations

from torch import nn

from attnpatch import register_family
from attnpatch.families.base import Family


def kind(module: nn.Module, path: str) -> str:
    if path.endswith("encoder_attn"):
        return "cross"
    return "decoder" if module.is_decoder else "encoder"


BART = register_family(
    Family(
        name="bart",
        model_types=("bart",),
        attention_classes={"transformers.models.bart.modeling_bart.BartAttention": kind},
        projections={"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"},
        num_heads="num_heads",
        head_dim="head_dim",
        defaults={"neural": {"preset": "marian"}, "linear": {"preset": "marian"}},
    )
)
