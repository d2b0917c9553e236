"""Nouns, adjectives, names, pronouns and places of the built-in grammar."""

from __future__ import annotations

from .entries import Adjective, Case, FixedPlace, Name, Noun, PlaceInfo, Pronoun

# lemma gender plural [weak form] | English singular, plural | tags ("-": no plural)
_NOUNS = """
Mann m Männer | man, men | human adult unowned
Frau f Frauen | woman, women | human adult unowned
Kind n Kinder | child, children | human
Junge m Jungen Jungen | boy, boys | human unowned
Mädchen n Mädchen | girl, girls | human unowned
Lehrer m Lehrer | teacher, teachers | human profm adult
Lehrerin f Lehrerinnen | teacher, teachers | human proff adult
Arzt m Ärzte | doctor, doctors | human profm adult
Ärztin f Ärztinnen | doctor, doctors | human proff adult
Student m Studenten Studenten | student, students | human profm adult
Studentin f Studentinnen | student, students | human proff adult
Polizist m Polizisten Polizisten | police officer, police officers | human profm adult unowned
Bäcker m Bäcker | baker, bakers | human profm adult unowned
Nachbar m Nachbarn Nachbarn | neighbor, neighbors | human adult
Nachbarin f Nachbarinnen | neighbor, neighbors | human adult
Freund m Freunde | friend, friends | human adult
Kollege m Kollegen Kollegen | colleague, colleagues | human adult
Tourist m Touristen Touristen | tourist, tourists | human adult unowned
Gast m Gäste | guest, guests | human adult
Mutter f Mütter | mother, mothers | human kin adult
Vater m Väter | father, fathers | human kin adult
Bruder m Brüder | brother, brothers | human kin adult
Schwester f Schwestern | sister, sisters | human kin adult
Sohn m Söhne | son, sons | human kin
Tochter f Töchter | daughter, daughters | human kin
Onkel m Onkel | uncle, uncles | human kin adult
Tante f Tanten | aunt, aunts | human kin adult
Hund m Hunde | dog, dogs | animal pet
Katze f Katzen | cat, cats | animal pet
Pferd n Pferde | horse, horses | animal wild
Vogel m Vögel | bird, birds | animal wild
Maus f Mäuse | mouse, mice | animal
Kuh f Kühe | cow, cows | animal
Schaf n Schafe | sheep, sheep | animal
Gans f Gänse | goose, geese | animal wild
Bär m Bären Bären | bear, bears | animal wild
Affe m Affen Affen | monkey, monkeys | animal wild
Apfel m Äpfel | apple, apples | food fruit feed redfruit greenfruit
Birne f Birnen | pear, pears | food fruit feed greenfruit
Orange f Orangen | orange, oranges | food fruit
Tomate f Tomaten | tomato, tomatoes | food fruit redfruit
Kartoffel f Kartoffeln | potato, potatoes | food cook feed
Ei n Eier | egg, eggs | food cook
Keks m Kekse | cookie, cookies | food bake feed
Brötchen n Brötchen | roll, rolls | food bake
Brot n - | bread, | food bake feed
Käse m - | cheese, | food feed
Fleisch n - | meat, | food cook feed
Suppe f Suppen | soup, soups | food cook
Reis m - | rice, | food cook
Schokolade f - | chocolate, | food
Wasser n - | water, | drink cold
Milch f - | milk, | drink cold
Kaffee m - | coffee, | drink hot
Tee m - | tea, | drink hot
Saft m - | juice, | drink cold
Wein m - | wine, | drink cold
Buch n Bücher | book, books | thing text write portable
Zeitung f Zeitungen | newspaper, newspapers | thing text portable
Brief m Briefe | letter, letters | thing text write portable openable
Roman m Romane | novel, novels | thing text write portable
Gedicht n Gedichte | poem, poems | text write
Geschichte f Geschichten | story, stories | text write
Nachricht f Nachrichten | message, messages | text write
Auto n Autos | car, cars | thing vehicle machine washable
Fahrrad n Fahrräder | bicycle, bicycles | thing vehicle machine washable
Bus m Busse | bus, buses | transport
Zug m Züge | train, trains | transport
Tisch m Tische | table, tables | thing furniture
Stuhl m Stühle | chair, chairs | thing furniture
Schrank m Schränke | cupboard, cupboards | thing furniture openable
Lampe f Lampen | lamp, lamps | thing electric machine colored
Computer m Computer | computer, computers | thing electric machine
Radio n Radios | radio, radios | thing electric machine
Uhr f Uhren | watch, watches | thing machine portable
Tasche f Taschen | bag, bags | thing portable openable colored
Koffer m Koffer | suitcase, suitcases | thing portable openable colored
Schlüssel m Schlüssel | key, keys | thing portable
Messer n Messer | knife, knives | thing portable
Glas n Gläser | glass, glasses | thing washable
Tasse f Tassen | cup, cups | thing washable colored
Bild n Bilder | picture, pictures | thing art
Geschenk n Geschenke | gift, gifts | thing portable openable colored
Ball m Bälle | ball, balls | thing portable colored
Fenster n Fenster | window, windows | opening openable cleanable
Tür f Türen | door, doors | opening openable cleanable
Mantel m Mäntel | coat, coats | thing clothes
Hut m Hüte | hat, hats | thing clothes
Kleid n Kleider | dress, dresses | thing clothes
Hemd n Hemden | shirt, shirts | thing clothes
Jacke f Jacken | jacket, jackets | thing clothes
Schuh m Schuhe | shoe, shoes | thing clothes cleanable
Park m Parks | park, parks | place outdoor sight drivable ; in in in acc
Garten m Gärten | garden, gardens | place outdoor ; in in in acc
Wald m Wälder | forest, forests | place outdoor drivable ; in in in acc
Strand m Strände | beach, beaches | place outdoor drivable ; an at an acc
Brücke f Brücken | bridge, bridges | place outdoor buildable drivable ; auf on zu dat
Markt m Märkte | market, markets | place outdoor sight shopping drivable ; auf at auf acc
Bahnhof m Bahnhöfe | station, stations | place building drivable ; an at zu dat
Schule f Schulen | school, schools | place building buildable drivable ; in at in acc
Museum n Museen | museum, museums | place building sight drivable ; in in in acc
Kirche f Kirchen | church, churches | place building sight buildable drivable ; in in in acc
Restaurant n Restaurants | restaurant, restaurants | place building drivable ; in in in acc
Hotel n Hotels | hotel, hotels | place building buildable home drivable ; in in in acc
Bibliothek f Bibliotheken | library, libraries | place building sight drivable ; in in in acc
Krankenhaus n Krankenhäuser | hospital, hospitals | place building drivable ; in in in acc
Haus n Häuser | house, houses | place building buildable home room ; in in in acc
Küche f Küchen | kitchen, kitchens | place room ; in in in acc
Zimmer n Zimmer | room, rooms | place room home ; in in in acc
Büro n Büros | office, offices | place room ; in in in acc
Stadt f Städte | city, cities | place sight home town shopping drivable ; in in in acc
Dorf n Dörfer | village, villages | place sight home town shopping drivable ; in in in acc
"""

