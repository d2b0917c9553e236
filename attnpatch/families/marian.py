"""Marian: encoder self-attention, decoder self-attention and cross-attention, all one class."""

from __future__ import annotations

from torch import nn

from attnpatch.families.base import Family
from attnpatch.registry import register_family


def _kind(module: nn.Module, path: str) -> str:
    # The encoder, both attentions of the decoder: one class, told apart by where it hangs.
    if path.rsplit(".", 1)[-1] == "encoder_attn":
        return "cross"
    return "decoder" if module.is_decoder else "encoder"


MARIAN = register_family(
    Family(
        name="marian",
        model_types=("marian",),
        attention_classes={"transformers.models.marian.modeling_marian.MarianAttention": _kind},
        projections={"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"},
        num_heads="num_heads",
        head_dim="head_dim",
        defaults={"neural": {"preset": "marian"}, "linear": {"preset": "marian"}},
    )
)
