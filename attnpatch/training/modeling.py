"""The model of a run: a fresh Marian of the config's size, or a checkpoint; with any attention spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from attnpatch.errors import CheckpointError, one_line, unknown
from attnpatch.registry import get_variant
from attnpatch.spec import AttentionSpec
from attnpatch.training.calibration import calibrates
from attnpatch.training.config import MarianTrainingConfig
from attnpatch.training.errors import ConfigError, TrainingError
from attnpatch.training.files import sha256_file


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


def checkpoint_identity(config: MarianTrainingConfig) -> dict[str, Any] | None:
    """What a run starts from: the name, and of a local folder the SHA-256 of its weights. None: from scratch.

    Raises CheckpointError for what can only be a folder, and is none.
    """
    name = config.model.pretrained
    if name is None:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        weights = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        return {"name": name, "weights_sha256": [sha256_file(path) for path in weights]}
    if name.count("/") > 1 or name.startswith((".", "~", "/")):  # a hub id is OWNER/NAME
        raise CheckpointError(f"model.pretrained={name}: no such folder, so there is no checkpoint to start from")
    return {"name": name, "revision": config.model.revision}


def attention_backend(config: Any) -> str | None:
    """transformers' name of the backend for stock attention; None: transformers' own choice.

    `auto` takes eager on a CPU, where the backward of the fused kernel is nearly half of a step over short sentences
    (docs/training.md has the numbers), and transformers' choice elsewhere. So it does for another score than softmax:
    eager has to give the weights, and they would keep the fused score kernels out.
    """
    if config.training.attention != "auto":
        return config.training.attention
    on_cpu = config.training.device == "cpu" or not torch.cuda.is_available()
    return "eager" if on_cpu and "score" not in _stages(config.spec) else None


def _stages(spec: Any) -> set[str]:
    """The stages that a spec replaces somewhere."""
    return {get_variant(name).stage for rule in AttentionSpec.parse(spec).rules for name in rule.variants}


def attention_arguments(config: Any) -> dict[str, Any]:
    """The backend as an argument of `from_pretrained`."""
    backend = attention_backend(config)
    return {"attn_implementation": backend} if backend else {}


def patched_config(config: Any, model_config: Any) -> Any:
    """A model's config with the spec of a run's config in it."""
    if config.spec is None:
        return model_config
    import attnpatch

    return attnpatch.patch_config(model_config, config.spec, init=config.init)


def _from_scratch(config: MarianTrainingConfig, tokenizer: Any) -> Any:
    from transformers import MarianConfig, MarianMTModel
    from transformers.activations import ACT2FN

    size = config.model
    if size.activation not in ACT2FN:
        raise ConfigError(unknown("value for model.activation:", size.activation, ACT2FN))
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
    model_config = patched_config(config, model_config)
    backend = attention_backend(config)
    if backend:
        model_config._attn_implementation = backend
    return MarianMTModel(model_config)


def _from_checkpoint(config: MarianTrainingConfig) -> Any:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    path = str(config.model.pretrained)
    kwargs = {"revision": config.model.revision} if config.model.revision else {}
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"the folder {path} has no config.json, so it is not a model checkpoint")
    try:
        model_config = AutoConfig.from_pretrained(path, **kwargs)
        if not model_config.is_encoder_decoder:
            raise TrainingError(f"{path} is a {model_config.model_type} model, not a sequence-to-sequence one")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            value = getattr(config.model, name)
            if value is not None:
                setattr(model_config, name, value)
        # Loading converts on the fly: a patched config makes patched modules, filled from the stock weights.
        if not calibrates(config):
            model_config = patched_config(config, model_config)
        return AutoModelForSeq2SeqLM.from_pretrained(
            path, config=model_config, dtype=torch.float32, **kwargs, **attention_arguments(config)
        )
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = one_line(error, 300)
        raise CheckpointError(f"cannot load the model {path}: {reason}") from error


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
