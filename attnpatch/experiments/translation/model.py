"""The model of a run: a fresh Marian of the config's size, or a checkpoint; with any attention spec."""

from __future__ import annotations

from typing import Any

from attnpatch.experiments.translation.calibration import calibrates
from attnpatch.experiments.translation.config import MarianTrainingConfig
from attnpatch.training.errors import TrainingError
from attnpatch.training.modeling import check_activation, from_checkpoint, from_scratch, override


def build_model(config: MarianTrainingConfig, tokenizer: Any) -> Any:
    """MarianMTModel from scratch, or the checkpoint `config.model.pretrained`; patched when a spec is given.

    A checkpoint is still stock under init: calibrate, which needs training rows (`calibration.patch_calibrated`).
    """
    if config.model.pretrained is None:
        model = _from_scratch(config, tokenizer)
    else:
        model = _from_checkpoint(config)
    _set_generation(config, model)
    return model


def _from_scratch(config: MarianTrainingConfig, tokenizer: Any) -> Any:
    from transformers import MarianConfig, MarianMTModel

    size = config.model
    check_activation(size.activation)
    joint = not getattr(tokenizer, "separate_vocabs", False)
    pad = tokenizer.pad_token_id
    vocab = len(tokenizer.encoder)
    model_config = MarianConfig(
        vocab_size=vocab,
        decoder_vocab_size=vocab,
        d_model=size.d_model,
        encoder_layers=size.encoder_layers,
        decoder_layers=size.decoder_layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=size.ffn_dim,
        decoder_ffn_dim=size.ffn_dim,
        activation_function=size.activation,
        dropout=0.1 if size.dropout is None else size.dropout,
        attention_dropout=size.attention_dropout or 0.0,
        activation_dropout=size.activation_dropout or 0.0,
        scale_embedding=size.scale_embedding,
        max_position_embeddings=size.max_positions,
        init_std=size.init_std,
        share_encoder_decoder_embeddings=joint,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=tokenizer.eos_token_id,  # opus-mt has it so: there is no <s>
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=pad,
        forced_eos_token_id=tokenizer.eos_token_id,
        is_encoder_decoder=True,
    )
    return from_scratch(config, MarianMTModel, model_config)


def _from_checkpoint(config: MarianTrainingConfig) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    def prepare(model_config: Any) -> None:
        if not model_config.is_encoder_decoder:
            raise TrainingError(
                f"{config.model.pretrained} is a {model_config.model_type} model, not a sequence-to-sequence one"
            )
        names = ("dropout", "attention_dropout", "activation_dropout")
        override(model_config, {name: getattr(config.model, name) for name in names})

    return from_checkpoint(config, AutoModelForSeq2SeqLM, prepare, patch=not calibrates(config))


def _set_generation(config: MarianTrainingConfig, model: Any) -> None:
    settings = config.generation
    longest = settings.max_length
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise TrainingError(
            f"generation.max_length={longest} is more than the model's {positions} positions: choose at most as many"
        )
    generation = model.generation_config
    generation.max_length = longest
    generation.num_beams = settings.num_beams
    generation.length_penalty = settings.length_penalty
    if generation.bad_words_ids is None and model.config.pad_token_id is not None:
        generation.bad_words_ids = [[model.config.pad_token_id]]  # <pad> starts the decoder, it is never an output
