"""An expert rank's work: the routed experts of its slots.

Owns the slots' weights, by layer. Implements ExpertCompute, through which dispatch reaches it. Knows nothing of
requests, positions or other ranks.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from actors.checkpoint.config import ModelConfig
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.weights import ExpertWeights, dummy_experts, load_experts, num_weight_bytes
from actors.config import PipelineConfig
from actors.expert.experts import LayerExperts
from actors.precision import compute_dtype

Slots = Mapping[int, tuple[int, ...]]
"""Layer -> expert of each slot."""

DUMMY_SEED = 0


class ExpertWorker:
    """The experts of one rank. Calling it computes rows of one layer (see ExpertCompute)."""

    def __init__(
        self,
        slots: Slots,
        weights: Mapping[int, ExpertWeights],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots = dict(slots)
        self.device = device
        self._layers = {layer: LayerExperts(weights[layer], dtype) for layer in slots}

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        pipeline: PipelineConfig,
        slots: Slots,
        device: torch.device,
        report: Callable[[int, int], None] | None = None,
    ) -> "ExpertWorker":
        """Reads, or with `load: dummy` makes, the experts of `slots`. Raises CheckpointError."""
        dtype = compute_dtype(config, pipeline)
        if pipeline.load == "dummy":
            weights = dummy_experts(config, slots, dtype, device, DUMMY_SEED, fp8=config.quantized == "fp8")
        else:
            weights = load_experts(validate_checkpoint(Path(pipeline.model)), config, slots, dtype, device, report)
        return cls(slots, weights, dtype, device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are held."""
        return num_weight_bytes({layer: experts.weights for layer, experts in self._layers.items()})

    @torch.inference_mode()
    def __call__(self, layer: int, x_ND: Tensor, slots_N: Tensor) -> Tensor:
        """Row n through the expert in slot `slots_N[n]` of `layer`; rows with slot -1 come back as zeros."""
        return self._layers[layer](x_ND, slots_N)
