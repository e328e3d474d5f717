"""`corral serve` and `stop`: a service on this machine.

Owns the flags, what a person sees while it starts, and the background. Ray is `cluster/servemain.py`'s, processes and
files are `cluster/session.py`'s.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, get_args, get_origin

import click
import httpx
import yaml

from actors.checkpoint.config import read_model_config
from actors.config import PipelineConfig
from actors.errors import ConfigError, UnavailableError
from actors.ingress.api_keys import ApiKeys
from cluster.hardware import local_machines
from cluster.private_ray import Front, ServicePorts, apply_environment, check_port, free_block
from cluster.session import Session, StateFolder, all_sessions, end_family, family_of, open_session, stop_session

START_TIMEOUT_S = 1800.0  # a checkpoint of hundreds of gigabytes takes its time
_POLL_S = 0.1
_REPORT_S = 10.0

# Flags are PipelineConfig's keys, which are vLLM's where it has one; keys without a line here are set by --set.
_HELP = {
    "served_model_name": "What clients call the model.",
    "max_model_len": "Tokens of prompt and output together; 0 is all that model and KV cache allow.",
    "max_num_seqs": "Requests that run at once, per attention rank.",
    "max_num_batched_tokens": "Tokens of one step, over all attention ranks.",
    "max_queued_requests": "Requests that may wait; more are refused at once.",
    "dtype": "Of weights that are not quantized; auto is the checkpoint's.",
    "device": "auto takes GPUs where there are any.",
    "layout": "auto is what `corral plan` shows.",
    "attention_ranks": "Processes that hold KV cache and dense weights.",
    "expert_ranks": "Processes that hold experts.",
    "attention_tp": "Ranks of one host that share one attention, each with a part of its heads and FFNs.",
    "expert_tp": "1, or attention_tp: each of these ranks has a slice of every expert instead of some whole ones.",
    "expert_replicas": "Copies of every expert, on different ranks.",
    "target_batch": "Requests at once for which the layout auto is chosen.",
    "kv_cache_bytes": "Per attention rank; 0 is what the memory leaves.",
    "gpu_memory_utilization": "Share of each GPU's memory to use.",
    "threads_per_rank": "CPU threads; 0 divides the cores.",
    "load": "dummy: random weights made on the device.",
}


def pipeline_options(command: Any) -> Any:
    """Adds one flag per key of PipelineConfig that _HELP lists; a flag that is not given is None."""
    by_name = {f.name: f for f in fields(PipelineConfig)}
    for name, text in reversed(_HELP.items()):
        annotation, default = by_name[name].type, by_name[name].default
        kind = click.Choice(get_args(annotation)) if get_origin(annotation) is not None else annotation
        text = f"{text} [default: {default}]" if default != "" else text
        command = click.option(f"--{name.replace('_', '-')}", name, type=kind, default=None, help=text)(command)
    return command


@click.command()
@click.argument("model", default="demo")
@pipeline_options
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key of the pipeline.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of HTTP and gRPC.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="HTTP.")
@click.option("--grpc-port", type=click.IntRange(1, 65535), default=9000, show_default=True)
@click.option("--metrics-port", type=click.IntRange(0, 65535), default=0, help="Prometheus; 0 is any free one.")
@click.option("--front", type=click.Choice(get_args(Front)), default="haproxy", show_default=True,
              help="What stands before the ingress; proxy is Ray Serve's own, in Python.")  # fmt: skip
@click.option("--api-keys-file", type=click.Path(exists=True, dir_okay=False, resolve_path=True),
              help="One API key per line; clients must show one.")  # fmt: skip
@click.option("--detach", is_flag=True, help="Return once the service answers, and leave it running.")
def serve(
    model: str,
    settings: tuple[str, ...],
    host: str,
    port: int,
    grpc_port: int,
    metrics_port: int,
    front: Front,
    api_keys_file: str | None,
    detach: bool,
    **flags: Any,
) -> None:
    """Serve MODEL over HTTP and gRPC: a checkpoint directory, or shape:NAME for random weights, or the tiny
    demonstration model that comes along if none is stated.

    The service has a Ray of its own; others on this machine are left alone. End it with Ctrl-C, or `corral stop`.
    """
    keys = {key: value for key, value in flags.items() if value is not None} | _parse_settings(settings)
    pipeline = PipelineConfig.parse({"model": model} | keys)
    ApiKeys.read(api_keys_file or "")  # so that a broken file is told at once
    args = {"pipeline": pipeline.as_dict(), "ingress": {"api_keys_file": api_keys_file or ""}}
    state = StateFolder(port)
    _refuse_second(state, port)
    ports = ServicePorts(host=host, http=port, grpc=grpc_port, metrics=metrics_port or free_block(1))
    for flag, number in (("port", ports.http), ("grpc-port", ports.grpc), ("metrics-port", ports.metrics)):
        check_port(host, number, flag)
    if detach:
        _serve_in_background(state)
    else:
        check_servable(pipeline)
        _serve_here(state, args, ports, front)


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="HTTP port of the service; all services if not stated.")
def stop(port: int | None) -> None:
    """End a service of `corral serve`, and see to it that nothing of it is left."""
    sessions = {p: session for p, session in all_sessions().items() if port in (None, p)}
    if not sessions:
        click.echo("nothing is served" if port is None else f"nothing is served on port {port}")
    for http_port, session in sessions.items():
        began_s = time.monotonic()
        killed = stop_session(session)
        StateFolder(http_port).remove()
        forced = f" ({killed} processes had to be killed)" if killed else ""
        click.echo(f"{session.http_url} ended in {time.monotonic() - began_s:.1f} s; nothing of it is left{forced}")


def check_servable(pipeline: PipelineConfig) -> None:
    """Does what the router will do first, so that a checkpoint that is broken or does not fit is told at once.

    Makes the model that shape:NAME stands for, if need be. Raises CheckpointError, ConfigError, LayoutError.
    """
    from actors.checkpoint.index import validate_checkpoint  # here: they import torch, and `corral stop` need not
    from actors.checkpoint.shape_models import resolve_model_directory
    from cluster.layout import resolve

    has_weights = pipeline.load == "checkpoint"
    directory = resolve_model_directory(pipeline.model, with_weights=has_weights)
    model = read_model_config(directory)
    if has_weights:
        validate_checkpoint(directory)
    click.echo(resolve(pipeline, model, local_machines(pipeline.device)).describe())


def _parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    parsed = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError("set", f"{setting!r} is not KEY=VALUE")
        parsed[key] = yaml.safe_load(value)
    return parsed


def _refuse_second(state: StateFolder, port: int) -> None:
    session = state.read()
    if session is not None and session.is_alive:
        raise ConfigError("port", f"{session.http_url} is served by process {session.pid}; `corral stop --port {port}`")


def _serve_here(state: StateFolder, args: dict[str, Any], ports: ServicePorts, front: Front) -> None:
    """Runs the service (`args` of actors/app.py) in this process until SIGINT or SIGTERM."""
    scratch = Path(tempfile.mkdtemp(prefix="corral-", dir="/tmp"))  # short: socket paths end at 107 bytes
    apply_environment(os.environ, scratch, front, scratch / "token", (ports.http, ports.grpc, ports.metrics))
    session = open_session(
        f"http://{_reachable(ports.host)}:{ports.http}",
        f"{_reachable(ports.host)}:{ports.grpc}",
        f"http://127.0.0.2:{ports.metrics}/metrics",
        scratch,
    )
    state.write(session)
    stopped = threading.Event()
    _end_on_signals(stopped)
    from cluster import servemain  # imports ray, which reads the environment as it is now

    try:
        servemain.start(args, ports, scratch)
        state.write(replace(session, ray_address=servemain.ray_address()))
        _end_on_signals(stopped)  # ray has set its own meanwhile
        wait_until_answering(session.http_url, lambda: True)
        click.echo(f"ready: HTTP {session.http_url}  gRPC {session.grpc_address}  metrics {session.metrics_url}")
        click.echo("Ctrl-C ends it")
        stopped.wait()
    finally:
        family = family_of(session)
        servemain.shut_down()
        end_family(session, family)
        shutil.rmtree(scratch, ignore_errors=True)
        state.forget()


def _end_on_signals(stopped: threading.Event) -> None:
    """The first SIGINT or SIGTERM ends the service, at any point of its start too."""

    def end(number: int, frame: FrameType | None) -> None:
        if not stopped.is_set():
            stopped.set()
            raise SystemExit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _serve_in_background(state: StateFolder) -> None:
    """Starts the same command without --detach as a session of its own, and waits until it answers."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    state.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    began_s = time.monotonic()
    with state.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        session = _recorded(state, process)
        wait_until_answering(session.http_url, lambda: process.poll() is None)
    except (UnavailableError, KeyboardInterrupt) as e:
        process.terminate()
        process.wait()
        tail = "\n".join(state.log.read_text(errors="replace").splitlines()[-15:])
        raise click.ClickException(f"the service did not start; the end of {state.log}:\n{tail}") from e
    click.echo(f"ready after {time.monotonic() - began_s:.1f} s: HTTP {session.http_url}  gRPC {session.grpc_address}")
    click.echo(f"process {session.pid}, log {state.log}; `corral stop` ends it")


