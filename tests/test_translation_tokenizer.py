"""The trained MarianTokenizer: opus-mt's layout, round trips, cache, and the fast encoder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from attnpatch.experiments.translation.config import TokenizerConfig
from attnpatch.experiments.translation.tokenizer import build_tokenizer, encode
from attnpatch.training.errors import ConfigError, TrainingError
from attnpatch.training.tokenizers import load_tokenizer

LANGUAGES = ("de", "en")


def corpus(seed: int, pairs: int = 400) -> tuple[list[str], list[str]]:
    generator = random.Random(seed)

    def words(letters: str) -> list[str]:
        return ["".join(generator.choices(letters, k=generator.randint(2, 7))) for _ in range(120)]

    german, english = words("abdeghilmnorstuäöüß"), words("abcdefghiklmnorstuwy")
    picks = [[generator.randrange(120) for _ in range(generator.randint(3, 9))] for _ in range(pairs)]
    return [" ".join(german[i] for i in p) + "." for p in picks], [" ".join(english[i] for i in p) + "." for p in picks]


@pytest.fixture(scope="module", params=["unigram-joint", "bpe-joint", "unigram-separate"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list, list]:
    kind, vocab = request.param.split("-")
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    sources, targets = corpus(random.randrange(10**6))
    settings = TokenizerConfig(type=kind, vocab_size=150, joint=vocab == "joint")
    return build_tokenizer(settings, sources, targets, LANGUAGES, folder), folder, sources, targets


def test_layout_is_that_of_opus_mt(built: tuple[Any, Path, list, list]) -> None:
    from transformers import MarianTokenizer

    tokenizer, folder, _, _ = built
    assert type(tokenizer) is MarianTokenizer
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert (vocabulary["</s>"], vocabulary["<unk>"], vocabulary["<pad>"]) == (0, 1, len(vocabulary) - 1)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 1, len(vocabulary) - 1)
    assert len(vocabulary) <= 150
    assert (folder / "source.spm").is_file()
    assert (folder / "target.spm").is_file()
    if tokenizer.separate_vocabs:
        assert len(tokenizer.target_encoder) == len(vocabulary)
        assert tokenizer.target_encoder["<pad>"] == vocabulary["<pad>"]


def test_round_trip(built: tuple[Any, Path, list, list], tmp_path: Path) -> None:
    tokenizer, _, sources, targets = built
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for t in (tokenizer, again):
        ids = t(text_target=targets[:50])["input_ids"]
        assert t.batch_decode(ids, skip_special_tokens=True) == targets[:50]
    assert again(sources[:50])["input_ids"] == tokenizer(sources[:50])["input_ids"]


def test_fast_encoder_equals_the_tokenizer(built: tuple[Any, Path, list, list]) -> None:
    tokenizer, _, sources, targets = built
    odd = ["Ein </s> Ende", "a<pad>b", "<unk>", ">>de<< hallo", "日本 x", "  spaces   inside ", "UPPER", "a" * 300]
    for texts, target in ((sources + odd, False), (targets + odd, True)):
        for length in (5, 64):
            key = "text_target" if target else "text"
            expected = [tokenizer(**{key: text}, truncation=True, max_length=length)["input_ids"] for text in texts]
            assert encode(tokenizer, texts, length, target=target) == expected


@pytest.mark.parametrize("name", ["vocab.json", "source.spm", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_made_again(name: str, tmp_path: Path) -> None:
    sources, targets = corpus(random.randrange(10**6))
    folder = tmp_path / "tokenizer"
    whole = build_tokenizer(TokenizerConfig(vocab_size=120), sources, targets, LANGUAGES, folder)
    ids = whole(sources)["input_ids"]
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(TrainingError, match="no usable tokenizer"):
        load_tokenizer(folder)
    again = build_tokenizer(TokenizerConfig(vocab_size=120), sources, targets, LANGUAGES, folder)
    assert again(sources)["input_ids"] == ids


def test_cache_by_checksum(tmp_path: Path) -> None:
    sources, targets = corpus(3)
    settings = TokenizerConfig(vocab_size=120)
    folder = tmp_path / "tokenizer"
    build_tokenizer(settings, sources, targets, LANGUAGES, folder)
    model = (folder / "source.spm").read_bytes()
    (folder / "witness").touch()
    build_tokenizer(settings, sources, targets, LANGUAGES, folder)
    assert (folder / "witness").exists()  # used again
    build_tokenizer(settings, [*sources[1:], "anders"], targets, LANGUAGES, folder)
    assert not (folder / "witness").exists()  # other text: made afresh
    build_tokenizer(settings, sources, targets, LANGUAGES, folder)
    assert (folder / "source.spm").read_bytes() == model  # and the same every time


def test_errors(tmp_path: Path) -> None:
    sources, targets = corpus(4, 20)
    with pytest.raises(ConfigError, match=r"type=bpe with tokenizer\.vocab_size=50000"):
        build_tokenizer(TokenizerConfig(type="bpe", vocab_size=50000), sources, targets, LANGUAGES, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrainingError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
