"""The ingress's channel to the router.

Owns the socket, its beats, and knowing whether the router lives. Where the connection is lost or the router is silent,
the router is looked for again, and open requests are submitted anew with the tokens that came; they end with
UnavailableError only if no router serves within the patience. Knows nothing of text or clients.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from msgspec import structs
from zmq.utils.monitor import recv_monitor_message

from actors.errors import CorralError, DeadlineError, UnavailableError
from actors.ingress.mailbox import Mailbox
from actors.types import Beat, Cancel, Request, RouterStatus, Submit, TokenBatch, TokenEvent, ToRouter
from actors.wire import FROM_ROUTER, TO_ROUTER, ChannelKeys, open_socket

log = logging.getLogger("corral.ingress")

BEAT_S = 1.0
MAX_SILENT_BEATS = 5  # a router that has not answered so many is lost; counted, as our own stalls are not its
RETRY_MIN_S, RETRY_MAX_S = 0.1, 2.0  # between attempts to find the router
DISCOVER_TIMEOUT_S = 10.0
PATIENCE_S = 60.0  # open requests wait so long for a router that serves
DEADLINE_GRACE_S = 1.0  # the router ends requests at their deadline; the ingress does if the router does not

Discover = Callable[[], Awaitable[str]]


@dataclass(slots=True)
class _Open:
    """A request that has not ended: what was asked, where its news goes, and the tokens that came."""

    request: Request
    mailbox: Mailbox
    was_sent: bool = False
    token_ids: list[int] = field(default_factory=list)

    def submission(self) -> Submit:
        if not self.was_sent:
            return Submit(request=self.request)
        output_ids = self.request.output_ids + tuple(self.token_ids)
        return Submit(request=structs.replace(self.request, output_ids=output_ids), again=True)


class RouterClient:
    """Submits requests and hands out their news. All methods run on the event loop that `start` ran on.

    `discover` returns the router's endpoint (tcp://host:port). Where it raises a CorralError or OSError, or takes more
    than DISCOVER_TIMEOUT_S, it is asked again.
    """

    def __init__(
        self, discover: Discover, *, beat_s: float = BEAT_S, max_silent_beats: int = MAX_SILENT_BEATS,
        grace_s: float = DEADLINE_GRACE_S, patience_s: float = PATIENCE_S, keys: ChannelKeys | None = None,
    ) -> None:  # fmt: skip
        self._discover = discover
        self._beat_s = beat_s
        self._max_silent_beats = max_silent_beats
        self._grace_s = grace_s
        self._patience_s = patience_s
        self._keys = keys
        self._context: zmq.asyncio.Context | None = None
        self._socket: Any = None  # zmq.asyncio.Socket while the router is connected
        self._task: asyncio.Task[None] | None = None
        self._open: dict[str, _Open] = {}
        self._takes_requests = False  # the router that is connected has served
        self._may_return = False  # there was one that did, and it was not long ago
        self._model = ""  # of the router that served last
        self._silent_beats = 0  # sent since the router's last message
        self._status: RouterStatus | None = None
        self._problem = "looking for the router"
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Starts looking for the router; returns at once."""
        self._context = zmq.asyncio.Context()
        self._task = asyncio.create_task(self._run(self._context))

    async def stop(self) -> None:
        """Ends open calls with UnavailableError and closes the channel."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail_all(UnavailableError("this ingress is stopping"))
        if self._context is not None:
            self._context.term()

    @property
    def status(self) -> RouterStatus:
        """The router's latest word, or a status that says why there is none."""
        return self._status or RouterStatus(serving=False, detail=self._problem)

    @property
    def alive(self) -> bool:
        """False once the channel's own task has ended, which only `stop` and a bug do."""
        return self._task is not None and not self._task.done()

    @property
    def num_open(self) -> int:
        """Requests whose last event has not come and whose reader has not gone."""
        return len(self._open)

    @property
    def next_change(self) -> asyncio.Event:
        """Set when `status` next begins or ceases to be serving. Take it before `status`, then wait."""
        return self._changed

    async def events(
        self, requests: Sequence[Request], interval_s: float = 0.0
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Submits one call's requests and yields their news, all that is ready at a time, until each has ended.

        `interval_s` is the least time between two yields; what comes meanwhile is merged. Closing the generator
        cancels what has not ended. Raises UnavailableError where there is no router, or it was lost and none came in
        its place in time, and DeadlineError where it lets a deadline pass.
        """
        mailbox = Mailbox(tuple(request.request_id for request in requests))
        try:
            for request in requests:
                self._open[request.request_id] = _Open(request, mailbox)
                self._submit(self._open[request.request_id])
            while not mailbox.ended:
                yield await self._take(mailbox, requests[0].deadline_s)
                if interval_s and mailbox.open_ids:
                    await asyncio.sleep(interval_s)
        finally:
            for request_id in mailbox.open_ids:
                self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """Forgets an open request and has the router end it; nothing where it has ended."""
        if self._open.pop(request_id, None) is not None:
            with contextlib.suppress(UnavailableError):  # then its lease ends it
                self._send(Cancel(request_id=request_id))

    def _submit(self, item: _Open) -> None:
        """Sends a request, or leaves it for the router that is expected. Raises UnavailableError where none is."""
        if self._takes_requests:
            self._send(item.submission())
            item.was_sent = True
        elif not self._may_return:
            raise UnavailableError(f"not serving: {self.status.detail}")

    async def _take(self, mailbox: Mailbox, deadline_s: float | None) -> list[TokenEvent]:
        if deadline_s is None:
            return await mailbox.take()
        try:
            async with asyncio.timeout(max(0.0, deadline_s + self._grace_s - time.time())):
                return await mailbox.take()
        except TimeoutError:
            raise DeadlineError("the request's deadline has passed") from None

    def _send(self, message: ToRouter) -> None:
        """Raises UnavailableError where no router is connected. Never blocks."""
        if self._socket is None:
            raise UnavailableError(f"the router is not reachable: {self._problem}")
        try:
            self._socket.send(TO_ROUTER.encode(message), zmq.NOBLOCK).result()  # with NOBLOCK the future is done
        except zmq.Again:
            raise UnavailableError("the router takes no more messages") from None

    async def _run(self, context: zmq.asyncio.Context) -> None:
        """Finds the router, serves the connection until it is lost, and again."""
        delay_s = RETRY_MIN_S
        patience: asyncio.TimerHandle | None = None
        while True:
            endpoint = await self._find()
            if endpoint is not None:
                problem = await self._serve(context, endpoint)
                if self._takes_requests:  # it did serve, so another one will
                    delay_s = RETRY_MIN_S
                    if patience is not None:
                        patience.cancel()
                    patience = asyncio.get_running_loop().call_later(self._patience_s, self._give_up)
                log.warning("lost the router at %s: %s", endpoint, problem)
                self._lose(problem)
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RETRY_MAX_S)

    async def _find(self) -> str | None:
        try:
            async with asyncio.timeout(DISCOVER_TIMEOUT_S):
                return await self._discover()
        except (CorralError, OSError) as e:  # OSError: TimeoutError too
            self._problem = "the router cannot be found"
            log.info("no router: %s: %s", type(e).__name__, e)
            return None

    async def _serve(self, context: zmq.asyncio.Context, endpoint: str) -> str:
        """Uses one connection until it is lost. Returns why."""
        socket = open_socket(context, zmq.DEALER, self._keys)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        socket.connect(endpoint)
        tasks = [asyncio.create_task(part) for part in (
            self._receive(socket), self._watch(monitor, socket), self._beat(),
        )]  # fmt: skip
        try:
            self._silent_beats = 0
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            self._socket = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            socket.disable_monitor()
            monitor.close(0)
            socket.close(0)

    async def _receive(self, socket: Any) -> str:
        while True:
            try:
                message = FROM_ROUTER.decode(await socket.recv())
            except msgspec.DecodeError as e:
                return f"it speaks another version: {e}"
            self._silent_beats = 0
            if isinstance(message, TokenBatch):
                self._deliver(message)
            else:
                self._set_status(message)

    async def _watch(self, monitor: Any, socket: Any) -> str:
        """Follows the connection itself: opens the channel once it stands, returns when it is gone."""
        while True:
            event = (await recv_monitor_message(monitor))["event"]
            if event != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return "the connection was lost"
            self._socket = socket
            self._send(Beat())

    async def _beat(self) -> str:
        while self._silent_beats <= self._max_silent_beats:
            await asyncio.sleep(self._beat_s)
            self._silent_beats += 1
            if self._socket is not None:
                with contextlib.suppress(UnavailableError):  # a full queue shows as silence soon enough
                    self._send(Beat())
        return f"{self._max_silent_beats} beats without an answer"

    def _deliver(self, batch: TokenBatch) -> None:
        for event in batch.events:
            item = self._open.get(event.request_id)
            if item is None:  # its reader has gone
                continue
            item.mailbox.put(event)
            item.token_ids += [token.token_id for token in event.tokens]
            if event.request_id not in item.mailbox.open_ids:
                del self._open[event.request_id]

    def _set_status(self, status: RouterStatus) -> None:
        was_serving = self.status.serving
        self._status = status
        if status.serving:
            if self._model not in ("", status.model):
                self._fail_all(UnavailableError("another model is served now: it cannot go on where this one was"))
            self._model = status.model
        if status.serving and not self._takes_requests:
            self._takes_requests = self._may_return = True
            for item in list(self._open.values()):
                with contextlib.suppress(UnavailableError):  # a full queue is a router that does not read: it is lost
                    self._submit(item)
        if status.serving != was_serving:
            log.info("the router is %s: %s", "serving" if status.serving else "not serving", status.detail)
            self._announce()

    def _lose(self, problem: str) -> None:
        self._status, self._problem, self._takes_requests = None, problem, False
        self._announce()

    def _give_up(self) -> None:
        """No router came back in time. Nothing to do where one serves by now."""
        if not self._takes_requests:
            self._may_return = False
            self._fail_all(UnavailableError(f"the router was lost: {self._problem}"))

    def _fail_all(self, error: CorralError) -> None:
        items, self._open = self._open, {}
        for mailbox in {item.mailbox for item in items.values()}:
            mailbox.fail(error)

    def _announce(self) -> None:
        """Wakes those that wait for `next_change`."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
