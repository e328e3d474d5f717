"""The requests that benchmarks send: prompts and output lengths of mixed sizes, the same for everyone who is timed."""

import random
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
