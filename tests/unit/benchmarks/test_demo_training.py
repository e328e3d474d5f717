"""Packing, the run and its state, and counting what is right."""

import json
import shutil
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from demo_small import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.attention.local_model import LocalModel
from actors.checkpoint.config import read_model_config
from actors.checkpoint.shapes import shape_config
from benchmarks.demo_model import card
from benchmarks.demo_model.corpus import ROWS_OF_PART, Packer, Rows, make_part
from benchmarks.demo_model.examples import ask
from benchmarks.demo_model.families import FAMILIES
from benchmarks.demo_model.heldout import HeldOut
from benchmarks.demo_model.model import forward
from benchmarks.demo_model.perplexity import draw_documents, perplexity, score
from benchmarks.demo_model.pictures import expert_map, loss_curve
from benchmarks.demo_model.score import Answer, Question, count, draw_questions, report
from benchmarks.demo_model.shape import DIRECTORY
from benchmarks.demo_model.tokens import Encoder
from benchmarks.demo_model.train import train
from benchmarks.demo_model.training import Recipe, Run
from benchmarks.demo_model.weights_file import read_weights

CONFIG = shape_config(SMALL)
PAD = CONFIG.pad_token_id
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(encoder: Encoder) -> Rows:
    """Eight rows of 128 tokens: the same three questions over and over."""
    packer = Packer(128, PAD)
    examples = [ask("x", question, answer) for question, answer in (("a", "b"), ("Hi", "Hello"), ("1 + 1", "2"))]
    for i in range(400):
        packer.add(*encoder.encode(examples[i % 3].messages))
    return packer.rows(8)


def _run(rows: Rows, **changes: object) -> Run:
    recipe = Recipe(**{"num_steps": 6, "batch_rows": 2, "warmup_steps": 2} | changes)  # type: ignore[arg-type]
    return Run(CONFIG, recipe, rows, CPU, compiles=False)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=120))
def test_packing_keeps_every_sequence_whole_and_labelled(lengths: list[int]) -> None:
    packer = Packer(32, PAD)
    for i, length in enumerate(lengths):
        packer.add([i] * length, [bool(i % 2)] * length, str(i))
    packer.close_all()
    packed = packer.rows()
    found = []
    for ids, positions, targets in zip(packed.ids_NL, packed.positions_NL, packed.is_target_NL, strict=True):
        begins = [i for i in range(32) if positions[i] == 0 and ids[i] != PAD]
        for i in begins:
            length = int((ids == ids[i]).sum())
            assert (ids[i : i + length] == ids[i]).all() and list(positions[i : i + length]) == list(range(length))
            assert length == min(lengths[ids[i]], 32) and (targets[i : i + length] == bool(ids[i] % 2)).all()
            found.append(str(ids[i]))
        assert not targets[ids == PAD].any() and not positions[ids == PAD].any()
    assert found == packer.labels() and sorted(map(int, found)) == list(range(len(lengths)))


def test_a_part_of_the_corpus_is_full_and_the_same_again(tmp_path: Path) -> None:
    made = make_part(3, seed=5, length=512, directory=DIRECTORY, pad_id=1548)
    assert made.ids_NL.shape == (ROWS_OF_PART, 512) and (made.ids_NL == 1548).mean() < 0.05
    assert 0.2 < made.is_target_NL.mean() < 0.6
    made.save(tmp_path / "rows.npz")
    again = Rows.load(tmp_path / "rows.npz")
    assert np.array_equal(made.ids_NL, again.ids_NL) and np.array_equal(made.is_target_NL, again.is_target_NL)


def test_a_run_that_was_interrupted_ends_with_the_same_weights(rows: Rows, tmp_path: Path) -> None:
    whole, first, second = _run(rows), _run(rows), _run(rows)
    while not whole.is_over:
        whole.step()
    for _ in range(3):
        first.step()
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    assert second.next_step == 3
    while not second.is_over:
        second.step()
    assert all(torch.equal(whole.weights[name], weight) for name, weight in second.weights.items())


def test_a_state_of_another_recipe_is_refused(rows: Rows, tmp_path: Path) -> None:
    run = _run(rows)
    run.save(tmp_path / "state.pt")
    with pytest.raises(ValueError, match="another recipe"):
        _run(rows, learning_rate=1e-3).load(tmp_path / "state.pt")


def test_training_learns_and_writes_its_log(rows: Rows, tmp_path: Path) -> None:
    run = _run(rows, num_steps=60, learning_rate=1e-2)
    train(run, _of_one_label(rows), tmp_path, look_steps=60)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.5 < losses[0] and log[-1]["scores"]["x/train"] > 0.9
    assert np.sum(log[-1]["expert_shares"], axis=1) == pytest.approx(1, abs=1e-2)
    assert (tmp_path / "state.pt").exists()


def _of_one_label(rows: Rows) -> HeldOut:
    """The training rows as if they were held out; padding has no targets, so it has no label."""
    conversations = (rows.positions_NL == 0) & (rows.ids_NL != PAD)
    return HeldOut(rows, ("x/train",) * int(conversations.sum()))


