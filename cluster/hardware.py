"""What a layout runs on: accelerators with their memory and rates, and how many of them there are.

Owns the rate tables and the spellings `8xH200`, `2x8xH200`, `cpu`. Knows nothing of models. Rates are those that a
floor may be held against: measured copy bandwidth, not the data sheet's, where a measurement exists.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from actors.config import Device
from actors.errors import LayoutError

GPUS_PER_HOST = 8  # of the HGX boards that these GPUs are sold on
_ACCELERATOR_TYPE = "accelerator_type:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One device that a rank runs on. Rates in units per second; `exchange_s` is one small dispatch or combine."""

    name: str
    device: Device  # cuda or cpu
    memory_bytes: int
    memory_bytes_s: float  # copy bandwidth, reads and writes together
    flops_16bit_s: float
    flops_8bit_s: float
    link_bytes_s: float  # to another rank of the same host, per direction
    exchange_s: float
    reserved_bytes: int  # activations, workspaces, contexts


# Bandwidth and 16-bit rate: measured on an H200 and an H100 SXM (copy of 4 GiB; square bf16 GEMM). The 8-bit rate is
# 1.77 times the 16-bit one, link and exchange are what NVLink 4 reaches with device-initiated copies: assumed.
H200 = Accelerator(
    name="H200",
    device="cuda",
    memory_bytes=150_100_000_000,
    memory_bytes_s=4.3e12,
    flops_16bit_s=790e12,
    flops_8bit_s=1400e12,
    link_bytes_s=400e9,
    exchange_s=6e-6,
    reserved_bytes=5_000_000_000,
)
H100 = replace(H200, name="H100", memory_bytes=85_000_000_000, memory_bytes_s=3.0e12)

# Two cores of a server: order of magnitude only, so that `corral plan` can compare layouts; 8-bit has no faster path.
CPU = Accelerator(
    name="CPU",
    device="cpu",
    memory_bytes=16_000_000_000,
    memory_bytes_s=20e9,
    flops_16bit_s=100e9,
    flops_8bit_s=100e9,
    link_bytes_s=5e9,
    exchange_s=130e-6,
    reserved_bytes=500_000_000,
)

NETWORK_BYTES_S = 50e9  # per GPU between hosts: one 400 Gb/s adapter each, assumed
NETWORK_EXCHANGE_S = 20e-6  # one small dispatch or combine between hosts, assumed

_KNOWN = {a.name: a for a in (H200, H100, CPU)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """`count` equal accelerators, `per_host` on each host. A CPU counts once: its ranks share memory and `cores`."""

    accelerator: Accelerator
    count: int = 1
    per_host: int = 1
    cores: int = 1

    @property
    def num_hosts(self) -> int:
        return -(-self.count // self.per_host)

    @property
    def is_cpu(self) -> bool:
        return self.accelerator.device == "cpu"

    def __str__(self) -> str:
        if self.is_cpu:
            return f"CPU ({self.accelerator.memory_bytes / 1e9:.0f} GB)"
        hosts = "" if self.num_hosts == 1 else f" on {self.num_hosts} hosts"
        return f"{self.count}x{self.accelerator.name}{hosts}"


def parse_machines(text: str) -> Machines:
    """Reads `cpu`, `H200`, `8xH200` (more than 8: hosts of 8) or `2x8xH200` (hosts x GPUs). Raises LayoutError."""
    if text.lower() == "cpu":
        return local_cpu()
    match = re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z]\w*)", text)
    if match is None or match[3].upper() not in _KNOWN or match[3].upper() == "CPU":
        gpus = sorted(name for name in _KNOWN if name != "CPU")
        raise LayoutError(f"{text!r} names no machine: say cpu, 8xH200 or 2x8xH200; known GPUs: {', '.join(gpus)}")
    accelerator = _KNOWN[match[3].upper()]
    first, second = int(match[1] or 1), int(match[2]) if match[2] else None
    count, per_host = (first, min(first, GPUS_PER_HOST)) if second is None else (first * second, second)
    if count < 1:
        raise LayoutError(f"{text!r} has no GPU")
    return Machines(accelerator=accelerator, count=count, per_host=per_host)


def local_cpu() -> Machines:
    """This machine's memory behind the CPU table's rates."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return cpu_machine(memory_bytes)


def local_machines(device: Device) -> Machines:
    """This host's GPUs, or its CPU, as `device` says. Raises LayoutError if cuda is asked for in vain."""
    import torch  # here, so that a plan for other machines does not wait for it

    count = 0 if device == "cpu" else torch.cuda.device_count()
    if not count:
        if device == "cuda":
            raise LayoutError("device cuda was asked for, but this host has no GPU that torch can use")
        return local_cpu()
    first = torch.cuda.get_device_properties(0)
    name = next((known for known in _KNOWN if known in first.name), first.name)
    return Machines(accelerator=gpu_named(name, first.total_memory), count=count, per_host=count)


def visible_name(gpu: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls the GPU that this process calls cuda:`gpu`. Raises LayoutError if it sees none
    of that number.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(gpu)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if gpu >= len(names):
        raise LayoutError(f"there is no cuda:{gpu}: CUDA_VISIBLE_DEVICES={visible!r} names {len(names)} GPUs")
    return names[gpu]


def cpu_machine(memory_bytes: int) -> Machines:
    """One CPU machine with this much memory and as many cores as this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machines(accelerator=replace(CPU, memory_bytes=memory_bytes), cores=cores)


def machines_of_nodes(resources_of_nodes: Sequence[Mapping[str, float]], device: str) -> Machines:
    """What a Ray cluster offers, from each node's resources (`GPU`, `memory` in bytes, `accelerator_type:NAME`).

    `device` is PipelineConfig's: auto takes GPUs where there are any. Raises LayoutError if cuda is asked for in vain.
    """
    gpus_of_nodes = [int(node.get("GPU", 0)) for node in resources_of_nodes]
    if device == "cpu" or (device == "auto" and not any(gpus_of_nodes)):
        # Ray's `memory` is a schedulable share of a node's memory, so it is the right bound there; it may be absent.
        memory_bytes = int(max((node.get("memory", 0) for node in resources_of_nodes), default=0))
        return cpu_machine(memory_bytes) if memory_bytes else local_cpu()
    if not any(gpus_of_nodes):
        raise LayoutError("device cuda was asked for, but no node of the cluster has a GPU")
    names = {key.removeprefix(_ACCELERATOR_TYPE) for node in resources_of_nodes for key in node
             if key.startswith(_ACCELERATOR_TYPE) and node.get("GPU", 0) > 0}  # fmt: skip
    if len(names) > 1:
        raise LayoutError(f"the cluster mixes GPUs ({', '.join(sorted(names))}); a pipeline needs one kind")
    return Machines(accelerator=gpu_named(next(iter(names), "")), count=sum(gpus_of_nodes), per_host=max(gpus_of_nodes))


def gpu_named(name: str, memory_bytes: int = 0) -> Accelerator:
    """The table's row for a GPU. One that it lacks gets the smallest row's rates, and its own memory if that is known.

    Layouts are compared, not timed, by these rates, so that a wrong one shifts all of them alike.
    """
    known = _KNOWN.get(name.upper(), replace(H100, name=name or "GPU"))
    return replace(known, memory_bytes=memory_bytes) if memory_bytes else known
