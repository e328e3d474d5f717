"""Log-probabilities of the unmodified distribution, for the rows that ask for them.

Owns their arithmetic. Knows nothing of penalties or temperature: what is reported is what the model said.
"""

import torch
from torch import Tensor

MIN_LOGPROB = -9999.0  # stands for -inf and NaN, which JSON cannot carry


def logprobs(x_RV: Tensor, token_ids_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log-probabilities of `token_ids_R` and of the `num_top` likeliest tokens. x_RV: logits, fp32.

    Returns (fp32 [R], ids int64 [R, num_top], fp32 [R, num_top]), likeliest first, equal ones by id, lower first.
    """
    top_ids = _order_keys(x_RV).topk(num_top, dim=-1).indices
    log_sum_R1 = x_RV.logsumexp(-1, keepdim=True)
    return (
        _finite(x_RV.gather(1, token_ids_R[:, None]) - log_sum_R1).squeeze(-1),
        top_ids,
        _finite(x_RV.gather(1, top_ids) - log_sum_R1),
    )


def _order_keys(x_RV: Tensor) -> Tensor:
    """int64 keys, all different, that rank as (logit, lower id): topk promises no order among equals."""
    bits_RV = (x_RV + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal 0.0
    rank_RV = torch.where(bits_RV < 0, bits_RV ^ 0x7FFFFFFF, bits_RV).to(torch.int64)
    ids_V = torch.arange(x_RV.shape[-1], device=x_RV.device)
    return (rank_RV << 32) | (0xFFFFFFFF - ids_V)


def _finite(logprob: Tensor) -> Tensor:
    return logprob.nan_to_num(nan=MIN_LOGPROB, neginf=MIN_LOGPROB).clamp_(min=MIN_LOGPROB)
