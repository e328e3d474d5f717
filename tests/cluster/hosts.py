"""Hosts on one machine: network, process, mount and name spaces with an sshd each, plugged into one switch.

Owns what makes them look like machines of their own. The namespaces have no names and the switch is in one of its own,
so nothing is visible outside, and all of it ends with the processes that hold it, which end with this one. Knows
nothing of Ray.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("sshd", "ssh-keygen", "rsync", "unshare", "nsenter", "setpriv", "ip")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
SPACES = ("--net", "--mount", "--uts", "--ipc")  # of a host; and one of processes
PROBE = [
    *("unshare", *SPACES, "--pid", "--fork", "sh", "-c"),
    f"PATH=$PATH:{SBIN}; mount -t proc proc /proc && ip link add switch type bridge"
    " && ip link add port type veth peer name eth0",
]
PREFIX = "10.77.0"
GATEWAY = f"{PREFIX}.254"  # leads nowhere: Ray asks the routing table for its own address
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0

SSHD_CONFIG = """\
Port 22
HostKey /root/.ssh/hostkey
AuthorizedKeysFile /root/.ssh/id_ed25519.pub
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""


def missing_tools() -> list[str]:
    """What this machine lacks for hosts: tools, or else the right to make them."""
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]
    if os.geteuid() != 0:
        return [*missing, "root"]
    if not missing and subprocess.run(PROBE, capture_output=True).returncode:
        return ["namespaces, mounts, bridges or veth pairs"]  # which root of a container may not be allowed to make
    return missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A running host. `pid` is that of its first process, which holds its namespaces."""

    name: str
    address: str
    folder: Path
    pid: int

    @property
    def home(self) -> Path:
        """root's home, as seen from outside."""
        return self.folder / "root"

    def command(self, script: str, env: Mapping[str, str] | None = None) -> list[str]:
        """What runs `script` in a shell of the host's."""
        variables = {"HOME": "/root", "PATH": f"/usr/local/bin:/usr/bin:/bin:{SBIN}", "LANG": "C.UTF-8", **(env or {})}
        return [
            *("nsenter", "--target", str(self.pid), "--mount", "--uts", "--ipc", "--net", "--pid"),
            *("env", "-i", *(f"{key}={value}" for key, value in variables.items())),
            *("bash", "-c", script),
        ]

    def run(self, script: str, timeout_s: float = 60.0) -> str:
        """Runs `script` on the host; returns what it printed. AssertionError if it fails or takes longer."""
        return self.checked(self.command(script), timeout_s)

    def checked(self, command: Sequence[str], timeout_s: float) -> str:
        """As `run`, of what `command` returned."""
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            output = (e.stdout or b"").decode(errors="replace")
            raise AssertionError(f"{self.name}: {command[-1]!r} took longer than {timeout_s} s\n{output}") from e
        assert done.returncode == 0, f"{self.name}: {command[-1]!r} exited with {done.returncode}\n{done.stdout}"
        return done.stdout

    def processes(self) -> list[str]:
        """Command lines of all that runs there but sshd, which every host has."""
        listed = self.run("for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f 2>/dev/null && echo; done").splitlines()
        ours = ("sshd", "bash -c for f in", "/usr/sbin/sshd", "tr ")
        return [line.strip() for line in listed if line.strip() and not line.startswith(ours)]


@contextmanager
def hosts(folder: Path, names: Sequence[str], shared: Path) -> Iterator["Network"]:
    """Hosts of these names, with addresses from 10.77.0.1 on. All read `shared` under /mnt. `folder` is made, and is
    gone when they are; after a failure it stays, for the logs in it.
    """
    folder.mkdir(parents=True)
    network = Network(folder, shared)
    try:
        network.start(names)
        yield network
    finally:
        network.stop()
    shutil.rmtree(folder)


