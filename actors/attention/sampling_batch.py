"""What the requests of a batch need each step, laid out for the device.

Owns the grouping of rows by the path they take, so that no row pays for a feature that it does not use. A layout is
built once per set of requests and serves as long as the set stays. Knows nothing of logits.

Shapes: B requests of a step, R of them in a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.attention.penalties import Penalties
from actors.attention.upload import upload
from actors.types import SamplingParams

GREEDY_BELOW = 1e-5  # lower temperatures are greedy, as 0 is: only near-equal logits could tell them apart


@dataclass(slots=True, kw_only=True)
class AdmittedRequest:
    """A request between admit and release. `slot` is its place in the penalty pool, if it uses penalties."""

    sampling: SamplingParams
    num_outputs: int
    slot: int | None

    @property
    def is_random(self) -> bool:
        return self.sampling.temperature >= GREEDY_BELOW

    @property
    def bars_stop(self) -> bool:
        return self.num_outputs < self.sampling.min_tokens and bool(self.sampling.stop_token_ids)

    def bias(self, vocab_size: int) -> dict[int, float]:
        """Token id -> what is added to its logit now; -inf where min_tokens forbids it.

        Ids beyond the vocabulary are left out: they cannot be sampled, and as an index would bring the device down.
        """
        bias = dict(self.sampling.logit_bias)
        if self.bars_stop:
            bias.update(dict.fromkeys(self.sampling.stop_token_ids, -inf))
        return {token_id: value for token_id, value in bias.items() if token_id < vocab_size}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """N logits to be changed, each at most once: row of the group, token id, what is added. On the device."""

    row_N: Tensor
    token_id_N: Tensor
    value_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """Rows that take one path. What is None is used by none of them. Tensors are on the device."""

    row_R: Tensor  # int64, rows of the batch
    penalties: Penalties | None
    bias: Bias | None
    first_uniform: int  # the group's place among the random numbers of the step
    temperature_R: Tensor | None  # fp32; None is greedy
    top_k_R: Tensor | None  # int64 in [1, max_rank]
    max_rank: int  # the largest top_k, V without one
    top_p_R: Tensor | None  # float64
    min_p_R: Tensor | None  # float64

    @property
    def draws_plainly(self) -> bool:
        """Whether temperature and min_p are all that its rows use."""
        features = (self.penalties, self.bias, self.top_k_R, self.top_p_R)
        return self.temperature_R is not None and all(feature is None for feature in features)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobGroup:
    """Rows that want log-probabilities, and how many likeliest tokens each wants."""

    rows: tuple[int, ...]
    num_top: tuple[int, ...]
    row_R: Tensor  # int64, `rows` on the device


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """The layout of one set of requests. Greedy rows without features are in no group."""

    groups: tuple[RowGroup, ...]
    logprob_groups: tuple[LogprobGroup, ...]
    penalised_row_P: Tensor | None  # int64, rows of the batch whose outputs are counted
    penalised_slot_P: Tensor | None
    random: tuple[AdmittedRequest, ...]  # those that draw, in the order of their random numbers
    seeds: NDArray[np.uint64]  # of `random`
    num_steps: float  # the layout serves so many steps; then a request has its min_tokens


class _Path(NamedTuple):
    """What tells groups apart."""

    is_random: bool
    has_top_k: bool
    has_top_p: bool
    is_changed: bool  # penalties or bias


def build_sampling_batch(
    requests: Sequence[AdmittedRequest], vocab_size: int, max_group_rows: int, device: torch.device
) -> SamplingBatch:
    """Lays out `requests` (row i of the logits is requests[i]) in groups of at most `max_group_rows` rows."""
    rows_of_path: dict[_Path, list[int]] = {}
    for row, request in enumerate(requests):
        path = _path(request, vocab_size)
        if path.is_random or path.is_changed:
            rows_of_path.setdefault(path, []).append(row)
    groups: list[RowGroup] = []
    random: list[AdmittedRequest] = []
    for path, all_rows in rows_of_path.items():
        for rows in _split(all_rows, max_group_rows):
            members = [requests[row] for row in rows]
            groups.append(_build_group(path, rows, members, len(random), vocab_size, device))
            random.extend(members if path.is_random else ())
    penalised = [(row, request.slot) for row, request in enumerate(requests) if request.slot is not None]
    return SamplingBatch(
        groups=tuple(groups),
        logprob_groups=_build_logprob_groups(requests, max_group_rows, device),
        penalised_row_P=upload([row for row, _ in penalised], torch.int64, device) if penalised else None,
        penalised_slot_P=upload([slot for _, slot in penalised], torch.int64, device) if penalised else None,
        random=tuple(random),
        seeds=np.array([request.sampling.seed for request in random], dtype=np.uint64),
        num_steps=min((r.sampling.min_tokens - r.num_outputs for r in requests if r.bars_stop), default=inf),
    )


def _path(request: AdmittedRequest, vocab_size: int) -> _Path:
    sampling = request.sampling
    return _Path(
        is_random=request.is_random,
        has_top_k=request.is_random and 0 < sampling.top_k < vocab_size,
        has_top_p=request.is_random and sampling.top_p < 1,
        is_changed=request.slot is not None or bool(sampling.logit_bias) or request.bars_stop,
    )


def _split(rows: list[int], max_rows: int) -> list[list[int]]:
    return [rows[first : first + max_rows] for first in range(0, len(rows), max_rows)]


def _build_group(
    path: _Path,
    rows: list[int],
    members: list[AdmittedRequest],
    first_uniform: int,
    vocab_size: int,
    device: torch.device,
) -> RowGroup:
    params = [request.sampling for request in members]
    has_min_p = path.is_random and any(p.min_p > 0 for p in params)
    return RowGroup(
        row_R=upload(rows, torch.int64, device),
        penalties=_build_penalties(members, device),
        bias=_build_bias(members, vocab_size, device),
        first_uniform=first_uniform,
        temperature_R=upload([p.temperature for p in params], torch.float32, device) if path.is_random else None,
        top_k_R=upload([p.top_k for p in params], torch.int64, device) if path.has_top_k else None,
        max_rank=max(p.top_k for p in params) if path.has_top_k else vocab_size,
        top_p_R=upload([p.top_p for p in params], torch.float64, device) if path.has_top_p else None,
        min_p_R=upload([p.min_p for p in params], torch.float64, device) if has_min_p else None,
    )


def _build_penalties(members: list[AdmittedRequest], device: torch.device) -> Penalties | None:
    penalised = [(row, m.slot, m.sampling) for row, m in enumerate(members) if m.slot is not None]
    if not penalised:
        return None
    return Penalties(
        row_P=upload([row for row, _, _ in penalised], torch.int64, device),
        slot_P=upload([slot for _, slot, _ in penalised], torch.int64, device),
        repetition_P=upload([p.repetition_penalty for _, _, p in penalised], torch.float32, device),
        presence_P=upload([p.presence_penalty for _, _, p in penalised], torch.float32, device),
        frequency_P=upload([p.frequency_penalty for _, _, p in penalised], torch.float32, device),
    )


def _build_bias(members: list[AdmittedRequest], vocab_size: int, device: torch.device) -> Bias | None:
    cells = [(row, *cell) for row, member in enumerate(members) for cell in member.bias(vocab_size).items()]
    if not cells:
        return None
    return Bias(
        row_N=upload([row for row, _, _ in cells], torch.int64, device),
        token_id_N=upload([token_id for _, token_id, _ in cells], torch.int64, device),
        value_N=upload([value for _, _, value in cells], torch.float32, device),
    )


def _build_logprob_groups(
    requests: Sequence[AdmittedRequest], max_group_rows: int, device: torch.device
) -> tuple[LogprobGroup, ...]:
    all_rows = [row for row, request in enumerate(requests) if request.sampling.num_logprobs >= 0]
    return tuple(
        LogprobGroup(
            rows=tuple(rows),
            num_top=tuple(requests[row].sampling.num_logprobs for row in rows),
            row_R=upload(rows, torch.int64, device),
        )
        for rows in _split(all_rows, max_group_rows)
    )
