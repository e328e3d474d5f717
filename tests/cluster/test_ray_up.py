"""cluster/local.yaml for real, on five hosts: up, deploy, ask from elsewhere, scale, cut a host off and take it back.

The hosts are namespaces of this machine (`hosts.py`), so root is needed, and a minute or several. `make test-cluster`.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, Network, hosts, missing_tools
from operations import HERE, Lines, Operator, cluster_file, eventually, install_dependencies, serve_file

from actors.checkpoint.make_model import make_model
from actors.checkpoint.shapes import SHAPES

HEAD, OPERATOR = "head", "operator"
WORKERS = ("worker1", "worker2", "worker3")
MODEL = "/mnt/tiny"  # as on a file system that all hosts share
MAX_NUM_SEQS, NUM_STREAMS = 2, 5  # so that some wait
EAGER = {"target_queue_s": 0.2, "upscale_delay_s": 1.0}

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}"),
]


@contextmanager
def machines(folder: Path, *names: str) -> Iterator[Network]:
    """Hosts that share a model; nothing of them is left afterwards."""
    make_model(folder / "shared" / "tiny", SHAPES["tiny"])
    links = subprocess.check_output(["ip", "-brief", "link"])
    with hosts(folder / "hosts", names, folder / "shared") as network:
        yield network
    assert not (folder / "hosts").exists()
    assert subprocess.check_output(["ip", "-brief", "link"]) == links


def test_one_host_with_the_files_as_they_are(tmp_path: Path) -> None:
    with machines(tmp_path, "alone") as network:
        alone = replace(network["alone"], address="127.0.0.1")
        install_dependencies(alone.home)
        operator = Operator(alone, alone, "cluster/local.yaml")
        operator.prepare(network.key)
        operator.up()
        operator.on_head("serve deploy ~/corral/deploy/local.yaml")
        answers = eventually("an answer", 120, operator.ask)
        assert answers.count("tokens/s") == 2 and "gRPC" in answers
        assert any("haproxy" in process for process in alone.processes())
        operator.down()
        eventually("nothing is left", 60, partial(is_quiet, alone))


def test_an_operators_day(tmp_path: Path) -> None:
    with machines(tmp_path, HEAD, *WORKERS, OPERATOR) as network:
        for name in (HEAD, *WORKERS):
            install_dependencies(network[name].home)
        operators_day(network)


def expert_hosts(seen: Lines) -> list[str]:
    """Addresses of the hosts whose expert ranks are in the epoch, if one serves and no change is on its way."""
    router = seen.last["router"]
    if not router or not router.get("serving") or router.get("changing"):
        return []
    endpoints = [rank["endpoint"] for rank in router["ranks"] if "expert" in rank["roles"]]
    return sorted(str(endpoint).split("tcp://")[1].split(":")[0] for endpoint in endpoints)


def operators_day(network: Network) -> None:
    operator = Operator(network[OPERATOR], network[HEAD])
    operator.prepare(network.key)
    operator.write("cluster.yaml", cluster_file(network[HEAD], [network[name] for name in WORKERS], min_workers=1))
    with operator.phase("ray up"):
        operator.up()
    only_the_token_opens(operator)
    with operator.phase("serve deploy"):
        operator.deploy(serve_file(MODEL, MAX_NUM_SEQS, min_experts=1, max_experts=2, **EAGER))
        answers = eventually("an answer", 120, operator.ask)
    assert answers.count("tokens/s") == 2 and "gRPC" in answers

    operator.copy_to_head(HERE / "observe.py")
    seen = operator.observe()
    with operator.phase("one expert rank is seen"):
        (first,) = eventually("one expert rank", 60, lambda: expert_hosts(seen))
    load = operator.load(NUM_STREAMS)
    with operator.phase("under load: a node for a second expert rank"):
        both = eventually("two expert ranks", 180, lambda: two(expert_hosts(seen)))
    assert first in both and "requests wait" in seen.last["router"]["goal"]["why"]

    lost = next(address for address in both if address != first)
    (cut,) = (name for name in WORKERS if network[name].address == lost)
    with operator.phase("a host is cut off: served without it"):
        network.cut_off(cut)
        eventually("an epoch without it", 60, lambda: expert_hosts(seen) == [first])
    with operator.phase("a node in its stead"):
        assert lost not in eventually("two expert ranks", 180, lambda: two(expert_hosts(seen)))
    with operator.phase("it returns, and ends what it ran"):
        network.reconnect(cut)
        eventually("nothing runs there", 90, partial(is_quiet, network[cut]))
    with operator.phase("other bounds: it is taken back for a third expert rank"):
        operator.deploy(serve_file(MODEL, MAX_NUM_SEQS, min_experts=3, max_experts=3, **EAGER))
        eventually("all workers", 180, lambda: len(expert_hosts(seen)) == len(WORKERS))
    check_answers(load.finish(60))

    seen.kill()
    with operator.phase("ray down"):
        operator.down()
    with operator.phase("nothing is left on any host"):
        for name in (HEAD, *WORKERS):
            eventually(f"nothing on {name}", 60, partial(is_quiet, network[name]))
    print(f"{sum(operator.seconds.values()):6.1f} s  in all")


def is_quiet(host: Host) -> bool:
    return not host.processes()


def two(addresses: list[str]) -> list[str]:
    return addresses if len(addresses) == 2 else []


def only_the_token_opens(operator: Operator) -> None:
    status = f"ray status --address {operator.head.address}:6379"
    with pytest.raises(AssertionError):
        operator.sh(f"RAY_AUTH_MODE=disabled {status}")
    assert "head" in operator.sh(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.corral/ray-token {status}")


def check_answers(answers: list[dict[str, Any]]) -> None:
    """Nobody who asked noticed anything but a pause."""
    problems = [answer for answer in answers if answer["problem"]]
    assert not problems, problems[:5]
    assert {answer["front"] for answer in answers} == {"http", "grpc"}
    gaps = sorted(answer["longest_gap_s"] for answer in answers)
    print(f"{len(answers)} answers, longest pauses {', '.join(f'{gap:.1f} s' for gap in gaps[-4:])}")
