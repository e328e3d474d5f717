"""What experts cost on a GPU: the routed part after the gate, and each of its matmuls by every kernel there is.

One layer of Scout (16 experts), or of Maverick on one of four GPUs: 32 of its 128 experts, or a quarter of each of them
(maverick-slices). Times are medians of CUDA graphs in which each call has another layer or other experts, so that no
weight comes from the L2 cache. GB/s count the weights of experts that have tokens, once; beside them stands the
bandwidth of a kernel that only moves bytes, in the same run. With --dense also matmuls that every token takes.

    python -m benchmarks.gpu_experts [--models scout,maverick] [--forms fp8,int4,plain] [--tokens 1,8,32,...] [--parts]
        [--dense]
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.checkpoint.weights import ExpertWeights
from actors.expert.experts import LayerExperts
from actors.kernels import grouped, route
from actors.kernels.grouped import Engine
from actors.kernels.libraries import fbgemm_loaded
from actors.kernels.route import Form, PlacedRows
from benchmarks.gpu_timing import memory_gb_per_s, time_us

HIDDEN = 5120
TOKENS = (1, 8, 32, 128, 256, 2048, 8192)
CALLS = 8  # in a graph
MAX_LAYER_BYTES = 20e9  # of all layers that calls go around


@dataclass(frozen=True)
class Model:
    name: str
    num_experts: int
    num_slots: int
    width: int = 8192  # of an expert, or of the part of it that is here


MODELS = {
    model.name: model
    for model in (Model("scout", 16, 16), Model("maverick", 128, 32), Model("maverick-slices", 128, 128, 2048))
}
# Outputs, inputs and whether SwiGLU follows, of matmuls in bf16: Scout's on one GPU, and Maverick's on one of four.
DENSE = {
    "scout qkv": (7168, 5120, False),
    "scout wo": (5120, 5120, False),
    "maverick/4 qkv": (1792, 5120, False),
    "maverick/4 wo": (5120, 1280, False),
    "maverick/4 shared gate, up": (4096, 5120, True),
    "maverick/4 shared down": (5120, 2048, False),
    "maverick/4 dense gate, up": (8192, 5120, True),
    "maverick/4 dense down": (5120, 4096, False),
}


def random_weight(form: Form, num_slots: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor | None]:
    """Weights of unit gain; INT4 and FP8 by random bits, which take no time to make."""
    if form == "int4":
        words = torch.randint(-(1 << 31), 1 << 31, (num_slots, outputs, inputs // 8), dtype=torch.int32, device="cuda")
        scale = torch.full((num_slots, outputs, inputs // 128), 0.2 / inputs**0.5, device="cuda")
        return words, scale.to(torch.bfloat16)
    weight = torch.empty(num_slots, outputs, inputs, dtype=torch.bfloat16, device="cuda")
    for slot in range(num_slots):
        weight[slot].normal_(0, inputs**-0.5)
    if form == "plain":
        return weight, None
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device="cuda")
    for slot in range(num_slots):
        quantized[slot] = weight[slot] * 1e4
    return quantized, torch.full((num_slots, outputs), 1e-4, device="cuda")


def random_layer(form: Form, model: Model) -> ExpertWeights:
    gate_up, gate_up_scale = random_weight(form, model.num_slots, 2 * model.width, HIDDEN)
    down, down_scale = random_weight(form, model.num_slots, HIDDEN, model.width)
    return ExpertWeights(gate_up_SND=gate_up, down_SDF=down, gate_up_scale_SN=gate_up_scale, down_scale_SD=down_scale)


def slot_bytes(weights: ExpertWeights) -> int:
    stacks = (weights.gate_up_SND, weights.down_SDF, weights.gate_up_scale_SN, weights.down_scale_SD)
    return sum(s[0].numel() * s.element_size() for s in stacks if s is not None)


@dataclass(frozen=True)
class Tokens:
    """One call's tokens: some expert each, at random."""

    x_TD: Tensor
    ids_TK: Tensor
    scores_TK: Tensor
    num_here: int  # of their experts, how many are on this GPU

    @classmethod
    def make(cls, model: Model, num_tokens: int, seed: int) -> "Tokens":
        generator = torch.Generator().manual_seed(seed)
        ids_T = torch.randint(model.num_experts, (num_tokens,), generator=generator)
        if num_tokens == 1:
            ids_T %= model.num_slots  # else three calls of four have nothing to do
        x_TD = torch.randn(num_tokens, HIDDEN, device="cuda").to(torch.bfloat16)
        scores_TK = torch.rand(num_tokens, 1, device="cuda").to(torch.bfloat16)
        here = ids_T[ids_T < model.num_slots]
        return cls(x_TD, ids_T[:, None].cuda(), scores_TK, len(here.unique()))


