"""A service of `corral serve` to be measured: started in the background, ended with the context."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from cluster.private_ray import forget_foreign
from cluster.session import Session, StateFolder, family_of

PORTS = (18200, 19200)
SCALE_TIMEOUT_S = 30.0
PARTS = {  # of a service, by what their processes' titles have in them
    "corral:Ingress": "ingress", "corral:Router": "router", "AttentionActor": "ranks", "ExpertActor": "ranks",
    "HAProxyManager": "Serve, Ray", "ProxyActor": "proxy", "haproxy": "HAProxy",
}  # fmt: skip


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
        if "ray" in sys.modules:  # see `_connect`
            sys.modules["ray"].shutdown()
        subprocess.run([sys.executable, "-m", "cluster.cli", "stop", "--port", str(PORTS[0])], check=True)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in family_of(self._session()):
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
        """Has the router that runs take other keys of ScalingConfig, until it dies: what `serve deploy` does with them.

        Raises TimeoutError if none answers.
        """
        self._connect()
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        async def ask() -> None:
            await serve.get_deployment_handle("Router", app_name="corral").reconfigure.remote(bounds)

        ends_s = time.monotonic() + SCALE_TIMEOUT_S
        while time.monotonic() < ends_s:
            try:
                return asyncio.run(asyncio.wait_for(ask(), SCALE_TIMEOUT_S / 3))
            except (RayError, RayServeException, TimeoutError):  # it was killed just now
                time.sleep(0.5)
        raise TimeoutError(f"no router took {bounds}")

    def _connect(self) -> None:
        """Makes this process a driver of the service's Ray, which reads the environment as it is imported."""
        while not (session := self._session()).ray_address:  # it answers before all of Serve says that it runs
            time.sleep(0.1)
        forget_foreign(os.environ)
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(session.scratch) / "token")}
        import ray

        if not ray.is_initialized():
            ray.init(address=session.ray_address, namespace="corral", log_to_driver=False)

    def _session(self) -> Session:
        session = StateFolder(PORTS[0]).read()
        assert session is not None
        return session

    def hurt(self, title: str, how: signal.Signals = signal.SIGKILL) -> int:
        """Signals the youngest process of that title."""
        pid = self.pids(title)[-1]
        os.kill(pid, how)
        return pid
