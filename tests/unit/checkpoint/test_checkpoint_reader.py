"""Any rows of any stored tensor, into any view, and not a byte more than those."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from actors.checkpoint.headers import TensorInfo, read_header
from actors.checkpoint.pieces import Piece, whole
from actors.checkpoint.reader import Reader
from actors.errors import CheckpointError

ROWS, COLUMNS = 37, 24


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, TensorInfo], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, COLUMNS, generator=generator)
    tensors = {
        "f32": values,
        "bf16": values.bfloat16(),
        "fp8": values.to(torch.float8_e4m3fn),
        "norm": values[0].clone(),
        "cube": torch.randn(3, 5, 7, generator=generator),
    }
    file = tmp_path_factory.mktemp("reader") / "a.safetensors"
    save_file(tensors, file)
    return read_header(file), tensors


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_reach_any_view(stored: tuple[dict[str, TensorInfo], dict[str, Tensor]], data: st.DataObject) -> None:
    infos, tensors = stored
    name = data.draw(st.sampled_from(["f32", "bf16", "fp8"]))
    first = data.draw(st.integers(0, ROWS - 1))
    rows = data.draw(st.integers(1, ROWS - first))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, tensors[name].dtype]))
    turned = data.draw(st.booleans())
    block_bytes = data.draw(st.sampled_from([1, 100, 1000, 10**6]))
    room = torch.zeros((COLUMNS, rows) if turned else (rows, COLUMNS), dtype=dtype)
    piece = Piece(info=infos[name], first_row=first, target=room.t() if turned else room)
    reader = Reader(reads_in_flight=3, block_bytes=block_bytes)
    reader.read([piece])
    wanted = tensors[name][first : first + rows].to(dtype)
    assert torch.equal((room.t() if turned else room).float(), wanted.float())
    assert reader.read_bytes == rows * COLUMNS * tensors[name].element_size()


def test_a_vector_and_the_inside_of_a_stack(stored: tuple[dict[str, TensorInfo], dict[str, Tensor]]) -> None:
    infos, tensors = stored
    norm, matrix_75 = torch.zeros(COLUMNS), torch.zeros(7, 5)
    Reader().read([whole(infos["norm"], norm), Piece(info=infos["cube"], first_row=5, target=matrix_75.t())])
    assert torch.equal(norm, tensors["norm"])
    assert torch.equal(matrix_75, tensors["cube"][1].t())


def test_progress_rises_to_the_total(stored: tuple[dict[str, TensorInfo], dict[str, Tensor]]) -> None:
    infos, _ = stored
    seen: list[tuple[int, int]] = []
    reader = Reader(block_bytes=COLUMNS * 4 * 10)
    reader.read([whole(infos["f32"], torch.zeros(ROWS, COLUMNS))], lambda done, total: seen.append((done, total)))
    total = ROWS * COLUMNS * 4
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert len(seen) == 1 + 4  # ten rows a block


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    Reader().read([], lambda done, total: seen.append((done, total)))
    assert seen == [(0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # straight, and through the staging buffer
def test_a_file_that_ends_early_is_an_error_by_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100, 10), "b": torch.ones(100, 10)}, file)
    infos = read_header(file)
    with file.open("r+b") as stream:
        stream.truncate(infos["b"].end - 4)
    pieces = [whole(infos[name], torch.zeros(100, 10, dtype=dtype)) for name in ("a", "b")]
    with pytest.raises(CheckpointError, match="ended at byte") as caught:
        Reader().read(pieces)
    assert (caught.value.file, caught.value.tensor) == (str(file), "b")


def test_a_file_that_has_gone_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2, 2)}, file)
    infos = read_header(file)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        Reader().read([whole(infos["a"], torch.zeros(2, 2))])


def test_no_descriptor_stays_open_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2, 2)}, file)
    infos = read_header(file)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError):
        Reader().read([whole(infos["a"], torch.zeros(2, 2))])
    targets = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert file not in targets
