"""A Ray of one node for tests that deploy to it with `serve deploy`, as an operator would."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from service import free_port

from cluster.private_ray import apply_environment

SCRIPTS = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RayHead:
    """A node that runs, and the ports that a deployed service listens on."""

    process: subprocess.Popen[bytes]
    folder: Path
    environment: dict[str, str]
    dashboard_url: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def deploy(self, pipeline: dict[str, Any], **router: Any) -> None:
        """Writes what an operator would, and hands it to `serve deploy`. `router` is the Router's user_config."""
        config = yaml.safe_load((ROOT / "deploy" / "local.yaml").read_text())
        config["http_options"]["port"], config["grpc_options"]["port"] = self.http_port, self.grpc_port
        application = config["applications"][0]
        application["args"] = {"pipeline": pipeline}
        if router:
            application["deployments"] = [{"name": "Router", "user_config": router}]
        file = self.folder / "deploy.yaml"
        file.write_text(yaml.safe_dump(config))
        self.run("serve", "deploy", "-a", self.dashboard_url, str(file))

    def run(self, program: str, *args: str) -> str:
        done = subprocess.run(
            [SCRIPTS / program, *args], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pids(self, title: str) -> list[int]:
        """Workers whose title contains `title`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in process.cmdline()[0]:
                    found.append(process.pid)
            except (psutil.NoSuchProcess, IndexError):
                continue
        return sorted(found)

    def wait_healthy(self, timeout_s: float) -> None:
        def is_healthy() -> bool:
            try:
                return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
            except httpx.HTTPError:
                return False

        self.wait_until(is_healthy, timeout_s)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        ends_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < ends_s, f"not so within {timeout_s} s"
            time.sleep(0.2)


@contextmanager
def ray_head(folder: Path) -> Iterator[RayHead]:
    """Runs `ray start --head`, and ends all of its processes afterwards."""
    environment = dict(os.environ)
    scratch = Path(f"/tmp/ray-head-{os.getpid()}")  # socket paths are short
    scratch.mkdir()
    apply_environment(environment, scratch, "proxy", folder / "token")
    ports = {flag: free_port() for flag in ("--port", "--dashboard-port", "--dashboard-agent-listen-port",
                                             "--metrics-export-port")}  # fmt: skip
    command = [str(SCRIPTS / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus", "16",
               "--node-ip-address", "127.0.0.2", "--include-dashboard", "true", "--dashboard-host", "127.0.0.1",
               "--object-store-memory", "100000000", "--ray-client-server-port", str(free_port()),
               "--temp-dir", str(scratch / "ray")]  # fmt: skip
    for flag, port in ports.items():
        command += [flag, str(port)]
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=(folder / "ray.log").open("wb"), stderr=subprocess.STDOUT
    )
    head = RayHead(
        process, folder, environment, f"http://127.0.0.1:{ports['--dashboard-port']}", free_port(), free_port(),
        ports["--metrics-export-port"],
    )  # fmt: skip
    try:
        _wait_for_dashboard(head)
        yield head
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=5)
        for orphan in left:
            orphan.kill()
        process.wait(10)
        shutil.rmtree(scratch, ignore_errors=True)


def _wait_for_dashboard(head: RayHead) -> None:
    ends_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < ends_s:
        try:
            httpx.get(head.dashboard_url, timeout=2)
            return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise AssertionError((head.folder / "ray.log").read_text()[-3000:])
