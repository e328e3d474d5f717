"""A service of `corral serve` to be measured: started in the background, ended with the context."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from cluster.session import StateFolder, family_of

PORTS = (18200, 19200)
PARTS = {  # of a service, by what their processes' titles have in them
    "corral:Ingress": "ingress", "corral:Router": "router", "AttentionActor": "ranks", "ExpertActor": "ranks",
    "HAProxyManager": "Serve, Ray", "ProxyActor": "proxy", "haproxy": "HAProxy",
}  # fmt: skip


class Served:
    """`corral serve --detach` of a checkpoint under the name `bench`."""

    def __init__(self, directory: Path | str, flags: Sequence[str]) -> None:
        self._directory, self._flags = directory, flags
        self._bounds: subprocess.Popen[str] | None = None
        self.url, self.grpc = f"http://127.0.0.1:{PORTS[0]}", f"127.0.0.1:{PORTS[1]}"

    def __enter__(self) -> "Served":
        command = [sys.executable, "-m", "cluster.cli", "serve", str(self._directory), "--served-model-name", "bench"]
        command += ["--port", str(PORTS[0]), "--grpc-port", str(PORTS[1]), "--detach", *self._flags]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.ready_s = time.perf_counter() - began
        return self

    def __exit__(self, *_: object) -> None:
        if self._bounds is not None:
            self._bounds.kill()
            self._bounds.wait()
        subprocess.run([sys.executable, "-m", "cluster.cli", "stop", "--port", str(PORTS[0])], check=True)

    def processes(self) -> list[psutil.Process]:
        found = []
        session = StateFolder(PORTS[0]).read()
        assert session is not None
        for process in family_of(session):
            try:
                found.append(psutil.Process(process.pid))
            except psutil.NoSuchProcess:
                continue
        return found

    def memory_mib(self) -> float:
        """Proportional set size of all its processes."""
        return sum(process.memory_full_info().pss for process in self.processes()) / 2**20

    def cpu_s(self) -> Counter[str]:
        """Processor seconds that the processes of each part have taken, ended ones left out."""
        seconds: Counter[str] = Counter()
        for process in self.processes():
            try:
                times, title = process.cpu_times(), "".join(process.cmdline()[:1])
            except psutil.NoSuchProcess:
                continue
            part = next((part for mark, part in PARTS.items() if mark in title), "Serve, Ray")
            seconds[part] += times.user + times.system
        return seconds

    def pids(self, title: str) -> list[int]:
        """Processes whose title has `title` in it (Ray titles workers ray::Class.method), oldest first."""
        found = []
        for process in self.processes():
            try:
                if any(title in part for part in process.cmdline()[:1]):
                    found.append((process.create_time(), process.pid))
            except psutil.NoSuchProcess:
                continue
        return [pid for _, pid in sorted(found)]

    def scale(self, **bounds: int) -> None:
        """Has the router that runs take other keys of ScalingConfig: see `bounds.py`."""
        if self._bounds is None:
            command = [sys.executable, "-m", "benchmarks.bounds", str(PORTS[0])]
            self._bounds = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._bounds.stdin and self._bounds.stdout
        print(json.dumps(bounds), file=self._bounds.stdin, flush=True)
        if self._bounds.stdout.readline() != "ok\n":
            raise RuntimeError(f"no router took {bounds}")

    def hurt(self, title: str, how: signal.Signals = signal.SIGKILL) -> bool:
        """Signals the youngest process of that title; False if there is none."""
        pids = self.pids(title)
        if pids:
            os.kill(pids[-1], how)
        return bool(pids)
