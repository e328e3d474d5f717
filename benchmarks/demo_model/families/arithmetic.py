"""Sums, differences, products and quotients of small whole numbers.

Products of two digits with one are worked out by tens and ones, because the steps can be learnt where the whole
cannot. The multiplication table is learnt by heart: its entries are facts, and none of them is held out.
"""

from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask, draw_operands

NAME = "arithmetic"
LARGEST = 9999
BEYOND = f"That is beyond me: I calculate with two whole numbers up to {LARGEST}."

_FRAMES = Phrasings(
    trained=(
        "{}", "{} =", "{}?", "{} = ?", "What is {}?", "What's {}?", "How much is {}?", "Calculate {}.", "Compute {}.",
        "Please calculate {}.", "Tell me {}.", "Can you compute {}?", "Find {}.", "Solve {}.", "I want to know {}.",
        "Could you tell me {}?", "What does {} give?", "What is the result of {}?", "{} is how much?",
        "Please give {}.",
        "Do you know {}?", "Work out {} for me.", "What do I get for {}?", "{}, please.", "Evaluate {}.", "{} is what?",
        "{} makes what?", "{} equals how much?", "{} equals?", "{} gives what?",
        "Tell me the result of {}.", "What is {} equal to?", "Give me {}.", "Please tell me {}.",
    ),
    held_out=("Could you calculate {}?", "Please work out {}.", "Give me the result of {}.", "{} equals what?",
              "How much does {} give?"),
)  # fmt: skip

_SPELLINGS = {
    "+": ("{} + {}", "{}+{}", "{} plus {}", "the sum of {} and {}", "{} and {} together", "{} added to {}"),
    "-": ("{} - {}", "{}-{}", "{} minus {}", "the difference of {} and {}", "{} take away {}", "{} less {}"),
    "×": ("{} * {}", "{}*{}", "{} × {}", "{} times {}", "the product of {} and {}", "{} x {}", "{} multiplied by {}"),
    "/": ("{} / {}", "{}/{}", "{} divided by {}", "{} ÷ {}", "{} over {}"),
}


def product_steps(first: int, second: int) -> str:
    """first × second, by tens and ones where one factor has two digits and the other one: `210 + 28 = 238`."""
    wide, narrow = max(first, second), min(first, second)
    tens, ones = wide // 10 * 10, wide % 10
    if narrow > 9 or wide < 11 or not ones:
        return str(first * second)
    return f"{tens * narrow} + {ones * narrow} = {first * second}"


def _operands(draw: Random) -> tuple[str, int, int]:
    kind = draw.choices(("+", "-", "×"), (4, 4, 3))[0]
    if kind == "×":
        factors = [draw.randint(11, 99), draw.randint(2, 9)]
        draw.shuffle(factors)
        return kind, factors[0], factors[1]
    largest = draw.choice((20, 99, 99, 999, 999, LARGEST, LARGEST))
    first, second = draw.randint(0, largest), draw.randint(0, largest)
    if kind == "-" and largest > 99 and first < second:
        first, second = second, first
    return kind, first, second


def _table(draw: Random) -> tuple[str, int, int]:
    first, second = draw.randint(0, 12), draw.randint(1, 12)
    return ("×", first, second) if draw.random() < 0.6 else ("/", first * second, second)


def _beyond(draw: Random) -> str:
    """An expression that is too large, too long or not of whole numbers."""
    small, large = draw.randint(1, 999), draw.randint(LARGEST + 1, draw.choice((99_999, 999_999, 99_999_999)))
    kind = draw.choice(("large", "long", "point"))
    sign = draw.choice("+-*/")
    if kind == "large":
        first, second = draw.sample((small, large, large), 2)
        return f"{first} {sign} {second}"
    if kind == "long":
        first = draw.randint(1, draw.choice((9, 99, 999)))
        return f"{first} {sign} {draw.randint(1, 99)} {draw.choice('+-*')} {draw.randint(1, 99)}"
    return f"{small}.{draw.randint(1, 99)} {sign} {draw.randint(1, 99)}"


def make(draw: Random, split: Split) -> Example:
    if split == "train" and draw.random() < 0.04:
        return ask(NAME, _FRAMES.pick(draw, split).format(_beyond(draw)), BEYOND)
    is_table = split == "train" and draw.random() < 0.15
    kind, first, second = _table(draw) if is_table else draw_operands(draw, split, _operands)
    result = {"+": first + second, "-": first - second, "/": first // second if second else 0}
    answer = product_steps(first, second) if kind == "×" else str(result[kind])
    expression = draw.choice(_SPELLINGS[kind]).format(first, second)
    question = _FRAMES.pick(draw, split).format(expression)
    return ask(NAME, question[0].upper() + question[1:], f"{first} {kind} {second} = {answer}")


FAMILY = Family(name=NAME, title="Sums and differences to 9999, products of two digits and one", make=make, weight=3.5)
