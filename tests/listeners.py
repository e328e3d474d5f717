"""What the processes of a service listen on, and whether docs/security.md says so."""

import contextlib
import socket
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import psutil

DOCUMENT = Path(__file__).parents[1] / "docs" / "security.md"
SIGNATURE = b"\xff" + bytes(8) + b"\x7f\x03"  # the begin of a ZMTP 3 greeting, which is answered with the whole of one
METHODS = (
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.ReporterService/HealthCheck",
    "/ray.rpc.RayletDriver/ClusterInfo",
    "/ray.serve.ASGIService/HandleRequest",
)


@dataclass(frozen=True)
class Row:
    """One row of the document's table: one port of one process."""

    process: str
    purpose: str
    address: str  # all, node, front or loopback
    heard: str  # token, secret, clients or anyone


@dataclass(frozen=True)
class Listener:
    process: str
    ip: str
    port: int


def documented() -> list[Row]:
    section = DOCUMENT.read_text().partition("## What listens where")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    return [Row(process.strip("`"), purpose, address, heard) for process, purpose, address, _, heard, _ in cells[2:]]


def listeners(family: Iterable[psutil.Process]) -> list[Listener]:
    found = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            found += [
                Listener(title, connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
    return found


def address_of(listener: Listener, node: str) -> tuple[str, ...]:
    """What the document may call the listener's address."""
    if listener.ip in ("::", "0.0.0.0"):
        return ("all",)
    return ("node",) if listener.ip == node else ("front", "loopback") if listener.ip == "127.0.0.1" else ()


def undocumented(found: Iterable[Listener], node: str) -> list[Listener]:
    """Listeners for which the table has no row left: each port of a process takes one."""
    rows, left = documented(), []
    by_process: dict[str, list[Listener]] = {}
    for listener in found:
        by_process.setdefault(listener.process, []).append(listener)
    for process, ours in by_process.items():
        free = Counter(row.address for row in rows if row.process in process)
        for listener in ours:
            address = next((name for name in address_of(listener, node) if free[name] > 0), None)
            if address is None:
                left.append(listener)
            else:
                free[address] -= 1
    return left


def too_open(found: Iterable[Listener], node: str) -> list[Listener]:
    """Listeners that hear strangers where the table says that they do not."""
    rows, left = documented(), []
    for process in {listener.process for listener in found}:
        for address in ("all", "node"):
            ours = [x for x in found if x.process == process and address in address_of(x, node)]
            allowed = [r for r in rows if r.process in process and r.address == address]
            open_rows = sum(row.heard in ("anyone", "clients") for row in allowed)
            http = any(row.process.startswith(("ray::Dash", "ray::Runtime")) for row in allowed)
            opened = [listener for listener in ours if hears_strangers(listener, node, http)]
            left += opened if len(opened) > open_rows else []
    return left


def hears_strangers(listener: Listener, node: str, http: bool) -> bool:
    """Whether the port does more than refuse somebody who knows neither token nor secret."""
    ip = node if listener.ip in ("::", "0.0.0.0") else listener.ip
    with socket.create_connection((ip, listener.port), timeout=5) as connection:
        connection.settimeout(0.3)
        try:
            first = connection.recv(64)
        except TimeoutError:
            first = b""
        if first.startswith(b"\xff"):  # ZMTP
            connection.sendall(SIGNATURE)
            connection.settimeout(5)
            while len(first) < 64 and (more := connection.recv(64)):
                first += more
            return first[12:32].rstrip(b"\0") != b"CURVE"
    if first:  # HTTP/2 servers speak first
        return not asks_for_token(f"{ip}:{listener.port}")
    return not (http and httpx.get(f"http://{ip}:{listener.port}/nothing", timeout=5).status_code == 401)


def asks_for_token(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        for method in METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=5)
            except grpc.RpcError as e:
                if e.code() is grpc.StatusCode.UNAUTHENTICATED:
                    return True
    return False
