"""Masked and causal language-model training on tiny models and fresh random text."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import torch.nn.functional as F
from pyarrow import parquet
from run_script import run_script
from safetensors.torch import load_file, save_file

from attnpatch.errors import CheckpointError
from attnpatch.experiments.language_models.blocks import BlockCollator, FixedBlocks, make_blocks
from attnpatch.experiments.language_models.bpe import build_byte_level
from attnpatch.experiments.language_models.config import ByteLevelConfig, MaskingConfig, MLMTrainingConfig, TextConfig
from attnpatch.experiments.language_models.run import run
from attnpatch.experiments.language_models.text import load_text
from attnpatch.experiments.language_models.trainer import PredictedPositions
from attnpatch.training.batching import IGNORE
from attnpatch.training.checkpoints import last_complete, step_of
from attnpatch.training.config import load_config
from attnpatch.training.errors import ConfigError, DataError, RunPaused, TrainingError
from attnpatch.training.files import sha256_file
from attnpatch.training.losses import token_loss
from attnpatch.training.tokenizers import load_fast_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train_mlm.py"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY = [
    "model.hidden_size=32",
    "model.layers=1",
    "model.heads=2",
    "model.ffn_dim=48",
    "data.block_size=16",
    "tokenizer.vocab_size=290",
    "training.batch_size=8",
    "training.schedule=constant",
    "training.max_steps=6",
    "training.evaluate_every=3",
    "training.save_every=3",
    "training.final=last",
    "training.log_every=1",
    "training.threads=1",
    "training.precision=fp32",
    "training.device=cpu",
    "output.quiet=true",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines as WikiText has them: blank ones, headings, spaces at both ends, <unk>."""
    folder = tmp_path_factory.mktemp("text")
    words = ["".join(random.choices("abcdefgh\u00e9", k=random.randint(1, 6))) for _ in range(50)] + ["<unk>"]
    for name, count in (("train", 150), ("valid", 25), ("test", 30)):
        lines = []
        for i in range(count):
            chosen = " ".join(random.choices(words, k=random.randint(3, 12)))
            lines.append([" ", f" = {chosen} = ", f" {chosen} . "][0 if i % 5 == 0 else 1 if i % 5 == 1 else 2])
        (folder / f"{name}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    text = load_text(TextConfig(dir=str(data)), "train")[0]
    return build_byte_level(ByteLevelConfig(vocab_size=290), text.lines, tmp_path_factory.mktemp("tok") / "t", 16)


def configured(data: Path, out: Path, *more: str) -> MLMTrainingConfig:
    return load_config(MLMTrainingConfig, None, [*TINY, f"data.dir={data}", f"output.dir={out}", *more])


def train(data: Path, out: Path, *more: str) -> dict[str, Any]:
    return run(configured(data, out, *more))


def weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


# ---- text, tokenizer, blocks ----


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_made_again(data: Path, tokenizer: Any, name: str, tmp_path: Path) -> None:
    lines = load_text(TextConfig(dir=str(data)), "train")[0].lines
    folder = tmp_path / "tokenizer"
    build_byte_level(ByteLevelConfig(vocab_size=290), lines, folder, 16)
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(TrainingError, match="no usable tokenizer"):
        load_fast_tokenizer(str(folder))
    again = build_byte_level(ByteLevelConfig(vocab_size=290), lines, folder, 16)
    assert again(lines[:20])["input_ids"] == tokenizer(lines[:20])["input_ids"]


def test_byte_level_tokenizer_is_robertas(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import RobertaTokenizerFast

    assert isinstance(tokenizer, RobertaTokenizerFast)
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.mask_token_id == len(tokenizer) - 1 == 289
    line = "abc \u00e9\u4e2d = q\n"  # bytes that the training text lacks
    ids = tokenizer(line)["input_ids"]
    assert ids[0] == 0
    assert ids[-1] == 2
    assert 3 not in ids
    assert tokenizer.decode(ids[1:-1]) == line
    assert tokenizer(" <unk> ", add_special_tokens=False)["input_ids"].count(3) == 1
    pieces = [t for t in tokenizer.get_vocab() if "unk" in t]
    assert pieces == ["<unk>"]  # nothing was learnt of how it is spelt
    text = load_text(TextConfig(dir=str(data)), "train")[0]
    again = build_byte_level(ByteLevelConfig(vocab_size=290), text.lines, tmp_path / "t", 16)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    with pytest.raises(ConfigError, match=r"give only \d+ tokens"):
        build_byte_level(ByteLevelConfig(vocab_size=5000), text.lines, tmp_path / "u", 16)


def test_real_roberta_files() -> None:
    folder = SHARED / "tokenizers" / "roberta-base"
    if not folder.is_dir():
        pytest.skip("no shared data beside the checkout")
    assert load_fast_tokenizer(str(folder))("Hello world")["input_ids"] == [0, 31414, 232, 2]


def test_parquet_hub_and_text_are_the_same(data: Path, tmp_path: Path) -> None:
    lines = (data / "train.txt").read_text(encoding="utf-8").split("\n")[:-1]
    hub = tmp_path / "hub" / "conf"
    hub.mkdir(parents=True)
    rows = [f"{line}\n" for line in lines]  # as the hub's WikiText has them
    half = len(rows) // 2
    for i, part in enumerate((rows[:half], rows[half:])):
        parquet.write_table(pyarrow.table({"text": part}), hub / f"train-0000{i}-of-00002.parquet")
    plain = load_text(TextConfig(dir=str(data)), "train")[0]
    folder = load_text(TextConfig(dir=str(tmp_path / "hub"), train=["conf"]), "train")[0]
    assert folder.lines == plain.lines
    for streaming in (False, True):
        config = TextConfig(hub_id=str(tmp_path / "hub"), hub_config="conf", train=["train"], streaming=streaming)
        found = load_text(config, "train")[0]
        assert found.lines == plain.lines
        assert found.files[0]["text_sha256"] == plain.files[0]["text_sha256"]
        config.max_train_lines = 7
        assert load_text(config, "train")[0].lines == plain.lines[:7]
    with pytest.raises(DataError, match=r"no column 'txt'; it has text"):
        load_text(TextConfig(dir=str(tmp_path / "hub"), train=["conf"], column="txt"), "train")


def test_blocks_hold_the_text_and_know_its_lines(data: Path, tokenizer: Any) -> None:
    text = load_text(TextConfig(dir=str(data)), "dev")[0]
    ids = tokenizer("".join(f"{line}\n" for line in text.lines), add_special_tokens=False)["input_ids"]
    size = random.randint(5, 20)
    blocks = make_blocks(text, tokenizer, size)
    body = [t for row in blocks.ids.tolist() for t in row[1:-1]]
    rest = len(ids) % (size - 2)
    if rest:
        body = body[: len(blocks) * (size - 2) - (size - 2) + rest]
        assert blocks.ids[-1, rest + 1 :].tolist() == [2] + [1] * (size - 2 - rest)
    assert body == ids
    assert (blocks.ids[:, 0] == 0).all()
    assert len(make_blocks(text, tokenizer, size, keep_last=False)) == len(ids) // (size - 2)
    raw = (data / "valid.txt").read_text(encoding="utf-8").split("\n")
    for row in random.sample(range(len(blocks)), 3):
        first, last = blocks.lines[row].tolist()
        content = blocks.ids[row, 1:-1].tolist()
        if row == len(blocks) - 1:
            content = content[: blocks.last_length - 2]
        parts = [tokenizer(f"{text.lines[i]}\n", add_special_tokens=False)["input_ids"] for i in range(first, last + 1)]
        around = [token for part in parts for token in part]
        offset = next(i for i in range(len(parts[0])) if around[i : i + len(content)] == content)
        assert offset + len(content) > len(around) - len(parts[-1])  # it reaches into its last line
        start = text.places[first][1]
        assert raw[start - 1] == text.lines[first]
        assert f"valid.txt line{'' if first == last else 's'} {start}" in blocks.where([row])


def test_masks_are_fixed_in_evaluation_and_new_in_training(data: Path, tokenizer: Any) -> None:
    text = load_text(TextConfig(dir=str(data)), "train")[0]
    blocks = make_blocks(text, tokenizer, 16)
    masking = MaskingConfig(probability=0.3, eval_seed=random.randrange(1000))
    fixed = FixedBlocks(blocks, tokenizer, masking)
    again = FixedBlocks(blocks, tokenizer, masking)
    assert torch.equal(fixed.inputs, again.inputs)
    assert torch.equal(fixed.labels, again.labels)
    # A block's masks do not depend on the blocks before it.
    fewer = FixedBlocks(make_blocks(load_limited(data, 40), tokenizer, 16, keep_last=False), tokenizer, masking)
    assert torch.equal(fixed.labels[: len(fewer)], fewer.labels)
    masking.eval_seed += 1
    assert not torch.equal(fixed.labels, FixedBlocks(blocks, tokenizer, masking).labels)

    epoch = 0
    collator = BlockCollator(blocks, tokenizer, masking, 1, lambda: epoch)
    rows = random.sample(range(len(blocks)), 5)
    first = collator(rows)
    assert torch.equal(first["labels"], collator(rows)["labels"])
    epoch = 1
    assert not torch.equal(first["labels"], collator(rows)["labels"])

    ids = torch.from_numpy(blocks.ids).long()
    chosen = fixed.labels != IGNORE
    assert torch.equal(fixed.labels[chosen], ids[chosen])
    assert torch.equal(fixed.inputs[~chosen], ids[~chosen])
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & special).any()  # <unk> among them
    assert abs(chosen.sum().item() / (~special).sum().item() - 0.3) < 0.05
    masked = (fixed.inputs[chosen] == tokenizer.mask_token_id).float().mean().item()
    kept = (fixed.inputs[chosen] == ids[chosen]).float().mean().item()
    assert abs(masked - 0.8) < 0.08
    assert abs(kept - 0.1) < 0.08


def load_limited(data: Path, lines: int) -> Any:
    return load_text(TextConfig(dir=str(data), max_train_lines=lines), "train")[0]


def test_whole_words(data: Path, tokenizer: Any) -> None:
    blocks = make_blocks(load_limited(data, 100), tokenizer, 24, words=True)
    fixed = FixedBlocks(blocks, tokenizer, MaskingConfig(probability=0.3, whole_words=True))
    special = set(tokenizer.all_special_ids)
    several = 0
    for ids, labels, inputs in zip(blocks.ids.tolist(), fixed.labels.tolist(), fixed.inputs.tolist(), strict=True):
        words: list[list[int]] = []
        for i, token in enumerate(ids):
            if token in special:
                words.append([])
            elif tokenizer.convert_ids_to_tokens(token)[0] in "\u0120\u010a" or not words or not words[-1]:
                words.append([i])
            else:
                words[-1].append(i)
        for word in words:
            # The text's words stand between spaces; a token of space alone is a word of its own.
            flags = {labels[i] != IGNORE for i in word}
            assert len(flags) <= 1, tokenizer.convert_ids_to_tokens([ids[i] for i in word])
            several += len(word) > 1 and True in flags
            assert all(inputs[i] == tokenizer.mask_token_id for i in word if labels[i] != IGNORE)
    assert several


# ---- the loss ----


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_the_head_sees_only_predicted_positions(data: Path, tokenizer: Any, family: str) -> None:
    from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    kinds = {"roberta": (RobertaConfig, RobertaForMaskedLM), "bert": (BertConfig, BertForMaskedLM)}
    model = kinds[family][1](kinds[family][0](vocab_size=290, pad_token_id=1, **size)).eval()
    fixed = FixedBlocks(make_blocks(load_limited(data, 60), tokenizer, 16), tokenizer, MaskingConfig())
    batch = fixed.batch(range(len(fixed)))
    expected = model(**batch).loss
    labels = batch.pop("labels")
    with PredictedPositions(model).only(labels != IGNORE):
        logits = model(**batch).logits
    assert logits.shape == (fixed.predicted, 290)
    loss = token_loss(logits, labels[labels != IGNORE], 0.0) / fixed.predicted
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert model(**batch).logits.shape[:2] == labels.shape  # outside the block all are there again


# ---- runs ----


@pytest.mark.parametrize(
    ("family", "objective", "spec"),
    [("roberta", "masked", "neural+expressive+alignment"), ("bert", "causal", "stock"), ("roberta", "causal", "elu")],
)
def test_end_to_end(data: Path, tmp_path: Path, family: str, objective: str, spec: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    more = (f"model.family={family}", f"model.objective={objective}", f"spec={spec}", "training.max_steps=null")
    results = train(data, tmp_path, *more, "training.epochs=1")
    assert results == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["experiment"] == ("mlm" if objective == "masked" else "clm")
    steps = results["steps"]
    # Some versions of transformers also evaluate at the last step.
    assert [entry["step"] for entry in results["dev"] if entry["step"] < steps] == list(range(3, steps, 3))
    assert [entry["step"] for entry in results["train"]] == list(range(1, steps + 1))
    count = results["blocks"]["train"]["train"]["blocks"]
    assert steps == math.ceil(count / 8)
    assert results["tokens"]["read"] == count * 16
    assert {"sha256", "text_sha256", "lines"} <= results["data"]["train"][0]["files"][0].keys()

    # The perplexity again, with a reloaded model, all logits, block by block.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    auto = AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "model").eval()
    text = load_text(TextConfig(dir=str(data)), "test")[0]
    blocks = make_blocks(text, tokenizer, 16)
    masking = MaskingConfig() if objective == "masked" else None
    fixed = FixedBlocks(blocks, tokenizer, masking)
    total = 0.0
    with torch.no_grad():
        for row in range(len(blocks)):
            length = blocks.last_length if row == len(blocks) - 1 else 16
            inputs = fixed.inputs[row : row + 1, :length]  # without its padding
            logits = model(inputs).logits[0]
            if objective == "masked":
                total += F.cross_entropy(logits, fixed.labels[row, :length], reduction="sum").item()
            else:
                ids = torch.from_numpy(blocks.ids[row, :length]).long()
                target = ids[1:].clone()
                target[torch.isin(target, torch.tensor(tokenizer.all_special_ids))] = IGNORE
                total += F.cross_entropy(logits[:-1], target, reduction="sum").item()
    scores = results["scores"]["test.txt"]
    assert scores["predicted_tokens"] == fixed.predicted
    assert scores["loss"] == pytest.approx(total / fixed.predicted, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(total / fixed.predicted), rel=1e-4)


def test_evaluation_does_not_depend_on_batches_or_seed(data: Path, tmp_path: Path) -> None:
    """The same weights (learning rate 0, one init), scored in batches of 1 and of 7, in runs of different seeds."""
    first = train(data, tmp_path / "a", "training.max_steps=1", "training.evaluate_every=never")
    more = (
        f"model.pretrained={tmp_path / 'a' / 'model'}",
        "training.learning_rate=0",
        "training.max_steps=1",
        "training.evaluate_every=never",
    )
    for seed, size in ((2, 1), (3, 7)):
        again = train(data, tmp_path / f"b{seed}", *more, f"seed={seed}", f"training.eval_batch_size={size}")
        one, two = first["scores"]["test.txt"], again["scores"]["test.txt"]
        assert one["predicted_tokens"] == two["predicted_tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)


@pytest.mark.parametrize("how", ["stopped", "paused"])
def test_resume_is_bitwise(
    data: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnpatch.training.run_trainer import RunTrainer

    more = ("training.max_steps=29", "training.evaluate_every=6", "training.save_every=6", "model.dropout=0.3")
    whole = train(data, tmp_path / "whole", *more)
    assert whole["epochs"] > 1  # the masks of the second epoch are others
    out = tmp_path / "part"
    if how == "stopped":
        save = RunTrainer._save_checkpoint

        def save_then_stop(self: Any, model: Any, trial: Any) -> None:
            save(self, model, trial)
            if self.state.global_step == 12:
                raise KeyboardInterrupt

        monkeypatch.setattr(RunTrainer, "_save_checkpoint", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(data, out, *more)
        monkeypatch.undo()
    else:
        with pytest.raises(RunPaused, match="paused at step 1 of 29"):
            train(data, out, *more, "training.stop_after_minutes=0")
        assert not (out / "results.json").exists()
        words = [*TINY, f"data.dir={data}", f"output.dir={out}", *more, "training.stop_after_minutes=0"]
        assert run_script("train_mlm", words) == 75
        assert "paused at step 2 of 29; the same command goes on" in capsys.readouterr().err
    part = train(data, out, *more)
    assert part["resumed_at"] == ([12] if how == "stopped" else [1, 2])
    assert part["scores"]["test.txt"]["loss"] == whole["scores"]["test.txt"]["loss"]
    assert part["final_train_loss"] == whole["final_train_loss"]
    assert [e["loss"] for e in part["train"]] == [e["loss"] for e in whole["train"]]
    assert part["tokens"]["read"] == whole["tokens"]["read"]
    one, two = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_nan_names_step_blocks_and_lines(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpatch.experiments.language_models import trainer as lm_trainer

    seen: list[Any] = []
    loss = lm_trainer.LanguageModelTrainer.summed_loss
    call = lm_trainer.BlockCollator.__call__

    def collate(self: Any, rows: Any) -> Any:
        seen.append(list(rows))
        return call(self, rows)

    def broken(self: Any, model: Any, inputs: Any) -> Any:
        total, count, outputs = loss(self, model, inputs)
        return total * (math.nan if self.state.global_step == 2 else 1.0), count, outputs

    monkeypatch.setattr(lm_trainer.BlockCollator, "__call__", collate)
    monkeypatch.setattr(lm_trainer.LanguageModelTrainer, "summed_loss", broken)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3, in blocks ") as caught:
        train(data, tmp_path)
    message = str(caught.value)
    assert all(f"{row} (train.txt line" in message for row in seen[2])


def test_errors_are_sentences(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    def fails(*words: str) -> str:
        assert run_script("train_mlm", [*TINY, f"data.dir={data}", f"output.dir={tmp_path}", *words]) == 2
        return capsys.readouterr().err

    assert "did you mean 'masking.probability'" in fails("masking.probabilty=0.2")
    assert "did you mean 'training.max_steps'" in fails("training.max_step=2")
    missing = fails("data.train=[trian.txt]", "data.about=WikiText-2 of the hub")
    assert "trian.txt" in missing
    assert "did you mean 'train.txt'" in missing
    assert "What provides it: WikiText-2 of the hub" in missing
    assert "does not exist" in fails("data.dir=/nowhere")
    assert "does not divide" in fails("model.heads=5")
    assert "add up to more than 1" in fails("masking.random_share=0.5")
    assert "do not fill one block" in fails("data.block_size=2000", "data.max_train_lines=20")
    assert "streaming" in fails("data.streaming=true")
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\n")
    assert "bad.txt, line 2: not UTF-8" in fails(f"data.train=[{tmp_path / 'bad.txt'}]")


@pytest.mark.parametrize("name", ["wikitext-cpu", "wikitext-gpu", "wikitext103-paper"])
def test_configs_load(name: str) -> None:
    config = load_config(MLMTrainingConfig, CONFIGS / f"{name}.yaml")
    assert config.model.hidden_size % config.model.heads == 0
    if "paper" in name:
        training = config.training
        assert (training.learning_rate, training.batch_size, training.epochs) == (5e-5, 8, 5)
        assert (config.data.block_size, config.masking.probability, config.seed) == (512, 0.15, 42)


def test_patched_checkpoint_with_pretrained_weights(data: Path, tmp_path: Path) -> None:
    """A stock run's model, taken up with `spec=neural`, computes what the stock one does before it is trained."""
    stock = train(data, tmp_path / "a", "training.max_steps=2", "training.evaluate_every=never")
    more = (f"model.pretrained={tmp_path / 'a' / 'model'}", "training.max_steps=1", "training.learning_rate=0")
    patched = train(data, tmp_path / "b", *more, "spec=neural", "training.evaluate_every=never")
    assert patched["parameters"]["trainable"] > stock["parameters"]["trainable"]
    assert patched["scores"]["test.txt"]["loss"] == pytest.approx(stock["scores"]["test.txt"]["loss"], rel=1e-5)


def test_no_weight_is_random(data: Path, tmp_path: Path) -> None:
    """A checkpoint without a head, and one whose config asks for fewer or more layers than it has."""
    train(data, tmp_path / "a", "training.max_steps=2", "training.evaluate_every=never")
    folder = tmp_path / "a" / "model"
    start = (f"model.pretrained={folder}", "training.max_steps=1", "training.evaluate_every=never")
    config = json.loads((folder / "config.json").read_text())
    for layers, words in ((0, "has layers that are not in"), (2, "lacks weights of")):
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(CheckpointError, match=f"{words} a RobertaForMaskedLM"):
            train(data, tmp_path / "b", *start)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    headless = {name: value for name, value in weights.items() if not name.startswith("lm_head")}
    save_file(headless, folder / "model.safetensors", {"format": "pt"})
    for spec in ("stock", "neural"):
        with pytest.raises(CheckpointError, match=r"lacks weights of .* \(\d: lm_head\..*they would be random"):
            train(data, tmp_path / "c", *start, f"spec={spec}")


def test_other_weights_in_the_same_place_are_another_run(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("other", 2)):
        train(data, tmp_path / name, "training.max_steps=2", "training.evaluate_every=never", f"seed={seed}")
    start = (f"model.pretrained={tmp_path / 'a' / 'model'}", "training.max_steps=1", "training.evaluate_every=never")
    results = train(data, tmp_path / "b", *start)
    weights = tmp_path / "a" / "model" / "model.safetensors"
    assert results["pretrained"]["weights_sha256"] == [sha256_file(weights)]
    shutil.copy(tmp_path / "other" / "model" / "model.safetensors", weights)
    with pytest.raises(TrainingError, match=r"other settings \(pretrained: "):
        train(data, tmp_path / "b", *start)


def test_no_epochs_score_a_checkpoint(data: Path, tmp_path: Path) -> None:
    trained = train(data, tmp_path / "a", "training.max_steps=2", "training.evaluate_every=never")
    start = f"model.pretrained={tmp_path / 'a' / 'model'}"
    best = ("training.final=best", "training.evaluate_every=epoch", "training.save_every=epoch")
    for name, more in (("b", ()), ("c", best)):
        still = (start, "training.max_steps=null", "training.epochs=0")
        scored = train(data, tmp_path / name, *still, *more)
        assert scored["scores"]["test.txt"] == trained["scores"]["test.txt"]
        assert scored["steps"] == 0


def test_a_run_that_starts_afresh(data: Path, tmp_path: Path) -> None:
    """What it clears is a run's, and never what it starts from."""
    first = ("training.max_steps=3", "training.evaluate_every=never")
    train(data, tmp_path / "a", *first)
    afresh = ("training.resume=never", "output.overwrite=true")
    with pytest.raises(ConfigError, match=r"model\.pretrained=.* lies in output\.dir=.*, which training\.resume=never"):
        train(data, tmp_path / "a", *first, *afresh, f"model.pretrained={tmp_path / 'a' / 'model'}")
    with pytest.raises(ConfigError, match=r"tokenizer\.path=.* lies in output\.dir"):
        train(data, tmp_path / "a", *first, *afresh, f"tokenizer.path={tmp_path / 'a' / 'tokenizer'}")
    assert (tmp_path / "a" / "model" / "model.safetensors").is_file()
    with pytest.raises(RunPaused):
        train(data, tmp_path / "a", *first, *afresh, "seed=5", "training.stop_after_minutes=0")
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert not left & {"model", "results.json"}
    assert "checkpoint-1" in left
    # A folder with a model that no run of ours left.
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "a" / "tokenizer", other / "model")
    for more in ((), ("output.overwrite=true",)):
        with pytest.raises(TrainingError, match=r"holds a run, but not its run\.json"):
            train(data, other, *first, "training.resume=never", *more)
    assert (other / "model" / "tokenizer.json").is_file()


def test_a_damaged_checkpoint_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunPaused):
        train(data, tmp_path, "training.stop_after_minutes=0")
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])  # of the right size
    with pytest.raises(TrainingError, match=r"checkpoint-1/model\.safetensors is damaged .*: delete "):
        train(data, tmp_path)


def test_a_run_of_a_version_that_noted_no_weights_goes_on(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "a", "training.max_steps=2", "training.evaluate_every=never")
    start = (f"model.pretrained={tmp_path / 'a' / 'model'}", "training.max_steps=3", "training.evaluate_every=never")
    with pytest.raises(RunPaused):
        train(data, tmp_path / "b", *start, "training.stop_after_minutes=0")
    known = json.loads((tmp_path / "b" / "run.json").read_text())
    assert known.pop("pretrained")
    (tmp_path / "b" / "run.json").write_text(json.dumps(known))
    assert train(data, tmp_path / "b", *start)["steps"] == 3


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(data: Path, tmp_path: Path) -> None:
    """The same blocks with the same masks in each update."""
    more = ("model.dropout=0", "model.attention_dropout=0", "training.max_steps=4")
    one = train(data, tmp_path / "one", *more, "training.batch_size=8")
    settings = [*TINY, f"data.dir={data}", f"output.dir={tmp_path / 'two'}", *more, "training.batch_size=4"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run([*launcher, *settings], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"]["predicted"] == two["tokens"]["predicted"]
    assert one["scores"]["test.txt"]["predicted_tokens"] == two["scores"]["test.txt"]["predicted_tokens"]
    assert one["scores"]["test.txt"]["loss"] == pytest.approx(two["scores"]["test.txt"]["loss"], rel=1e-5)
    assert one["final_train_loss"] == pytest.approx(two["final_train_loss"], rel=1e-4)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(data: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, then the same command again."""
    more = ("training.max_steps=40", "training.evaluate_every=5", "training.save_every=5", "model.dropout=0.3")
    whole = train(data, tmp_path / "whole", *more)
    out = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), *TINY, f"data.dir={data}", f"output.dir={out}", *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while last_complete(out) is None or step_of(last_complete(out) or out) < 10:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not (out / "results.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    resumed = json.loads((out / "results.json").read_text())
    assert len(resumed["resumed_at"]) == 1
    assert resumed["final_train_loss"] == whole["final_train_loss"]
    assert resumed["scores"]["test.txt"]["loss"] == whole["scores"]["test.txt"]["loss"]
    one, two = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_pieces_of_one_character_are_one_word() -> None:
    from attnpatch.experiments.language_models.blocks import _word_starts

    # "ab 🜁🜂": two words; each of the last two characters in two pieces that share its place.
    offsets = [(0, 1), (1, 2), (2, 4), (3, 4), (4, 5), (4, 5), (6, 7)]
    assert _word_starts(offsets).tolist() == [True, False, False, False, False, False, True]


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_the_logged_loss_is_the_mean_over_predicted_tokens(
    data: Path, tmp_path: Path, family: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnpatch.experiments.language_models import trainer as lm_trainer

    sums: list[tuple[float, float]] = []
    trainer = next(c for c in vars(lm_trainer).values() if isinstance(c, type) and c.__module__ == lm_trainer.__name__)
    original = trainer.summed_loss

    def watch(self: Any, model: Any, inputs: Any) -> Any:
        found = original(self, model, inputs)
        if model.training:
            sums.append((float(found[0].detach()), float(found[1])))
        return found

    monkeypatch.setattr(trainer, "summed_loss", watch)
    results = train(
        data,
        tmp_path,
        f"model.family={family}",
        f"model.objective={objective}",
        "training.max_steps=3",
        "training.log_every=1",
    )
    assert len(sums) == 3
    for (total, count), entry in zip(sums, results["train"], strict=True):
        assert entry["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=30, **size)).save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="tokenizer"):
        load_fast_tokenizer(str(tmp_path))
