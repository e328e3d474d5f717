"""Perplexity of held-out answers under the served forward: the yardstick for anything that changes the arithmetic.

Owns what is measured: the loss of the expected answers' tokens, given the question and the answer so far, and how far
the distributions over the next token are from those of another model; and how certain means over documents are. Knows
nothing of which models there are. Finer than scores: a score of 100 % still has a perplexity.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody knows)

from actors.attention.local_model import LocalModel
from benchmarks.demo_model.families import FAMILIES
from benchmarks.demo_model.tokens import Encoder

_SEED = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A held-out question with its expected answer: the tokens from `answer_start` on."""

    family: str
    ids: tuple[int, ...]
    answer_start: int

    def logits(self, model: LocalModel) -> Tensor:
        """fp32 [T, V]: what each token of the answer is predicted from."""
        return model.logits(self.ids[:-1])[self.answer_start - 1 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Sums over the tokens of one answer."""

    family: str
    num_tokens: int
    loss: float  # nats
    divergence: float  # Kullback-Leibler from the reference's distributions, nats
    num_same: int  # tokens at which the likeliest one is the reference's
    overturned: float  # of the others: by how much probability, at most, the reference preferred its own likeliest one
    is_exact: bool  # whether greedy decoding would give the expected answer


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over tokens, and its standard error over documents."""

    value: float
    error: float


def draw_documents(encoder: Encoder, num_of_each: int) -> list[Document]:
    """Held-out phrasings (and operands) of every family, the same for every model."""
    draw, documents = Random(_SEED), []
    for family in FAMILIES.values():
        for _ in range(num_of_each):
            example = family.make(draw, "phrasings")
            ids, _ = encoder.encode(example.messages)
            start = len(encoder.encode_prompt(example.prompt))
            documents.append(Document(family=family.name, ids=tuple(ids), answer_start=start))
    return documents


def score(document: Document, logits_TV: Tensor, reference_TV: Tensor) -> Score:
    """The answer under logits of two models, each as `Document.logits` gives them."""
    ids_T = torch.tensor(document.ids[document.answer_start :])
    ours_TV, theirs_TV = F.log_softmax(logits_TV.double(), dim=1), F.log_softmax(reference_TV.double(), dim=1)
    best_T, reference_best_T = logits_TV.argmax(dim=1), reference_TV.argmax(dim=1)
    preferred_T2 = theirs_TV.exp().gather(1, torch.stack((reference_best_T, best_T), dim=1))
    return Score(
        family=document.family,
        num_tokens=len(ids_T),
        loss=F.nll_loss(ours_TV, ids_T, reduction="sum").item(),
        divergence=F.kl_div(ours_TV, theirs_TV, reduction="sum", log_target=True).item(),
        num_same=int((best_T == reference_best_T).sum()),
        overturned=(preferred_T2[:, 0] - preferred_T2[:, 1]).max().item(),
        is_exact=bool((best_T == ids_T).all()),
    )


def perplexity(scores: Sequence[Score]) -> float:
    """Of the answers' tokens, each of which counts alike."""
    return math.exp(sum(s.loss for s in scores) / sum(s.num_tokens for s in scores))


def mean_per_token(scores: Sequence[Score], sums: Sequence[float]) -> Mean:
    """The mean of what has these sums over each document's tokens.

    Documents are drawn anew, as many of each family; so what differs between families is no error. Source: the
    linearized variance of a ratio of totals in a stratified sample (Cochran, Sampling Techniques, 1977, section 6.11).
    """
    num_tokens = sum(s.num_tokens for s in scores)
    mean = sum(sums) / num_tokens
    excess = defaultdict(list)
    for s, total in zip(scores, sums, strict=True):
        excess[s.family].append(total - mean * s.num_tokens)
    variance = sum(len(values) * torch.tensor(values, dtype=torch.float64).var().item() for values in excess.values())
    return Mean(mean, math.sqrt(variance) / num_tokens)


def loss_change(scores: Sequence[Score], reference: Sequence[Score]) -> Mean:
    """Nats per token by which the loss is above that of the reference on the same documents, in pairs."""
    return mean_per_token(scores, [s.loss - r.loss for s, r in zip(scores, reference, strict=True)])
