"""The main function of the process that `corral serve` is: a private Ray, Serve in it, and our application.

Owns their start and end. The process starts Ray as its own children, so that they go when it goes, however that
happens. The environment is prepared before this module is imported (`cluster/private_ray.py`).
"""

import logging
import os
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import LoggingConfig

from actors.app import build_with
from cluster.private_ray import ServicePorts

APPLICATION = "corral"
SERVICERS = [
    "actors.ingress.servicers.add_inference",
    "actors.ingress.servicers.add_health",
]
_LOOPBACK_NODE = "127.0.0.2"  # Ray replaces 127.0.0.1 by a network address; ranks are for this machine only
_OBJECT_STORE_BYTES = 100_000_000  # messages and tensors do not travel through it
_CORES_PER_INGRESS = 8  # an ingress takes one at most
_MAX_INGRESSES = 4
_NUM_CPUS = 16  # bookkeeping only: threads are counted by threads_per_rank


def start(args: dict[str, Any], ports: ServicePorts, scratch: Path) -> None:
    """Starts Ray and Serve, and deploys the application with `args` (those of actors/app.py). Blocks until Serve has
    it running; whether it can answer yet is for /health to say.
    """
    ray.init(
        address="local",
        namespace=APPLICATION,
        include_dashboard=False,
        num_cpus=_NUM_CPUS,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
        _node_ip_address=_LOOPBACK_NODE,
        _metrics_export_port=ports.metrics,
        _temp_dir=str(scratch / "ray"),  # Ray opens its folder to all users of the machine; the one above is ours alone
    )
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=ports.host, port=ports.http),
        grpc_options=gRPCOptions(port=ports.grpc, grpc_servicer_functions=SERVICERS),
        logging_config=LoggingConfig(enable_access_log=False),
    )
    application = build_with(args, num_replicas=num_ingresses(os.cpu_count() or 1))
    serve.run(application, name=APPLICATION, route_prefix="/", logging_config=LoggingConfig(enable_access_log=False))


def num_ingresses(num_cores: int) -> int:
    """Replicas of the ingress on a machine: the tokens of a step should not wait for each other in one process."""
    return max(1, min(_MAX_INGRESSES, num_cores // _CORES_PER_INGRESS))


def ray_address() -> str:
    """Where other drivers find the Ray that `start` started."""
    address: str = ray.get_runtime_context().gcs_address
    return address


def shut_down() -> None:
    """Ends Ray, and everything in it at once: open requests are broken off."""
    ray.shutdown()
