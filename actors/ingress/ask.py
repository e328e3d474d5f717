"""What a client asks for, in neither dress, and the check that turns it into requests.

Owns the bounds of every value that a client can set (those that protos/inference.proto states) and the errors that
name a field as the client spelt it. Knows nothing of HTTP, gRPC, text or sockets.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from actors.config import IngressConfig
from actors.errors import ContextLengthError, RequestError
from actors.ingress.model_card import ModelCard, SamplingDefaults
from actors.types import Request, SamplingParams

MAX_LOGIT_BIAS = 1024  # entries
MAX_STOP_TOKEN_IDS = 1024
MAX_STOP_CHARS = 1024
MAX_TOP_K = 2**31 - 1
SEED_SPAN = 2**64

# field -> (lowest, highest, whether the lowest itself is allowed)
_BOUNDS = {
    "temperature": (0.0, 2.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 2.0, False),
    "presence_penalty": (-2.0, 2.0, True),
    "frequency_penalty": (-2.0, 2.0, True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A client's wishes, unchecked. None is "not said". `spelling` maps these names to the client's where they differ.

    `deadline_s` is Unix time in seconds; `num_logprobs` counts the likeliest tokens to report beside the sampled one.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    num_logprobs: int | None = None
    deadline_s: float | None = None
    spelling: Mapping[str, str] = field(default_factory=dict)

    def spelt(self, name: str) -> str:
        """The field's name as the client knows it."""
        return self.spelling.get(name, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """A checked call: `n` answers to each prompt. Answer i belongs to prompt i // n."""

    prompts: tuple[tuple[int, ...], ...]
    sampling: tuple[SamplingParams, ...]  # one per prompt; answer j of a prompt is seeded with its seed + j
    n: int
    stop: tuple[str, ...]
    deadline_s: float | None

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt) for prompt in self.prompts)

    def requests(self, call_id: str) -> list[Request]:
        """One request per answer, in order. Ids are `call_id`-i."""
        return [
            Request(
                request_id=f"{call_id}-{prompt_idx * self.n + j}",
                prompt_ids=prompt,
                sampling=_reseeded(self.sampling[prompt_idx], j),
                deadline_s=self.deadline_s,
            )
            for prompt_idx, prompt in enumerate(self.prompts)
            for j in range(self.n)
        ]


