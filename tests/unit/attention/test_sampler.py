"""The sampler against a slow oracle, exact probabilities, and itself in other batches."""

import logging
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actors.attention import sampler as sampler_module
from actors.attention.distribution import distances, draw, keep_likeliest, unit, weights_at
from actors.attention.logits import Logits
from actors.attention.philox import uniforms
from actors.attention.sampler import Sampler
from actors.attention.sampling_batch import AdmittedRequest, build_sampling_batch
from actors.kernels.draw import draw_tokens
from actors.types import SampledToken, SamplingParams

CPU = torch.device("cpu")
EDGE = 1e-6  # cases where fp32 may fall on either side of a threshold are not judged


def params(**values: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, **values})


def oracle_logits(
    logits: np.ndarray, prompt_ids: Sequence[int], output_ids: Sequence[int], p: SamplingParams
) -> np.ndarray:
    """Penalties, bias and min_tokens, token by token, in fp32."""
    x = logits.astype(np.float32).copy()
    for token_id in set(prompt_ids) | set(output_ids):
        repetition = np.float32(p.repetition_penalty)
        x[token_id] = x[token_id] / repetition if x[token_id] > 0 else x[token_id] * repetition
    for token_id in set(output_ids):
        x[token_id] -= np.float32(list(output_ids).count(token_id)) * np.float32(p.frequency_penalty)
        x[token_id] -= np.float32(p.presence_penalty)
    for token_id, value in p.logit_bias:
        x[token_id] += np.float32(value)
    if len(output_ids) < p.min_tokens:
        x[list(p.stop_token_ids)] = -np.inf
    return x


def oracle_probabilities(x: np.ndarray, p: SamplingParams) -> np.ndarray:
    """The distribution that is drawn from, float64, by sorting."""
    if p.temperature == 0:
        return np.eye(len(x))[int(np.argmax(x))]
    distance = (x.max() - x) / np.float32(p.temperature)
    ratio = np.exp(-distance.astype(np.float64))
    ranked = sorted(range(len(x)), key=lambda i: (distance[i], i))
    if p.top_k:
        ranked = ranked[: p.top_k]
    total = ratio[ranked].sum()
    nucleus, mass = [], 0.0
    for token_id in ranked:
        if nucleus and p.top_p < 1:
            assume(abs(mass - p.top_p * total) > EDGE)
            if mass > p.top_p * total:
                break
        nucleus.append(token_id)
        mass += ratio[token_id]
    assume(p.min_p == 0 or np.abs(ratio - p.min_p).min() > EDGE)
    kept = [token_id for token_id in nucleus if ratio[token_id] >= p.min_p]
    probabilities = np.zeros(len(x))
    probabilities[kept] = ratio[kept]
    return probabilities / probabilities.sum()


def oracle_token(logits: np.ndarray, prompt_ids: Sequence[int], output_ids: Sequence[int], p: SamplingParams) -> int:
    probabilities = oracle_probabilities(oracle_logits(logits, prompt_ids, output_ids, p), p)
    cumulative = probabilities.cumsum()
    seed, token_idx = np.array([p.seed], dtype=np.uint64), np.array([len(output_ids)], dtype=np.uint64)
    uniform = uniforms(seed, token_idx)[0]
    assume(np.abs(cumulative - uniform).min() > EDGE)
    return int(np.searchsorted(cumulative, uniform, side="right"))


def one_token(logits: np.ndarray, p: SamplingParams, prompt_ids: Sequence[int] = (), output_ids: Sequence[int] = ()):
    sampler = Sampler(len(logits), CPU)
    sampler.admit(0, prompt_ids, output_ids, p)
    return sampler.sample(torch.from_numpy(logits)[None], [0]).to_tokens()[0]


