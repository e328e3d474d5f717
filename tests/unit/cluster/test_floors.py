"""Floors against a table that was computed independently (a roofline of Maverick on 4 H200 by another program)."""

from dataclasses import replace

import pytest

from actors.checkpoint.shapes import SHAPES, StoredExperts, shape_config
from cluster.floors import (
    Split,
    attention_floor_s,
    busiest_rank,
    decode,
    experts_floor_s,
    prefill,
    step_floor_s,
    tensor_parallel_floor_s,
)
from cluster.footprint import Footprint, Precision
from cluster.hardware import H200, parse_machines

MAVERICK = shape_config(SHAPES["maverick"], experts="fp8")
SCOUT = shape_config(SHAPES["scout"])
OFFICIAL = Footprint(model=MAVERICK, precision=Precision.of(MAVERICK))
# Shared experts and dense layers in FP8 too: what requantizing at load would give.
ALL_FFN = Footprint(model=MAVERICK, precision=Precision(routed_bytes=1, ffn_bytes=1, dense_bytes=2, kv_bytes=2))
FOUR = parse_machines("4xH200")
COLOCATED = Split(layout="colocated", attention_ranks=4, expert_ranks=4)
DISAGGREGATED = Split(layout="disaggregated", attention_ranks=1, expert_ranks=3)


@pytest.mark.parametrize(
    ("footprint", "split", "milliseconds"),
    [
        (OFFICIAL, COLOCATED, {1: 7.18, 8: 8.93, 32: 13.9, 128: 25.6, 512: 40.9, 2048: 88.1}),
        (ALL_FFN, COLOCATED, {1: 5.08, 8: 6.82, 32: 11.8, 128: 23.5, 512: 38.8, 2048: 82.9}),
        (OFFICIAL, DISAGGREGATED, {1: 7.18, 8: 9.93, 32: 17.7, 128: 39.4, 512: 95.7}),
        (ALL_FFN, DISAGGREGATED, {1: 5.08, 8: 7.83, 32: 15.6, 128: 37.2, 512: 90.6}),
    ],
)
def test_decode_floors_of_maverick_on_4xh200(
    footprint: Footprint, split: Split, milliseconds: dict[int, float]
) -> None:
    for batch, expected_ms in milliseconds.items():
        assert step_floor_s(footprint, FOUR, split, decode(batch)) * 1e3 == pytest.approx(expected_ms, rel=0.03)


def test_tensor_parallel_floors_for_comparison() -> None:
    for batch, expected_ms in {1: 2.93, 8: 4.86, 32: 9.97, 128: 22.3, 512: 42.1}.items():
        seconds = tensor_parallel_floor_s(OFFICIAL, H200, 4, decode(batch))
        assert seconds * 1e3 == pytest.approx(expected_ms, rel=0.03)


def test_a_unit_of_all_ranks_is_tensor_parallel_and_dispatches_nothing() -> None:
    unit = Split(layout="colocated", attention_ranks=4, expert_ranks=4, attention_tp=4)
    assert (str(unit), unit.attention_units) == ("colocated 4 TP4", 1)
    for work in (decode(1), decode(128), prefill(8192)):
        assert step_floor_s(OFFICIAL, FOUR, unit, work) == tensor_parallel_floor_s(OFFICIAL, H200, 4, work)
    half = Split(layout="colocated", attention_ranks=4, expert_ranks=4, attention_tp=2)
    floors = [step_floor_s(OFFICIAL, FOUR, split, decode(8)) for split in (unit, half, COLOCATED)]
    assert floors == sorted(floors)  # at small batches, reading dense weights again costs more than sums


