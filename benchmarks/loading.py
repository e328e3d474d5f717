"""How fast weights come to a device: read from a synthetic checkpoint, or made at random.

    python -m benchmarks.loading read --shape scout-fp8 --gigabytes 24 --directory /dev/shm --device cuda
    python -m benchmarks.loading dummy --shape scout-fp8 --device cuda

Owns the synthetic files: whole layers of a named shape, in its stored form, with bytes that are finite numbers. What
was just written lies in the page cache, so `read` shows what the reader and the bus do, not a disk.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from actors.attention.local_model import LocalModel
from actors.attention.worker import AttentionWorker
from actors.checkpoint import reader
from actors.checkpoint.config import ModelConfig, read_model_config
from actors.checkpoint.expected import expected_tensors, num_checkpoint_bytes
from actors.checkpoint.headers import ITEM_BYTES
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.shapes import LAYOUTS, ModelShape, StoredExperts, config_json, named_shape, shape_config
from actors.checkpoint.stored_names import SINGLE_FILE
from actors.checkpoint.weights import load_attention, load_experts, num_weight_bytes
from actors.config import PipelineConfig
from actors.expert.worker import ExpertWorker

_BLOCK_BYTES = 64 << 20


def main() -> None:
    """Parses the command line and times what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["read", "dummy"])
    parser.add_argument("--shape", default="scout-fp8", help="NAME, NAME-fp8 or NAME-int4")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="read: whole layers up to about this much")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--threads", type=int, nargs="*", help="read: reads in flight, several are tried in turn")
    parser.add_argument("--block-mib", type=int, nargs="*", help="read: size of one read, several are tried in turn")
    parser.add_argument("--forward", action="store_true", help="dummy: run a prompt too, and show its numbers")
    arguments = parser.parse_args()
    shape, stored = named_shape(arguments.shape)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as made:
        if arguments.what == "dummy":
            time_dummy(Path(made), shape, stored, arguments.device, arguments.forward)
            return
        began = time.perf_counter()
        num_bytes = write_synthetic(Path(made), shape, stored, arguments.gigabytes)
        print(f"{arguments.shape}: wrote {num_bytes / 1e9:.1f} GB in {time.perf_counter() - began:.1f} s")
        for threads in arguments.threads or [reader.READS_IN_FLIGHT[arguments.device]]:
            for mib in arguments.block_mib or [reader.BLOCK_BYTES[arguments.device] >> 20]:
                reader.READS_IN_FLIGHT[arguments.device] = threads
                reader.BLOCK_BYTES[arguments.device] = mib << 20
                _time_reads(Path(made), arguments.device, num_bytes, f"{threads} threads, {mib} MiB")
        if arguments.device == "cuda":
            _time_worker(Path(made), torch.device("cuda"))


def time_dummy(directory: Path, shape: ModelShape, stored: StoredExperts, device: str, forward: bool) -> None:
    """Makes the random weights of a whole model, as a single rank with `load: dummy` does."""
    _write_config(directory, shape, stored)
    config, place = read_model_config(directory), torch.device(device)
    pipeline = PipelineConfig(model=str(directory), load="dummy", kv_cache_bytes=2 << 30, max_model_len=4096)
    with _timed(device) as seconds:
        worker = ExpertWorker.load(config, pipeline, _all_slots(config), place)
    print(f"experts: {worker.weight_bytes / 1e9:.1f} GB in {seconds():.1f} s, proven")
    with _timed(device) as seconds:
        attention = AttentionWorker.load(config, pipeline, place)
    print(f"the rest: {attention.weight_bytes / 1e9:.1f} GB in {seconds():.1f} s")
    print(_memory(device))
    if forward:
        _show_forward(LocalModel(config, attention, worker))


def _show_forward(model: LocalModel) -> None:
    """Hidden states neither vanish nor grow: what a layer adds is about as large as what it is given."""
    logits_of = model.attention.logits

    def logits(h_BD: torch.Tensor) -> torch.Tensor:
        print(f"hidden states after the last layer: std {float(h_BD.float().std()):.2f}")
        return logits_of(h_BD)

    model.attention.logits = logits  # type: ignore[method-assign]
    logits_TV = model.logits(range(64))
    top_T2 = logits_TV.topk(2).values
    margin = float((top_T2[:, 0] - top_T2[:, 1]).median())
    is_finite = bool(logits_TV.isfinite().all())
    print(f"logits: finite {is_finite}, std {float(logits_TV.std()):.2f}, median margin of the best {margin:.2f}")


