"""English side of the grammar: noun phrases, verb groups with do-support, word order."""

from __future__ import annotations

from functools import cache

from .entries import (
    THIRD_SINGULAR,
    Case,
    Clause,
    FixedPlace,
    Nominal,
    NounPhrase,
    Place,
    Pronoun,
    Relative,
    Sentence,
    agreement,
)

_BE_PRESENT = ("am", "are", "is", "are", "are", "are")
_BE_PAST = ("was", "were", "was", "were", "were", "were")
_DETERMINERS = {
    "def": ("the", "the"),
    "this": ("this", "these"),
    "every": ("every", ""),
    "my": ("my", "my"),
    "your": ("your", "your"),
    "his": ("his", "his"),
    "her": ("her", "her"),
    "our": ("our", "our"),
    "two": ("", "two"),
    "three": ("", "three"),
    "four": ("", "four"),
    "many": ("", "many"),
    "none": ("", ""),
    "no": ("a", "any"),  # the verb carries the negation
    "indef": ("a", ""),
}
# Sound, not spelling, chooses a or an.
_AN_WORDS = frozenset({"honest"})


def article(word: str) -> str:
    """`a` or `an` before `word`."""
    return "an" if word[0] in "aeiou" or word in _AN_WORDS else "a"


@cache
def noun_phrase(phrase: NounPhrase) -> str:
    """Determiner, adjective and noun."""
    noun = phrase.noun
    determiner = _DETERMINERS[phrase.determiner][1 if phrase.plural or noun.mass else 0]
    if noun.mass and phrase.determiner == "this":
        determiner = "this"
    words = [noun.english_plural if phrase.plural else noun.english]
    if phrase.adjective is not None:
        words.insert(0, phrase.adjective.english)
    if determiner == "a":
        determiner = article(words[0])
    if determiner:
        words.insert(0, determiner)
    return " ".join(words)


def nominal(value: Nominal, subject: bool = False) -> str:
    """A nominal as subject or object."""
    if isinstance(value, NounPhrase):
        return noun_phrase(value)
    if isinstance(value, Pronoun):
        return value.english[0 if subject else 1]
    return value.lemma


def location(place: Place) -> str:
    """Where."""
    if isinstance(place, FixedPlace):
        return place.at_english
    info = place.noun.place
    if info is None:
        raise ValueError(f"{place.noun.english} is not a place")
    return f"{info.at_english} {noun_phrase(place)}"


def direction(place: Place) -> str:
    """Whither."""
    return place.to_english if isinstance(place, FixedPlace) else f"to {noun_phrase(place)}"


def _verb_group(clause: Clause, person: int, inverted: bool) -> tuple[str, str]:
    """Auxiliary (may be empty) and the rest. Lexical verbs get `do` where the auxiliary is needed."""
    base, third, past, participle, ing = clause.verb.english
    tense, modal = clause.tense, clause.modal
    if modal is not None:
        if modal.kind == "aux":
            word = modal.english[2] if tense == "past" else modal.english[0]
            return word, f"{modal.tail} {base}" if modal.tail else base
        if modal.kind == "be":
            return (_BE_PAST if tense == "past" else _BE_PRESENT)[person], f"{modal.tail} {base}"
        ending = f" {modal.tail} {base}"
        base, third, past = (form + ending for form in modal.english)
    elif tense == "future":
        return "will", base
    elif tense == "progressive":
        return _BE_PRESENT[person], ing
    elif tense == "perfect":
        return ("has" if person == THIRD_SINGULAR else "have"), participle
    elif clause.verb.frame == "be":
        return (_BE_PAST if tense == "past" else _BE_PRESENT)[person], ""
    if clause.negated or inverted:
        if tense == "past":
            return "did", base
        return ("does" if person == THIRD_SINGULAR else "do"), base
    if tense == "past":
        return "", past
    return "", third if person == THIRD_SINGULAR else base


