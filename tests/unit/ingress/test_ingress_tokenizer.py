"""User text can never become a control token; the template's own can."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from actors.errors import CheckpointError, RequestError
from actors.ingress.tokenizer import ROLES, TextTokenizer

SPELLINGS = ["<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>", "<|python_start|>", "<|patch|>"]
# Text made to be dangerous: whole control tokens, their halves, and what lies between, in any order.
FRAGMENTS = [*SPELLINGS, "<", "|", ">", "<|", "|>", "<|eo", "t|>", "eot", " ", "\n\n", "user", "é", "🐎", "\ufdd0"]
dangerous = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join) | st.text(max_size=30)


def control_ids_in(tokenizer: TextTokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.skip_ids]


@given(text=dangerous)
def test_prompt_text_never_becomes_a_control_token(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode_prompt(text)
    assert control_ids_in(tokenizer, ids) == [tokenizer.bos_token_id]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.backend.decode(ids[1:]) == text  # nothing is lost either


@given(messages=st.lists(st.tuples(st.sampled_from(ROLES[:3]), dangerous), min_size=1, max_size=4))
def test_chat_has_exactly_the_templates_control_tokens(
    tokenizer: TextTokenizer, messages: list[tuple[str, str]]
) -> None:
    ids = tokenizer.encode_chat([{"role": role, "content": content} for role, content in messages])
    names = {id_: name for name, id_ in tokenizer.control_ids.items()}
    turn = ["<|header_start|>", "<|header_end|>", "<|eot|>"]
    expected = ["<|begin_of_text|>", *turn * len(messages), "<|header_start|>", "<|header_end|>"]
    assert [names[i] for i in control_ids_in(tokenizer, ids)] == expected
    said = tokenizer.backend.decode(ids, skip_special_tokens=False)
    header = "<|header_start|>{}<|header_end|>\n\n"
    assert said == "<|begin_of_text|>" + "".join(
        header.format(role) + content.strip() + "<|eot|>" for role, content in messages
    ) + header.format("assistant")


def test_harmless_chat_is_what_the_library_itself_makes_of_the_templates_text(
    tokenizer: TextTokenizer, checkpoint: Path
) -> None:
    """The oracle: the unmodified tokenizer, specials on, over the expected text."""
    oracle = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = "<|begin_of_text|><|header_start|>user<|header_end|>\n\nhello there<|eot|>"
    text += "<|header_start|>assistant<|header_end|>\n\n"
    expected = oracle.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_chat([{"role": "user", "content": " hello there\n"}]) == expected
    assert tokenizer.encode_prompt("hello there") == oracle.encode("hello there").ids


def test_a_text_of_every_private_use_character_is_refused_not_trusted(tokenizer: TextTokenizer) -> None:
    everything = "".join(map(chr, [*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE)]))
    with pytest.raises(RequestError) as e:
        tokenizer.encode_chat([{"role": "user", "content": everything}])
    assert e.value.field == "messages"


def template_in(checkpoint: Path, directory: Path, template: str | None, **config: object) -> TextTokenizer:
    values = json.loads((checkpoint / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        token["special"] = False  # a checkpoint may not have marked them: they must be safe all the same
    (directory / "tokenizer.json").write_text(json.dumps(values))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin_of_text|>", **config}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return TextTokenizer.load(directory, 1)


def test_added_tokens_that_are_not_marked_special_are_safe_too(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = template_in(checkpoint, tmp_path, None)
    assert control_ids_in(tokenizer, tokenizer.encode_prompt("a<|eot|>b")[1:]) == []


def test_template_conveniences_of_transformers(checkpoint: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}\n"
        "    {% if loop.first %}\n{% continue %}\n    {% endif %}\n"
        "{{ m | tojson }}|{{ strftime_now('%Y') | length }}\n"
        "{% endfor %}"
    )
    tokenizer = template_in(checkpoint, tmp_path, template)
    ids = tokenizer.encode_chat([{"role": "system", "content": "x"}, {"role": "user", "content": "é<|eot|>"}])
    assert tokenizer.backend.decode(ids) == '{"role": "user", "content": "é<|eot|>"}|4\n'
    assert control_ids_in(tokenizer, ids) == []


def test_a_template_from_the_config_by_name(checkpoint: Path, tmp_path: Path) -> None:
    named = [{"name": "other", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]
    tokenizer = template_in(checkpoint, tmp_path, None, chat_template=named)
    ids = tokenizer.encode_chat([{"role": "user", "content": "x"}])
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == "<|begin_of_text|>yes"


def test_a_template_that_refuses_is_a_request_error(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = template_in(checkpoint, tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="messages: roles must alternate"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("escape", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_a_template_cannot_leave_its_sandbox(checkpoint: Path, tmp_path: Path, escape: str) -> None:
    tokenizer = template_in(checkpoint, tmp_path, escape)
    with pytest.raises(RequestError):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])


def test_no_template_says_so(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        template_in(checkpoint, tmp_path, None).encode_chat([{"role": "user", "content": "x"}])


def test_broken_files_name_themselves(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        TextTokenizer.load(tmp_path, 0)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: the chat template's line 1"):
        template_in(checkpoint, tmp_path, "{% if %}")
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        TextTokenizer.load(tmp_path, 0)


@given(text=st.text(max_size=40))
def test_token_bytes_add_up_to_the_text(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode_prompt(text)[1:]
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert len(ids) >= tokenizer.least_tokens(len(text))


def test_token_bytes_of_control_and_unused_ids(tokenizer: TextTokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.control_ids["<|eot|>"]) == b"<|eot|>"
    assert tokenizer.token_bytes(10**6) == b""
