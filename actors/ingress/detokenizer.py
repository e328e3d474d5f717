"""Token ids to text, as they come.

Owns turning a byte-level vocabulary's tokens into whole characters, and cutting at stop texts. Each token is looked at
once: its bytes go through an incremental UTF-8 decoder, so nothing is ever decoded again and no half character is
sent. Knows nothing of requests.
"""

import codecs
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders

from actors.ingress.stop_texts import StopFinder


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizedText:
    """New text that is safe to send, and whether a stop text has ended it. The stop text is not in it."""

    text: str
    stopped: bool


class Detokenizer:
    """The text of one answer. All texts in order are the decoded ids, without `skip_ids`, up to the first stop text.

    Bytes that are not UTF-8 become U+FFFD, as in `Tokenizer.decode`; ids without a token are nothing. Raises ValueError
    if the tokenizer is not byte-level.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], skip_ids: AbstractSet[int]) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise ValueError(f"the tokenizer's decoder is {tokenizer.decoder}, not ByteLevel")
        self._tokenizer = tokenizer
        self._skip_ids = skip_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop_finder = StopFinder(stop)

    def push(self, token_ids: Iterable[int], may_stop: bool = True) -> DetokenizedText:
        """Takes the next tokens. After a stop they are ignored.

        Until the first push with `may_stop`, stop texts are not looked for (there is a least length to reach); none
        begins before.
        """
        if self._stop_finder.stopped:
            return DetokenizedText(text="", stopped=True)
        data = b"".join(token_bytes(self._tokenizer, i) for i in token_ids if i not in self._skip_ids)
        text = self._decoder.decode(data)
        if may_stop:
            text = self._stop_finder.push(text)
        return DetokenizedText(text=text, stopped=self._stop_finder.stopped)

    def finish(self) -> str:
        """What was held back: the beginning of a stop text that did not come, a character that stayed incomplete."""
        if self._stop_finder.stopped:
            return ""
        text = self._stop_finder.push(self._decoder.decode(b"", final=True))
        return text + self._stop_finder.finish()


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; none for an id without a token."""
    piece = tokenizer.id_to_token(token_id)
    if piece is None:
        return b""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in piece)
    except KeyError:  # an added token is spelt as it is
        data: bytes = piece.encode()
        return data


def _byte_of_char() -> dict[str, int]:
    """A byte-level vocabulary spells printable Latin-1 bytes as themselves, others as U+0100 and on, in order.

    Source: GPT-2's encoder, `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
