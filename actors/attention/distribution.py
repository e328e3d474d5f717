"""From logits and a uniform number to a token: temperature, top-k, top-p, min-p and the draw.

Owns the arithmetic of a distribution; knows nothing of requests. Probabilities are held as integers (fixed point: the
likeliest token weighs `unit(V)`), because integer sums do not depend on the order of adding: a row gives the same
token however many rows share the batch and whichever kernel adds them. On CUDA nothing here waits for the device.

Tokens rank by logit, equal ones by id, lower first, so that top_k = 1 is greedy. Shapes: R rows, V vocabulary, N the
tokens that are ranked.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_TOKENS = 64  # of the two-level search; divides the vocabulary of most models
SHORT_RANK = 1024  # a CPU looks for the nucleus among this many tokens before it sorts them all


def unit(vocab_size: int) -> int:
    """The weight of the likeliest token: the power of two that keeps the sum of a row below 2**62."""
    return 1 << (62 - vocab_size.bit_length())


def distances(x_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """(max - logit) / temperature: fp32, never negative, 0 exactly at the maximum. x_RV fp32, temperature_R above 0.

    The difference comes first: a logit over a small temperature overflows, a distance that does is merely far.
    """
    return (x_RV.amax(-1, keepdim=True) - x_RV).div_(temperature_R[:, None])


def weights_at(distance: Tensor, unit_weight: int) -> Tensor:
    """floor(exp(-distance) * unit_weight), int64."""
    return distance.neg().exp_().mul_(unit_weight).to(torch.int64)


def keep_likeliest(
    weight_RV: Tensor, distance_RV: Tensor, top_k_R: Tensor | None, top_p_R: Tensor | None, max_rank: int
) -> Tensor:
    """Weights of the k likeliest tokens, and of these the fewest likeliest that have `top_p` of their weight; else 0.

    top_k_R int64 in [1, max_rank], max_rank at most V; top_p_R float64 in (0, 1]. Each may be None, not both; without
    top_k_R max_rank is V. At least one token is kept.
    """
    if top_k_R is None:
        assert top_p_R is not None
        target_R = _share(weight_RV.sum(-1), top_p_R)
        nearest_RN, ranked_RN = _rank_nucleus(weight_RV, distance_RV, target_R)
        return _keep_ranks(weight_RV, distance_RV, nearest_RN, _locate(ranked_RN, target_R - 1)[:, None] + 1)
    nearest_RN = _nearest(distance_RV, max_rank)
    if top_p_R is None:
        return _keep_ranks(weight_RV, distance_RV, nearest_RN, top_k_R[:, None])
    ranks_N = torch.arange(max_rank, device=weight_RV.device)
    ranked_RN = weights_at(nearest_RN, unit(weight_RV.shape[-1])).masked_fill_(ranks_N >= top_k_R[:, None], 0)
    target_R = _share(ranked_RN.sum(-1), top_p_R)
    return _keep_ranks(weight_RV, distance_RV, nearest_RN, _locate(ranked_RN, target_R - 1)[:, None] + 1)


def keep_min_p(weight_RV: Tensor, min_p_R: Tensor) -> Tensor:
    """Weights of tokens that are at least `min_p` times as likely as the likeliest, 0 elsewhere.

    min_p_R float64 in [0, 1].
    """
    return weight_RV.masked_fill(weight_RV < least_weight(min_p_R, weight_RV.shape[-1])[:, None], 0)


def least_weight(min_p_R: Tensor, vocab_size: int) -> Tensor:
    """int64: of a token that is `min_p` (float64 in [0, 1]) times as likely as the likeliest."""
    return (min_p_R * unit(vocab_size)).ceil_().to(torch.int64)


def draw(weight_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token in whose share of the row's weight `uniform_R` (float64 in [0, 1)) falls, shares lying in order of id.

    Returns int64 [R]. A row without weight gives some id in [0, V).
    """
    total_R = weight_RV.sum(-1)
    target_R = (total_R.double() * uniform_R).to(torch.int64).minimum(total_R - 1)
    return _locate(weight_RV, target_R)


def _share(total_R: Tensor, share_R: Tensor) -> Tensor:
    """The smallest weight that is at least `share` of the total, 1 or more, the total or less."""
    return (total_R.double() * share_R).ceil_().to(torch.int64).minimum(total_R).clamp_(min=1)


def _rank_nucleus(weight_RV: Tensor, distance_RV: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    """Distances, ascending, and weights of the nearest tokens: at least as many as have the target together."""
    vocab_size = weight_RV.shape[-1]
    if weight_RV.is_cpu and vocab_size > SHORT_RANK:
        nearest_RN = _nearest(distance_RV, SHORT_RANK)
        ranked_RN = weights_at(nearest_RN, unit(vocab_size))
        if bool((ranked_RN.sum(-1) >= target_R).all()):
            return nearest_RN, ranked_RN
    nearest_RV = _nearest(distance_RV, vocab_size)
    return nearest_RV, weights_at(nearest_RV, unit(vocab_size))


def _nearest(distance_RV: Tensor, num_ranked: int) -> Tensor:
    """The smallest distances of each row, ascending, [R, num_ranked]."""
    if 4 * num_ranked <= distance_RV.shape[-1]:
        return distance_RV.topk(num_ranked, largest=False, sorted=True).values
    return distance_RV.sort(-1).values[:, :num_ranked].contiguous()


def _keep_ranks(weight_RV: Tensor, distance_RV: Tensor, nearest_RN: Tensor, num_kept_R1: Tensor) -> Tensor:
    """Weights of the `num_kept` first tokens by (distance, id), 0 elsewhere."""
    threshold_R1 = nearest_RN.gather(1, num_kept_R1 - 1)
    num_ties_R1 = num_kept_R1 - torch.searchsorted(nearest_RN, threshold_R1)
    tie_RV = distance_RV == threshold_R1
    last_tie_R1 = _locate(tie_RV, num_ties_R1.squeeze(-1) - 1)[:, None]
    ids_V = torch.arange(distance_RV.shape[-1], device=distance_RV.device)
    return torch.where((distance_RV < threshold_R1) | (tie_RV & (ids_V <= last_tie_R1)), weight_RV, 0)


def _locate(mass_RV: Tensor, target_R: Tensor) -> Tensor:
    """The first index at which the running sum of mass_RV (int64 or bool) exceeds the target; the last if none does.

    In two levels, over the sums of blocks and then in one block: a running sum over the whole row is slow on a GPU.
    """
    num_rows, width = mass_RV.shape
    padded_RV = pad(mass_RV, (0, -width % BLOCK_TOKENS)) if width % BLOCK_TOKENS else mass_RV
    blocks = padded_RV.view(num_rows, -1, BLOCK_TOKENS)
    block_sums = blocks.sum(-1)
    reached = block_sums.cumsum(-1)
    target_R1 = target_R[:, None]
    block_R1 = torch.searchsorted(reached, target_R1, right=True).clamp_(max=blocks.shape[1] - 1)
    left_R1 = target_R1 - (reached.gather(1, block_R1) - block_sums.gather(1, block_R1))
    inside = blocks.gather(1, block_R1[:, :, None].expand(-1, -1, BLOCK_TOKENS)).squeeze(1).cumsum(-1)
    index_R1 = block_R1 * BLOCK_TOKENS + torch.searchsorted(inside, left_R1, right=True)
    return index_R1.squeeze(-1).clamp_(max=width - 1)
