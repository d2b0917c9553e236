"""The language model of a run: a fresh RoBERTa or BERT of the config's size, or a checkpoint; with any spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from attnpatch.errors import CheckpointError, one_line, unknown
from attnpatch.training.errors import ConfigError, TrainingError
from attnpatch.training.mlm_config import MLMTrainingConfig
from attnpatch.training.modeling import attention_arguments, attention_backend, patched_config

FAMILIES = ("roberta", "bert")


def build_language_model(config: MLMTrainingConfig, tokenizer: Any) -> Any:
    """A masked or causal language model, from scratch or from `config.model.pretrained`, patched when a spec is given.

    Raises TrainingError when the model has fewer positions than a block has tokens.
    """
    model = _from_scratch(config, tokenizer) if config.model.pretrained is None else _from_checkpoint(config)
    positions = position_count(model.config)
    if config.data.block_size > positions:
        raise TrainingError(
            f"data.block_size={config.data.block_size} is more than the model's {positions} positions: choose at most "
            "as many"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise TrainingError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model {model.config.vocab_size:,}: they do not "
            "belong together"
        )
    return model


def position_count(model_config: Any) -> int:
    """How many tokens a model can read; RoBERTa's positions start behind its padding token."""
    count = int(model_config.max_position_embeddings)
    return count - model_config.pad_token_id - 1 if model_config.model_type == "roberta" else count


def _from_scratch(config: MLMTrainingConfig, tokenizer: Any) -> Any:
    import transformers
    from transformers.activations import ACT2FN

    size = config.model
    if size.activation not in ACT2FN:
        raise ConfigError(unknown("value for model.activation:", size.activation, ACT2FN))
    roberta = size.family == "roberta"
    causal = size.objective == "causal"
    kind = transformers.RobertaConfig if roberta else transformers.BertConfig
    model_config = kind(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn_dim,
        hidden_act=size.activation,
        hidden_dropout_prob=0.1 if size.dropout is None else size.dropout,
        attention_probs_dropout_prob=0.1 if size.attention_dropout is None else size.attention_dropout,
        max_position_embeddings=config.data.block_size + (tokenizer.pad_token_id + 1 if roberta else 0),
        type_vocab_size=1 if roberta else 2,
        initializer_range=size.init_std,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        is_decoder=causal,
    )
    model_config = patched_config(config, model_config)
    backend = attention_backend(config)
    if backend:
        model_config._attn_implementation = backend
    masked = transformers.RobertaForMaskedLM if roberta else transformers.BertForMaskedLM
    decoder = transformers.RobertaForCausalLM if roberta else transformers.BertLMHeadModel
    return (decoder if causal else masked)(model_config)


def _from_checkpoint(config: MLMTrainingConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    path = str(config.model.pretrained)
    kwargs = {"revision": config.model.revision} if config.model.revision else {}
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"the folder {path} has no config.json, so it is not a model checkpoint")
    causal = config.model.objective == "causal"
    try:
        model_config = AutoConfig.from_pretrained(path, **kwargs)
        if model_config.model_type not in FAMILIES:
            raise TrainingError(
                f"{path} is a {model_config.model_type} model; this script trains {' and '.join(FAMILIES)}"
            )
        model_config.is_decoder = causal
        for name, value in (
            ("hidden_dropout_prob", config.model.dropout),
            ("attention_probs_dropout_prob", config.model.attention_dropout),
        ):
            if value is not None:
                setattr(model_config, name, value)
        # Loading converts on the fly: a patched config makes patched modules, filled from the stock weights.
        model_config = patched_config(config, model_config)
        auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
        return auto.from_pretrained(
            path, config=model_config, dtype=torch.float32, **kwargs, **attention_arguments(config)
        )
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = one_line(error, 300)
        raise CheckpointError(f"cannot load the model {path}: {reason}") from error
