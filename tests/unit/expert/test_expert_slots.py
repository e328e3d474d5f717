"""Slots that are loaded beside serving: what serves keeps its bits, what comes is right, failures cost nothing."""

import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.checkpoint.config import read_model_config
from actors.checkpoint.index import validate_checkpoint
from actors.checkpoint.shapes import StoredExperts
from actors.checkpoint.weights import load_experts
from actors.config import PipelineConfig
from actors.errors import CheckpointError, LayoutError
from actors.expert import slots as slots_module
from actors.expert import worker as worker_module
from actors.expert.experts import LayerExperts
from actors.expert.worker import ExpertWorker
from actors.types import EMPTY_SLOT, SlotProof

if TYPE_CHECKING:
    from conftest import Setup

CPU = torch.device("cpu")
NONE = EMPTY_SLOT
NUM_EXPERTS = 4
MakeSetup = Callable[..., "Setup"]


def _rows(worker: ExpertWorker, num_rows: int = 3) -> Tensor:
    hidden = worker._config.hidden_size
    return torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(7)).to(worker._dtype)


def _outputs(worker: ExpertWorker, slots: dict[int, tuple[int, ...]]) -> dict[tuple[int, int], Tensor]:
    """(layer, slot) -> what the expert that `slots` names there makes of fixed rows."""
    x_ND = _rows(worker)
    return {
        (layer, slot): worker(layer, x_ND, torch.full((len(x_ND),), slot))
        for layer, experts in slots.items()
        for slot, expert in enumerate(experts)
        if expert != NONE
    }


def _reference(setup: "Setup", layer: int, expert: int, x_ND: Tensor) -> Tensor:
    index = validate_checkpoint(Path(setup.pipeline.model))
    weights = load_experts(index, setup.config, {layer: (expert,)}, setup.dtype, CPU)[layer]
    return LayerExperts(weights, setup.dtype)(x_ND, torch.zeros(len(x_ND), dtype=torch.int64))


def _assert_right(setup: "Setup", worker: ExpertWorker, slots: dict[int, tuple[int, ...]]) -> None:
    assert worker.holds(slots)
    for (layer, slot), y_ND in _outputs(worker, slots).items():
        assert torch.equal(y_ND, _reference(setup, layer, slots[layer][slot], _rows(worker)))


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("fused", torch.float32), ("fused", torch.bfloat16), ("per_expert", torch.float16), ("fp8", torch.float32),
     ("fp8", torch.bfloat16), ("int4", torch.float32), ("int4", torch.bfloat16)],
)  # fmt: skip
def test_what_is_loaded_later_is_what_is_loaded_at_once(setup: MakeSetup, stored: str, dtype: torch.dtype) -> None:
    ours = setup(stored, dtype)
    first = {1: (2, NONE, NONE), 3: (NONE,)}
    then = {1: (2, 0, NONE, 3), 3: (1,)}
    worker = ours.loaded(first)
    worker.change(then, first)
    _assert_right(ours, worker, then)
    assert worker.proofs(then) == ours.loaded(then).proofs(then)
    assert worker.weight_bytes == ours.loaded(then).weight_bytes
    assert worker.slots == then


def test_only_what_is_missing_is_read(setup: MakeSetup) -> None:
    worker, origin = setup().worker()
    worker.change({1: (2, NONE), 3: (0, 1)}, {})
    assert origin.asked == [(1, 2), (3, 0), (3, 1)]
    worker.change({1: (2, 3), 3: (0, 1)}, {1: (2,), 3: (0, 1)})
    worker.change({1: (2, 3), 3: (0, 1)}, {})
    assert origin.asked[3:] == [(1, 3)]


