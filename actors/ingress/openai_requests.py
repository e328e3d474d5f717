"""OpenAI's request bodies, read into asks.

Owns which fields exist, which extensions are spelt as in vLLM, and which features are refused by name. Values are
bounded elsewhere (`ask.py`). Fields that nobody knows are ignored, as api.openai.com's clients rely on.
"""

import time
from collections.abc import Sequence
from typing import Any, TypeVar

import pydantic

from actors.errors import RequestError
from actors.ingress.ask import Ask
from actors.ingress.tokenizer import ROLES

Body = TypeVar("Body", bound="GenerationBody")

# Features that change what is generated and are not there: refused unless at the value that asks for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "suffix": ("",), "echo": (False,), "use_beam_search": (False,),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none",), "functions": ([],),
    "function_call": ("none",), "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "reasoning_effort": ("none",), "verbosity": (), "prompt_logprobs": (), "truncate_prompt_tokens": (),
    "allowed_token_ids": (), "bad_words": ([],), "structured_outputs": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "logits_processors": ([],), "length_penalty": (1, 1.0),
    "prompt_embeds": (), "documents": (), "chat_template": (), "chat_template_kwargs": ({},),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "continue_final_message": (False,), "add_generation_prompt": (True,), "add_special_tokens": (True, False),
}  # fmt: skip


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class GenerationBody(pydantic.BaseModel):
    """What both endpoints understand. `timeout_ms` is ours; top_k to return_token_ids are vLLM's."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    model: str = ""
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Any = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    return_token_ids: bool | None = None

    timeout_ms: int | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def ask(self) -> Ask:
        """Raises RequestError naming a field of the body."""
        self._refuse_unsupported()
        return Ask(
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's "off"
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_logit_bias(self.logit_bias),
            seed=self.seed,
            max_tokens=self._max_tokens(),
            min_tokens=self.min_tokens if self.min_tokens is not None else 0,
            stop=_texts(self.stop, "stop"),
            stop_token_ids=self.stop_token_ids if self.stop_token_ids is not None else (),
            ignore_eos=self.ignore_eos,
            n=self.n if self.n is not None else 1,
            num_logprobs=self._num_logprobs(),
            deadline_s=_deadline_s(self.timeout_ms),
            spelling=self._spelling(),
        )

    def _max_tokens(self) -> int | None:
        return self.max_tokens

    def _num_logprobs(self) -> int | None:
        return None

    def _spelling(self) -> dict[str, str]:
        return {}

    def _refuse_unsupported(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "is for streams only")
        for name, value in (self.model_extra or {}).items():
            harmless = _UNSUPPORTED.get(name)
            if harmless is not None and value is not None and value not in harmless:
                raise RequestError(name, "is not supported here")


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Any = None
    logprobs: int | None = None

    def prompts(self, max_prompts: int) -> Sequence[str | list[int]]:
        """The prompts: texts or token ids. Raises RequestError."""
        prompt = self.prompt
        if isinstance(prompt, str) or _is_ids(prompt):
            return [prompt]
        if not isinstance(prompt, list) or not (all(isinstance(p, str) for p in prompt) or all(map(_is_ids, prompt))):
            raise RequestError("prompt", "must be a text, a list of texts, token ids, or a list of lists of token ids")
        if not 0 < len(prompt) <= max_prompts:
            raise RequestError("prompt", f"must hold 1 to {max_prompts} prompts, not {len(prompt)}")
        return prompt

    def _num_logprobs(self) -> int | None:
        return self.logprobs

    def _spelling(self) -> dict[str, str]:
        return {"num_logprobs": "logprobs"}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def conversation(self) -> list[dict[str, str]]:
        """The messages as role and text. Raises RequestError."""
        if not self.messages:
            raise RequestError("messages", "must hold at least one message")
        return [_message(message, f"messages.{i}") for i, message in enumerate(self.messages)]

    def _max_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def _num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", "needs logprobs to be true")
        if not self.logprobs:
            return None
        return self.top_logprobs if self.top_logprobs is not None else 0

    def _spelling(self) -> dict[str, str]:
        spelling = {"num_logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            spelling["max_tokens"] = "max_completion_tokens"
        return spelling


def parse_body(data: bytes, kind: type[Body]) -> Body:
    """Reads a JSON body. Raises RequestError naming the first field that is wrong, "body" for broken JSON."""
    try:
        return kind.model_validate_json(data)
    except pydantic.ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "body"
        raise RequestError(field, first["msg"]) from None


def _message(message: dict[str, Any], name: str) -> dict[str, str]:
    role = message.get("role")
    role = "system" if role == "developer" else role  # OpenAI's newer word
    if role not in ROLES:
        raise RequestError(f"{name}.role", f"must be one of {', '.join(ROLES)}")
    for feature in ("tool_calls", "function_call", "audio"):
        if message.get(feature):
            raise RequestError(f"{name}.{feature}", "is not supported here")
    return {"role": role, "content": _content(message.get("content"), f"{name}.content")}


def _content(content: Any, name: str) -> str:
    """A message's text, given whole or as OpenAI's list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise RequestError(name, "must be a text or a list of text parts")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{name}.{i}", f"must be a text part; {kind or 'this'} is not supported here")
    return "".join(part["text"] for part in content)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _texts(value: Any, name: str) -> list[str]:
    """OpenAI's stop: nothing, one text or several."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(name, "must be a text or a list of texts")
    return texts


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float]:
    try:
        return {int(token_id): value for token_id, value in (bias or {}).items()}
    except ValueError:
        raise RequestError("logit_bias", "keys must be token ids") from None


def _deadline_s(timeout_ms: int | None) -> float | None:
    if timeout_ms is not None and not 1 <= timeout_ms < 2**32:
        raise RequestError("timeout_ms", f"must be in [1, {2**32 - 1}]")
    return None if timeout_ms is None else time.time() + timeout_ms / 1000
