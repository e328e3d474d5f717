"""The Ray binding of a rank, shared by `attention/actor.py` and `expert/actor.py`.

Owns the actor's life: it starts the rank's loop, and ends the process when the loop ends. Knows nothing of tokens.
"""

import logging
import os
import threading

import ray
import torch
from ray.util.placement_group import get_placement_group, remove_placement_group

from actors.rank import Rank
from actors.rank_loop import RankLoop

log = logging.getLogger("corral.rank")


class RankActor:
    """A detached actor that outlives the router. Its endpoint is where the router's commands go."""

    def __init__(self, rank: int, device: str, threads: int, lease_s: float, group: str) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        if threads:
            torch.set_num_threads(threads)
        host = ray.util.get_node_ip_address()
        self._group = group
        self._loop = RankLoop(Rank(rank, torch.device(device), host), host, lease_s)
        self._endpoint = self._loop.start()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="rank", daemon=True).start()

    def endpoint(self) -> str:
        return self._endpoint

    def watch(self) -> None:
        """Never returns while the rank lives: whoever awaits it learns of its death at once."""
        self._ended.wait()

    def _run(self) -> None:
        try:
            self._loop.run()
        except BaseException:
            log.exception("the rank's loop failed")
            os._exit(1)  # a rank without its loop is no rank; the router starts another
        self._release_resources()

    def _release_resources(self) -> None:
        """The lease is over, so the application is gone: give back what was reserved for it, and go."""
        try:
            remove_placement_group(get_placement_group(self._group))
        except ValueError:
            log.info("placement group %s is gone already", self._group)
        os._exit(0)
