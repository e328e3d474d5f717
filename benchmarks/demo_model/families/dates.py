"""Weekdays and dates: what comes after what, and so many days later or earlier.

Calendar facts (the next weekday, the days of a month) are learnt by heart; sums of days and dates are worked out.
"""

from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask, draw_operands
from benchmarks.demo_model.words import DAYS_OF_MONTH, MONTHS, WEEKDAYS

NAME = "dates"

_NEXT = Phrasings(
    trained=("What comes after {}?", "What comes right after {}?", "Which {kind} comes after {}?", "What follows {}?",
             "Which {kind} follows {}?", "What is the {kind} after {}?", "Tell me the {kind} after {}.",
             "What {kind} comes next after {}?", "After {} comes which {kind}?"),
    held_out=("What {kind} comes after {}?", "Tell me which {kind} follows {}."),
)  # fmt: skip
_PREVIOUS = Phrasings(
    trained=("What comes before {}?", "What comes right before {}?", "Which {kind} comes before {}?",
             "What is the {kind} before {}?", "Tell me the {kind} before {}.", "Before {} comes which {kind}?",
             "What {kind} comes just before {}?", "Which {kind} is before {}?"),
    held_out=("What {kind} comes before {}?", "Tell me which {kind} comes before {}."),
)  # fmt: skip
_LATER = Phrasings(
    trained=(
        "What {kind} is {n} days {way} {day}?", "Which {kind} is it {n} days {way} {day}?", "{n} days {way} {day}?",
        "What is {n} days {way} {day}?", "Tell me the {kind} {n} days {way} {day}.",
        "{n} days {way} {day} is which {kind}?",
        "What {kind} comes {n} days {way} {day}?", "Please tell me what {kind} is {n} days {way} {day}.",
        "Find the {kind} {n} days {way} {day}.", "Which {kind} comes {n} days {way} {day}?",
    ),
    held_out=("Which {kind} is {n} days {way} {day}?", "{n} days {way} {day} is what {kind}?",
              "Can you tell me the {kind} {n} days {way} {day}?"),
)  # fmt: skip
_LENGTH = Phrasings(
    trained=("How many days does {} have?", "How many days are in {}?", "How long is {}?", "Number of days in {}?",
             "Tell me how many days {} has.", "What is the number of days in {}?", "How many days has {}?"),
    held_out=("How many days are there in {}?", "Please tell me how many days {} has."),
)  # fmt: skip


def _weekday(draw: Random, split: Split) -> Example:
    def operands(draw: Random) -> tuple[int, int, bool]:
        return draw.randrange(7), draw.randint(7, 30), draw.random() < 0.5

    if split == "train" and draw.random() < 0.5:
        day, num_days, is_after = draw.randrange(7), draw.randint(1, 6), draw.random() < 0.5
    else:
        day, num_days, is_after = draw_operands(draw, split, operands)
    way, rest = "after" if is_after else "before", num_days % 7
    result = WEEKDAYS[(day + (rest if is_after else -rest)) % 7]
    answer = f"It is {result}."
    if num_days >= 7:
        answer = f"{num_days} days are {_count(num_days // 7, 'week')} and {_count(rest, 'day')}. " + answer
    if num_days == 1 and draw.random() < 0.5:
        return ask(NAME, f"What day is one day {way} {WEEKDAYS[day]}?", answer)
    question = _LATER.pick(draw, split).format(kind="day", n=num_days, way=way, day=WEEKDAYS[day])
    return ask(NAME, question.replace(" 1 days", " 1 day"), answer)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _date(draw: Random, split: Split) -> Example:
    def operands(draw: Random) -> tuple[int, int, int, bool]:
        month = draw.randrange(12)
        return month, draw.randint(1, DAYS_OF_MONTH[month]), draw.randint(2, 28), draw.random() < 0.6

    month, day, num_days, is_after = draw_operands(draw, split, operands)
    written = f"{day} {MONTHS[month]}" if draw.random() < 0.6 else f"{MONTHS[month]} {day}"
    question = _LATER.pick(draw, split).format(
        kind="date", n=num_days, way="after" if is_after else "before", day=written
    )
    return ask(NAME, question, _later(month, day, num_days) if is_after else _earlier(month, day, num_days))


def _later(month: int, day: int, num_days: int) -> str:
    total, length = day + num_days, DAYS_OF_MONTH[month]
    if total <= length:
        return f"{day} + {num_days} = {total}, so it is {total} {MONTHS[month]}."
    following = MONTHS[(month + 1) % 12]
    return (
        f"{day} + {num_days} = {total}, and {MONTHS[month]} has {length} days: {total} - {length} = {total - length}, "
        f"so it is {total - length} {following}."
    )


def _earlier(month: int, day: int, num_days: int) -> str:
    left = day - num_days
    if left > 0:
        return f"{day} - {num_days} = {left}, so it is {left} {MONTHS[month]}."
    previous, length = MONTHS[month - 1], DAYS_OF_MONTH[month - 1]
    return (
        f"{day} - {num_days} = {left}, and {previous} has {length} days: {length} - {-left} = {length + left}, "
        f"so it is {length + left} {previous}."
    )


def _neighbour(draw: Random, split: Split) -> Example:
    kind, names = draw.choice((("day", WEEKDAYS), ("month", MONTHS)))
    here, step = draw.randrange(len(names)), draw.choice((1, -1))
    there = names[(here + step) % len(names)]
    phrasings, way = (_NEXT, "after") if step == 1 else (_PREVIOUS, "before")
    return ask(NAME, phrasings.pick(draw, split).format(names[here], kind=kind), f"{there} comes {way} {names[here]}.")


def _length(draw: Random, split: Split) -> Example:
    month = draw.randrange(12)
    days = "28 days, and 29 in a leap year" if month == 1 else f"{DAYS_OF_MONTH[month]} days"
    return ask(NAME, _LENGTH.pick(draw, split).format(MONTHS[month]), f"{MONTHS[month]} has {days}.")


def make(draw: Random, split: Split) -> Example:
    kinds = [_weekday, _date, _date]
    if split != "operands":  # facts have none
        kinds += [_neighbour, _length]
    return draw.choice(kinds)(draw, split)


FAMILY = Family(name=NAME, title="Weekdays, months, and dates some days later or earlier", make=make, weight=2.0)
