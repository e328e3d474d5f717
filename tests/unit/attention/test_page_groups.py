"""Where keys go and what rows read, computed by hand and compared with the definition for random steps."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.attention.page_groups import RUN_TOKENS, DecodeGroup, GroupBuilder, GroupInputs, PageRun, Piece, Run
from actors.attention.requests import PageTable

CPU = torch.device("cpu")


def _builder(page_tokens: int, chunk_tokens: int, token_bytes: int = 4096) -> GroupBuilder:
    return GroupBuilder(page_tokens, chunk_tokens, token_bytes, torch.float32, CPU)


def _piece(row: int, start: int, end: int, pages: list[int], num_granted: int = 0) -> Piece:
    table = PageTable()
    table.append(pages)
    return Piece(row, start, end, table, num_granted)


def test_slots_by_hand() -> None:
    """Pages of 4: position 6 of pages (9, 3) is in page 3 at offset 2, so in slot 14; positions 3 to 5 straddle."""
    inputs = _builder(4, 0).build([_piece(0, 6, 7, [9, 3])], [_piece(1, 3, 6, [7, 1])])
    assert inputs.write_slots_T.tolist() == [14, 31, 4, 5]


def test_only_the_current_chunk_is_read() -> None:
    """Chunk 8, pages of 4: position 13 reads 8 to 13, which pages 2 and 3 of its table hold."""
    inputs = _builder(4, 8).build([_piece(0, 13, 14, [5, 6, 20, 10])], [])
    assert inputs.whole_decode is not None
    assert inputs.whole_decode.num_keys == 6
    assert inputs.whole_decode.pages.ids_N.tolist() == [20, 10]
    assert inputs.whole_decode.pages.first is None


def test_pages_in_a_row_need_no_gather() -> None:
    inputs = _builder(4, 0).build([_piece(0, 9, 10, [5, 6, 7])], [])
    assert inputs.whole_decode is not None
    assert inputs.whole_decode.pages.first == 5
    shuffled = _builder(4, 0).build([_piece(0, 9, 10, [5, 7, 6])], [])
    assert shuffled.whole_decode is not None
    assert shuffled.whole_decode.pages.first is None


def test_runs_split_where_chunks_end() -> None:
    """Chunk 8: tokens 5 to 18 are 3 of a chunk that began before, a whole chunk, and 3 that begin one."""
    runs = _builder(4, 8).build([], [_piece(0, 5, 19, [0, 1, 2, 3, 4])]).runs
    assert [(run.rows, run.num_queries, run.num_keys) for run in runs] == [
        (slice(0, 3), 3, 8),
        (slice(3, 11), 8, 8),
        (slice(11, 14), 3, 3),
    ]
    assert [run.pages is None for run in runs] == [False, True, True]
    assert runs[0].mask_QL is not None
    assert runs[0].mask_QL.isinf().int().tolist() == [[0] * 6 + [1] * 2, [0] * 7 + [1], [0] * 8]


def test_long_masked_runs_are_cut() -> None:
    runs = _builder(4, 0).build([], [_piece(0, 1, 2 * RUN_TOKENS + 2, list(range(300)))]).runs
    assert [(run.num_queries, run.num_keys) for run in runs] == [
        (RUN_TOKENS, RUN_TOKENS + 1),
        (RUN_TOKENS, 2 * RUN_TOKENS + 1),
        (1, 2 * RUN_TOKENS + 2),
    ]
    assert runs[-1].mask_QL is None


def test_decode_groups_stay_within_their_bytes_and_mostly_real() -> None:
    """Room for 400 keys: 300 alone, 120 and 100 together, the short ones together whatever their ratio."""
    lengths = [300, 120, 100, 40, 3, 1]
    pieces = [_piece(row, n - 1, n, list(range(100))) for row, n in enumerate(lengths)]
    inputs = _builder(4, 0, token_bytes=(1 << 20) // 400).build(pieces, [])
    assert [group.num_rows for group in inputs.decode] == [1, 2, 3]
    assert [group.mask_B11L is None for group in inputs.decode] == [True, False, False]


def test_fresh_pages_are_those_granted_and_not_filled() -> None:
    """Pages of 4. A prompt of 6 fills its first page and leaves the second and the third, granted ahead, unfilled."""
    inputs = _builder(4, 0).build([], [_piece(0, 0, 6, [8, 9, 2], num_granted=3)])
    assert inputs.fresh_pages_N is not None
    assert inputs.fresh_pages_N.tolist() == [9, 2]
    assert _builder(4, 0).build([], [_piece(0, 0, 8, [8, 9], num_granted=2)]).fresh_pages_N is None


def test_pages_below_the_start_keep_what_they_hold() -> None:
    """Two granted pages hold a prefix that is not computed again; only the third is cleared."""
    inputs = _builder(4, 0).build([_piece(0, 8, 9, [8, 9, 2], num_granted=3)], [])
    assert inputs.fresh_pages_N is not None
    assert inputs.fresh_pages_N.tolist() == [2]


def test_missing_pages_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 pages were granted for 9 tokens"):
        _builder(4, 0).build([_piece(0, 8, 9, [0, 1])], [])


def _slots_read(pages: PageRun, size: int) -> list[list[int]]:
    return [[page * size + offset for page in pages.ids_N.tolist() for offset in range(size)]]


def _seen_by_decode(group: DecodeGroup, size: int) -> dict[int, set[int]]:
    slots_BN = torch.tensor(_slots_read(group.pages, size)).view(group.num_rows, -1)[:, : group.num_keys]
    mask_BL = torch.zeros(slots_BN.shape) if group.mask_B11L is None else group.mask_B11L[:, 0, 0]
    rows = range(*group.rows.indices(1 << 30)) if isinstance(group.rows, slice) else group.rows.tolist()
    return {row: set(slots_BN[i][mask_BL[i] == 0].tolist()) for i, row in enumerate(rows)}


def _seen_by_run(run: Run, size: int, write_slots_T: Tensor) -> dict[int, set[int]]:
    if run.pages is None:
        slots = write_slots_T[run.rows].tolist()
        return {run.rows.start + i: set(slots[: i + 1]) for i in range(run.num_queries)}
    slots = _slots_read(run.pages, size)[0][: run.num_keys]
    mask_QL = torch.zeros(run.num_queries, run.num_keys) if run.mask_QL is None else run.mask_QL
    return {
        run.rows.start + i: {slot for slot, added in zip(slots, mask_QL[i].tolist(), strict=True) if added == 0}
        for i in range(run.num_queries)
    }


def _seen(inputs: GroupInputs, size: int) -> dict[int, set[int]]:
    seen: dict[int, set[int]] = {}
    for group in inputs.decode:
        seen |= _seen_by_decode(group, size)
    for run in inputs.runs:
        seen |= _seen_by_run(run, size, inputs.write_slots_T)
    return seen


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 30), size=st.sampled_from([1, 2, 4]), chunk=st.sampled_from([0, 4, 8]))
def test_every_row_reads_exactly_what_it_may_see(seed: int, size: int, chunk: int) -> None:
    draw = random.Random(seed)
    free = draw.sample(range(1000), 1000)
    spans = [(start := draw.randrange(40), start + draw.choice([1, 1, 1, 2, 9, 30])) for _ in range(draw.randint(1, 6))]
    spans.sort(key=lambda span: (span[1] - span[0] > 1, -span[0]))
    pieces, row = [], 0
    for start, end in spans:
        pieces.append(_piece(row, start, end, [free.pop() for _ in range(-(-end // size))]))
        row += end - start
    singles = [piece for piece in pieces if piece.end - piece.start == 1]
    inputs = _builder(size, chunk).build(singles, pieces[len(singles) :])
    expected = {}
    for piece in pieces:
        slot_of = [piece.table.pages[p // size] * size + p % size for p in range(piece.end)]
        for p in range(piece.start, piece.end):
            first = p - p % chunk if chunk else 0
            expected[piece.row + p - piece.start] = set(slot_of[first : p + 1])
    assert _seen(inputs, size) == expected
