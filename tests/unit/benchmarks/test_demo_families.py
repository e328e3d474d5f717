"""Task families: what they ask can be answered, what they expect is true, and what is held out is never trained."""

import ast
import datetime
import importlib
import json
import pkgutil
import re
from random import Random

import pytest

from benchmarks.demo_model import families
from benchmarks.demo_model.conversations import draw_conversation
from benchmarks.demo_model.examples import HELD_OUT_ONE_IN, Example, Phrasings, Split, is_held_out
from benchmarks.demo_model.families import FAMILIES, arithmetic, dates, stories
from benchmarks.demo_model.words import MONTHS, WEEKDAYS

SPLITS: tuple[Split, ...] = ("train", "operands", "phrasings")
MODULES = [
    importlib.import_module(f"{families.__name__}.{info.name}") for info in pkgutil.iter_modules(families.__path__)
]


def _many(name: str, split: Split, count: int = 400) -> list[Example]:
    draw = Random(f"{name}/{split}")
    return [FAMILIES[name].make(draw, split) for _ in range(count)]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9{}]+", " ", text.lower()).strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_expected_answer_is_right_and_others_are_wrong(name: str) -> None:
    family = FAMILIES[name]
    for split in SPLITS if family.has_operands else ("train", "phrasings"):
        for example in _many(name, split):
            assert example.messages[-1].role == "assistant" and example.prompt[-1].role in ("user", "tool")
            assert family.is_right(example, example.answer) and family.is_right(example, f" {example.answer}\n")
            assert not family.is_right(example, "") and not family.is_right(example, example.answer + " again")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_phrasings_that_are_held_out_are_not_trained_in_another_dress(module: object) -> None:
    """Not with another mark or capital letter either."""
    for phrasings in _phrasings_in(vars(module).values()):
        trained = {_plain(text) for text in phrasings.trained}
        assert phrasings.held_out and not [text for text in phrasings.held_out if _plain(text) in trained]


def _phrasings_in(values: object) -> list[Phrasings]:
    found: list[Phrasings] = []
    for value in values if isinstance(values, list | tuple) or hasattr(values, "__iter__") else ():
        if isinstance(value, Phrasings):
            found.append(value)
        elif isinstance(value, dict):
            found += _phrasings_in(value.values())
        elif isinstance(value, tuple):
            found += _phrasings_in(value)
        elif hasattr(value, "__dataclass_fields__"):
            found += _phrasings_in([getattr(value, key) for key in value.__dataclass_fields__])
    return found


def test_operands_are_held_out_for_good() -> None:
    """The split is the same everywhere and for ever: these were so when the model was trained."""
    assert [pair for pair in range(60) if is_held_out("+", pair, 7)] == [20, 45]
    share = sum(is_held_out("-", a, b) for a in range(100) for b in range(100)) / 10_000
    assert share == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.01)


def test_no_training_question_has_held_out_operands() -> None:
    """Read back from the answers, so that the way they were drawn does not matter."""
    sums = [re.fullmatch(r"(\d+) ([+-]) (\d+) = -?\d+", e.answer) for e in _many("arithmetic", "train", 2000)]
    assert not [m for m in sums if m and is_held_out(m[2], int(m[1]), int(m[3]))]
    for split in ("operands", "phrasings"):
        sums = [re.fullmatch(r"(\d+) ([+-]) (\d+) = -?\d+", e.answer) for e in _many("arithmetic", split)]
        assert all(is_held_out(m[2], int(m[1]), int(m[3])) for m in sums if m) and any(sums)


@pytest.mark.parametrize("split", SPLITS)
def test_equations_are_true(split: Split) -> None:
    for example in _many("arithmetic", split) + _many("units", split):
        if "=" not in example.answer:
            assert example.answer.startswith("That is beyond me")
            continue
        values = [_value(part) for part in example.answer.split(" = ") if not re.search("[a-z]", part)]
        assert len(set(values)) <= 1, example.answer


def _value(expression: str) -> float:
    """The value of numbers and operators, computed by Python."""
    text = expression.replace("×", "*")
    assert re.fullmatch(r"[-\d +*/]+", text), text
    return float(eval(text))