def write_synthetic(directory: Path, shape: ModelShape, stored: StoredExperts, gigabytes: float) -> int:
    """Writes as many layers as fit into `gigabytes` (at least one period of the shape's). Returns bytes of weights."""
    layers = shape.moe_interval
    while layers < shape.num_layers and _num_bytes(replace(shape, num_layers=layers + 1), stored) < gigabytes * 1e9:
        layers += 1
    shape = replace(shape, num_layers=layers)
    _write_config(directory, shape, stored)
    config = shape_config(shape, experts=stored)
    header: dict[str, object] = {}
    position = 0
    for name, rule in expected_tensors(config, LAYOUTS[stored]).items():
        dtype = rule.dtypes[0]
        end = position + int(np.prod(rule.shape)) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": rule.shape, "data_offsets": [position, end]}
        position = end
    _write_file(directory / SINGLE_FILE, json.dumps(header).encode(), position)
    return position


def _write_config(directory: Path, shape: ModelShape, stored: StoredExperts) -> None:
    (directory / "config.json").write_text(json.dumps(config_json(shape, experts=stored)))


def _num_bytes(shape: ModelShape, stored: StoredExperts) -> int:
    return num_checkpoint_bytes(shape_config(shape, experts=stored), LAYOUTS[stored])


def _write_file(file: Path, header: bytes, num_bytes: int) -> None:
    """Signed numbers below 2, whether they are read as bf16 or as FP8: the top bit of the exponent is never set."""
    header += b" " * (-len(header) % 8)
    block = (np.random.default_rng(0).integers(0, 256, _BLOCK_BYTES, dtype=np.uint8) & 0xBF).tobytes()
    begin = 8 + len(header)
    with file.open("wb") as stream, ThreadPoolExecutor(8) as pool:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.flush()

        def write(at: int) -> None:
            rest = memoryview(block)[: min(_BLOCK_BYTES, num_bytes - at)]
            while rest:
                written = os.pwrite(stream.fileno(), rest, begin + at)
                at, rest = at + written, rest[written:]

        for future in [pool.submit(write, at) for at in range(0, num_bytes, _BLOCK_BYTES)]:
            future.result()


def _time_reads(directory: Path, device: str, num_bytes: int, what: str) -> None:
    index, config = validate_checkpoint(directory), read_model_config(directory)
    with _timed(device) as seconds:
        experts = load_experts(index, config, _all_slots(config), torch.bfloat16, device)
        attention = load_attention(index, config, torch.bfloat16, device)
    held_bytes = num_weight_bytes(experts) + num_weight_bytes(attention)
    rate = num_bytes / seconds() / 1e9
    print(f"{what}: {seconds():.2f} s, {rate:.2f} GB/s, {held_bytes / 1e9:.1f} GB held; {_memory(device)}")


def _time_worker(directory: Path, device: torch.device) -> None:
    config = read_model_config(directory)
    with _timed(device.type) as seconds:
        worker = ExpertWorker.load(config, PipelineConfig(model=str(directory)), _all_slots(config), device)
    rate = worker.weight_bytes / seconds() / 1e9
    print(f"an expert rank, proofs included: {seconds():.2f} s, {rate:.2f} GB/s")


def _all_slots(config: ModelConfig) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(range(config.num_experts)) for layer in config.moe_layers}


@contextmanager
def _timed(device: str) -> Iterator[Callable[[], float]]:
    """Yields a function that says how many seconds the block took, the device's work included."""
    ends: list[float] = []
    torch.zeros(1, device=device)  # the device's context is none of it
    began = time.perf_counter()
    yield lambda: ends[0] - began
    if device == "cuda":
        torch.cuda.synchronize()
    ends.append(time.perf_counter())


def _memory(device: str) -> str:
    host = f"host peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
    if device != "cuda":
        return host
    return f"{host}, device peak {torch.cuda.max_memory_reserved() / 1e9:.1f} GB"


if __name__ == "__main__":
    main()
