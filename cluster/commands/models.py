"""`corral make-model`: writes a checkpoint with random weights.

Owns the flags. The work is `actors/checkpoint/make_model.py`'s.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from actors.checkpoint.make_model import make_model as write_model
from actors.checkpoint.shapes import SHAPES, ConfigStyle, ModelShape, StoredExperts
from actors.errors import ConfigError


def resized(shape: ModelShape, layers: int | None, sizes: Sequence[str]) -> ModelShape:
    """The shape with the sizes that were stated, each as `name=number`. Raises ConfigError."""
    known = [f.name for f in fields(ModelShape) if isinstance(getattr(shape, f.name), int)]
    stated = {"num_layers": layers} if layers else {}
    for size in sizes:
        name, _, number = size.partition("=")
        if name not in known or not number.isdecimal():
            raise ConfigError("set", f"{size!r} is not NAME=NUMBER with NAME one of {', '.join(known)}")
        stated[name] = int(number)
    return replace(shape, **stated)  # type: ignore[arg-type]  # the names are those of whole numbers


@click.command("make-model")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="tiny", show_default=True)
@click.option("--experts", type=click.Choice(get_args(StoredExperts)), default="fused", show_default=True,
              help="How routed experts are stored: fused or one by one, plain, FP8 or INT4; fp8_ffn and int4 quantize "
                   "shared experts and dense layers too.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              help="Of all other weights; auto is the shape's.")  # fmt: skip
@click.option("--prefix/--no-prefix", default=False, help="Name tensors as multimodal checkpoints do.")
@click.option("--config-style", type=click.Choice(["old", "new"]), default="new", help="Spelling of config.json.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--shards", type=click.IntRange(min=1), default=2, show_default=True, help="Safetensors files.")
@click.option("--layers", type=click.IntRange(min=1), help="Make only this many layers.")
@click.option("--set", "sizes", multiple=True, metavar="NAME=NUMBER", help="Another size, e.g. num_experts=16.")
def make_model(
    directory: Path,
    shape: str,
    experts: StoredExperts,
    dtype: str,
    prefix: bool,
    config_style: ConfigStyle,
    seed: int,
    shards: int,
    layers: int | None,
    sizes: tuple[str, ...],
) -> None:
    """Write a checkpoint with random weights and a small tokenizer into DIRECTORY."""
    if directory.is_dir() and any(directory.iterdir()):
        raise click.ClickException(f"{directory} is not empty")
    chosen = resized(SHAPES[shape], layers, sizes)
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("weights", total=None)
        write_model(
            directory,
            chosen,
            experts=experts,
            dtype=dtype,
            prefix=prefix,
            config_style=config_style,
            seed=seed,
            shards=shards,
            progress=lambda done_bytes, total_bytes: progress.update(task, completed=done_bytes, total=total_bytes),
        )
    num_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    click.echo(f"{directory}: {shape}, {num_bytes / 1e6:,.1f} MB of weights")