# lemma [stem] | English | tags of nouns it goes with [; state (a passing one) or absolute (not with "very")]
_ADJECTIVES = """
alt | old | adult animal thing building home vehicle town
jung | young | human animal
freundlich | friendly | human
klug | smart | human animal
nett | nice | human
reich | rich | human
arm | poor | human
fleißig | hardworking | human
faul | lazy | human pet
ehrlich | honest | human
mutig | brave | human
berühmt | famous | human sight art
müde müd | tired | human animal ; state
hungrig | hungry | human animal ; state
krank | sick | human animal ; state
traurig | sad | human ; state
glücklich | happy | human ; state
wild | wild | wild
braun | brown | animal furniture clothes ; absolute
neu | new | thing building transport text opening
teuer teur | expensive | thing transport drink food
billig | cheap | thing food drink
schwer | heavy | furniture portable
kaputt | broken | machine furniture opening ; absolute
klein | small | animal thing place fruit opening
groß | big | animal vehicle furniture portable place fruit opening
rot | red | clothes vehicle furniture redfruit colored ; absolute
blau | blue | clothes vehicle furniture colored ; absolute
grün | green | clothes vehicle greenfruit colored opening ; absolute
schwarz | black | animal clothes vehicle electric ; absolute
weiß | white | animal clothes vehicle furniture opening ; absolute
schön | beautiful | place art clothes animal text
sauber | clean | clothes washable room
schmutzig | dirty | clothes washable room pet
interessant | interesting | text art sight
langweilig | boring | text town
lang | long | write
kurz | short | write
frisch | fresh | food
süß | sweet | fruit hot bake
lecker | delicious | food
kalt | cold | cold hot cook
heiß | hot | hot cook
ruhig | quiet | place
laut | loud | outdoor electric town
modern | modern | building room electric town
leer | empty | building room transport ; absolute
dunkel dunkl | dark | room outdoor
"""

