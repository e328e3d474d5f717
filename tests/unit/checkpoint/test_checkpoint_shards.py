"""Tensor-parallel shards: together they are the whole, in every form, and each reads no more than it must."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from actors.checkpoint import pieces
from actors.checkpoint.config import ModelConfig, read_model_config
from actors.checkpoint.headers import read_header
from actors.checkpoint.index import CheckpointIndex, validate_checkpoint
from actors.checkpoint.make_model import make_model
from actors.checkpoint.pieces import Piece
from actors.checkpoint.random_weights import random_rows, random_tensor
from actors.checkpoint.reader import Reader
from actors.checkpoint.shapes import SHAPES, StoredExperts, shape_config
from actors.checkpoint.shard import check_shard
from actors.checkpoint.weights import AttentionWeights, DenseFfn, MoeGate, Shard, dummy_attention, load_attention
from actors.errors import ConfigError

WIDE = dataclasses.replace(SHAPES["tiny-wide"], num_layers=2)
TIED = dataclasses.replace(WIDE, tie_word_embeddings=True)
STORED: tuple[StoredExperts, ...] = ("fused", "fp8_ffn", "int4")
Opened = tuple[CheckpointIndex, ModelConfig]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[StoredExperts], Opened]:
    made: dict[str, Path] = {}

    def get(stored: StoredExperts) -> Opened:
        if stored not in made:
            made[stored] = tmp_path_factory.mktemp("shards") / stored
            make_model(made[stored], WIDE, experts=stored)
        return validate_checkpoint(made[stored]), read_model_config(made[stored])

    return get


def ffn_of(weights: AttentionWeights, layer: int) -> DenseFfn:
    ffn = weights.layers[layer].ffn
    return ffn.shared if isinstance(ffn, MoeGate) else ffn


def halves(tensors: list[Tensor]) -> Tensor:
    """The rows of first halves of all shards, then of second ones: gate and up apart."""
    return torch.cat([tensor.chunk(2)[half] for half in (0, 1) for tensor in tensors])


def assert_together(shards: list[AttentionWeights], whole: AttentionWeights, config: ModelConfig) -> None:
    queries, keys = (n * config.head_dim // len(shards) for n in (config.num_heads, config.num_kv_heads))
    assert torch.equal(torch.cat([s.lm_head_VD for s in shards]), whole.lm_head_VD)
    assert [s.shard.index for s in shards] == list(range(len(shards)))
    for s in shards:
        assert torch.equal(s.embed_VD, whole.embed_VD)
        assert torch.equal(s.final_norm_D, whole.final_norm_D)
    for i, theirs in enumerate(whole.layers):
        ours = [s.layers[i] for s in shards]
        parts = [layer.wqkv_QD.split([queries, keys, keys]) for layer in ours]
        assert torch.equal(torch.cat([part[kind] for kind in range(3) for part in parts]), theirs.wqkv_QD)
        assert torch.equal(torch.cat([layer.wo_DA for layer in ours], 1), theirs.wo_DA)
        assert all(torch.equal(layer.post_norm_D, theirs.post_norm_D) for layer in ours)
        if isinstance(theirs.ffn, MoeGate):
            assert all(torch.equal(layer.ffn.router_ED, theirs.ffn.router_ED) for layer in ours)  # type: ignore[union-attr]
        ffns, ffn = [ffn_of(s, i) for s in shards], ffn_of(whole, i)
        assert torch.equal(halves([f.gate_up_ND for f in ffns]), ffn.gate_up_ND)
        assert torch.equal(torch.cat([f.down_DF for f in ffns], 1), ffn.down_DF)
        if ffn.gate_up_scale is not None:
            assert torch.equal(halves([f.gate_up_scale for f in ffns]), ffn.gate_up_scale)  # type: ignore[misc]
            assert all(torch.equal(f.down_scale, ffn.down_scale) for f in ffns)  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", STORED)
def test_shards_are_the_whole(wide: Callable[[StoredExperts], Opened], stored: StoredExperts) -> None:
    index, config = wide(stored)
    whole = load_attention(index, config, torch.float32, "cpu")
    shards = [load_attention(index, config, torch.float32, "cpu", shard=Shard(index=i, of=2)) for i in range(2)]
    assert_together(shards, whole, config)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("quantize_ffn", ["", "fp8"])
def test_dummy_shards_are_the_whole(
    wide: Callable[[StoredExperts], Opened], stored: StoredExperts, quantize_ffn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a tensor is made in several blocks, at whose borders no shard begins."""
    monkeypatch.setattr("actors.checkpoint.random_weights.BLOCK_VALUES", 128 * 50)
    _, config = wide(stored)
    made = [
        dummy_attention(config, torch.float32, "cpu", 5, shard=shard, quantize_ffn=quantize_ffn)  # type: ignore[arg-type]
        for shard in (Shard(), Shard(index=0, of=2), Shard(index=1, of=2))
    ]
    assert_together(made[1:], made[0], config)


