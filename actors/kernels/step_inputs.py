"""The rows of a captured step, from a few numbers that the host sends of each.

Owns how seats, positions and newly granted pages become token ids, page tables, places to write to, and rotations: one
launch, so that nothing of it needs the host. Knows nothing of layers.

A row of `packed_FB` (int32 [5, B], or [6, B] where there may be prompts) is, for each row of the step: the seat of its
request (-1: padding), the position that it computes, the token there (-1: the one sampled last, from the device's
memory), the pages granted for that position in the global and in the chunked group (-1: none), and 1 for rows of
prompts.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from actors.kernels.triton_here import HAS_TRITON, tl, triton

SEAT, POSITION, TOKEN, GLOBAL_PAGE, CHUNKED_PAGE, IS_PROMPT = range(6)
NUM_FIELDS = 5  # of steps without prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """Pages of every seat: page number j of a request is in column j % W of its seat's row. `pages_SW`: int32."""

    pages_SW: Tensor
    page_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryScales:
    """What positions are turned into. `frequencies_R`: fp32, radians per position. Temperatures are
    1 + attn_scale * ln(1 + floor((p + 1) / floor_scale)), or 1 where `floor_scale` is 0.
    """

    frequencies_R: Tensor
    floor_scale: int
    attn_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """What the layers need of B rows. Padding has id 0, position 0 and nowhere to write to (-1)."""

    seats_B: Tensor  # int32, of rows of one token; -1 is padding, or a prompt's
    prompt_seats_B: Tensor  # int32, of rows of prompts, else -1; empty where there are none
    ids_B: Tensor  # int64
    positions_B: Tensor  # int64
    single_positions_B: Tensor  # the same, but 0 in rows of prompts
    is_padding_B1: Tensor  # bool
    global_slots_B: Tensor  # int64: page * page_tokens + offset, in the group's pages
    chunked_slots_B: Tensor
    rotations_BR2: Tensor  # fp32: cosine and sine
    temperatures_B: Tensor  # fp32

    def part(self, rows: slice) -> "StepRows":
        """Views of some of them."""
        return StepRows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @staticmethod
    def empty(num_rows: int, num_frequencies: int, device: torch.device, has_prompts: bool = False) -> "StepRows":
        def make(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        positions_B = make(num_rows)
        return StepRows(
            seats_B=make(num_rows, dtype=torch.int32),
            prompt_seats_B=make(num_rows if has_prompts else 0, dtype=torch.int32),
            ids_B=make(num_rows),
            positions_B=positions_B,
            single_positions_B=make(num_rows) if has_prompts else positions_B,
            is_padding_B1=make(num_rows, 1, dtype=torch.bool),
            global_slots_B=make(num_rows),
            chunked_slots_B=make(num_rows),
            rotations_BR2=make(num_rows, num_frequencies, 2, dtype=torch.float32),
            temperatures_B=make(num_rows, dtype=torch.float32),
        )


def fill_rows(
    rows: StepRows,
    packed_FB: Tensor,
    last_tokens_S: Tensor,
    global_table: PageTable | None,
    chunked_table: PageTable | None,
    scales: RotaryScales,
) -> None:
    """Fills `rows` from the first B columns of `packed_FB`, and enters the granted pages into the tables: no other row
    may need such a page.

    A group without a table has no layers; its places are not written.
    """
    fill = _fill_with_triton if packed_FB.is_cuda and HAS_TRITON else _fill_with_torch
    fill(rows, packed_FB, last_tokens_S, global_table, chunked_table, scales)


def _fill_with_torch(
    rows: StepRows,
    packed_FB: Tensor,
    last_tokens_S: Tensor,
    global_table: PageTable | None,
    chunked_table: PageTable | None,
    scales: RotaryScales,
) -> None:
    packed_FB = packed_FB[:, : len(rows.ids_B)]
    seats_B, positions_B = packed_FB[SEAT].long(), packed_FB[POSITION].long()
    is_padding_B = seats_B < 0
    known_B = packed_FB[TOKEN].long()
    if len(rows.prompt_seats_B):
        is_prompt_B = packed_FB[IS_PROMPT] > 0
        rows.seats_B.copy_(seats_B.masked_fill(is_prompt_B, -1))
        rows.prompt_seats_B.copy_(seats_B.masked_fill(~is_prompt_B, -1))
        rows.single_positions_B.copy_(positions_B.masked_fill(is_prompt_B, 0))
    else:
        rows.seats_B.copy_(seats_B)
    rows.ids_B.copy_(torch.where(known_B < 0, last_tokens_S[seats_B], known_B).masked_fill_(is_padding_B, 0))
    rows.positions_B.copy_(positions_B)
    rows.is_padding_B1.copy_(is_padding_B[:, None])
    for table, field, slots_B in (
        (global_table, GLOBAL_PAGE, rows.global_slots_B),
        (chunked_table, CHUNKED_PAGE, rows.chunked_slots_B),
    ):
        if table is not None:
            slots_B.copy_(_enter_pages(table, seats_B, positions_B, packed_FB[field]).masked_fill_(is_padding_B, -1))
    angles_BR = positions_B[:, None].float() * scales.frequencies_R
    rows.rotations_BR2.copy_(torch.stack((angles_BR.cos(), angles_BR.sin()), dim=-1))
    if scales.floor_scale:
        steps_B = torch.div(positions_B + 1, scales.floor_scale, rounding_mode="floor")
        rows.temperatures_B.copy_(torch.log1p(steps_B.float()) * scales.attn_scale + 1.0)
    else:
        rows.temperatures_B.fill_(1.0)


def _enter_pages(table: PageTable, seats_B: Tensor, positions_B: Tensor, granted_B: Tensor) -> Tensor:
    """Enters what was granted; returns where the rows' keys and values go."""
    real = seats_B >= 0
    columns_B = positions_B // table.page_tokens % table.pages_SW.shape[1]
    held_B = table.pages_SW[seats_B, columns_B]
    pages_B = torch.where(granted_B >= 0, granted_B, held_B)
    table.pages_SW[seats_B[real], columns_B[real]] = pages_B[real]
    return pages_B.long() * table.page_tokens + positions_B % table.page_tokens


if HAS_TRITON:

    @triton.jit  # type: ignore[untyped-decorator]
    def _decode_rows_kernel(
        packed, packed_stride, last_tokens, frequencies,
        global_pages, global_width, chunked_pages, chunked_width,
        seats, prompt_seats, ids, positions, single_positions, is_padding, global_slots, chunked_slots, rotations,
        temperatures, num_frequencies, floor_scale, attn_scale,
        PAGE_TOKENS: tl.constexpr, HAS_GLOBAL: tl.constexpr, HAS_CHUNKED: tl.constexpr, HAS_PROMPTS: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        """One program per row. The number of each field is its place in `packed`."""
        row = tl.program_id(0)
        seat = tl.load(packed + row)
        position = tl.load(packed + packed_stride + row)
        token = tl.load(packed + 2 * packed_stride + row).to(tl.int64)
        is_real = seat >= 0
        remembered = tl.load(last_tokens + seat, mask=is_real, other=0)
        if HAS_PROMPTS:
            is_prompt = tl.load(packed + 5 * packed_stride + row) > 0
            tl.store(seats + row, tl.where(is_prompt, -1, seat))
            tl.store(prompt_seats + row, tl.where(is_prompt, seat, -1))
            tl.store(single_positions + row, tl.where(is_prompt, 0, position).to(tl.int64))
        else:
            tl.store(seats + row, seat)
        tl.store(ids + row, tl.where(is_real, tl.where(token < 0, remembered, token), 0))
        tl.store(positions + row, position.to(tl.int64))
        tl.store(is_padding + row, (seat < 0).to(tl.int8))
        page_number = position // PAGE_TOKENS
        offset = position % PAGE_TOKENS
        if HAS_GLOBAL:
            granted = tl.load(packed + 3 * packed_stride + row)
            at = global_pages + seat.to(tl.int64) * global_width + page_number % global_width
            page = tl.where(granted >= 0, granted, tl.load(at, mask=is_real, other=0))
            tl.store(at, page, mask=is_real)
            tl.store(global_slots + row, tl.where(is_real, page.to(tl.int64) * PAGE_TOKENS + offset, -1))
        if HAS_CHUNKED:
            granted = tl.load(packed + 4 * packed_stride + row)
            at = chunked_pages + seat.to(tl.int64) * chunked_width + page_number % chunked_width
            page = tl.where(granted >= 0, granted, tl.load(at, mask=is_real, other=0))
            tl.store(at, page, mask=is_real)
            tl.store(chunked_slots + row, tl.where(is_real, page.to(tl.int64) * PAGE_TOKENS + offset, -1))
        r = tl.arange(0, BLOCK_R)
        inside = r < num_frequencies
        angles = position.to(tl.float32) * tl.load(frequencies + r, mask=inside, other=0.0)
        place = rotations + (row * num_frequencies + r) * 2
        tl.store(place, tl.cos(angles), mask=inside)
        tl.store(place + 1, tl.sin(angles), mask=inside)
        temperature = 1.0
        if floor_scale > 0:
            steps = ((position + 1) // floor_scale).to(tl.float32)
            temperature = tl.log(1.0 + steps) * attn_scale + 1.0
        tl.store(temperatures + row, temperature)


def _fill_with_triton(
    rows: StepRows,
    packed_FB: Tensor,
    last_tokens_S: Tensor,
    global_table: PageTable | None,
    chunked_table: PageTable | None,
    scales: RotaryScales,
) -> None:
    table = global_table or chunked_table
    assert table is not None, "a model has layers"
    num_frequencies = len(scales.frequencies_R)
    none = rows.seats_B  # a pointer that is not used
    _decode_rows_kernel[(len(rows.ids_B),)](
        packed_FB, packed_FB.stride(0), last_tokens_S, scales.frequencies_R,
        global_table.pages_SW if global_table else none, global_table.pages_SW.shape[1] if global_table else 1,
        chunked_table.pages_SW if chunked_table else none, chunked_table.pages_SW.shape[1] if chunked_table else 1,
        rows.seats_B, rows.prompt_seats_B, rows.ids_B, rows.positions_B, rows.single_positions_B,
        rows.is_padding_B1.view(torch.int8), rows.global_slots_B, rows.chunked_slots_B, rows.rotations_BR2,
        rows.temperatures_B,
        num_frequencies, scales.floor_scale, scales.attn_scale,
        PAGE_TOKENS=table.page_tokens, HAS_GLOBAL=global_table is not None, HAS_CHUNKED=chunked_table is not None,
        HAS_PROMPTS=len(rows.prompt_seats_B) > 0, BLOCK_R=max(16, triton.next_power_of_2(num_frequencies)),
    )  # fmt: skip
