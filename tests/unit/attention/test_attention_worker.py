"""Plans through a whole worker: greedy tokens, overlap, replays, reuse of indices, uniform routing, loading."""

from collections.abc import Callable, Sequence

import pytest
import torch

from actors.attention.local_model import LocalModel
from actors.attention.model import Gate
from actors.attention.worker import AttentionWorker
from actors.checkpoint.config import read_model_config
from actors.config import PipelineConfig
from actors.types import Admission, RankPlan, SampledToken, SamplingParams, Work

GREEDY = SamplingParams(max_tokens=100, temperature=0.0)
PAGES = tuple(range(12))  # 48 tokens in pages of 4


def _admit(request_idx: int, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> Admission:
    return Admission(
        request_idx=request_idx, prompt_ids=tuple(prompt_ids), output_ids=tuple(output_ids), sampling=GREEDY
    )


def _work(request_idx: int, start: int, num_tokens: int, samples: bool = True, offset: int | None = None) -> Work:
    pages = () if offset is None else tuple(page + offset for page in PAGES)
    return Work(
        request_idx=request_idx,
        start=start,
        num_tokens=num_tokens,
        samples=samples,
        global_pages=pages,
        chunked_pages=pages,
    )


def _begin(model: LocalModel, prompts: Sequence[Sequence[int]]) -> list[SampledToken]:
    plan = RankPlan(
        admitted=tuple(_admit(i, ids) for i, ids in enumerate(prompts)),
        work=tuple(_work(i, 0, len(ids), offset=i * len(PAGES)) for i, ids in enumerate(prompts)),
    )
    return model.attention.step(plan)


@pytest.mark.parametrize("variant", ["maverick", "scout", "top2"])
def test_greedy_tokens_are_those_of_transformers(make_case: Callable, variant: str) -> None:
    """Two requests side by side across chunk boundaries, each token taken from the rank's own memory."""
    import transformers

    case = make_case(variant)
    prompts = [case.prompts[0][:13], case.prompts[1][:5]]
    reference = transformers.Llama4ForCausalLM.from_pretrained(
        case.directory, dtype=torch.float32, attn_implementation="eager"
    )
    model = case.load()
    texts = [[*ids, token.token_id] for ids, token in zip(prompts, _begin(model, prompts), strict=True)]
    for step in range(23):
        work = tuple(_work(i, len(ids) + step, 1) for i, ids in enumerate(prompts))
        for token in model.attention.step(RankPlan(work=work)):
            texts[token.request_idx].append(token.token_id)
    for ids, text in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            likeliest = reference(torch.tensor([text]), use_cache=False).logits[0].argmax(1).tolist()
        assert text[len(ids) :] == likeliest[len(ids) - 1 : -1]


def test_steps_may_be_launched_before_tokens_are_read(make_case: Callable) -> None:
    case = make_case("maverick")
    prompts = [case.prompts[0][:13], case.prompts[1][:20]]
    plans = [RankPlan(work=tuple(_work(i, len(ids) + n, 1) for i, ids in enumerate(prompts))) for n in range(4)]
    model = case.load()
    _begin(model, prompts)
    waited = [model.attention.step(plan) for plan in plans]
    model.start_epoch()
    _begin(model, prompts)
    launched = [model.attention.launch(plan) for plan in plans]
    assert [sampled.to_tokens() for sampled in launched if sampled] == waited


def test_results_come_in_the_order_of_the_work(make_case: Callable) -> None:
    """Rows are laid out decode first, longest first; answers follow the plan all the same."""
    case = make_case("maverick")
    prompts = [case.prompts[0][:13], case.prompts[1][:20], case.prompts[2][:7]]
    model = case.load()
    alone = _begin(model, prompts)
    model.start_epoch()
    _begin(model, prompts[:2])
    decode = model.attention.step(
        RankPlan(admitted=(_admit(2, prompts[2]),), work=(_work(0, 13, 1), _work(2, 0, 7, offset=24), _work(1, 20, 1)))
    )
    assert [token.request_idx for token in decode] == [0, 2, 1]
    assert decode[1].token_id == alone[2].token_id


def test_a_replay_goes_on_where_the_first_life_ended(make_case: Callable) -> None:
    """Preempted after three tokens, admitted again with them under another index and in other pages."""
    case = make_case("maverick")
    prompt = case.prompts[0][:13]
    model = case.load()
    tokens = [token.token_id for token in _begin(model, [prompt])]
    for n in range(5):
        tokens += [token.token_id for token in model.attention.step(RankPlan(work=(_work(0, 13 + n, 1),)))]
    model.start_epoch()
    _begin(model, [prompt])
    replay = model.attention.step(
        RankPlan(released=(0,), admitted=(_admit(9, prompt, tokens[:3]),), work=(_work(9, 0, 16, offset=30),))
    )
    follow = model.attention.step(RankPlan(work=(_work(9, 16, 1),)))
    assert [replay[0].token_id, follow[0].token_id] == tokens[3:5]


def test_prefill_without_a_sample_answers_nothing(make_case: Callable) -> None:
    case = make_case("maverick")
    model = case.load()
    plan = RankPlan(admitted=(_admit(0, case.prompts[0][:20]),), work=(_work(0, 0, 9, samples=False, offset=0),))
    assert model.attention.step(plan) == []
    whole = model.attention.step(RankPlan(work=(_work(0, 9, 11),)))
    assert whole[0].token_id == int(case.logits[0][19].argmax())


def test_steps_without_work_take_in_and_let_go(make_case: Callable) -> None:
    case = make_case("maverick")
    model = case.load()
    assert model.attention.step(RankPlan(admitted=(_admit(3, (1, 2)),))) == []
    assert model.attention.step(RankPlan(released=(3,))) == []
    assert model.attention.step(RankPlan(admitted=(_admit(3, (1, 2)),))) == []


def test_an_epoch_forgets_all_requests(make_case: Callable) -> None:
    model = make_case("maverick").load()
    _begin(model, [(1, 2, 3)])
    model.start_epoch()
    with pytest.raises(KeyError):
        model.attention.step(RankPlan(work=(_work(0, 3, 1),)))


def test_a_plan_that_runs_ahead_is_refused(make_case: Callable) -> None:
    model = make_case("maverick").load()
    _begin(model, [(1, 2, 3)])
    with pytest.raises(ValueError, match=r"tokens \[4, 5\) of 4"):
        model.attention.step(RankPlan(work=(_work(0, 4, 1),)))


def test_expert_tokens_are_counted_once_and_taken(make_case: Callable) -> None:
    case = make_case("top2")
    model = case.load()
    _begin(model, [case.prompts[0][:13]])
    model.attention.request_expert_tokens()
    taken = model.attention.take_expert_tokens()
    assert list(taken) == list(model.config.moe_layers)
    assert all(sum(counts) == 13 * 2 for counts in taken.values())
    assert model.attention.take_expert_tokens() == {}
    model.attention.request_expert_tokens()
    assert all(not any(counts) for counts in model.attention.take_expert_tokens().values())


def test_uniform_routing_loads_all_experts_alike(make_case: Callable) -> None:
    case = make_case("top2")
    model = case.load(routing="uniform")
    model.logits(case.prompts[0][:64])
    model.attention.request_expert_tokens()
    counts = model.attention.take_expert_tokens()
    assert all(sum(layer) == 128 and min(layer) >= 4 and max(layer) <= 32 for layer in counts.values())
    assert len(set(counts.values())) == len(counts), "each layer has lots of its own"


def test_uniform_routing_tells_rows_at_one_position_apart(make_case: Callable) -> None:
    gate = Gate(read_model_config(make_case("maverick").directory), "uniform", torch.device("cpu"))
    for lot_T in gate.draw_lots(torch.full((800,), 1024)):
        assert lot_T is not None
        counts = torch.bincount(lot_T % 8, minlength=8)
        assert counts.min() > 70 and counts.max() < 130


def test_dummy_weights_need_no_files(make_case: Callable) -> None:
    case = make_case("maverick")
    config = read_model_config(case.directory)
    pipeline = PipelineConfig(model="/nowhere", load="dummy", kv_cache_bytes=1 << 20)
    attention = AttentionWorker.load(config, pipeline, torch.device("cpu"))
    assert attention.weight_bytes == case.load().attention.weight_bytes
    assert attention.allocate_cache().global_pages > 0


def test_page_size_is_fitted_to_the_chunk(make_case: Callable) -> None:
    assert make_case("maverick").load(page_tokens=24).pools.page_tokens == 8
