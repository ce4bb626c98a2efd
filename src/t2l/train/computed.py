"""Tasks whose answers are computed: outputs of every form, from templates and word lists written for this package.

The packed tasks are answered with a label or a sentence. Here an answer is JSON, a list, a date, a number with its
unit, a word in another language or the input rewritten, so that an adapter can say more than one of a few words. Every
example is a pure function of the task's name and the example's number. Knows words only.

None of these tasks is one of the everyday tasks, on which nothing is trained: where the form is the same (JSON, dates,
lists) what is asked for is something else. Nor is one a task of a public suite that is evaluated on, as sorting or
finding the odd one out would be.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from t2l.tasks import Example, Task

TRAIN, VALIDATION = 120, 12
"""Examples of each task and split."""


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> dict[str, str]:
    """From `one:eins two:zwei`."""
    return dict(pair.split(":") for pair in text.split())


NAMES = _words(
    "Adele Boris Celia Dario Edith Frank Gisela Hugo Irene Jamal Karin Lukas Marta Nils Olga Pavel Quentin Rosa "
    "Stefan Tilda Umar Vera Walter Xenia Yusuf Zoe Amir Bella Conrad Dora Emil Fiona Goran Hanna Igor Judith"
)
CITIES = _words(
    "Athens Bogota Cairo Denver Essen Florence Geneva Helsinki Istanbul Jakarta Kyoto Lima Marseille Nairobi Ottawa "
    "Porto Quito Riga Stockholm Tunis Utrecht Valencia Warsaw Zagreb Boston Krakow Malaga Naples Perth Tampere"
)
THINGS = _words(
    "lamp bicycle kettle blanket camera drum guitar helmet jacket ladder mirror necklace oven pillow radio saddle "
    "tent umbrella vase wallet clock basket carpet desk fan glove hammer stapler candle suitcase sofa keyboard scarf"
)
ANIMALS = _words(
    "badger cat donkey eagle fox goat heron lizard moose newt otter panda rabbit seal tiger wolf yak zebra"
)
FOODS = _words("bread cheese soup salad pasta pizza stew pancake omelette curry pie sandwich porridge risotto")
ADJECTIVES = _words("small quiet bright heavy broken new cheap soft narrow famous clean cold round tall green wooden")
VERBS = _words("opened painted cleaned moved repaired borrowed sold noticed dropped carried found washed ordered")
PLACES = _words("garden kitchen library station market office school harbour park hotel museum workshop bakery")
MONTHS = _words("January February March April May June July August September October November December")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
JOBS = _words("baker nurse pilot teacher farmer lawyer painter plumber singer tailor welder chemist dentist editor")
NUMBER_WORDS = _words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen")
SPANISH = _pairs(
    "cat:gato sun:sol moon:luna milk:leche salt:sal tree:árbol hand:mano blue:azul green:verde black:negro "
    "white:blanco one:uno two:dos three:tres friend:amigo city:ciudad door:puerta window:ventana table:mesa "
    "chair:silla night:noche day:día week:semana year:año street:calle river:río sea:mar fire:fuego bird:pájaro "
    "fish:pez horse:caballo cow:vaca flower:flor apple:manzana cheese:queso meat:carne egg:huevo rice:arroz "
    "good:bueno bad:malo new:nuevo money:dinero work:trabajo music:música heart:corazón head:cabeza eye:ojo"
)
GERMAN = _pairs(
    "cat:Katze sun:Sonne moon:Mond milk:Milch salt:Salz tree:Baum hand:Hand blue:blau green:grün black:schwarz "
    "white:weiß one:eins two:zwei three:drei friend:Freund city:Stadt door:Tür window:Fenster table:Tisch chair:Stuhl "
    "night:Nacht day:Tag week:Woche year:Jahr street:Straße river:Fluss sea:Meer fire:Feuer bird:Vogel fish:Fisch "
    "horse:Pferd cow:Kuh flower:Blume apple:Apfel cheese:Käse meat:Fleisch egg:Ei rice:Reis good:gut bad:schlecht "
    "new:neu money:Geld work:Arbeit music:Musik heart:Herz head:Kopf eye:Auge"
)
COMPARATIVES = _pairs(
    "tall:taller short:shorter thin:thinner wide:wider deep:deeper loud:louder clean:cleaner cold:colder "
    "heavy:heavier early:earlier easy:easier good:better bad:worse far:farther large:larger nice:nicer cheap:cheaper "
    "thick:thicker safe:safer brave:braver calm:calmer dry:drier sweet:sweeter slow:slower"
)
PRESENT_FORMS = _pairs(
    "bake:baking run:running swim:swimming make:making read:reading sit:sitting drive:driving cook:cooking "
    "plan:planning lie:lying dance:dancing stop:stopping use:using fly:flying cut:cutting smile:smiling dig:digging"
)
CAPITALS = _pairs(
    "Greece:Athens Egypt:Cairo Peru:Lima Kenya:Nairobi Latvia:Riga Poland:Warsaw Croatia:Zagreb Finland:Helsinki "
    "Tunisia:Tunis Cuba:Havana Norway:Oslo Japan:Tokyo China:Beijing Hungary:Budapest Belgium:Brussels Iran:Tehran "
    "Iraq:Baghdad Nepal:Kathmandu Senegal:Dakar Ghana:Accra Qatar:Doha Bulgaria:Sofia Chile:Santiago"
)

Draw = random.Random


@dataclass(frozen=True)
class Template:
    """A task: how people describe it, and a rule that makes an input with its answer."""

    name: str
    descriptions: tuple[str, ...]
    make: Callable[[Draw], tuple[str, str]]


def _sentence(draw: Draw) -> str:
    """A plain sentence."""
    kind = draw.randrange(5)
    name, thing, place, verb = draw.choice(NAMES), draw.choice(THINGS), draw.choice(PLACES), draw.choice(VERBS)
    if kind == 0:
        return f"{name} {verb} the {thing} in the {place}."
    if kind == 1:
        return f"The {draw.choice(ADJECTIVES)} {thing} stands in the {place}."
    if kind == 2:
        return f"Every {draw.choice(DAYS)} {name} goes to the {place} in {draw.choice(CITIES)}."
    if kind == 3:
        return f"A {draw.choice(ANIMALS)} was seen near the {place} by {name}."
    return f"{name} and {draw.choice(NAMES)} {verb} a {draw.choice(ADJECTIVES)} {thing}."


def _some(draw: Draw, words: list[str], low: int = 2, high: int = 5) -> list[str]:
    return draw.sample(words, draw.randint(low, high))


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _shopping(draw: Draw) -> list[str]:
    return _some(draw, THINGS + FOODS, 2, 4)


def _order(draw: Draw) -> tuple[str, str, int]:
    """A message that orders something, what, and how many."""
    thing, number = draw.choice(THINGS), draw.randint(2, 90)
    text = draw.choice(
        (
            f"Please send {number} of the {thing} to our shop in {draw.choice(CITIES)}.",
            f"{draw.choice(NAMES)} wants to buy the {thing}, {number} pieces.",
            f"Item: {thing}; quantity {number}; customer {draw.choice(NAMES)}",
            f"We are out of stock again, {number} more of the {thing} by {draw.choice(DAYS)}!",
        )
    )
    return text, thing, number


def _city_job(draw: Draw) -> tuple[str, str, str, str]:
    name, city, job = draw.choice(NAMES), draw.choice(CITIES), draw.choice(JOBS)
    text = draw.choice(
        (
            f"{name} works as a {job} in {city}.",
            f"For ten years the {job} {name} has lived in {city}.",
            f"In {city} everybody knows {name}, the {job}.",
            f"{name} moved to {city} to become a {job}.",
        )
    )
    return text, name, city, job


def _with_day(draw: Draw) -> tuple[str, int, int, int]:
    day, month, year = draw.randint(1, 28), draw.randint(1, 12), draw.randint(1950, 2029)
    written = draw.choice((f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}"))
    text = draw.choice(
        (
            f"The {draw.choice(PLACES)} opened on {written}.",
            f"On {written} {draw.choice(NAMES)} {draw.choice(VERBS)} the {draw.choice(THINGS)}.",
            f"{draw.choice(NAMES)} will come to {draw.choice(CITIES)} on {written}.",
            f"Delivery of the {draw.choice(THINGS)}: {written}",
        )
    )
    return text, day, month, year


def _json(**fields: object) -> str:
    return json.dumps(fields, ensure_ascii=False)


def _of(words: dict[str, str]) -> Callable[[Draw], tuple[str, str]]:
    """A task that looks a word up."""
    keys = list(words)

    def make(draw: Draw) -> tuple[str, str]:
        key = draw.choice(keys)
        return key, words[key]

    return make


def _map(change: Callable[[str], str], source: Callable[[Draw], str] = _sentence) -> Callable[[Draw], tuple[str, str]]:
    """A task that rewrites a text."""

    def make(draw: Draw) -> tuple[str, str]:
        text = source(draw)
        return text, change(text)

    return make


def _order_json(draw: Draw) -> tuple[str, str]:
    text, thing, number = _order(draw)
    return text, _json(item=thing, quantity=number)


def _order_quantity(draw: Draw) -> tuple[str, str]:
    text, _, number = _order(draw)
    return text, str(number)


def _order_line(draw: Draw) -> tuple[str, str]:
    text, thing, number = _order(draw)
    return text, f"{number} x {thing}"


def _job_json(draw: Draw) -> tuple[str, str]:
    text, name, city, job = _city_job(draw)
    return text, _json(person=name, job=job, city=city)


def _job_pairs(draw: Draw) -> tuple[str, str]:
    text, name, city, _ = _city_job(draw)
    return text, f"name={name}; city={city}"


def _job_only(draw: Draw) -> tuple[str, str]:
    text, _, _, job = _city_job(draw)
    return text, job


def _date_dotted(draw: Draw) -> tuple[str, str]:
    text, day, month, year = _with_day(draw)
    return text, f"{day:02d}.{month:02d}.{year}"


def _date_slashed(draw: Draw) -> tuple[str, str]:
    text, day, month, year = _with_day(draw)
    return text, f"{month:02d}/{day:02d}/{year}"


def _date_year(draw: Draw) -> tuple[str, str]:
    text, _, _, year = _with_day(draw)
    return text, str(year)


def _date_json(draw: Draw) -> tuple[str, str]:
    text, day, month, year = _with_day(draw)
    return text, _json(day=day, month=MONTHS[month - 1], year=year)


def _iso_spelt(draw: Draw) -> tuple[str, str]:
    _, day, month, year = _with_day(draw)
    return f"{year}-{month:02d}-{day:02d}", f"{day} {MONTHS[month - 1]} {year}"


def _time_24(draw: Draw) -> tuple[str, str]:
    hour, minute, after = draw.randint(1, 11), draw.choice((0, 5, 10, 15, 20, 30, 40, 45, 55)), draw.random() < 0.5
    return f"{hour}:{minute:02d} {'pm' if after else 'am'}", f"{hour + 12 * after:02d}:{minute:02d}"


def _packing_bullets(draw: Draw) -> tuple[str, str]:
    words = _shopping(draw)
    text = draw.choice(("We still need {}.", "Don't forget {}!", "On the list: {}.", "Bring {} when you come."))
    return text.format(_listed(words)), "\n".join(f"- {word}" for word in words)


def _packing_array(draw: Draw) -> tuple[str, str]:
    words = _shopping(draw)
    text = draw.choice(("The box held {}.", "{} were sold first.", "She packed {}.", "There is room for {}."))
    return text.format(_listed(words)), json.dumps(words)


def _people_semicolons(draw: Draw) -> tuple[str, str]:
    people = _some(draw, NAMES)
    text = draw.choice(("{} came to the party.", "Invite {}.", "The team is made up of {}.", "Photos by {}."))
    return text.format(_listed(people)), "; ".join(people)


def _count_listed(draw: Draw) -> tuple[str, str]:
    words = _some(draw, THINGS, 2, 8)
    return _listed(words), str(len(words))


def _replace(draw: Draw) -> tuple[str, str]:
    text, name, _, _ = _city_job(draw)
    return text, text.replace(name, "[NAME]")


def _digits(draw: Draw) -> tuple[str, str]:
    number = draw.randrange(2, len(NUMBER_WORDS))
    text = f"{draw.choice(NAMES)} has {NUMBER_WORDS[number]} {draw.choice(THINGS)}s."
    return text, text.replace(NUMBER_WORDS[number], str(number))


def _where(draw: Draw) -> tuple[str, str]:
    name, place, thing = draw.choice(NAMES), draw.choice(PLACES), draw.choice(THINGS)
    return f"{name} left the {thing} in the {place}, then went home.", f"in the {place}"


def _question(draw: Draw) -> tuple[str, str]:
    name, verb, thing = draw.choice(NAMES), draw.choice(VERBS), draw.choice(THINGS)
    return f"{name} {verb} the {thing}.", f"Who {verb} the {thing}?"


def _negate(draw: Draw) -> tuple[str, str]:
    what = f"{draw.choice(THINGS)} is {draw.choice(ADJECTIVES)}"
    return f"The {what}.", f"The {what.replace(' is ', ' is not ')}."


def _capital_sentence(draw: Draw) -> tuple[str, str]:
    country = draw.choice(list(CAPITALS))
    return country, f"The capital of {country} is {CAPITALS[country]}."


def _table_row(draw: Draw) -> tuple[str, str]:
    thing, price, number = draw.choice(THINGS), draw.randint(2, 200), draw.randint(1, 9)
    return f"{number} {thing}(s) at {price} each", f"{thing},{number},{price}"


def _tag(draw: Draw) -> tuple[str, str]:
    text, _, city, _ = _city_job(draw)
    return text, text.replace(city, f"<city>{city}</city>")


def _plus(draw: Draw) -> tuple[str, str]:
    a, b = draw.randint(1, 40), draw.randint(1, 40)
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    return f"{name} had {a} {thing}s and got {b} more.", str(a + b)


def _which_of(draw: Draw) -> tuple[str, str]:
    kinds = {"animal": ANIMALS, "food": FOODS, "city": CITIES, "person": NAMES, "object": THINGS}
    kind = draw.choice(list(kinds))
    return draw.choice(kinds[kind]), kind


def _weekday_after(draw: Draw) -> tuple[str, str]:
    day = draw.randrange(7)
    return DAYS[day], DAYS[(day + 1) % 7]


def _swap_names(draw: Draw) -> tuple[str, str]:
    first, last = draw.choice(NAMES), draw.choice(CITIES)
    return f"{first} {last}", f"{last}, {first}"


def _initials(draw: Draw) -> tuple[str, str]:
    first, last = draw.choice(NAMES), draw.choice(CITIES)
    return f"{first} {last}", f"{first[0]}. {last[0]}."


def _last_word(text: str) -> str:
    return text.rstrip(".").split()[-1]


TEMPLATES: tuple[Template, ...] = (
    Template(
        "order_json",
        (
            'Read the order and give the item and the quantity as JSON with the keys "item" and "quantity".',
            "Turn each order message into a JSON object: item (a string), quantity (a number).",
            "Order parsing to JSON",
            "Our shop system needs the ordered thing and how many of it, as {item, quantity} in JSON.",
        ),
        _order_json,
    ),
    Template(
        "order_quantity",
        (
            "How many pieces does the customer want? Write the number alone.",
            "Extract the ordered quantity as digits.",
            "Quantity from an order",
            "From every message I need only the amount that is ordered, a plain number.",
        ),
        _order_quantity,
    ),
    Template(
        "order_line",
        (
            'Shorten the order to a line such as "3 x chair".',
            "Rewrite the message as quantity, the letter x and the item.",
            "Orders as short lines",
            "Picking list: number of pieces, then x, then what it is.",
        ),
        _order_line,
    ),
    Template(
        "job_json",
        (
            "Pull person, job and city out of the sentence and return a JSON object with these three keys.",
            "Fill a JSON record (person, job, city) from the text.",
            "Structured record of a person",
            "Who is it, what do they do and where? Answer as JSON: person, job, city.",
        ),
        _job_json,
    ),
    Template(
        "job_pairs",
        (
            "Write who it is and where as name=...; city=...",
            "Give name and city as key=value pairs separated by a semicolon.",
            "Name and city as pairs",
            "Key-value output wanted: the person's name and the town they live or work in.",
        ),
        _job_pairs,
    ),
    Template(
        "job_only",
        (
            "What is this person's profession? One word.",
            "Return the occupation that the sentence mentions.",
            "Occupation extraction",
            "I am filling in a form with the field 'job'. What goes there?",
        ),
        _job_only,
    ),
    Template(
        "date_dotted",
        (
            "Which day is meant? Answer in the form DD.MM.YYYY.",
            "Write the date the German way: day, month and year with dots between, two digits for day and month.",
            "Dates with dots",
            "Normalise the date that is mentioned. Format: 07.03.1999.",
        ),
        _date_dotted,
    ),
    Template(
        "date_slashed",
        (
            "Return the date of the event as MM/DD/YYYY.",
            "American date format, please: month, day, year, with slashes.",
            "Dates with slashes",
            "Find the day that is named and print it as month/day/year with leading zeros.",
        ),
        _date_slashed,
    ),
    Template(
        "date_year",
        (
            "In which year does it happen? Four digits.",
            "Output the year that is mentioned in the text.",
            "Year extraction",
            "Only the year matters to me.",
        ),
        _date_year,
    ),
    Template(
        "date_json",
        (
            'Split the day that is named into JSON: {"day": number, "month": name, "year": number}.',
            "Return day, month (its name) and year of the date as a JSON object.",
            "Dates as JSON records",
            "Calendar import: give me the date as JSON with the fields day, month and year.",
        ),
        _date_json,
    ),
    Template(
        "iso_spelt",
        (
            "Spell the ISO date out as day, month name and year.",
            "Make a date that people read (5 May 1999) of one like 1999-05-05.",
            "ISO date in words",
            "Turn machine dates into the form 14 June 2003.",
        ),
        _iso_spelt,
    ),
    Template(
        "time_24",
        (
            "Convert the time to the 24-hour clock, HH:MM.",
            "Write this am/pm time the way European timetables do.",
            "24-hour time",
            "Rewrite the time of day so that it needs no am or pm.",
        ),
        _time_24,
    ),
    Template(
        "packing_bullets",
        (
            "Turn the sentence into a bulleted list, one item a line, each after a dash.",
            "Write every thing that is named on a line of its own that begins with '- '.",
            "Sentence to bullets",
            "Make a checklist of it: dash, space, item.",
        ),
        _packing_bullets,
    ),
    Template(
        "packing_array",
        (
            "List the things in the sentence as a JSON array of strings.",
            'Return the items in order, in the form ["a", "b"].',
            "Items as an array",
            "My program reads JSON: an array of everything that is mentioned, nothing else.",
        ),
        _packing_array,
    ),
    Template(
        "people_semicolons",
        (
            "Write down the people, separated by semicolons.",
            "Which names occur? Give them in order with '; ' between.",
            "Names with semicolons",
            "Extract every first name; the separator is a semicolon and a space.",
        ),
        _people_semicolons,
    ),
    Template(
        "count_listed",
        (
            "Count the things that are listed and write the number in digits.",
            "How long is this list?",
            "Length of a list",
            "Give the number of items named, as a digit.",
        ),
        _count_listed,
    ),
    Template(
        "mask_name",
        (
            "Repeat the sentence with the person's name replaced by [NAME].",
            "Anonymise the text: instead of the name write [NAME], leave the rest.",
            "Masking of names",
            "Before we store these sentences, names have to go; put [NAME] there.",
        ),
        _replace,
    ),
    Template(
        "digits_for_words",
        (
            "Rewrite the sentence with the number in digits.",
            "Copy the text, but write number words as numerals.",
            "Numerals for number words",
            "Style guide: numbers appear as digits. Apply it to the sentence.",
        ),
        _digits,
    ),
    Template(
        "where_is_it",
        (
            "Where is the thing now? Answer with the words of the text, beginning with in.",
            "Say in which place it was left.",
            "Location of an object",
            "Reply with a phrase such as 'in the cellar'.",
        ),
        _where,
    ),
    Template(
        "who_question",
        (
            "Turn the statement into a question that asks who did it.",
            "Make a who-question of each sentence.",
            "Statements into questions",
            "Write the question whose answer is the subject of the sentence.",
        ),
        _question,
    ),
    Template(
        "negate",
        (
            "Make the statement negative.",
            "Say that the opposite is the case by adding not.",
            "Negation",
            "Rewrite the sentence so that it denies what it says.",
        ),
        _negate,
    ),
    Template(
        "capital_sentence",
        (
            "State the capital of the country in a full sentence: The capital of X is Y.",
            "Write a sentence that names the country's capital.",
            "Capitals in sentences",
            "For a geography deck, tell in one sentence which city is the capital.",
        ),
        _capital_sentence,
    ),
    Template(
        "csv_row",
        (
            "Write the line as CSV: item, number, price, with commas and no spaces.",
            "Convert it to a comma-separated row of item, quantity and unit price.",
            "Rows of a CSV file",
            "I paste the result into a spreadsheet: thing,count,price.",
        ),
        _table_row,
    ),
    Template(
        "tag_city",
        (
            "Copy the sentence and put the city between <city> and </city>.",
            "Mark the town with a city tag; change nothing else.",
            "Inline tagging of places",
            "Annotate the place name with XML tags called city.",
        ),
        _tag,
    ),
    Template(
        "how_many_now",
        (
            "How many does this person have now? Digits only.",
            "Add the two numbers of the story.",
            "Sums in stories",
            "Solve the little word problem and give the total.",
        ),
        _plus,
    ),
    Template(
        "what_kind",
        (
            "Is the word an animal, a food, a city, a person or an object? Answer with one of these.",
            "Sort the word into animal, food, city, person or object.",
            "Kind of word",
            "Say what kind of thing the word names; possible answers are animal, food, city, person, object.",
        ),
        _which_of,
    ),
    Template(
        "next_day",
        (
            "Which day comes after this one?",
            "Name the following day of the week.",
            "Tomorrow's weekday",
            "Given a weekday, answer with the next.",
        ),
        _weekday_after,
    ),
    Template(
        "surname_first",
        (
            "Write the surname first, then a comma and the first name.",
            "Turn 'First Last' into 'Last, First'.",
            "Names for an index",
            "Library catalogue style: family name, given name.",
        ),
        _swap_names,
    ),
    Template(
        "initials",
        (
            "Give the person's initials with full stops and a space, such as A. B.",
            "Shorten the name to its initials.",
            "Initials",
            "Write only the first letter of each name, each with a full stop.",
        ),
        _initials,
    ),
    Template(
        "upper",
        (
            "Write the sentence in capital letters.",
            "Shout it: everything in upper case.",
            "Upper case",
            "Return the text with every letter capitalised.",
        ),
        _map(str.upper),
    ),
    Template(
        "snake_case",
        (
            "Turn the phrase into snake_case: small letters with underscores between the words.",
            "Make a variable name of it, words joined by _.",
            "Snake case",
            "Join the words with underscores.",
        ),
        _map(lambda text: text.lower().replace(" ", "_"), lambda d: f"{d.choice(ADJECTIVES)} {d.choice(THINGS)}"),
    ),
    Template(
        "repeat",
        (
            "Repeat the text exactly.",
            "Echo what you are given.",
            "Copy",
            "Print the input again without any change.",
        ),
        _map(str),
    ),
    Template(
        "last_word",
        (
            "What is the last word of the sentence? Leave the full stop out.",
            "Return the final word.",
            "Final words",
            "Only the word that stands at the end is wanted.",
        ),
        _map(_last_word),
    ),
    Template(
        "no_full_stop",
        (
            "Copy the sentence without the full stop.",
            "Remove the punctuation at the end.",
            "Stripping the end",
            "Give the same text back, minus its last character.",
        ),
        _map(lambda text: text.rstrip(".")),
    ),
    Template(
        "quote_reply",
        (
            'Put the text between quotation marks and write He said before it: He said: "..."',
            'Turn the sentence into reported words of the form He said: "...".',
            "Quoting",
            "Make a quotation of it, introduced by He said and a colon.",
        ),
        _map(lambda text: f'He said: "{text}"'),
    ),
    Template(
        "spanish",
        (
            "What is the Spanish word?",
            "Translate into Spanish.",
            "English to Spanish",
            "Vocabulary test: answer with the word in Spanish, without an article.",
        ),
        _of(SPANISH),
    ),
    Template(
        "german",
        (
            "Give the German word for it.",
            "Translate into German.",
            "English to German",
            "How does one say this in German? One word, no article.",
        ),
        _of(GERMAN),
    ),
    Template(
        "from_spanish",
        (
            "What does this Spanish word mean in English?",
            "Translate the Spanish word into English.",
            "Spanish to English",
            "I read a Spanish text and look words up. Give me the English.",
        ),
        _of({theirs: ours for ours, theirs in SPANISH.items()}),
    ),
    Template(
        "from_german",
        (
            "What does this German word mean in English?",
            "Translate the German word into English.",
            "German to English",
            "Dictionary, German to English: one word.",
        ),
        _of({theirs: ours for ours, theirs in GERMAN.items()}),
    ),
    Template(
        "comparative",
        (
            "Give the comparative of the word.",
            "Write the form that means more of it, as in taller for tall.",
            "Comparatives",
            "Which form would stand before 'than'?",
        ),
        _of(COMPARATIVES),
    ),
    Template(
        "ing_form",
        (
            "Write the -ing form of the verb.",
            "Give the present participle.",
            "Participles",
            "Complete 'I am ...' with the right form of the verb.",
        ),
        _of(PRESENT_FORMS),
    ),
    Template(
        "capital_city",
        (
            "Which city is the capital of this country?",
            "Name the capital.",
            "Capital cities",
            "Answer with the city that the country is governed from.",
        ),
        _of(CAPITALS),
    ),
)
"""All computed tasks, in a fixed order."""


def computed_tasks() -> list[Task]:
    """Every template as a task; an input of the validation examples is never a training input of the same task.

    Tasks with few possible inputs have fewer examples, and a tenth of their inputs for validation.
    """
    return [_task(template) for template in TEMPLATES]


def _task(template: Template) -> Task:
    name, found, turn = f"computed_{template.name}", dict[str, str](), 0
    while len(found) < TRAIN + VALIDATION and turn < 20 * (TRAIN + VALIDATION):
        text, answer = template.make(random.Random(f"{name}/{turn}"))
        found.setdefault(text, answer)
        turn += 1
    examples = [Example(f"{name}-{n}", text, (answer,)) for n, (text, answer) in enumerate(found.items())]
    kept = min(VALIDATION, max(1, len(examples) // 10))
    return Task(
        name=name,
        descriptions=template.descriptions,
        examples={"train": tuple(examples[kept:]), "val": tuple(examples[:kept])},
        category="computed output",
    )
