"""The Serve binding of the ingress: one class that is both the HTTP and the gRPC entrance of the application.

Owns its place in Serve: finding the router through its deployment handle, publishing metrics, health. The work is
`worker.py`'s.
"""

from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Histogram
from starlette.types import ASGIApp

from actors.config import IngressConfig
from actors.errors import UnavailableError
from actors.ingress.grpc_front import GrpcFront
from actors.ingress.http_front import build_app
from actors.ingress.model_card import ModelCard
from actors.ingress.telemetry import (
    CALL_BUCKETS_S,
    FIRST_TOKEN_BUCKETS_S,
    TOKEN_GAP_BUCKETS_S,
    Api,
    Front,
)
from actors.ingress.worker import Ingress
from actors.wire import ChannelKeys


class ServeSink:
    """Puts the ingress's measures on Ray's metrics endpoint, as ray_corral_*."""

    def __init__(self) -> None:
        self._first_token = Histogram(
            "corral_time_to_first_token_seconds",
            "From receipt of a call to its first token",
            list(FIRST_TOKEN_BUCKETS_S),
        )
        self._token_gap = Histogram(
            "corral_inter_token_latency_seconds", "Between messages of an answer, per token", list(TOKEN_GAP_BUCKETS_S)
        )
        self._call_seconds = Histogram(
            "corral_e2e_request_latency_seconds", "From receipt of a call to its end", list(CALL_BUCKETS_S)
        )
        self._calls = Counter("corral_requests", "Calls that ended", ("front", "api", "outcome"))
        self._prompt_tokens = Counter("corral_prompt_tokens", "Tokens of prompts")
        self._generated_tokens = Counter("corral_generation_tokens", "Tokens sent to clients")

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def token_gap(self, seconds: float) -> None:
        self._token_gap.observe(seconds)

    def call_ended(self, front: Front, api: Api, outcome: str, seconds: float, prompt: int, generated: int) -> None:
        self._calls.inc(tags={"front": front, "api": api, "outcome": outcome})
        self._call_seconds.observe(seconds)
        if prompt:
            self._prompt_tokens.inc(prompt)
        if generated:
            self._generated_tokens.inc(generated)


# Serve's own limit is out of the way: the router bounds the queue, and knows what to say to whom it refuses.
@serve.deployment(
    name="Ingress",
    max_ongoing_requests=100_000,
    health_check_period_s=2.0,
    graceful_shutdown_timeout_s=120.0,  # a pipeline deployed anew gets new ingresses; old ones end their streams
    ray_actor_options={"num_cpus": 0.1},
)
@serve.ingress()
class IngressDeployment:
    """HTTP through the ASGI application; gRPC through the methods, which Serve finds by the RPC's name."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, so that sockets open on the right event loop
        self, router: DeploymentHandle, config: dict[str, Any] | None = None
    ) -> None:
        self._router = router
        card = ModelCard.parse(await router.describe.remote())
        keys = ChannelKeys.from_secret(await router.channel_secret.remote())
        self._ingress = Ingress.load(card, self._discover, IngressConfig.parse(config or {}), ServeSink(), keys)
        self._grpc = GrpcFront(self._ingress)

    def __serve_build_asgi_app__(self) -> ASGIApp:  # noqa: N807, RUF100 (Serve's name)
        return build_app(self._ingress)

    async def check_health(self) -> None:
        """Serve restarts the replica when this raises. A router that does not serve is no reason to."""
        if not self._ingress.alive:
            raise UnavailableError("the channel to the router has ended")

    async def Generate(self, request: Any, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802 (the RPC's name)
        return await self._grpc.generate(request, grpc_context, "completions")

    async def GenerateStream(  # noqa: N802
        self, request: Any, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[Any, None]:
        async for chunk in self._grpc.stream(request, grpc_context, "completions"):
            yield chunk

    async def Chat(self, request: Any, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802
        return await self._grpc.generate(request, grpc_context, "chat")

    async def ChatStream(  # noqa: N802
        self, request: Any, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[Any, None]:
        async for chunk in self._grpc.stream(request, grpc_context, "chat"):
            yield chunk

    async def GetModel(self, request: Any, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802
        return await self._grpc.get_model(request, grpc_context)

    async def ListModels(self, request: Any, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802
        return await self._grpc.list_models(request, grpc_context)

    async def Check(self, request: Any, grpc_context: RayServegRPCContext) -> Any:  # noqa: N802
        return await self._grpc.check_health(request, grpc_context)

    async def Watch(self, request: Any) -> AsyncGenerator[Any, None]:  # noqa: N802
        async for status in self._grpc.watch_health(request):
            yield status

    async def List(self, request: Any) -> Any:  # noqa: N802
        return await self._grpc.list_health()

    async def _discover(self) -> str:
        """The router's endpoint. Raises UnavailableError, whatever Ray raised."""
        try:
            endpoint: str = await self._router.endpoint.remote()
        except Exception as e:  # Ray's and Serve's errors share no base
            raise UnavailableError(f"the router deployment does not answer: {e}") from e
        return endpoint
