"""The NT tasks: sequences that follow a delayed sum modulo N (Gros 2024, arXiv 2407.18601).

    x(t) = ( x(t-1) + x(t-tau) ) mod N,   x(0) .. x(tau-1) random

Base N and delay tau set the difficulty: there are N^tau initial conditions; N = 2 is a delayed exclusive or. The
definition is reconstructed from the paper's description, noise and mixtures included:

- noise p: after the initial symbols each symbol is, with probability p, replaced by one of the N - 1 others. It stays
  in the history, so the next symbols follow from what can be seen; `ceiling` is the best accuracy then.
- mixtures: each sequence follows one (N, tau) of several, told apart by nothing but its symbols.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnpatch.experiments.sequences.grid import Cell
from attnpatch.training.batching import IGNORE


def ceiling(base: int, noise: float) -> float:
    """The accuracy of a predictor that knows the task: the likeliest symbol's probability."""
    return max(1 - noise, noise / (base - 1))


def nt_sequences(base: int, delay: int, length: int, count: int, noise: float, generator: torch.Generator) -> Tensor:
    """Sequences of the task N = base, tau = delay: int64 [count, length] of symbols 0 .. N - 1."""
    x = torch.empty(count, length, dtype=torch.long)
    x[:, :delay] = torch.randint(base, (count, min(delay, length)), generator=generator)
    # All drawn before: a sequence's start does not depend on its length.
    flipped = torch.rand(count, length, generator=generator) < noise
    shift = torch.randint(1, base, (count, length), generator=generator)
    for t in range(delay, length):
        clean = (x[:, t - 1] + x[:, t - delay]) % base
        x[:, t] = torch.where(flipped[:, t], (clean + shift[:, t]) % base, clean)
    return x


def batch_of(cell: Cell, length: int, count: int, noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    """`count` sequences, each of a task of the cell drawn at random: input_ids and labels [count, length].

    A label is the next symbol.
    """
    tasks = cell.tasks
    chosen = torch.randint(len(tasks), (count,), generator=generator)
    x = torch.empty(count, length + 1, dtype=torch.long)
    for i, (base, delay) in enumerate(tasks):
        rows = (chosen == i).nonzero().squeeze(1)
        x[rows] = nt_sequences(base, delay, length + 1, len(rows), noise, generator)
    return {"input_ids": x[:, :-1], "labels": x[:, 1:].contiguous()}


def scored_labels(labels: Tensor, cell: Cell) -> Tensor:
    """The labels whose prediction counts; the others are -100. Column t holds the symbol at position t + 1."""
    scored = labels.clone()
    scored[:, : cell.scored_from - 1] = IGNORE
    return scored
