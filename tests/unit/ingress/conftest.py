"""One ingress over HTTP on a real port, in front of a scripted router on a real socket. All on the test's own loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from actors.checkpoint.tokenizer_files import write_tokenizer
from actors.config import IngressConfig
from actors.ingress.ask import AskChecker
from actors.ingress.http_front import build_app
from actors.ingress.model_card import ModelCard, SamplingDefaults
from actors.ingress.router_client import RouterClient
from actors.ingress.telemetry import Api, Front
from actors.ingress.testing import Script, ScriptedRouter
from actors.ingress.tokenizer import TextTokenizer
from actors.ingress.worker import Ingress

VOCAB = 2048
MAX_MODEL_LEN = 512


class RecordingSink:
    def __init__(self) -> None:
        self.first_tokens: list[float] = []
        self.gaps: list[float] = []
        self.calls: list[tuple[str, str, str, int, int]] = []

    def first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def token_gap(self, seconds: float) -> None:
        self.gaps.append(seconds)

    def call_ended(self, front: Front, api: Api, outcome: str, seconds: float, prompt: int, generated: int) -> None:
        self.calls.append((front, api, outcome, prompt, generated))


@dataclass
class Service:
    ingress: Ingress
    router: ScriptedRouter
    sink: RecordingSink
    tokenizer: TextTokenizer
    http: httpx.AsyncClient
    url: str


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(directory, VOCAB - 200, VOCAB, MAX_MODEL_LEN)
    return directory


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> TextTokenizer:
    plain = TextTokenizer.load(checkpoint, 0)
    return TextTokenizer.load(checkpoint, plain.control_ids["<|begin_of_text|>"])


@pytest.fixture(scope="session")
def card(checkpoint: Path, tokenizer: TextTokenizer) -> ModelCard:
    return ModelCard(
        name="tiny", model=str(checkpoint), max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB,
        bos_token_id=tokenizer.bos_token_id, eos_token_ids=(tokenizer.control_ids["<|eot|>"],), created_s=1_700_000_000,
    )  # fmt: skip


Saying = Callable[..., Script]


@pytest.fixture(scope="session")
def saying(tokenizer: TextTokenizer) -> Saying:
    """A script that says `text`, then ends its turn."""

    def script(text: str) -> Script:
        ids = [*tokenizer.encode_prompt(text)[1:], tokenizer.control_ids["<|eot|>"]]
        return lambda request: ids

    return script


Serve = Callable[..., "AsyncIterator[Service]"]


@pytest.fixture
def serve(card: ModelCard, tokenizer: TextTokenizer) -> Serve:
    """serve(script, **limits): an async context manager that yields a Service whose router is connected."""

    @asynccontextmanager
    async def service(script: Script | None = None, connect: bool = True, **limits: object) -> AsyncIterator[Service]:
        router, sink = ScriptedRouter(script), RecordingSink()
        endpoints = [await router.start()]

        async def discover() -> str:
            return endpoints[0]

        config = IngressConfig.parse(dict(limits))
        client = RouterClient(discover, beat_s=0.05, grace_s=0.05, patience_s=0.2)
        checker = AskChecker(card, SamplingDefaults(), config)
        ingress = Ingress(card, tokenizer, client, checker, config, sink)
        server = uvicorn.Server(uvicorn.Config(build_app(ingress), port=0, log_level="error", lifespan="on"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        try:
            if connect:
                await until(lambda: ingress.status.serving)
            async with httpx.AsyncClient(base_url=url, timeout=10) as http:
                yield Service(ingress, router, sink, tokenizer, http, url)
            assert ingress.num_open_requests == 0
        finally:
            server.should_exit = True
            await serving
            await router.stop()

    return service


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Lets the loop run until `condition` holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def ids_of(tokenizer: TextTokenizer, *spellings: str) -> Sequence[int]:
    return [tokenizer.control_ids[spelling] for spelling in spellings]
