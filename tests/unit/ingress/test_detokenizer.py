"""Detokenizing piece by piece against decoding the whole, over random text, bytes, groupings and stop texts."""

import random
import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from actors.ingress.detokenizer import Detokenizer, token_bytes
from actors.ingress.stop_texts import StopFinder

CORPUS = ["Hello world, hello corral. " * 20, "Über Straße, naïve café. " * 20, "日本語のテキスト 😀🐎 👩‍👩‍👧 " * 20]


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 400 tokens whose merges often split characters, and three added tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|eot|>", "<|bos|>"])
    backend.add_tokens([AddedToken("two words 馬", normalized=False)])
    return backend


HORSE = [tokenizer().token_to_id(char) for char in "ðŁĲİ"]  # the four bytes of U+1F40E, each a token


def skip_ids() -> set[int]:
    return {tokenizer().token_to_id("<|eot|>"), tokenizer().token_to_id("<|bos|>")}


def decode(ids: list[int]) -> str:
    kept = [i for i in ids if i not in skip_ids()]
    text: str = tokenizer().decode(kept, skip_special_tokens=False)
    return text


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The definition, slowly: the first character that completes a stop text, then the longest that ends there."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if s and text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def grouped(ids: list[int], sizes: list[int]) -> list[list[int]]:
    groups, first, i = [], 0, 0
    while first < len(ids):
        size = sizes[i % len(sizes)] if sizes else 1
        groups.append(ids[first : first + size])
        first, i = first + size, i + 1
    return groups


def any_text() -> st.SearchStrategy[str]:
    return st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab😀é馬\n ")), max_size=40)


def token_ids() -> st.SearchStrategy[list[int]]:
    """Ids of real text, and any ids at all: broken UTF-8, control tokens, ids beyond the vocabulary."""
    encoded = any_text().map(lambda text: tokenizer().encode(text).ids)
    return st.one_of(encoded, st.lists(st.integers(0, 420), max_size=40))


group_sizes = st.lists(st.integers(0, 7), max_size=8).filter(lambda sizes: not sizes or any(sizes))


@given(token_ids(), group_sizes)
@settings(max_examples=300, deadline=None)
def test_pieces_add_up_to_the_decoded_whole(ids: list[int], sizes: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer(), (), skip_ids())
    texts = [detokenizer.push(group).text for group in grouped(ids, sizes)]
    assert "".join(texts) + detokenizer.finish() == decode(ids)


@given(any_text())
@settings(max_examples=150, deadline=None)
def test_no_half_character_is_sent_and_no_whole_one_is_kept(text: str) -> None:
    detokenizer = Detokenizer(tokenizer(), (), skip_ids())
    sent, data = "", b""
    for token_id in tokenizer().encode(text).ids:
        sent += detokenizer.push([token_id]).text
        data += token_bytes(tokenizer(), token_id)
        assert sent == data.decode(errors="ignore")
    assert detokenizer.finish() == ""


stop_tuples = st.one_of(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=16),
    st.lists(st.text(alphabet="ab😀é馬\n ", min_size=1, max_size=3), max_size=16),
).map(tuple)


@given(st.text(alphabet="ab😀é馬\n ", max_size=60), stop_tuples, group_sizes)
@settings(max_examples=300, deadline=None)
def test_the_cut_is_where_the_definition_says(text: str, stop: tuple[str, ...], sizes: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer(), stop, skip_ids())
    results = [detokenizer.push(group) for group in grouped(tokenizer().encode(text).ids, sizes)]
    expected, stops = cut(text, stop)
    assert any(result.stopped for result in results) == stops
    assert "".join(result.text for result in results) + detokenizer.finish() == expected


@given(st.text(alphabet="ab", max_size=40), st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=16))
@settings(max_examples=300, deadline=None)
def test_exactly_what_may_begin_a_stop_text_is_held_back(text: str, stop: list[str]) -> None:
    finder = StopFinder(stop)
    sent = ""
    for end in range(1, len(text) + 1):
        sent += finder.push(text[end - 1])
        if finder.stopped:
            break
        beginnings = [n for n in range(end + 1) if any(len(s) > n and s.startswith(text[end - n : end]) for s in stop)]
        assert sent == text[: end - max(beginnings, default=0)]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("abc", ("abc", "b"), "a"),  # b is complete before abc is, and generation ends there
        ("xabc", ("bc", "abc", "c"), "x"),  # all end there: the longest
        ("aab", ("ab",), "a"),
        ("abab", ("abb",), "abab"),
        ("ab", ("abc",), "ab"),
        ("\n\nUser:", ("\nUser:", "\n\n\n"), "\n"),
        ("日本語", ("本",), "日"),
    ],
)
def test_cuts_by_hand(text: str, stop: tuple[str, ...], expected: str) -> None:
    for size in (1, 2, 100):
        detokenizer = Detokenizer(tokenizer(), stop, skip_ids())
        results = [detokenizer.push(group).text for group in grouped(tokenizer().encode(text).ids, [size])]
        assert "".join(results) + detokenizer.finish() == expected


def test_nothing_follows_a_stop() -> None:
    detokenizer = Detokenizer(tokenizer(), ("b",), skip_ids())
    ids = tokenizer().encode("abc").ids
    assert detokenizer.push(ids).stopped
    after = detokenizer.push(ids)
    assert (after.text, after.stopped, detokenizer.finish()) == ("", True, "")


def test_a_character_that_stays_incomplete_is_one_replacement() -> None:
    detokenizer = Detokenizer(tokenizer(), (), skip_ids())
    assert [detokenizer.push([i]).text for i in HORSE[:3]] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_control_tokens_are_not_rendered_and_do_not_break_a_character() -> None:
    eot = tokenizer().token_to_id("<|eot|>")
    detokenizer = Detokenizer(tokenizer(), (), {eot})
    assert detokenizer.push([*HORSE[:2], eot, *HORSE[2:], eot]).text == "🐎"
    shown = Detokenizer(tokenizer(), (), set())
    assert shown.push([eot]).text == "<|eot|>"


def test_a_tokenizer_that_is_not_byte_level_is_refused() -> None:
    with pytest.raises(ValueError, match="ByteLevel"):
        Detokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), (), set())


def test_time_is_linear_in_the_length() -> None:
    """With stop texts that keep almost matching, and with bytes that never make a character."""
    stop = tuple("a" * 500 + char for char in "bcdefghijklmnopq")
    letter, broken = tokenizer().token_to_id("a"), tokenizer().token_to_id("Ð")

    def elapsed_s(num_tokens: int) -> float:
        started_s = time.process_time()
        detokenizer = Detokenizer(tokenizer(), stop, skip_ids())
        for i in range(num_tokens):
            detokenizer.push([letter if i % 1000 else broken])
        for _ in range(num_tokens):
            detokenizer.push([broken])
        return time.process_time() - started_s

    elapsed_s(1_000)
    assert elapsed_s(40_000) < 8 * (elapsed_s(10_000) + 0.02)


def test_random_stops_over_a_long_text() -> None:
    rng = random.Random(0)
    text = "".join(rng.choice("abc") for _ in range(3_000)) + "STOP" + "abc"
    stop = ["".join(rng.choice("abc") for _ in range(12)) + "d" for _ in range(15)]
    finder = StopFinder([*stop, "STOP"])
    sent = "".join(finder.push(text[i : i + 7]) for i in range(0, len(text), 7))
    assert sent == text[:3_000]
    assert finder.stopped
