"""Dispatch between ranks: each attention rank and each expert rank exchange one message per direction and layer.

Owns the order of messages of a step, for ranks that are attention, expert or both. Knows nothing of how a group is
formed (`group.py`), where rows lie (`layout.py`) or what a row looks like (`rows.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.dispatch.contract import ExpertCompute, RoutingTable
from actors.dispatch.frame import Frame, Peers, slices
from actors.dispatch.group import EpochGroup, Transfer
from actors.dispatch.layout import Membership, StepLayout, lay_out_step, order_destinations
from actors.dispatch.rows import RowBuffer, TokenShape, make_placer, scale_rows
from actors.dispatch.transport import Message

INLINE_BYTES = {"cpu": 256 * 1024, "cuda": 4 * 1024 * 1024}
"""A source whose rows are at most this much, together, sends fixed messages (see `layout.py`)."""

ROWS, COUNTED_ROWS, RESULTS, TAGS = 0, 1, 2, 4


@dataclass(frozen=True, slots=True)
class CollectiveReceipt:
    """Which result row belongs to each (token, k), and how many rows each destination got if they were counted."""

    layer_idx: int
    place_N: Tensor
    counts: tuple[int, ...]


class CollectiveDispatch:
    """Dispatch over the group of an epoch, which must be formed. One object per rank and epoch.

    `attention_ranks` are all ranks that may bring tokens; expert ranks are those that the routing table names.
    `experts` computes for this rank's own slots; None if it holds none. A step runs all of `routing.layers` in order:
    a rank with tokens calls `begin_step`, then `dispatch` and `combine` for each layer; a rank without tokens calls
    `serve_step` alone, whatever its roles. A rank that is both computes its experts inside `combine`.

    On CUDA the methods queue work and return; the last `combine` of a step, or `serve_step`, waits for the device, and
    that is where a lost peer is noticed. Routing table, tokens and experts are on the shape's device.

    Every method raises RankError when a peer fails or does not answer within the group's timeout; the group is closed
    then, and so are, in turn, those of the ranks that wait for this one. Raises ValueError where the caller breaks the
    contract.
    """

    def __init__(
        self,
        group: EpochGroup,
        routing: RoutingTable,
        experts: ExpertCompute | None,
        attention_ranks: Sequence[int],
        shape: TokenShape,
        inline_bytes: int | None = None,
    ) -> None:
        self.is_capturable = False
        expert_ranks = set(routing.ranks_MER.flatten().tolist())
        self._members = Membership(
            rank=group.rank,
            attention_ranks=tuple(sorted(attention_ranks)),
            destinations=order_destinations(group.rank, expert_ranks),
        )
        if self._members.is_expert and experts is None:
            raise ValueError(f"rank {group.rank} holds slots but no experts")
        self._group = group
        self._experts = experts
        self._shape = shape
        limit_bytes = INLINE_BYTES[shape.device.type] if inline_bytes is None else inline_bytes
        self._inline_rows = limit_bytes // shape.row_bytes
        self._layers = routing.layers
        self._placer = make_placer(routing, self._members.destinations, group.rank, shape.device)
        holders = [set(ranks_ER.flatten().tolist()) for ranks_ER in routing.ranks_MER]
        self._serves = [group.rank in ranks for ranks in holders]
        self._peers: list[Peers] = [
            tuple((d, r) for d, r in enumerate(self._members.destinations) if r in ranks and r != group.rank)
            for ranks in holders
        ]
        # Receives of the next layer are posted while this one computes: two buffers take turns.
        self._buffers = [RowBuffer(shape) for _ in range(2 if group.preposts and self._members.is_expert else 1)]
        self._results_RD = torch.empty(0, shape.hidden, dtype=shape.dtype, device=shape.device)
        self._frame: Frame | None = None
        self._next_idx = 0
        self._is_open = False
        self._arriving: Transfer | None = None  # rows from other attention ranks
        self._leaving: list[Transfer] = []  # this rank's rows to other expert ranks
        self._returning: Transfer | None = None  # results for this rank's tokens
        self._replying: Transfer | None = None  # results for other ranks' tokens
        self._counted_sends: list[Message] = []

    # --- the step ----------------------------------------------------------------------------------------------------

    def begin_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """States how many tokens every rank brings to each layer of the step."""
        if len(tokens_of_rank) != self._group.world:
            raise ValueError(f"{len(tokens_of_rank)} token counts for {self._group.world} ranks")
        if self._next_idx not in (0, len(self._layers)) or self._is_open:
            raise ValueError(f"a step began after {self._next_idx} of {len(self._layers)} layers of the one before")
        if self._frame is None or self._frame.tokens_of_rank != tokens_of_rank:
            self._frame = self._build_frame(tokens_of_rank)
        self._next_idx = 0
        if self._group.preposts and self._layers:
            self._post_arrivals(0)

    def end_step(self) -> None:
        """The last combine has waited."""

    def serve_step(self, tokens_of_rank: tuple[int, ...]) -> None:
        """A whole step of a rank that brings no tokens: computes what others send, layer after layer.

        The last results may still be on their way when it returns; who awaits them has them before the group is left.
        """
        self.begin_step(tokens_of_rank)
        if self._layout.own_rows:
            raise ValueError(f"rank {self._members.rank} has tokens in this step: it must dispatch them")
        for layer_idx in range(len(self._layers)):
            self._serve(layer_idx)
            self._next_idx = layer_idx + 1
        self._group.synchronize()

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor, scores_TK: Tensor, layer: int) -> CollectiveReceipt:
        """Sends each scaled token to its experts' ranks. Expects x_TD in the shape's dtype. See `Dispatch`."""
        layer_idx = self._enter(layer, x_TD)
        self._is_open = True
        layout = self._layout
        if layout.own_rows == 0:
            return CollectiveReceipt(layer_idx, expert_ids_TK.flatten(), ())
        buffer = self._buffer(layer_idx)
        rows_ND = scale_rows(x_TD, scores_TK)
        place_N, first_P = self._placer.place(layer_idx, expert_ids_TK, rows_ND, buffer, layout.block_rows)
        counts: tuple[int, ...] = ()
        if layout.own_fixed:
            self._post_rows(layer_idx, self._current.sends[layer_idx], counts)
        else:
            counts = self._send_counted(layer_idx, first_P, buffer)
        return CollectiveReceipt(layer_idx, place_N, counts)

    def combine(self, receipt: CollectiveReceipt) -> Tensor:
        """Serves this rank's own experts, then waits for the results: y_TD in the shape's dtype."""
        layer_idx = receipt.layer_idx
        if not self._is_open or layer_idx != self._next_idx:
            raise ValueError("a receipt is combined once, before the next dispatch")
        awaited = [] if self._returning else self._awaited_results(layer_idx, receipt.counts)
        self._serve(layer_idx, receipt.counts, awaited)
        if self._returning is not None:
            self._returning.wait()
            self._returning = None
        for transfer in self._leaving:
            transfer.wait()
        self._leaving.clear()
        self._is_open, self._next_idx = False, layer_idx + 1
        if self._next_idx == len(self._layers):  # before the host waits for what follows, with no timeout of its own
            self._group.synchronize()
        y_ND = self._results_RD.index_select(0, receipt.place_N)
        K = self._shape.experts_per_token
        return y_ND if K == 1 else y_ND.view(-1, K, self._shape.hidden).sum(1)

    # --- sending -----------------------------------------------------------------------------------------------------

    def _send_counted(self, layer_idx: int, first_P: Tensor, buffer: RowBuffer) -> tuple[int, ...]:
        """Posts the counts, then the rows as they lie, sorted by destination. Returns the counts."""
        peers = self._peers[layer_idx]
        counts_P = torch.diff(first_P, append=first_P.new_tensor([self._layout.own_rows]))
        self._group.synchronize()
        counts = tuple(counts_P.tolist())
        self._counted_sends = slices(buffer.words_NW, counts, peers)
        self._post_rows(layer_idx, [(rank, counts_P[d : d + 1]) for d, rank in peers], counts)
        if not self._members.is_expert:  # else they go together with what this rank receives, in `_serve`
            self._leaving.append(self._group.post(self._counted_sends, (), layer_idx * TAGS + COUNTED_ROWS))
            self._counted_sends = []
        return counts

    def _post_rows(self, layer_idx: int, sends: list[Message], counts: tuple[int, ...]) -> None:
        """Posts what opens a layer, and with it whatever the group allows to be posted already."""
        tag = layer_idx * TAGS
        if self._group.preposts:
            self._returning = self._group.post((), self._awaited_results(layer_idx, counts), tag + RESULTS)
            self._leaving.append(self._group.post(sends, (), tag + ROWS))
        elif self._members.is_expert:
            self._arriving = self._group.post(sends, self._arrivals(layer_idx), tag + ROWS)
        else:
            self._leaving.append(self._group.post(sends, (), tag + ROWS))

    def _awaited_results(self, layer_idx: int, counts: tuple[int, ...]) -> list[Message]:
        layout, peers = self._layout, self._peers[layer_idx]
        if layout.own_rows == 0:
            return []
        if layout.own_fixed:
            return self._current.awaited[layer_idx]
        return slices(self._results_RD, counts, peers)

    # --- serving -----------------------------------------------------------------------------------------------------

    def _serve(self, layer_idx: int, own_counts: tuple[int, ...] = (), awaited: Sequence[Message] = ()) -> None:
        """Computes the experts of this rank for one layer and posts the results.

        `own_counts` are of this rank's own rows if they are counted; `awaited` are results to be received by the way.
        """
        replies: list[Message] = []
        if self._members.is_expert:
            arrived = self._take_arrivals(layer_idx)
            if self._serves[layer_idx]:
                replies = self._compute(layer_idx, own_counts, arrived)
            if self._replying is not None:  # of the layer before: waiting now, after arrivals, costs nothing
                self._replying.wait()
        if self._members.is_expert or awaited:
            self._replying = self._group.post(replies, awaited, layer_idx * TAGS + RESULTS)
            if awaited:
                self._replying.wait()
                self._replying = None

    def _take_arrivals(self, layer_idx: int) -> list[int]:
        """Waits for all rows of a layer from other ranks. Returns the rows of each counted source."""
        if self._arriving is None:
            self._post_arrivals(layer_idx)
        assert self._arriving is not None
        self._arriving.wait()
        self._arriving = None
        counts = self._receive_counted(layer_idx) if self._layout.counted_sources or self._counted_sends else []
        if self._group.preposts and layer_idx + 1 < len(self._layers):
            self._post_arrivals(layer_idx + 1)
        return counts

    def _receive_counted(self, layer_idx: int) -> list[int]:
        counts: list[int] = []
        receives: list[Message] = []
        if self._serves[layer_idx] and self._layout.counted_sources:
            self._group.synchronize()
            counts = self._current.headers_in[layer_idx % len(self._buffers)].tolist()
            at, words_NW = self._layout.counted_start, self._buffer(layer_idx).words_NW
            for source, num_rows in zip(self._layout.counted_sources, counts, strict=True):
                if num_rows:
                    receives.append((source.rank, words_NW[at : at + num_rows]))
                at += num_rows
        if not receives and not self._counted_sends:
            return counts
        transfer = self._group.post(self._counted_sends, receives, layer_idx * TAGS + COUNTED_ROWS)
        self._counted_sends = []
        if receives:
            transfer.wait()
        else:
            self._leaving.append(transfer)
        return counts

    def _compute(self, layer_idx: int, own_counts: tuple[int, ...], arrived: list[int]) -> list[Message]:
        """Runs the experts over own and received rows. Returns the replies; own results go into their place."""
        layout, buffer = self._layout, self._buffer(layer_idx)
        num_own = own_counts[-1] if own_counts else layout.block_rows
        first, last = layout.out_rows - num_own, layout.counted_start + sum(arrived)
        if first == last:
            return []
        assert self._experts is not None
        y_ND = self._experts(self._layers[layer_idx], buffer.x_ND[first:last], buffer.slots_N[first:last]).contiguous()
        if num_own:
            self._results_RD[first : layout.out_rows] = y_ND[:num_own]
        replies = [(s.rank, y_ND[s.start - first : s.start - first + s.num_rows]) for s in layout.fixed_sources]
        at = layout.counted_start - first
        for source, num_rows in zip(layout.counted_sources, arrived, strict=True):
            if num_rows:
                replies.append((source.rank, y_ND[at : at + num_rows]))
            at += num_rows
        return replies

    def _post_arrivals(self, layer_idx: int) -> None:
        self._arriving = self._group.post((), self._arrivals(layer_idx), layer_idx * TAGS + ROWS)

    def _arrivals(self, layer_idx: int) -> list[Message]:
        return self._current.arrivals[layer_idx % len(self._buffers)] if self._serves[layer_idx] else []

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    @property
    def _current(self) -> Frame:
        if self._frame is None:
            raise ValueError("no step was begun")
        return self._frame

    @property
    def _layout(self) -> StepLayout:
        return self._current.layout

    def _buffer(self, layer_idx: int) -> RowBuffer:
        return self._buffers[layer_idx % len(self._buffers)]

    def _build_frame(self, tokens_of_rank: tuple[int, ...]) -> Frame:
        K = self._shape.experts_per_token
        layout = lay_out_step(self._members, tokens_of_rank, K, self._inline_rows)
        for buffer in self._buffers:
            buffer.reserve(layout.capacity_rows)
        if layout.out_rows > self._results_RD.shape[0]:
            self._results_RD = self._results_RD.new_empty(1 << (layout.out_rows - 1).bit_length(), self._shape.hidden)
        return Frame(tokens_of_rank, layout, self._peers, self._buffers, self._results_RD)

    def _enter(self, layer: int, x_TD: Tensor) -> int:
        if self._is_open or self._next_idx >= len(self._layers) or self._layers[self._next_idx] != layer:
            raise ValueError(f"layer {layer} was dispatched out of order")
        shape = self._shape
        num_tokens = self._layout.own_rows // shape.experts_per_token
        if x_TD.shape != (num_tokens, shape.hidden) or x_TD.dtype != shape.dtype:
            raise ValueError(
                f"expected [{num_tokens}, {shape.hidden}] of {shape.dtype}, got {list(x_TD.shape)} of {x_TD.dtype}"
            )
        return self._next_idx
