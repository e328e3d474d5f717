"""The requests that benchmarks send: prompts and output lengths of mixed sizes, the same for everyone who is timed."""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    prompt_ids: list[int]
    num_outputs: int


def mixed(num_requests: int, vocab: int, seed: int = 0) -> list[Item]:
    """Prompts of 16 to 256 tokens, outputs of 32 to 128, uniform. `vocab`: ids are drawn from [0, vocab)."""
    rng = random.Random(seed)
    return [
        Item([rng.randrange(vocab) for _ in range(rng.randint(16, 256))], rng.randint(32, 128))
        for _ in range(num_requests)
    ]


def single_stream(vocab: int, num_outputs: int = 96, prompt_tokens: int = 128, seed: int = 1) -> Item:
    """One request, for time per token."""
    rng = random.Random(seed)
    return Item([rng.randrange(vocab) for _ in range(prompt_tokens)], num_outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndlessItems(Sequence[Item]):
    """Random requests without end, made when they are asked for, so that many processes can share them by number.

    Prompts and outputs have lengths from `low` to `high` tokens, uniform, and `vocab` is as in `mixed`. The first
    `num_streams` outputs are cut to random lengths: streams that start together would else go on in step, all in
    prefill and then all in decode.
    """

    num_streams: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    vocab: int
    seed: int = 0

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> Item:  # type: ignore[override]
        rng = random.Random(f"{self.seed} {number}")
        num_outputs = rng.randint(*self.output_tokens)
        if number < self.num_streams:
            num_outputs = rng.randint(1, num_outputs)
        return Item(rng.choices(range(self.vocab), k=rng.randint(*self.prompt_tokens)), num_outputs)
