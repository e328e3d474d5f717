"""Conversions between units of length, weight, volume and time."""

from dataclasses import dataclass
from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask, draw_operands
from benchmarks.demo_model.families.arithmetic import product_steps

NAME = "units"
BEYOND = "That is beyond me: I convert whole numbers only."


@dataclass(frozen=True, slots=True)
class _Unit:
    """`factor` of the small unit make one of the large."""

    large: str
    small: str
    factor: int
    short_large: str = ""
    short_small: str = ""
    irregular: tuple[str, str] | None = None  # singular and plural of the large unit

    def name(self, count: int, *, is_large: bool) -> str:
        name = self.large if is_large else self.small
        if is_large and self.irregular:
            return self.irregular[count != 1]
        return name + ("s" if count != 1 else "")


_UNITS = (
    _Unit("kilometer", "meter", 1000, "km", "m"),
    _Unit("meter", "centimeter", 100, "m", "cm"),
    _Unit("centimeter", "millimeter", 10, "cm", "mm"),
    _Unit("meter", "millimeter", 1000, "m", "mm"),
    _Unit("kilogram", "gram", 1000, "kg", "g"),
    _Unit("ton", "kilogram", 1000, "t", "kg"),
    _Unit("gram", "milligram", 1000, "g", "mg"),
    _Unit("liter", "milliliter", 1000, "l", "ml"),
    _Unit("hour", "minute", 60, "h", "min"),
    _Unit("minute", "second", 60, "min", "s"),
    _Unit("week", "day", 7),
    _Unit("year", "month", 12),
    _Unit("century", "year", 100, irregular=("century", "centuries")),
)

_CONVERT = Phrasings(
    trained=(
        "Convert {amount} to {target}.", "How many {target} are {amount}?", "How many {target} are in {amount}?",
        "What is {amount} in {target}?", "How many {target} is {amount}?", "{amount} in {target}?",
        "Please convert {amount} to {target}.", "Can you convert {amount} into {target}?",
        "Express {amount} in {target}.",
        "How many {target} make {amount}?", "{amount} is how many {target}?", "Tell me {amount} in {target}.",
        "Change {amount} into {target}.", "Convert {amount} into {target}",
    ),
    held_out=("Can you express {amount} in {target}?", "Please tell me how many {target} are in {amount}.",
              "How much is {amount} in {target}?"),
)  # fmt: skip


def _operands(draw: Random) -> tuple[int, int, bool]:
    unit_idx = draw.randrange(len(_UNITS))
    factor = _UNITS[unit_idx].factor
    is_decimal = factor in (10, 100, 1000)
    count = draw.randint(1, draw.choice((20, 999 if is_decimal else 99)))
    return unit_idx, count, is_decimal and draw.random() < 0.4


def _steps(count: int, factor: int) -> str:
    """The working of count × factor where it is more than a row of zeros."""
    if factor in (10, 100, 1000):
        return str(count * factor)
    if factor == 12:
        steps = f"{count * 10} + {count * 2} = {count * 12}"
    elif factor == 60:
        tens, ones = count // 10 * 10, count % 10
        steps = f"{tens * 60} + {ones * 60} = {count * 60}" if tens and ones else str(count * 60)
    else:
        steps = product_steps(count, factor)
    return f"{count} × {factor} = {steps}"


def _fraction(draw: Random) -> dict[str, str]:
    """An amount that is no whole number, and what it is to be converted to."""
    unit, amount = draw.choice(_UNITS), f"{draw.randint(0, 99)}.{draw.randint(1, 99)}"
    if unit.short_large and draw.random() < 0.3:
        return {"amount": f"{amount} {unit.short_large}", "target": unit.short_small}
    return {"amount": f"{amount} {unit.name(2, is_large=True)}", "target": unit.name(2, is_large=False)}


def make(draw: Random, split: Split) -> Example:
    if split == "train" and draw.random() < 0.03:
        return ask(NAME, _CONVERT.pick(draw, split).format(**_fraction(draw)), BEYOND)
    unit_idx, count, to_large = draw_operands(draw, split, _operands)
    unit = _UNITS[unit_idx]
    given, wanted = (count * unit.factor, count) if to_large else (count, count * unit.factor)
    is_short = bool(unit.short_large) and draw.random() < 0.3
    if is_short:
        names = (unit.short_small, unit.short_large) if to_large else (unit.short_large, unit.short_small)
        source, target, wanted_name = names[0], names[1], names[1]
    else:
        source, target = unit.name(given, is_large=not to_large), unit.name(2, is_large=to_large)
        wanted_name = unit.name(wanted, is_large=to_large)
    amount = f"{given}{source}" if is_short and draw.random() < 0.2 else f"{given} {source}"
    question = _CONVERT.pick(draw, split).format(amount=amount, target=target)
    result = str(wanted) if to_large else _steps(count, unit.factor)
    return ask(NAME, question, f"{given} {source} = {result} {wanted_name}")


FAMILY = Family(name=NAME, title="Units of length, weight, volume and time", make=make, weight=1.5)
