"""Where the news of one call waits for its reader.

Owns merging: all that has come for a request is one event, so a slow reader holds at most its own tokens and stalls
nobody. Knows nothing of sockets.
"""

import asyncio

from msgspec import structs

from actors.errors import CorralError, UnavailableError
from actors.ingress.status import error_from_wire
from actors.types import TokenEvent


class Mailbox:
    """The waiting news of the requests of one call (one per answer). For one reader, on one event loop."""

    def __init__(self, request_ids: tuple[str, ...]) -> None:
        self.open_ids = set(request_ids)  # requests whose last event has not come
        self._expected_idx = dict.fromkeys(request_ids, 0)
        self._waiting: dict[str, TokenEvent] = {}
        self._failure: CorralError | None = None
        self._wake = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        """Adds one event of an open request. Its error, or a gap in its tokens (text must not skip), fails the call."""
        expected_idx = self._expected_idx[event.request_id]
        if event.tokens and event.token_index != expected_idx:
            self.fail(UnavailableError(f"token {event.token_index} came where {expected_idx} was due"))
            return
        self._expected_idx[event.request_id] = expected_idx + len(event.tokens)
        if event.finish_reason is not None or event.error is not None:
            self.open_ids.discard(event.request_id)
        if event.error is not None:
            self.fail(error_from_wire(event.error))
        if event.tokens or event.finish_reason is not None:
            before = self._waiting.get(event.request_id)
            self._waiting[event.request_id] = _merged(before, event) if before else event
        self._wake.set()

    @property
    def ended(self) -> bool:
        """Whether `take` has given out everything that will ever come."""
        return not (self.open_ids or self._waiting or self._failure)

    def fail(self, error: CorralError) -> None:
        """Ends the call: `take` raises `error` once what came before it is taken."""
        self._failure = self._failure or error
        self._wake.set()

    async def take(self) -> list[TokenEvent]:
        """Waits until there is news, then returns all of it, one event per request. Raises what `fail` was given."""
        while not self._waiting:
            if self._failure is not None:
                raise self._failure
            self._wake.clear()
            await self._wake.wait()
        events = list(self._waiting.values())
        self._waiting = {}
        return events


def _merged(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    return structs.replace(
        first,
        tokens=first.tokens + second.tokens,
        finish_reason=second.finish_reason,
    )
