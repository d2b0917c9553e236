"""Which combinations of words belong to which split, and the tables the sampler draws from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache

from .entries import Adjective, Filler, Name, Noun, Pronoun, Verb
from .nouns import ADJECTIVES, CITIES, HOME, NAMES, NOUNS, PRONOUNS
from .verbs import VERBS

SPLITS = ("train", "dev", "test")
_DEV_PERCENT = 8
_TEST_PERCENT = 8


def combination_split(first: str, second: str) -> str:
    """The split of a combination (verb or adjective, noun): a fixed hash, the same on every machine."""
    digest = hashlib.blake2b(f"{first}|{second}".encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 100
    if bucket < _TEST_PERCENT:
        return "test"
    return "dev" if bucket < _TEST_PERCENT + _DEV_PERCENT else "train"


def _objects(verb: Verb) -> list[Filler]:
    """Everything that may fill the key argument of `verb` (object, direction or, if none, subject)."""
    tags = verb.subjects if verb.frame in ("i", "c") else verb.objects
    fillers: list[Filler] = [noun for noun in NOUNS.values() if tags & noun.tags]
    if verb.frame in ("i", "c") and "human" in tags:
        fillers += list(NAMES.values()) + list(PRONOUNS.values())
    if "person" in tags:
        fillers += list(NAMES.values())
        fillers += [value for key, value in PRONOUNS.items() if key != "sie_pl" or verb.frame == "d"]
    if "city" in tags:
        fillers += list(CITIES)
    if "homeward" in tags:
        fillers.append(HOME)
    return fillers


@dataclass
class Table:
    """What one split may combine. Every list is in lexicon order, so sampling is reproducible."""

    fillers: dict[Verb, list[Filler]] = field(default_factory=dict)
    adjectives: dict[Noun, list[Adjective]] = field(default_factory=dict)
    predicates: list[tuple[Adjective, Filler]] = field(default_factory=list)
    professions: list[tuple[Noun, Filler]] = field(default_factory=list)
    verbs: dict[str, list[Verb]] = field(default_factory=dict)  # by frame, only verbs with fillers


def _suits(adjective: Adjective, noun: Noun) -> bool:
    return bool(adjective.tags & noun.tags)


@cache
def table(split: str) -> Table:
    """The combinations of `split`; the three tables are disjoint."""
    result = Table()
    for verb in VERBS.values():
        fillers = [value for value in _objects(verb) if combination_split(verb.lemma, value.lemma) == split]
        if fillers:
            result.fillers[verb] = fillers
            result.verbs.setdefault(verb.frame, []).append(verb)
    for noun in NOUNS.values():
        result.adjectives[noun] = []
        for adjective in ADJECTIVES.values():
            if _suits(adjective, noun) and combination_split(adjective.lemma, noun.lemma) == split:
                result.adjectives[noun].append(adjective)
                result.predicates.append((adjective, noun))
    for adjective in ADJECTIVES.values():
        if "human" in adjective.tags:
            people: list[Name | Pronoun] = [*NAMES.values(), *PRONOUNS.values()]
            for person in people:
                if combination_split(adjective.lemma, person.lemma) == split:
                    result.predicates.append((adjective, person))
    for noun in NOUNS.values():
        for gender in "mf":
            if f"prof{gender}" in noun.tags:
                persons: list[Name | Pronoun] = [name for name in NAMES.values() if name.gender == gender]
                persons.append(PRONOUNS["er" if gender == "m" else "sie_sg"])
                for who in persons:
                    if combination_split(noun.lemma, who.lemma) == split:
                        result.professions.append((noun, who))
    return result
