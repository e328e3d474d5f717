"""The demonstration model with FP8 experts, in the layout of Maverick-Instruct-FP8.

    python -m benchmarks.demo_model.fp8 DIRECTORY

Owns the rewriting: routed experts unfused, one scale per output channel; everything else as it is. INT4 is not written.
"""

import json
import shutil
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.checkpoint.config import read_model_config
from actors.checkpoint.layouts.rules import experts_prefix
from actors.checkpoint.quantized import quantize_fp8
from actors.checkpoint.shapes import config_json
from actors.checkpoint.stored_names import SINGLE_FILE
from benchmarks.demo_model.shape import DIRECTORY, SHAPE


def write_fp8(source: Path, target: Path) -> None:
    """Copies the checkpoint of `source` into the new directory `target`, its routed experts quantized."""
    shutil.copytree(source, target)
    tensors = load_file(source / SINGLE_FILE)
    for layer in read_model_config(source).moe_layers:
        tensors |= _unfused(experts_prefix(layer), tensors)
    save_file(tensors, target / SINGLE_FILE, metadata={"format": "pt"})
    config = config_json(SHAPE, experts="fp8", style="old")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _unfused(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's experts as out-major linears with scales; takes the fused ones out of `tensors`."""
    gate_up_EDN, down_EFD = tensors.pop(prefix + "gate_up_proj"), tensors.pop(prefix + "down_proj")
    unfused: dict[str, Tensor] = {}
    for expert in range(len(down_EFD)):
        gate_DF, up_DF = gate_up_EDN[expert].chunk(2, dim=1)
        for part, weight_IO in (("gate", gate_DF), ("up", up_DF), ("down", down_EFD[expert])):
            quantized_OI, scale_O = quantize_fp8(weight_IO.t().float())
            name = f"{prefix}{expert}.{part}_proj.weight"
            unfused |= {name: quantized_OI.contiguous(), f"{name}_scale": scale_O[:, None].to(torch.bfloat16)}
    return unfused


@click.command()
@click.argument("directory", type=click.Path(exists=False, path_type=Path))
def main(directory: Path) -> None:
    """Write the demonstration model with FP8 experts into the new DIRECTORY."""
    write_fp8(DIRECTORY, directory)
    click.echo(f"{directory}: {(directory / SINGLE_FILE).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