class AskChecker:
    """Checks asks against one model and the edge's limits. Every method raises RequestError."""

    def __init__(self, card: ModelCard, defaults: SamplingDefaults, limits: IngressConfig) -> None:
        self._card = card
        self._defaults = defaults
        self._limits = limits

    def check(self, ask: Ask) -> None:
        """Checks everything that needs no prompt, so that a bad ask costs no tokenizing."""
        for name, (low, high, closed) in _BOUNDS.items():
            _check_number(ask, name, low, high, closed)
        _check_int(ask, "top_k", 0, MAX_TOP_K)
        _check_int(ask, "n", 1, self._limits.max_n)
        _check_int(ask, "num_logprobs", 0, self._limits.max_logprobs)
        _check_int(ask, "max_tokens", 1, None)
        _check_int(ask, "min_tokens", 0, self._card.max_model_len)
        _check_int(ask, "seed", -(2**63), SEED_SPAN - 1)
        self._check_stops(ask)
        self._check_bias(ask)

    def check_prompt(self, ids: Sequence[int], name: str) -> tuple[int, ...]:
        """Checks token ids and that they leave room for at least one more. `name` is the prompt's field."""
        if not ids:
            raise RequestError(name, "is empty")
        self.check_length(len(ids), name)
        if min(ids) < 0 or max(ids) >= self._card.vocab_size:
            raise RequestError(name, f"holds a token id outside [0, {self._card.vocab_size})")
        return tuple(ids)

    def check_length(self, num_tokens: int, name: str) -> None:
        """Raises ContextLengthError where a prompt of (at least) this many tokens leaves no room to answer."""
        limit = self._card.max_model_len
        if num_tokens >= limit:
            raise ContextLengthError(
                name,
                f"this model's maximum context length is {limit} tokens, but the prompt has {num_tokens} or more "
                "and an answer needs at least 1",
            )

    def spec(self, ask: Ask, prompts: Sequence[tuple[int, ...]]) -> GenerationSpec:
        """Builds the spec of an ask that `check` passed, for prompts that `check_prompt` passed."""
        seed = secrets.randbits(64) if ask.seed is None else ask.seed % SEED_SPAN
        return GenerationSpec(
            prompts=tuple(prompts),
            sampling=tuple(self._sampling(ask, len(prompt), seed) for prompt in prompts),
            n=ask.n,
            stop=tuple(ask.stop),
            deadline_s=ask.deadline_s,
        )

    def _sampling(self, ask: Ask, prompt_tokens: int, seed: int) -> SamplingParams:
        room = self._card.max_model_len - prompt_tokens
        wanted = ask.max_tokens if ask.max_tokens is not None else self._limits.default_max_tokens or room
        max_tokens = min(wanted, room)
        if ask.min_tokens > max_tokens:
            raise RequestError(ask.spelt("min_tokens"), f"is above the {max_tokens} tokens that may be generated")
        eos = () if ask.ignore_eos else self._card.eos_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_said(ask.temperature, self._defaults.temperature),
            top_k=int(_said(ask.top_k, 0)),
            top_p=_said(ask.top_p, self._defaults.top_p),
            min_p=_said(ask.min_p, 0.0),
            repetition_penalty=_said(ask.repetition_penalty, 1.0),
            presence_penalty=_said(ask.presence_penalty, 0.0),
            frequency_penalty=_said(ask.frequency_penalty, 0.0),
            logit_bias=tuple(sorted((token_id, float(bias)) for token_id, bias in ask.logit_bias.items())),
            num_logprobs=-1 if ask.num_logprobs is None else ask.num_logprobs,
            stop_token_ids=tuple(sorted({*ask.stop_token_ids, *eos})),
            min_tokens=ask.min_tokens,
            seed=seed,
        )

    def _check_stops(self, ask: Ask) -> None:
        name = ask.spelt("stop")
        if len(ask.stop) > self._limits.max_stop_strings:
            raise RequestError(name, f"at most {self._limits.max_stop_strings} texts, not {len(ask.stop)}")
        if any(not 0 < len(text) <= MAX_STOP_CHARS for text in ask.stop):
            raise RequestError(name, f"texts must have 1 to {MAX_STOP_CHARS} characters")
        self._check_ids(ask, "stop_token_ids", ask.stop_token_ids, MAX_STOP_TOKEN_IDS)

    def _check_bias(self, ask: Ask) -> None:
        self._check_ids(ask, "logit_bias", tuple(ask.logit_bias), MAX_LOGIT_BIAS)
        if any(not -100 <= bias <= 100 for bias in ask.logit_bias.values()):
            raise RequestError(ask.spelt("logit_bias"), "values must be in [-100, 100]")

    def _check_ids(self, ask: Ask, name: str, ids: Sequence[int], limit: int) -> None:
        if len(ids) > limit:
            raise RequestError(ask.spelt(name), f"at most {limit} token ids, not {len(ids)}")
        if any(not 0 <= token_id < self._card.vocab_size for token_id in ids):
            raise RequestError(ask.spelt(name), f"holds a token id outside [0, {self._card.vocab_size})")


def _check_number(ask: Ask, name: str, low: float, high: float, closed: bool) -> None:
    value: float | None = getattr(ask, name)
    if value is None:
        return
    if not (math.isfinite(value) and value <= high and (value >= low if closed else value > low)):
        raise RequestError(ask.spelt(name), f"must be in {'[' if closed else '('}{low:g}, {high:g}], not {value:g}")


def _check_int(ask: Ask, name: str, low: int, high: int | None) -> None:
    value: int | None = getattr(ask, name)
    if value is not None and (value < low or (high is not None and value > high)):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise RequestError(ask.spelt(name), f"must be {bounds}, not {value}")


def _said(value: float | None, default: float) -> float:
    return default if value is None else value


def _reseeded(sampling: SamplingParams, by: int) -> SamplingParams:
    return msgspec.structs.replace(sampling, seed=(sampling.seed + by) % SEED_SPAN) if by else sampling
