"""Tasks whose answers are computed: outputs of every form, from rules here and words in `data/computed.json`.

The packed tasks are answered with a label or a sentence. Here an answer is JSON, a list, a date, a number with its
unit, a word in another language or the input rewritten, so that an adapter can say more than one of a few words. Every
example is a pure function of the task's name and the example's number. Knows words only.

None of these tasks is one of the everyday tasks, on which nothing is trained: where the form is the same (JSON, dates,
lists) what is asked for is something else. Nor is one a task of a public suite that is evaluated on, as sorting or
finding the odd one out would be.
"""

import json
import random
from collections.abc import Callable, Mapping

from t2l.tasks import Example, Task, shipped_data

TRAIN, VALIDATION = 120, 12
"""Examples of each task and split."""

_DATA = shipped_data("computed")

WORDS: Mapping[str, list[str]] = _DATA["words"]
PAIRS: Mapping[str, Mapping[str, str]] = _DATA["pairs"]
DESCRIPTIONS: Mapping[str, list[str]] = _DATA["descriptions"]
"""Of each task, by its name: how people describe it."""

Draw = random.Random
Rule = Callable[[Draw], tuple[str, str]]
"""Makes an input with its answer."""


def _pick(draw: Draw, kind: str) -> str:
    return draw.choice(WORDS[kind])


# -------------------------------------------------------------------------------------- inputs, with their facts


def _sentence(draw: Draw) -> str:
    """A plain sentence."""
    kind = draw.randrange(5)
    name, thing, place, verb = (_pick(draw, of) for of in ("names", "things", "places", "verbs"))
    if kind == 0:
        return f"{name} {verb} the {thing} in the {place}."
    if kind == 1:
        return f"The {_pick(draw, 'adjectives')} {thing} stands in the {place}."
    if kind == 2:
        return f"Every {_pick(draw, 'days')} {name} goes to the {place} in {_pick(draw, 'cities')}."
    if kind == 3:
        return f"A {_pick(draw, 'animals')} was seen near the {place} by {name}."
    return f"{name} and {_pick(draw, 'names')} {verb} a {_pick(draw, 'adjectives')} {thing}."


def _order(draw: Draw) -> tuple[str, str, int]:
    """A message that orders something, what, and how many."""
    thing, number = _pick(draw, "things"), draw.randint(2, 90)
    texts = (
        f"Please send {number} of the {thing} to our shop in {_pick(draw, 'cities')}.",
        f"{_pick(draw, 'names')} wants to buy the {thing}, {number} pieces.",
        f"Item: {thing}; quantity {number}; customer {_pick(draw, 'names')}",
        f"We are out of stock again, {number} more of the {thing} by {_pick(draw, 'days')}!",
    )
    return draw.choice(texts), thing, number


def _person(draw: Draw) -> tuple[str, str, str, str]:
    """A sentence about somebody, their name, city and job."""
    name, city, job = _pick(draw, "names"), _pick(draw, "cities"), _pick(draw, "jobs")
    texts = (
        f"{name} works as a {job} in {city}.",
        f"For ten years the {job} {name} has lived in {city}.",
        f"In {city} everybody knows {name}, the {job}.",
        f"{name} moved to {city} to become a {job}.",
    )
    return draw.choice(texts), name, city, job


def _day(draw: Draw) -> tuple[str, int, int, int, str]:
    """A sentence that names a day, the day, month and year, and the month's name."""
    day, number, year = draw.randint(1, 28), draw.randint(1, 12), draw.randint(1950, 2029)
    month = WORDS["months"][number - 1]
    written = draw.choice((f"{day} {month} {year}", f"{month} {day}, {year}"))
    texts = (
        f"The {_pick(draw, 'places')} opened on {written}.",
        f"On {written} {_pick(draw, 'names')} {_pick(draw, 'verbs')} the {_pick(draw, 'things')}.",
        f"{_pick(draw, 'names')} will come to {_pick(draw, 'cities')} on {written}.",
        f"Delivery of the {_pick(draw, 'things')}: {written}",
    )
    return draw.choice(texts), day, number, year, month


def _full_name(draw: Draw) -> tuple[str, str, str]:
    first, last = _pick(draw, "names"), _pick(draw, "cities")
    return f"{first} {last}", first, last