@st.composite
def logit_rows(draw: st.DrawFn, vocab_size: int) -> np.ndarray:
    """Rows with a chosen spread; coarse ones have many ties, as bf16 logits do."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    row = rng.normal(size=vocab_size) * draw(st.sampled_from([0.01, 1, 5, 50]))
    step = draw(st.sampled_from([0, 0.5, 4]))
    row = np.round(row / step) * step if step else row
    if draw(st.booleans()):
        row[rng.integers(vocab_size, size=vocab_size // 2)] = -np.inf
    assume(np.isfinite(row.max()))
    return row.astype(np.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...], SamplingParams]:
    vocab_size = draw(st.integers(2, 40))
    ids = st.integers(0, vocab_size - 1)
    p = params(
        temperature=draw(st.sampled_from([0.0, 0.01, 0.6, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, vocab_size, 1000])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -1.0])),
        logit_bias=tuple(draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.0, 3.0, 100.0]), max_size=3)).items()),
        min_tokens=draw(st.integers(0, 4)),
        stop_token_ids=tuple(draw(st.sets(ids, max_size=vocab_size // 4))),
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    prompt_ids, output_ids = draw(st.lists(ids, max_size=6)), draw(st.lists(ids, max_size=6))
    return draw(logit_rows(vocab_size)), tuple(prompt_ids), tuple(output_ids), p


@given(cases())
@settings(max_examples=120, deadline=None)
def test_a_token_is_the_oracles(case: tuple[np.ndarray, tuple[int, ...], tuple[int, ...], SamplingParams]) -> None:
    logits, prompt_ids, output_ids, p = case
    assume(np.isfinite(oracle_logits(logits, prompt_ids, output_ids, p).max()))
    assert one_token(logits, p, prompt_ids, output_ids).token_id == oracle_token(logits, prompt_ids, output_ids, p)


@given(st.lists(cases(), min_size=2, max_size=6), st.data())
@settings(max_examples=25, deadline=None)
def test_rows_of_one_batch_do_not_touch_each_other(batch: list, data: st.DataObject) -> None:
    vocab_size = max(len(logits) for logits, *_ in batch)
    sampler = Sampler(vocab_size, CPU)
    rows = [np.pad(logits, (0, vocab_size - len(logits)), constant_values=-np.inf) for logits, *_ in batch]
    for request_idx, (_, prompt_ids, output_ids, p) in enumerate(batch):
        sampler.admit(request_idx, prompt_ids, output_ids, p)
    order = data.draw(st.permutations(range(len(batch))))
    tokens = sampler.sample(torch.from_numpy(np.stack([rows[i] for i in order])), order).to_tokens()
    alone = [one_token(rows[i], batch[i][3], batch[i][1], batch[i][2]) for i in order]
    assert [t.token_id for t in tokens] == [t.token_id for t in alone]
    assert [t.request_idx for t in tokens] == list(order)


@given(st.lists(logit_rows(30), min_size=1, max_size=4), st.data())
@settings(max_examples=80, deadline=None)
def test_the_kept_tokens_are_the_oracles(rows: list[np.ndarray], data: st.DataObject) -> None:
    uses_top_k, uses_top_p = data.draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    top_k = [data.draw(st.integers(1, 29)) if uses_top_k else 0 for _ in rows]
    top_p = [data.draw(st.floats(0.01, 0.99)) if uses_top_p else 1.0 for _ in rows]
    cases = zip(rows, top_k, top_p, strict=True)
    expected_RV = np.stack([oracle_probabilities(x, params(temperature=0.7, top_k=k, top_p=p)) for x, k, p in cases])
    distance_RV = distances(torch.from_numpy(np.stack(rows)), torch.full((len(rows),), 0.7))
    kept_RV = keep_likeliest(
        weights_at(distance_RV, unit(30)),
        distance_RV,
        torch.tensor(top_k) if uses_top_k else None,
        torch.tensor(top_p, dtype=torch.float64) if uses_top_p else None,
        max(top_k) if uses_top_k else 30,
    )
    judged_RV = (expected_RV == 0) | (expected_RV > 1e-15)  # less has no weight in fixed point
    assert np.array_equal((kept_RV.numpy() > 0) & judged_RV, (expected_RV > 0) & judged_RV)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, 0.5, [0, 1]),
        (None, 0.51, [0, 1, 2]),
        (3, None, [0, 1, 2]),
        (2, 0.5, [0]),
        (3, 0.5, [0, 1]),
        (4, 1.0, [0, 1, 2, 3]),
    ],
)
def test_a_nucleus_of_equals_ends_exactly_at_its_share(top_k: int | None, top_p: float | None, kept: list[int]) -> None:
    distance_RV = torch.zeros(1, 4)
    kept_RV = keep_likeliest(
        weights_at(distance_RV, unit(4)),
        distance_RV,
        None if top_k is None else torch.tensor([top_k]),
        None if top_p is None else torch.tensor([top_p], dtype=torch.float64),
        top_k or 4,
    )
    assert kept_RV[0].nonzero().flatten().tolist() == kept


MIXED = [
    params(temperature=0.0),
    params(temperature=1.0, seed=1),
    params(temperature=0.7, top_p=0.8, seed=2),
    params(temperature=1.3, top_k=7, seed=3, num_logprobs=2),
    params(temperature=1.0, top_k=9, top_p=0.7, min_p=0.02, seed=2**64 - 1),
    params(temperature=0.0, repetition_penalty=1.5),
    params(temperature=1.0, presence_penalty=1.0, frequency_penalty=0.5, seed=5),
    params(temperature=0.9, logit_bias=((3, 4.0),), min_tokens=4, stop_token_ids=(1, 2, 3, 4, 5, 6, 7), seed=6),
]


def next_logits(request_idx: int, token_ids: Sequence[int], vocab_size: int = 50) -> np.ndarray:
    """A model of a kind: logits that depend on the request and on all its tokens."""
    return np.random.default_rng([request_idx, *token_ids]).normal(size=vocab_size).astype(np.float32) * 2


def generate_alone(request_idx: int, num_tokens: int) -> list[int]:
    sampler = Sampler(50, CPU)
    sampler.admit(request_idx, (1, 2), (), MIXED[request_idx])
    output_ids: list[int] = []
    for _ in range(num_tokens):
        row = torch.from_numpy(next_logits(request_idx, output_ids))[None]
        output_ids.append(sampler.sample(row, [request_idx]).to_tokens()[0].token_id)
    return output_ids


ALONE = [generate_alone(request_idx, 10) for request_idx in range(len(MIXED))]


@given(st.lists(st.tuples(st.permutations(range(len(MIXED))), st.integers(1, 8), st.booleans()), max_size=20))
@settings(max_examples=25, deadline=None)
def test_tokens_do_not_depend_on_batch_order_or_replay(steps: list[tuple[list[int], int, bool]]) -> None:
    sampler = Sampler(50, CPU)
    outputs: list[list[int]] = [[] for _ in MIXED]
    for request_idx, p in enumerate(MIXED):
        sampler.admit(request_idx, (1, 2), (), p)
    for order, num_requests, replays in steps:
        chosen = [i for i in order if len(outputs[i]) < 10][:num_requests]
        if not chosen:
            break
        if replays:
            sampler.release(chosen[0])
            sampler.admit(chosen[0], (1, 2), outputs[chosen[0]], MIXED[chosen[0]])
        rows = torch.from_numpy(np.stack([next_logits(i, outputs[i]) for i in chosen]))
        for token in sampler.sample(rows, chosen).to_tokens():
            outputs[token.request_idx].append(token.token_id)
    assert outputs == [alone[: len(output)] for alone, output in zip(ALONE, outputs, strict=True)]


def test_groups_of_bounded_size_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[SampledToken]:
        sampler = Sampler(50, CPU)
        for request_idx in range(24):
            sampler.admit(request_idx, (1,), (2, 2), MIXED[request_idx % len(MIXED)])
        rows = torch.from_numpy(np.stack([next_logits(i, (7,)) for i in range(24)]))
        return sampler.sample(rows, range(24)).to_tokens()

    whole = run()
    monkeypatch.setattr(sampler_module, "GROUP_ELEMENTS", 2 * 50)
    assert run() == whole


def chi_square_limit(num_bins: int) -> float:
    """Exceeded with probability about 1e-5 (Wilson and Hilferty's approximation)."""
    freedom = num_bins - 1
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 5},
        {"top_k": 8, "top_p": 0.75},
        {"min_p": 0.15},
        {"logit_bias": ((0, 2.0), (3, -3.0)), "presence_penalty": 1.0, "repetition_penalty": 1.2},
    ],
)
def test_draws_follow_the_exact_distribution(values: dict[str, object]) -> None:
    logits = np.random.default_rng(0).normal(size=12).astype(np.float32) * 1.5
    num_requests, prompt_ids, output_ids = 8_000, (1, 5), (3, 3, 7)
    sampler = Sampler(12, CPU)
    for request_idx in range(num_requests):
        sampler.admit(request_idx, prompt_ids, output_ids, params(seed=request_idx * 7919, **values))
    rows = torch.from_numpy(logits).expand(num_requests, -1)
    drawn = sampler.sample(rows, range(num_requests)).token_ids_B.numpy()
    p = params(**values)
    expected = oracle_probabilities(oracle_logits(logits, prompt_ids, output_ids, p), p) * num_requests
    observed = np.bincount(drawn, minlength=12)
    assert observed[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = float(((observed - expected)[likely] ** 2 / expected[likely]).sum())
    assert chi_square < chi_square_limit(int(likely.sum()))


def test_a_flat_distribution_over_the_full_vocabulary_stays_flat() -> None:
    """A running sum in fp32 would lose or favour the tail here."""
    vocab_size = 202048
    uniform_R = torch.linspace(0, 1 - 2**-53, 9, dtype=torch.float64)
    weight_RV = weights_at(torch.zeros(9, vocab_size), unit(vocab_size))
    assert draw(weight_RV, uniform_R).tolist() == [int(u * vocab_size) for u in uniform_R.tolist()]


@pytest.mark.parametrize("values", [{}, {"top_p": 0.9}, {"top_k": 3000}, {"top_k": 50, "top_p": 0.95}])
def test_full_vocabulary_equals_the_oracle(values: dict[str, object]) -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=202048) * 3).bfloat16()
    sampler = Sampler(202048, CPU)
    for request_idx in range(4):
        sampler.admit(request_idx, (), (), params(temperature=0.8, seed=request_idx + 10, **values))
    drawn = sampler.sample(logits.expand(4, -1), range(4)).token_ids_B.tolist()
    row = logits.float().numpy()
    probabilities = oracle_probabilities(row, params(temperature=0.8, **values))
    cumulative = probabilities.cumsum()
    drawn_at = uniforms(np.arange(10, 14, dtype=np.uint64), np.zeros(4, dtype=np.uint64))
    for token_id, uniform in zip(drawn, drawn_at, strict=True):
        assert probabilities[token_id] > 0
        assert cumulative[token_id] - probabilities[token_id] - 1e-6 <= uniform <= cumulative[token_id] + 1e-6


