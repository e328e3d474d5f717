"""A service of `corral serve` to be measured: started in the background, ended with the context."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from cluster.session import StateFolder, family_of

PORTS = (18200, 19200)


class Served:
    """`corral serve --detach` of a checkpoint under the name `bench`."""

    def __init__(self, directory: Path | str, flags: Sequence[str]) -> None:
        self._directory, self._flags = directory, flags
        self.url, self.grpc = f"http://127.0.0.1:{PORTS[0]}", f"127.0.0.1:{PORTS[1]}"

    def __enter__(self) -> "Served":
        command = [sys.executable, "-m", "cluster.cli", "serve", str(self._directory), "--served-model-name", "bench"]
        command += ["--port", str(PORTS[0]), "--grpc-port", str(PORTS[1]), "--detach", *self._flags]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.ready_s = time.perf_counter() - began
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([sys.executable, "-m", "cluster.cli", "stop", "--port", str(PORTS[0])], check=True)

    def processes(self) -> list[psutil.Process]:
        session = StateFolder(PORTS[0]).read()
        assert session is not None
        found = []
        for process in family_of(session):
            try:
                found.append(psutil.Process(process.pid))
            except psutil.NoSuchProcess:
                continue
        return found

    def memory_mib(self) -> float:
        """Proportional set size of all its processes."""
        return sum(process.memory_full_info().pss for process in self.processes()) / 2**20

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

    def hurt(self, title: str, how: signal.Signals = signal.SIGKILL) -> int:
        """Signals the youngest process of that title."""
        pid = self.pids(title)[-1]
        os.kill(pid, how)
        return pid
