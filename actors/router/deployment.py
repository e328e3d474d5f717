"""The Serve binding of the router: one replica per pipeline.

Owns its place in Serve: where ingresses find it, its health, and the publication of its metrics. The work is
`worker.py`'s.
"""

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.util.metrics import Counter, Gauge

from actors.checkpoint.config import read_model_config
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.shape_models import resolve_model_directory
from actors.config import PipelineConfig, ScalingConfig
from actors.dispatch.group import RendezvousStore
from actors.errors import UnavailableError
from actors.router.metrics import RouterMetrics
from actors.router.worker import Router
from actors.wire import ChannelKeys
from cluster.layout import resolve
from cluster.membership import plan_membership
from cluster.pipeline_secret import pipeline_secret
from cluster.placement import RayFleet, cluster_machines

log = logging.getLogger("corral.router")

PUBLISH_S = 1.0


class MetricsPublisher:
    """Puts the router's numbers on Ray's metrics endpoint, from where Prometheus takes them as ray_corral_*."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._gauges = {
            name: Gauge(f"corral_{name}", description=text)
            for name, text in (
                ("requests_running", "Requests that hold KV pages"),
                ("requests_queued", "Requests that wait for admission"),
                ("kv_used_fraction", "Used share of the fuller page group, 0 to 1"),
                ("epoch_serving", "1 while an epoch serves, else 0"),
                ("batch_tokens", "Tokens per step, mean since the last publication"),
            )
        }
        self._counters = {
            name: Counter(f"corral_{name}", description=text)
            for name, text in (
                ("steps", "Steps launched"),
                ("step_tokens", "Tokens in launched steps, prefill and decode"),
                ("generated_tokens", "Tokens sampled"),
                ("preemptions", "Requests preempted to be recomputed"),
                ("epochs_lost", "Epochs that ended because a rank was lost"),
                ("requests_given_up", "Requests that epoch after epoch ended with"),
                ("slow_ranks", "Ranks found to be slow for good"),
                ("step_seconds", "Seconds that ranks spent in steps"),
            )
        }
        self._changes = Counter("corral_changes", description="Changes of membership that ended", tag_keys=("outcome",))
        self._ranks = Gauge("corral_ranks", description="Ranks of the epoch that serves", tag_keys=("role",))
        self._wanted = Gauge("corral_ranks_wanted", description="Ranks that there should be", tag_keys=("role",))
        self._expert = Counter("corral_expert_tokens", description="Tokens routed", tag_keys=("layer", "expert"))
        self._published: dict[Any, float] = {}

    def publish(self) -> None:
        """Called about once a second."""
        metrics = self._metrics
        load = metrics.load
        if load is None:
            return
        steps = metrics.steps - self._published.get("steps", 0)
        tokens = metrics.step_tokens - self._published.get("step_tokens", 0)
        self._gauges["requests_running"].set(load.num_running)
        self._gauges["requests_queued"].set(load.num_queued)
        self._gauges["kv_used_fraction"].set(load.kv_used_fraction)
        self._gauges["epoch_serving"].set(int(metrics.serving))
        self._gauges["batch_tokens"].set(tokens / steps if steps else 0.0)
        for gauge, counts in ((self._ranks, metrics.ranks), (self._wanted, metrics.ranks_wanted)):
            for role, count in counts.items():
                gauge.set(count, tags={"role": role})
        for outcome, total in (("done", metrics.changes_done), ("failed", metrics.changes_failed)):
            self._count_up(self._changes, ("changes", outcome), total, {"outcome": outcome})
        for name, counter in self._counters.items():
            total = load.num_preemptions if name == "preemptions" else getattr(metrics, name)
            self._count_up(counter, name, total, {})
        for (layer, expert), total in list(metrics.expert_tokens.items()):
            self._count_up(self._expert, (layer, expert), total, {"layer": str(layer), "expert": str(expert)})

    def _count_up(self, counter: Counter, key: Any, total: float, tags: dict[str, str]) -> None:
        grown = total - self._published.get(key, 0)
        if grown > 0:
            counter.inc(grown, tags=tags)
            self._published[key] = total


@serve.deployment(
    name="Router",
    num_replicas=1,
    max_ongoing_requests=1000,
    health_check_period_s=1.0,  # by which Serve notices that it died, and starts another
    ray_actor_options={"num_cpus": 0.1},
)
class RouterDeployment:
    """Checks the checkpoint before anything is placed, then starts the router, which brings up the ranks.

    `user_config` holds the keys of ScalingConfig: changing them and deploying again applies them to the pipeline that
    runs.
    """

    def __init__(self, pipeline: dict[str, Any]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        config = PipelineConfig.parse(pipeline)
        directory = resolve_model_directory(config.model, with_weights=config.load == "checkpoint")
        model = read_model_config(directory)
        if config.load == "checkpoint":
            validate_checkpoint(directory)
        plan = resolve(replace(config, model=str(directory)), model, cluster_machines(config.device))
        log.info("%s", plan.describe())
        self._config, self._model = plan.pipeline, model
        self._name = config.served_model_name or config.model.removeprefix("shape:").rstrip("/").rpartition("/")[2]
        self._created_s = int(time.time())
        host = ray.util.get_node_ip_address()
        self._store = RendezvousStore(host)
        self._store.start()
        self._secret = pipeline_secret(config.application)
        self._membership = plan_membership(plan, ScalingConfig())
        self._router = Router(
            plan.pipeline,
            model,
            self._membership.balancer,
            self._membership.autoscaler,
            RayFleet(plan.pipeline, self._secret),
            self._store.endpoint,
            ChannelKeys.from_secret(self._secret),
        )
        self._endpoint = self._router.start(host)
        self._publisher = MetricsPublisher(self._router.metrics)
        self._task = asyncio.get_event_loop().create_task(self._publish())

    async def reconfigure(self, scaling: dict[str, Any]) -> None:
        """Serve calls it with `user_config`, at first and whenever it changes. Raises ConfigError."""
        self._membership.apply(ScalingConfig.parse(scaling))

    async def endpoint(self) -> str:
        """Where ingresses connect: tcp://host:port."""
        return self._endpoint

    async def channel_secret(self) -> bytes:
        """What ingresses must know to be heard."""
        return self._secret

    async def snapshot(self) -> dict[str, Any]:
        """The state of the pipeline, for `corral status`."""
        return self._router.snapshot

    async def describe(self) -> dict[str, Any]:
        """What is served, for ingresses."""
        return {
            "name": self._name,
            "model": self._config.model,
            "max_model_len": self._config.max_model_len,
            "vocab_size": self._model.vocab_size,
            "bos_token_id": self._model.bos_token_id,
            "eos_token_ids": self._model.eos_token_ids,
            "created_s": self._created_s,
        }

    async def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if not self._router.alive:
            raise UnavailableError("the router's thread has ended")

    async def _publish(self) -> None:
        while True:
            await asyncio.sleep(PUBLISH_S)
            self._publisher.publish()

    async def __del__(self) -> None:
        self._task.cancel()
        self._router.stop()
        self._store.stop()