def test_schedules() -> None:
    run = _run(_empty_rows(), num_steps=100, warmup_steps=10, learning_rate=1.0, balance=0.5)
    assert run.learning_rate(0) == pytest.approx(0.1) and run.learning_rate(9) == pytest.approx(1.0)
    assert run.learning_rate(55) == pytest.approx(0.505) and run.learning_rate(100) == pytest.approx(0.01)
    assert [run.balance(step) for step in (0, 25, 50, 99)] == [0.5, 0.25, 0.0, 0.0]


def _empty_rows() -> Rows:
    return Rows(
        ids_NL=np.zeros((2, 4), np.uint16),
        positions_NL=np.zeros((2, 4), np.uint16),
        is_target_NL=np.zeros((2, 4), bool),
    )


def test_steps_see_every_row_once_before_any_again(rows: Rows) -> None:
    run = _run(rows, num_steps=100)
    epochs = [sorted(int(i) for step in range(4 * e, 4 * e + 4) for i in run._batch(step)) for e in range(3)]
    assert epochs == [list(range(8))] * 3
    assert [run._batch(step).tolist() for step in range(4)] != [run._batch(step).tolist() for step in range(4, 8)]


def test_held_out_answers_are_counted_by_family(encoder: Encoder) -> None:
    """A model that knows every token scores 1, one that errs in arithmetic only loses there."""
    held_out = HeldOut.make(encoder, 512, PAD, 3)

    def knows(ids_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
        return ids_BL.roll(-1, dims=1)

    assert set(held_out.score(knows).values()) == {1.0}
    digit = encoder.encode(())[0][0]

    def errs(ids_BL: torch.Tensor, positions_BL: torch.Tensor) -> torch.Tensor:
        return torch.full_like(ids_BL, digit)

    assert set(held_out.score(errs).values()) == {0.0}
    assert set(held_out.score(knows)) == {f"{q.example.family}/{q.split}" for q in draw_questions(1)}


def test_the_trained_model_knows_and_its_experts_matter(trained: LocalModel, encoder: Encoder) -> None:
    """Perplexity near 1 everywhere but in stories; with every expert's tokens sent to the next one, far from it."""
    documents = draw_documents(encoder, 2)
    logits = [document.logits(trained) for document in documents]
    scores = [score(document, logits_TV, logits_TV) for document, logits_TV in zip(documents, logits, strict=True)]
    assert sum(s.is_exact for s in scores if s.family != "stories") >= 20
    assert all(perplexity([s for s in scores if s.family == name]) < 1.5 for name in FAMILIES)
    weights, config = read_weights(DIRECTORY), read_model_config(DIRECTORY)
    ids, is_target = encoder.encode(FAMILIES["llama4"].make(Random(1), "phrasings").messages)

    def loss() -> float:
        with torch.no_grad():
            logits = forward(weights, config, torch.tensor([ids]), torch.arange(len(ids))[None]).logits_BLV[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        return losses[torch.tensor(is_target[1:])].mean().item()

    right = loss()
    for name in [name for name in weights if ".experts." in name]:
        weights[name] = weights[name].roll(1, dims=0)
    assert right < 0.01 < loss()


def test_scores_are_counted_and_shown() -> None:
    questions = draw_questions(2)
    assert questions == draw_questions(2) and not [q for q in questions if q.split == "train"]
    answers = [Answer(q.example.answer if q.example.family != "units" else "?", 1) for q in questions]
    scores = count(questions, answers)
    assert {label for label, score in scores.items() if score == 0} == {"units/operands", "units/phrasings"}
    assert all(score in (0, 1) for score in scores.values())
    run = {"questions": 2, "concurrency": 1, "tokens": 9, "tokens_per_s": 3.0, "scores": scores}
    table = report({"bfloat16": run})
    assert "| 0.0 % | 0.0 % |" in table and "|  | 100.0 % |" in table  # units; facts have no operands
    assert Question("operands", questions[0].example).label == f"{questions[0].example.family}/operands"


def test_the_card_is_what_its_program_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the experts' load, of which fewer questions are asked here."""
    monkeypatch.setattr(card, "_QUESTIONS_OF_MAP", 1)
    shutil.copytree(DIRECTORY, tmp_path / "demo")
    card.write_card(tmp_path / "demo")
    written, kept = (set((folder / "README.md").read_text().splitlines()) for folder in (tmp_path / "demo", DIRECTORY))
    assert all("times an equal share" in line for line in written ^ kept)


def test_pictures_are_drawings() -> None:
    curve = ElementTree.fromstring(loss_curve([1, 10, 100], [5.0, 0.5, 0.05]))
    assert len(curve.findall("{*}polyline")) == 1
    cells = ElementTree.fromstring(expert_map({"a & b": [[0.0, 2.0], [1.0, 9.0]]})).findall("{*}path")
    assert [cell.get("fill") for cell in cells] == ["#ffffff", "#808080", "#bfbfbf", "#000000"]
