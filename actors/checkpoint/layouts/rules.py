"""What stored tensors must look like, and the final tensors that one expert is read into."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.checkpoint.headers import TensorInfo
from actors.checkpoint.pieces import Piece
from actors.checkpoint.quantization import INT4_GROUP, ExpertFormat
from actors.checkpoint.shard import Shard

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_DTYPES = ("BF16", "F32", "F16")
_PACKED = 8  # columns of one stored int32


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """Shape and allowed dtypes (as safetensors spells them) of one stored tensor."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = PLAIN_DTYPES
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTarget:
    """Views of one slot's final tensors, out-major; the dtype of the weights says which form they have.

    plain: gate_up_ND [2F, D] with the gate half first, down_DF [D, F], no scales. fp8: the same in float8_e4m3fn (where
    it is held widened, in the compute dtype), gate_up_scale_N [2F] and down_scale_D [D] in fp32. int4: int32 [2F, D/8]
    and [D, F/8], scales bf16 [2F, D/128] and [D, F/128]. Of a slice, F is its own part of the expert's width.
    """

    gate_up_ND: "Tensor"
    down_DF: "Tensor"
    gate_up_scale_N: "Tensor | None" = None
    down_scale_D: "Tensor | None" = None


def experts_prefix(layer: int) -> str:
    return f"model.layers.{layer}.feed_forward.experts."


def linear_rules(name: str, shape: tuple[int, int], form: ExpertFormat) -> dict[str, TensorRule]:
    """The stored tensors of one linear [O, I], by the name that it has without `.weight`.

    fp8: `.weight` and `.weight_scale` [O, 1], W[o, i] = float(q[o, i]) * scale[o]. int4: `.weight_packed` [O, I/8],
    column 8j + n in bits 4n..4n+3 of column j, `.weight_scale` [O, I/128], W[o, i] = (nibble - 8) * scale[o, i // 128].
    """
    outputs, inputs = shape
    if form == "plain":
        return {f"{name}.weight": TensorRule(shape=shape)}
    if form == "fp8":
        return {
            f"{name}.weight": TensorRule(shape=shape, dtypes=("F8_E4M3",)),
            f"{name}.weight_scale": TensorRule(shape=(outputs, 1)),
        }
    return {
        f"{name}.weight_packed": TensorRule(shape=(outputs, inputs // _PACKED), dtypes=("I32",)),
        f"{name}.weight_scale": TensorRule(shape=(outputs, inputs // INT4_GROUP), dtypes=("BF16",)),
        f"{name}.weight_shape": TensorRule(shape=(2,), dtypes=("I64", "I32"), optional=True),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTarget:
    """Which part of a stored linear is held, and where. Rows and columns are those of the weight [O, I].

    weight: [rows, columns], or [rows, columns / 8] where it is packed. scale: [rows] (fp8), [rows, columns / 128]
    (int4), None (plain).
    """

    name: str  # without `.weight`
    rows: range
    columns: range
    weight: "Tensor"
    scale: "Tensor | None" = None

    def pieces(self, tensors: Mapping[str, TensorInfo], form: ExpertFormat) -> Iterator[Piece]:
        """What is to be read, the linear being stored in `form`."""
        if form == "int4":
            yield self._piece(tensors, "weight_packed", self.columns.start // _PACKED, self.weight)
            if self.scale is not None:
                yield self._piece(tensors, "weight_scale", self.columns.start // INT4_GROUP, self.scale)
            return
        yield self._piece(tensors, "weight", self.columns.start, self.weight)
        if form == "fp8" and self.scale is not None:
            yield self._piece(tensors, "weight_scale", 0, self.scale.unsqueeze(-1))

    def _piece(self, tensors: Mapping[str, TensorInfo], kind: str, first_column: int, target: "Tensor") -> Piece:
        info = tensors[f"{self.name}.{kind}"]
        return Piece(info=info, first_row=self.rows.start, first_column=first_column, target=target)


def swiglu_linears(prefix: str, target: ExpertTarget, shard: Shard) -> tuple[LinearTarget, LinearTarget, LinearTarget]:
    """Gate, up and down of one expert or FFN, of which `target` holds `shard`: rows of the first two, columns of down.

    Their names are `prefix` and gate_proj, up_proj, down_proj.
    """
    gate, up = target.gate_up_ND.chunk(2)
    gate_scale, up_scale = (None, None) if target.gate_up_scale_N is None else target.gate_up_scale_N.chunk(2)
    part = shard.part(gate.shape[0] * shard.of)
    inputs = range(target.down_DF.shape[0])  # as many as down has outputs; those of gate may be packed
    return (
        LinearTarget(name=prefix + "gate_proj", rows=part, columns=inputs, weight=gate, scale=gate_scale),
        LinearTarget(name=prefix + "up_proj", rows=part, columns=inputs, weight=up, scale=up_scale),
        LinearTarget(
            name=prefix + "down_proj", rows=inputs, columns=part, weight=target.down_DF, scale=target.down_scale_D
        ),
    )
