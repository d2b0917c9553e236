"""A stock model's training step in a process that imported attnpatch, and in one that did not: a script of its own,
which must not import attnpatch itself.

Whole processes differ by some percent in the layout of their memory alone. So both sides are forks of one process that
has imported torch and transformers; they live at once and take short turns on one core. On a GPU, which takes the
forks' kernels in turns, it is the time until a step's kernels are done that counts, and not the processor's.

Usage: python -P stock_step.py PAIRS TURNS STEPS [DEVICE]
prints {"ratio": [of each pair], "seconds": {side: [of each pair]}}.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import IO, NoReturn

import torch
from transformers import RobertaConfig, RobertaForMaskedLM


def work(imported: bool, device: str, orders: IO[str], answers: IO[str]) -> NoReturn:
    """For each line with a number of steps: the seconds of the fastest of them, on a CPU of processor time."""

    def now() -> float:
        if device == "cpu":
            return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    try:
        if imported:
            import attnpatch  # noqa: F401
        torch.manual_seed(0)
        config = RobertaConfig(
            vocab_size=500,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=512,
            max_position_embeddings=50,
        )
        model = RobertaForMaskedLM(config).train().to(device)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ids = torch.randint(5, 500, (4, 32), device=device)
        for line in orders:
            times = []
            for _ in range(int(line)):
                start = now()
                model(input_ids=ids, labels=ids).loss.backward()
                optimiser.step()
                optimiser.zero_grad()
                times.append(now() - start)
            print(min(times), file=answers, flush=True)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


class Side:
    """A fork at work."""

    def __init__(self, imported: bool, device: str) -> None:
        (their_orders, orders), (answers, their_answers) = os.pipe(), os.pipe()
        self.id = os.fork()
        if self.id == 0:
            os.close(orders)
            os.close(answers)
            work(imported, device, os.fdopen(their_orders), os.fdopen(their_answers, "w"))
        os.close(their_orders)
        os.close(their_answers)
        self.orders, self.answers = os.fdopen(orders, "w"), os.fdopen(answers)

    def __call__(self, steps: int) -> float:
        print(steps, file=self.orders, flush=True)
        answer = self.answers.readline()
        if not answer:
            sys.exit("a fork ended before its work was done")
        return float(answer)

    def close(self) -> None:
        self.orders.close()
        self.answers.close()
        os.waitpid(self.id, 0)


def pair(first: bool, turns: int, steps: int, device: str) -> dict[str, list[float]]:
    """Seconds of each turn of two fresh forks; `first`: whether the one with attnpatch is forked first."""
    sides: dict[str, Callable[[int], float]] = {}
    # The second would otherwise hold the first one's pipe open; it is closed last.
    names = ("with", "without") if first else ("without", "with")
    made = [(name, Side(name == "with", device)) for name in names]
    sides.update(made)
    for side in sides.values():
        side(steps)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name in sorted(sides, reverse=bool(turn % 2)):
            seconds[name].append(sides[name](steps))
    for _, fork in reversed(made):
        fork.close()
    return seconds


def main(pairs: int, turns: int, steps: int, device: str = "cpu") -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ratios: list[float] = []
    medians: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(pairs):
        seconds = pair(bool(number % 2), turns, steps, device)
        ratios.append(statistics.median(a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)))
        for name, values in medians.items():
            values.append(statistics.median(seconds[name]))
    print(json.dumps({"ratio": ratios, "seconds": medians}))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]), int(given[1]), int(given[2]), *given[3:4])
