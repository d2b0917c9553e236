"""The decoder of a cell."""

from __future__ import annotations

from typing import Any

from attnpatch.experiments.sequences.config import CellConfig, SequencesConfig
from attnpatch.experiments.sequences.grid import Cell
from attnpatch.training.modeling import check_activation, from_scratch


def build_decoder(config: SequencesConfig, own: CellConfig, cell: Cell) -> Any:
    """The causal decoder of a cell, patched with `own.spec` when there is one; N symbols and a padding token."""
    from transformers import BertConfig, BertLMHeadModel

    size = config.model
    check_activation(size.activation)
    model_config = BertConfig(
        vocab_size=max(cell.bases) + 1,
        pad_token_id=max(cell.bases),  # not a symbol: BERT's padding has no embedding that is trained
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn_dim,
        hidden_act=size.activation,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=config.task.length,
        type_vocab_size=1,
        initializer_range=size.init_std,
        is_decoder=True,
    )
    return from_scratch(own, BertLMHeadModel, model_config)