class Network:
    """The hosts and the switch between them."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self._folder = folder
        self._shared = shared
        self._holders: list[subprocess.Popen[bytes]] = []
        self._switch = 0
        self.key = folder / "id_ed25519"  # lets root in on every host
        self.hosts: dict[str, Host] = {}

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def start(self, names: Sequence[str]) -> None:
        for file in (self._folder / "hostkey", self.key):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
        self._switch = self._hold(["--net"], ["sleep", "infinity"])
        self._plug_in(
            "ip link add switch type bridge && ip link set switch up && ip addr add $0/24 dev switch", GATEWAY
        )
        addresses = {name: f"{PREFIX}.{idx}" for idx, name in enumerate(names, start=1)}
        for name, address in addresses.items():
            self.hosts[name] = self._start_host(name, address, addresses)
        self._await_sshd()

    def stop(self) -> None:
        """Ends every process of every host."""
        pids = [host.pid for host in self.hosts.values()]
        for holder in self._holders:
            holder.kill()
            holder.wait()
        began = time.monotonic()
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() - began < STOP_TIMEOUT_S, "a host does not end"
            time.sleep(0.05)

    def cut_off(self, name: str) -> None:
        """Nothing reaches the host any more, and nobody is told: its link stays up."""
        self._plug_in("ip link set $0 nomaster", f"port-{name}")

    def reconnect(self, name: str) -> None:
        self._plug_in("ip link set $0 master switch", f"port-{name}")

    def _start_host(self, name: str, address: str, addresses: Mapping[str, str]) -> Host:
        folder = self._folder / name
        self._furnish(folder, addresses)
        keep = ":".join({sys.base_prefix, sys.prefix, str(Path(__file__).parents[2])})
        script = [str(Path(__file__).with_name("host.sh")), str(folder), str(self._shared), keep]
        pid = self._hold(SPACES, script, folder / "sshd.log")
        self._plug_in(
            "ip link add $0 type veth peer name eth0 netns $1 && ip link set $0 master switch up",
            f"port-{name}",
            str(pid),
        )
        inside = f"ip link set eth0 up && ip addr add {address}/24 dev eth0 && ip route add default via {GATEWAY}"
        subprocess.run(["nsenter", "--target", str(pid), "--net", "sh", "-c", inside], check=True)
        return Host(name=name, address=address, folder=folder, pid=pid)

    def _furnish(self, folder: Path, addresses: Mapping[str, str]) -> None:
        for part in ("root/.ssh", "tmp", "etc"):
            (folder / part).mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        (folder / "root/.ssh").chmod(0o700)
        shutil.copy(self._folder / "hostkey", folder / "root/.ssh/hostkey")
        shutil.copy(self._folder / "id_ed25519.pub", folder / "root/.ssh/id_ed25519.pub")
        (folder / "root/.ssh/sshd_config").write_text(SSHD_CONFIG)
        known = [("localhost", "127.0.0.1"), *addresses.items()]
        (folder / "etc/hosts").write_text("".join(f"{address} {host}\n" for host, address in known))
        (folder / "etc/resolv.conf").write_text("")  # no name server: names are those of /etc/hosts

    def _hold(self, spaces: Sequence[str], command: Sequence[str], log: Path | None = None) -> int:
        """Runs `command` as first process of new namespaces that end with this process; returns its id out here."""
        output = log.open("wb") if log else subprocess.DEVNULL
        holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "--pid", "--fork", "--kill-child", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        self._holders.append(holder)
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        began = time.monotonic()
        while not (pids := children.read_text().split()):
            assert holder.poll() is None, f"{command} ended: {log.read_text() if log else ''}"
            assert time.monotonic() - began < START_TIMEOUT_S, f"{command} does not start"
            time.sleep(0.01)
        return int(pids[0])

    def _plug_in(self, script: str, *args: str) -> None:
        """Runs `script` where the switch is."""
        subprocess.run(["nsenter", "--target", str(self._switch), "--net", "sh", "-c", script, *args], check=True)

    def _await_sshd(self) -> None:
        began = time.monotonic()
        for host in self.hosts.values():
            log = host.folder / "sshd.log"
            while "listening" not in log.read_text():
                alive = Path(f"/proc/{host.pid}").exists() and time.monotonic() - began < START_TIMEOUT_S
                assert alive, f"{host.name} has no sshd: {log.read_text()}"
                time.sleep(0.02)


def quoted(*words: str | Path) -> str:
    """A shell's spelling of a command."""
    return shlex.join(str(word) for word in words)
