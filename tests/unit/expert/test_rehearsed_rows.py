"""Whatever number of rows a step brings, kernels of its kind have run before: no step waits for a compiler."""

import pytest

from actors.expert.worker import rehearsed_rows
from actors.kernels.route import MAX_SMALL, Form
from actors.kernels.triton_here import HAS_TRITON


@pytest.mark.parametrize("num_slots", [1, 16, 32, 128])
@pytest.mark.parametrize("max_rows", [1, 100, 1025, 8192])
def test_every_size_of_small_placements(num_slots: int, max_rows: int) -> None:
    """A program that places rows for itself is compiled for each power of two."""
    rows = rehearsed_rows(max_rows, num_slots)
    assert rows == sorted(set(rows)) and rows[-1] == max_rows
    buckets = {(num_rows - 1).bit_length() for num_rows in rows if num_rows <= MAX_SMALL}
    assert buckets == {(num_rows - 1).bit_length() for num_rows in range(1, min(max_rows, MAX_SMALL) + 1)}


@pytest.mark.skipif(not HAS_TRITON, reason="tiles are Triton's")
@pytest.mark.parametrize("num_slots", [16, 32, 128])
@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
def test_every_kind_of_tiles(form: Form, num_slots: int) -> None:
    from actors.kernels.grouped_tiles import choose_tiles

    def heights(numbers: range | list[int]) -> set[int]:
        return {choose_tiles(form, n, 5120, num_slots, 4096, swiglu=form != "fp8").rows for n in numbers}

    assert heights(rehearsed_rows(16384, num_slots)) == heights(range(1, 16385, 7))
