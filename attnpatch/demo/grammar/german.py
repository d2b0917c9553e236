"""German side of the grammar: declension, verb forms and word order."""

from __future__ import annotations

from functools import cache

from .entries import (
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
from .verbs import AUXILIARIES

# Endings by case (nom., acc., dat.) and column (m, f, n, plural).
_DER = (("der", "die", "das", "die"), ("den", "die", "das", "die"), ("dem", "der", "dem", "den"))
_STRONG = (("er", "e", "es", "e"), ("en", "e", "es", "e"), ("em", "er", "em", "en"))
_MIXED = (("er", "e", "es", "en"), ("en", "e", "es", "en"), ("en", "en", "en", "en"))
_WEAK = (("e", "e", "e", "en"), ("en", "e", "e", "en"), ("en", "en", "en", "en"))
_EIN = (("", "e", "", "e"), ("en", "e", "", "e"), ("em", "er", "em", "en"))
_RELATIVE = (("der", "die", "das", "die"), ("den", "die", "das", "die"), ("dem", "der", "dem", "denen"))
_NOMINATIVE_LIKE = frozenset({"sie", "ihr", "es"})
_COLUMN = {"m": 0, "f": 1, "n": 2}

# Determiner -> (stem, how it declines). "none" and numerals: strong adjectives.
DETERMINERS = {
    "def": ("der", "der"),
    "this": ("dies", "dies"),
    "every": ("jed", "dies"),
    "indef": ("ein", "ein"),
    "no": ("kein", "ein"),
    "my": ("mein", "ein"),
    "your": ("dein", "ein"),
    "his": ("sein", "ein"),
    "her": ("ihr", "ein"),
    "our": ("unser", "ein"),
    "two": ("zwei", "fixed"),
    "three": ("drei", "fixed"),
    "four": ("vier", "fixed"),
    "many": ("viele", "many"),
    "none": ("", "fixed"),
}
_CONTRACTIONS = {
    ("in", "dem"): "im",
    ("an", "dem"): "am",
    ("zu", "dem"): "zum",
    ("zu", "der"): "zur",
    ("von", "dem"): "vom",
    ("in", "das"): "ins",
    ("an", "das"): "ans",
}


def column(phrase: NounPhrase) -> int:
    """Column of the declension tables: 0 m, 1 f, 2 n, 3 plural."""
    return 3 if phrase.plural else _COLUMN[phrase.noun.gender]


def noun_form(phrase: NounPhrase, case: Case) -> str:
    """The noun in its case: dative plural -n, weak masculines in the oblique singular."""
    noun = phrase.noun
    if phrase.plural:
        needs_n = case == Case.DAT and noun.plural[-1] not in "ns"
        return noun.plural + "n" if needs_n else noun.plural
    if noun.weak and case != Case.NOM:
        return noun.weak
    return noun.lemma


def _determiner(kind: str, case: Case, col: int) -> tuple[str, tuple[tuple[str, ...], ...]]:
    stem, declines = DETERMINERS[kind]
    if declines == "der":
        return _DER[case][col], _WEAK
    if declines == "dies":
        return stem + _STRONG[case][col], _WEAK
    if declines == "ein":
        return stem + _EIN[case][col], _MIXED
    if declines == "many":
        return ("vielen" if case == Case.DAT else "viele"), _STRONG
    return stem, _STRONG


@cache
def noun_phrase(phrase: NounPhrase, case: Case) -> str:
    """Determiner, adjective and noun with their endings."""
    col = column(phrase)
    determiner, endings = _determiner(phrase.determiner, case, col)
    words = [determiner] if determiner else []
    if phrase.adjective is not None:
        words.append(phrase.adjective.stem + endings[case][col])
    words.append(noun_form(phrase, case))
    return " ".join(words)


def nominal(value: Nominal, case: Case) -> str:
    """A noun phrase, pronoun or name in its case."""
    if isinstance(value, NounPhrase):
        return noun_phrase(value, case)
    if isinstance(value, Pronoun):
        return value.forms[case]
    return value.lemma


def prepositional(preposition: str, value: Nominal, case: Case) -> str:
    """Preposition and nominal, contracted (im, zur, ins) where the definite article allows."""
    text = nominal(value, case)
    if isinstance(value, NounPhrase) and value.determiner == "def" and not value.plural:
        article, _, rest = text.partition(" ")
        short = _CONTRACTIONS.get((preposition, article))
        if short is not None:
            return f"{short} {rest}"
    return f"{preposition} {text}"


def location(place: Place) -> str:
    """Where: `in`, `an`, `auf` with the dative."""
    if isinstance(place, FixedPlace):
        return place.at
    info = place.noun.place
    if info is None:
        raise ValueError(f"{place.noun.lemma} is not a place")
    return prepositional(info.at, place, Case.DAT)


def direction(place: Place) -> str:
    """Whither: `in`, `an`, `auf` with the accusative, `zu` with the dative, `nach` for cities."""
    if isinstance(place, FixedPlace):
        return place.to
    info = place.noun.place
    if info is None:
        raise ValueError(f"{place.noun.lemma} is not a place")
    return prepositional(info.to, place, info.to_case)


def case_visible(subject: Nominal, other: Nominal) -> bool:
    """Whether the forms alone tell which of the two is the subject."""
    return nominal(subject, Case.NOM) != nominal(subject, Case.ACC) or nominal(other, Case.NOM) != nominal(
        other, Case.ACC
    )


def _verb_bracket(clause: Clause) -> tuple[str, str]:
    """The finite verb and the right bracket (prefix, participle or infinitive)."""
    verb, person = clause.verb, agreement(clause.subject)
    modal = clause.modal
    if modal is not None and modal.kind != "gern":
        forms = modal.preterite if clause.tense == "past" else modal.present
        return forms[person], verb.prefix + verb.present[3] if verb.frame != "be" else verb.lemma
    if clause.tense == "past" and verb.preterite:
        return verb.preterite[person], ""
    if clause.tense in ("past", "perfect"):
        return AUXILIARIES[verb.auxiliary][person], verb.participle
    return verb.present[person], verb.prefix


def _negation(clause: Clause) -> str:
    perfect = clause.tense == "perfect"
    if not clause.negated:
        return "schon" if perfect else ""
    if isinstance(clause.direct, NounPhrase) and clause.direct.determiner == "no":
        return ""  # "kein" carries the negation
    return "noch nicht" if perfect else "nicht"


def _is_light(phrase: NounPhrase) -> bool:
    """Indefinite objects stand after manner and place: im Park ein Buch."""
    return phrase.determiner in ("indef", "none", "no", "two", "three", "four", "many")


def _subject(clause: Clause) -> str:
    text = nominal(clause.subject, Case.NOM)
    if clause.subject_relative is not None and isinstance(clause.subject, NounPhrase):
        return f"{text}, {relative(clause.subject_relative, clause.subject)},"
    return text


def _middle(clause: Clause, skip: str) -> list[str]:
    """The midfield: subject, pronouns, time, dative, definite accusative, nicht, manner, place, rest."""
    out: list[str] = []
    subject = "" if skip == "subject" or clause.gap == "subject" else _subject(clause)
    direct = clause.direct if skip != "direct" and clause.gap != "direct" else None
    indirect = clause.indirect if clause.gap != "indirect" else None
    # "Heute sieht mich der Mann": a pronoun that cannot be taken for the subject precedes a full subject.
    pronouns: list[str] = []
    if isinstance(direct, Pronoun):
        pronouns.append(direct.forms[Case.ACC])
        direct = None
    if isinstance(indirect, Pronoun):
        pronouns.append(indirect.forms[Case.DAT])
        indirect = None
    if isinstance(clause.subject, Pronoun) or not _NOMINATIVE_LIKE.isdisjoint(pronouns):
        out += [subject, *pronouns]
    else:
        out += [*pronouns, subject]
    if clause.time is not None and skip != "time":
        out.append(clause.time.german)
    if clause.frequency is not None:
        out.append(clause.frequency.german)
    if clause.tense == "progressive" and clause.time is None:
        out.append("gerade")
    if indirect is not None:
        out.append(nominal(indirect, Case.DAT))
    light = direct if isinstance(direct, NounPhrase) and _is_light(direct) else None
    if direct is not None and light is None:
        out.append(nominal(direct, Case.ACC))
    out.append(_negation(clause))
    if clause.modal is not None and clause.modal.kind == "gern":
        out.append("gern")
    if clause.manner is not None:
        out.append(clause.manner.german)
    if clause.place is not None and skip != "place" and clause.gap != "place":
        out.append(location(clause.place))
    if light is not None:
        out.append(noun_phrase(light, Case.ACC))
    if clause.oblique is not None:
        verb = clause.verb
        out.append(prepositional(verb.preposition, clause.oblique, verb.preposition_case))
    if clause.direction is not None:
        out.append(direction(clause.direction))
    if clause.predicate is not None:
        out.append(f"sehr {clause.predicate.lemma}" if clause.very else clause.predicate.lemma)
    if clause.profession is not None:
        out.append(clause.profession.lemma)
    return out


def _front(clause: Clause) -> str:
    if clause.front == "time" and clause.time is not None:
        return clause.time.german
    if clause.front == "place" and clause.place is not None:
        return location(clause.place)
    if clause.front == "direct" and clause.direct is not None:
        return nominal(clause.direct, Case.ACC)
    return _subject(clause)


def _joined(words: list[str], clause: Clause) -> str:
    text = " ".join(word for word in words if word)
    if clause.direct_relative is not None and isinstance(clause.direct, NounPhrase):
        text += f", {relative(clause.direct_relative, clause.direct)}"
    return text


def clause_second(clause: Clause, front: str | None = None) -> str:
    """Verb-second order. A given `front` (a clause, a question word) takes the first place."""
    finite, right = _verb_bracket(clause)
    if front is None:
        return _joined([_front(clause), finite, *_middle(clause, clause.front), right], clause)
    return _joined([front, finite, *_middle(clause, ""), right], clause)


def clause_final(clause: Clause) -> str:
    """Verb-final order: a separable prefix joins its finite verb."""
    finite, right = _verb_bracket(clause)
    simple = right and right == clause.verb.prefix
    tail = [right + finite] if simple else [right, finite]
    return _joined([*_middle(clause, ""), *tail], clause)


def relative(value: Relative, head: NounPhrase) -> str:
    """Relative pronoun (gender and number of the head, case of the gap) and verb-final clause."""
    pronoun = _RELATIVE[value.case][column(head)]
    if value.clause.gap == "place" and head.noun.place is not None:
        pronoun = f"{head.noun.place.at} {pronoun}"
    return f"{pronoun} {clause_final(value.clause)}"


def sentence(value: Sentence) -> str:
    """The German sentence with capital and punctuation."""
    main, second, word = value.main, value.second, value.word
    mark = "."
    if value.kind == "question":
        text, mark = clause_second(main, ""), "?"
    elif value.kind == "wh" and word is not None:
        text, mark = clause_second(main, word.german), "?"
    elif value.kind == "coordinate" and second is not None and word is not None:
        text = f"{clause_second(main)}, {word.german} {clause_second(second)}"
    elif value.kind == "subordinate" and second is not None and word is not None:
        subordinate = f"{word.german} {clause_final(second)}"
        if value.second_first:
            text = clause_second(main, f"{subordinate},")
        else:
            text = f"{clause_second(main)}, {subordinate}"
    else:
        text = clause_second(main)
    text = text.replace(",,", ",").rstrip(",")
    return text[0].upper() + text[1:] + mark
