"""`corral status`: what a pipeline is doing, from its router.

Owns the tables. Where figures come from is `cluster/placement.py`'s, services of this machine `cluster/session.py`'s.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import click
from rich import box
from rich.console import Console
from rich.table import Table

from actors.types import EMPTY_SLOT
from cluster.commands.serve import health_of
from cluster.private_ray import join_environment
from cluster.session import Session, all_sessions

HOTTEST = 5  # experts that are named, per layer


@click.command()
@click.option("--address", help="Ray's address, `auto` on a node of a cluster; else the services of this machine.")
@click.option("--application", default="corral", show_default=True, help="Name of the Serve application.")
@click.option("--json", "as_json", is_flag=True, help="The router's own figures.")
def status(address: str | None, application: str, as_json: bool) -> None:
    """Show epoch, ranks, slots, load and the last changes of a pipeline.

    Without --address: of each service of `corral serve` on this machine.
    """
    if address:
        _show(_snapshot(address, application), as_json)
        return
    sessions = all_sessions()
    if not sessions:
        click.echo("nothing is served here; --address auto asks the cluster that this machine belongs to")
    for session in sessions.values():
        _show_session(session, application, as_json)


def _show_session(session: Session, application: str, as_json: bool) -> None:
    state = health_of(session.http_url)[1] if session.is_alive else "gone without a stop; `corral stop` cleans up"
    click.echo(
        f"{session.http_url}  gRPC {session.grpc_address}  process {session.pid}  {state}", err=as_json
    )  # the figures alone are for programs
    if session.is_alive and session.ray_address:
        join_environment(os.environ, Path(session.scratch) / "token")
        _show(_snapshot(session.ray_address, application), as_json)


def _snapshot(address: str, application: str) -> dict[str, Any]:
    from cluster.placement import read_snapshot  # imports ray, which reads the environment as it is now

    return read_snapshot(address, application)


def _show(snapshot: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(snapshot))
        return
    console = Console()
    console.print(headline(snapshot), highlight=False)
    for table in (ranks_table(snapshot), experts_table(snapshot), changes_table(snapshot)):
        if table.row_count:
            console.print(table)
    if phases := last_phases(snapshot):
        console.print(phases, highlight=False)


def headline(snapshot: dict[str, Any]) -> str:
    """Two lines: what serves, and what is wanted."""
    if not snapshot:
        return "the router has just started"
    load, goal = snapshot["load"], snapshot["goal"]
    lines = [f"epoch {snapshot['epoch']}: {snapshot['detail']}"]
    if load:
        kv = f"{load['kv_used_fraction']:.0%} of the fuller page group used"
        lines.append(f"{load['num_running']} requests run, {load['num_queued']} wait; {kv}")
    why = f" ({goal['why']})" if goal["why"] else ""
    wanted = f"wanted: {goal['attention_ranks']} attention and {goal['expert_ranks']} expert ranks{why}"
    return "\n".join([*lines, wanted + (f"; changing: {snapshot['changing']}" if snapshot["changing"] else "")])


def ranks_table(snapshot: dict[str, Any]) -> Table:
    """A line per rank: its slots, and its share of the tokens that experts got lately."""
    table = Table(box=box.SIMPLE, title="ranks", title_justify="left")
    for column in ("rank", "roles", "address", "slots per layer", "filled", "share of expert tokens"):
        justify: Literal["left", "right"] = "right" if column in ("rank", "filled") else "left"
        table.add_column(column, justify=justify, no_wrap=column in ("roles", "address"))
    loads = rank_loads(snapshot)
    total = sum(loads.values())
    for entry in snapshot.get("ranks", ()):
        rows = list(entry["slots"].values())
        filled = sum(expert != EMPTY_SLOT for row in rows for expert in row)
        table.add_row(
            str(entry["rank"]),
            ", ".join(entry["roles"]),
            entry["endpoint"].removeprefix("tcp://"),
            str(max(map(len, rows))) if rows else "",
            f"{filled} of {sum(map(len, rows))}" if rows else "",
            f"{loads[entry['rank']] / total:.1%}" if rows and total else "",
        )
    return table


def rank_loads(snapshot: dict[str, Any]) -> dict[int, float]:
    """Tokens of each rank: those of an expert are spread evenly over its replicas."""
    ranks = snapshot.get("ranks", ())
    loads = {entry["rank"]: 0.0 for entry in ranks}
    for layer, tokens in snapshot.get("expert_tokens", {}).items():
        for expert, count in enumerate(tokens):
            holders = [entry["rank"] for entry in ranks if expert in entry["slots"].get(layer, ())]
            for rank in holders:
                loads[rank] += count / len(holders)
    return loads


def experts_table(snapshot: dict[str, Any]) -> Table:
    """A line per MoE layer: its hottest experts, with their replicas."""
    table = Table(box=box.SIMPLE, title="hottest experts, by share of the layer's tokens", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("expert share (replicas)")
    for layer, tokens in sorted(snapshot.get("expert_tokens", {}).items()):
        total = sum(tokens)
        if not total:
            continue
        hottest = sorted(range(len(tokens)), key=lambda expert: -tokens[expert])[:HOTTEST]
        texts = []
        for expert in hottest:
            holders = sum(expert in entry["slots"].get(layer, ()) for entry in snapshot["ranks"])
            texts.append(f"{expert}: {tokens[expert] / total:.0%} ({holders})")
        table.add_row(str(layer), "  ".join(texts))
    return table


def changes_table(snapshot: dict[str, Any]) -> Table:
    """The last changes, the newest first."""
    table = Table(box=box.SIMPLE, title="changes", title_justify="left")
    for column in ("when", "epoch", "took s", "pause ms", "why", "outcome"):
        table.add_column(column, justify="right" if column in ("took s", "pause ms") else "left")
    for change in reversed(snapshot.get("changes", ())):
        when = time.strftime("%H:%M:%S", time.localtime(change["began_s"]))
        table.add_row(
            when,
            str(change["epoch"]),
            f"{change['took_s']:.2f}",
            f"{change['pause_s'] * 1e3:.0f}",
            change["why"],
            change["problem"] or "done",
        )
    return table


def last_phases(snapshot: dict[str, Any]) -> str:
    """One line: how long each part of the last change took. Empty where there was none."""
    changes = snapshot.get("changes", ())
    phases = changes[-1].get("phases_s", {}) if changes else {}
    text = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items())
    return f"last change: {text}" if text else ""