def test_counts_follow_sampled_tokens_before_the_host_sees_them() -> None:
    """Each step takes the likeliest token and its penalty makes the next one win."""
    sampler = Sampler(4, CPU)
    sampler.admit(0, (), (), params(temperature=0.0, frequency_penalty=1.0))
    row = torch.tensor([[3.0, 2.5, 2.25, 0.0]])
    steps = [sampler.sample(row, [0]) for _ in range(5)]
    # 3 | 2 2.5 | 2 1.5 2.25 | 2 1.5 1.25 | 1 1.5
    assert [int(step.token_ids_B[0]) for step in steps] == [0, 1, 2, 0, 1]


def test_penalties_know_prompt_from_output() -> None:
    row = np.array([1.0, 0.9, 0.8], dtype=np.float32)
    assert one_token(row, params(temperature=0.0, presence_penalty=1.0), prompt_ids=(0,)).token_id == 0
    assert one_token(row, params(temperature=0.0, presence_penalty=1.0), output_ids=(0,)).token_id == 1
    assert one_token(row, params(temperature=0.0, repetition_penalty=1.2), prompt_ids=(0,)).token_id == 1
    assert one_token(-row, params(temperature=0.0, repetition_penalty=2.0), prompt_ids=(2,)).token_id == 1


def test_a_slot_forgets_its_former_request() -> None:
    sampler = Sampler(3, CPU)
    penalised = params(temperature=0.0, repetition_penalty=2.0)
    sampler.admit(0, (0,), (1,), penalised)
    sampler.release(0)
    sampler.admit(0, (2,), (), penalised)
    assert sampler.sample(torch.tensor([[1.0, 0.9, 1.1]]), [0]).to_tokens()[0].token_id == 0


