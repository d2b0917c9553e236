"""Which rows make a batch: under a token budget, of like length, dealt out evenly to processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch.utils.data import Sampler

from attnpatch.training.errors import TrainingError

IGNORE = -100
"""Label of a padded target position: not in any loss."""


class TokenBatchSampler(Sampler[list[int]]):
    """Batches under a token budget, of pairs of like length, in an order that depends on seed and epoch only.

    Args:
        lengths: a pair's length, the longer of source and target, in tokens.
        max_tokens: a batch holds at most this many positions on its longer side, padding included. A single pair
            that is longer is a batch of its own.
        num_shards: how many processes share the batches. The count is made a multiple of it by halving the largest
            batches, so that each process gets as many and no pair is seen twice.

    Where the batches end is fixed by the sorted lengths, so every epoch has as many; which of the pairs of equal
    length share a batch, and the order of the batches, is drawn afresh each epoch. The epoch is set with `set_epoch`,
    nothing is remembered between epochs: a resumed run draws what the uninterrupted one drew.
    """

    together = 1
    """How many batches that follow each other here stay together in an epoch's order."""

    def __init__(self, lengths: Sequence[int], max_tokens: int, seed: int, num_shards: int = 1) -> None:
        if not len(lengths):
            raise TrainingError("no training pairs to make batches of")
        self.lengths = torch.as_tensor(lengths, dtype=torch.long)
        self.max_tokens = max_tokens
        self.seed = seed
        self.epoch = 0
        self.bounds = _even(self._token_bounds(), num_shards)

    def _token_bounds(self) -> list[tuple[int, int]]:
        ordered = self.lengths.sort().values.tolist()
        bounds, start = [], 0
        for i, length in enumerate(ordered):
            if i > start and (i - start + 1) * length > self.max_tokens:
                bounds.append((start, i))
                start = i
        bounds.append((start, len(ordered)))
        return bounds

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.bounds)

    def _order(self, generator: torch.Generator) -> list[int]:
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        return shuffled[self.lengths[shuffled].sort(stable=True).indices].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        order = self._order(generator)
        for group in torch.randperm(len(self.bounds) // self.together, generator=generator).tolist():
            for start, end in self.bounds[group * self.together : (group + 1) * self.together]:
                yield order[start:end]


class SentenceBatchSampler(TokenBatchSampler):
    """Batches of `batch_size` pairs; with `group`, sorted by length within stretches of 50 batches.

    What `num_shards` processes see in a step is what one process with `num_shards` times the batch would see.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, num_shards: int = 1, group: bool = True
    ) -> None:
        self.sentences, self.group, self.together = batch_size * num_shards, group, num_shards
        super().__init__(lengths, 0, seed, num_shards)

    def _token_bounds(self) -> list[tuple[int, int]]:
        total, parts = len(self.lengths), self.together
        starts = list(range(0, total, self.sentences))
        if total - starts[-1] < parts and len(starts) > 1:
            # Too few are left for every process to have one: the last two steps share what there is.
            starts[-1] = (starts[-2] + total) // 2
        ends = [*starts[1:], total]
        edges = [[a + (b - a) * k // parts for k in range(parts + 1)] for a, b in zip(starts, ends, strict=True)]
        return [(a, b) for step in edges for a, b in pairwise(step) if a < b]

    def _order(self, generator: torch.Generator) -> list[int]:
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        if not self.group:
            return shuffled.tolist()
        stretches = shuffled.split(50 * self.sentences)
        return torch.cat([s[self.lengths[s].sort(stable=True).indices] for s in stretches]).tolist()


def _even(bounds: list[tuple[int, int]], num_shards: int) -> list[tuple[int, int]]:
    """Halves the largest batches until their number is a multiple of `num_shards`."""
    bounds = list(bounds)
    while len(bounds) % num_shards:
        largest = max(range(len(bounds)), key=lambda i: bounds[i][1] - bounds[i][0])
        start, end = bounds[largest]
        if end - start < 2:
            raise TrainingError(
                f"{len(bounds)} training pair(s) cannot be shared evenly by {num_shards} processes in batches of one; "
                "use fewer processes or more data"
            )
        bounds[largest : largest + 1] = [(start, (start + end) // 2), ((start + end) // 2, end)]
    return bounds


def _mix(seed: int, epoch: int) -> int:
    """One seed of two, such that (seed 1, epoch 0) and (seed 0, epoch 1) do not draw alike."""
    return (seed * 1_000_003 + epoch * 7_919 + 12_345) % (2**63)


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in batches of like length, longest first, each of at most `max_tokens` padded positions: for
    evaluation, where order does not matter and running out of memory should happen at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * max(lengths[batches[-1][0]], 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def generator_for(*numbers: int) -> torch.Generator:
    """A random generator that depends on these numbers, and on each of them."""
    digest = hashlib.blake2b(repr(tuple(map(int, numbers))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
