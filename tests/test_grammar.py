"""The built-in German-English grammar: hand-written gold pairs, properties of the text, splits, files."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import pytest

from attnpatch.demo.grammar import (
    SYNTHETIC_NOTICE,
    GrammarError,
    Pair,
    capacity,
    english,
    generate,
    german,
    stream,
    write_corpus,
)
from attnpatch.demo.grammar import entries as e
from attnpatch.demo.grammar import nouns as n
from attnpatch.demo.grammar import verbs as v
from attnpatch.demo.grammar.sample import Sampler
from attnpatch.demo.grammar.splits import SPLITS, combination_split, table
from attnpatch.errors import AttnpatchError


def np(noun: str, determiner: str = "def", adjective: str | None = None, plural: bool = False) -> e.NounPhrase:
    return e.NounPhrase(n.NOUNS[noun], determiner, plural, n.ADJECTIVES[adjective] if adjective else None)


def clause(subject: str | e.Nominal, verb: str, **parts: object) -> e.Clause:
    if isinstance(subject, str):
        subject = n.PRONOUNS.get(subject) or n.NAMES.get(subject) or np(subject)
    return e.Clause(subject, v.SEIN if verb == "sein" else v.VERBS[verb], **parts)  # type: ignore[arg-type]


def say(main: e.Clause, kind: str = "statement", **parts: object) -> e.Sentence:
    return e.Sentence(kind, main, **parts)  # type: ignore[arg-type]


def adverb(text: str) -> e.Adverb:
    return next(a for a in (*v.TIMES, *v.FREQUENCIES, *v.MANNERS.values()) if a.german == text)


KANN, MUSS, WILL, DARF, SOLL, MOECHTE = v.MODALS
NAMES, PRONOUNS, ADJ = n.NAMES, n.PRONOUNS, n.ADJECTIVES
PAST, NOT = {"tense": "past"}, {"negated": True}

GOLD = [
    # present, accusative by gender, article and adjective endings
    (
        say(clause("Mann", "lesen", direct=np("Roman", "indef", "lang"))),
        "Der Mann liest einen langen Roman.",
        "The man reads a long novel.",
    ),
    (
        say(clause(np("Frau", "def", "jung"), "kaufen", direct=np("Lampe", "indef", "neu"))),
        "Die junge Frau kauft eine neue Lampe.",
        "The young woman buys a new lamp.",
    ),
    (
        say(clause(np("Mädchen", "indef", "klug"), "tragen", direct=np("Kleid", "this", "rot"))),
        "Ein kluges Mädchen trägt dieses rote Kleid.",
        "A smart girl wears this red dress.",
    ),
    (
        say(clause(np("Student", "indef", "müde"), "trinken", direct=np("Kaffee", "none", "heiß"))),
        "Ein müder Student trinkt heißen Kaffee.",
        "A tired student drinks hot coffee.",
    ),
    (
        say(clause("wir", "essen", direct=np("Apfel", "none", "rot", plural=True))),
        "Wir essen rote Äpfel.",
        "We eat red apples.",
    ),
    (
        say(clause("du", "kaufen", direct=np("Uhr", "two", "teuer", plural=True))),
        "Du kaufst zwei teure Uhren.",
        "You buy two expensive watches.",
    ),
    (
        say(clause(np("Kind", plural=True), "mögen", direct=np("Tasche", "my", "alt", plural=True))),
        "Die Kinder mögen meine alten Taschen.",
        "The children like my old bags.",
    ),
    # weak nouns
    (
        say(clause("ich", "sehen", direct=np("Student"))),
        "Ich sehe den Studenten.",
        "I see the student.",
    ),
    (
        say(clause("Anna", "helfen", indirect=np("Junge", "indef"))),
        "Anna hilft einem Jungen.",
        "Anna helps a boy.",
    ),
    # dative, plural dative -n, ditransitive order
    (
        say(clause("Arzt", "helfen", indirect=np("Kind", plural=True))),
        "Der Arzt hilft den Kindern.",
        "The doctor helps the children.",
    ),
    (
        say(clause("Lehrerin", "geben", indirect=np("Schwester", "her"), direct=np("Schlüssel", "indef"))),
        "Die Lehrerin gibt ihrer Schwester einen Schlüssel.",
        "The teacher gives her sister a key.",
    ),
    (
        say(clause("Peter", "erklären", indirect=np("Gast", "def", "alt", plural=True), direct=np("Bild"))),
        "Peter erklärt den alten Gästen das Bild.",
        "Peter explains the picture to the old guests.",
    ),
    (
        say(clause(np("Auto"), "gehören", indirect=np("Nachbar"))),
        "Das Auto gehört dem Nachbarn.",
        "The car belongs to the neighbor.",
    ),
    (
        say(clause(np("Buch", plural=True), "gefallen", indirect=np("Tante"), **NOT)),
        "Die Bücher gefallen der Tante nicht.",
        "The aunt does not like the books.",
    ),
    # prepositions with their case
    (
        say(clause("sie_sg", "warten", oblique=np("Bus"), place=np("Bahnhof"))),
        "Sie wartet am Bahnhof auf den Bus.",
        "She waits for the bus at the station.",
    ),
    (
        say(clause("er", "sprechen", oblique=np("Frau", "indef", "nett"))),
        "Er spricht mit einer netten Frau.",
        "He speaks with a nice woman.",
    ),
    (
        say(clause("sie_pl", "gehen", direction=np("Schule"), **PAST)),
        "Sie sind in die Schule gegangen.",
        "They went to the school.",
    ),
    (
        say(clause("Maria", "arbeiten", place=np("Museum", "indef"))),
        "Maria arbeitet in einem Museum.",
        "Maria works in a museum.",
    ),
    (
        say(clause("Paul", "laufen", direction=np("Brücke"))),
        "Paul läuft zur Brücke.",
        "Paul runs to the bridge.",
    ),
    (
        say(clause("ihr", "fliegen", direction=n.FIXED_PLACES["München"], time=adverb("morgen"), tense="future")),
        "Ihr fliegt morgen nach München.",
        "You will fly to Munich tomorrow.",
    ),
    # verb-second with inversion
    (
        say(clause("Bäcker", "backen", direct=np("Brot", "none"), time=adverb("jeden Morgen"), front="time")),
        "Jeden Morgen bäckt der Bäcker Brot.",
        "Every morning the baker bakes bread.",
    ),
    (
        say(clause("Frau", "besuchen", direct=np("Onkel"), front="direct", **PAST)),
        "Den Onkel hat die Frau besucht.",
        "The woman visited the uncle.",
    ),
    (
        say(clause("Gast", "schlafen", place=np("Garten"), front="place")),
        "Im Garten schläft der Gast.",
        "In the garden the guest sleeps.",
    ),
    (
        say(clause("Vater", "suchen", direct=PRONOUNS["ich"], time=adverb("gestern"), front="time", **PAST)),
        "Gestern hat mich der Vater gesucht.",
        "Yesterday the father looked for me.",
    ),
    # separable verbs: split, in the participle, infinitive, verb-final
    (
        say(clause("Mutter", "anrufen", direct=np("Arzt"), time=adverb("gestern"), **PAST)),
        "Die Mutter hat gestern den Arzt angerufen.",
        "The mother called the doctor yesterday.",
    ),
    (
        say(clause("Tante", "anziehen", direct=np("Mantel", "her"))),
        "Die Tante zieht ihren Mantel an.",
        "The aunt puts on her coat.",
    ),
    (
        say(clause("wir", "abholen", direct=PRONOUNS["er"], modal=MUSS)),
        "Wir müssen ihn abholen.",
        "We have to pick him up.",
    ),
    (
        say(
            clause("Thomas", "lachen"),
            "subordinate",
            word=v.WEIL,
            second=clause("Hund", "weglaufen"),
        ),
        "Thomas lacht, weil der Hund wegläuft.",
        "Thomas laughs because the dog runs away.",
    ),
    # subordinate clauses, fronted too
    (
        say(
            clause("Sohn", "fernsehen"),
            "subordinate",
            word=v.OBWOHL,
            second=clause("er", "arbeiten", modal=SOLL),
            second_first=True,
        ),
        "Obwohl er arbeiten soll, sieht der Sohn fern.",
        "Although he should work, the son watches television.",
    ),
    (
        say(
            clause("ich", "wissen"),
            "subordinate",
            word=v.DASS,
            second=clause("Julia", "ankommen", tense="past"),
        ),
        "Ich weiß, dass Julia angekommen ist.",
        "I know that Julia arrived.",
    ),
    (
        say(
            clause("Frau", "kaufen", direct=np("Tasche"), **NOT),
            "subordinate",
            word=v.WEIL,
            second=e.Clause(n.THING_PRONOUNS["f"], v.SEIN, predicate=ADJ["teuer"], very=True),
        ),
        "Die Frau kauft die Tasche nicht, weil sie sehr teuer ist.",
        "The woman does not buy the bag because it is very expensive.",
    ),
    (
        say(
            clause("Lehrer", "fragen", tense="past"),
            "subordinate",
            word=v.OB,
            second=clause(np("Junge", plural=True), "verstehen", direct=np("Gedicht"), tense="past"),
        ),
        "Der Lehrer hat gefragt, ob die Jungen das Gedicht verstanden haben.",
        "The teacher asked whether the boys understood the poem.",
    ),
    # relative clauses
    (
        say(
            clause(
                "Mann",
                "schlafen",
                subject_relative=e.Relative(clause("Mann", "singen", gap="subject", **PAST), e.Case.NOM),
            )
        ),
        "Der Mann, der gesungen hat, schläft.",
        "The man who sang sleeps.",
    ),
    (
        say(
            clause(
                "Frau",
                "einladen",
                direct=np("Arzt"),
                direct_relative=e.Relative(clause("sie_sg", "lieben", direct=np("Arzt"), gap="direct"), e.Case.ACC),
            )
        ),
        "Die Frau lädt den Arzt ein, den sie liebt.",
        "The woman invites the doctor whom she loves.",
    ),
    (
        say(
            clause(
                np("Kind", plural=True),
                "lachen",
                subject_relative=e.Relative(
                    clause("wir", "danken", indirect=np("Kind", plural=True), gap="indirect"), e.Case.DAT
                ),
            )
        ),
        "Die Kinder, denen wir danken, lachen.",
        "The children whom we thank laugh.",
    ),
    # negation: nicht, kein, with modals
    (
        say(clause("Max", "essen", direct=np("Ei", "no"), **NOT)),
        "Max isst kein Ei.",
        "Max does not eat an egg.",
    ),
    (
        say(clause("du", "haben", direct=np("Tasche", "no", plural=True), tense="past", **NOT)),
        "Du hattest keine Taschen.",
        "You did not have any bags.",
    ),
    (
        say(clause("Kind", "gehen", direction=np("Park"), modal=DARF, **NOT)),
        "Das Kind darf nicht in den Park gehen.",
        "The child is not allowed to go to the park.",
    ),
    (
        say(clause("ich", "kommen", modal=KANN, direction=n.HOME, **NOT)),
        "Ich kann nicht nach Hause kommen.",
        "I cannot come home.",
    ),
    (
        say(clause("Bruder", "putzen", direct=np("Küche"), modal=WILL, **PAST, **NOT)),
        "Der Bruder wollte die Küche nicht putzen.",
        "The brother did not want to clean the kitchen.",
    ),
    (
        say(clause("Lena", "lesen", direct=np("Brief", "his"), tense="perfect", **NOT)),
        "Lena hat seinen Brief noch nicht gelesen.",
        "Lena has not read his letter yet.",
    ),
    # aspect, gern, manner and place, copula
    (
        say(clause("ihr", "lesen", direct=np("Zeitung", "none", plural=True), modal=v.GERN)),
        "Ihr lest gern Zeitungen.",
        "You like to read newspapers.",
    ),
    (
        say(clause("Katze", "fressen", direct=np("Fleisch", "def"), tense="progressive")),
        "Die Katze frisst gerade das Fleisch.",
        "The cat is eating the meat.",
    ),
    (
        say(clause("Felix", "singen", time=adverb("am Abend"), manner=adverb("laut"), place=np("Kirche"))),
        "Felix singt am Abend laut in der Kirche.",
        "Felix sings loudly in the church in the evening.",
    ),
    (
        say(clause("Sophie", "sein", profession=n.NOUNS["Ärztin"])),
        "Sophie ist Ärztin.",
        "Sophie is a doctor.",
    ),
    (
        say(clause(np("Bär", "def", "wild", plural=True), "sein", predicate=ADJ["hungrig"], **PAST, **NOT)),
        "Die wilden Bären waren nicht hungrig.",
        "The wild bears were not hungry.",
    ),
    # questions
    (
        say(clause(np("Mann", "indef", "ehrlich"), "verkaufen", direct=np("Auto")), "question"),
        "Verkauft ein ehrlicher Mann das Auto?",
        "Does an honest man sell the car?",
    ),
    (
        say(clause("sie_sg", "aufstehen", tense="past"), "question"),
        "Ist sie aufgestanden?",
        "Did she get up?",
    ),
    (
        say(clause("du", "umziehen", modal=MOECHTE, direction=n.FIXED_PLACES["Wien"]), "question"),
        "Möchtest du nach Wien umziehen?",
        "Would you like to move to Vienna?",
    ),
    (
        say(clause("Tochter", "weinen"), "wh", word=v.QUESTION_WORDS["warum"]),
        "Warum weint die Tochter?",
        "Why does the daughter cry?",
    ),
]


@pytest.mark.parametrize(("sentence", "source", "target"), GOLD, ids=[gold[1] for gold in GOLD])
def test_gold(sentence: e.Sentence, source: str, target: str) -> None:
    assert german.sentence(sentence) == source
    assert english.sentence(sentence) == target


# Declension by hand, against the tables of the product.
@pytest.mark.parametrize(
    ("phrase", "nominative", "accusative", "dative"),
    [
        (np("Hund", "def", "alt"), "der alte Hund", "den alten Hund", "dem alten Hund"),
        (np("Hund", "indef", "alt"), "ein alter Hund", "einen alten Hund", "einem alten Hund"),
        (np("Katze", "indef", "alt"), "eine alte Katze", "eine alte Katze", "einer alten Katze"),
        (np("Katze", "def", "alt"), "die alte Katze", "die alte Katze", "der alten Katze"),
        (np("Pferd", "no", "alt"), "kein altes Pferd", "kein altes Pferd", "keinem alten Pferd"),
        (np("Pferd", "every"), "jedes Pferd", "jedes Pferd", "jedem Pferd"),
        (np("Junge", "this"), "dieser Junge", "diesen Jungen", "diesem Jungen"),
        (np("Junge", "our", None, True), "unsere Jungen", "unsere Jungen", "unseren Jungen"),
        (np("Auto", "def", "teuer", True), "die teuren Autos", "die teuren Autos", "den teuren Autos"),
        (np("Apfel", "none", "rot", True), "rote Äpfel", "rote Äpfel", "roten Äpfeln"),
        (np("Mann", "many", "jung", True), "viele junge Männer", "viele junge Männer", "vielen jungen Männern"),
        (np("Milch", "none", "kalt"), "kalte Milch", "kalte Milch", "kalter Milch"),
        (np("Wein", "none", "kalt"), "kalter Wein", "kalten Wein", "kaltem Wein"),
        (np("Wasser", "my", "kalt"), "mein kaltes Wasser", "mein kaltes Wasser", "meinem kalten Wasser"),
    ],
)
def test_declension(phrase: e.NounPhrase, nominative: str, accusative: str, dative: str) -> None:
    assert [german.noun_phrase(phrase, case) for case in e.Case] == [nominative, accusative, dative]


COUNT = 101_000


@pytest.fixture(scope="module")
def train() -> list[Pair]:
    return generate(COUNT, seed=3)


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[Pair]]:
    return {split: generate(3000, seed=3, split=split) for split in ("dev", "test")}


def test_more_than_a_hundred_thousand_distinct_training_pairs(train: list[Pair]) -> None:
    assert len({pair.source for pair in train}) == COUNT
    assert capacity("train") > 1_000_000
    assert capacity("dev") > 10_000
    assert capacity("test") > 10_000


def test_speed() -> None:
    start = time.process_time()
    generate(5_000, seed=9)
    assert time.process_time() - start < 2  # 50,000 in 5 s is 0.5 s here; four times for a slow machine


def test_one_german_sentence_has_one_translation(train: list[Pair]) -> None:
    translations = {pair.source: pair.target for pair in train}
    for split in SPLITS:
        for pair in itertools.islice(stream(0, split), 4000):
            assert translations.setdefault(pair.source, pair.target) == pair.target


def test_reproducible_and_prefix() -> None:
    first = generate(300, seed=5, split="dev")
    assert first == generate(300, seed=5, split="dev")
    assert first[:50] == generate(50, seed=5, split="dev")
    assert first != generate(300, seed=6, split="dev")


def combinations(sentence: e.Sentence) -> set[tuple[str, str]]:
    """The (verb or adjective, noun) combinations by which `sentence` belongs to its split.

    The pronoun of a thing stands for its antecedent, which the main clause names.
    """
    found: set[tuple[str, str]] = set()
    antecedent = sentence.main.direct
    for clause in (sentence.main, sentence.second):
        if clause is not None:
            collect(clause, antecedent, found)
    return found


def collect(clause: e.Clause, antecedent: e.Nominal | None, found: set[tuple[str, str]]) -> None:
    verb = clause.verb
    subject: e.Nominal = clause.subject
    thing = isinstance(subject, e.Pronoun) and subject in n.THING_PRONOUNS.values()
    predicate = clause.predicate
    if thing and antecedent is not None and predicate is not None and "human" not in predicate.tags:
        subject = antecedent
    phrases = (subject, clause.direct, clause.indirect, clause.oblique, clause.direction, clause.place)
    for phrase in phrases:
        if isinstance(phrase, e.NounPhrase) and phrase.adjective is not None:
            found.add((phrase.adjective.lemma, phrase.noun.lemma))
    key: e.Nominal | e.Place | None
    if clause.predicate is not None:
        found.add((clause.predicate.lemma, lemma(subject)))
    elif clause.profession is not None:
        found.add((clause.profession.lemma, lemma(subject)))
    else:
        if verb.frame in ("i", "c"):
            key = subject
        elif verb.frame in ("t", "dt"):
            key = clause.direct
        else:
            key = clause.indirect or clause.oblique or clause.direction or clause.place
        if key is not None:
            found.add((verb.lemma, lemma(key)))
    for relative in (clause.subject_relative, clause.direct_relative):
        if relative is not None:
            collect(relative.clause, None, found)


def lemma(value: e.Nominal | e.Place) -> str:
    return value.noun.lemma if isinstance(value, e.NounPhrase) else value.lemma


@pytest.mark.parametrize("split", SPLITS)
def test_every_combination_belongs_to_the_split(split: str) -> None:
    sampler = Sampler(11, split)
    seen = set()
    for _ in range(4000):
        found = combinations(sampler.sentence())
        assert found
        seen |= found
    assert {combination_split(*combination) for combination in seen} == {split}
    assert len(seen) > 100


def test_a_fronted_animate_object_can_be_told_from_the_subject() -> None:
    sampler = Sampler(2, "train")
    fronted = 0
    for _ in range(20_000):
        main = sampler.sentence().main
        direct = main.direct
        if main.front == "direct" and isinstance(direct, e.NounPhrase) and direct.noun.animate:
            fronted += 1
            forms = [{german.nominal(x, e.Case.NOM), german.nominal(x, e.Case.ACC)} for x in (main.subject, direct)]
            assert max(len(pair) for pair in forms) == 2, german.sentence(say(main))
    assert fronted > 10


def test_splits_share_no_sentence(train: list[Pair], held_out: dict[str, list[Pair]]) -> None:
    sources = [{p.source for p in pairs} for pairs in (train, held_out["dev"], held_out["test"])]
    assert not sources[0] & sources[1]
    assert not sources[0] & sources[2]
    assert not sources[1] & sources[2]


def test_every_lexicon_word_occurs_in_training() -> None:
    entries = table("train")
    assert set(entries.fillers) == set(v.VERBS.values())
    used = {value for fillers in entries.fillers.values() for value in fillers}
    assert used >= {*n.NOUNS.values(), *n.NAMES.values(), *n.PRONOUNS.values(), *n.CITIES}
    assert {a for values in entries.adjectives.values() for a in values} == set(n.ADJECTIVES.values())


def test_size_of_the_lexicon() -> None:
    verbs = v.VERBS.values()
    assert len(n.NOUNS) >= 40
    assert len(verbs) >= 30
    assert len(n.ADJECTIVES) >= 25
    assert sum(bool(verb.prefix) for verb in verbs) >= 10
    assert sum(verb.frame == "d" for verb in verbs) >= 5
    assert sum(verb.auxiliary == "sein" for verb in verbs) >= 8


def test_participles_carry_their_prefix_and_forms_are_complete() -> None:
    for verb in v.VERBS.values():
        assert verb.participle.startswith(verb.prefix)
        assert len(verb.present) == 6
        assert all(verb.english)
        assert len(verb.english) == 5
        assert set(verb.manners) <= set(v.MANNERS)


# Properties of the German text, from lists made by hand.
_MASCULINE = "Mann|Arzt|Hund|Vogel|Apfel|Brief|Roman|Tisch|Mantel|Hut|Park|Garten|Wald|Strand|Markt|Bus"
_FEMININE = "Frau|Lehrerin|Mutter|Katze|Maus|Birne|Zeitung|Lampe|Tasche|Jacke|Brücke|Schule|Küche|Stadt|Tür"
_NEUTER = "Kind|Pferd|Schaf|Ei|Buch|Gedicht|Auto|Fahrrad|Radio|Glas|Bild|Kleid|Hemd|Museum|Haus|Dorf|Hotel"
_WRONG = [
    rf"\b(das|eine|keine|jede|jedes|ins|zur) ({_MASCULINE})\b",
    rf"\b(das|den|dem|ein|einen|einem|kein|keinen|im|zum|jedes) ({_FEMININE})\b",
    rf"\b(der|die|den|eine|einen|einer|keinen|keiner|zur|jede) ({_NEUTER})\b",
    # singular of weak masculines only in the nominative
    r"\b(den|dem|einen|einem|diesen|diesem|keinen|meinen|meinem) (\w+en )?(Student|Junge|Nachbar|Kollege|Bär|Affe)\b",
    # dative prepositions
    r"\b(mit|von|zu) (die|das|den [A-ZÄÖÜ]\w*[^ns\W]\b|eine|einen|mich|dich|ihn|er|sie)\b",
    r"(?<!,) (in|an|zu|von) dem [A-ZÄÖÜ]",
    # dative plural without -n
    r"\b(mit|von) den (\w+en )?(Kinder|Männer|Freunde|Hunde|Väter|Mütter|Brüder|Gäste|Ärzte)\b",
    # agreement
    r"\b[Ii]ch (\w+st|ist|hat|sind|haben)\b",
    r"\b[Dd]u (ist|hat|habe|haben|sind|habt)\b",
    r"\b[Ww]ir (ist|hat|bin|hast|habt|seid)\b",
    r"  |,,| ,|,\.|,\?",
    r"\bnicht (ein|eine|einen) \w+ (gelesen|gekauft|gesehen)\b",
    r"\bangeruft|einladt|geessen|gelest|gegeht|aufgesteht\b",
]
_WRONG_ENGLISH = [
    r"\ba [aeio]\w+",
    r"\ban (?!honest)[^aeiou]",
    r"\b(mans|womans|childs|mouses|gooses|sheeps|knifes|tomatos|citys|librarys)\b",
    r"^(He|She|Anna|Peter) (do|have|are|were|go|eat|read not)\b",
    r"\b(did|does|do) not \w+(ed|s)\b(?<!press)(?<!pass)(?<!need)",
    r"\b(goed|eated|buyed|seed|gived|taked|runned|maked|thinked)\b",
    r"  | [.,?]",
]


@pytest.mark.parametrize("pattern", _WRONG)
def test_german_text_has_no_known_error(train: list[Pair], pattern: str) -> None:
    compiled = re.compile(pattern)
    assert [pair.source for pair in train[:40_000] if compiled.search(pair.source)] == []


@pytest.mark.parametrize("pattern", _WRONG_ENGLISH)
def test_english_text_has_no_known_error(train: list[Pair], pattern: str) -> None:
    compiled = re.compile(pattern)
    assert [pair.target for pair in train[:40_000] if compiled.search(pair.target)] == []


def test_verb_is_last_in_subordinate_clauses(train: list[Pair]) -> None:
    finite = {form for verb in (*v.VERBS.values(), v.SEIN) for form in (*verb.present, *verb.preterite)}
    finite |= {verb.prefix + form for verb in v.VERBS.values() for form in verb.present}
    finite |= {form for modal in (*v.MODALS, v.WERDEN) for form in (*modal.present, *modal.preterite)}
    count = 0
    for pair in train[:20_000]:
        match = re.search(r"(?:weil|obwohl|dass|ob|bevor|als|wenn) ([^,]*)[.]$", pair.source)
        if match:
            count += 1
            assert match[1].split()[-1] in finite, pair
    assert count > 1000


def test_all_constructions_occur(train: list[Pair]) -> None:
    text = "\n".join(pair.source for pair in train[:20_000])
    for pattern in (
        r"^Gestern hat ",  # inversion
        r"^Den \w+ hat ",  # fronted object
        r", weil .* (hat|ist)\.$",
        r", obwohl ",
        r", wenn |^Wenn ",
        r", dass ",
        r"\bruft \w+ .* an\.$",
        r"\bangerufen\b",
        r", der .*, ",
        r", denen ",
        r"\bkeinen\b",
        r"\bnoch nicht\b",
        r"\bden Studenten\b",
        r"\bden Kindern\b",
        r"^(Hat|Ist|Kann|Liest) .*\?$",
        r"^Warum .*\?$",
        r"\bgern\b",
        r"weil er sehr? ?\w+ ist",
    ):
        assert re.search(pattern, text, re.MULTILINE), pattern


def test_bad_requests_are_refused() -> None:
    with pytest.raises(GrammarError, match="did you mean 'train'"):
        generate(1, 0, "trian")
    with pytest.raises(AttnpatchError, match="count is -1"):
        generate(-1, 0)
    with pytest.raises(GrammarError, match="Known: dev, test, train"):
        capacity("validation")
    assert generate(0, 0) == []


def test_write_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    written = write_corpus(folder, train=4000, dev=50, test=60, seed=1)
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", *(f"{split}.{lang}" for split in SPLITS for lang in ("de", "en"))}
    assert SYNTHETIC_NOTICE in (folder / "README.md").read_text(encoding="utf-8")
    lines = {path.name: path.read_text(encoding="utf-8").split("\n") for pair in written.values() for path in pair}
    for split, count in (("train", 4000), ("dev", 50), ("test", 60)):
        for language in ("de", "en"):
            text = lines[f"{split}.{language}"]
            assert text[-1] == ""
            assert len(text) == count + 1
            assert all(text[:-1])
    assert [Pair(*pair) for pair in zip(lines["train.de"], lines["train.en"], strict=True)][:-1] == generate(4000, 1)
    for language in ("de", "en"):
        known = set(re.findall(r"\w+", " ".join(lines[f"train.{language}"]).lower()))
        for split in ("dev", "test"):
            assert set(re.findall(r"\w+", " ".join(lines[f"{split}.{language}"]).lower())) <= known
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_corpus(folder, train=4000, dev=50, test=60, seed=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_write_corpus_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(GrammarError):
        write_corpus(tmp_path / "corpus", train=10, dev=-1, test=1)
    assert not (tmp_path / "corpus").exists()
