"""The Ray actor of an attention rank (colocated ranks, which hold experts too, are attention actors)."""

import ray

from actors.actor import RankActor


@ray.remote(max_restarts=0, max_concurrency=4)
class AttentionActor(RankActor):
    """Holds its share of dense weights and the KV cache."""
