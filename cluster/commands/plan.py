"""`corral plan`: shows what a model would take on given machines, and refuses what does not fit.

Owns the flags and the tables. The numbers are `cluster/layout.py`'s and `cluster/floors.py`'s.
"""

from pathlib import Path
from typing import get_args

import click
from rich import box
from rich.console import Console
from rich.table import Table

from actors.checkpoint.config import ModelConfig, read_model_config
from actors.checkpoint.shapes import SHAPES, named_shape, shape_config
from actors.config import Layout, PipelineConfig
from actors.errors import LayoutError
from cluster.floors import decode, prefill, step_floor_s, tensor_parallel_floor_s
from cluster.footprint import Footprint, Precision, PrecisionName
from cluster.hardware import Machines, parse_machines
from cluster.layout import Candidate, Plan, candidates, resolve, usable_bytes

BATCHES = (1, 8, 32, 128, 256)
PREFILL_CHUNK_TOKENS = 8192


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkpoint.")
@click.option("--shape", help=f"Instead of a checkpoint: {', '.join(sorted(SHAPES))}; NAME-fp8 and NAME-int4 too.")
@click.option("--gpus", "machines_text", default="cpu", show_default=True,
              help="8xH200; 2x8xH200 (2 hosts of 8); cpu.")  # fmt: skip
@click.option("--layout", type=click.Choice(get_args(Layout)), default="auto", show_default=True)
@click.option("--attention-ranks", type=click.IntRange(min=1), default=1)
@click.option("--expert-ranks", type=click.IntRange(min=1), default=1)
@click.option("--attention-tp", type=click.IntRange(min=1), default=1, help="Ranks that share one attention.")
@click.option("--expert-tp", type=click.IntRange(min=1), default=1, help="1, or attention-tp: experts in slices.")
@click.option("--expert-replicas", type=click.IntRange(min=1), default=1, help="Copies of every expert.")
@click.option("--target-batch", type=click.IntRange(min=1), default=128, show_default=True,
              help="Requests at once for which auto chooses.")  # fmt: skip
@click.option("--precision", type=click.Choice(get_args(PrecisionName)), default="checkpoint", show_default=True,
              help="fp8: routed experts only, as in Maverick FP8; int4: all FFNs, as in Scout w4a16.")  # fmt: skip
@click.option("--max-model-len", type=click.IntRange(min=0), default=0, help="Tokens of prompt and output.")
@click.option("--gpu-memory-utilization", type=float, default=0.9, show_default=True)
@click.option("--context", "context_tokens", type=click.IntRange(min=1), default=2048, show_default=True,
              help="Tokens that each request attends to, in the floors.")  # fmt: skip
def plan(
    checkpoint: Path | None,
    shape: str | None,
    machines_text: str,
    layout: Layout,
    attention_ranks: int,
    expert_ranks: int,
    attention_tp: int,
    expert_tp: int,
    expert_replicas: int,
    target_batch: int,
    precision: PrecisionName,
    max_model_len: int,
    gpu_memory_utilization: float,
    context_tokens: int,
) -> None:
    """Print layout, bytes per GPU, KV room and floors; exit with 1 if the model does not fit."""
    model = _model(checkpoint, shape)
    machines = parse_machines(machines_text)
    pipeline = PipelineConfig.parse(
        {
            "layout": layout,
            "attention_ranks": attention_ranks,
            "expert_ranks": expert_ranks,
            "attention_tp": attention_tp,
            "expert_tp": expert_tp,
            "target_batch": target_batch,
            "expert_replicas": expert_replicas,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
        }
    )
    footprint = Footprint(model=model, precision=Precision.of(model, precision, widens_fp8=machines.is_cpu))
    console = Console()
    console.print(_model_line(footprint))
    considered = candidates(pipeline, footprint, machines)
    console.print(_candidates_table(considered, pipeline, machines))
    try:
        decided = resolve(pipeline, model, machines, footprint.precision)
    except LayoutError as e:
        raise click.ClickException(str(e)) from e
    console.print(_decision(decided))
    console.print(_floors_table(decided, considered, context_tokens))


def _model(checkpoint: Path | None, shape: str | None) -> ModelConfig:
    if (checkpoint is None) == (shape is None):
        raise click.UsageError("state either --checkpoint or --shape")
    if checkpoint is not None:
        return read_model_config(checkpoint)
    known, stored = named_shape(str(shape))
    return shape_config(known, experts=stored)


def _model_line(footprint: Footprint) -> str:
    model = footprint.model
    routed = f"{len(model.moe_layers)} MoE layers of {model.num_experts} experts, {_gb(footprint.expert_bytes)} each"
    return (
        f"{footprint.total_params / 1e9:,.4g} B parameters in {_gb(footprint.total_bytes)}: {routed}; "
        f"{_gb(footprint.attention_rank_bytes)} on every attention rank; "
        f"KV {footprint.kv_bytes_per_token() / 1024:,.4g} KiB per token\n"
    )


