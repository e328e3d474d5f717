"""A router without ranks, for tests and for measuring the fronts alone.

Owns the router's side of the channel: a real ZeroMQ socket that answers beats and requests. The tokens are whatever a
function of the request says. Knows nothing of schedules or models.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio

from actors.types import (
    Beat,
    Cancel,
    FinishReason,
    Request,
    RouterStatus,
    SampledToken,
    Submit,
    TokenBatch,
    TokenEvent,
)
from actors.wire import FROM_ROUTER, TO_ROUTER, bind_any, open_socket

Script = Callable[[Request], Sequence[int]]  # request -> the token ids to answer with
LOGPROB = -0.5  # of every scripted token


class ScriptedRouter:
    """Answers every request from `script`, a token per message; without one, the caller emits events itself.

    `submitted` and `cancelled` are what ingresses have sent, in order.
    """

    def __init__(self, script: Script | None = None) -> None:
        self._script = script
        self._socket: Any = None
        self._context: zmq.asyncio.Context | None = None
        self._task: asyncio.Task[None] | None = None
        self._owners: dict[str, bytes] = {}
        self._peers: set[bytes] = set()
        self._news = asyncio.Condition()
        self.status = RouterStatus(serving=True, detail="scripted")
        self.answers_beats = True
        self.submitted: list[Request] = []
        self.num_again = 0  # of them, those that came again
        self.cancelled: list[str] = []

    async def start(self) -> str:
        """Returns the endpoint to connect to."""
        self._context = zmq.asyncio.Context()
        self._socket = open_socket(self._context, zmq.ROUTER)
        endpoint = bind_any(self._socket, "127.0.0.1")
        self._task = asyncio.create_task(self._run())
        return endpoint

    async def stop(self) -> None:
        if self._task is not None and self._context is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._socket.close(0)
            self._context.term()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` holds; it is looked at after every message from an ingress."""
        async with self._news:
            await self._news.wait_for(condition)

    async def set_status(self, status: RouterStatus) -> None:
        """Changes the status and tells all ingresses."""
        self.status = status
        for peer in self._peers:
            await self._socket.send_multipart([peer, FROM_ROUTER.encode(status)])

    async def emit(self, *events: TokenEvent) -> None:
        """Sends events, in one message, to the ingress that submitted the first one's request."""
        owner = self._owners[events[0].request_id]
        await self._socket.send_multipart([owner, FROM_ROUTER.encode(TokenBatch(events=events))])

    async def _run(self) -> None:
        while True:
            owner, data = await self._socket.recv_multipart()
            self._peers.add(owner)
            match TO_ROUTER.decode(data):
                case Beat():
                    if self.answers_beats:
                        await self._socket.send_multipart([owner, FROM_ROUTER.encode(self.status)])
                case Submit(request=request, again=again):
                    self._owners[request.request_id] = owner
                    self.submitted.append(request)
                    self.num_again += again
                    if self._script is not None:
                        await self._answer(request, self._script(request))
                case Cancel(request_id=request_id):
                    self.cancelled.append(request_id)
            async with self._news:
                self._news.notify_all()

    async def _answer(self, request: Request, token_ids: Sequence[int]) -> None:
        stops = set(request.sampling.stop_token_ids)
        for i, token_id in enumerate(token_ids[: request.sampling.max_tokens]):
            reason: FinishReason | None = None
            if token_id in stops:
                reason = "stop"
            elif i + 1 == request.sampling.max_tokens or i + 1 == len(token_ids):
                reason = "length"
            await self.emit(token_event(request, i, [token_id], reason))
            if reason is not None:
                return


def token_event(
    request: Request, token_index: int, token_ids: Sequence[int], finish_reason: FinishReason | None = None
) -> TokenEvent:
    """An event with these tokens; with log-probabilities if the request asked for them."""
    num_top = request.sampling.num_logprobs
    tokens = tuple(
        SampledToken(
            request_idx=0,
            token_id=token_id,
            logprob=LOGPROB if num_top >= 0 else None,
            top_logprobs=tuple((token_id + i, LOGPROB - i) for i in range(num_top)),
        )
        for token_id in token_ids
    )
    return TokenEvent(
        request_id=request.request_id, token_index=token_index, tokens=tokens, finish_reason=finish_reason
    )
