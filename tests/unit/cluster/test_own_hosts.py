"""The provider of cluster/local.yaml: who runs, who is started, and who is passed over."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.local import config as local_config
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from actors.errors import UnavailableError
from cluster import own_hosts
from cluster.own_hosts import OwnHosts

HEAD, WORKERS = "10.0.0.1", ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
CONFIG = {"type": "external", "head_ip": HEAD, "worker_ips": WORKERS}
NO_COMMANDS = {"head_setup_commands": [], "worker_setup_commands": [], "docker": {}}
WORKER_TAGS = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: "host"}


@pytest.fixture(autouse=True)
def reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The hosts that answer; all at first. Ray's note is in a folder of the test's."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_config.get_state_path("c").startswith(str(tmp_path))
    answering = set(WORKERS)
    monkeypatch.setattr(own_hosts, "_answers", lambda host: host in answering)
    return answering


@pytest.fixture
def on_head() -> Iterator[OwnHosts]:
    """As the head's autoscaler has it, from what `ray up` sent there."""
    cluster: dict[str, Any] = {"head_node_type": "head", "provider": dict(CONFIG)}
    sent = OwnHosts(CONFIG, "operators").prepare_for_head_node(cluster)
    yield OwnHosts(sent["provider"], "c")


def workers(provider: OwnHosts) -> list[str]:
    return list(provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"}))


def test_the_heads_autoscaler_knows_the_head_and_no_worker(on_head: OwnHosts) -> None:
    assert on_head.non_terminated_nodes({}) == [HEAD]
    assert on_head.node_tags(HEAD)[TAG_RAY_NODE_KIND] == "head"
    assert on_head.node_tags(HEAD)[TAG_RAY_USER_NODE_TYPE] == "head"


def test_where_ray_up_is_called_nothing_runs_until_it_is_created() -> None:
    provider = OwnHosts(CONFIG, "c")
    assert provider.non_terminated_nodes({}) == []
    provider.create_node({}, {TAG_RAY_NODE_KIND: "head"}, 1)  # though nobody answers there
    assert provider.non_terminated_nodes({}) == [HEAD]


def test_what_an_earlier_cluster_noted_is_forgotten(on_head: OwnHosts) -> None:
    on_head.create_node({}, WORKER_TAGS, 2)
    again = OwnHosts(on_head.provider_config, "c")
    assert again.non_terminated_nodes({}) == [HEAD]


def test_a_host_out_of_reach_is_passed_over(on_head: OwnHosts, reach: set[str]) -> None:
    reach.remove(WORKERS[0])
    on_head.create_node({}, WORKER_TAGS, 2)
    assert workers(on_head) == WORKERS[1:]
    assert on_head.node_tags(WORKERS[1]) == WORKER_TAGS


def test_a_host_out_of_service_is_not_started_until_it_is_back(on_head: OwnHosts, tmp_path: Path) -> None:
    note = tmp_path / ".corral" / "out-of-service"
    note.parent.mkdir()
    note.write_text(f"{WORKERS[0]}\n{WORKERS[2]}\n")
    on_head.create_node({}, WORKER_TAGS, 1)
    assert workers(on_head) == [WORKERS[1]]
    with pytest.raises(UnavailableError, match="0 are free"):
        on_head.create_node({}, WORKER_TAGS, 1)
    note.write_text("")
    on_head.create_node({}, WORKER_TAGS, 2)
    assert workers(on_head) == WORKERS


def test_ray_does_not_complain_each_second_of_what_it_filled_in(
    on_head: OwnHosts, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_config({"provider": on_head.provider_config, "max_workers": 1, "setup_commands": [], **NO_COMMANDS})
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_host_that_was_given_back_is_started_again(on_head: OwnHosts) -> None:
    on_head.create_node({}, WORKER_TAGS, 3)
    on_head.terminate_node(WORKERS[1])
    assert workers(on_head) == [WORKERS[0], WORKERS[2]]
    on_head.create_node({}, WORKER_TAGS, 1)
    assert workers(on_head) == WORKERS
    assert on_head.nodes_for_teardown({}) == [*WORKERS, HEAD]  # `ray down` is to stop it again


def test_asking_for_more_than_there_is_starts_what_there_is_and_says_so(on_head: OwnHosts, reach: set[str]) -> None:
    reach.remove(WORKERS[2])
    with pytest.raises(UnavailableError, match="3 hosts are wanted, 3 are free, 2 of those in reach"):
        on_head.create_node({}, WORKER_TAGS, 3)
    assert workers(on_head) == WORKERS[:2]
    with pytest.raises(UnavailableError, match="1 are free, 0 of those in reach"):
        on_head.create_node({}, WORKER_TAGS, 1)


def test_an_answer_is_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the fixture's answers
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        monkeypatch.setattr(own_hosts, "SSH_PORT", listening.getsockname()[1])
        assert own_hosts.in_reach(["127.0.0.1"]) == []  # bound, but deaf
        listening.listen()
        assert own_hosts.in_reach(["127.0.0.1"]) == ["127.0.0.1"]
    assert own_hosts.in_reach([]) == []