def _objects(clause: Clause, direct: Nominal | None, indirect: Nominal | None) -> list[str]:
    verb = clause.verb
    out: list[str] = []
    direct_text = nominal(direct) if direct is not None and clause.gap != "direct" else ""
    indirect_text = nominal(indirect) if indirect is not None and clause.gap != "indirect" else ""
    if clause.direct_relative is not None and isinstance(direct, NounPhrase):
        direct_text += f" {relative(clause.direct_relative, direct)}"
    if verb.frame == "dt":
        if "to" in verb.flags:
            out += [direct_text, verb.particle, f"to {indirect_text}"]
        else:
            out += [indirect_text, direct_text]
        return out
    if isinstance(direct, Pronoun):
        out += [verb.preposition_english, direct_text, verb.particle]
    else:
        out += [verb.particle, verb.preposition_english, direct_text]
    out.append(indirect_text)
    return out


def _parts(clause: Clause, inverted: bool, question_word: str, front: bool) -> str:
    subject, direct, indirect = clause.subject, clause.direct, clause.indirect
    if "swap" in clause.verb.flags and indirect is not None:
        subject, direct, indirect = indirect, clause.subject, None
    auxiliary, rest = _verb_group(clause, agreement(subject), inverted)
    subject_text = "" if clause.gap == "subject" else nominal(subject, subject=True)
    if clause.subject_relative is not None and isinstance(clause.subject, NounPhrase):
        subject_text += f" {relative(clause.subject_relative, clause.subject)}"
    time = clause.time.english if clause.time is not None else ""
    place = location(clause.place) if clause.place is not None and clause.gap != "place" else ""
    words = [question_word]
    if front and clause.front == "time":
        words.append(time)
        time = ""
    elif front and clause.front == "place":
        words.append(place)
        place = ""
    negation = "not" if clause.negated else ""
    if inverted:
        words += [auxiliary, subject_text, negation]
    elif auxiliary == "can" and negation:
        words += [subject_text, "cannot"]
    else:
        words += [subject_text, auxiliary, negation]
    if clause.frequency is not None:
        words.append(clause.frequency.english)
    if clause.tense == "perfect" and not clause.negated:
        words.append("already")
    words.append(rest)
    words += _objects(clause, direct, indirect)
    if clause.predicate is not None:
        words.append(f"very {clause.predicate.english}" if clause.very else clause.predicate.english)
    if clause.profession is not None:
        words.append(f"{article(clause.profession.english)} {clause.profession.english}")
    if clause.oblique is not None:
        words.append(nominal(clause.oblique))
    if clause.direction is not None:
        words.append(direction(clause.direction))
    if clause.manner is not None:
        words.append(clause.manner.english)
    words += [place, time]
    if clause.tense == "perfect" and clause.negated:
        words.append("yet")
    return " ".join(word for word in words if word)


def clause(value: Clause, front: bool = True) -> str:
    """A statement; a fronted time or place adverbial stays in front when `front`."""
    return _parts(value, inverted=False, question_word="", front=front)


def question(value: Clause, question_word: str = "") -> str:
    """A question: auxiliary before the subject."""
    return _parts(value, inverted=True, question_word=question_word, front=False)


def relative(value: Relative, head: NounPhrase) -> str:
    """who / whom for people, that for the rest; `in which` for places."""
    if value.clause.gap == "place" and head.noun.place is not None:
        pronoun = f"{head.noun.place.at_english} which"
    elif head.noun.human:
        pronoun = "who" if value.case == Case.NOM else "whom"
    else:
        pronoun = "that"
    return f"{pronoun} {clause(value.clause, front=False)}"


def sentence(value: Sentence) -> str:
    """The English sentence with capital and punctuation."""
    main, second, word = value.main, value.second, value.word
    mark = "."
    if value.kind == "question":
        text, mark = question(main), "?"
    elif value.kind == "wh" and word is not None:
        text, mark = question(main, word.english), "?"
    elif value.kind == "coordinate" and second is not None and word is not None:
        text = f"{clause(main)}, {word.english} {clause(second)}"
    elif value.kind == "subordinate" and second is not None and word is not None:
        subordinate = f"{word.english} {clause(second, front=False)}"
        if value.second_first:
            text = f"{subordinate}, {clause(main, front=False)}"
        else:
            text = f"{clause(main)} {subordinate}"
    else:
        text = clause(main)
    return text[0].upper() + text[1:] + mark
