"""Which of some numbers is larger or smaller."""

from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask, draw_operands

NAME = "comparisons"

_LARGER = Phrasings(
    trained=(
        "Which is larger, {} or {}?", "Which number is bigger: {} or {}?", "What is larger, {} or {}?",
        "{} or {}: which is greater?", "Which is the larger one, {} or {}?", "Tell me which is bigger, {} or {}.",
        "Compare {} and {}: which is larger?", "Of {} and {}, which is greater?", "Is {} or {} larger?",
        "Please tell me the larger of {} and {}.", "What is the bigger number, {} or {}?", "Larger: {} or {}?",
    ),
    held_out=("Which one is greater, {} or {}?", "Between {} and {}, which is larger?",
              "Tell me the bigger number: {} or {}."),
)  # fmt: skip
_SMALLER = Phrasings(
    trained=(
        "Which is smaller, {} or {}?", "Which number is less: {} or {}?", "What is smaller, {} or {}?",
        "{} or {}: which is smaller?", "Which is the smaller one, {} or {}?", "Tell me which is smaller, {} or {}.",
        "Compare {} and {}: which is smaller?", "Of {} and {}, which is less?", "Is {} or {} smaller?",
        "Please tell me the smaller of {} and {}.", "What is the smaller number, {} or {}?", "Smaller: {} or {}?",
    ),
    held_out=("Which one is smaller, {} or {}?", "Between {} and {}, which is smaller?",
              "Tell me the smaller number: {} or {}."),
)  # fmt: skip
_IS_GREATER = Phrasings(
    trained=(
        "Is {} greater than {}?", "Is {} larger than {}?", "Is {} more than {}?",
        "Is it true that {} is greater than {}?",
        "{} > {}?", "Tell me, is {} bigger than {}?", "Is {} bigger than {}?",
        "Would you say that {} is larger than {}?",
    ),
    held_out=("Is the number {} greater than {}?", "Is it true that {} is bigger than {}?"),
)  # fmt: skip
_EXTREMES = {
    "largest": Phrasings(
        trained=(
            "What is the largest of {}?", "Which is the largest number: {}?", "Find the largest of {}.",
            "Tell me the biggest number of {}.", "Which of {} is the largest?", "Largest of {}?",
            "Give the maximum of {}.", "Of the numbers {}, which is the biggest?", "Which number is the largest: {}?",
            "Which of these numbers is the biggest: {}?", "Which is the biggest of {}?",
            "Please find the largest of {}.",
            "What is the largest number in {}?", "Which one is the largest: {}?",
        ),
        held_out=("Which of these is the largest: {}?", "Please find the biggest of {}."),
    ),
    "smallest": Phrasings(
        trained=(
            "What is the smallest of {}?", "Which is the smallest number: {}?", "Find the smallest of {}.",
            "Tell me the smallest number of {}.", "Which of {} is the smallest?", "Smallest of {}?",
            "Give the minimum of {}.", "Of the numbers {}, which is the smallest?", "Which number is the smallest: {}?",
            "Which of these numbers is the smallest: {}?", "Which is the smallest of {}?",
            "What is the smallest number in {}?", "Which one is the smallest: {}?", "Find the least of {}.",
        ),
        held_out=("Which of these is the smallest: {}?", "Please find the smallest of {}."),
    ),
}  # fmt: skip


def _numbers(draw: Random) -> tuple[int, ...]:
    digits = draw.randint(1, 4)
    count = draw.choice((2, 2, 3, 3, 4))
    near = draw.randrange(10**digits)
    numbers = {near}
    while len(numbers) < count:
        is_near = draw.random() < 0.4
        other = near + draw.randint(-12, 12) if is_near else draw.randrange(10 ** draw.randint(1, 4))
        numbers.add(abs(other))
    shuffled = sorted(numbers)
    draw.shuffle(shuffled)
    return tuple(shuffled)


def make(draw: Random, split: Split) -> Example:
    numbers = draw_operands(draw, split, _numbers)
    if len(numbers) > 2:
        kind = draw.choice(("largest", "smallest"))
        listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
        best = max(numbers) if kind == "largest" else min(numbers)
        return ask(NAME, _EXTREMES[kind].pick(draw, split).format(listed), f"The {kind} is {best}.")
    first, second = numbers
    kind = draw.choice(("larger", "smaller", "is greater"))
    if kind == "is greater":
        answer = f"Yes, {first} is greater than {second}." if first > second else f"No, {first} is less than {second}."
        return ask(NAME, _IS_GREATER.pick(draw, split).format(first, second), answer)
    phrasings, best = (_LARGER, max(numbers)) if kind == "larger" else (_SMALLER, min(numbers))
    return ask(NAME, phrasings.pick(draw, split).format(first, second), f"{best} is {kind}.")


FAMILY = Family(name=NAME, title="Which number is larger or smaller, of two to four", make=make, weight=2.0)
