"""The grid of NT tasks: bases and delays, without their sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Cell:
    """A point of the grid: one task, or a mixture of all pairs of its bases and delays."""

    bases: tuple[int, ...]
    delays: tuple[int, ...]

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """(N, tau) pairs."""
        return list(product(self.bases, self.delays))

    @property
    def name(self) -> str:
        return f"N{label(self.bases)}-tau{label(self.delays)}"

    @property
    def scored_from(self) -> int:
        """Position of the first symbol whose prediction counts: twice the longest delay.

        From tau on a symbol follows from those before it; the rest is for telling the tasks of a mixture apart.
        """
        return 2 * max(self.delays)


def label(numbers: Sequence[int]) -> str:
    """A row or column of the grid in short: "4", or "2+4" for a mixture."""
    return "+".join(map(str, numbers))
