"""Copies of the demonstration model with quantized weights.

    python -m benchmarks.demo_model.quantize fp8 DIRECTORY

Owns which weights a form rounds. FP8 copies are stored as Maverick-Instruct-FP8 is (fp8) or as FP8 Scout is (fp8_ffn).
INT4 copies are not packed, for the widths are no whole groups: they are plain checkpoints of the rounded numbers.
"""

import json
import shutil
from pathlib import Path
from typing import Literal, get_args

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.checkpoint.config import INT4_GROUP, ModelConfig, read_model_config
from actors.checkpoint.expected import ffn_shapes
from actors.checkpoint.layouts.rules import experts_prefix
from actors.checkpoint.quantized import quantize_fp8, quantize_int4, widen_int4
from actors.checkpoint.shapes import config_json
from actors.checkpoint.stored_names import SINGLE_FILE
from benchmarks.demo_model.shape import DIRECTORY, SHAPE

# What is rounded. fp8: routed experts; int4_shared: shared experts too; fp8_ffn, int4: and dense layers.
Form = Literal["fp8", "fp8_ffn", "int4_shared", "int4"]
Tensors = dict[str, Tensor]


def write_quantized(source: Path, target: Path, form: Form) -> None:
    """Copies the checkpoint of `source`, with fused plain experts in one file, into the new directory `target`."""
    shutil.copytree(source, target)
    config, tensors = read_model_config(source), load_file(source / SINGLE_FILE)
    if form == "fp8" or form == "fp8_ffn":
        _to_fp8(tensors, config, includes_ffn=form == "fp8_ffn")
        values = json.loads((source / "config.json").read_text())
        values["quantization_config"] = config_json(SHAPE, experts=form)["quantization_config"]
        (target / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    else:
        _through_int4(tensors, config, includes_dense=form == "int4")
    save_file(tensors, target / SINGLE_FILE, metadata={"format": "pt"})


def _to_fp8(tensors: Tensors, config: ModelConfig, *, includes_ffn: bool) -> None:
    """Routed experts unfused, and one scale for each output channel."""
    for layer in range(config.num_layers):
        if config.is_moe(layer):
            _unfuse(experts_prefix(layer), tensors)
        if includes_ffn:
            for name in ffn_shapes(config, layer):
                _put_fp8(name, tensors[f"{name}.weight"], tensors)


def _unfuse(prefix: str, tensors: Tensors) -> None:
    """A layer's experts as out-major FP8 linears, instead of the fused tensors."""
    gate_up_EDN, down_EFD = tensors.pop(prefix + "gate_up_proj"), tensors.pop(prefix + "down_proj")
    for expert in range(len(down_EFD)):
        gate_DF, up_DF = gate_up_EDN[expert].chunk(2, dim=1)
        for part, weight_IO in (("gate", gate_DF), ("up", up_DF), ("down", down_EFD[expert])):
            _put_fp8(f"{prefix}{expert}.{part}_proj", weight_IO.t(), tensors)


def _put_fp8(linear: str, weight_OI: Tensor, tensors: Tensors) -> None:
    quantized_OI, scale_O = quantize_fp8(weight_OI.float())
    tensors[f"{linear}.weight"] = quantized_OI.contiguous()
    tensors[f"{linear}.weight_scale"] = scale_O[:, None].to(torch.bfloat16)


def _through_int4(tensors: Tensors, config: ModelConfig, *, includes_dense: bool) -> None:
    """The numbers that INT4 would give back, in float32."""
    for layer in range(config.num_layers):
        if config.is_moe(layer):
            for part in ("gate_up_proj", "down_proj"):
                weight_EIO = tensors[experts_prefix(layer) + part]
                rounded_NI = through_int4(weight_EIO.transpose(1, 2).flatten(0, 1))
                tensors[experts_prefix(layer) + part] = (
                    rounded_NI.view(len(weight_EIO), -1, weight_EIO.shape[1]).transpose(1, 2).contiguous()
                )
        elif not includes_dense:
            continue
        for name in ffn_shapes(config, layer):
            tensors[f"{name}.weight"] = through_int4(tensors[f"{name}.weight"])


def through_int4(weight_OI: Tensor) -> Tensor:
    """[O, I] fp32: rounded to the nearest of sixteen values; a row's last group ends with the row, however short.

    Zeros that fill it up to 128 inputs change neither its largest number nor its scale.
    """
    inputs = weight_OI.shape[1]
    filled_OI = F.pad(weight_OI.float(), (0, -inputs % INT4_GROUP))
    return widen_int4(*quantize_int4(filled_OI), torch.float32)[:, :inputs].contiguous()


@click.command()
@click.argument("form", type=click.Choice(get_args(Form)))
@click.argument("directory", type=click.Path(exists=False, path_type=Path))
def main(form: Form, directory: Path) -> None:
    """Write the demonstration model in FORM into the new DIRECTORY."""
    write_quantized(DIRECTORY, directory, form)
    click.echo(f"{directory}: {(directory / SINGLE_FILE).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
