"""What an operator of `cluster/local.yaml` does, from a host that is no Ray node.

Owns the operator's files (cluster file, token, key), commands, and what they see meanwhile. What is asserted about
them is the tests'.
"""

import json
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hosts import Host, quoted

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PYTHON = Path(sys.executable)
HTTP_PORT, GRPC_PORT = 8000, 9000


def install_dependencies(home: Path) -> None:
    """Leaves on a host what its first `ray up` would have downloaded: a virtual environment that sees this one's
    packages, though not Corral, which `ray up` then installs as anywhere.
    """
    environment = home / ".corral" / "venv"
    venv.create(environment, symlinks=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (ours,) = Path(sys.prefix).glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{ours}\n")
    for script in ("pip", "ray", "serve"):
        body = (PYTHON.parent / script).read_text().partition("\n")[2]
        copy = environment / "bin" / script
        copy.write_text(f"#!/root/.corral/venv/bin/python\n{body}")
        copy.chmod(0o755)
    # pip's 0 means no isolation: what builds the package is there, and there is no index to have it from
    (home / ".bashrc").write_text("export PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 PIP_DISABLE_PIP_VERSION_CHECK=1\n")


def cluster_file(head: Host, workers: Sequence[Host], **min_workers: int) -> dict[str, Any]:
    """cluster/local.yaml with these hosts, each with room for one expert rank, and all else on the head."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster/local.yaml").read_text())
    config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address for worker in workers]}
    config["max_workers"] = len(workers)
    config["available_node_types"]["head"]["resources"] = {"CPU": 4, "front": 1}
    config["available_node_types"]["host"] |= {
        "resources": {"CPU": 4, "expert_slot": 1},
        "max_workers": len(workers),
        **min_workers,
    }
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):  # Ray's least, and we share the memory
        config[key] = [command.replace("store-memory=500000000", "store-memory=80000000") for command in config[key]]
    return config


def serve_file(model: str, max_num_seqs: int, **scaling: float) -> dict[str, Any]:
    """deploy/local.yaml for clients elsewhere, with a place for every rank and these keys of ScalingConfig."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/local.yaml").read_text())
    config["http_options"]["host"] = "0.0.0.0"
    (application,) = config["applications"]
    on_head = {"num_cpus": 0.1, "resources": {"front": 0.01}}
    application["deployments"] = [
        {"name": "Ingress", "ray_actor_options": on_head},
        {"name": "Router", "ray_actor_options": on_head, "user_config": scaling},
    ]
    application["args"]["pipeline"] |= {
        "model": model,
        "max_num_seqs": max_num_seqs,
        "threads_per_rank": 1,
        "attention_resources": {"front": 0.1},
        "expert_resources": {"expert_slot": 1},
    }
    return config


class Operator:
    """Runs the commands of docs/operations.md, and says how long each phase took."""

    def __init__(self, host: Host, head: Host, config: str = "~/cluster.yaml") -> None:
        self.host = host
        self.head = head
        self.seconds: dict[str, float] = {}
        self._config = config

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        print(f"{self.seconds[name]:6.1f} s  {name}", flush=True)

    @property
    def url(self) -> str:
        return f"http://{self.head.address}:{HTTP_PORT}"

    @property
    def grpc_address(self) -> str:
        return f"{self.head.address}:{GRPC_PORT}"

    def prepare(self, key: Path) -> None:
        """The key that opens the hosts, and the token."""
        (self.host.home / ".ssh/id_ed25519").write_bytes(key.read_bytes())
        (self.host.home / ".ssh/id_ed25519").chmod(0o600)
        self.sh("mkdir -p ~/.corral && (umask 077; openssl rand -hex 32 > ~/.corral/ray-token)")

    def write(self, name: str, config: dict[str, Any]) -> None:
        """A YAML file in the operator's home."""
        (self.host.home / name).write_text(yaml.safe_dump(config, sort_keys=False))

    def command(self, script: str) -> list[str]:
        """A command in the repository's root, with the operator's own ray and corral on the path."""
        environment = {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{PYTHON.parent}:/usr/bin:/bin",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        return self.host.command(f"cd {quoted(ROOT)} && {script}", environment)

    def sh(self, script: str, timeout_s: float = 60.0) -> str:
        """Runs it; returns what it printed. AssertionError if it fails or takes longer."""
        return self.host.checked(self.command(script), timeout_s)

    def up(self) -> str:
        return self.sh(f"ray up -y --no-config-cache {self._config}", 180.0)

    def down(self) -> str:
        return self.sh(f"ray down -y {self._config}", 120.0)

    def on_head(self, command: str, timeout_s: float = 60.0) -> str:
        return self.sh(f"ray exec --no-config-cache {self._config} {quoted(command)}", timeout_s)

    def copy_to_head(self, path: str | Path) -> None:
        """Into root's home there."""
        self.sh(f"ray rsync-up {self._config} {path} /root/{Path(path).name}")

    def deploy(self, config: dict[str, Any]) -> str:
        self.write("deploy.yaml", config)
        self.copy_to_head("/root/deploy.yaml")
        return self.on_head("serve deploy ~/deploy.yaml")

    def ask(self) -> str:
        """`corral ask`, over HTTP and gRPC."""
        where = quoted("--url", self.url, "--grpc", self.grpc_address)
        return self.sh(f"python -m cluster.cli ask {where} --max-tokens 8 'Are you there?'")

    def observe(self) -> "Lines":
        """What router and Ray say of themselves, from now on."""
        return Lines(self.head.command("bash --login -i -c '. ~/.bashrc; exec python ~/observe.py'"))

    def load(self, num_streams: int) -> "Lines":
        """Clients that ask until `finish`."""
        return Lines(self.command(quoted("python", HERE / "load.py", self.url, self.grpc_address, str(num_streams))))


class Lines:
    """A program that runs in the background and prints a line of JSON now and then. Its input stays open."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[dict[str, Any]] = []
        self._complaints: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._listen, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def last(self) -> dict[str, Any]:
        """The latest line. AssertionError if there is none, or the program ended."""
        assert self._process.poll() is None, "".join(self._complaints[-20:])
        assert self.lines, "nothing yet"
        return self.lines[-1]

    def finish(self, timeout_s: float) -> list[dict[str, Any]]:
        """Ends the program's input and waits for its end; all its lines."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout_s) == 0, "".join(self._complaints[-20:])
        for reader in self._readers:
            reader.join()
        return self.lines

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self.lines.append(json.loads(line))

    def _listen(self) -> None:
        assert self._process.stderr is not None
        self._complaints.extend(self._process.stderr)


def eventually(what: str, timeout_s: float, check: Callable[[], Any], every_s: float = 0.25) -> Any:
    """The first true value of `check`, which may fail until then. AssertionError after `timeout_s`."""
    began = time.monotonic()
    while True:
        problem: object = "no"
        try:
            if value := check():
                return value
        except AssertionError as e:
            problem = e
        assert time.monotonic() - began < timeout_s, f"{what}: not within {timeout_s:.0f} s: {problem}"
        time.sleep(every_s)
