"""Ranks as detached Ray actors in a placement group: how they are found, started and watched.

Owns names, resources and death watches. Knows nothing of epochs or requests.
"""

import logging
import queue
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.attention.actor import AttentionActor
from actors.config import PipelineConfig
from actors.errors import UnavailableError
from actors.expert.actor import ExpertActor
from actors.types import RankSpec
from cluster.hardware import Machines, machines_of_nodes
from cluster.rank_environment import RANK_ENVIRONMENT

log = logging.getLogger("corral.placement")

NAMESPACE = "corral"
PLACE_TIMEOUT_S = 300.0
START_TIMEOUT_S = 120.0
CPU_PER_RANK = 0.1  # bookkeeping: threads are set by threads_per_rank


def cluster_machines(device: str) -> Machines:
    """The accelerators of the Ray cluster that this process is part of. Raises LayoutError."""
    return machines_of_nodes([node["Resources"] for node in ray.nodes() if node["Alive"]], device)


class RayFleet:
    """Implements `actors.router.fleet.Fleet` with named detached actors, so that a router that restarts finds them."""

    def __init__(self, pipeline: PipelineConfig) -> None:
        self._pipeline = pipeline
        self._device = pipeline.device
        self._actors: dict[int, Any] = {}
        self._gone: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def ensure(self, specs: Sequence[RankSpec]) -> dict[int, str]:
        group_name = f"{self._pipeline.application}-{self._device}-{len(specs)}"
        group = self._reserve(group_name, len(specs))
        fresh = [spec for spec in specs if spec.rank not in self._actors]
        for spec in fresh:
            self._actors[spec.rank] = self._find_or_start(spec, group, group_name)
        endpoints = {spec.rank: self._endpoint_of(spec.rank) for spec in specs}
        for spec in fresh:
            self._watch(spec.rank, self._actors[spec.rank])
        return endpoints

    def lost(self) -> list[tuple[int, str]]:
        gone = []
        while not self._gone.empty():
            rank, actor = self._gone.get()
            if self._actors.get(rank) is actor:  # not the news of one that was replaced since
                del self._actors[rank]
                gone.append((rank, "its actor died"))
        return gone

    def _watch(self, rank: int, actor: Any) -> None:
        """Has Ray tell us of the actor's end, so that nobody polls."""
        actor.watch.remote().future().add_done_callback(lambda _: self._gone.put((rank, actor)))

    def _bundle(self) -> dict[str, float]:
        return {"CPU": CPU_PER_RANK, "GPU": 1.0} if self._device == "cuda" else {"CPU": CPU_PER_RANK}

    def _reserve(self, name: str, num_ranks: int) -> PlacementGroup:
        try:
            group = get_placement_group(name)
        except ValueError:
            group = placement_group(
                [self._bundle() for _ in range(num_ranks)], strategy="PACK", name=name, lifetime="detached"
            )
        if not group.wait(PLACE_TIMEOUT_S):
            raise UnavailableError(f"the cluster has no room for {num_ranks} ranks of {self._bundle()}")
        return group

    def _find_or_start(self, spec: RankSpec, group: PlacementGroup, group_name: str) -> Any:
        kind: Any = AttentionActor if "attention" in spec.roles else ExpertActor
        return kind.options(
            name=f"{self._pipeline.application}-rank-{spec.rank}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            runtime_env={"env_vars": RANK_ENVIRONMENT},
            num_cpus=CPU_PER_RANK,
            num_gpus=1 if self._device == "cuda" else 0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=spec.rank
            ),
        ).remote(
            spec.rank,
            "cuda:0" if self._device == "cuda" else "cpu",  # Ray shows a rank no other GPU than its own
            self._pipeline.threads_per_rank,
            self._pipeline.lease_s,
            group_name,
        )

    def _endpoint_of(self, rank: int) -> str:
        try:
            endpoint: str = ray.get(self._actors[rank].endpoint.remote(), timeout=START_TIMEOUT_S)
        except GetTimeoutError as e:
            raise UnavailableError(f"rank {rank} did not start within {START_TIMEOUT_S:.0f} s") from e
        except RayActorError as e:
            del self._actors[rank]
            raise UnavailableError(f"rank {rank} died as it started: {e}") from e
        return endpoint