def _listing(kinds: str, low: int, high: int, *texts: str) -> Callable[[Draw], tuple[str, list[str]]]:
    """A sentence that lists words of some kinds, and the words."""

    def make(draw: Draw) -> tuple[str, list[str]]:
        words = draw.sample([word for kind in kinds.split() for word in WORDS[kind]], draw.randint(low, high))
        listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
        return (draw.choice(texts) if len(texts) > 1 else texts[0]).format(listed), words

    return make


# ------------------------------------------------------------------------------------------------------- answers


def _json(**fields: object) -> str:
    return json.dumps(fields, ensure_ascii=False)


def _from(source: Callable[[Draw], tuple], answer: Callable[..., str]) -> Rule:
    """The rule that makes an answer of an input's facts."""

    def make(draw: Draw) -> tuple[str, str]:
        text, *facts = source(draw)
        return text, answer(*facts)

    return make


def _map(change: Callable[[str], str], source: Callable[[Draw], str] = _sentence) -> Rule:
    """The rule that rewrites a text."""

    def make(draw: Draw) -> tuple[str, str]:
        text = source(draw)
        return text, change(text)

    return make


def _look_up(pairs: str, *, backwards: bool = False, answer: str = "{value}") -> Rule:
    """The rule that looks a word up."""
    words = {theirs: ours for ours, theirs in PAIRS[pairs].items()} if backwards else PAIRS[pairs]

    def make(draw: Draw) -> tuple[str, str]:
        key = draw.choice(list(words))
        return key, answer.format(key=key, value=words[key])

    return make


def _replacing(position: int, replacement: str) -> Rule:
    """The rule that copies a sentence about somebody, with one of its facts replaced."""

    def make(draw: Draw) -> tuple[str, str]:
        text, *facts = _person(draw)
        return text, text.replace(facts[position], replacement.format(facts[position]))

    return make


def _iso_spelt(draw: Draw) -> tuple[str, str]:
    _, day, number, year, month = _day(draw)
    return f"{year}-{number:02d}-{day:02d}", f"{day} {month} {year}"


def _time_24(draw: Draw) -> tuple[str, str]:
    hour, minute, after = draw.randint(1, 11), draw.choice((0, 5, 10, 15, 20, 30, 40, 45, 55)), draw.random() < 0.5
    return f"{hour}:{minute:02d} {'pm' if after else 'am'}", f"{hour + 12 * after:02d}:{minute:02d}"


def _digits(draw: Draw) -> tuple[str, str]:
    number = draw.randrange(2, len(WORDS["number_words"]))
    word = WORDS["number_words"][number]
    text = f"{_pick(draw, 'names')} has {word} {_pick(draw, 'things')}s."
    return text, text.replace(word, str(number))


def _where(draw: Draw) -> tuple[str, str]:
    name, place, thing = _pick(draw, "names"), _pick(draw, "places"), _pick(draw, "things")
    return f"{name} left the {thing} in the {place}, then went home.", f"in the {place}"


def _question(draw: Draw) -> tuple[str, str]:
    name, verb, thing = _pick(draw, "names"), _pick(draw, "verbs"), _pick(draw, "things")
    return f"{name} {verb} the {thing}.", f"Who {verb} the {thing}?"


def _negate(draw: Draw) -> tuple[str, str]:
    thing, adjective = _pick(draw, "things"), _pick(draw, "adjectives")
    return f"The {thing} is {adjective}.", f"The {thing} is not {adjective}."


def _csv_row(draw: Draw) -> tuple[str, str]:
    thing, price, number = _pick(draw, "things"), draw.randint(2, 200), draw.randint(1, 9)
    return f"{number} {thing}(s) at {price} each", f"{thing},{number},{price}"


def _sum(draw: Draw) -> tuple[str, str]:
    a, b = draw.randint(1, 40), draw.randint(1, 40)
    return f"{_pick(draw, 'names')} had {a} {_pick(draw, 'things')}s and got {b} more.", str(a + b)


def _what_kind(draw: Draw) -> tuple[str, str]:
    kinds = {"animal": "animals", "food": "foods", "city": "cities", "person": "names", "object": "things"}
    kind = draw.choice(list(kinds))
    return _pick(draw, kinds[kind]), kind


def _next_day(draw: Draw) -> tuple[str, str]:
    day = draw.randrange(7)
    return WORDS["days"][day], WORDS["days"][(day + 1) % 7]


