"""Ray's `local` provider, made fit for autoscaling: which of one's own hosts run Ray, for `ray up` and the autoscaler.

Owns the choice of a host to start. Ray's class keeps the note of who runs, and Ray's launcher starts them by ssh. Ray
2.60's second autoscaler needs three things that its `local` provider does not do: to know of the head, to be told at
once when no host is free (it waits ten minutes for one that never comes), and to pass over a host that is out of reach
(it would try the first in the list again and again).
"""

import logging
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray.autoscaler._private.local.node_provider import LocalNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from actors.errors import UnavailableError

OUT_OF_SERVICE = "~/.corral/out-of-service"  # on the head: a host per line that is not to be started
SSH_PORT = 22
REACH_TIMEOUT_S = 2.0
HEAD_TYPE_KEY = "runs_on_head_of_type"  # in the provider's part of the configuration that Ray copies to the head


class OwnHosts(LocalNodeProvider):  # type: ignore[misc]  # ray is not typed for us
    """`provider: {type: external, module: cluster.own_hosts.OwnHosts, head_ip: …, worker_ips: […]}`."""

    def __init__(self, provider_config: Mapping[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        if HEAD_TYPE_KEY in provider_config:
            # Ray fills in two empty fields for providers not its own, and complains of them at every look: each second
            logging.getLogger("ray.autoscaler._private.util").addFilter(_is_no_complaint_of_empty_fields)
            self._begin(provider_config["head_ip"], provider_config[HEAD_TYPE_KEY])

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Called where `ray up` is: what it returns is what the head's autoscaler reads."""
        cluster_config["provider"][HEAD_TYPE_KEY] = cluster_config["head_node_type"]
        return cluster_config

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        """Marks `count` hosts of the kind that `tags` names as running. If fewer are in service and in reach it marks
        those, and raises UnavailableError: the autoscaler tries again.
        """
        resting = out_of_service()
        with self.state.lock, self.state.file_lock:
            hosts = self.state.get()
            kind = tags[TAG_RAY_NODE_KIND]
            stopped = [
                host
                for host, info in hosts.items()
                if info["state"] == "terminated" and info["tags"].get(TAG_RAY_NODE_KIND) == kind and host not in resting
            ]
            # whoever calls `ray up` wants the head to be tried, and to see why if it fails
            ready = stopped if kind == NODE_KIND_HEAD else in_reach(stopped)
            for host in ready[:count]:
                self.state.put(
                    host, {**hosts[host], "tags": dict(tags), "state": "running", "teardown_complete": False}
                )
        if len(ready) < count:
            raise UnavailableError(f"{count} hosts are wanted, {len(stopped)} are free, {len(ready)} of those in reach")

    def _begin(self, head: str, head_type: str) -> None:
        """The head's autoscaler begins: the head runs, and of workers nothing that an earlier cluster noted is true."""
        tags = {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_USER_NODE_TYPE: head_type,
            TAG_RAY_NODE_NAME: f"ray-{self.cluster_name}-head",
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }
        for host, info in self.state.get().items():
            self.state.put(
                host, {"tags": tags, "state": "running"} if host == head else {**info, "state": "terminated"}
            )


def out_of_service() -> set[str]:
    """The hosts that an operator has taken out of service, to work on them."""
    file = Path(OUT_OF_SERVICE).expanduser()
    return set(file.read_text().split()) if file.exists() else set()


def in_reach(hosts: list[str]) -> list[str]:
    """Those whose sshd can be connected to, in the order given."""
    if not hosts:
        return []
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        answers = list(pool.map(_answers, hosts))
    return [host for host, answered in zip(hosts, answers, strict=True) if answered]


def _answers(host: str) -> bool:
    try:
        with socket.create_connection((host, SSH_PORT), timeout=REACH_TIMEOUT_S):
            return True
    except OSError:
        return False


def _is_no_complaint_of_empty_fields(record: logging.LogRecord) -> bool:
    return "empty legacy field" not in record.getMessage()
