"""OpenAI's response bodies and stream chunks, as plain dicts.

Owns their shapes, for both endpoints. Knows nothing of HTTP. Source: the OpenAI API reference and the types of the
`openai` Python package; token_ids and prompt_token_ids as vLLM sends them.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from actors.ingress.ask import GenerationSpec
from actors.ingress.generation import Answer, Delta
from actors.types import SampledToken

LEAST_LOGPROB = -9999.0  # OpenAI's value for "unlikely beyond measure"; JSON has no -inf

TokenBytes = Callable[[int], bytes]


class CompletionShape:
    """/v1/completions: text_completion objects, with legacy logprobs."""

    def __init__(
        self, call_id: str, model: str, spec: GenerationSpec, token_bytes: TokenBytes, return_token_ids: bool
    ) -> None:
        self._head = {"id": f"cmpl-{call_id}", "object": "text_completion", "created": int(time.time()), "model": model}
        self._spec = spec
        self._token_bytes = token_bytes
        self._return_token_ids = return_token_ids
        self._offsets = [0] * spec.num_answers  # characters of each answer's token texts so far
        self._wants_logprobs = _wants_logprobs(spec)
        self._is_first = [True] * spec.num_answers

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The one response of a call that does not stream."""
        choices = [
            self._choice(i, answer.text, answer.tokens, answer.finish_reason) for i, answer in enumerate(answers)
        ]
        generated = sum(len(answer.tokens) for answer in answers)
        return {**self._head, "choices": choices, "usage": usage(self._spec.prompt_tokens, generated)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that come before any token: none."""
        return []

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Chunks for one delta: none if it has nothing that the client asked for."""
        if not (
            delta.text or delta.finish_reason or (delta.tokens and (self._wants_logprobs or self._return_token_ids))
        ):
            return []
        return [{**self._head, "choices": [
            self._choice(delta.answer_idx, delta.text, delta.tokens, delta.finish_reason)
        ]}]  # fmt: skip

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """The chunk after the last answer, for clients that asked for usage."""
        return {**self._head, "choices": [], "usage": usage(self._spec.prompt_tokens, completion_tokens)}

    def _choice(
        self, answer_idx: int, text: str, tokens: Sequence[SampledToken], finish_reason: str | None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": answer_idx, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if self._wants_logprobs:
            choice["logprobs"] = self._logprobs(answer_idx, tokens)
        if self._return_token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
            if self._is_first[answer_idx]:
                choice["prompt_token_ids"] = list(self._spec.prompts[answer_idx // self._spec.n])
        self._is_first[answer_idx] = False
        return choice

    def _logprobs(self, answer_idx: int, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        texts, offsets = [self._text(token.token_id) for token in tokens], []
        for text in texts:
            offsets.append(self._offsets[answer_idx])
            self._offsets[answer_idx] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: SampledToken) -> dict[str, float]:
        """The likeliest tokens and, as OpenAI does, the sampled one. Of two with one spelling the likelier stays."""
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top_logprobs, (token.token_id, token.logprob)):
            top.setdefault(self._text(token_id), _finite(logprob))
        return top

    def _text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode(errors="replace")


class ChatShape:
    """/v1/chat/completions: chat.completion and chat.completion.chunk objects."""

    def __init__(
        self, call_id: str, model: str, spec: GenerationSpec, token_bytes: TokenBytes, return_token_ids: bool
    ) -> None:
        self._head = {"id": f"chatcmpl-{call_id}", "created": int(time.time()), "model": model}
        self._chunk_head = {**self._head, "object": "chat.completion.chunk"}
        self._spec = spec
        self._token_bytes = token_bytes
        self._return_token_ids = return_token_ids
        self._wants_logprobs = _wants_logprobs(spec)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The one response of a call that does not stream."""
        generated = sum(len(answer.tokens) for answer in answers)
        body = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._whole_choice(i, answer) for i, answer in enumerate(answers)],
            "usage": usage(self._spec.prompt_tokens, generated),
        }
        if self._return_token_ids:
            body["prompt_token_ids"] = list(self._spec.prompts[0])
        return body

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that come before any token: one per answer, with its role."""
        chunks = [self._chunk(i, {"role": "assistant", "content": ""}, (), None) for i in range(self._spec.num_answers)]
        if self._return_token_ids:
            chunks[0]["prompt_token_ids"] = list(self._spec.prompts[0])
        return chunks

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """Chunks for one delta: its news if the client asked for any of it, then the end by itself."""
        chunks = []
        if delta.text or (delta.tokens and (self._wants_logprobs or self._return_token_ids)):
            chunks.append(self._chunk(delta.answer_idx, {"content": delta.text}, delta.tokens, None))
        if delta.finish_reason is not None:
            chunks.append(self._chunk(delta.answer_idx, {}, (), delta.finish_reason))
        return chunks

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """The chunk after the last answer, for clients that asked for usage."""
        return {**self._chunk_head, "choices": [], "usage": usage(self._spec.prompt_tokens, completion_tokens)}

    def _whole_choice(self, answer_idx: int, answer: Answer) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": answer_idx,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens) if self._wants_logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        if self._return_token_ids:
            choice["token_ids"] = [token.token_id for token in answer.tokens]
        return choice

    def _chunk(
        self, answer_idx: int, delta: dict[str, Any], tokens: Sequence[SampledToken], finish_reason: str | None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": answer_idx, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        if tokens and self._wants_logprobs:
            choice["logprobs"] = self._logprobs(tokens)
        if tokens and self._return_token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        return {**self._chunk_head, "choices": [choice]}

    def _logprobs(self, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        content = [
            {
                **self._token(token.token_id, token.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in token.top_logprobs],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        data = self._token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


Shape = CompletionShape | ChatShape


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def model_object(name: str, created_s: int, max_model_len: int) -> dict[str, Any]:
    """One entry of /v1/models; max_model_len as vLLM adds it."""
    return {
        "id": name, "object": "model", "created": created_s, "owned_by": "corral", "max_model_len": max_model_len,
    }  # fmt: skip


def _wants_logprobs(spec: GenerationSpec) -> bool:
    return spec.sampling[0].num_logprobs >= 0


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None or not logprob >= LEAST_LOGPROB else logprob