_NAMES = "Anna f, Maria f, Julia f, Lena f, Sophie f, Peter m, Thomas m, Paul m, Max m, Felix m"

# lemma; at; English; to; English
_FIXED_PLACES = """
Berlin; in Berlin; in Berlin; nach Berlin; to Berlin
Hamburg; in Hamburg; in Hamburg; nach Hamburg; to Hamburg
München; in München; in Munich; nach München; to Munich
Köln; in Köln; in Cologne; nach Köln; to Cologne
Wien; in Wien; in Vienna; nach Wien; to Vienna
Paris; in Paris; in Paris; nach Paris; to Paris
Italien; in Italien; in Italy; nach Italien; to Italy
Haus; zu Hause; at home; nach Hause; home
hier; hier; here; ;
dort; dort; there; ;
"""


def _parse_nouns() -> dict[str, Noun]:
    nouns: dict[str, Noun] = {}
    for line in _NOUNS.strip().splitlines():
        german, english, rest = (part.strip() for part in line.split("|"))
        lemma, gender, plural, *weak = german.split()
        singular, english_plural = (part.strip() for part in english.split(","))
        tags, _, place_text = (part.strip() for part in rest.partition(";"))
        place = None
        if place_text:
            at, at_english, to, case = place_text.split()
            place = PlaceInfo(at, at_english, to, Case[case.upper()])
        nouns[lemma] = Noun(
            lemma=lemma,
            gender=gender,
            plural="" if plural == "-" else plural,
            english=singular,
            english_plural=english_plural,
            tags=frozenset(tags.split()),
            weak=weak[0] if weak else "",
            place=place,
        )
    return nouns


def _parse_adjectives() -> dict[str, Adjective]:
    adjectives: dict[str, Adjective] = {}
    for line in _ADJECTIVES.strip().splitlines():
        german, english, rest = (part.strip() for part in line.split("|"))
        lemma, *stem = german.split()
        tags, _, flag = (part.strip() for part in rest.partition(";"))
        adjectives[lemma] = Adjective(
            lemma=lemma,
            stem=stem[0] if stem else lemma,
            english=english,
            tags=frozenset(tags.split()),
            state=flag == "state",
            absolute=flag == "absolute",
        )
    return adjectives


def _parse_fixed_places() -> dict[str, FixedPlace]:
    places: dict[str, FixedPlace] = {}
    for line in _FIXED_PLACES.strip().splitlines():
        lemma, at, at_english, to, to_english = (part.strip() for part in line.split(";"))
        places[lemma] = FixedPlace(lemma, at, at_english, to, to_english)
    return places


NOUNS = _parse_nouns()
ADJECTIVES = _parse_adjectives()
NAMES = {name: Name(name, gender) for name, gender in (entry.split() for entry in _NAMES.split(", "))}
FIXED_PLACES = _parse_fixed_places()
CITIES = tuple(FIXED_PLACES[name] for name in ("Berlin", "Hamburg", "München", "Köln", "Wien", "Paris", "Italien"))
HOME = FIXED_PLACES["Haus"]

# "sie" (accusative) is always "her" and never "them", and the polite "Sie" is left out: one German sentence,
# one English sentence.
PRONOUNS = {
    entry.lemma: entry
    for entry in (
        Pronoun("ich", ("ich", "mich", "mir"), ("I", "me"), 0),
        Pronoun("du", ("du", "dich", "dir"), ("you", "you"), 1),
        Pronoun("er", ("er", "ihn", "ihm"), ("he", "him"), 2),
        Pronoun("sie_sg", ("sie", "sie", "ihr"), ("she", "her"), 2),
        Pronoun("wir", ("wir", "uns", "uns"), ("we", "us"), 3),
        Pronoun("ihr", ("ihr", "euch", "euch"), ("you", "you"), 4),
        Pronoun("sie_pl", ("sie", "sie", "ihnen"), ("they", "them"), 5),
    )
}
# Things: the German pronoun has the gender of the noun, the English one is "it" (or "they").
THING_PRONOUNS = {
    "m": Pronoun("er", ("er", "ihn", "ihm"), ("it", "it"), 2),
    "f": Pronoun("sie_sg", ("sie", "sie", "ihr"), ("it", "it"), 2),
    "n": Pronoun("es", ("es", "es", "ihm"), ("it", "it"), 2),
    "plural": PRONOUNS["sie_pl"],
}
