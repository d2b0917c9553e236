"""Draws abstract sentences: plausible by word class, from the combinations of one split only."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from . import german
from .entries import (
    THIRD_PLURAL,
    Adjective,
    Adverb,
    Case,
    Clause,
    Filler,
    FixedPlace,
    Name,
    Nominal,
    Noun,
    NounPhrase,
    Place,
    Pronoun,
    Relative,
    Sentence,
    Verb,
    agreement,
)
from .nouns import FIXED_PLACES, NAMES, NOUNS, PRONOUNS, THING_PRONOUNS
from .splits import Table, table
from .verbs import (
    ALS,
    BEVOR,
    COORDINATORS,
    DASS,
    FREQUENCIES,
    GERN,
    HEUTE,
    JEDEN_MORGEN,
    JEDEN_TAG,
    MANNERS,
    MODALS,
    OB,
    OBWOHL,
    QUESTION_WORDS,
    SEIN,
    TIMES,
    VERBS,
    WEIL,
    WENN,
    WERDEN,
)

T = TypeVar("T")

_HUMANS = tuple(noun for noun in NOUNS.values() if noun.human)
_ANIMALS = tuple(noun for noun in NOUNS.values() if "animal" in noun.tags)
_PLACES = tuple(noun for noun in NOUNS.values() if "place" in noun.tags)
_SHOPPING = tuple(noun for noun in NOUNS.values() if "shopping" in noun.tags)
_NAMES = tuple(NAMES.values())
_PRONOUNS = tuple(PRONOUNS.values())
_FIXED = tuple(place for place in FIXED_PLACES.values() if place.at)
_TIMES = {tense: tuple(t for t in TIMES if tense in t.tenses) for tense in ("present", "past", "future", "progressive")}

# Repeated entries are weights.
_SINGULAR = ("def",) * 9 + ("indef",) * 6 + ("this",) * 2 + ("my", "your", "his", "her", "our")
_SINGULAR_KIN = ("def",) * 3 + ("my", "your", "his", "her", "our") * 2
_SINGULAR_UNOWNED = ("def",) * 9 + ("indef",) * 6 + ("this",) * 2
_PLURAL_UNOWNED = ("def",) * 6 + ("none",) * 4 + ("two", "three", "four", "many", "this")
_PLURAL = ("def",) * 6 + ("none",) * 4 + ("two", "three", "four", "many", "this", "my", "her", "our", "his")
_MASS = ("none",) * 6 + ("def",) * 3 + ("my",)
_FRAMES = ("t",) * 22 + ("i",) * 9 + ("m",) * 6 + ("dt",) * 9 + ("d",) * 6 + ("p",) * 5 + ("l",) * 2 + ("be",) * 5
_SIMPLE_FRAMES = ("t",) * 8 + ("i",) * 5 + ("m",) * 3 + ("d",) * 2 + ("p",) * 2 + ("be",) * 2
_ACTIONS = ("t", "t", "t", "i", "m", "d")
_TENSES = ("present",) * 9 + ("past",) * 8 + ("future", "progressive", "perfect")
_INDEFINITE = frozenset({"indef", "none", "two", "three", "four", "many", "no"})
# Pronouns for these would disagree with natural gender or be "it" for a person.
_NO_PRONOUN = frozenset({"Kind", "Mädchen"})


class Sampler:
    """A seeded stream of sentences of one split."""

    def __init__(self, seed: int, split: str) -> None:
        self._random = Random(f"attnpatch grammar {split} {seed}").random
        self._table: Table = table(split)

    def _pick(self, values: Sequence[T]) -> T:
        return values[int(self._random() * len(values))]

    def _chance(self, probability: float) -> bool:
        return self._random() < probability

    # Noun phrases

    def _phrase(self, noun: Noun, adjective: float = 0.4) -> NounPhrase:
        plural = not noun.mass and self._chance(0.25)
        kinds: tuple[str, ...]
        if noun.mass:
            kinds = _MASS
        elif plural:
            kinds = _PLURAL
        else:
            kinds = _SINGULAR_KIN if "kin" in noun.tags else _SINGULAR
        if "unowned" in noun.tags or ("place" in noun.tags and "room" not in noun.tags):  # "mein Mann" is a husband
            kinds = _PLURAL_UNOWNED if plural else _SINGULAR_UNOWNED
        allowed = self._table.adjectives[noun]
        chosen = self._pick(allowed) if allowed and self._chance(adjective) else None
        return NounPhrase(noun, self._pick(kinds), plural, chosen)

    def _nominal(self, filler: Filler, adjective: float = 0.4) -> Nominal:
        if isinstance(filler, Noun):
            return self._phrase(filler, adjective)
        if isinstance(filler, FixedPlace):
            raise ValueError(f"{filler.lemma} cannot be an argument")
        return filler

    def _subject(self, verb: Verb, light: bool = False) -> Nominal:
        draw = self._random()
        if "human" in verb.subjects and not (draw < 0.12 and "animal" in verb.subjects):
            if draw < 0.2:
                return self._pick(_NAMES)
            if draw < 0.42:
                return self._pick(_PRONOUNS)
            noun = self._pick(_HUMANS)
            if draw > 0.97 and not light:
                return NounPhrase(noun, "every")
        else:
            noun = self._pick(_ANIMALS)
        return self._phrase(noun, 0.15 if light else 0.3)

    def _place(self, noun: Noun | None = None) -> Place:
        if noun is None:
            if self._chance(0.3):
                return self._pick(_FIXED)
            noun = self._pick(_PLACES)
        draw = self._random()
        allowed = self._table.adjectives[noun]
        adjective = self._pick(allowed) if allowed and draw < 0.35 else None
        return NounPhrase(noun, "def" if self._chance(0.75) else self._pick(("this", "indef")), False, adjective)

    # Clauses

    def _verb(self, frames: Sequence[str]) -> Verb:
        while True:
            frame = self._pick(frames)
            if frame == "be":
                return SEIN
            verbs = self._table.verbs.get(frame)
            if verbs:
                return self._pick(verbs)

    def _very(self, adjective: Adjective) -> bool:
        return not adjective.absolute and self._chance(0.25)

    def _copula(self, tense: str) -> Clause:
        entries = self._table
        if entries.professions and self._chance(0.06):
            profession, who = self._pick(entries.professions)
            return Clause(self._nominal(who), SEIN, profession=profession, tense=tense)
        adjective, filler = self._pick(entries.predicates)
        subject = self._nominal(filler, 0.0)
        if isinstance(subject, NounPhrase) and subject.determiner in _INDEFINITE:
            subject = subject._replace(determiner="def")
        return Clause(subject, SEIN, predicate=adjective, very=self._very(adjective), tense=tense)

    def _arguments(self, verb: Verb, subject: Nominal | None, tense: str, light: bool) -> Clause:
        """A clause of `verb` whose key argument belongs to the split."""
        filler = self._pick(self._table.fillers[verb])
        frame, adjective = verb.frame, 0.2 if light else 0.45
        if frame in ("i", "c"):
            return Clause(self._nominal(filler, 0.3), verb, tense=tense)
        if frame in ("m", "l"):
            place: Place | None = filler if isinstance(filler, FixedPlace) else None
            if isinstance(filler, Noun):
                place = self._place(filler)
            clause = Clause(subject or self._subject(verb, light), verb, tense=tense)
            if frame == "m":
                clause.direction = place
            else:
                clause.place = place
            return clause
        argument = self._nominal(filler, adjective)
        if verb.lemma in ("gehören", "gefallen"):
            # The thing is the German subject, the person is drawn freely but from the split's combinations.
            person = argument
            things = self._things(verb)
            return Clause(self._definite(self._phrase(self._pick(things), 0.3)), verb, indirect=person, tense=tense)
        if subject is None or "human" not in verb.subjects or not self._distinct(subject, argument):
            subject = self._subject(verb, light)
            while not self._distinct(subject, argument):
                subject = self._subject(verb, light)
        if agreement(subject) == THIRD_PLURAL:
            argument = _not_their(argument)
        clause = Clause(subject, verb, tense=tense)
        if frame == "d":
            clause.indirect = argument
        elif frame == "p":
            clause.oblique = argument
        else:
            clause.direct = argument
        if frame == "dt":
            recipient = self._recipient(subject)
            clause.indirect = _not_their(recipient) if agreement(subject) == THIRD_PLURAL else recipient
        return clause

    def _things(self, verb: Verb) -> list[Noun]:
        return [noun for noun in NOUNS.values() if verb.subjects & noun.tags]

    def _recipient(self, subject: Nominal) -> Nominal:
        while True:
            draw = self._random()
            if draw < 0.15:
                person: Nominal = self._pick(_NAMES)
            elif draw < 0.4:
                person = self._pick(_PRONOUNS)
            else:
                person = self._phrase(self._pick(_HUMANS), 0.25)
                if person.determiner == "none":
                    person = person._replace(determiner="def")
            if self._distinct(subject, person):
                return person

    @staticmethod
    def _definite(phrase: NounPhrase) -> NounPhrase:
        return phrase._replace(determiner="def") if phrase.determiner in _INDEFINITE else phrase

    @staticmethod
    def _distinct(subject: Nominal, other: Nominal) -> bool:
        """No reflexive meaning: not the same person, name or noun twice."""
        if isinstance(subject, NounPhrase):
            return not isinstance(other, NounPhrase) or other.noun is not subject.noun
        if isinstance(subject, Pronoun) and isinstance(other, Pronoun):
            if subject.lemma in ("er", "sie_sg", "sie_pl"):
                return subject is not other
            # I / we and du / ihr overlap in person.
            return subject.english[0] != other.english[0] and {subject.lemma, other.lemma} != {"ich", "wir"}
        return subject is not other

    def _negate(self, clause: Clause) -> None:
        """Marks `clause` as negated and adapts what cannot stand under negation."""
        clause.negated = True
        direct, indirect, oblique, subject = clause.direct, clause.indirect, clause.oblique, clause.subject
        if isinstance(direct, NounPhrase):
            if direct.determiner in ("indef", "none") and clause.tense != "perfect":
                clause.direct = direct._replace(determiner="no")
            else:
                clause.direct = self._definite(direct)
        if isinstance(indirect, NounPhrase):
            clause.indirect = self._definite(indirect)
        if isinstance(oblique, NounPhrase):
            clause.oblique = self._definite(oblique)
        if isinstance(subject, NounPhrase) and (subject.determiner == "every" or subject.determiner in _INDEFINITE):
            clause.subject = subject._replace(determiner="def")

    def _clause(
        self,
        frames: Sequence[str] = _FRAMES,
        subject: Nominal | None = None,
        tense: str | None = None,
        light: bool = False,
    ) -> Clause:
        """A clause with tense, negation or modal, without adverbials."""
        verb = self._verb(frames)
        while tense == "past" and "nopast" in verb.flags:
            verb = self._verb(frames)
        tense = tense or self._pick(_TENSES)
        if verb is SEIN:
            clause = self._copula("past" if tense == "past" else "present")
            if self._chance(0.15):
                self._negate(clause)
            return clause
        stative, flags = "stat" in verb.flags, verb.flags
        if (stative and tense in ("progressive", "perfect")) or ("nopast" in flags and tense == "past"):
            tense = "present"
        if tense == "future" and (("stat" in flags and "loc" not in flags) or "nomodal" in flags):
            tense = "present"
        if tense == "perfect" and verb.frame == "l":
            tense = "past"
        clause = self._arguments(verb, subject, tense, light)
        draw = self._random()
        if tense in ("present", "past") and draw < 0.18 and "nomodal" not in flags:
            modal = self._pick(MODALS)
            if tense == "present" or (modal.preterite and "nopast" not in flags):
                clause.modal = modal
        elif (
            tense == "present"
            and draw < 0.24
            and not stative
            and verb.manners
            and "nogern" not in flags
            and not light
            and verb.frame in ("i", "t")
        ):
            if not isinstance(clause.direct, (Pronoun, Name)):
                clause.modal = GERN
        elif tense == "future" and draw < 0.6 and "nomodal" not in flags:
            clause.modal = WERDEN
            clause.tense = "present"
        if tense != "progressive" and clause.modal is not GERN and self._chance(0.2):
            self._negate(clause)
        if tense == "future" and clause.modal is None:
            # The present form means the future only with its adverbial.
            clause.time = self._pick(_TIMES["future"])
        return clause

    def _adverbials(self, clause: Clause) -> None:
        verb, tense = clause.verb, clause.tense
        if verb is SEIN:
            adjective = clause.predicate
            if adjective is not None and adjective.state:
                if self._chance(0.4):
                    clause.time = self._pick(_TIMES[tense] if not clause.negated else (HEUTE,))
                elif not clause.negated and self._chance(0.3):
                    clause.frequency = self._pick(FREQUENCIES)
            return
        plain = clause.modal is None
        if clause.time is None and tense in ("present", "past", "progressive"):
            if clause.modal is WERDEN:
                if self._chance(0.5):
                    clause.time = self._pick(_TIMES["future"])
            elif plain and "stat" in verb.flags:
                if tense == "past" and self._chance(0.3):
                    clause.time = self._pick(_TIMES["past"])
            elif tense == "progressive":
                if self._chance(0.5):
                    clause.time = HEUTE
            elif "once" in verb.flags and tense == "present":
                pass
            elif self._chance(0.45):
                time = self._pick(_TIMES[tense])
                while clause.negated and time in (JEDEN_TAG, JEDEN_MORGEN):  # "not every day" or "never"?
                    time = self._pick(_TIMES[tense])
                if time is HEUTE and tense == "present" and plain:
                    clause.tense = "progressive"
                clause.time = time
            elif not clause.negated and clause.modal is not GERN and "once" not in verb.flags and self._chance(0.25):
                clause.frequency = self._pick(FREQUENCIES)
        if "loc" in verb.flags and clause.place is None and self._chance(0.3):
            clause.place = self._place(self._pick(_SHOPPING) if "shopping" in verb.flags else None)
        if verb.manners and self._chance(0.15) and clause.modal is not GERN:
            clause.manner = MANNERS[self._pick(verb.manners)]

    def _fronting(self, clause: Clause) -> None:
        draw = self._random()
        if clause.time is not None and draw < 0.4:
            clause.front = "time"
        elif clause.place is not None and draw < 0.2 and clause.verb.frame != "l" and not clause.negated:
            clause.front = "place"
        elif draw > 0.9 and isinstance(clause.direct, NounPhrase) and clause.direct.determiner in ("def", "this"):
            direct = clause.direct
            if german.case_visible(clause.subject, direct) or not direct.noun.animate:
                clause.front = "direct"

    def _full(self, frames: Sequence[str] = _FRAMES) -> Clause:
        clause = self._clause(frames)
        self._adverbials(clause)
        return clause

    # Sentences

    def _subordinate(self) -> Sentence:
        draw = self._random()
        if draw < 0.3:
            return self._about_object()
        if draw < 0.5:
            word, tense = (WENN, "present") if self._chance(0.5) else (ALS, "past")
            main = self._clause(_ACTIONS, tense=tense)
            second = self._clause(_SIMPLE_FRAMES, self._coreferent(main), tense, light=True)
            return Sentence("subordinate", main, word, second, self._chance(0.5))
        if draw < 0.6:
            tense = self._pick(("present", "past"))
            main = self._clause(_ACTIONS, tense=tense)
            second = self._clause(_ACTIONS, self._coreferent(main), tense, light=True)
            if second.negated:
                second = self._clause(("m", "t"), self._coreferent(main), tense, light=True)
            return Sentence("subordinate", main, BEVOR, second, self._chance(0.3))
        main = self._full()
        word = WEIL if self._chance(0.6) else OBWOHL
        second = self._clause(_SIMPLE_FRAMES, self._coreferent(main), _sequence(main), light=True)
        return Sentence("subordinate", main, word, second, self._chance(0.3))

    def _coreferent(self, clause: Clause) -> Nominal | None:
        """Often the pronoun of the subject, else None (a free subject)."""
        subject = clause.subject
        if self._chance(0.4):
            return None
        if isinstance(subject, Pronoun):
            return subject
        if isinstance(subject, Name):
            return PRONOUNS["er" if subject.gender == "m" else "sie_sg"]
        if not subject.noun.human or subject.noun.lemma in _NO_PRONOUN:
            return None
        if subject.plural:
            return PRONOUNS["sie_pl"]
        return PRONOUNS["er" if subject.noun.gender == "m" else "sie_sg"]

    def _about_object(self) -> Sentence:
        """... den Roman ..., weil er spannend ist: the pronoun has the gender of the German noun."""
        entries = self._table
        while True:
            main = self._clause(("t", "dt"))
            direct = main.direct
            if not isinstance(direct, NounPhrase) or direct.noun.animate or direct.determiner == "no":
                continue
            # Only words that cannot be said of the (human) subject, so that the pronoun has one reading.
            words = [a for a in entries.adjectives[direct.noun] if not a.tags & {"human", "animal"}]
            if words:
                break
        thing = THING_PRONOUNS["plural" if direct.plural else direct.noun.gender]
        tense = "past" if main.tense in ("past", "perfect") else "present"
        if direct.adjective is not None:
            main.direct = direct._replace(adjective=None)
        word = self._pick(words)
        second = Clause(thing, SEIN, predicate=word, very=self._very(word), tense=tense)
        conjunction = WEIL if self._chance(0.6) else OBWOHL
        if self._chance(0.15):
            second.negated = True
        return Sentence("subordinate", main, conjunction, second)

    def _complement(self) -> Sentence:
        verbs = self._table.verbs.get("c", [])
        if not verbs:
            return self._subordinate()
        verb = self._pick(verbs)
        tense = self._pick(("present", "past"))
        main = self._arguments(verb, None, tense, light=True)
        word: Adverb = DASS
        if "whether" in verb.flags:
            word = OB
            if verb.lemma == "wissen":
                if self._chance(0.5):
                    self._negate(main)
                else:
                    word = DASS
        second = self._clause(_FRAMES, self._coreferent(main), _sequence(main), light=True)
        return Sentence("subordinate", main, word, second)

    def _relative(self) -> Sentence:
        """A relative clause on the subject, or (extraposed) on a direct object at the end of the clause."""
        on_subject = self._chance(0.5)
        while True:
            main = self._clause(_SIMPLE_FRAMES if on_subject else ("t",))
            head = main.subject if on_subject else main.direct
            if not isinstance(head, NounPhrase) or head.determiner in (
                "every",
                "no",
                "my",
                "your",
                "his",
                "her",
                "our",
            ):
                continue
            if head.determiner == "none":
                head = head._replace(determiner="def")
            if main.verb is SEIN and not head.noun.animate:
                continue
            made = self._relative_to(head)
            if made is None:
                continue
            if "swap" in main.verb.flags or main.verb.lemma == "gehören":
                continue
            if on_subject:
                main.subject, main.subject_relative = head, made
            else:
                main.direct, main.direct_relative = head, made
            return Sentence("statement", main)

    def _relative_to(self, head: NounPhrase) -> Relative | None:
        entries, noun = self._table, head.noun
        draw = self._random()
        if draw < 0.5:
            if noun.animate:
                tag = "human" if noun.human else "animal"
                verb = self._verb(("i", "t", "t", "m"))
                if tag not in verb.subjects:
                    return None
                if verb.frame == "i" and noun not in entries.fillers[verb]:
                    return None
                clause = self._arguments(verb, head, self._pick(("present", "past")), light=True)
                clause.subject = head
                if "nopast" in verb.flags:
                    clause.tense = "present"
                direct = clause.direct
                if direct is not None:
                    if isinstance(direct, NounPhrase) and direct.noun is noun:
                        return None
                    animate = not isinstance(direct, NounPhrase) or direct.noun.animate
                    if animate and not german.case_visible(head, direct):
                        return None
                if "loc" in verb.flags and "shopping" not in verb.flags and self._chance(0.4):
                    clause.place = self._place()
            else:
                words = entries.adjectives[noun]
                if not words or head.adjective is not None:  # no "green bag that is blue"
                    return None
                word = self._pick(words)
                clause = Clause(head, SEIN, predicate=word, very=self._very(word))
            clause.gap = "subject"
            return Relative(clause, Case.NOM)
        if noun.place is not None:
            verb = VERBS["wohnen"]
            if noun not in entries.fillers.get(verb, []):
                return None
            clause = Clause(self._subject(verb, light=True), verb, place=head)
            clause.gap = "place"
            return Relative(clause, Case.DAT)
        verb = self._verb(("t", "t", "t", "d"))
        if noun not in entries.fillers[verb] or "swap" in verb.flags or verb.lemma == "gehören":
            return None
        tense = "present" if "nopast" in verb.flags else self._pick(("present", "past"))
        subject = self._subject(verb, light=True)
        if not self._distinct(subject, head):
            return None
        clause = Clause(subject, verb, tense=tense)
        if verb.frame == "d":
            clause.indirect, clause.gap = head, "indirect"
            return Relative(clause, Case.DAT)
        if noun.animate and not german.case_visible(subject, head):
            return None
        clause.direct, clause.gap = head, "direct"
        return Relative(clause, Case.ACC)

    def _question_word(self) -> Sentence:
        name = self._pick(("warum", "wann", "wo"))
        while True:
            clause = self._clause(("t", "i", "m", "d", "dt", "p"))
            if clause.modal is GERN or clause.tense in ("future", "perfect") or clause.time is not None:
                continue
            if name != "warum" and (clause.tense == "progressive" or clause.negated or "stat" in clause.verb.flags):
                continue
            if name == "wo" and "loc" not in clause.verb.flags:
                continue
            return Sentence("wh", clause, QUESTION_WORDS[name])

    def _coordinate(self) -> Sentence:
        first = self._full(_SIMPLE_FRAMES)
        second = self._clause(_SIMPLE_FRAMES, tense=first.tense if first.tense in ("present", "past") else None)
        return Sentence("coordinate", first, self._pick(COORDINATORS), second)

    def sentence(self) -> Sentence:
        """The next sentence of the stream."""
        draw = self._random()
        if draw < 0.5:
            clause = self._full()
            self._fronting(clause)
            return Sentence("statement", clause)
        if draw < 0.61:
            return Sentence("question", self._full())
        if draw < 0.66:
            return self._question_word()
        if draw < 0.82:
            return self._subordinate()
        if draw < 0.89:
            return self._complement()
        if draw < 0.95:
            return self._relative()
        return self._coordinate()


def _sequence(main: Clause) -> str | None:
    """The tense of the second clause: past after past, else free."""
    return "past" if main.tense in ("past", "perfect") else None


def _not_their(value: Nominal) -> Nominal:
    """After a plural subject "ihr" would be read as "their": say "our" instead of "her"."""
    if isinstance(value, NounPhrase) and value.determiner == "her":
        return value._replace(determiner="our")
    return value