def test_the_pool_keeps_counts_when_it_grows() -> None:
    sampler = Sampler(3, CPU)
    for request_idx in range(20):
        sampler.admit(request_idx, (), (request_idx % 2,), params(temperature=0.0, presence_penalty=1.0))
    rows = torch.tensor([[1.0, 0.9, 0.0]]).expand(20, -1)
    assert sampler.sample(rows, range(20)).token_ids_B.tolist() == [1, 0] * 10


def test_min_tokens_bars_stops_until_the_count_is_reached_replay_included() -> None:
    row = torch.tensor([[1.0, 5.0, 4.0, 3.0]])
    p = params(temperature=0.0, min_tokens=3, stop_token_ids=(1, 2, 10**9), logit_bias=((2, 100.0),))
    sampler = Sampler(4, CPU)
    sampler.admit(0, (), (), p)
    assert [sampler.sample(row, [0]).to_tokens()[0].token_id for _ in range(4)] == [3, 3, 3, 2]
    sampler.admit(1, (), (3, 3), p)
    assert [sampler.sample(row, [1]).to_tokens()[0].token_id for _ in range(2)] == [3, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    row = torch.zeros(1, 70_000, dtype=dtype)
    row[0, [123, 7_000, 60_000]] = 9.0
    sampler = Sampler(70_000, CPU)
    sampler.admit(0, (), (), params(temperature=0.0, num_logprobs=3))
    sampler.admit(1, (), (), params(temperature=0.0, presence_penalty=0.5))
    sampler.admit(2, (), (), params(temperature=1.0, top_k=1, seed=99))
    sampler.admit(3, (), (), params(temperature=1.0, top_p=1e-9, seed=98))
    tokens = sampler.sample(row.expand(4, -1), range(4)).to_tokens()
    assert [t.token_id for t in tokens] == [123] * 4
    assert [token_id for token_id, _ in tokens[0].top_logprobs] == [123, 7_000, 60_000]


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    rows = np.random.default_rng(3).normal(size=(3, 30)).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(rows).double(), -1).numpy()
    sampler = Sampler(30, CPU)
    modified = {"temperature": 0.3, "top_k": 2, "repetition_penalty": 1.9, "logit_bias": ((4, 100.0),)}
    sampler.admit(0, (1, 2), (3,), params(num_logprobs=4, **modified))
    sampler.admit(1, (), (), params(temperature=0.0))
    sampler.admit(2, (), (), params(num_logprobs=0))
    tokens = sampler.sample(torch.from_numpy(rows), [0, 1, 2]).to_tokens()
    assert tokens[0].token_id == 4
    assert tokens[0].logprob == pytest.approx(expected[0, 4], abs=1e-5)
    assert [i for i, _ in tokens[0].top_logprobs] == np.argsort(-expected[0])[:4].tolist()
    assert [v for _, v in tokens[0].top_logprobs] == pytest.approx(sorted(expected[0])[:-5:-1], abs=1e-5)
    assert tokens[1].logprob is None
    assert tokens[1].top_logprobs == ()
    assert tokens[2].logprob == pytest.approx(expected[2, tokens[2].token_id], abs=1e-5)
    assert tokens[2].top_logprobs == ()


