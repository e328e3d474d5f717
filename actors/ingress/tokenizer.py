"""Text to token ids, from a checkpoint's tokenizer.json and chat template.

Owns the one rule that keeps user text harmless: it is always encoded with control tokens disabled, and control tokens
come from BOS and from the template alone. Knows nothing of requests. The way back is `detokenizer.py`'s.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from actors.errors import CheckpointError, RequestError
from actors.ingress.chat_template import ChatTemplate
from actors.ingress.detokenizer import token_bytes

ROLES = ("system", "user", "assistant", "tool")


class TextTokenizer:
    """Encodes prompts and conversations. Safe to use from several threads.

    `backend` is the tokenizers library's object, with every added token made a control token that text cannot spell.
    """

    def __init__(self, backend: Tokenizer, control_ids: dict[str, int], bos_token_id: int) -> None:
        self.backend = backend
        self.backend.encode_special_tokens = True  # "encode their spelling as text", in spite of the name
        self.control_ids = control_ids  # spelling -> id
        self.skip_ids = frozenset(control_ids.values())
        self.bos_token_id = bos_token_id
        self.template: ChatTemplate | None = None
        self._longest_token_bytes = max((len(token) for token in backend.get_vocab(False)), default=1)

    @staticmethod
    def load(directory: Path, bos_token_id: int) -> "TextTokenizer":
        """Reads tokenizer.json and, where they are there, tokenizer_config.json and chat_template.jinja.

        Raises CheckpointError.
        """
        path = directory / "tokenizer.json"
        values = _read_json(path)
        if values is None:
            raise CheckpointError(str(path), None, "is missing")
        added = values.get("added_tokens") or []
        for token in added:
            token["special"] = True  # only special ones can be disabled
        try:
            backend = Tokenizer.from_str(json.dumps(values))
        except Exception as e:  # the library raises bare Exception
            raise CheckpointError(str(path), None, f"is not a tokenizer: {e}") from e
        control_ids = {str(token["content"]): int(token["id"]) for token in added}
        tokenizer = TextTokenizer(backend, control_ids, bos_token_id)
        tokenizer.template = _read_template(directory, tokenizer)
        return tokenizer

    def encode_prompt(self, text: str) -> list[int]:
        """BOS, then `text` with control tokens disabled."""
        return [self.bos_token_id, *self._encode_text(text)]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation with the generation prompt. Each message has `role` (one of ROLES) and `content`.

        BOS is the template's business. Raises RequestError with field "messages".
        """
        if self.template is None:
            raise RequestError("messages", "this model has no chat template; use completions")
        ids: list[int] = []
        for is_control, piece in self.template.render(messages):
            ids += [self.control_ids[piece]] if is_control else self._encode_text(piece)
        return ids

    def least_tokens(self, num_chars: int) -> int:
        """No text of this many characters has fewer tokens: a bound that costs nothing, for refusing early."""
        return num_chars // self._longest_token_bytes

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; for a control token, of its spelling; none for an id without a token."""
        return token_bytes(self.backend, token_id)

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids


def _read_json(path: Path) -> Any:
    """The parsed file, or None where there is none. Raises CheckpointError."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise CheckpointError(str(path), None, f"cannot be read: {e}") from e


def _read_template(directory: Path, tokenizer: TextTokenizer) -> ChatTemplate | None:
    """The chat template from its own file, else from tokenizer_config.json."""
    config = _read_json(directory / "tokenizer_config.json") or {}
    path = directory / "chat_template.jinja"
    source: Any = path.read_text() if path.exists() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    variables = {key: _content(config[key]) for key in ("bos_token", "eos_token", "pad_token") if config.get(key)}
    if "bos_token" not in variables:
        variables["bos_token"] = tokenizer.backend.id_to_token(tokenizer.bos_token_id) or ""
    file = str(path if path.exists() else directory / "tokenizer_config.json")
    return ChatTemplate(source, file, tokenizer.control_ids, variables)


def _content(token: Any) -> str:
    """A token of tokenizer_config.json, which is a string or an AddedToken as a dict."""
    return str(token["content"] if isinstance(token, dict) else token)
