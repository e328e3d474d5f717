"""Short stories from a grammar: who, where, what went wrong, who helped, how it ended.

A story is right if the grammar makes it of the hero and the place that were asked for; which one is the model's choice.
"""

import re
from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask, draw_operands
from benchmarks.demo_model.words import ANIMALS

NAME = "stories"

_PLACES = (
    "river",
    "mountain",
    "forest",
    "meadow",
    "valley",
    "hill",
    "lake",
    "island",
    "beach",
    "garden",
    "field",
    "farm",
)
_NAMES = ("Bella", "Oskar", "Luna", "Milo", "Nelly", "Pepper", "Rusty", "Stella", "Toby", "Willow")

_QUESTIONS = Phrasings(
    trained=(
        "Tell me a story about a {hero}.", "Tell a short story about a {hero}.", "Write a story about a {hero}.",
        "Please tell me a short story about a {hero}.", "A story about a {hero}, please.", "Story: a {hero}.",
        "Write a short story about a {hero} and a {place}.", "Tell me a story about a {hero} by the {place}.",
        "I would like a story about a {hero}.", "Can you tell me a story about a {hero} and a {place}?",
        "Tell me about a {hero} and a {place} in a story.", "Make up a story about a {hero}.", "Tell me a story.",
        "Tell me a short story.", "Write a story.", "A story, please.", "Please write a short story about a {hero}.",
    ),
    held_out=("Can you write a short story about a {hero}?", "Please make up a story about a {hero} and a {place}.",
              "I would like a short story about a {hero}."),
)  # fmt: skip

# One sentence of each row makes a story. {friend} is another animal.
_GRAMMAR = (
    ("Once there was a {hero} called {name} who lived by the {place}.",
     "Long ago, a {hero} called {name} lived near the {place}.",
     "By the {place} there lived a {hero} called {name}."),
    ("Every morning {name} went out to look for something to eat.",
     "{name} loved to walk around in the sun.",
     "{name} was small, but very curious."),
    ("One day a storm came, and {name} could not find the way home.",
     "One day {name} fell into a deep hole and could not get out.",
     "One evening it was dark and cold, and {name} was all alone.",
     "One day {name} lost a golden key."),
    ("A {friend} came by and asked what was wrong.",
     "Then an old {friend} heard {name} and came to help.",
     "But a friendly {friend} had seen it all."),
    ("Together they found a way.",
     "They worked until the moon was up, and then it was done.",
     "It took a long time, but they did not give up."),
    ("Since then {name} and the {friend} have been friends.",
     "That night {name} slept well, and the {friend} did too.",
     "And {name} never forgot what the {friend} had done."),
)  # fmt: skip

_ANIMAL = "|".join(ANIMALS)


def _operands(draw: Random) -> tuple[str, str]:
    return draw.choice(ANIMALS), draw.choice(_PLACES)


def make(draw: Random, split: Split) -> Example:
    hero, place = draw_operands(draw, split, _operands)
    question = _QUESTIONS.pick(draw, split)
    friend = draw.choice([animal for animal in ANIMALS if animal != hero])
    words = {"hero": hero, "place": place, "friend": friend, "name": draw.choice(_NAMES)}
    story = " ".join(draw.choice(row) for row in _GRAMMAR).format(**words)
    return ask(NAME, _with_article(question.format(**words)), _with_article(story))


def _with_article(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def is_right(example: Example, answer: str) -> bool:
    """Whether the grammar makes the answer of the hero, and of the place if the question named one."""
    question = example.prompt[-1].content
    heroes = [animal for animal in ANIMALS if re.search(rf"\ban? {animal}\b", question)]
    places = [place for place in _PLACES if re.search(rf"\b{place}\b", question)]
    story = _STORY.fullmatch(answer.strip())
    if story is None:
        return False
    words = {
        key: {value for name, value in story.groupdict().items() if name.startswith(key) and value} for key in _KEYS
    }
    return (
        all(len(values) == 1 for values in words.values())
        and (not heroes or words["hero"] == set(heroes))
        and words["friend"].isdisjoint(heroes)
        and (not places or words["place"] == set(places))
    )


_KEYS = {"hero": _ANIMAL, "name": "|".join(_NAMES), "place": "|".join(_PLACES), "friend": _ANIMAL}


def _story_pattern() -> re.Pattern[str]:
    """The grammar as one expression, in which every mention of a word is a group of its own, `hero_3` say."""
    mentions = iter(range(1000))

    def group(match: re.Match[str]) -> str:
        article = r"(?:an|a|An|A) " if match[1] else ""
        return f"{article}(?P<{match[2]}_{next(mentions)}>{_KEYS[match[2]]})"

    def sentence(text: str) -> str:
        return re.sub(r"(\b[Aa] )?\{(\w+)\}", group, re.sub(r"([.?*+])", r"\\\1", text))

    rows = ("(?:" + "|".join(sentence(choice) for choice in row) + ")" for row in _GRAMMAR)
    return re.compile(" ".join(rows))


_STORY = _story_pattern()

FAMILY = Family(name=NAME, title="Short stories that name who and where was asked for", make=make, is_right=is_right)
