"""The Ray binding of a rank, shared by `attention/actor.py` and `expert/actor.py`.

Owns the actor's life: it starts the rank's loop, and ends the process when the loop ends. Knows nothing of tokens.
"""

import logging
import os
import threading

import ray
import torch

from actors.rank import Rank
from actors.rank_loop import RankLoop
from actors.types import RankEndpoints
from actors.wire import ChannelKeys

log = logging.getLogger("corral.rank")


class RankActor:
    """A detached actor that outlives the router. Its endpoints are where the router's commands go."""

    def __init__(self, rank: int, device: str, threads: int, lease_s: float, secret: bytes) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        if threads:
            torch.set_num_threads(threads)
        keys = ChannelKeys.from_secret(secret)
        self._loop = RankLoop(Rank(rank, torch.device(device), ray.util.get_node_ip_address(), keys), lease_s)
        self._endpoints = self._loop.start()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="rank", daemon=True).start()

    def endpoints(self) -> RankEndpoints:
        return self._endpoints

    def watch(self) -> None:
        """Never returns while the rank lives: whoever awaits it learns of its death at once."""
        self._ended.wait()

    def _run(self) -> None:
        """A rank without its loop is no rank: the process ends with it."""
        try:
            self._loop.run()
        except BaseException:
            log.exception("the rank's loop failed")
            os._exit(1)
        os._exit(0)
