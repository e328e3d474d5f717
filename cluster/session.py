"""A service of `corral serve` as an operating-system fact: its files, its processes, and its end.

Owns the state folder of a service (one per HTTP port), the mark by which its processes are known, and the guarantee
that after `stop` none of them is left. Linux only (/proc). Knows nothing of Ray or of what the processes do.
"""

import ctypes
import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

MARK = "CORRAL_SESSION"  # environment variable that every process of a service inherits
STOP_TIMEOUT_S = 30.0  # a service that has not ended by itself by then is killed
KILL_TIMEOUT_S = 10.0
_POLL_S = 0.1
_PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A running service. `started_ticks` tells its process from a later one with the same id."""

    session_id: str
    pid: int
    started_ticks: int
    http_url: str
    grpc_address: str
    metrics_url: str
    scratch: str  # folder of Ray's session; goes with the service
    ray_address: str = ""  # once Ray runs

    @property
    def is_alive(self) -> bool:
        return _started_ticks(self.pid) == self.started_ticks


class StateFolder:
    """Where the service on one HTTP port keeps its record and, when it runs in the background, its log."""

    def __init__(self, http_port: int, environment: Mapping[str, str] = os.environ) -> None:
        base = environment.get("XDG_STATE_HOME") or str(Path(environment.get("HOME", "/")) / ".local" / "state")
        self.path = Path(base) / "corral" / str(http_port)
        self.log = self.path / "serve.log"
        self._record = self.path / "session.json"

    def read(self) -> Session | None:
        """The service that was recorded last, alive or not."""
        try:
            return Session(**json.loads(self._record.read_text()))
        except FileNotFoundError:
            return None

    def write(self, session: Session) -> None:
        """Records the calling process's service; only its owner may read the folder."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(session)))
        partial.replace(self._record)

    def forget(self) -> None:
        """Removes the record, keeping the log."""
        self._record.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def all_sessions(environment: Mapping[str, str] = os.environ) -> dict[int, Session]:
    """Every recorded service of this user, by HTTP port."""
    base = StateFolder(0, environment).path.parent
    ports = sorted(int(folder.name) for folder in base.glob("*") if folder.name.isdecimal())
    found = {port: StateFolder(port, environment).read() for port in ports}
    return {port: session for port, session in found.items() if session is not None}


def open_session(http_url: str, grpc_address: str, metrics_url: str, scratch: Path) -> Session:
    """Marks this process's future children, makes their orphans its own, and describes it as a session."""
    session_id = secrets.token_hex(8)
    os.environ[MARK] = session_id
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid = os.getpid()
    return Session(
        session_id=session_id,
        pid=pid,
        started_ticks=_started_ticks(pid),
        http_url=http_url,
        grpc_address=grpc_address,
        metrics_url=metrics_url,
        scratch=str(scratch),
    )


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from a later one with the same id by when it started."""

    pid: int
    started_ticks: int

    @property
    def is_alive(self) -> bool:
        return _started_ticks(self.pid) == self.started_ticks


def stop_session(session: Session) -> int:
    """Ends a service: asks its process, waits, kills what is left, removes its scratch folder.

    Returns how many processes had to be killed. Raises TimeoutError if some survive even that.
    """
    family = family_of(session)
    if session.is_alive:
        os.kill(session.pid, signal.SIGTERM)
        _wait(lambda: not session.is_alive, STOP_TIMEOUT_S)
    if session.is_alive:
        os.kill(session.pid, signal.SIGKILL)
    killed = end_family(session, family)
    shutil.rmtree(session.scratch, ignore_errors=True)
    return killed


def family_of(session: Session) -> frozenset[Process]:
    """All processes of a service but the calling one: its process, what descends from it, what bears its mark, and
    what has a file of its scratch folder open.

    No way is enough: one whose parent died is nobody's child, one that renames itself may overwrite its mark.
    """
    mark = f"{MARK}={session.session_id}".encode()
    children: dict[int, list[int]] = {}
    family: set[int] = set()
    for pid in _process_ids():
        children.setdefault(_parent(pid), []).append(pid)
        if mark in _environment(pid).split(b"\0") or _has_open(pid, f"{session.scratch}/"):
            family.add(pid)
    grown = [session.pid] if session.is_alive else []
    while grown:
        pid = grown.pop()
        family.add(pid)
        grown += children.get(pid, ())
    family.discard(os.getpid())
    return frozenset(Process(pid, ticks) for pid in family if (ticks := _started_ticks(pid)) >= 0)


def end_family(session: Session, family: frozenset[Process], grace_s: float = 3.0) -> int:
    """Waits `grace_s` for a service's processes to end, then kills the rest. Returns the number killed.

    `family` was taken while all of them still lived. Raises TimeoutError if some do not end.
    """

    def left() -> set[Process]:
        return {process for process in family | family_of(session) if process.is_alive}

    _wait(lambda: not left(), grace_s)
    killed: set[Process] = set()
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    while living := left():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"processes {sorted(process.pid for process in living)} do not end")
        for process in living:
            _kill(process.pid)
        killed |= living
        time.sleep(_POLL_S)
    return len(killed)


def _process_ids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""  # it ended meanwhile (a zombie has no environment), or is another user's


def _has_open(pid: int, folder: str) -> bool:
    """Whether the process has a file under `folder` open; False if it ended meanwhile or is another user's."""
    try:
        links = list(Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return any(_target(link).startswith(folder) for link in links)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""  # closed meanwhile


def _started_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot; -1 if there is none, or it is a zombie."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] != "Z" else -1


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else -1


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself


def _wait(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
