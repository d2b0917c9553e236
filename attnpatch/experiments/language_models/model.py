"""The language model of a run: a fresh RoBERTa or BERT of the config's size, or a checkpoint; with any spec."""

from __future__ import annotations

from typing import Any

from attnpatch.experiments.language_models.config import EncoderConfig, MLMTrainingConfig
from attnpatch.training.errors import TrainingError
from attnpatch.training.modeling import check_activation, from_checkpoint, from_scratch, override

FAMILIES = ("roberta", "bert")


def build_language_model(config: MLMTrainingConfig, tokenizer: Any) -> Any:
    """A masked or causal language model, from scratch or from `config.model.pretrained`, patched when a spec is given.

    Raises TrainingError when the model has fewer positions than a block has tokens.
    """
    model = _from_scratch(config, tokenizer) if config.model.pretrained is None else _from_checkpoint(config)
    check_block_size(config.data.block_size, model)
    check_vocabulary(tokenizer, model)
    return model


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Raises TrainingError when a tokenizer has tokens that the model does not know."""
    if len(tokenizer) > model.config.vocab_size:
        raise TrainingError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model {model.config.vocab_size:,}: they do not "
            "belong together"
        )


def position_count(model_config: Any) -> int:
    """How many tokens a model can read; RoBERTa's positions start behind its padding token."""
    count = int(model_config.max_position_embeddings)
    return count - model_config.pad_token_id - 1 if model_config.model_type == "roberta" else count


def check_block_size(size: int, model: Any, key: str = "data.block_size") -> None:
    """Raises TrainingError when a model has fewer positions than a block has tokens (the setting `key`)."""
    positions = position_count(model.config)
    if size > positions:
        raise TrainingError(f"{key}={size} is more than the model's {positions} positions: choose at most as many")


def _from_scratch(config: MLMTrainingConfig, tokenizer: Any) -> Any:
    import transformers

    causal = config.model.objective == "causal"
    model_config = fresh_config(config.model, tokenizer, config.data.block_size, is_decoder=causal)
    roberta = config.model.family == "roberta"
    masked = transformers.RobertaForMaskedLM if roberta else transformers.BertForMaskedLM
    decoder = transformers.RobertaForCausalLM if roberta else transformers.BertLMHeadModel
    return from_scratch(config, decoder if causal else masked, model_config)


def fresh_config(size: EncoderConfig, tokenizer: Any, length: int, **more: Any) -> Any:
    """The config of a RoBERTa or BERT of that size that reads `length` tokens. `more`: its other settings."""
    import transformers

    check_activation(size.activation)
    roberta = size.family == "roberta"
    kind = transformers.RobertaConfig if roberta else transformers.BertConfig
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn_dim,
        hidden_act=size.activation,
        hidden_dropout_prob=0.1 if size.dropout is None else size.dropout,
        attention_probs_dropout_prob=0.1 if size.attention_dropout is None else size.attention_dropout,
        max_position_embeddings=length + (tokenizer.pad_token_id + 1 if roberta else 0),
        type_vocab_size=1 if roberta else 2,
        initializer_range=size.init_std,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        **more,
    )


def _from_checkpoint(config: MLMTrainingConfig) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    causal = config.model.objective == "causal"

    def prepare(model_config: Any) -> None:
        prepare_encoder(config.model, model_config)
        model_config.is_decoder = causal

    return from_checkpoint(config, AutoModelForCausalLM if causal else AutoModelForMaskedLM, prepare)


def prepare_encoder(size: EncoderConfig, model_config: Any) -> None:
    """Sets the dropouts of a checkpoint's config. Raises TrainingError when it is of another family."""
    if model_config.model_type not in FAMILIES:
        raise TrainingError(
            f"{size.pretrained} is a {model_config.model_type} model; this script trains {' and '.join(FAMILIES)}"
        )
    dropouts = {"hidden_dropout_prob": size.dropout, "attention_probs_dropout_prob": size.attention_dropout}
    override(model_config, dropouts)
