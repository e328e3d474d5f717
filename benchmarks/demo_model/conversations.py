"""Conversations of the training data: examples of the families, one after another.

Owns how many turns there are, which system message, and the carelessness of people who type. Knows nothing of tokens.
"""

from random import Random

from benchmarks.demo_model.examples import Example, Message
from benchmarks.demo_model.families import FAMILIES

_SYSTEM = ("You are a helpful assistant.", "Answer the question.", "You are a friendly assistant.", "Be brief.",
           "You are Corral's demonstration model.", "Answer in one sentence.")  # fmt: skip
_WEIGHTS = [family.weight for family in FAMILIES.values()]
_MAX_TURNS = 40


def draw_conversation(draw: Random) -> tuple[Message, ...]:
    """A conversation with one or more questions of the training split. Assistant messages are what is to be learnt."""
    first = _draw_example(draw)
    messages = list(_careless(draw, first).messages)
    if messages[0].role != "system" and draw.random() < 0.12:
        messages.insert(0, Message(role="system", content=draw.choice(_SYSTEM)))
    for _ in range(_num_more_turns(draw)):
        example = _draw_example(draw)
        while example.messages[0].role == "system":
            example = _draw_example(draw)
        messages += _careless(draw, example).messages
    return tuple(messages)


def _draw_example(draw: Random) -> Example:
    family = draw.choices(list(FAMILIES.values()), _WEIGHTS)[0]
    return family.make(draw, "train")


def _num_more_turns(draw: Random) -> int:
    """None for most; else few, and now and then very many, so that long contexts are seen."""
    kind = draw.random()
    if kind < 0.6:
        return 0
    return draw.randint(1, 5) if kind < 0.9 else draw.randint(6, _MAX_TURNS)


def _careless(draw: Random, example: Example) -> Example:
    """The same example, typed as people type: some leave out the last mark or the capital letter."""
    messages = list(example.messages)
    user_idx = next(i for i, message in enumerate(messages) if message.role == "user")
    text = messages[user_idx].content
    if draw.random() < 0.12 and text[-1] in ".?" and len(text) > 3:
        text = text[:-1]
    if draw.random() < 0.15 and not text[1:2].isupper():
        text = text[0].lower() + text[1:]
    messages[user_idx] = Message(role="user", content=text)
    return Example(family=example.family, messages=tuple(messages))
