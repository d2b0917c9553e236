"""Batches: every pair once, within the budget, the same for the same seed and epoch, fairly shared, resumable."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.data import DataLoader

from attnpatch.experiments.translation.collator import TranslationCollator
from attnpatch.training.batching import (
    SentenceBatchSampler,
    TokenBatchSampler,
    length_batches,
)
from attnpatch.training.errors import TrainingError


def some_lengths(count: int = 700) -> list[int]:
    return [random.randint(2, 60) for _ in range(count)]


def epoch(sampler: TokenBatchSampler, number: int) -> list[list[int]]:
    sampler.set_epoch(number)
    return list(sampler)


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_token_batches(shards: int) -> None:
    lengths, seed = some_lengths(), random.randrange(10**6)
    sampler = TokenBatchSampler(lengths, 256, seed, shards)
    for number in (0, 1, 5):
        batches = epoch(sampler, number)
        assert len(batches) == len(sampler)
        assert len(batches) % shards == 0
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(len(batch) * max(lengths[i] for i in batch) <= 256 for batch in batches)
        assert batches == epoch(TokenBatchSampler(lengths, 256, seed, shards), number)
    assert epoch(sampler, 0) != epoch(sampler, 1)
    assert epoch(sampler, 0) != epoch(TokenBatchSampler(lengths, 256, seed + 1, shards), 0)
    members = {frozenset(batch) for batch in epoch(sampler, 0)} & {frozenset(batch) for batch in epoch(sampler, 1)}
    assert len(members) < len(sampler) / 2  # who is with whom changes, too


def test_padding_is_small() -> None:
    lengths = some_lengths(3000)
    batches = list(TokenBatchSampler(lengths, 1024, 0))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)


def test_a_pair_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    batches = list(TokenBatchSampler([3, 99, 3, 99], 10, 0))
    assert sorted(map(sorted, batches)) == [[0, 2], [1], [3]]


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_sentence_batches(group: bool, shards: int) -> None:
    lengths = some_lengths(331)
    sampler = SentenceBatchSampler(lengths, 8, 3, shards, group)
    batches = epoch(sampler, 2)
    assert len(batches) == len(sampler) == 42
    assert sorted(i for batch in batches for i in batch) == list(range(331))
    assert max(map(len, batches)) == 8
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert (spread < 15) == group


def test_too_few_pairs_for_the_processes() -> None:
    with pytest.raises(TrainingError, match="cannot be shared evenly by 2 processes"):
        SentenceBatchSampler([1, 1, 1], 1, 0, 2)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_accelerate_deals_out_disjoint_shards_and_skips(processes: int) -> None:
    """The loader as Trainer uses it: prepared by accelerate, told its epoch, and resumed behind some batches."""
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    lengths = some_lengths(400)
    seen, counts = [], set()
    for index in range(processes):
        sampler = TokenBatchSampler(lengths, 200, 9, processes)
        loader = prepare_data_loader(
            DataLoader(range(400), batch_sampler=sampler, collate_fn=list),
            num_processes=processes,
            process_index=index,
            put_on_device=False,
        )
        sampler.set_epoch(3)
        loader.set_epoch(3)
        batches = list(loader)
        assert len(loader) == len(batches) == len(sampler) // processes
        counts.add(len(batches))
        seen += [i for batch in batches for i in batch]
        loader.set_epoch(3)
        skipped = skip_first_batches(loader, 4)
        skipped.set_epoch(3)
        sampler.set_epoch(3)  # EpochCallback does that, whatever stands between
        assert list(skipped) == batches[4:]
    assert len(counts) == 1
    assert sorted(seen) == list(range(400))


def test_evaluation_batches_are_sorted_and_complete() -> None:
    lengths = some_lengths(100)
    batches = length_batches(lengths, 120)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(100))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    assert all(len(b) == 1 or len(b) * lengths[b[0]] <= 120 for b in batches)


def test_collator() -> None:
    rows = [{"input_ids": [5, 6, 0], "labels": [7, 0]}, {"input_ids": [5, 0], "labels": [8, 9, 0]}]
    batch = TranslationCollator(pad_token_id=11, decoder_start_token_id=11)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [5, 0, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 0, -100], [8, 9, 0]]
    # Shifted right behind the start token; what stands behind the last label is never used.
    assert batch["decoder_input_ids"].tolist() == [[11, 7, 11], [11, 8, 9]]
    assert all(value.dtype == torch.long for value in batch.values())
