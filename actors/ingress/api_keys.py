"""The keys by which clients are known.

Owns reading their file and comparing. Which calls need one is for the fronts to say.
"""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from actors.errors import ConfigError, UnauthenticatedError

SCHEME = "bearer"


class ApiKeys:
    """A set of keys, one of which a client must show. An empty set lets everybody in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = tuple(_digest(key) for key in keys)  # of equal length, and no use to who sees them

    @staticmethod
    def read(path: str) -> "ApiKeys":
        """One key per line; empty lines and those that begin with # are none. No path, no keys. Raises ConfigError."""
        if not path:
            return ApiKeys()
        try:
            lines = [line.strip() for line in Path(path).read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError("api_keys_file", f"{path} cannot be read: {e}") from e
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError("api_keys_file", f"{path} has no key in it, so nobody would be let in")
        return ApiKeys(keys)

    def check(self, authorization: str | None) -> None:
        """`authorization` is the header or metadata of that name. Raises UnauthenticatedError."""
        if not self._digests:
            return
        scheme, _, key = (authorization or "").partition(" ")
        shown = _digest(key.strip())
        # All are compared, whichever fits, so that time tells nothing.
        if not sum(hmac.compare_digest(shown, digest) for digest in self._digests) or scheme.lower() != SCHEME:
            raise UnauthenticatedError("an API key is needed: authorization: Bearer KEY")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
