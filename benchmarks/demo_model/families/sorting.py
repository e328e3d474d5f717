"""Lists of numbers and of words, put in order."""

from collections.abc import Sequence
from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask, draw_operands
from benchmarks.demo_model.words import COMMON

NAME = "sorting"

_RISING = Phrasings(
    trained=(
        "Sort these numbers: {}", "Sort {}.", "Sort {} in ascending order.", "Put {} in order.", "Order these: {}",
        "Sort from smallest to largest: {}", "Please sort {}.", "Arrange {} from smallest to largest.",
        "Can you sort {}?", "Sort the numbers {}.", "Put these numbers in ascending order: {}", "Sort: {}",
        "Write {} in ascending order.", "List {} from smallest to largest.", "Please sort these: {}", "Sort these: {}",
        "Arrange {} in ascending order.", "Order the numbers {}.", "Please order {}.", "Put {} in order, please.",
    ),
    held_out=("Please put these numbers in order: {}", "Can you arrange {} in ascending order?",
              "Order {} from smallest to largest."),
)  # fmt: skip
_FALLING = Phrasings(
    trained=(
        "Sort {} in descending order.", "Sort from largest to smallest: {}", "Arrange {} from largest to smallest.",
        "Put these numbers in descending order: {}", "Please sort {} in descending order.",
        "Write {} in descending order.", "List {} from largest to smallest.", "Sort {} from largest to smallest.",
        "Can you sort {} in descending order?", "Arrange {} in descending order.", "Order {} in descending order.",
        "Can you arrange {} from largest to smallest?",
    ),
    held_out=("Can you arrange {} in descending order?", "Order {} from largest to smallest."),
)  # fmt: skip
_WORDS = Phrasings(
    trained=(
        "Sort these words: {}", "Sort {} alphabetically.", "Put {} in alphabetical order.", "Sort the words {}.",
        "Order these words by the alphabet: {}", "Please sort {} alphabetically.", "Can you sort the words {}?",
        "Arrange {} in alphabetical order.", "Alphabetical order, please: {}", "Sort alphabetically: {}",
        "Arrange {} alphabetically.", "Put these words in alphabetical order: {}", "Order {} alphabetically.",
        "Can you put {} in alphabetical order?", "Sort {} by the alphabet.", "Please arrange these words: {}",
    ),
    held_out=("Please put these words in alphabetical order: {}", "Can you arrange {} alphabetically?",
              "Sort by the alphabet: {}"),
)  # fmt: skip


def _numbers(draw: Random) -> tuple[int, ...]:
    return tuple(draw.sample(range(draw.choice((10, 100, 100, 1000))), draw.randint(3, 6)))


def _words(draw: Random) -> tuple[str, ...]:
    return tuple(draw.sample(COMMON, draw.randint(2, 5)))


def make(draw: Random, split: Split) -> Example:
    kind = draw.choice(("rising", "rising", "falling", "words", "words"))
    if kind == "words":
        words = draw_operands(draw, split, _words)
        return ask(NAME, _WORDS.pick(draw, split).format(_listed(draw, words)), ", ".join(sorted(words)))
    numbers = draw_operands(draw, split, _numbers)
    phrasings = _RISING if kind == "rising" else _FALLING
    answer = ", ".join(map(str, sorted(numbers, reverse=kind == "falling")))
    return ask(NAME, phrasings.pick(draw, split).format(_listed(draw, numbers)), answer)


def _listed(draw: Random, things: Sequence[object]) -> str:
    """The list with commas, as most people write it, or otherwise."""
    kind, texts = draw.random(), [str(thing) for thing in things]
    if kind < 0.75:
        return ", ".join(texts)
    return " ".join(texts) if kind < 0.85 else ", ".join(texts[:-1]) + f" and {texts[-1]}"


FAMILY = Family(name=NAME, title="Three to six numbers, or two to five words, in order", make=make, weight=2.5)
