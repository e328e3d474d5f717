"""The ingress: what both fronts share.

Owns the path from a checked ask to a stream of deltas, and whether the model can be asked at all. Knows nothing of
HTTP, gRPC or Ray: `http_front.py` and `grpc_front.py` dress it, `deployment.py` binds it.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TypeVar

from actors.config import IngressConfig
from actors.errors import CorralError, ModelNotFoundError
from actors.ingress.api_keys import ApiKeys
from actors.ingress.ask import Ask, AskChecker, GenerationSpec
from actors.ingress.generation import Answer, CallText, Delta
from actors.ingress.model_card import ModelCard, read_sampling_defaults
from actors.ingress.router_client import Discover, RouterClient
from actors.ingress.telemetry import Api, CallTimer, Front, NullSink, Sink
from actors.ingress.tokenizer import TextTokenizer
from actors.types import RouterStatus
from actors.wire import ChannelKeys

log = logging.getLogger("corral.ingress")
T = TypeVar("T")

INLINE_CHARS = 4096  # texts up to this length are tokenized on the event loop (about 2 ms)
TOKENIZER_THREADS = 2


class Call:
    """One client call: its id and its measures. `id` is opaque, and the prefix of its requests' ids."""

    def __init__(self, sink: Sink, front: Front, api: Api) -> None:
        self.id = uuid.uuid4().hex
        self.timer = CallTimer(sink, front, api)


class Ingress:
    """Everything behind the fronts. Construct, `start`, use on that event loop, `stop`."""

    def __init__(
        self,
        card: ModelCard,
        tokenizer: TextTokenizer,
        router: RouterClient,
        checker: AskChecker,
        config: IngressConfig,
        sink: Sink,
    ) -> None:
        """Raises ConfigError where the file of API keys cannot be used."""
        self.card = card
        self.tokenizer = tokenizer
        self.config = config
        self._router = router
        self._checker = checker
        self._sink = sink
        self._api_keys = ApiKeys.read(config.api_keys_file)
        self._executor: ThreadPoolExecutor | None = None

    @staticmethod
    def load(
        card: ModelCard,
        discover: Discover,
        config: IngressConfig,
        sink: Sink | None = None,
        keys: ChannelKeys | None = None,
    ) -> "Ingress":
        """Reads the checkpoint's tokenizer and sampling defaults. `keys`: of the pipeline's channels.

        Raises CheckpointError and ConfigError.
        """
        directory = Path(card.model)
        checker = AskChecker(card, read_sampling_defaults(directory), config)
        tokenizer = TextTokenizer.load(directory, card.bos_token_id)
        return Ingress(card, tokenizer, RouterClient(discover, keys=keys), checker, config, sink or NullSink())

    async def start(self) -> None:
        self._executor = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        await self._router.start()

    async def stop(self) -> None:
        await self._router.stop()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def alive(self) -> bool:
        """False where only a restart helps."""
        return self._router.alive

    @property
    def status(self) -> RouterStatus:
        return self._router.status

    @property
    def num_open_requests(self) -> int:
        return self._router.num_open

    @property
    def next_change(self) -> asyncio.Event:
        """Set when `status` next begins or ceases to be serving. Take it before `status`, then wait."""
        return self._router.next_change

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that clients may use for the one model served, the proper one first."""
        return (self.card.name, *self.config.extra_model_names)

    def check_key(self, authorization: str | None) -> None:
        """What a client showed as its API key. Raises UnauthenticatedError where one is needed."""
        self._api_keys.check(authorization)

    def check_model(self, name: str) -> str:
        """Returns the name to answer with; empty is the only model. Raises ModelNotFoundError."""
        if name and name not in self.model_names:
            raise ModelNotFoundError(name)
        return name or self.card.name

    @contextmanager
    def call(self, front: Front, api: Api) -> Iterator[Call]:
        """The scope of one client call: counts and logs how it ended. Errors pass through."""
        call = Call(self._sink, front, api)
        try:
            yield call
        except BaseException as e:
            outcome = call.timer.ended(e)
            expected = isinstance(e, CorralError | asyncio.CancelledError | GeneratorExit)
            log.log(logging.INFO if expected else logging.ERROR, "call %s ended %s: %s", call.id, outcome, e)
            raise
        call.timer.ended(None)
        log.debug("call %s ended ok", call.id)

    async def prompt_spec(self, ask: Ask, prompts: Sequence[str | Sequence[int]]) -> GenerationSpec:
        """Checks an ask for completions of texts (BOS is added) or token ids (taken as they stand).

        Raises RequestError.
        """
        self._checker.check(ask)
        name = ask.spelt("prompt")
        checked = []
        for prompt in prompts:
            ids = await self._encode_prompt(prompt, name) if isinstance(prompt, str) else prompt
            checked.append(self._checker.check_prompt(ids, name))
        return self._checker.spec(ask, checked)

    async def chat_spec(self, ask: Ask, messages: Sequence[dict[str, str]]) -> GenerationSpec:
        """Checks an ask for an answer to a conversation. Raises RequestError."""
        self._checker.check(ask)
        name = ask.spelt("messages")
        num_chars = sum(len(message["content"]) for message in messages)
        self._checker.check_length(self.tokenizer.least_tokens(num_chars), name)
        ids = await self._off_loop(num_chars, lambda: self.tokenizer.encode_chat(messages))
        return self._checker.spec(ask, [self._checker.check_prompt(ids, name)])

    async def stream(self, spec: GenerationSpec, call: Call) -> AsyncGenerator[list[Delta], None]:
        """Generates; yields all deltas that are ready, at least one. Closing it cancels what has not ended.

        Raises CorralError.
        """
        call.timer.prompt_tokens = spec.prompt_tokens
        requests = spec.requests(call.id)
        text = CallText([request.request_id for request in requests], self.tokenizer, spec)
        async with aclosing(self._router.events(requests, self.config.stream_interval_ms / 1000)) as news:
            async for events in news:
                deltas, needless_ids = text.deltas(events)
                for request_id in needless_ids:
                    self._router.cancel(request_id)
                for delta in deltas:
                    call.timer.tokens(delta.answer_idx, len(delta.tokens))
                if deltas:
                    yield deltas
                if text.all_ended:
                    return

    async def complete(self, spec: GenerationSpec, call: Call) -> list[Answer]:
        """Generates to the end; returns all answers by index. Raises CorralError."""
        answers = [Answer() for _ in range(spec.num_answers)]
        async with aclosing(self.stream(spec, call)) as news:
            async for deltas in news:
                for delta in deltas:
                    answers[delta.answer_idx].add(delta)
        return answers

    async def _encode_prompt(self, text: str, name: str) -> list[int]:
        self._checker.check_length(self.tokenizer.least_tokens(len(text)), name)
        return await self._off_loop(len(text), lambda: self.tokenizer.encode_prompt(text))

    async def _off_loop(self, num_chars: int, work: Callable[[], T]) -> T:
        """Runs `work` here if its text is short, else on a thread, so that a long prompt stalls nobody."""
        if num_chars <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)
