"""Sums and gathers of a tensor-parallel attention unit: right, how fast beside NCCL, how soon a dead peer is noticed.

    python -m benchmarks.gpu_collectives --ranks 4

Owns the cases and the tables. The ranks are `unit_of_ranks.py`'s. Times are of one call in a CUDA graph of 20.
"""

import argparse
import time

import torch

from benchmarks.report import preamble, table, write
from benchmarks.unit_of_ranks import UnitOfRanks

HIDDEN = 5120
VOCAB = 202_048
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
CHECKED_ROWS = (1, 3, 17, 256, 700, 2400)  # the last in two calls, or over NCCL
GATHERED_ROWS = (1, 8, 32, 128, 256)
TIMEOUT_S = 2.0
KILL_AFTER_S = 1.5  # when all sum, and have compiled what that takes


def check(unit: UnitOfRanks) -> list[str]:
    """What is wrong, one line each."""
    wrong = []
    for captured in (False, True):
        for num_rows in CHECKED_ROWS:
            wrong += [f"graph={captured}: {w}" for w in unit.ask("check_sums", num_rows, captured) if w]
            bits = unit.ask("bits")
            wrong += (
                [f"graph={captured}: {num_rows} rows differ between ranks"] if bits != [bits[0]] * unit.size else []
            )
        for num_rows, width in ((1, VOCAB // unit.size), (5, 1000), (256, VOCAB // unit.size)):
            wrong += [f"graph={captured}: {w}" for w in unit.ask("check_gather", num_rows, width, captured) if w]
    return wrong


def measure(unit: UnitOfRanks, most_rows: int) -> str:
    """The slowest member's times as two tables."""
    names = ("all_reduce", "nccl", "add_rms_norm", "norm")
    rows = [[n, *(f"{max(unit.ask('time_us', name, n)):.1f}" for name in names)] for n in ROWS if n <= most_rows]
    header = ("tokens", "all-reduce", "NCCL all-reduce", "all-reduce, add and norm", "add and norm alone")
    width = VOCAB // unit.size
    gathers = [
        [n, *(f"{max(unit.ask('time_us', name, n, width)):.1f}" for name in ("gather", "largest")), 2 * n * VOCAB >> 10]
        for n in GATHERED_ROWS
        if n <= most_rows
    ]
    of_logits = ("rows", "gather of logits", "the largest of each row", "KiB in all")
    return table(header, rows) + "\n\n" + table(of_logits, gathers)


def interrupt(unit: UnitOfRanks) -> list[str]:
    """All are told that the epoch is over while they sum: they stop at once."""
    unit.begin("run_until_lost", 4, 1.0)
    return [f"interrupted: {s:.3f} s after the last sum, {text}" for s, text in (unit.answer(i) for i in _all(unit))]


def lose(unit: UnitOfRanks, num_rows: int) -> list[str]:
    """Kills a peer while the others sum."""
    lost = unit.size - 1
    unit.begin("run_until_lost", num_rows)
    time.sleep(KILL_AFTER_S)
    unit.processes[lost].kill()
    answers = [unit.answer(index) for index in range(lost)]
    return [f"{num_rows} rows, peer {lost} killed: noticed after {s:.3f} s, {text}" for s, text in answers]


def recover(unit: UnitOfRanks, num_rows: int) -> list[str]:
    """Goes on with another process in the place of the one that was killed."""
    unit.replace(unit.size - 1)
    took = unit.join(fresh=True, timeout_s=TIMEOUT_S)
    wrong = [w for w in unit.ask("check_sums", num_rows, True) if w]
    return [f"joined with another peer in {max(s for s, _ in took):.2f} s, its start included: {wrong or 'right'}"]


def _all(unit: UnitOfRanks) -> range:
    return range(unit.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--isolated", action="store_true", help="every rank sees one GPU alone")
    parser.add_argument("--check", action="store_true", help="that results are right, no times and no losses")
    parser.add_argument("--times", action="store_true", help="times alone")
    parser.add_argument("--rows", type=int, default=max(ROWS), help="at most so many are timed")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--keep", action="store_true", help="write the tables to benchmarks/results")
    arguments = parser.parse_args()
    unit = UnitOfRanks(arguments.ranks, HIDDEN, getattr(torch, arguments.dtype), arguments.isolated)
    unit.start()
    try:
        took = unit.join(timeout_s=TIMEOUT_S)
        print(f"joined in {max(s for s, _ in took):.2f} s", flush=True)
        took = unit.join(fresh=False, timeout_s=TIMEOUT_S)
        print(f"joined again, keeping the memory, in {max(s for s, _ in took):.2f} s: {took}", flush=True)
        if not arguments.times:
            print("wrong:", check(unit) or "nothing", flush=True)
        if arguments.check:
            return
        figures = measure(unit, arguments.rows)
        print(figures, flush=True)
        if arguments.times:
            return
        losses = interrupt(unit)
        unit.join(timeout_s=TIMEOUT_S)
        losses += lose(unit, 128) + recover(unit, 128) + lose(unit, 4)
        print("\n".join(losses), flush=True)
        if arguments.keep:
            where = f"{arguments.ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}"
            what = f"microseconds per call in a CUDA graph, rows of {HIDDEN} {arguments.dtype}"
            title = f"Collectives of tensor-parallel attention: {what}"
            write("gpu_collectives", f"{preamble(title, where)}\n{figures}\n\n" + "\n".join(f"- {x}" for x in losses))
    finally:
        unit.stop()


if __name__ == "__main__":
    main()
