"""A whole model in one process, without a router: for tests, benchmarks and a look at logits.

Owns an attention worker, all experts and the local dispatch between them, and hands out pages in order. It is driven
by plans, as a rank is. Knows nothing of queues, limits or preemption.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from actors.attention.worker import AttentionWorker
from actors.checkpoint.config import ModelConfig, read_model_config
from actors.config import PipelineConfig
from actors.dispatch.contract import build_routing_table
from actors.dispatch.local import LocalDispatch
from actors.expert.worker import ExpertWorker
from actors.types import Admission, RankPlan, SamplingParams, Work

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


class LocalModel:
    """Attention and experts of one checkpoint, joined. `pools` says how many pages plans may name."""

    def __init__(self, config: ModelConfig, attention: AttentionWorker, experts: ExpertWorker) -> None:
        self.config = config
        self.attention = attention
        self.experts = experts
        self.pools = attention.allocate_cache()
        table = build_routing_table({0: experts.slots}, config.moe_layers, config.num_experts, experts.device)
        self._dispatch = LocalDispatch(experts, table)
        attention.rehearse(experts, {layer: len(slots) for layer, slots in experts.slots.items()})
        attention.start_epoch(self._dispatch)

    @classmethod
    def load(cls, pipeline: PipelineConfig, device: torch.device | None = None) -> "LocalModel":
        """Loads the checkpoint directory `pipeline.model`. Raises CheckpointError, ConfigError."""
        device = torch.device("cpu") if device is None else device
        config = read_model_config(Path(pipeline.model))
        slots = {layer: tuple(range(config.num_experts)) for layer in config.moe_layers}
        attention = AttentionWorker.load(config, pipeline, device)
        return cls(config, attention, ExpertWorker.load(config, pipeline, slots, device))

    def start_epoch(self) -> None:
        """Forgets all requests and whose pages were whose."""
        self.attention.start_epoch(self._dispatch, keeps_graphs=True)

    def logits(self, prompt_ids: Sequence[int], num_tokens_of_step: Sequence[int] | None = None) -> Tensor:
        """fp32 [T, V]: what follows each position of the prompt, computed alone, in steps of the given sizes.

        Begins a new epoch. Raises ValueError if the sizes do not add up or the cache is too small.
        """
        sizes = [len(prompt_ids)] if num_tokens_of_step is None else list(num_tokens_of_step)
        if sum(sizes) != len(prompt_ids):
            raise ValueError(f"steps of {sum(sizes)} tokens do not make a prompt of {len(prompt_ids)}")
        self.start_epoch()
        needed = -(-len(prompt_ids) // self.pools.page_tokens)
        if needed > self.pools.global_pages or (self.config.chunked_layers and needed > self.pools.chunked_pages):
            raise ValueError(f"{needed} pages are needed; the cache has {self.pools}")
        admission = Admission(request_idx=0, prompt_ids=tuple(prompt_ids), output_ids=(), sampling=GREEDY)
        self.attention.take_in(RankPlan(admitted=(admission,)))
        parts, start, granted = [], 0, 0
        for size in sizes:
            pages = tuple(range(granted, -(-(start + size) // self.pools.page_tokens)))
            work = Work(
                request_idx=0, start=start, num_tokens=size, samples=False, global_pages=pages, chunked_pages=pages
            )
            self.attention.take_in(RankPlan(work=(work,)))
            _, h_TD = self.attention.forward((work,))
            parts.append(self.attention.logits(h_TD))
            start, granted = start + size, granted + len(pages)
        return torch.cat(parts)