def test_floors_of_slices() -> None:
    """Every rank reads a quarter of each distinct expert, and none is the busiest. Context 1,104."""
    unit, sliced = (
        Split(layout="colocated", attention_ranks=4, expert_ranks=4, attention_tp=4, expert_tp=n) for n in (1, 4)
    )
    assert str(sliced) == "colocated 4 TP4 sliced"
    for batch, expected_ms in {1: 2.4, 8: 3.7, 32: 7.8, 128: 18.9, 256: 26.4}.items():
        seconds = step_floor_s(OFFICIAL, FOUR, sliced, decode(batch, 1104))
        assert seconds * 1e3 == pytest.approx(expected_ms, rel=0.03)
        assert seconds < step_floor_s(OFFICIAL, FOUR, unit, decode(batch, 1104))


def test_prefill_floors_of_maverick_on_4xh200() -> None:
    for chunk, expected in {512: 17_897, 2048: 51_946, 8192: 91_615, 16384: 104_976}.items():
        rate = chunk / step_floor_s(OFFICIAL, FOUR, COLOCATED, prefill(chunk))
        assert rate == pytest.approx(expected, rel=0.03)


def test_scout_fp8_on_one_h200() -> None:
    footprint = Footprint(model=SCOUT, precision=Precision(routed_bytes=1, ffn_bytes=1, dense_bytes=2, kv_bytes=2))
    for batch, expected_ms in {1: 4.8, 8: 13.2, 32: 25.9, 128: 37.7}.items():
        seconds = step_floor_s(footprint, parse_machines("H200"), Split(layout="single"), decode(batch))
        assert seconds * 1e3 == pytest.approx(expected_ms, rel=0.03)


def test_scout_int4_on_one_h200() -> None:
    model = shape_config(SHAPES["scout"], experts="int4")
    footprint = Footprint(model=model, precision=Precision.of(model))
    for batch, expected_ms in {1: 3.4, 8: 8.1, 32: 15.7, 128: 26.6}.items():
        seconds = step_floor_s(footprint, parse_machines("H200"), Split(layout="single"), decode(batch))
        assert seconds * 1e3 == pytest.approx(expected_ms, rel=0.04)


@pytest.mark.parametrize(
    ("model", "params", "attention", "routed"),
    [(MAVERICK, 400.71e9, 3_019_898_880, 386_547_056_640), (SCOUT, 107.77e9, 3_019_898_880, 96_636_764_160)],
)
def test_parameters_are_the_published_ones(model: object, params: float, attention: int, routed: int) -> None:
    footprint = Footprint(model=model, precision=Precision.of(model))  # type: ignore[arg-type]
    assert footprint.total_params == pytest.approx(params, rel=1e-4)
    assert footprint.attention_params == attention
    num_experts = len(footprint.model.moe_layers) * footprint.model.num_experts
    assert num_experts * footprint.expert_params == routed


def test_bytes_by_precision() -> None:
    """Text part of the official FP8 checkpoint: 388.1 GiB with 1.7 GB of vision tower; bf16 is twice the parameters."""
    assert OFFICIAL.total_bytes == pytest.approx(388.1 * 2**30 - 1.74e9, rel=0.001)
    bf16 = Footprint(model=MAVERICK, precision=Precision.of(MAVERICK, "bfloat16"))
    assert bf16.total_bytes == 2 * bf16.total_params
    assert bf16.kv_bytes_per_token() == 192 * 1024
    fp32 = Footprint(model=MAVERICK, precision=Precision.of(MAVERICK, "float32"))
    assert fp32.total_bytes == 2 * bf16.total_bytes


@pytest.mark.parametrize(
    ("experts", "routed_bytes", "ffn_bytes", "gigabytes"),
    [("fp8", 1, 2, 119.0), ("fp8_ffn", 1, 1, 113.0), ("int4", 4.125 / 8, 4.125 / 8, 63.1), ("fused", 2, 2, 215.5)],
)
def test_scout_in_the_form_of_its_checkpoint(
    experts: StoredExperts, routed_bytes: float, ffn_bytes: float, gigabytes: float
) -> None:
    """96.6 G parameters of routed and 6.0 G of shared experts; 6.0 GB of attention and 4.1 GB of both tables."""
    model = shape_config(SHAPES["scout"], experts=experts)
    precision = Precision.of(model)
    assert (precision.routed_bytes, precision.ffn_bytes, precision.dense_bytes) == (routed_bytes, ffn_bytes, 2)
    assert Footprint(model=model, precision=precision).total_bytes == pytest.approx(gigabytes * 1e9, rel=0.005)