def _candidates_table(considered: list[Candidate], pipeline: PipelineConfig, machines: Machines) -> Table:
    room = f"{_gb(usable_bytes(pipeline, machines))} usable {'in all' if machines.is_cpu else 'of each'}"
    table = _table(f"Layouts on {machines}, {room}: weights, and what they leave for KV")
    table.add_column("layout", min_width=11)
    for heading in ("attention\nrank", "expert\nrank", "KV per\nattention\nrank", "KV tokens\nin all", "fits"):
        table.add_column(heading, justify="right", no_wrap=True)  # a narrow terminal never cuts a number
    for candidate in considered:
        fits = "no" if candidate.problem else "yes"
        table.add_row(str(candidate.split), *_candidate_cells(candidate), fits)
    return table


def _candidate_cells(candidate: Candidate) -> tuple[str, str, str, str]:
    if not candidate.attention_bytes:
        return "-", "-", "-", "-"
    experts = _gb(candidate.expert_bytes) if candidate.split.layout == "disaggregated" else "the same"
    kv = (_gb(candidate.kv_bytes), f"{candidate.kv_tokens:,}") if candidate.kv_bytes > 0 else ("-", "-")
    return _gb(candidate.attention_bytes), experts, *kv


def _decision(decided: Plan) -> str:
    pools = decided.chosen.pools
    lines = [f"[bold]{decided.split}[/bold]: {decided.reason}"]
    alike: dict[tuple[str, int, int], list[int]] = {}
    for spec, weight_bytes in zip(decided.ranks, decided.weight_bytes, strict=True):
        num_slots = sum(len(experts) for experts in spec.slots.values())
        alike.setdefault((" and ".join(spec.roles), weight_bytes, num_slots), []).append(spec.rank)
    for (roles, weight_bytes, num_slots), ranks in alike.items():
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}, each"
        lines.append(f"  {span}: {roles}, {_gb(weight_bytes)} of weights, {num_slots} expert slots")
    lines.append(
        f"KV of each attention rank: {pools.global_pages:,} global and {pools.chunked_pages:,} chunked pages of "
        f"{pools.page_tokens} tokens; a request has room for {decided.pipeline.max_model_len:,} tokens\n"
    )
    return "\n".join(lines)


def _floors_table(decided: Plan, considered: list[Candidate], context_tokens: int) -> Table:
    """Floors of the layouts that fit; on one host also that of tensor-parallel attention, to compare with."""
    footprint, machines = decided.footprint, decided.machines
    is_shown = any(candidate.split.attention_tp == machines.count for candidate in considered)
    compares = not is_shown and not machines.is_cpu and 1 < machines.count <= machines.per_host
    table = _table(
        f"Floors by requests that run at once: ms per decode step at {context_tokens:,} tokens of context, tokens/s",
        "* more KV than fits"
        + ("; TP: all ranks share one attention (attention_tp), for comparison" if compares else ""),
    )
    table.add_column("layout", min_width=11)
    for heading in (*map(str, BATCHES), f"prefill\nof {PREFILL_CHUNK_TOKENS:,}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for candidate in considered:
        if not candidate.problem:
            chosen = candidate.split == decided.split
            name = f"[bold]{candidate.split}[/bold]" if chosen else str(candidate.split)
            table.add_row(name, *_floor_cells(footprint, machines, candidate, context_tokens))
    if compares:
        table.add_row(f"[dim]TP {machines.count}[/dim]", *_tensor_parallel_cells(footprint, machines, context_tokens))
    return table


def _floor_cells(footprint: Footprint, machines: Machines, candidate: Candidate, context_tokens: int) -> list[str]:
    cells = []
    for batch in BATCHES:
        seconds = step_floor_s(footprint, machines, candidate.split, decode(batch, context_tokens))
        cells.append(_cell(batch, seconds, "*" if batch * context_tokens > candidate.kv_tokens else ""))
    prefill_s = step_floor_s(footprint, machines, candidate.split, prefill(PREFILL_CHUNK_TOKENS))
    return [*cells, f"\n{PREFILL_CHUNK_TOKENS / prefill_s:,.0f}/s"]


def _tensor_parallel_cells(footprint: Footprint, machines: Machines, context_tokens: int) -> list[str]:
    works = {batch: decode(batch, context_tokens) for batch in BATCHES}
    return [
        _cell(batch, tensor_parallel_floor_s(footprint, machines.accelerator, machines.count, work))
        for batch, work in works.items()
    ]


def _table(title: str, caption: str | None = None) -> Table:
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE)


def _cell(batch: int, seconds: float, mark: str = "") -> str:
    return f"{seconds * 1e3:,.3g}{mark}\n{batch / seconds:,.0f}/s"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.3g} MB"
