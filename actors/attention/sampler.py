"""Chooses one token per request and step from its logits.

Owns the admitted requests' sampling parameters and output counts, and the order of what is done to logits: repetition,
presence and frequency penalties; logit_bias; min_tokens; temperature; top-k; top-p of what top-k left; min-p; draw.
Knows nothing of layers, pages or plans. Nothing waits for the device but `SampledBatch.to_tokens`.

A row whose largest logit is not finite (any NaN or +inf, or all -inf) has no distribution: it gets the id of that
maximum, NaN being above all, and `to_tokens` logs it. It harms no other row; raising would end all of the step.

Shapes: B requests of a step, R of them in a group, V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.attention.distribution import distances, draw, keep_likeliest, keep_min_p, least_weight, unit, weights_at
from actors.attention.logits import Logits
from actors.attention.logprobs import logprobs
from actors.attention.penalties import PenaltyPool
from actors.attention.philox import uniforms
from actors.attention.sampling_batch import AdmittedRequest, LogprobGroup, RowGroup, SamplingBatch, build_sampling_batch
from actors.attention.upload import mark, upload
from actors.types import SampledToken, SamplingParams

logger = logging.getLogger(__name__)

GROUP_ELEMENTS = 1 << 23  # logits worked on at once
GROUP_BYTES = 60  # of workspace for each of them, at most
PENALTY_BYTES = 10  # per request and token of the vocabulary: 5, and as many again while the pool grows


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostLogprobs:
    """A LogprobGroup's results on their way to the host."""

    group: LogprobGroup
    logprob_R: Tensor
    top_ids: Tensor  # [R, most tokens that a row of the group wants]
    top_logprobs: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledBatch:
    """The tokens of one step: on the device at once, on the host when it has caught up."""

    token_ids_B: Tensor  # int64, on the device; do not change
    request_idxs: tuple[int, ...]
    host_token_ids_B: Tensor
    host_largest_B: Tensor  # fp32, the row's largest logit; where it is not finite there was no distribution
    host_logprobs: tuple[_HostLogprobs, ...]
    copied: torch.cuda.Event | None  # None on CPU

    def to_tokens(self) -> list[SampledToken]:
        """The tokens in the order of the requests. Waits for this step, not for steps launched after it."""
        if self.copied is not None:
            self.copied.synchronize()
        token_ids = self.host_token_ids_B.tolist()
        for row in self.host_largest_B.isfinite().logical_not_().nonzero().flatten().tolist():
            logger.error("request %d: logits without a finite maximum; its token is void", self.request_idxs[row])
        tokens = [SampledToken(request_idx=i, token_id=t) for i, t in zip(self.request_idxs, token_ids, strict=True)]
        for part in self.host_logprobs:
            columns = (part.logprob_R.tolist(), part.top_ids.tolist(), part.top_logprobs.tolist())
            for row, num_top, logprob, ids, tops in zip(part.group.rows, part.group.num_top, *columns, strict=True):
                tokens[row] = SampledToken(
                    request_idx=self.request_idxs[row],
                    token_id=token_ids[row],
                    logprob=logprob,
                    top_logprobs=tuple(zip(ids[:num_top], tops[:num_top], strict=True)),
                )
        return tokens


def workspace_bytes(vocab_size: int, max_requests: int) -> int:
    """Device memory that sampling may take beside the logits, in bytes."""
    num_logits = vocab_size * max_requests
    return GROUP_BYTES * min(GROUP_ELEMENTS, num_logits) + PENALTY_BYTES * num_logits