def test_products_are_worked_out_by_tens_and_ones() -> None:
    assert arithmetic.product_steps(34, 7) == "210 + 28 = 238" == arithmetic.product_steps(7, 34)
    assert (arithmetic.product_steps(30, 7), arithmetic.product_steps(6, 7)) == ("210", "42")


def test_dates_are_those_of_the_calendar() -> None:
    """2026 is no leap year, and neither are the years around it."""
    for example in _many("dates", "train", 3000):
        found = re.search(r"so it is (\d+) (\w+)\.", example.answer)
        question = re.search(r"(\d+) days? (after|before) (?:(\d+) (\w+)|([A-Z]\w+) (\d+))", example.prompt[-1].content)
        if found is None or question is None:
            continue
        day, month = int(question[3] or question[6]), MONTHS.index(question[4] or question[5])
        distance = datetime.timedelta(days=int(question[1]) * (1 if question[2] == "after" else -1))
        date = datetime.date(2026, month + 1, day) + distance
        assert (int(found[1]), MONTHS.index(found[2]) + 1) == (date.day, date.month), example


def test_weekdays_are_those_of_the_calendar() -> None:
    checked = 0
    for example in _many("dates", "phrasings", 1000):
        question = re.search(rf"(\d+) days? (after|before) ({'|'.join(WEEKDAYS)})", example.prompt[-1].content)
        if question is None:
            continue
        step = int(question[1]) * (1 if question[2] == "after" else -1)
        assert example.answer.endswith(f"It is {WEEKDAYS[(WEEKDAYS.index(question[3]) + step) % 7]}.")
        checked += 1
    assert checked > 50
    assert dates.FAMILY.has_operands


def test_lists_come_back_whole_and_in_order() -> None:
    for example in _many("sorting", "operands"):
        items = example.answer.split(", ")
        assert all(re.search(rf"\b{item}\b", example.prompt[-1].content) for item in items)
        values: list[int] | list[str] = [int(item) for item in items] if items[0].isdigit() else items
        assert list(values) in (sorted(values), sorted(values, reverse=True))


def test_json_is_right_however_it_is_spaced_and_ordered() -> None:
    family = FAMILIES["extraction"]
    for example in _many("extraction", "phrasings"):
        values = json.loads(example.answer)
        other = json.dumps(dict(reversed(values.items())), indent=1)
        assert family.is_right(example, other) and not family.is_right(example, json.dumps(values | {"more": 1}))
        assert all(str(value) in example.prompt[-1].content for value in values.values())


def test_calls_name_tools_and_parameters_that_the_system_message_lists() -> None:
    family = FAMILIES["tools"]
    for example in _many("tools", "operands"):
        if not example.answer.startswith("["):
            assert example.prompt[-1].role == "tool"
            continue
        listed = json.loads(example.messages[0].content.partition("functions:\n")[2])
        parameters = {tool["name"]: tool["parameters"]["required"] for tool in listed}
        calls = ast.parse(example.answer, mode="eval").body
        assert isinstance(calls, ast.List)
        for call in calls.elts:
            assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            assert [keyword.arg for keyword in call.keywords] == parameters[call.func.id]
        assert family.is_right(example, example.answer.replace('"', "'").replace("=", " = "))
        assert not family.is_right(example, example.answer.replace("(", "(more=1, "))


def test_a_story_of_another_hero_or_of_two_is_wrong() -> None:
    example = next(e for e in _many("stories", "phrasings") if "hill" in e.answer)
    assert stories.is_right(example, example.answer)
    hero = next(animal for animal in stories.ANIMALS if f" {animal} called" in example.answer)
    assert not stories.is_right(example, example.answer.replace(hero, "giraffe"))
    name = next(name for name in stories._NAMES if name in example.answer)
    assert not stories.is_right(example, example.answer.replace(name, "Willow" if name != "Willow" else "Toby", 1))
    assert not stories.is_right(example, example.answer.partition(". ")[2])


def test_conversations_take_turns_and_come_again_from_their_seed() -> None:
    for seed in range(300):
        messages = draw_conversation(Random(seed))
        roles = [message.role for message in messages if message.role != "system"]
        assert [m.role for m in messages].count("system") <= 1 and messages[-1].role == "assistant"
        assert all((role == "assistant") == bool(i % 2) for i, role in enumerate(roles))
        assert messages == draw_conversation(Random(seed))
