"""Verbs, modals, adverbials and conjunctions of the built-in grammar."""

# ruff: noqa: E501
# (one verb a line)

from __future__ import annotations

from .entries import Adverb, Case, Modal, Verb

# [prefix+]infinitive | ich du er ihr | participle aux | English: base 3rd past participle -ing [+particle]
# [:preposition] | frame [preposition case] | subjects | objects | flags, manner adverbs
# The plural forms (wir, sie) are the infinitive. Flags: loc (may have a place), stat (no progressive),
# nopast, swap (English subject is the German dative), to (English "to" before the indirect object),
# nomodal, nogern (not with "gern"), once (not habitual), shopping (places where one shops), whether (ob).
_VERBS = """
schlafen | schlafe schläfst schläft schlaft | geschlafen haben | sleep sleeps slept slept sleeping | i | human animal | | loc gut allein
lachen | lache lachst lacht lacht | gelacht haben | laugh laughs laughed laughed laughing | i | human | | loc laut leise
weinen | weine weinst weint weint | geweint haben | cry cries cried cried crying | i | human | | loc laut leise
arbeiten | arbeite arbeitest arbeitet arbeitet | gearbeitet haben | work works worked worked working | i | human | | loc allein schnell gut
singen | singe singst singt singt | gesungen haben | sing sings sang sung singing | i | human | | loc laut leise gut
tanzen | tanze tanzt tanzt tanzt | getanzt haben | dance dances danced danced dancing | i | human | | loc allein gut
schwimmen | schwimme schwimmst schwimmt schwimmt | geschwommen sein | swim swims swam swum swimming | i | human animal | | schnell langsam gut
auf+stehen | stehe stehst steht steht | aufgestanden sein | get gets got gotten getting +up | i | human | | schnell langsam leise
auf+wachen | wache wachst wacht wacht | aufgewacht sein | wake wakes woke woken waking +up | i | human animal | | loc langsam nogern
ein+schlafen | schlafe schläfst schläft schlaft | eingeschlafen sein | fall falls fell fallen falling +asleep | i | human animal | | loc schnell langsam nogern
an+kommen | komme kommst kommt kommt | angekommen sein | arrive arrives arrived arrived arriving | i | human | | loc allein nogern
ein+kaufen | kaufe kaufst kauft kauft | eingekauft haben | go goes went gone going +shopping | i | human | | loc allein shopping
fern+sehen | sehe siehst sieht seht | ferngesehen haben | watch watches watched watched watching +television | i | human | | allein
aus+gehen | gehe gehst geht geht | ausgegangen sein | go goes went gone going +out | i | human | | allein
weg+laufen | laufe läufst läuft lauft | weggelaufen sein | run runs ran run running +away | i | human animal | | schnell allein nogern
mit+kommen | komme kommst kommt kommt | mitgekommen sein | come comes came come coming +along | i | human | |
bleiben | bleibe bleibst bleibt bleibt | geblieben sein | stay stays stayed stayed staying | l | human | place | allein
wohnen | wohne wohnst wohnt wohnt | gewohnt haben | live lives lived lived living | l | human | home city | stat allein
gehen | gehe gehst geht geht | gegangen sein | go goes went gone going | m | human | place homeward | schnell langsam allein
laufen | laufe läufst läuft lauft | gelaufen sein | run runs ran run running | m | human animal | place homeward | schnell langsam
kommen | komme kommst kommt kommt | gekommen sein | come comes came come coming | m | human | place city homeward | allein
fahren | fahre fährst fährt fahrt | gefahren sein | drive drives drove driven driving | m | human | drivable city homeward | schnell langsam allein vorsichtig
fliegen | fliege fliegst fliegt fliegt | geflogen sein | fly flies flew flown flying | m | human | city | allein
reisen | reise reist reist reist | gereist sein | travel travels traveled traveled traveling | m | human | city | allein
zurück+kommen | komme kommst kommt kommt | zurückgekommen sein | come comes came come coming +back | m | human | place city | allein schnell
um+ziehen | ziehe ziehst zieht zieht | umgezogen sein | move moves moved moved moving | m | human | city town | allein nogern once
lesen | lese liest liest lest | gelesen haben | read reads read read reading | t | human | text | loc schnell leise allein
schreiben | schreibe schreibst schreibt schreibt | geschrieben haben | write writes wrote written writing | t | human | write | loc schnell langsam allein
sehen | sehe siehst sieht seht | gesehen haben | see sees saw seen seeing | t | human animal | human animal thing person | loc stat
kaufen | kaufe kaufst kauft kauft | gekauft haben | buy buys bought bought buying | t | human | thing food drink | loc
verkaufen | verkaufe verkaufst verkauft verkauft | verkauft haben | sell sells sold sold selling | t | human | thing food | loc
essen | esse isst isst esst | gegessen haben | eat eats ate eaten eating | t | human | food | loc schnell langsam allein
fressen | fresse frisst frisst fresst | gefressen haben | eat eats ate eaten eating | t | animal | feed | loc schnell
trinken | trinke trinkst trinkt trinkt | getrunken haben | drink drinks drank drunk drinking | t | human | drink | loc schnell langsam
finden | finde findest findet findet | gefunden haben | find finds found found finding | t | human | thing animal | loc stat once
suchen | suche suchst sucht sucht | gesucht haben | look looks looked looked looking :for | t | human | human animal portable clothes person | loc
öffnen | öffne öffnest öffnet öffnet | geöffnet haben | open opens opened opened opening | t | human | openable | vorsichtig langsam leise nogern
schließen | schließe schließt schließt schließt | geschlossen haben | close closes closed closed closing | t | human | openable | vorsichtig langsam leise nogern
tragen | trage trägst trägt tragt | getragen haben | wear wears wore worn wearing | t | human | clothes | loc
besuchen | besuche besuchst besucht besucht | besucht haben | visit visits visited visited visiting | t | human | human sight person | allein
lieben | liebe liebst liebt liebt | geliebt haben | love loves loved loved loving | t | human | human animal person | stat nomodal
kennen | kenne kennst kennt kennt | gekannt haben | know knows knew known knowing | t | human | human person | stat gut nomodal
mögen | mag magst mag mögt | gemocht haben | like likes liked liked liking | t | human | human animal text person | stat nopast nomodal
haben | habe hast hat habt | gehabt haben | have has had had having | t | human | thing pet | stat nomodal
hören | höre hörst hört hört | gehört haben | hear hears heard heard hearing | t | human animal | human animal person | loc stat
malen | male malst malt malt | gemalt haben | paint paints painted painted painting | t | human | animal art sight | loc allein langsam
zeichnen | zeichne zeichnest zeichnet zeichnet | gezeichnet haben | draw draws drew drawn drawing | t | human | animal human | loc schnell langsam
fotografieren | fotografiere fotografierst fotografiert fotografiert | fotografiert haben | photograph photographs photographed photographed photographing | t | human | animal human sight | allein
putzen | putze putzt putzt putzt | geputzt haben | clean cleans cleaned cleaned cleaning | t | human | room cleanable | schnell allein vorsichtig
waschen | wasche wäschst wäscht wascht | gewaschen haben | wash washes washed washed washing | t | human | washable clothes pet | loc vorsichtig
reparieren | repariere reparierst repariert repariert | repariert haben | repair repairs repaired repaired repairing | t | human | machine furniture | loc schnell allein
brauchen | brauche brauchst braucht braucht | gebraucht haben | need needs needed needed needing | t | human | thing drink | stat nomodal
vergessen | vergesse vergisst vergisst vergesst | vergessen haben | forget forgets forgot forgotten forgetting | t | human | portable clothes | loc stat nomodal
verlieren | verliere verlierst verliert verliert | verloren haben | lose loses lost lost losing | t | human | portable clothes | loc stat nomodal once
verstehen | verstehe verstehst versteht versteht | verstanden haben | understand understands understood understood understanding | t | human | text human person | stat gut
kochen | koche kochst kocht kocht | gekocht haben | cook cooks cooked cooked cooking | t | human | cook | loc allein
backen | backe bäckst bäckt backt | gebacken haben | bake bakes baked baked baking | t | human | bake | loc allein
bauen | baue baust baut baut | gebaut haben | build builds built built building | t | human | buildable furniture | allein langsam once
an+rufen | rufe rufst ruft ruft | angerufen haben | call calls called called calling | t | human | human person |
ab+holen | hole holst holt holt | abgeholt haben | pick picks picked picked picking +up | t | human | human portable person | loc
ein+laden | lade lädst lädt ladet | eingeladen haben | invite invites invited invited inviting | t | human | human person |
kennen+lernen | lerne lernst lernt lernt | kennengelernt haben | meet meets met met meeting | t | human | human person | loc stat once
mit+bringen | bringe bringst bringt bringt | mitgebracht haben | bring brings brought brought bringing +along | t | human | portable food drink |
mit+nehmen | nehme nimmst nimmt nehmt | mitgenommen haben | take takes took taken taking +along | t | human | portable pet clothes |
auf+machen | mache machst macht macht | aufgemacht haben | open opens opened opened opening | t | human | openable | vorsichtig schnell leise nogern
zu+machen | mache machst macht macht | zugemacht haben | close closes closed closed closing | t | human | openable | vorsichtig schnell leise nogern
an+ziehen | ziehe ziehst zieht zieht | angezogen haben | put puts put put putting +on | t | human | clothes | schnell langsam nogern
aus+ziehen | ziehe ziehst zieht zieht | ausgezogen haben | take takes took taken taking +off | t | human | clothes | schnell langsam nogern
auf+räumen | räume räumst räumt räumt | aufgeräumt haben | tidy tidies tidied tidied tidying +up | t | human | room | schnell allein
an+sehen | sehe siehst sieht seht | angesehen haben | look looks looked looked looking :at | t | human | art animal clothes sight | allein
weg+werfen | werfe wirfst wirft werft | weggeworfen haben | throw throws threw thrown throwing +away | t | human | portable clothes food |
ein+packen | packe packst packt packt | eingepackt haben | pack packs packed packed packing | t | human | portable clothes | schnell vorsichtig nogern
auf+essen | esse isst isst esst | aufgegessen haben | eat eats ate eaten eating +up | t | human | food | schnell
ein+schalten | schalte schaltest schaltet schaltet | eingeschaltet haben | turn turns turned turned turning +on | t | human | electric |
aus+schalten | schalte schaltest schaltet schaltet | ausgeschaltet haben | turn turns turned turned turning +off | t | human | electric |
helfen | helfe hilfst hilft helft | geholfen haben | help helps helped helped helping | d | human | human person | loc
danken | danke dankst dankt dankt | gedankt haben | thank thanks thanked thanked thanking | d | human | human person |
folgen | folge folgst folgt folgt | gefolgt sein | follow follows followed followed following | d | human animal | human animal person | langsam leise
antworten | antworte antwortest antwortet antwortet | geantwortet haben | answer answers answered answered answering | d | human | human person | schnell leise laut
gratulieren | gratuliere gratulierst gratuliert gratuliert | gratuliert haben | congratulate congratulates congratulated congratulated congratulating | d | human | human person |
vertrauen | vertraue vertraust vertraut vertraut | vertraut haben | trust trusts trusted trusted trusting | d | human | human person | stat
gehören | gehöre gehörst gehört gehört | gehört haben | belong belongs belonged belonged belonging :to | d | thing pet | human | stat nomodal
gefallen | gefalle gefällst gefällt gefallt | gefallen haben | like likes liked liked liking | d | text art sight clothes | human | stat swap nomodal
zu+hören | höre hörst hört hört | zugehört haben | listen listens listened listened listening :to | d | human | human person |
begegnen | begegne begegnest begegnet begegnet | begegnet sein | meet meets met met meeting | d | human | human animal person | loc stat
geben | gebe gibst gibt gebt | gegeben haben | give gives gave given giving | dt | human | portable food drink |
zeigen | zeige zeigst zeigt zeigt | gezeigt haben | show shows showed shown showing | dt | human | thing text sight |
schicken | schicke schickst schickt schickt | geschickt haben | send sends sent sent sending | dt | human | text portable |
schenken | schenke schenkst schenkt schenkt | geschenkt haben | give gives gave given giving | dt | human | portable clothes art |
leihen | leihe leihst leiht leiht | geliehen haben | lend lends lent lent lending | dt | human | portable vehicle clothes |
bringen | bringe bringst bringt bringt | gebracht haben | bring brings brought brought bringing | dt | human | food drink portable |
erklären | erkläre erklärst erklärt erklärt | erklärt haben | explain explains explained explained explaining | dt | human | text art | to langsam
empfehlen | empfehle empfiehlst empfiehlt empfehlt | empfohlen haben | recommend recommends recommended recommended recommending | dt | human | text sight food | to
zurück+geben | gebe gibst gibt gebt | zurückgegeben haben | give gives gave given giving +back | dt | human | portable vehicle clothes | to
vor+lesen | lese liest liest lest | vorgelesen haben | read reads read read reading | dt | human | text | to leise laut langsam
warten | warte wartest wartet wartet | gewartet haben | wait waits waited waited waiting :for | p auf acc | human | human transport person | loc allein
denken | denke denkst denkt denkt | gedacht haben | think thinks thought thought thinking :of | p an acc | human | human person |
sprechen | spreche sprichst spricht sprecht | gesprochen haben | speak speaks spoke spoken speaking :with | p mit dat | human | human person | loc leise laut
spielen | spiele spielst spielt spielt | gespielt haben | play plays played played playing :with | p mit dat | human | human pet person | loc
träumen | träume träumst träumt träumt | geträumt haben | dream dreams dreamed dreamed dreaming :of | p von dat | human | human animal vehicle |
auf+passen | passe passt passt passt | aufgepasst haben | look looks looked looked looking :after | p auf acc | human | human pet portable person |
sagen | sage sagst sagt sagt | gesagt haben | say says said said saying | c | human | |
glauben | glaube glaubst glaubt glaubt | geglaubt haben | believe believes believed believed believing | c | human | | stat
hoffen | hoffe hoffst hofft hofft | gehofft haben | hope hopes hoped hoped hoping | c | human | | stat
wissen | weiß weißt weiß wisst | gewusst haben | know knows knew known knowing | c | human | | stat whether
fragen | frage fragst fragt fragt | gefragt haben | ask asks asked asked asking | c | human | | stat whether
"""