_WANTED = _listing(
    "things foods", 2, 4, "We still need {}.", "Don't forget {}!", "On the list: {}.", "Bring {} when you come."
)
_PACKED = _listing(
    "things foods", 2, 4, "The box held {}.", "{} were sold first.", "She packed {}.", "There is room for {}."
)
_PEOPLE = _listing("names", 2, 5, "{} came to the party.", "Invite {}.", "The team is made up of {}.", "Photos by {}.")

RULES: Mapping[str, Rule] = {
    "order_json": _from(_order, lambda thing, number: _json(item=thing, quantity=number)),
    "order_quantity": _from(_order, lambda thing, number: str(number)),
    "order_line": _from(_order, lambda thing, number: f"{number} x {thing}"),
    "job_json": _from(_person, lambda name, city, job: _json(person=name, job=job, city=city)),
    "job_pairs": _from(_person, lambda name, city, job: f"name={name}; city={city}"),
    "job_only": _from(_person, lambda name, city, job: job),
    "date_dotted": _from(_day, lambda day, number, year, month: f"{day:02d}.{number:02d}.{year}"),
    "date_slashed": _from(_day, lambda day, number, year, month: f"{number:02d}/{day:02d}/{year}"),
    "date_year": _from(_day, lambda day, number, year, month: str(year)),
    "date_json": _from(_day, lambda day, number, year, month: _json(day=day, month=month, year=year)),
    "iso_spelt": _iso_spelt,
    "time_24": _time_24,
    "packing_bullets": _from(_WANTED, lambda words: "\n".join(f"- {word}" for word in words)),
    "packing_array": _from(_PACKED, json.dumps),
    "people_semicolons": _from(_PEOPLE, "; ".join),
    "count_listed": _from(_listing("things", 2, 8, "{}"), lambda words: str(len(words))),
    "mask_name": _replacing(0, "[NAME]"),
    "digits_for_words": _digits,
    "where_is_it": _where,
    "who_question": _question,
    "negate": _negate,
    "capital_sentence": _look_up("capitals", answer="The capital of {key} is {value}."),
    "csv_row": _csv_row,
    "tag_city": _replacing(1, "<city>{}</city>"),
    "how_many_now": _sum,
    "what_kind": _what_kind,
    "next_day": _next_day,
    "surname_first": _from(_full_name, lambda first, last: f"{last}, {first}"),
    "initials": _from(_full_name, lambda first, last: f"{first[0]}. {last[0]}."),
    "upper": _map(str.upper),
    "snake_case": _map(
        lambda text: text.lower().replace(" ", "_"), lambda d: f"{_pick(d, 'adjectives')} {_pick(d, 'things')}"
    ),
    "repeat": _map(str),
    "last_word": _map(lambda text: text.rstrip(".").split()[-1]),
    "no_full_stop": _map(lambda text: text.rstrip(".")),
    "quote_reply": _map(lambda text: f'He said: "{text}"'),
    "spanish": _look_up("spanish"),
    "german": _look_up("german"),
    "from_spanish": _look_up("spanish", backwards=True),
    "from_german": _look_up("german", backwards=True),
    "comparative": _look_up("comparatives"),
    "ing_form": _look_up("present_forms"),
    "capital_city": _look_up("capitals"),
}
"""Of each task, by its name: how an input and its answer are made. Tasks come in this order."""


def computed_tasks() -> list[Task]:
    """Every rule as a task; an input of the validation examples is never a training input of the same task.

    Tasks with few possible inputs have fewer examples, and a tenth of their inputs for validation.
    """
    return [_task(name, rule) for name, rule in RULES.items()]


def _task(rule_name: str, rule: Rule) -> Task:
    name, found, turn = f"computed_{rule_name}", dict[str, str](), 0
    while len(found) < TRAIN + VALIDATION and turn < 20 * (TRAIN + VALIDATION):
        text, answer = rule(random.Random(f"{name}/{turn}"))
        found.setdefault(text, answer)
        turn += 1
    examples = [Example(f"{name}-{n}", text, (answer,)) for n, (text, answer) in enumerate(found.items())]
    kept = min(VALIDATION, max(1, len(examples) // 10))
    return Task(
        name=name,
        descriptions=tuple(DESCRIPTIONS[rule_name]),
        examples={"train": tuple(examples[kept:]), "val": tuple(examples[:kept])},
        category="computed output",
    )