def test_a_slot_in_use_may_be_emptied_and_keeps_its_expert(setup: MakeSetup) -> None:
    ours = setup()
    worker, origin = ours.worker()
    both = {1: (2, 3)}
    worker.change(both, {})
    worker.change({1: (NONE, 3)}, both)
    _assert_right(ours, worker, both)
    worker.change(both, {1: (NONE, 3)})  # it is wanted again, and still there
    assert len(origin.asked) == 2
    worker.change({1: (0, 3)}, {1: (NONE, 3)})
    _assert_right(ours, worker, {1: (0, 3)})
    assert not worker.holds(both)


def test_a_slot_in_use_never_changes(setup: MakeSetup) -> None:
    ours = setup()
    worker, origin = ours.worker()
    slots = {1: (2, 3)}
    worker.change(slots, {})
    with pytest.raises(ValueError, match="slot 1 of layer 1 serves expert 3: it cannot become 0"):
        worker.change({1: (2, 0), 3: (1,)}, slots)
    with pytest.raises(ValueError, match="does not hold expert 1, and yet it serves"):
        worker.change({1: (2, 1)}, {1: (2, 1)})
    _assert_right(ours, worker, slots)
    assert origin.asked == [(1, 2), (1, 3)]  # refused before anything was done


@pytest.mark.parametrize("slots", [{0: (0,)}, {1: (NUM_EXPERTS,)}, {1: (-2,)}])
def test_slots_that_the_model_has_not(setup: MakeSetup, slots: dict[int, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="has no experts"):
        setup().loaded(slots)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_sequence_of_changes(checkpoint: Callable[[StoredExperts], Path], data: st.DataObject) -> None:
    """Slots that serve keep their bits through every change, and all that is asked for comes to be."""
    directory = checkpoint("fused")
    config, pipeline = read_model_config(directory), PipelineConfig(model=str(directory), load="dummy")
    whole = ExpertWorker.load(config, pipeline, dict.fromkeys((1, 3), tuple(range(NUM_EXPERTS))), CPU)
    of_expert = _outputs(whole, whole.slots)
    experts = st.lists(st.integers(NONE, NUM_EXPERTS - 1), min_size=1, max_size=5).map(tuple)
    worker, in_use = ExpertWorker.load(config, pipeline, {}, CPU), {}
    for _ in range(data.draw(st.integers(1, 5))):
        wanted = {layer: list(data.draw(experts)) for layer in data.draw(st.sets(st.sampled_from([1, 3])))}
        for layer, slots in wanted.items():
            for slot, old in enumerate(in_use.get(layer, ())[: len(slots)]):
                if old != NONE:
                    slots[slot] = data.draw(st.sampled_from([old, NONE]))
        slots_now = {layer: tuple(slots) for layer, slots in wanted.items()}
        worker.change(slots_now, in_use)
        assert worker.holds(slots_now)
        for named in (in_use, slots_now):
            for (layer, slot), y_ND in _outputs(worker, named).items():
                assert torch.equal(y_ND, of_expert[layer, named[layer][slot]])
        assert worker.proofs(slots_now).keys() == slots_now.keys()
        in_use = slots_now


class _Serving:
    """A thread that computes with slots over and over, and compares every bit with the first time."""

    def __init__(self, worker: ExpertWorker, slots: dict[int, tuple[int, ...]]) -> None:
        self._worker, self._slots = worker, slots
        self._expected = _outputs(worker, slots)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.num_rounds = 0
        self.problems: list[str] = []

    def __enter__(self) -> "_Serving":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(1)
        while not self._stopping.is_set() and not self.problems:
            for at, y_ND in _outputs(self._worker, self._slots).items():
                if not torch.equal(y_ND, self._expected[at]):
                    self.problems.append(f"slot {at} in round {self.num_rounds}")
            self.num_rounds += 1


@pytest.mark.parametrize("stored", ["fused", "fp8"])
def test_what_serves_keeps_its_bits_while_others_load_and_layers_move(setup: MakeSetup, stored: str) -> None:
    worker = setup(stored).loaded({1: (2, NONE), 3: (0,)})
    in_use = {1: (2,), 3: (0,)}
    with _Serving(worker, in_use) as serving:
        num_slots = 2
        while (serving.num_rounds < 40 or num_slots < 12) and not serving.problems:
            num_slots += 1  # every change moves both layers to new memory
            filler = tuple((num_slots + slot) % NUM_EXPERTS for slot in range(1, num_slots))
            worker.change({1: (2, *filler), 3: (0, *filler)}, in_use)
    assert not serving.problems
    assert serving.num_rounds > 3


def test_a_layer_that_moves_leaves_its_old_memory(setup: MakeSetup) -> None:
    worker = setup().loaded({1: (2,)})
    old = weakref.ref(worker._layers[1].weights.down_SDF)
    worker.change({1: (2, 3)}, {1: (2,)})
    assert old() is None
    assert worker._layers[1].capacity == 2
    worker.free_replaced()  # nothing to do on a CPU


def test_no_memory_is_a_typed_error_and_touches_nothing(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = setup()
    worker = ours.loaded({1: (2,)})

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(worker_module, "allocate_slots", fail)
    with pytest.raises(LayoutError, match="no memory for 2 experts of layer 1"):
        worker.change({1: (2, 3)}, {1: (2,)})
    _assert_right(ours, worker, {1: (2,)})


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(setup: MakeSetup, tmp_path: Path) -> Callable[..., tuple["Setup", Path]]:
    """A setup whose checkpoint is a copy that a test may break: the setup, and the file with the experts."""

    def get(stored: StoredExperts = "fused") -> tuple["Setup", Path]:
        ours = setup(stored)
        directory = shutil.copytree(ours.pipeline.model, tmp_path / stored)
        ours.pipeline = PipelineConfig(model=str(directory))
        (shard,) = directory.glob("*.safetensors")
        return ours, shard

    return get


def test_a_read_that_fails_costs_what_serves_nothing_and_may_be_tried_again(
    broken: Callable[..., tuple["Setup", Path]],
) -> None:
    ours, shard = broken()
    worker, _ = ours.worker()
    in_use = {1: (2, NONE)}
    worker.change(in_use, {})
    before = _outputs(worker, in_use)[1, 0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 4])
    then = {1: (2, 3), 3: (0, 1, 2, 3)}
    with pytest.raises(CheckpointError, match=r"safetensors.*ended at byte"):
        worker.change(then, in_use)
    assert torch.equal(_outputs(worker, in_use)[1, 0], before)
    assert worker.holds(in_use)
    assert not worker.holds(then)
    shard.write_bytes(whole)
    worker.change(then, in_use)
    _assert_right(ours, worker, then)


def test_a_slot_that_is_written_holds_nothing_meanwhile_nor_after_a_failure(
    broken: Callable[..., tuple["Setup", Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert 3 serves no more: its slot is given to 0, which cannot be read, then to 2, which lies in another slot."""
    ours, shard = broken()
    worker, origin = ours.worker()
    worker.change({1: (2, 3)}, {})
    read, copy, seen = origin.inner.fill, slots_module.LayerSlots.copy_slot, []

    def fill(*args: Any) -> None:
        seen.append(worker.find(1, 3))
        shard.unlink()
        read(*args)

    def copy_slot(self: slots_module.LayerSlots, source: int, target: int) -> None:
        seen.append(self.held(target))
        copy(self, source, target)

    monkeypatch.setattr(origin.inner, "fill", fill)
    monkeypatch.setattr(slots_module.LayerSlots, "copy_slot", copy_slot)
    with pytest.raises(CheckpointError):
        worker.change({1: (2, 0)}, {1: (2, NONE)})
    assert worker.slots == {1: (2, NONE)}
    worker.change({1: (2, 2)}, {1: (2, NONE)})
    worker._layers[1].hold(1, 3, SlotProof(checksum=0, probe=0.0))
    worker.change({1: (2, 2)}, {1: (2, NONE)})
    assert seen == [None, None, None]


@pytest.mark.parametrize("stored", ["fused", "fp8"])
def test_experts_that_are_not_finite_are_refused(
    broken: Callable[..., tuple["Setup", Path]], stored: StoredExperts
) -> None:
    """One NaN, in the last column of a row in the middle of the down projection of expert 3."""
    ours, shard = broken(stored)
    worker = ours.loaded({1: (2, NONE)})
    index = validate_checkpoint(Path(ours.pipeline.model))
    fused = "model.layers.1.feed_forward.experts.down_proj"
    info = index.tensors[fused if stored == "fused" else fused.replace("down_proj", "3.down_proj.weight")]
    where = info.end - info.item_bytes * (1 + 5 * info.shape[-1])
    with shard.open("r+b") as file:
        file.seek(where)
        file.write(b"\xff" * info.item_bytes)
    with pytest.raises(CheckpointError, match="expert 3 of layer 1 does not compute finite numbers"):
        worker.change({1: (2, 3)}, {1: (2,)})
    assert worker.slots == {1: (2, NONE)}
    with pytest.raises(CheckpointError, match="expert 3 of layer 1"):
        ours.loaded({1: (3,)})


def test_an_expert_that_lies_in_another_slot_is_copied_from_there(broken: Callable[..., tuple["Setup", Path]]) -> None:
    ours, shard = broken()
    whole = shard.read_bytes()
    worker = ours.loaded({1: (2, 0, NONE)})
    shard.unlink()
    worker.change({1: (NONE, 0, 2)}, {1: (2, 0, NONE)})
    shard.write_bytes(whole)
    _assert_right(ours, worker, {1: (2, 0, 2)})


# --- proofs ---------------------------------------------------------------------------------------------------------


def test_proofs_by_slot_and_what_is_not_held(setup: MakeSetup) -> None:
    worker = setup().loaded({1: (2, NONE, 3, 2)})
    proofs = worker.proofs({1: (2, NONE, 3, 2)})[1]
    assert proofs[0] == proofs[3] != proofs[2]
    assert proofs[1] == SlotProof(checksum=0, probe=0.0)
    assert worker.proofs({1: (NONE, NONE)}) == {1: (proofs[1], proofs[1])}
    for slots in ({1: (3,)}, {1: (2, 1)}, {3: (0,)}, {1: (2, NONE, 3, 2, 0)}):
        with pytest.raises(ValueError, match="does not hold expert"):
            worker.proofs(slots)


def test_probe_by_definition(setup: MakeSetup) -> None:
    ours = setup("fp8", torch.bfloat16)
    worker = ours.loaded({1: (2,)})
    y_1D = _reference(ours, 1, 2, worker._probe_1D)
    assert worker.proofs({1: (2,)})[1][0].probe == pytest.approx(float(y_1D.float().abs().mean()), rel=1e-6)


def test_each_expert_is_proven_once(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for proofs again must not read gigabytes again."""
    counts: list[object] = []
    real = slots_module.checksum
    monkeypatch.setattr(slots_module, "checksum", lambda parts: counts.append(parts) or real(parts))
    worker = setup().loaded({1: (2, 3), 3: (0,)})
    worker.proofs({1: (2, 3)})
    worker.change({1: (2, 3, 1)}, {1: (2, 3)})  # moves the layer, and proves the new one only
    worker.proofs({1: (2, 3, 1)})
    assert len(counts) == 4


def test_progress_counts_up_to_all_that_was_missing(setup: MakeSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    worker = setup().loaded({1: (2, NONE)})
    monkeypatch.setitem(worker_module.READ_BATCH_BYTES, "cpu", 1)  # a batch for each
    worker.change({1: (2, 3), 3: (0, 1)}, {1: (2,)}, (), lambda done, total: told.append((done, total)))
    missing_bytes = 3 * worker.weight_bytes // 4
    assert told[-1] == (missing_bytes, missing_bytes)
    assert told == sorted(told)
    assert {total for _, total in told} == {missing_bytes}
