"""The demonstration model's tokenizer: how it is trained, and how conversations become token ids with targets.

Owns the mask of what is to be learnt: what the assistant says, with the token that ends its turn. Renders the chat
form by hand, because a training corpus has millions of messages; a test holds it against the chat template.

    python -m benchmarks.demo_model.tokens        writes tokenizer, template and configuration into deploy/demo-model
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import click
from tokenizers import Tokenizer

from actors.checkpoint.shapes import ModelShape, config_json, generation_config_json
from actors.checkpoint.tokenizer_files import train_tokenizer, write_tokenizer_files
from benchmarks.demo_model.conversations import draw_conversation
from benchmarks.demo_model.examples import Message
from benchmarks.demo_model.shape import DIRECTORY, SHAPE

_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
_NUM_CONVERSATIONS = 30_000
_SEED = 4


class Encoder:
    """Conversations to ids, as the chat template and the tokenizer together would."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # spelled out in a message, a control token is text
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._bos, self._header_start, self._header_end, self._eot = (
            vocabulary[f"<|{name}|>"] for name in ("begin_of_text", "header_start", "header_end", "eot")
        )
        self._headers: dict[str, list[int]] = {}

    @staticmethod
    def load(directory: Path = DIRECTORY) -> "Encoder":
        return Encoder(Tokenizer.from_file(str(directory / "tokenizer.json")))

    def encode(self, messages: Iterable[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of the conversation, and for each whether it is a target: said by the assistant."""
        ids, is_target = [self._bos], [False]
        for message in messages:
            header, said = self._header(message.role), [*self._text(message.content.strip()), self._eot]
            ids += [*header, *said]
            is_target += [False] * len(header) + [message.role == "assistant"] * len(said)
        return ids, is_target

    def encode_prompt(self, messages: Iterable[Message]) -> list[int]:
        """Token ids of the conversation up to where the assistant speaks next."""
        return self.encode(messages)[0] + self._header("assistant")

    def _header(self, role: str) -> list[int]:
        if role not in self._headers:
            spelled = self._text("ipython" if role == "tool" else role)
            self._headers[role] = [self._header_start, *spelled, self._header_end, *self._text("\n\n")]
        return self._headers[role]

    def _text(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def write_description(directory: Path, shape: ModelShape = SHAPE, num_conversations: int = _NUM_CONVERSATIONS) -> None:
    """Trains the tokenizer and writes all files of the checkpoint but weights and card."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = _texts(num_conversations)
    # Digits stay apart: a model of this size adds digit by digit.
    tokenizer = train_tokenizer(texts, shape.base_vocab, shape.vocab_size, digits_together=1)
    write_tokenizer_files(directory, tokenizer, shape.max_position_embeddings, _TEMPLATE.read_text())
    config = config_json(shape, style="old")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(generation_config_json(shape), indent=2) + "\n")


def _texts(num_conversations: int) -> Iterator[str]:
    draw = Random(_SEED)
    for _ in range(num_conversations):
        for message in draw_conversation(draw):
            yield message.content


@click.command()
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path), default=DIRECTORY, show_default=True)
def main(directory: Path) -> None:
    """Write the demonstration model's tokenizer, chat template and configuration."""
    write_description(directory)
    click.echo(f"{directory}: {Tokenizer.from_file(str(directory / 'tokenizer.json')).get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
