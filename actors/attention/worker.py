"""An attention rank's work: plans in, sampled tokens out.

Owns the weights, the KV cache, the admitted requests and the sampler of one rank, and the order in which a step uses
them. Knows nothing of sockets, epochs or where experts are: dispatch is given to it when an epoch starts.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from actors.attention.attention import Attention, StepAttention
from actors.attention.batch import BatchBuilder, StepInputs
from actors.attention.captured import CapturedSteps, most_prompt_rows
from actors.attention.kernel_attention import KernelAttention
from actors.attention.kv_cache import KvCache, PagePools, cache_dtype, fit_page_tokens, plan_pages
from actors.attention.logits import Logits
from actors.attention.mixed import MixedAttention
from actors.attention.model import Attend, AttentionModel, Part
from actors.attention.parts import MIN_DIVIDED_ROWS, divide, sampled_rows
from actors.attention.rehearsal import RehearsalDispatch, rehearsed_prompts, rehearsed_rows, rehearsed_sizes
from actors.attention.requests import RequestTable
from actors.attention.sampler import SampledBatch, Sampler, workspace_bytes
from actors.attention.seat_tables import SeatTables
from actors.checkpoint.config import ModelConfig
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.weights import AttentionWeights, Shard, dummy_attention, load_attention, num_weight_bytes
from actors.config import PipelineConfig
from actors.dispatch.contract import Dispatch, ExpertCompute
from actors.dispatch.tensor_parallel import ALONE, TensorParallel, shard_config
from actors.errors import ConfigError
from actors.kernels.decode_attention import MAX_ROWS
from actors.kernels.triton_here import HAS_TRITON
from actors.precision import compute_dtype
from actors.types import Admission, RankPlan, SampledToken, SamplingParams, Work

CPU_CACHE_BYTES = 256 << 20
MOST_COPIED_TOKENS = 1 << 18  # room is kept for; longer contexts live on what `gpu_memory_utilization` leaves
DUMMY_SEED = 0
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def uses_kernels(device: torch.device) -> bool:
    """Whether attention is computed by kernels. (A CPU has better: fewer, larger operations.)"""
    return device.type == "cuda" and HAS_TRITON


class AttentionWorker:
    """One attention rank. Use: `load`, `allocate_cache`, then `start_epoch` and any number of steps."""

    def __init__(
        self,
        config: ModelConfig,
        pipeline: PipelineConfig,
        weights: AttentionWeights,
        device: torch.device,
        tp: TensorParallel = ALONE,
    ) -> None:
        """`weights` are the shard that `tp` says; the cache has that shard's heads."""
        config = shard_config(config, tp.size)
        self._tp_size = tp.size
        self._shared_bytes = tp.shared_bytes
        self._config = config
        self._pipeline = pipeline
        self._device = device
        self._dtype = weights.embed_VD.dtype
        self.weight_bytes = num_weight_bytes(weights)
        self._model = AttentionModel(config, weights, pipeline.routing, tp)
        self._attention = Attention(config)
        self._requests = RequestTable(device)
        self._sampler = Sampler(config.vocab_size, device)
        self._builder: BatchBuilder | None = None
        self.cache: KvCache | None = None
        self._dispatch: Dispatch | None = None
        self._longest_tokens = pipeline.max_model_len or config.max_position_embeddings
        self._captured: CapturedSteps | None = None
        self._mixed: MixedAttention | None = None
        self._tables: SeatTables | None = None

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        pipeline: PipelineConfig,
        device: torch.device,
        report: Callable[[int, int], None] | None = None,
        tp: TensorParallel = ALONE,
    ) -> "AttentionWorker":
        """Reads, or with `load: dummy` makes, everything but the routed experts. Raises CheckpointError."""
        dtype, shard, quantize = (
            compute_dtype(config, pipeline),
            Shard(index=tp.index, of=tp.size),
            pipeline.quantize_ffn,
        )
        if pipeline.load == "dummy":
            weights = dummy_attention(config, dtype, device, DUMMY_SEED, shard=shard, quantize_ffn=quantize)
        else:
            index = validate_checkpoint(Path(pipeline.model))
            weights = load_attention(index, config, dtype, device, report, shard=shard, quantize_ffn=quantize)
        return cls(config, pipeline, weights, device, tp)

    def allocate_cache(self) -> PagePools:
        """Takes the memory for keys and values: on a GPU what the weights left. Raises ConfigError if there is none."""
        page_tokens, longest_tokens = fit_page_tokens(self._config, self._pipeline.page_tokens), self._longest_tokens
        kept = cache_dtype(self._dtype, self._pipeline.kv_cache_dtype)
        pools = plan_pages(self._config, page_tokens, self._cache_bytes(), longest_tokens, kept.itemsize)
        self.cache = KvCache(self._config, pools, kept, self._device)
        if uses_kernels(self._device):
            self._start_kernels(self.cache, longest_tokens)
        if self._mixed is None:
            self._builder = BatchBuilder.plain(self._config, page_tokens, self._dtype, self._device)
        else:
            builders = self._mixed.global_builder, self._mixed.chunked_builder
            self._builder = BatchBuilder(self._config, *builders, self._device)
        return pools

    def _start_kernels(self, cache: KvCache, longest_tokens: int) -> None:
        config, device, max_rows = self._config, self._device, self._pipeline.max_num_seqs
        if max_rows > MAX_ROWS:
            raise ConfigError("max_num_seqs", f"is {max_rows}; a GPU decodes at most {MAX_ROWS} requests at once")
        self._requests = RequestTable(device, max_rows)
        self._tables = SeatTables(config, cache, max_rows, longest_tokens)
        attention = KernelAttention(config, cache, self._tables, max_rows, device)
        if not self._pipeline.enforce_eager:
            prompt_rows, whole_rows = most_prompt_rows(self._pipeline), self._pipeline.most_whole_rows
            self._captured = CapturedSteps(self._model, config, attention, max_rows, prompt_rows, device, whole_rows)
        self._mixed = MixedAttention(config, attention, cache, device)

    @torch.inference_mode()
    def rehearse(self, experts: ExpertCompute | None, num_slots: Mapping[int, int]) -> None:
        """Runs steps of every kind and size on nobody's requests, so that what is compiled, captured or allocated at
        first use, is so before anybody waits. `experts` are those of this process, if any, in so many slots by layer.
        """
        if self._tables is None:
            return
        assert self.cache is not None
        dispatch = RehearsalDispatch(experts, num_slots, self._config.num_experts, self._device)
        with self._model.rehearsing():
            if self._captured is not None:
                self._captured.rehearse(dispatch)
            self._dispatch = dispatch
            for num_tokens in rehearsed_sizes(self._pipeline.max_num_batched_tokens):
                longest_tokens = min(self._longest_tokens, self._num_pages * self.cache.pools.page_tokens)
                self._rehearse_step(rehearsed_prompts(num_tokens, longest_tokens))
            for num_rows in rehearsed_rows(self._pipeline.max_num_seqs):
                self._rehearse_step([1] * num_rows)
        self._dispatch = None

    @property
    def _num_pages(self) -> int:
        """That every group has which has any."""
        assert self.cache is not None
        pools = self.cache.pools
        return min(pages for pages in (pools.global_pages, pools.chunked_pages) if pages)

    def _rehearse_step(self, lengths: Sequence[int]) -> None:
        """Computes prompts of so many tokens, as many of them as there are seats and pages for."""
        assert self.cache is not None
        pools, first_page = self.cache.pools, 0
        admitted, works = [], []
        for idx, num_tokens in enumerate(lengths[: self._pipeline.max_num_seqs]):
            pages = tuple(range(first_page, first_page + -(-num_tokens // pools.page_tokens)))
            if pages[-1] >= self._num_pages:
                break
            first_page = pages[-1] + 1
            admitted.append(Admission(request_idx=idx, prompt_ids=(0,) * num_tokens, output_ids=(), sampling=GREEDY))
            works.append(
                Work(request_idx=idx, start=0, num_tokens=num_tokens, samples=True, global_pages=pages,
                     chunked_pages=pages)
            )  # fmt: skip
        if not works:
            return
        self.take_in(RankPlan(admitted=tuple(admitted), work=tuple(works)))
        _, h_TD = self.forward(works)
        self._model.step_logits(h_TD[-1:]).rehearse()
        if self._tp_size > 1 and len(h_TD) >= MIN_DIVIDED_ROWS:
            self._forward_in_parts(works)
        self.take_in(RankPlan(released=tuple(work.request_idx for work in works)))

    def start_epoch(
        self,
        dispatch: Dispatch,
        fresh: bool = True,
        keeps_graphs: bool = False,
        brings_tokens: Sequence[bool] = (True,),
    ) -> None:
        """Experts are reached through `dispatch` from now on. Forgets all requests if `fresh`.

        `keeps_graphs`: what was captured before still reaches them, in the same memory. `brings_tokens`: whether a
        rank is an attention rank, by position of the epoch.
        """
        self._dispatch = dispatch
        if fresh:
            self._requests.clear()
            self._sampler = Sampler(self._config.vocab_size, self._device)
        if self._captured is not None and keeps_graphs:
            self._captured.follow(dispatch, brings_tokens)
        elif self._captured is not None:
            self._captured.start_epoch(dispatch, self._requests.last_tokens_R, brings_tokens)

    def capture(self) -> None:
        """Captures the graphs of all steps, now rather than at their first use."""
        if self._captured is not None:
            self._captured.capture_all()

    def capture_next(self) -> bool:
        """One of them, if it is missing: whether it was."""
        return self._captured is not None and self._captured.capture_next()

    def step(self, plan: RankPlan) -> list[SampledToken]:
        """Takes the plan in, runs the step and waits for its tokens, which come in the order of the work."""
        self.take_in(plan)
        return self.run(plan)

    def run(self, plan: RankPlan) -> list[SampledToken]:
        """Runs a step that was taken in. One that raised RankError may be run again, in a later epoch."""
        sampled = self.launch(plan)
        return [] if sampled is None else sampled.to_tokens()

    @torch.inference_mode()
    def launch(self, plan: RankPlan, most_rows: int = 0) -> SampledBatch | None:
        """Runs a step that was taken in, without waiting for the device where the dispatch needs no wait; the next plan
        may be taken in and launched before `to_tokens` is called.

        The caller has told dispatch of the step (`begin_step`) before. `most_rows`: of any rank in the step. None if
        nothing is sampled. Raises ValueError for a plan that contradicts what the rank knows, RankError if experts
        cannot be reached.
        """
        if not plan.work:
            return None
        dispatch = self._dispatch
        assert dispatch is not None, "an epoch comes before steps"
        if self._captured is not None and dispatch.is_capturable and self._captured.takes(plan.work, most_rows):
            logits, seats_B = self._captured.run(plan.work, self._requests, most_rows)
            dispatch.end_step()
            request_idxs = [work.request_idx for work in plan.work if work.samples]
            return self._sample(request_idxs, logits, seats_B) if request_idxs else None
        if sum(work.num_tokens for work in plan.work) >= self._model.min_large_rows:
            sampled, h_BD, memory_rows_B = self._forward_in_parts(plan.work)
        else:
            inputs, h_TD = self.forward(plan.work)
            sampled, memory_rows_B = inputs.sampled, inputs.memory_rows_B
            h_BD = h_TD if inputs.sampled_rows_B is None else h_TD.index_select(0, inputs.sampled_rows_B)
        dispatch.end_step()
        return self._sample(sampled, self._model.step_logits(h_BD), memory_rows_B) if sampled else None

    def _sample(self, request_idxs: Sequence[int], logits: Logits, memory_rows_B: Tensor) -> SampledBatch:
        sampled = self._sampler.sample(logits, request_idxs)
        self._requests.remember(request_idxs, memory_rows_B, sampled.token_ids_B)
        return sampled

    @torch.inference_mode()
    def forward(self, work: Sequence[Work]) -> tuple[StepInputs, Tensor]:
        """Computes at least one piece of work without sampling: the step's inputs and its hidden states h_TD."""
        assert self._builder and self.cache and self._dispatch, "the cache and an epoch come before steps"
        if self._tables is not None:
            self._tables.grant(work, self._requests)
        inputs = self._builder.build(work, self._requests)
        attend = self._attend(inputs, self.cache)
        return inputs, self._model.forward(inputs.ids_T, inputs.positions_T, attend, self._dispatch)

    def _forward_in_parts(self, work: Sequence[Work]) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Computes a large step without sampling: requests that are sampled, their hidden states and memory rows."""
        assert self._builder and self.cache and self._dispatch, "the cache and an epoch come before steps"
        if self._tables is not None:
            self._tables.grant(work, self._requests)
        inputs = [self._builder.build(part, self._requests) for part in divide(work)]
        ends = list(accumulate(part.num_tokens for part in inputs))
        parts = [
            Part(slice(end - part.num_tokens, end), self._attend(part, self.cache))
            for part, end in zip(inputs, ends, strict=True)
        ]
        ids_T, positions_T = torch.cat([p.ids_T for p in inputs]), torch.cat([p.positions_T for p in inputs])
        h_TD = self._model.forward_in_parts(ids_T, positions_T, parts, self._dispatch)
        sampled, rows_B, memory_rows_B = sampled_rows(inputs)
        return sampled, h_TD.index_select(0, rows_B), memory_rows_B

    def _attend(self, inputs: StepInputs, cache: KvCache) -> Attend:
        mixed = self._mixed
        if mixed is None:
            return StepAttention(self._attention, self._config, inputs, cache)
        return lambda layer, qkv_TQ: mixed.attend(layer, qkv_TQ, inputs)

    def take_in(self, plan: RankPlan) -> None:
        """Releases, admits and grants pages, and computes nothing: what happens once, however often a step is run."""
        for request_idx in plan.released:
            self._requests.release(request_idx)
            self._sampler.release(request_idx)
        for admission in plan.admitted:
            self._requests.admit(admission)
            self._sampler.admit(admission.request_idx, admission.prompt_ids, admission.output_ids, admission.sampling)
        for work in plan.work:
            self._requests.grant(work)

    @torch.inference_mode()
    def logits(self, h_BD: Tensor) -> Tensor:
        """fp32 [B, V] of rows of `forward`'s hidden states."""
        return self._model.logits(h_BD)

    @torch.inference_mode()
    def request_expert_tokens(self) -> None:
        """Has the tokens routed to each expert since the last request counted, as of the steps launched so far."""
        self._model.request_expert_tokens()

    def take_expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """What was requested, by layer, if it has come; then it is gone."""
        return self._model.take_expert_tokens()

    def _cache_bytes(self) -> int:
        if self._pipeline.kv_cache_bytes:
            return self._pipeline.kv_cache_bytes
        if self._device.type != "cuda":
            return CPU_CACHE_BYTES
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        spared_bytes = int(total_bytes * (1 - self._pipeline.gpu_memory_utilization))
        return max(0, free_bytes - spared_bytes - self._workspace_bytes())

    def _workspace_bytes(self) -> int:
        """What a step needs beside weights and cache: activations of every token, and again of captured steps; logits
        thrice, the sampler's, a long request's keys and values of one layer, copied out of their pages; and the rows
        that members of a unit share.
        """
        config, tokens = self._config, self._pipeline.max_num_batched_tokens
        widest = max(config.dense_width, config.expert_width * config.experts_per_token, config.hidden_size)
        num_sampled = min(self._pipeline.max_num_seqs, tokens)
        logits_bytes = 3 * 4 * config.vocab_size * num_sampled
        sampler_bytes = workspace_bytes(config.vocab_size, self._pipeline.max_num_seqs)
        num_copied = min(self._longest_tokens, MOST_COPIED_TOKENS)
        copied_bytes = 2 * config.num_kv_heads * config.head_dim * self._dtype.itemsize * num_copied
        step_bytes = 8 * (tokens + most_prompt_rows(self._pipeline)) * widest * self._dtype.itemsize
        return step_bytes + logits_bytes + sampler_bytes + copied_bytes + self._shared_bytes