_HAVE_PRESENT = ("habe", "hast", "hat", "haben", "habt", "haben")
_BE_PRESENT = ("bin", "bist", "ist", "sind", "seid", "sind")
AUXILIARIES = {"haben": _HAVE_PRESENT, "sein": _BE_PRESENT}
_HAVE_PAST = ("hatte", "hattest", "hatte", "hatten", "hattet", "hatten")
_BE_PAST = ("war", "warst", "war", "waren", "wart", "waren")
_FLAGS = frozenset({"loc", "stat", "nopast", "swap", "to", "nomodal", "nogern", "once", "shopping", "whether"})


def _parse_verbs() -> dict[str, Verb]:
    verbs: dict[str, Verb] = {}
    for line in _VERBS.strip().splitlines():
        german, present, perfect, english, frame_text, subjects, objects, rest = (
            part.strip() for part in line.split("|")
        )
        prefix, plus, base = german.partition("+")
        if not plus:
            prefix, base = "", german
        ich, du, er, ihr = present.split()
        participle, auxiliary = perfect.split()
        forms = english.split()
        frame, *governed = frame_text.split()
        words = rest.split()
        verbs[prefix + base] = Verb(
            lemma=prefix + base,
            prefix=prefix,
            present=(ich, du, er, base, ihr, base),
            preterite=_HAVE_PAST if german == "haben" else (),
            participle=participle,
            auxiliary=auxiliary,
            english=(forms[0], forms[1], forms[2], forms[3], forms[4]),
            particle=next((word[1:] for word in forms[5:] if word[0] == "+"), ""),
            preposition_english=next((word[1:] for word in forms[5:] if word[0] == ":"), ""),
            frame=frame,
            preposition=governed[0] if governed else "",
            preposition_case=Case[governed[1].upper()] if governed else Case.ACC,
            subjects=frozenset(subjects.split()),
            objects=frozenset(objects.split()),
            flags=frozenset(word for word in words if word in _FLAGS),
            manners=tuple(word for word in words if word not in _FLAGS),
        )
    return verbs