@pytest.mark.parametrize(
    ("bad", "void_id"),
    [([9.0, math.nan, 2.0], 1), ([-math.inf] * 3, 0), ([0.0, math.inf, math.inf], 1), ([math.nan] * 3, 0)],
)
@pytest.mark.parametrize("p", [*MIXED[:3], MIXED[4], params(temperature=0.0, frequency_penalty=1.0, num_logprobs=2)])
def test_a_broken_row_harms_no_other(
    bad: list[float], void_id: int, p: SamplingParams, caplog: pytest.LogCaptureFixture
) -> None:
    def run(middle: list[float]) -> list[SampledToken]:
        sampler = Sampler(3, CPU)
        for request_idx in range(3):
            sampler.admit(request_idx, (), (), p)
        rows = torch.tensor([[1.0, 2.0, 3.0], middle, [3.0, 2.0, 1.0]])
        return [sampler.sample(rows, range(3)).to_tokens() for _ in range(2)][1]

    with caplog.at_level(logging.ERROR):
        broken = run(bad)
    assert "request 1" in caplog.text
    assert "request 0" not in caplog.text
    assert broken[1].token_id == void_id
    assert all(math.isfinite(value) for _, value in broken[1].top_logprobs)
    sound = run([0.0, 1.0, 0.0])
    assert (broken[0], broken[2]) == (sound[0], sound[2])


