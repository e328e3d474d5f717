"""Reads a request's body, as far as the limit.

Owns the limit and how a client with too large a body still gets to read the answer. Knows nothing of JSON.
"""

from starlette.requests import ClientDisconnect, Request

from actors.errors import BodyTooLargeError, RequestCancelledError

# A client that is still sending when its connection closes never sees the answer. So an overlong body is read on and
# thrown away, up to this many bytes; beyond, the connection closes.
DISCARD_BYTES = 64 * 1024 * 1024


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The body. Never holds more than `limit_bytes` of it. Raises BodyTooLargeError, RequestCancelledError."""
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() else 0
    too_large = BodyTooLargeError("body", f"is larger than {limit_bytes} bytes")
    if size > DISCARD_BYTES or (size > limit_bytes and "expect" in request.headers):  # 100-continue: it waits for us
        raise too_large
    kept, num_bytes = bytearray(), 0
    try:
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > DISCARD_BYTES:
                raise too_large
            if num_bytes <= limit_bytes:
                kept += piece
    except ClientDisconnect:
        raise RequestCancelledError("the client went away") from None
    if num_bytes > limit_bytes:
        raise too_large
    return bytes(kept)