class Bench:
    """A model's experts in one form: as many layers as memory allows, up to one for each call."""

    def __init__(self, model: Model, form: Form) -> None:
        self.model, self.form = model, form
        first = random_layer(form, model)
        num_layers = max(1, min(CALLS, int(MAX_LAYER_BYTES / (slot_bytes(first) * model.num_slots))))
        self.layers = [first] + [random_layer(form, model) for _ in range(num_layers - 1)]
        slots = torch.arange(model.num_experts, device="cuda")
        self.slot_of_E = slots.where(slots < model.num_slots, -1)

    def whole_us(self, tokens: list[Tokens]) -> float:
        experts = [LayerExperts(layer, torch.bfloat16) for layer in self.layers]

        def call(i: int) -> Callable[[], object]:
            t, layer = tokens[i], experts[i % len(experts)]
            return lambda: layer.routed(t.x_TD, t.ids_TK, t.scores_TK, self.slot_of_E)

        return time_us([call(i) for i in range(len(tokens))])

    def parts_us(self, tokens: list[Tokens], engine: Engine) -> tuple[float, float]:
        """Microseconds of the two matmuls by one engine, the first with what follows it up to the second."""
        gathered = [
            route.gather_rows(
                t.x_TD, t.ids_TK.flatten(), t.scores_TK.flatten(), self.slot_of_E, self.model.num_slots, self.form
            )
            for t in tokens
        ]
        hidden = [
            grouped.grouped_swiglu(rows, self._layer(i).gate_up_SND, self._layer(i).gate_up_scale_SN)
            for i, rows in enumerate(gathered)
        ]

        def first(i: int) -> Callable[[], object]:
            w = self._layer(i)
            return lambda: grouped.grouped_swiglu(gathered[i], w.gate_up_SND, w.gate_up_scale_SN, engine)

        def second(i: int) -> Callable[[], object]:
            w = self._layer(i)
            return lambda: grouped.grouped_linear(hidden[i], w.down_SDF, w.down_scale_SD, engine)

        indices = range(len(tokens))
        return time_us([first(i) for i in indices]), time_us([second(i) for i in indices])

    def _layer(self, i: int) -> ExpertWeights:
        return self.layers[i % len(self.layers)]


def engines_of(form: Form) -> list[Engine]:
    if form == "int4":
        return ["triton"]
    return ["triton", "torch", "fbgemm"] if form == "fp8" and fbgemm_loaded() else ["triton", "torch"]


def report(model: Model, form: Form, token_counts: list[int], with_parts: bool) -> None:
    bench = Bench(model, form)
    for num_tokens in token_counts:
        tokens = [Tokens.make(model, num_tokens, seed) for seed in range(CALLS)]
        whole_us = bench.whole_us(tokens)
        touched = statistics.mean(t.num_here for t in tokens)
        gigabytes_per_s = touched * slot_bytes(bench.layers[0]) / whole_us / 1e3
        line = f"{model.name:8} {form:5} T={num_tokens:<5} {whole_us:8.1f} us {gigabytes_per_s:6.0f} GB/s"
        if with_parts:
            line += " |"
            for engine in engines_of(form):
                first_us, second_us = bench.parts_us(tokens, engine)
                line += f" {engine} {first_us:.1f}+{second_us:.1f}"
        print(line, flush=True)


def report_dense(token_counts: list[int]) -> None:
    """Microseconds of what a step runs, and of cuBLAS with a kernel for SwiGLU where one follows."""
    for name, (outputs, inputs, is_gate_up) in DENSE.items():
        weights = [random_weight("plain", 1, outputs, inputs)[0] for _ in range(CALLS * 2)]
        for num_tokens in token_counts:
            x_TI = torch.randn(num_tokens, inputs, device="cuda").to(torch.bfloat16)
            rows = route.form_rows(x_TI, "plain")
            calls = [_dense_call(rows, weight, is_gate_up, None) for weight in weights]
            cublas = [_dense_call(rows, weight, is_gate_up, "torch") for weight in weights]
            us, cublas_us, bytes_us = time_us(calls), time_us(cublas), outputs * inputs * 2 / 4.3e6
            print(f"{name:28} T={num_tokens:<4} {us:7.1f} us cuBLAS {cublas_us:7.1f} bytes {bytes_us:7.1f}", flush=True)


def _dense_call(rows: PlacedRows, weight: Tensor, is_gate_up: bool, engine: Engine | None) -> Callable[[], object]:
    call = grouped.grouped_swiglu if is_gate_up else grouped.grouped_linear
    return lambda: call(rows, weight, None, engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="scout,maverick")
    parser.add_argument("--forms", default="fp8,int4,plain")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--parts", action="store_true", help="also each matmul by each engine")
    parser.add_argument("--dense", action="store_true", help="also matmuls in bf16 that every token takes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}: memory {memory_gb_per_s():.0f} GB/s", flush=True)
    token_counts = [int(count) for count in options.tokens.split(",")]
    with torch.inference_mode():
        if options.dense:
            report_dense([count for count in token_counts if count <= 256])
        for name in filter(None, options.models.split(",")):
            for form in options.forms.split(","):
                report(MODELS[name], form, token_counts, options.parts)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
