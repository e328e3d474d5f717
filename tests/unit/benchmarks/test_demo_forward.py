"""The training forward is the served forward: on random weights, on the trained ones, and with rows shared by many."""

import random
from pathlib import Path

import pytest
import torch
from demo_small import SMALL, load

from actors.attention.local_model import LocalModel
from actors.checkpoint.config import ModelConfig, read_model_config
from benchmarks.demo_model.model import Weights, forward, initial_weights
from benchmarks.demo_model.shape import DIRECTORY
from benchmarks.demo_model.weights_file import read_weights, write_weights

TOLERANCE = 1e-3  # 30 times fp32 noise, far below the smallest mistake that is known


def _ids(count: int, vocab: int) -> list[int]:
    draw = random.Random(count)
    return [draw.randrange(vocab) for _ in range(count)]


def _training_logits(weights: Weights, config: ModelConfig, *prompts: list[int]) -> torch.Tensor:
    """One row that holds the prompts one after another."""
    ids = [token for prompt in prompts for token in prompt]
    positions = [i for prompt in prompts for i in range(len(prompt))]
    with torch.no_grad():
        return forward(weights, config, torch.tensor([ids]), torch.tensor([positions])).logits_BLV[0]


def test_agrees_with_the_served_forward_on_random_weights(small: Path) -> None:
    """140 tokens: five chunks of 32, and temperatures of five steps."""
    ids = _ids(140, SMALL.base_vocab)
    ours = _training_logits(read_weights(small), read_model_config(small), ids)
    assert ours.abs().max() > 3
    assert (ours - load(small).logits(ids)).abs().max() < TOLERANCE


def test_agrees_with_the_served_forward_on_the_trained_weights(trained: LocalModel) -> None:
    ids = _ids(300, trained.config.bos_token_id)
    ours = _training_logits(read_weights(DIRECTORY), trained.config, ids)
    assert (ours - trained.logits(ids)).abs().max() < TOLERANCE


def test_conversations_of_a_row_do_not_see_each_other(small: Path) -> None:
    """Also where the second begins in the middle of a chunk of the row."""
    config, weights = read_model_config(small), read_weights(small)
    first, second = _ids(45, SMALL.base_vocab), _ids(70, SMALL.base_vocab)
    both = _training_logits(weights, config, first, second)
    assert (both[:45] - _training_logits(weights, config, first)).abs().max() < TOLERANCE
    assert (both[45:] - _training_logits(weights, config, second)).abs().max() < TOLERANCE


def test_every_weight_that_a_token_used_learns(small: Path) -> None:
    config = read_model_config(small)
    weights = {name: weight.requires_grad_() for name, weight in read_weights(small).items()}
    output = forward(weights, config, torch.tensor([_ids(200, SMALL.base_vocab)]), torch.arange(200)[None])
    assert (output.tokens_ME.sum(dim=1) == 200).all()
    (output.logits_BLV.square().mean() + output.balance).backward()
    for name, weight in weights.items():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_balance_is_one_where_experts_share_alike_and_more_where_they_do_not(small: Path, spread: float) -> None:
    """All experts alike: the probabilities are uniform. One favoured everywhere: nearly the number of experts."""
    config, weights = read_model_config(small), read_weights(small)
    for layer in config.moe_layers:
        router_ED = torch.zeros(config.num_experts, config.hidden_size)
        router_ED[0] = spread * weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
        weights[f"model.layers.{layer}.feed_forward.router.weight"] = router_ED
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].abs() + 1
    output = forward(weights, config, torch.tensor([_ids(50, SMALL.base_vocab)]), torch.arange(50)[None])
    assert output.balance.item() == pytest.approx(1.0, abs=1e-5) if spread == 0 else output.balance.item() > 1.5


def test_weights_come_back_from_disk_rounded_to_bfloat16(tmp_path: Path, small: Path) -> None:
    weights = initial_weights(read_model_config(small), seed=1)
    assert write_weights(tmp_path, weights) == (tmp_path / "model.safetensors").stat().st_size
    back = read_weights(tmp_path)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight.to(torch.bfloat16).float()) for name, weight in weights.items())