def _recorded(state: StateFolder, process: "subprocess.Popen[bytes]") -> Session:
    while process.poll() is None:
        session = state.read()
        if session is not None and session.pid == process.pid:
            return session
        time.sleep(_POLL_S)
    raise UnavailableError("the service ended as it started")


def wait_until_answering(url: str, is_alive: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
    """Polls /health until it says 200, telling what it says meanwhile. Raises UnavailableError."""
    deadline_s, next_report_s, last = time.monotonic() + timeout_s, 0.0, ""
    while time.monotonic() < deadline_s:
        if not is_alive():
            raise UnavailableError("the service ended as it started")
        ready, news = health_of(url)
        if ready:
            return
        if news != last or time.monotonic() > next_report_s:
            click.echo(news)
            last, next_report_s = news, time.monotonic() + _REPORT_S
        time.sleep(_POLL_S)
    raise UnavailableError(f"no answer after {timeout_s:.0f} s")


def health_of(url: str) -> tuple[bool, str]:
    """Whether the service is ready, and what it says of itself in one line."""
    try:
        response = httpx.get(f"{url}/health", timeout=5.0, trust_env=False)
    except httpx.TransportError:
        return False, "starting"
    if response.status_code == 200:
        return True, "ready"
    if "json" not in response.headers.get("content-type", ""):
        return False, "starting"  # Serve's own answer, while the application does not run yet
    return False, f"not ready: {response.json()['error']['message']}"


def _reachable(host: str) -> str:
    """An address of this machine for a host that means all of them."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