VERBS = _parse_verbs()
SEIN = Verb(
    lemma="sein",
    prefix="",
    present=_BE_PRESENT,
    preterite=_BE_PAST,
    participle="gewesen",
    auxiliary="sein",
    english=("be", "is", "was", "been", "being"),
    particle="",
    preposition_english="",
    frame="be",
    preposition="",
    preposition_case=Case.ACC,
    subjects=frozenset(),
    objects=frozenset(),
    flags=frozenset({"stat"}),
    manners=(),
)


def _modal(present: str, preterite: str, kind: str, english: tuple[str, str, str], tail: str = "") -> Modal:
    forms = tuple(present.split())
    return Modal(forms[3] if forms else "gern", forms, tuple(preterite.split()), kind, english, tail)


WERDEN = _modal("werde wirst wird werden werdet werden", "", "aux", ("will", "will", ""))
MODALS = (
    _modal(
        "kann kannst kann können könnt können",
        "konnte konntest konnte konnten konntet konnten",
        "aux",
        ("can", "can", "could"),
    ),
    _modal(
        "muss musst muss müssen müsst müssen",
        "musste musstest musste mussten musstet mussten",
        "lexical",
        ("have", "has", "had"),
        "to",
    ),
    _modal(
        "will willst will wollen wollt wollen",
        "wollte wolltest wollte wollten wolltet wollten",
        "lexical",
        ("want", "wants", "wanted"),
        "to",
    ),
    _modal(
        "darf darfst darf dürfen dürft dürfen",
        "durfte durftest durfte durften durftet durften",
        "be",
        ("be", "is", "was"),
        "allowed to",
    ),
    _modal("soll sollst soll sollen sollt sollen", "", "aux", ("should", "should", "")),
    _modal("möchte möchtest möchte möchten möchtet möchten", "", "aux", ("would", "would", ""), "like to"),
)
# "liest gern" <-> "likes to read": an adverb in German, a verb in English.
GERN = _modal("", "", "gern", ("like", "likes", "liked"), "to")


