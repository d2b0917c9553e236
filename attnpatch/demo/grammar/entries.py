"""What the built-in grammar is made of: lexicon entries, phrases and clauses (language-neutral)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Case(IntEnum):
    """German cases used by the grammar (the genitive is left out)."""

    NOM = 0
    ACC = 1
    DAT = 2


# Agreement: index into every six-form paradigm (1sg 2sg 3sg 1pl 2pl 3pl).
THIRD_SINGULAR = 2
THIRD_PLURAL = 5


@dataclass(frozen=True, eq=False)
class PlaceInfo:
    """How a noun is used as a place: `in` + dative <-> `in`; `in` + accusative <-> `to`."""

    at: str
    at_english: str
    to: str
    to_case: Case


@dataclass(frozen=True, eq=False)
class Noun:
    """A German noun with its English one; `plural` is empty for mass nouns, `weak` is the acc./dat. singular."""

    lemma: str
    gender: str  # m, f, n
    plural: str
    english: str
    english_plural: str
    tags: frozenset[str]
    weak: str = ""
    place: PlaceInfo | None = None

    @property
    def mass(self) -> bool:
        return not self.plural

    @property
    def human(self) -> bool:
        return "human" in self.tags

    @property
    def animate(self) -> bool:
        return "human" in self.tags or "animal" in self.tags


@dataclass(frozen=True, eq=False)
class Adjective:
    """An adjective: predicative form, stem that takes endings, English, nouns it goes with (tags)."""

    lemma: str
    stem: str
    english: str
    tags: frozenset[str]
    state: bool = False  # a passing state, which may have a time adverbial
    absolute: bool = False  # has no degrees: not with "very"


@dataclass(frozen=True, eq=False)
class Pronoun:
    """A personal pronoun: German forms by case, English subject and object form."""

    lemma: str
    forms: tuple[str, str, str]
    english: tuple[str, str]
    agreement: int


@dataclass(frozen=True, eq=False)
class Name:
    """A first name, equal in both languages."""

    lemma: str
    gender: str


@dataclass(frozen=True, eq=False)
class FixedPlace:
    """A place without article (cities, home, here): its phrases in both languages; empty where not used."""

    lemma: str
    at: str
    at_english: str
    to: str
    to_english: str


@dataclass(frozen=True, eq=False)
class Verb:
    """A verb: six present forms (without a separable prefix), participle, auxiliary, English forms and frame.

    Frames: i (none), t (acc.), d (dat.), dt (dat. + acc.), p (prepositional object), m (direction),
    l (location), c (clause), be (copula).
    """

    lemma: str
    prefix: str
    present: tuple[str, ...]
    preterite: tuple[str, ...]  # used for the past instead of the Perfekt (sein, haben); else empty
    participle: str
    auxiliary: str
    english: tuple[str, str, str, str, str]  # base, 3rd person, past, participle, -ing
    particle: str  # English particle: pick *up*
    preposition_english: str
    frame: str
    preposition: str
    preposition_case: Case
    subjects: frozenset[str]
    objects: frozenset[str]
    flags: frozenset[str]
    manners: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Modal:
    """A modal: German present and preterite, English ones; `kind` is aux, lexical, be or gern."""

    lemma: str
    present: tuple[str, ...]
    preterite: tuple[str, ...]
    kind: str
    english: tuple[str, str, str]  # base, 3rd person, past (aux: present, present, past; be: rest)
    tail: str  # between the English modal and the infinitive


@dataclass(frozen=True, eq=False)
class Adverb:
    """An adverbial in both languages and the tenses it goes with."""

    german: str
    english: str
    tenses: frozenset[str] = frozenset()


class NounPhrase(NamedTuple):
    """Determiner, adjective and noun. `determiner` is a key of `german.DETERMINERS` or a numeral."""

    noun: Noun
    determiner: str
    plural: bool = False
    adjective: Adjective | None = None


Nominal = NounPhrase | Pronoun | Name
Filler = Noun | Pronoun | Name | FixedPlace
Place = NounPhrase | FixedPlace


@dataclass(slots=True)
class Relative:
    """A relative clause; its `gap` is the argument that the relative pronoun stands for."""

    clause: Clause
    case: Case


@dataclass(slots=True)
class Clause:
    """An abstract clause, realised by `german.clause` and `english.clause` without looking at each other."""

    subject: Nominal
    verb: Verb
    direct: Nominal | None = None
    indirect: Nominal | None = None
    oblique: Nominal | None = None
    direction: Place | None = None
    place: Place | None = None
    predicate: Adjective | None = None
    very: bool = False
    profession: Noun | None = None
    time: Adverb | None = None
    frequency: Adverb | None = None
    manner: Adverb | None = None
    tense: str = "present"  # present, past, future (German present form), progressive, perfect
    modal: Modal | None = None
    negated: bool = False
    front: str = "subject"  # subject, time, place, direct
    gap: str = ""
    subject_relative: Relative | None = None
    direct_relative: Relative | None = None


@dataclass(slots=True)
class Sentence:
    """One or two clauses. `kind`: statement, question, wh, subordinate, coordinate."""

    kind: str
    main: Clause
    word: Adverb | None = None  # question word or conjunction in both languages
    second: Clause | None = None
    second_first: bool = False


def agreement(nominal: Nominal) -> int:
    """The index of the finite form that agrees with `nominal`."""
    if isinstance(nominal, NounPhrase):
        return THIRD_PLURAL if nominal.plural else THIRD_SINGULAR
    if isinstance(nominal, Pronoun):
        return nominal.agreement
    return THIRD_SINGULAR
