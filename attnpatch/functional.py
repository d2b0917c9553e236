"""The methods as plain functions on tensors: query [B, H, T, D], key and value [B, H, S, D].

Each `*_attention` takes the arguments of `torch.nn.functional.scaled_dot_product_attention`, and its own by keyword.
"""

from __future__ import annotations

from attnpatch.kernels.alignment import alignment_loss, mmd
from attnpatch.kernels.query_value import query_value_attention
from attnpatch.kernels.score import (
    attention_weights,
    elu_attention,
    expressive_attention,
    kernel_attention,
    polynomial_attention,
)
from attnpatch.kernels.select import (
    top_r_attention,
    top_r_weights,
    value_aware_attention,
    value_aware_weights,
)

__all__ = [
    "alignment_loss",
    "attention_weights",
    "elu_attention",
    "expressive_attention",
    "kernel_attention",
    "mmd",
    "polynomial_attention",
    "query_value_attention",
    "top_r_attention",
    "top_r_weights",
    "value_aware_attention",
    "value_aware_weights",
]