class Sampler:
    """Samples for the requests admitted to one attention rank. Methods are called from one thread."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._requests: dict[int, AdmittedRequest] = {}
        self._pool = PenaltyPool(vocab_size, device)
        self._batch: SamplingBatch | None = None
        self._batch_idxs: tuple[int, ...] = ()
        self._batch_steps = 0

    @torch.inference_mode()
    def admit(
        self, request_idx: int, prompt_ids: Sequence[int], output_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        """Takes a request in. With `output_ids` of an earlier life it goes on where that one ended, same tokens."""
        if request_idx in self._requests:
            raise ValueError(f"request {request_idx} is admitted already")
        is_penalised = (
            sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        )
        slot = self._pool.allocate(prompt_ids, output_ids) if is_penalised else None
        self._requests[request_idx] = AdmittedRequest(sampling=sampling, num_outputs=len(output_ids), slot=slot)

    def release(self, request_idx: int) -> None:
        """Forgets a request. KeyError if it was never admitted."""
        request = self._requests.pop(request_idx)
        if request.slot is not None:
            self._pool.free(request.slot)
        if request_idx in self._batch_idxs:
            self._forget_batch()

    def clear(self) -> None:
        """Forgets all requests."""
        self._requests.clear()
        self._pool = PenaltyPool(self._vocab_size, self._device)
        self._forget_batch()

    @torch.inference_mode()
    def sample(self, logits: Logits | Tensor, request_idxs: Sequence[int]) -> SampledBatch:
        """Draws the next token of each listed request (each once) from its row of logits; [B, V] are whole ones."""
        if isinstance(logits, Tensor):
            logits = Logits.of(logits)
        batch = self._batch_of(tuple(request_idxs))
        token_ids_B = logits.greedy_B
        if batch.groups:
            is_broken_B = logits.largest_B.isfinite().logical_not_()
            token_ids_B = torch.where(is_broken_B, token_ids_B, self._sample_groups(batch, logits))
        if batch.penalised_row_P is not None and batch.penalised_slot_P is not None:
            self._pool.count(batch.penalised_slot_P, token_ids_B[batch.penalised_row_P])
        self._advance()
        return self._start_copy(batch, logits, token_ids_B)

    def _batch_of(self, request_idxs: tuple[int, ...]) -> SamplingBatch:
        if self._batch is None or self._batch_steps >= self._batch.num_steps or self._batch_idxs != request_idxs:
            requests = [self._requests[request_idx] for request_idx in request_idxs]
            max_group_rows = max(1, GROUP_ELEMENTS // self._vocab_size)
            self._batch = build_sampling_batch(requests, self._vocab_size, max_group_rows, self._device)
            self._batch_idxs = request_idxs
            self._batch_steps = 0
        return self._batch

    def _forget_batch(self) -> None:
        self._batch = None
        self._batch_idxs = ()

    def _advance(self) -> None:
        for request_idx in self._batch_idxs:
            self._requests[request_idx].num_outputs += 1
        self._batch_steps += 1

    def _sample_groups(self, batch: SamplingBatch, logits: Logits) -> Tensor:
        """Greedy tokens with the rows of all groups replaced."""
        token_idxs = np.array([request.num_outputs for request in batch.random], dtype=np.uint64)
        uniform_N = upload(uniforms(batch.seeds, token_idxs).tolist(), torch.float64, self._device)
        token_ids_B = logits.greedy_B.clone()
        for group in batch.groups:
            uniform_R = uniform_N[group.first_uniform : group.first_uniform + len(group.row_R)]
            if group.temperature_R is not None and group.draws_plainly:
                least_R = None if group.min_p_R is None else least_weight(group.min_p_R, self._vocab_size)
                token_ids_B[group.row_R] = logits.draw(group.row_R, group.temperature_R, uniform_R, least_R)
                continue
            x_RV = logits.rows(group.row_R)
            if group.penalties is not None:
                self._pool.apply_(x_RV, group.penalties)
            if group.bias is not None:
                x_RV[group.bias.row_N, group.bias.token_id_N] += group.bias.value_N
            token_ids_B[group.row_R] = _choose(group, x_RV, uniform_R)
        return token_ids_B

    def _start_copy(self, batch: SamplingBatch, logits: Logits, token_ids_B: Tensor) -> SampledBatch:
        parts = []
        for group in batch.logprob_groups:
            results = logprobs(logits.rows(group.row_R), token_ids_B[group.row_R], max(group.num_top))
            logprob_R, top_ids, top_logprobs = (result.to("cpu", non_blocking=True) for result in results)
            parts.append(_HostLogprobs(group=group, logprob_R=logprob_R, top_ids=top_ids, top_logprobs=top_logprobs))
        host_token_ids_B = token_ids_B.to("cpu", non_blocking=True)
        host_largest_B = logits.largest_B.to("cpu", non_blocking=True)
        return SampledBatch(
            token_ids_B=token_ids_B,
            request_idxs=self._batch_idxs,
            host_token_ids_B=host_token_ids_B,
            host_largest_B=host_largest_B,
            host_logprobs=tuple(parts),
            copied=mark(self._device),
        )


def _choose(group: RowGroup, x_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """A token per row of a group, from logits that penalties and bias have changed already."""
    if group.temperature_R is None:
        return x_RV.max(-1).indices
    distance_RV = distances(x_RV, group.temperature_R)
    weight_RV = weights_at(distance_RV, unit(x_RV.shape[-1]))
    if group.top_k_R is not None or group.top_p_R is not None:
        weight_RV = keep_likeliest(weight_RV, distance_RV, group.top_k_R, group.top_p_R, group.max_rank)
    if group.min_p_R is not None:
        weight_RV = keep_min_p(weight_RV, group.min_p_R)
    return draw(weight_RV, uniform_R)
