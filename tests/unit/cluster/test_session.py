"""Processes and files of a service: found by mark and by descent, ended for certain, forgotten on purpose."""

import os
import secrets
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import session as sessions
from cluster.session import MARK, Session, StateFolder, all_sessions, family_of, stop_session

# A service of two: a child that bears the mark, and one that lost it and ignores SIGTERM. Its end is not orderly.
_SERVICE = """
    import os, signal, subprocess, sys, time
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    for environment in ({**os.environ, "CORRAL_SESSION": sys.argv[1]}, {"PATH": os.environ["PATH"]}):
        subprocess.Popen([sys.executable, "-c", child], env=environment, stdout=subprocess.PIPE).stdout.readline()
    print("ready", flush=True)
    signal.pause()
"""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Session]:
    session_id = secrets.token_hex(8)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_SERVICE), session_id], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    session = Session(
        session_id=session_id,
        pid=process.pid,
        started_ticks=sessions._started_ticks(process.pid),
        http_url="http://127.0.0.1:1",
        grpc_address="127.0.0.1:2",
        metrics_url="",
        scratch=str(scratch),
    )
    family = family_of(session)
    yield session
    for member in family:
        if member.is_alive:
            os.kill(member.pid, 9)
    process.wait(10)
    process.stdout.close()


def test_the_family_is_marked_processes_and_descendants(service: Session) -> None:
    family = family_of(service)
    assert service.pid in {member.pid for member in family}
    assert len(family) == 3
    assert os.getpid() not in {member.pid for member in family}


def test_stop_leaves_no_process_even_of_those_that_ignore_it(service: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions.end_family, "__defaults__", (0.1,))
    family = family_of(service)
    assert stop_session(service) == 2
    assert not any(member.is_alive for member in family)
    assert not Path(service.scratch).exists()
    assert stop_session(service) == 0


def test_an_orphan_without_a_mark_is_found_by_its_open_files(service: Session, tmp_path: Path) -> None:
    log = tmp_path / "scratch" / "agent.log"
    command = ["bash", "-c", f"sleep 600 >{log} 2>&1 & echo $!"]
    orphan = int(subprocess.run(command, env={}, capture_output=True, check=True).stdout)
    assert orphan in {member.pid for member in family_of(service)}
    stop_session(service)
    assert sessions._started_ticks(orphan) == -1


def test_a_later_process_with_the_same_id_is_left_alone(service: Session) -> None:
    later = Session(
        **{f: getattr(service, f) for f in Session.__slots__}
        | {"started_ticks": 1, "session_id": "other", "scratch": "/nowhere"}
    )
    assert not later.is_alive
    assert stop_session(later) == 0
    assert service.is_alive


def test_records_are_private_and_survive_a_reader(tmp_path: Path, service: Session) -> None:
    environment = {"XDG_STATE_HOME": str(tmp_path)}
    state = StateFolder(8000, environment)
    assert state.read() is None and all_sessions(environment) == {}
    state.write(service)
    assert all_sessions(environment) == {8000: service}
    assert state.path == tmp_path / "corral" / "8000"
    assert state.path.stat().st_mode & 0o077 == 0
    state.forget()
    assert state.read() is None and state.path.is_dir()
    state.remove()
    assert not state.path.exists()


def test_state_is_kept_at_home_where_nothing_else_is_said(tmp_path: Path) -> None:
    assert StateFolder(1, {"HOME": str(tmp_path)}).path == tmp_path / ".local" / "state" / "corral" / "1"


def test_the_mark_is_what_children_inherit() -> None:
    assert MARK == "CORRAL_SESSION"
