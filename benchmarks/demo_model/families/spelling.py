"""Words letter by letter.

Held-out operands are made-up words only: a common word may be one token, whose letters cannot be known before they
were seen.
"""

from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask, draw_operands
from benchmarks.demo_model.words import CITIES, COMMON, NAMES, OTHER_WORDS, made_up_word

NAME = "spelling"

_KNOWN = (*COMMON, *OTHER_WORDS, *NAMES, *CITIES)

_SPELL = Phrasings(
    trained=(
        "Spell {}.", "Spell the word {}.", "How do you spell {}?", "Please spell {}.", "Can you spell {}?",
        "How is {} spelled?", "Spell out {}.", "Spell {} letter by letter.", "What is the spelling of {}?",
        "Write {} letter by letter.", "Tell me how to spell {}.", "Spelling of {}, please.",
    ),
    held_out=("Please spell the word {}.", "Can you spell out {}?", "Tell me how {} is spelled."),
)  # fmt: skip
_COUNT = Phrasings(
    trained=(
        "How many letters does {} have?", "How many letters are in {}?", "Count the letters of {}.",
        "How long is the word {}?", "What is the number of letters in {}?", "Tell me how many letters {} has.",
        "Please count the letters in {}.", "How many letters are there in the word {}?",
    ),
    held_out=("How many letters does the word {} have?", "Count the letters in {}, please."),
)  # fmt: skip
_FIRST = Phrasings(
    trained=("What is the first letter of {}?", "Which letter does {} start with?", "Tell me the first letter of {}.",
             "What letter does {} begin with?", "First letter of {}?", "Which letter comes first in {}?"),
    held_out=("What letter does {} start with?", "Please tell me the first letter of {}."),
)  # fmt: skip
_LAST = Phrasings(
    trained=("What is the last letter of {}?", "Which letter does {} end with?", "Tell me the last letter of {}.",
             "What letter is at the end of {}?", "Last letter of {}?", "Which letter comes last in {}?"),
    held_out=("What letter does {} end with?", "Please tell me the last letter of {}."),
)  # fmt: skip


def _word(draw: Random) -> tuple[str]:
    while len(word := made_up_word(draw)) < 3 or word in _KNOWN:
        pass
    return (word,)


def make(draw: Random, split: Split) -> Example:
    is_common = split == "train" and draw.random() < 0.5
    (word,) = (draw.choice(_KNOWN),) if is_common else draw_operands(draw, split, _word)
    written = draw.choice(('"{}"', "{}", "{}", "'{}'")).format(word)
    if split == "train" and draw.random() < 0.1:
        written = written.title()
        word = word.title()
    kind = draw.choice(("spell", "spell", "count", "first", "last"))
    if kind == "spell":
        phrasings, answer = _SPELL, "-".join(word)
    elif kind == "count":
        phrasings, answer = _COUNT, f"{'-'.join(word)}: {len(word)} letters"
    elif kind == "first":
        phrasings, answer = _FIRST, f"The first letter is {word[0]}."
    else:
        phrasings, answer = _LAST, f"The last letter is {word[-1]}."
    return ask(NAME, phrasings.pick(draw, split).format(written), answer)


FAMILY = Family(name=NAME, title="Words letter by letter, letters counted, first and last", make=make, weight=1.5)
