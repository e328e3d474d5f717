"""Machines by name and from what Ray says of its nodes."""

import pytest

from actors.errors import LayoutError
from cluster.hardware import H100, gpu_named, machines_of_nodes, parse_machines, visible_name


@pytest.mark.parametrize(
    ("text", "count", "per_host", "hosts"),
    [("H200", 1, 1, 1), ("4xH200", 4, 4, 1), ("8xh100", 8, 8, 1), ("16xH200", 16, 8, 2), ("2x4xH200", 8, 4, 2)],
)
def test_gpus_by_name(text: str, count: int, per_host: int, hosts: int) -> None:
    machines = parse_machines(text)
    assert (machines.count, machines.per_host, machines.num_hosts) == (count, per_host, hosts)
    assert not machines.is_cpu


def test_cpu_by_name() -> None:
    machines = parse_machines("cpu")
    assert machines.is_cpu and machines.cores >= 1 and machines.accelerator.memory_bytes > 2**28


@pytest.mark.parametrize("text", ["", "8x", "8xA100", "0xH200", "x", "8xCPU", "8 H200"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(LayoutError):
        parse_machines(text)


def test_nodes_of_a_cluster() -> None:
    head = {"CPU": 16.0, "memory": 1e10}
    worker = {"CPU": 64.0, "memory": 5e11, "GPU": 8.0, "accelerator_type:H200": 1.0}
    machines = machines_of_nodes([head, worker, worker], "auto")
    assert (machines.accelerator.name, machines.count, machines.per_host) == ("H200", 16, 8)
    assert machines_of_nodes([head, worker], "cpu").is_cpu
    assert machines_of_nodes([head], "auto").accelerator.memory_bytes == 10**10


def test_a_cluster_without_what_is_asked_for_is_refused() -> None:
    with pytest.raises(LayoutError, match="no node"):
        machines_of_nodes([{"CPU": 4.0}], "cuda")
    mixed = [{"GPU": 1.0, "accelerator_type:H100": 1.0}, {"GPU": 1.0, "accelerator_type:H200": 1.0}]
    with pytest.raises(LayoutError, match="H100, H200"):
        machines_of_nodes(mixed, "auto")


def test_a_gpu_that_no_table_has_keeps_its_memory() -> None:
    unknown = gpu_named("L40S", memory_bytes=48 * 10**9)
    assert unknown.memory_bytes == 48 * 10**9 and unknown.memory_bytes_s == H100.memory_bytes_s


def test_a_rank_gets_the_gpu_that_its_starter_sees_by_that_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_name(2) == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5a1e")
    assert [visible_name(gpu) for gpu in range(2)] == ["3", "GPU-5a1e"]
    with pytest.raises(LayoutError, match="cuda:2"):
        visible_name(2)
