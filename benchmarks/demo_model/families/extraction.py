"""Fields of a sentence or a note, as JSON with the keys that are asked for."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask, draw_operands
from benchmarks.demo_model.words import ADJECTIVES, FRUITS, MONTHS, THINGS, WEEKDAYS, draw_city, draw_name

NAME = "extraction"

Fields = dict[str, str | int]

_INSTRUCTIONS = Phrasings(
    trained=(
        "Extract {keys} as JSON: {text}", "Give {keys} as JSON: {text}", "Return {keys} as JSON. {text}",
        "{text} Extract {keys} as JSON.", "{text} Give me {keys} as JSON.", "Turn this into JSON with {keys}: {text}",
        "Find {keys} and answer in JSON: {text}", "Write {keys} as JSON: {text}", "JSON with {keys}, please: {text}",
        "Read this and return JSON with {keys}: {text}", "Please extract {keys} as JSON from: {text}",
        "{text} Return JSON with {keys}.", "From the text, extract {keys} as JSON.\n{text}",
        "What are {keys}? Answer in JSON.\n{text}", "Extract {keys}: {text}",
        "Extract {keys} from this text as JSON: {text}",
        "Get {keys} out of this and answer in JSON: {text}", "Please return {keys} from this text as JSON: {text}",
        "{text}\nAnswer in JSON with {keys}.", "{text} Please give {keys} as JSON.", "{text} Put {keys} into JSON.",
        "{text}\nFind {keys} and write JSON.", "{text} Please write JSON with {keys}.", "{text} Get {keys} as JSON.",
        "{text} Please return {keys} in JSON.", "{text}\nExtract {keys}.", "{text} Now write {keys} in JSON.",
    ),
    held_out=("Please return {keys} as JSON: {text}", "{text} Write {keys} as JSON.",
              "Extract {keys} from the text and answer in JSON: {text}"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Record:
    """A kind of thing that has fields, and the ways to write one down."""

    draw: Callable[[Random], Fields]
    texts: Phrasings
    held_out_order: tuple[str, ...]  # of the fields of a note


def _person(draw: Random) -> Fields:
    return {"name": draw_name(draw), "age": draw.randint(5, 99), "city": draw_city(draw)}


def _order(draw: Random) -> Fields:
    item = (
        f"{draw.choice(ADJECTIVES)} {draw.choice(THINGS)}" if draw.random() < 0.4 else draw.choice((*FRUITS, *THINGS))
    )
    return {"item": item, "quantity": draw.randint(2, 99), "price": draw.randint(1, 500)}


def _event(draw: Random) -> Fields:
    title = draw.choice(("meeting", "concert", "lunch", "dinner", "lesson", "party", "walk", "call", "race", "exam"))
    return {"event": title, "day": draw.choice(WEEKDAYS), "time": _time(draw)}


def _time(draw: Random) -> str:
    return f"{draw.randint(7, 22)}:{draw.choice(('00', '15', '30', '45'))}"


def _booking(draw: Random) -> Fields:
    date = f"{draw.randint(1, 28)} {draw.choice(MONTHS)}"
    return {"name": draw_name(draw), "date": date, "guests": draw.randint(2, 12)}


_RECORDS = (
    _Record(
        _person,
        Phrasings(
            trained=(
                "{name} is {age} years old and lives in {city}.", "{name}, {age}, lives in {city}.",
                "My name is {name}, I am {age} and I live in {city}.", "I am {name}, {age} years old, from {city}.",
                "In {city} there lives {name}, who is {age} years old.", "{name} from {city} is {age} years old.",
                "{name} ({age}) comes from {city}.", "At {age}, {name} moved to {city}.",
                "This is {name} from {city}, age {age}.",
                "I am {name} and live in {city}. I am {age}.", "{name} is from {city} and {age} years old.",
                "I live in {city}, I am {age} years old, and my name is {name}.", "Meet {name}, {age}, of {city}.",
            ),
            held_out=("{name} lives in {city} and is {age} years old.",
            "I am {name}, I am {age} years old and live in {city}."),
        ),
        ("age", "name", "city"),
    ),
    _Record(
        _order,
        Phrasings(
            trained=(
                "I bought {quantity} of the {item} at {price} dollars each.",
                "We need {quantity} of the {item}, at {price} dollars.",
                "Please send {quantity} times the {item} for {price} dollars.", "{quantity} x {item}, {price} dollars.",
                "The {item} costs {price} dollars, and I take {quantity}.",
                "I paid {price} dollars for {quantity} of the {item}.",
                "We ordered {item}, {quantity} pieces, {price} dollars each.",
                "For {price} dollars each I sold {quantity} of the {item}.",
                "Order: {quantity} pieces of {item} at {price} dollars.",
            ),
            held_out=("I ordered {quantity} pieces of {item} at {price} dollars each.",
                      "We bought {quantity} of the {item} for {price} dollars."),
        ),
        ("quantity", "item", "price"),
    ),
    _Record(
        _event,
        Phrasings(
            trained=(
                "The {event} is on {day} at {time}.", "On {day} at {time} there is a {event}.",
                "{event}: {day}, {time}.",
                "Remember the {event} on {day} at {time}.", "At {time} on {day} we have a {event}.",
                "On {day} the {event} is at {time}.",
                "We meet on {day} at {time} for the {event}.", "There is a {event} on {day} at {time}.",
                "The {event} begins at {time} on {day}.",
            ),
            held_out=("On {day} we have a {event} at {time}.", "Remember: the {event} begins on {day} at {time}."),
        ),
        ("day", "event", "time"),
    ),
    _Record(
        _booking,
        Phrasings(
            trained=(
                "{name} booked a table for {guests} on {date}.", "A table for {guests} on {date}, the name is {name}.",
                "Booking of {name}: {date}, {guests} guests.", "On {date} {name} comes with {guests} guests.",
                "Please book for {name}: {guests} guests on {date}.", "For {date}, {name} wants a table for {guests}.",
                "{name} and others, {guests} in all, come on {date}.",
            ),
            held_out=("On {date} {name} booked a table for {guests}.", "{name} comes on {date} with {guests} guests."),
        ),
        ("date", "guests", "name"),
    ),
)  # fmt: skip

_NOTE_LINES = ("{key}: {value}", "{key}: {value}", "{key} = {value}", "{key} - {value}", "{key} is {value}")
_NOTE_JOINTS = (". ", ", ", "; ", "\n", "\n")


def _note(draw: Random, split: Split, record: _Record, fields: Fields) -> str:
    """The fields one by one with their names, in any order but the one that is held out."""
    order = record.held_out_order
    while split != "phrasings" and order == record.held_out_order:
        order = tuple(draw.sample(list(fields), len(fields)))
    line, joint, is_capital = draw.choice(_NOTE_LINES), draw.choice(_NOTE_JOINTS), draw.random() < 0.6
    parts = (line.format(key=key.capitalize() if is_capital else key, value=fields[key]) for key in order)
    return joint.join(parts) + ("" if joint == "\n" else ".")


def _operands(draw: Random) -> tuple[int, tuple[tuple[str, str | int], ...]]:
    record_idx = draw.randrange(len(_RECORDS))
    return record_idx, tuple(_RECORDS[record_idx].draw(draw).items())


def make(draw: Random, split: Split) -> Example:
    record_idx, items = draw_operands(draw, split, _operands)
    fields = dict(items)
    keys = list(fields)
    if draw.random() < 0.5:
        keys = draw.sample(keys, draw.randint(1, len(keys)))
    listed = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f" and {keys[-1]}"
    record = _RECORDS[record_idx]
    is_note = draw.random() < 0.35
    text = _note(draw, split, record, fields) if is_note else record.texts.pick(draw, split).format(**fields)
    question = _INSTRUCTIONS.pick(draw, split).format(keys=listed, text=text)
    return ask(NAME, question, json.dumps({key: fields[key] for key in keys}, ensure_ascii=False))


def is_right(example: Example, answer: str) -> bool:
    """The same JSON object, however it is spaced."""
    try:
        return bool(json.loads(answer) == json.loads(example.answer))
    except ValueError:
        return False


FAMILY = Family(name=NAME, title="Fields of a text as JSON", make=make, is_right=is_right, weight=2.5)
