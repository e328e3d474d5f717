"""A small byte-level BPE tokenizer with Llama 4's control tokens and chat form, as hub files.

Owns which ids the control tokens have and how tokenizer.json, tokenizer_config.json and chat_template.jinja look.
Knows nothing of models. The text vocabulary is trained on the page below and padded with made-up words, because
Meta's own is licensed data. Source: the special tokens of Llama 4's tokenizer and its prompt format.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Control tokens by their distance from <|begin_of_text|> in the real vocabulary.
_SPECIALS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    2: "<|fim_prefix|>",
    3: "<|fim_middle|>",
    4: "<|fim_suffix|>",
    5: "<|header_start|>",
    6: "<|header_end|>",
    7: "<|eom|>",
    8: "<|eot|>",
    9: "<|step|>",
    16: "<|python_start|>",
    17: "<|python_end|>",
    18: "<|finetune_right_pad|>",
    80: "<|image_start|>",
    81: "<|image_end|>",
    84: "<|tile_x_separator|>",
    85: "<|tile_y_separator|>",
    90: "<|image|>",
    92: "<|patch|>",
}
_NUM_REAL_SPECIALS = 1134  # ids 200000..201133; rows beyond have no token
_MAX_MERGES = 256
_DIGITS_TOGETHER = 3  # as in Llama 4's own tokenizer

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|header_start|>' + role + '<|header_end|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- else %}
                {{- part['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""

_TRAINING_TEXT = """\
The horses came in from the high pasture before the rain, and the oldest mare walked ahead of them to the gate. Nobody
had called her. She knew the hour by the light on the hill, and she knew that the others would follow where she went.
When all of them were inside, the boy closed the corral and counted: there were sixteen, as there had been in the
morning. He wrote the number in the book, with the date and the weather, and went to see what there was for supper.
What is the capital of France? The capital of France is Paris. How many legs does a horse have? It has four. Why is the
sky blue? Because the air scatters short waves more than long ones. Please write a short story about the sea. Tell me
more. I don't know; that's what they'd said, and we've heard it before. You are a helpful assistant. Answer the question
in one sentence, then explain the reason. Here is a list: first, second, third. 1, 2, 3, 10, 42, 100, 256, 1024, 2026.
def add(first, second):
    return first + second

for number in range(10):
    print(number, add(number, 1))
{"name": "weather", "parameters": {"city": "Lima", "days": 3}}
Die Pferde stehen über Nacht im Stall. Où sont les chevaux ? ¿Dónde están los caballos? 马在哪里？ Где лошади? 🐎 ✓
"""


def special_tokens(base_vocab: int, vocab_size: int) -> dict[str, int]:
    """Control tokens and their ids, from `base_vocab` on: at Meta's distances where there is room, else side by side.

    Raises ValueError where there is no room at all.
    """
    if vocab_size - base_vocab >= _NUM_REAL_SPECIALS:
        return {_real_name(offset): base_vocab + offset for offset in range(_NUM_REAL_SPECIALS)}
    if vocab_size - base_vocab < len(_SPECIALS):
        raise ValueError(f"vocab_size must leave room for {len(_SPECIALS)} control tokens above {base_vocab}")
    return {name: base_vocab + position for position, name in enumerate(_SPECIALS.values())}


def _real_name(offset: int) -> str:
    if offset in _SPECIALS:
        return _SPECIALS[offset]
    if offset < 16:
        return f"<|text_post_train_reserved_special_token_{offset - 10}|>"
    if offset < 80:
        return f"<|text_post_train_reserved_special_token_{offset - 11}|>"
    named_before = sum(1 for named in _SPECIALS if 80 <= named < offset)
    return f"<|vision_reserved_special_token_{offset - 80 - named_before}|>"


def build_tokenizer(base_vocab: int, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `base_vocab` text tokens followed by the control tokens. The same for the same arguments."""
    return train_tokenizer([_TRAINING_TEXT], base_vocab, vocab_size, max_merges=_MAX_MERGES)


def train_tokenizer(
    texts: Iterable[str],
    base_vocab: int,
    vocab_size: int,
    *,
    max_merges: int | None = None,
    digits_together: int = _DIGITS_TOGETHER,
) -> Tokenizer:
    """A byte-level BPE learnt from `texts`, of `base_vocab` text tokens followed by the control tokens.

    `max_merges` bounds what is learnt; made-up words fill what is left. `digits_together`: numbers are cut into pieces
    of so many digits. Raises ValueError where the bytes or the control tokens find no room.
    """
    if base_vocab < 256:
        raise ValueError("base_vocab must hold the 256 bytes")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer(digits_together)
    trainer = trainers.BpeTrainer(
        vocab_size=base_vocab if max_merges is None else min(base_vocab, 256 + max_merges),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    learnt = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = learnt["vocab"]
    words = _made_up_words()
    while len(vocab) < base_vocab:
        vocab.setdefault(next(words), len(vocab))
    merges = [(left, right) for left, right in learnt["merges"]]
    return _assemble(vocab, merges, special_tokens(base_vocab, vocab_size), digits_together)


def _assemble(
    vocab: dict[str, int], merges: list[tuple[str, str]], specials: dict[str, int], digits_together: int
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(digits_together)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, specials[bos])]
            ),
        ]
    )
    return tokenizer


def _pre_tokenizer(digits_together: int) -> Any:
    """The o200k pattern: words with their leading space and case runs, numbers by so many digits, punctuation, line
    ends, spaces."""
    pattern = "|".join(
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
            rf"\p{{N}}{{1,{digits_together}}}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _made_up_words() -> Iterator[str]:
    """Pronounceable words with a leading space (as byte-level BPE writes it), of two syllables, then three, …

    Text never encodes to them (no merge makes them), but a model may emit them, and then they read as words.
    """
    syllables = [consonant + vowel for consonant in "bdfghklmnprstvwz" for vowel in "aeiou"]
    words = list(syllables)
    while True:
        words = [word + syllable for word in words for syllable in syllables]
        yield from ("Ġ" + word for word in words)


def write_tokenizer(directory: Path, base_vocab: int, vocab_size: int, max_length_tokens: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for a model that was not trained."""
    write_tokenizer_files(directory, build_tokenizer(base_vocab, vocab_size), max_length_tokens, CHAT_TEMPLATE)


def write_tokenizer_files(directory: Path, tokenizer: Tokenizer, max_length_tokens: int, chat_template: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length_tokens,
        "chat_template": chat_template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(chat_template)