def _adverb(german: str, english: str, tenses: str = "") -> Adverb:
    return Adverb(german, english, frozenset(tenses.split()))


HEUTE = _adverb("heute", "today", "present past progressive")
JEDEN_TAG = _adverb("jeden Tag", "every day", "present")
JEDEN_MORGEN = _adverb("jeden Morgen", "every morning", "present")
TIMES = (
    HEUTE,
    _adverb("gestern", "yesterday", "past"),
    _adverb("letzte Woche", "last week", "past"),
    _adverb("letztes Jahr", "last year", "past"),
    _adverb("am Montag", "on Monday", "past"),
    _adverb("am Freitag", "on Friday", "past"),
    _adverb("vor zwei Tagen", "two days ago", "past"),
    _adverb("morgen", "tomorrow", "future"),
    _adverb("nächste Woche", "next week", "future"),
    _adverb("nächsten Sommer", "next summer", "future"),
    JEDEN_TAG,
    JEDEN_MORGEN,
    _adverb("am Abend", "in the evening", "present past"),
    _adverb("am Wochenende", "on the weekend", "present past"),
    _adverb("in der Nacht", "at night", "present"),
)
FREQUENCIES = (
    _adverb("oft", "often"),
    _adverb("immer", "always"),
    _adverb("manchmal", "sometimes"),
    _adverb("selten", "rarely"),
    _adverb("nie", "never"),
)
MANNERS = {
    entry.german: entry
    for entry in (
        _adverb("schnell", "quickly"),
        _adverb("langsam", "slowly"),
        _adverb("vorsichtig", "carefully"),
        _adverb("laut", "loudly"),
        _adverb("leise", "quietly"),
        _adverb("gut", "well"),
        _adverb("allein", "alone"),
    )
}
QUESTION_WORDS = {
    "warum": _adverb("warum", "why"),
    "wann": _adverb("wann", "when"),
    "wo": _adverb("wo", "where"),
}
WEIL = _adverb("weil", "because")
OBWOHL = _adverb("obwohl", "although")
WENN = _adverb("wenn", "when")
ALS = _adverb("als", "when")
BEVOR = _adverb("bevor", "before")
DASS = _adverb("dass", "that")
OB = _adverb("ob", "whether")
COORDINATORS = (_adverb("aber", "but"), _adverb("und", "and"))
