"""What a task family makes: questions with the answer that is right, in a training split and two held-out ones.

Owns the split rule. Held-out phrasings are never trained, and neither are held-out operands: whether operands are
held out is a hash of them, so that no list of them has to be kept. Knows nothing of any family or of tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

# train; operands: trained phrasings, operands held out; phrasings: both held out.
Split = Literal["train", "operands", "phrasings"]
HELD_OUT_SPLITS: tuple[Split, ...] = ("operands", "phrasings")

HELD_OUT_ONE_IN = 12

Operands = TypeVar("Operands", bound=tuple[object, ...])


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. Roles as the chat template knows them: system, user, assistant, tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A question in its context, and the expected answer: the last message, the assistant's."""

    family: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1].content


def ask(family: str, question: str, answer: str) -> Example:
    """A single question without context."""
    return Example(
        family=family, messages=(Message(role="user", content=question), Message(role="assistant", content=answer))
    )


def same_text(example: Example, answer: str) -> bool:
    """The check of most families: the answer, word by word."""
    return answer.strip() == example.answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of question. `weight` is its share of the training data, relative to the other families' weights."""

    name: str
    title: str
    make: Callable[[Random, Split], Example]
    is_right: Callable[[Example, str], bool] = same_text
    weight: float = 1.0
    has_operands: bool = True  # False: facts, which only phrasings can be held out of


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Ways to say the same thing."""

    trained: Sequence[str]
    held_out: Sequence[str]

    def pick(self, draw: Random, split: Split) -> str:
        return draw.choice(self.held_out if split == "phrasings" else self.trained)


def is_held_out(*operands: object) -> bool:
    """Whether these operands are kept from training. The same on every machine."""
    digest = hashlib.blake2b(repr(operands).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def draw_operands(draw: Random, split: Split, make: Callable[[Random], Operands]) -> Operands:
    """Operands of the split: `make` is called until they are."""
    while True:
        operands = make(draw)
        if is_held_out(*operands) == (split != "train"):
            return operands