def test_requantized_shards_are_the_whole(wide: Callable[[StoredExperts], Opened]) -> None:
    """A channel's scale is that of its whole row, though a shard holds some columns of it."""
    index, config = wide("fused")
    whole, *shards = (
        load_attention(index, config, torch.float32, "cpu", shard=shard, quantize_ffn="fp8")
        for shard in (Shard(), Shard(index=0, of=2), Shard(index=1, of=2))
    )
    assert ffn_of(whole, 0).down_scale is not None
    assert_together(list(shards), whole, config)
    plain = load_attention(index, config, torch.float32, "cpu")
    for layer in (0, 1):
        ours, theirs = ffn_of(whole, layer), ffn_of(plain, layer)
        restored = ours.gate_up_ND.float() * ours.gate_up_scale[:, None]  # type: ignore[index]
        assert torch.allclose(restored, theirs.gate_up_ND, rtol=1 / 15, atol=1e-3)
    dummy = dummy_attention(config, torch.float32, "cpu", 0, quantize_ffn="fp8")
    assert torch.equal(ffn_of(dummy, 1).down_DF, ffn_of(whole, 1).down_DF)


def test_tied_heads_are_rows_of_the_embedding(tmp_path: Path) -> None:
    make_model(tmp_path, TIED)
    index, config = validate_checkpoint(tmp_path), read_model_config(tmp_path)
    shards = [load_attention(index, config, torch.float32, "cpu", shard=Shard(index=i, of=2)) for i in range(2)]
    assert torch.equal(torch.cat([s.lm_head_VD for s in shards]), shards[0].embed_VD)
    assert all(s.lm_head_VD.untyped_storage().data_ptr() == s.embed_VD.untyped_storage().data_ptr() for s in shards)


@pytest.mark.parametrize(
    ("changes", "stored", "of", "what"),
    [
        ({"num_heads": 10, "num_kv_heads": 2}, "fused", 4, "10 attention heads"),
        ({"num_heads": 12, "num_kv_heads": 2}, "fused", 4, "2 key-value heads"),
        ({"num_heads": 12, "num_kv_heads": 4, "vocab_size": 577}, "fused", 2, "577 rows of the vocabulary"),
        ({"num_heads": 12, "num_kv_heads": 4}, "int4", 4, "256 columns of a shared expert .* groups of 128"),
        ({"num_heads": 12, "num_kv_heads": 4, "dense_width": 510}, "fused", 4, "510 columns of a dense layer"),
    ],
)
def test_what_cannot_be_divided_is_refused(changes: dict[str, int], stored: StoredExperts, of: int, what: str) -> None:
    config = shape_config(dataclasses.replace(WIDE, **changes), experts=stored)  # type: ignore[arg-type]
    check_shard(config, 1)
    with pytest.raises(ConfigError, match=f"attention_tp: {what}"):
        check_shard(config, of)


def test_there_is_no_such_shard() -> None:
    with pytest.raises(ValueError, match="no shard 2 of 2"):
        Shard(index=2, of=2)


@pytest.mark.parametrize("least_bytes", [1, 64, 10**6])  # slices of rows, and whole rows that are cut in memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_reach_their_target(
    tmp_path: Path, dtype: torch.dtype, least_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "LEAST_SLICE_BYTES", least_bytes)
    values = torch.randn(11, 40, generator=torch.Generator().manual_seed(0))
    save_file({"a": values}, tmp_path / "a.safetensors")
    info = read_header(tmp_path / "a.safetensors")["a"]
    target = torch.zeros(7, 16, dtype=dtype)
    reader = Reader(reads_in_flight=2, block_bytes=300)
    reader.read([Piece(info=info, first_row=3, first_column=20, target=target)])
    assert torch.equal(target, values[3:10, 20:36].to(dtype))
    assert reader.read_bytes == 7 * 4 * (16 if least_bytes <= 64 else 40)


def test_rows_of_a_random_tensor_need_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.checkpoint.random_weights.BLOCK_VALUES", 35)
    cpu = torch.device("cpu")
    whole = random_tensor("x.weight", (23, 7), seed=1, device=cpu)
    parts = list(random_rows("x.weight", (23, 7), range(4, 17), seed=1, device=cpu))
    assert [rows for rows, _ in parts] == [range(4, 5), range(5, 10), range(10, 15), range(15, 17)]
    assert torch.equal(torch.cat([values for _, values in parts]), whole[4:17])
    assert len(whole.unique()) == 23 * 7  # no block is another's copy
