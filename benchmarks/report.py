"""How results are kept: a markdown table and machine-readable JSON, with command, hardware, commit and date."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The commit that was measured; '+' marks uncommitted changes outside benchmarks/results."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def hardware() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {model}, {memory_gib:.0f} GiB"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def preamble(title: str, where: str = "") -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"# {title}\n\n`{_command()}`; {where or hardware()}; commit {commit()}; {today}\n"


def _command() -> str:
    """How this program was called, by its module's name wherever the tree lies."""
    program, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    named = [str(program)]
    if program.is_relative_to(root):
        named = ["-m", ".".join(program.relative_to(root).with_suffix("").parts)]
    return shlex.join(["python", *named, *sys.argv[1:]])


def write(name: str, markdown: str, values: dict[str, Any] | None = None) -> None:
    """Writes results/NAME.md, and results/NAME.json where `values` are given."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(markdown.rstrip() + "\n")
    if values is not None:
        (RESULTS / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")


def add(name: str, values: dict[str, Any]) -> None:
    """Puts `values` among those of results/NAME.json, which is made if need be."""
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | values, indent=2) + "\n")


def picture(name: str, svg: str) -> None:
    """Writes results/NAME.svg."""
    (RESULTS / f"{name}.svg").write_text(svg)
