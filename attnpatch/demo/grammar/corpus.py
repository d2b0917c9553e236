"""Pairs and parallel text from the built-in grammar."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from attnpatch.errors import AttnpatchError, unknown

from . import english, german
from .nouns import NOUNS
from .sample import Sampler
from .splits import SPLITS, table

SYNTHETIC_NOTICE = (
    "Synthetic data: German-English sentence pairs made by attnpatch's built-in grammar. They are not "
    "natural language; scores on them say nothing about translation of real text."
)
# So many draws in a row without a new sentence mean that the split is (nearly) used up.
_MAX_REPEATS = 20_000


class GrammarError(AttnpatchError, ValueError):
    """A request that the grammar cannot serve (unknown split, negative or too large count)."""


class Pair(NamedTuple):
    """A German source sentence and its English target."""

    source: str
    target: str


def stream(seed: int, split: str = "train") -> Iterator[Pair]:
    """Endless pairs of `split`, repetitions included; the same for the same seed on every machine.

    Raises GrammarError for an unknown split.
    """
    if split not in SPLITS:
        raise GrammarError(unknown("split", split, SPLITS))
    sampler = Sampler(seed, split)
    while True:
        sentence = sampler.sentence()
        yield Pair(german.sentence(sentence), english.sentence(sentence))


def _distinct(count: int, seed: int, split: str, accept: Callable[[Pair], bool] | None = None) -> list[Pair]:
    if count < 0:
        raise GrammarError(f"count is {count}; it must be 0 or more")
    pairs: dict[str, str] = {}
    repeats = 0
    source_of_pairs = stream(seed, split)
    while len(pairs) < count:
        pair = next(source_of_pairs)
        if pair.source in pairs or (accept is not None and not accept(pair)):
            repeats += 1
            if repeats > _MAX_REPEATS:
                raise GrammarError(f"the {split} split gave only {len(pairs)} distinct pairs; {count} were asked for")
            continue
        repeats = 0
        pairs[pair.source] = pair.target
    return [Pair(source, target) for source, target in pairs.items()]


def generate(count: int, seed: int, split: str = "train") -> list[Pair]:
    """`count` distinct pairs of a split ("train", "dev" or "test"), reproducible by `seed`.

    The splits are disjoint in their combinations: no (verb, object) or (adjective, noun) combination of one
    split occurs in another. A longer list begins with the shorter one of the same seed.

    Raises GrammarError for an unknown split, a negative count, or a count that the split cannot give.
    """
    return _distinct(count, seed, split)


def capacity(split: str = "train") -> int:
    """A lower bound of the number of distinct pairs in `split`.

    It counts one construction only: definite human subject (singular or plural), with or without an
    adjective, present or Perfekt, affirmative or negated, and a definite object, with or without an adjective.
    """
    if split not in SPLITS:
        raise GrammarError(unknown("split", split, SPLITS))
    entries = table(split)

    def variants(noun: object) -> int:
        return next((1 + len(entries.adjectives[n])) * (1 if n.mass else 2) for n in NOUNS.values() if n is noun)

    subjects = {n: variants(n) for n in NOUNS.values() if n.human}
    total = 0
    for verb in entries.verbs.get("t", []):
        tenses = 1 if "nopast" in verb.flags else 2
        for noun in entries.fillers[verb]:
            if "human" in verb.subjects and noun in entries.adjectives:
                people = sum(size for subject, size in subjects.items() if subject is not noun)
                total += variants(noun) * people * tenses * 2
    return total


def _words(text: str) -> list[str]:
    return text[:-1].replace(",", "").lower().split()


def write_corpus(
    directory: str | os.PathLike[str],
    train: int = 40_000,
    dev: int = 500,
    test: int = 500,
    seed: int = 0,
) -> dict[str, tuple[Path, Path]]:
    """Writes train/dev/test.{de,en} and a README.md into `directory`: UTF-8, a sentence a line.

    Every word of dev and test occurs in train, on both sides. Each file is written aside and renamed.

    Returns the (German, English) paths by split. Raises GrammarError for counts that cannot be served,
    OSError for a folder that cannot be written.
    """
    pairs = {"train": generate(train, seed, "train")}
    vocabulary = [set[str](), set[str]()]
    for pair in pairs["train"]:
        for known, text in zip(vocabulary, pair, strict=True):
            known.update(_words(text))

    def covered(pair: Pair) -> bool:
        return all(known.issuperset(_words(text)) for known, text in zip(vocabulary, pair, strict=True))

    pairs["dev"] = _distinct(dev, seed, "dev", covered)
    pairs["test"] = _distinct(test, seed, "test", covered)

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".grammar-", dir=folder))
    written: dict[str, tuple[Path, Path]] = {}
    try:
        counts = ", ".join(f"{split} {len(items)}" for split, items in pairs.items())
        (aside / "README.md").write_text(f"{SYNTHETIC_NOTICE}\n\nPairs: {counts}; seed {seed}.\n", encoding="utf-8")
        for split, items in pairs.items():
            for index, language in enumerate(("de", "en")):
                lines = "".join(f"{pair[index]}\n" for pair in items)
                (aside / f"{split}.{language}").write_text(lines, encoding="utf-8", newline="\n")
        for path in sorted(aside.iterdir()):
            path.replace(folder / path.name)
        for split in pairs:
            written[split] = (folder / f"{split}.de", folder / f"{split}.en")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return written