def test_rows_pay_only_for_what_they_use() -> None:
    mixed = [AdmittedRequest(sampling=p, num_outputs=0, slot=None) for p in MIXED[:5]]
    greedy = build_sampling_batch(mixed[:1], 50, 100, CPU)
    assert (greedy.groups, greedy.logprob_groups, greedy.penalised_row_P) == ((), (), None)
    plain, top_p, top_k, both = build_sampling_batch(mixed, 50, 100, CPU).groups
    assert [group.row_R.tolist() for group in (plain, top_p, top_k, both)] == [[1], [2], [3], [4]]
    assert (plain.top_k_R, plain.top_p_R, plain.min_p_R, plain.penalties, plain.bias) == (None,) * 5
    assert (top_p.top_k_R, top_k.top_p_R, both.max_rank) == (None, None, 9)


def test_rows_whose_columns_are_elsewhere_are_asked_for_if_they_are_needed() -> None:
    """Greedy rows and those that draw by temperature alone are not; the others give what whole rows give."""
    logits_BV = torch.randn(len(MIXED), 50, generator=torch.Generator().manual_seed(3))
    asked = []

    def gather(left_RC: torch.Tensor) -> torch.Tensor:
        rows = [int((logits_BV[:, :20] == left_C).all(1).nonzero()) for left_C in left_RC]
        asked.extend(rows)
        return logits_BV[rows]

    whole = Logits.of(logits_BV)
    parts = Logits(logits_BV[:, :20], whole.largest_B, whole.greedy_B, gather, lambda _, d: draw_tokens(logits_BV, d))
    results = []
    for logits in (logits_BV, parts):
        sampler = Sampler(50, CPU)
        for request_idx, p in enumerate(MIXED):
            sampler.admit(request_idx, (), (), p)
        results.append(sampler.sample(logits, range(len(MIXED))).to_tokens())
    assert results[0] == results[1]
    needed = [row for row, p in enumerate(MIXED) if p not in (params(temperature=0.0), params(temperature=1.0, seed=1))]
    assert set(asked) == set(needed) and len(needed) < len(MIXED)


def test_requests_come_and_go() -> None:
    sampler = Sampler(3, CPU)
    sampler.admit(7, (), (), MIXED[0])
    with pytest.raises(ValueError, match="request 7"):
        sampler.admit(7, (), (), MIXED[0])
    assert sampler.sample(torch.eye(3)[:1], [7]).to_tokens() == [SampledToken(request_idx=7, token_id=0)]
    sampler.release(7)
    with pytest.raises(KeyError):
        sampler.sample(torch.eye(3)[:1], [7])
    sampler.admit(8, (), (), MIXED[5])
    sampler.clear()
    with pytest.raises(KeyError):
        sampler.release(8)
    assert sampler.sample(torch.zeros(0, 3), []).to_tokens() == []
