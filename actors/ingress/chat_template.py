"""Renders a conversation through the checkpoint's chat template, keeping apart what the template wrote and what users
wrote.

Owns the jinja environment and the marks. Knows nothing of token ids. The danger: a user's message may spell a control
token, which in the rendered text would look like the template's own. So every user string is marked before rendering:
a character that occurs nowhere in it is put behind each character that can begin a control token and before each that
can end one. No spelling that touches user text can then match, and the marks are taken out again from what is left.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from actors.errors import CheckpointError, RequestError

# Candidates for the mark, in order: Unicode's non-characters, which text should not hold, then a private-use plane.
_MARKS = (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE))


class TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception."""


class ChatTemplate:
    """One compiled template. Conventions are those of transformers: trim_blocks, lstrip_blocks, loop controls, tojson
    that leaves non-ASCII alone, raise_exception and strftime_now.

    Raises CheckpointError where the template does not compile.
    """

    def __init__(self, source: str, file: str, control_tokens: Iterable[str], variables: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise CheckpointError(file, None, f"the chat template's line {e.lineno}: {e.message}") from e
        self._variables = variables
        # One character cannot be marked, so it stays text. The longest spelling wins where several match.
        tokens = sorted((token for token in control_tokens if len(token) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._first = "".join({token[0] for token in tokens})
        self._last = "".join({token[-1] for token in tokens})

    def render(self, messages: Sequence[dict[str, str]]) -> list[tuple[bool, str]]:
        """Renders messages (role, content and other strings) with the generation prompt.

        Returns (is_control, text) pieces in order: control tokens that the template wrote, and everything else.
        Raises RequestError with field "messages" where the template refuses.
        """
        mark = _unused_character("".join(value for message in messages for value in message.values()))
        marked = [{key: self._mark(value, mark, key) for key, value in message.items()} for message in messages]
        try:
            text = self._template.render(
                messages=marked, add_generation_prompt=True, tools=None, documents=None, **self._variables
            )
        except jinja2.TemplateError as e:
            raise RequestError("messages", str(e).replace(mark, "") or "the chat template refused them") from e
        return self._split(text, mark)

    def _mark(self, text: str, mark: str, key: str) -> str:
        if key == "role" or not self._first:  # roles are an enumeration that templates compare
            return text
        text = re.sub(f"([{re.escape(self._first)}])", rf"\g<1>{mark}", text)
        return re.sub(f"([{re.escape(self._last)}])", rf"{mark}\g<1>", text)

    def _split(self, text: str, mark: str) -> list[tuple[bool, str]]:
        pieces: list[tuple[bool, str]] = []
        end = 0
        for match in self._control.finditer(text):
            pieces += [(False, text[end : match.start()].replace(mark, "")), (True, match.group())]
            end = match.end()
        pieces.append((False, text[end:].replace(mark, "")))
        return [(is_control, piece) for is_control, piece in pieces if piece]


def _unused_character(text: str) -> str:
    used = set(text)
    for code in _MARKS:
        if chr(code) not in used:
            return chr(code)
    raise RequestError("messages", "hold every private-use character")


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(problem: str) -> NoReturn:
    raise TemplateRefusal(problem)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
