"""Ranks as detached Ray actors: how they are found, started, watched and ended.

Owns names, resources and death watches. Knows nothing of epochs or requests. Each rank asks Ray for its resources on
its own, so a cluster that has none free is a reason for Ray's autoscaler to bring a node.
"""

import asyncio
import logging
import queue
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.util import list_named_actors

from actors.attention.actor import AttentionActor
from actors.config import PipelineConfig
from actors.errors import UnavailableError
from actors.expert.actor import ExpertActor
from actors.router.fleet import FleetNews, RankDown, RankUp
from actors.types import Role
from cluster.hardware import Machines, machines_of_nodes
from cluster.rank_environment import RANK_ENVIRONMENT

log = logging.getLogger("corral.placement")

NAMESPACE = "corral"
SNAPSHOT_TIMEOUT_S = 10.0
CPU_PER_RANK = 0.1  # bookkeeping: threads are set by threads_per_rank


def cluster_machines(device: str) -> Machines:
    """The accelerators of the Ray cluster that this process is part of. Raises LayoutError."""
    return machines_of_nodes([node["Resources"] for node in ray.nodes() if node["Alive"]], device)


def read_snapshot(address: str, application: str) -> dict[str, Any]:
    """The state of a pipeline, from its router. `address` is Ray's (see `ray.init`).

    Raises UnavailableError where no such Ray or application answers.
    """

    async def ask() -> dict[str, Any]:  # in a loop: Serve may be told to use its caller's (see node_env.sh)
        handle = serve.get_deployment_handle("Router", app_name=application)
        snapshot: dict[str, Any] = await asyncio.wait_for(handle.snapshot.remote(), SNAPSHOT_TIMEOUT_S)
        return snapshot

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        return asyncio.run(ask())
    except (ConnectionError, RayError, RayServeException, TimeoutError, ValueError) as e:
        raise UnavailableError(f"{application} at {address}: {e}") from e
    finally:
        ray.shutdown()


class RayFleet:
    """Implements `actors.router.fleet.Fleet` with named detached actors, so that a router that restarts finds them.

    `secret` is what ranks need to know to be spoken to (see `actors/wire.py`).
    """

    def __init__(self, pipeline: PipelineConfig, secret: bytes) -> None:
        self._pipeline = pipeline
        self._secret = secret
        self._on_gpu = pipeline.device == "cuda"
        self._prefix = f"{pipeline.application}-rank-"
        self._actors: dict[int, Any] = {}
        self._news: queue.SimpleQueue[tuple[Any, FleetNews]] = queue.SimpleQueue()
        self._killer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kill")  # Ray may take its time to kill

    def find(self) -> tuple[int, ...]:
        for entry in list_named_actors(all_namespaces=True):
            name = entry["name"]
            if entry["namespace"] == NAMESPACE and name.startswith(self._prefix):
                try:
                    self._adopt(int(name.removeprefix(self._prefix)), ray.get_actor(name, namespace=NAMESPACE))
                except ValueError:
                    log.info("%s went as it was found", name)
        return tuple(sorted(self._actors))

    def start(self, rank: int, roles: Sequence[Role]) -> None:
        pipeline = self._pipeline
        kind: Any = AttentionActor if "attention" in roles else ExpertActor
        try:
            actor = kind.options(
                name=f"{self._prefix}{rank}",
                namespace=NAMESPACE,
                lifetime="detached",
                runtime_env={"env_vars": RANK_ENVIRONMENT},
                num_cpus=CPU_PER_RANK,
                num_gpus=1 if self._on_gpu else 0,
                resources=self._resources(roles) or None,
            ).remote(
                rank,
                "cuda:0" if self._on_gpu else "cpu",  # Ray shows a rank no other GPU than its own
                pipeline.threads_per_rank,
                pipeline.lease_s,
                self._secret,
            )
        except ValueError as e:  # the name is taken
            self._news.put((None, RankDown(rank=rank, cause=str(e))))
            return
        self._adopt(rank, actor)

    def has_room(self, roles: Sequence[Role]) -> bool:
        asked = {"CPU": CPU_PER_RANK, "GPU": 1.0 if self._on_gpu else 0.0} | self._resources(roles)
        free = ray.available_resources()  # of all nodes together: a rank that fits on none is given up in time
        return all(free.get(name, 0.0) >= amount for name, amount in asked.items())

    def _resources(self, roles: Sequence[Role]) -> dict[str, float]:
        """What a rank asks for beside CPU and GPU."""
        return self._pipeline.attention_resources if "attention" in roles else self._pipeline.expert_resources

    def kill(self, rank: int) -> None:
        actor = self._actors.pop(rank, None)
        if actor is not None:
            self._killer.submit(ray.kill, actor)

    def news(self) -> list[FleetNews]:
        told: list[FleetNews] = []
        while not self._news.empty():
            actor, news = self._news.get()
            if self._actors.get(news.rank) is not actor:
                continue  # it was killed, and its end told, before
            if isinstance(news, RankDown):
                self._actors.pop(news.rank, None)
            told.append(news)
        return told

    def _adopt(self, rank: int, actor: Any) -> None:
        """Has Ray tell us when the actor listens, and when it ends, so that nobody polls."""
        self._actors[rank] = actor

        def listens(answer: Future[Any]) -> None:
            if answer.exception() is None:
                self._news.put((actor, RankUp(rank=rank, endpoints=answer.result())))

        actor.endpoints.remote().future().add_done_callback(listens)
        ends = actor.watch.remote().future()
        ends.add_done_callback(lambda _: self._news.put((actor, RankDown(rank=rank, cause="its actor died"))))
