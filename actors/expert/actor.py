"""The Ray actor of a rank that holds experts only."""

import ray

from actors.actor import RankActor


@ray.remote(max_restarts=0, max_concurrency=4)
class ExpertActor(RankActor):
    """Holds a group of experts."""
