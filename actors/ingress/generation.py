"""From the router's tokens to each answer's text.

Owns detokenizing, stop texts and where an answer ends because of one. Knows nothing of sockets, HTTP or gRPC.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.ingress.ask import GenerationSpec
from actors.ingress.detokenizer import Detokenizer
from actors.ingress.tokenizer import TextTokenizer
from actors.types import FinishReason, SampledToken, TokenEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """News of one answer. `text` may lag `tokens` while a character is incomplete or a stop text may still match.

    `token_index` is the index of the first of `tokens` in this answer; `finish_reason` is set on the last delta.
    """

    answer_idx: int
    token_index: int
    tokens: tuple[SampledToken, ...]
    text: str
    finish_reason: FinishReason | None


@dataclass(slots=True)
class Answer:
    """One whole answer, as its deltas add up."""

    tokens: list[SampledToken] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason = "stop"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.texts.append(delta.text)
        self.finish_reason = delta.finish_reason or self.finish_reason


class AnswerText:
    """Turns one request's events into deltas.

    With stop texts, tokens are looked at one by one, so that where an answer ends does not depend on how many tokens
    happened to travel together.
    """

    def __init__(self, answer_idx: int, tokenizer: TextTokenizer, spec: GenerationSpec) -> None:
        self._answer_idx = answer_idx
        self._detokenizer = Detokenizer(tokenizer.backend, spec.stop, tokenizer.skip_ids)
        self._has_stop = bool(spec.stop)
        self._min_tokens = spec.sampling[0].min_tokens  # the same for all prompts
        self.stopped = False

    def delta(self, event: TokenEvent) -> Delta:
        """The event's tokens and the text that they complete. Errors have been raised before (`mailbox.py`)."""
        tokens, text = self._push(event.token_index, event.tokens)
        finish_reason = event.finish_reason
        if self.stopped:
            finish_reason = "stop"
        elif finish_reason is not None:
            text += self._detokenizer.finish()
        return Delta(
            answer_idx=self._answer_idx, token_index=event.token_index, tokens=tokens, text=text,
            finish_reason=finish_reason,
        )  # fmt: skip

    def _push(self, token_index: int, tokens: tuple[SampledToken, ...]) -> tuple[tuple[SampledToken, ...], str]:
        if not self._has_stop:
            return tokens, self._detokenizer.push([token.token_id for token in tokens]).text
        text = ""
        for i, token in enumerate(tokens):
            news = self._detokenizer.push([token.token_id], may_stop=token_index + i >= self._min_tokens)
            text += news.text
            if news.stopped:
                self.stopped = True
                return tokens[: i + 1], text
        return tokens, text


class CallText:
    """Turns the events of all of a call's requests into deltas, and says which requests stop texts have ended."""

    def __init__(self, request_ids: Sequence[str], tokenizer: TextTokenizer, spec: GenerationSpec) -> None:
        self._answers = {id_: AnswerText(i, tokenizer, spec) for i, id_ in enumerate(request_ids)}

    @property
    def all_ended(self) -> bool:
        return not self._answers

    def deltas(self, events: Sequence[TokenEvent]) -> tuple[list[Delta], list[str]]:
        """Returns the deltas, in order of events, and the ids of requests that go on at the router but need not."""
        deltas, needless_ids = [], []
        for event in events:
            answer = self._answers.get(event.request_id)
            if answer is None:  # a stop text has ended it
                continue
            delta = answer.delta(event)
            deltas.append(delta)
            if delta.finish_reason is not None:
                del self._answers[event.request_id]
                if event.finish_reason is None:
                    needless_ids.append(event.request_id)
        return deltas, needless_ids