def test_precision_by_wish() -> None:
    model = shape_config(SHAPES["scout"])
    assert Precision.of(model, "int4").ffn_bytes == 4.125 / 8
    assert Precision.of(model, "fp8").ffn_bytes == 2
    assert Precision.of(model, "fp8", quantize_ffn="fp8").ffn_bytes == 1
    assert Precision.of(model, kv_cache_dtype="fp8").kv_bytes == 1
    assert Precision.of(shape_config(SHAPES["scout"], experts="int4"), "bfloat16").routed_bytes == 2
    on_cpu = Precision.of(shape_config(SHAPES["scout"], experts="int4"), dtype="float32", widens_fp8=True)
    assert (on_cpu.routed_bytes, on_cpu.ffn_bytes) == (4, 4)
    fp8_kv = Footprint(model=model, precision=Precision.of(model, kv_cache_dtype="fp8"))
    assert fp8_kv.kv_bytes_per_token() == 96 * 1024
    assert fp8_kv.kv_bytes_per_token(of=4) == 24 * 1024


def test_a_shard_has_its_part_of_all_but_the_embedding_norms_and_routers() -> None:
    table, norms, routers = 202048 * 5120 * 2, 97 * 5120 * 2, 24 * 128 * 5120 * 2
    divided = OFFICIAL.attention_rank_bytes - table - norms - routers
    assert OFFICIAL.attention_shard_bytes(4) == pytest.approx(table + norms + routers + divided / 4)
    assert OFFICIAL.attention_shard_bytes(1) == OFFICIAL.attention_rank_bytes


def test_the_busiest_rank_of_one_is_all_there_is() -> None:
    one = busiest_rank(128, 64, 1)
    assert one.tokens == 64
    assert one.experts == pytest.approx(128 * (1 - (1 - 1 / 128) ** 64), rel=0.02)
    assert busiest_rank(16, 1, 4).experts == 1


def test_chunked_layers_read_no_more_than_their_chunk() -> None:
    """Beyond the chunk only the 12 global layers of 48 read more: 4 KiB per layer and token."""
    machines, split = parse_machines("H200"), Split(layout="single")
    seconds = {c: step_floor_s(OFFICIAL, machines, split, decode(1, c)) for c in (8192, 16384, 24576)}
    grown_s = seconds[24576] - seconds[16384]
    assert grown_s == pytest.approx(8192 * 12 * 4096 / H200.memory_bytes_s, rel=1e-6)
    assert seconds[16384] - seconds[8192] == pytest.approx(grown_s, rel=1e-6)


def test_hosts_apart_cost_more() -> None:
    split = Split(layout="disaggregated", attention_ranks=4, expert_ranks=4)
    near = step_floor_s(OFFICIAL, parse_machines("8xH200"), split, decode(32))
    far = step_floor_s(OFFICIAL, parse_machines("2x4xH200"), split, decode(32))
    assert far > near


def test_two_micro_batches_keep_the_busier_side_busy() -> None:
    """1A+3E: worth it from about 32 requests on, as long as weights are most of what is read."""
    halves = replace(DISAGGREGATED, micro_batches=2)
    seconds = {
        (batch, split.micro_batches): step_floor_s(OFFICIAL, FOUR, split, decode(batch, 1104))
        for batch in (8, 32, 128)
        for split in (DISAGGREGATED, halves)
    }
    assert seconds[8, 2] > seconds[8, 1]
    assert seconds[32, 2] < 0.9 * seconds[32, 1]
    assert seconds[128, 2] < 0.85 * seconds[128, 1]
    busier_s = max(
        attention_floor_s(OFFICIAL, H200, decode(128, 1104)), experts_floor_s(OFFICIAL, H200, 128, 3)
    )  # no division spares anybody work
    assert seconds[128, 2] > busier_s
