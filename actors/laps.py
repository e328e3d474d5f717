"""How long each of several things took that were done one after another, in words for the log. Knows no more."""

import time


class Laps:
    """Begins when it is made. str() is e.g. `left 0.002 s, group 0.310 s`."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        self._laps: list[str] = []

    def lap(self, name: str) -> None:
        """What was done since the lap before is called `name`."""
        now_s = time.monotonic()
        self._laps.append(f"{name} {now_s - self._last_s:.3f} s")
        self._last_s = now_s

    def __str__(self) -> str:
        return ", ".join(self._laps)
