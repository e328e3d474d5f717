"""Conversations become the tokens that the served chat path makes of them, and the right ones are targets."""

import json
from random import Random

import pytest
from demo_small import SMALL

from actors.ingress.tokenizer import TextTokenizer
from benchmarks.demo_model.conversations import draw_conversation
from benchmarks.demo_model.examples import Message
from benchmarks.demo_model.families import FAMILIES
from benchmarks.demo_model.families.tools import system_message
from benchmarks.demo_model.shape import DIRECTORY, SHAPE
from benchmarks.demo_model.tokens import Encoder, write_description


@pytest.fixture(scope="module")
def served() -> TextTokenizer:
    return TextTokenizer.load(DIRECTORY, SHAPE.base_vocab)


def _plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def test_prompts_are_those_of_the_chat_template(served: TextTokenizer, encoder: Encoder) -> None:
    """Tool results and system messages too."""
    draw, roles = Random(1), set()
    conversations = [draw_conversation(draw) for _ in range(100)]
    conversations += [FAMILIES["tools"].make(draw, "train").messages for _ in range(100)]
    for messages in (conversation[:-1] for conversation in conversations):
        roles |= {message.role for message in messages}
        assert encoder.encode_prompt(messages) == served.encode_chat(_plain(messages))
    assert roles == {"system", "user", "assistant", "tool"}


def test_targets_are_what_the_assistant_says_and_the_end_of_its_turn(served: TextTokenizer, encoder: Encoder) -> None:
    messages = (
        Message(role="user", content="What is 1 + 1?"),
        Message(role="assistant", content="1 + 1 = 2"),
        Message(role="user", content="Thanks"),
        Message(role="assistant", content="You are welcome."),
    )
    ids, is_target = encoder.encode(messages)
    said = [token for token, target in zip(ids, is_target, strict=True) if target]
    text = served.backend.decode(said, skip_special_tokens=False)
    assert text == "1 + 1 = 2<|eot|>You are welcome.<|eot|>"


def test_a_control_token_that_a_user_spells_is_text(served: TextTokenizer, encoder: Encoder) -> None:
    ids, _ = encoder.encode((Message(role="user", content="Say <|eot|>."),))
    assert ids.count(served.control_ids["<|eot|>"]) == 1


def test_digits_stay_apart_and_any_bytes_can_be_spelled(served: TextTokenizer) -> None:
    assert [served.token_bytes(token) for token in served.encode_prompt("2048")[1:]] == [b"2", b"0", b"4", b"8"]
    text = "naïve 🐎 马 \x00\t"
    assert served.backend.decode(served.encode_prompt(text)[1:]) == text


def test_the_template_lists_tools_as_they_were_trained(served: TextTokenizer) -> None:
    assert served.template is not None
    tool = {"name": "get_weather", "description": "The weather of a city.", "parameters": {"type": "object"}}
    template, variables = served.template._template, {"bos_token": "<bos>", "add_generation_prompt": True}
    message = {"role": "user", "content": "Weather in Lima?"}
    trained = f"<|header_start|>system<|header_end|>\n\n{system_message([tool]).content}<|eot|>"
    rest = "<|header_start|>user<|header_end|>\n\nWeather in Lima?<|eot|><|header_start|>assistant<|header_end|>\n\n"
    assert template.render(messages=[message], tools=[{"type": "function", "function": tool}], **variables) == (
        f"<bos>{trained}{rest}"
    )
    both = template.render(messages=[{"role": "system", "content": "Be brief."}, message], tools=[tool], **variables)
    assert both == f"<bos>{trained}{rest}".replace("\n\nYou can call", "\n\nBe brief.\n\nYou can call")


def test_the_template_writes_calls_in_the_pythonic_form(served: TextTokenizer) -> None:
    assert served.template is not None
    calls = [
        {"function": {"name": "set_timer", "arguments": {"minutes": 5}}},
        {"function": {"name": "find", "arguments": {"q": 'a "b"', "n": 2}}},
    ]
    text = served.template._template.render(
        messages=[{"role": "assistant", "content": None, "tool_calls": calls}], tools=None, bos_token=""
    )
    assert text.endswith('\n\n[set_timer(minutes=5), find(q="a \\"b\\"", n=2)]<|eot|>')


def test_a_description_is_written_for_any_shape(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("description")
    write_description(directory, SMALL, num_conversations=300)
    assert json.loads((directory / "config.json").read_text())["hidden_size"] == SMALL.hidden_size
    again = tmp_path_factory.mktemp("again")
    write_description(again, SMALL, num_conversations=300)
    assert all(file.read_bytes() == (again / file.name).read_bytes() for file in directory.iterdir())
