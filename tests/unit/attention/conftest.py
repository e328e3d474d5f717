"""Tiny checkpoints, transformers' logits for them, and a stand-in for the router that poisons every page it frees."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.attention.local_model import LocalModel
from actors.checkpoint.make_model import make_model
from actors.checkpoint.shapes import SHAPES, ModelShape
from actors.config import PipelineConfig
from actors.types import Admission, RankPlan, SamplingParams, Work

CHUNK = 16
TOLERANCE = 1e-3  # 30 times fp32 noise, 45 times below the smallest mistake that is known
NUM_IDS = 70

VARIANTS: dict[str, ModelShape] = {
    "maverick": replace(SHAPES["tiny"], chunk_tokens=CHUNK),
    "scout": replace(SHAPES["tiny-scout"], chunk_tokens=CHUNK),
    "top2": replace(SHAPES["tiny"], chunk_tokens=CHUNK, experts_per_token=2, moe_interval=1),
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A checkpoint and what transformers answers for two prompts (causal, so every prefix is answered too)."""

    directory: Path
    prompts: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]

    def load(self, **settings: object) -> LocalModel:
        values = {"model": str(self.directory), "kv_cache_bytes": 4 << 20, "page_tokens": 4} | settings
        return LocalModel.load(PipelineConfig.parse(values))


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """make_case(variant, **options of make_model): made once each."""
    made: dict[tuple[object, ...], Case] = {}

    def make(variant: str, **options: object) -> Case:
        key = (variant, *sorted(options.items()))
        if key not in made:
            made[key] = _make_case(tmp_path_factory.mktemp(variant), VARIANTS[variant], options)
        return made[key]

    return make


@pytest.fixture(scope="module")
def load_once(make_case: Callable[..., Case]) -> Callable[..., LocalModel]:
    """load_once(variant, **settings): a model for all tests of a file that leave nothing to the next epoch.

    By file, since some patch what is loaded.
    """
    loaded: dict[tuple[object, ...], LocalModel] = {}

    def load(variant: str, **settings: object) -> LocalModel:
        key = (variant, *sorted(settings.items()))
        if key not in loaded:
            loaded[key] = make_case(variant).load(**settings)
        return loaded[key]

    return load


def _make_case(directory: Path, shape: ModelShape, options: dict[str, object]) -> Case:
    import transformers

    make_model(directory, shape, seed=7, **options)  # type: ignore[arg-type]
    model = transformers.Llama4ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    draw = random.Random(5)
    prompts = tuple(tuple(draw.randrange(shape.base_vocab) for _ in range(NUM_IDS)) for _ in range(3))
    with torch.inference_mode():
        logits = tuple(model(torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts)
    return Case(directory, prompts, logits)


@dataclass
class _Held:
    """One running request: tokens computed so far, and its pages by table position (None once freed)."""

    prompt: int
    num_tokens: int
    done: int = 0
    global_pages: list[int] = field(default_factory=list)
    chunked_pages: list[int | None] = field(default_factory=list)


class PoisoningRouter:
    """Grants pages at random, frees chunked ones as the chunk turns, and fills all that is freed with NaN."""

    def __init__(self, case: Case, model: LocalModel, seed: int) -> None:
        self._case = case
        self._model = model
        self._draw = random.Random(seed)
        self._size = model.pools.page_tokens
        self._free_global = list(range(model.pools.global_pages))
        self._free_chunked = list(range(model.pools.chunked_pages))
        self._draw.shuffle(self._free_global)
        self._draw.shuffle(self._free_chunked)
        self.running: dict[int, _Held] = {}
        self._next_idx = 0
        self._released: list[int] = []
        self._admitted: list[Admission] = []
        model.start_epoch()
        self._poison(model.attention.cache.global_LPSHd, self._free_global)
        self._poison(model.attention.cache.chunked_LPSHd, self._free_chunked)

    def admit(self, prompt: int, num_tokens: int) -> None:
        ids = self._case.prompts[prompt][:num_tokens]
        self._admitted.append(
            Admission(request_idx=self._next_idx, prompt_ids=ids, output_ids=(), sampling=SamplingParams(max_tokens=9))
        )
        self.running[self._next_idx] = _Held(prompt, num_tokens)
        self._next_idx += 1

    def step(self, sizes: Sequence[tuple[int, int]]) -> float:
        """Computes (request, tokens) pairs in one step. Returns the largest difference from transformers' logits."""
        work = tuple(self._grant(request_idx, size) for request_idx, size in sizes)
        plan = RankPlan(released=tuple(self._released), admitted=tuple(self._admitted), work=work)
        self._released, self._admitted = [], []
        self._model.attention.take_in(plan)
        inputs, h_TD = self._model.attention.forward(work)
        logits_TV = self._model.attention.logits(h_TD)
        assert inputs.num_tokens == sum(size for _, size in sizes)
        last_rows = range(len(work)) if inputs.sampled_rows_B is None else inputs.sampled_rows_B.tolist()
        worst = 0.0
        for item, last_row in zip(work, last_rows, strict=True):
            held = self.running[item.request_idx]
            ours = logits_TV[last_row + 1 - item.num_tokens : last_row + 1]
            theirs = self._case.logits[held.prompt][item.start : item.start + item.num_tokens]
            worst = max(worst, (ours - theirs).abs().max().nan_to_num(torch.inf).item())
            held.done = item.start + item.num_tokens
            self._free_behind(held)
            if held.done == held.num_tokens:
                self._release(item.request_idx)
        return worst

    def _grant(self, request_idx: int, size: int) -> Work:
        held = self.running[request_idx]
        wanted = -(-(held.done + size) // self._size)
        new_global = [self._free_global.pop() for _ in range(wanted - len(held.global_pages))]
        new_chunked = [self._free_chunked.pop() for _ in range(wanted - len(held.chunked_pages))]
        held.global_pages += new_global
        held.chunked_pages += new_chunked
        return Work(
            request_idx=request_idx, start=held.done, num_tokens=size, samples=True,
            global_pages=tuple(new_global), chunked_pages=tuple(new_chunked),
        )  # fmt: skip

    def _free_behind(self, held: _Held) -> None:
        for j in range(held.done - held.done % CHUNK)[:: self._size]:
            self._free_chunked_page(held, j // self._size)

    def _free_chunked_page(self, held: _Held, j: int) -> None:
        page = held.chunked_pages[j]
        if page is not None:
            held.chunked_pages[j] = None
            self._free_chunked.insert(self._draw.randrange(len(self._free_chunked) + 1), page)
            self._poison(self._model.attention.cache.chunked_LPSHd, [page])

    def _release(self, request_idx: int) -> None:
        held = self.running.pop(request_idx)
        self._released.append(request_idx)
        for j in range(len(held.chunked_pages)):
            self._free_chunked_page(held, j)
        self._free_global += held.global_pages
        self._poison(self._model.attention.cache.global_LPSHd, held.global_pages)

    @staticmethod
    def _poison(pages_LPSHd: Tensor, pages: Sequence[int]) -> None:
        with torch.inference_mode():
            pages_LPSHd[:, list(pages)] = torch.nan


@pytest.fixture
def poisoning_router() -> Callable[[Case, LocalModel, int], PoisoningRouter]:
    return PoisoningRouter
