"""Detokenizing and stop strings: any split of the bytes into tokens gives the same text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.detokenize import IncrementalDetokenizer, OutputText, StopScanner


class SplitTokenizer:
    """Tokens are arbitrary runs of bytes, as in byte-level BPE; ids are made up as they come."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in token_ids).decode(errors="replace")


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted({c % (len(data) + 1) for c in cuts}), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


cuts = st.lists(st.integers(min_value=0, max_value=10_000), max_size=60)


@given(st.text(max_size=80), cuts)
@example("😀" * 30, list(range(200)))
def test_pieces_add_up_to_the_text(text: str, where: list[int]) -> None:
    tokenizer = SplitTokenizer(split(text.encode(), where))
    detokenizer = IncrementalDetokenizer(tokenizer.decode)
    pieces = [detokenizer.push(i) for i in range(len(tokenizer.pieces))]
    assert "".join(pieces) + detokenizer.flush() == text


@given(st.binary(max_size=80), cuts)
def test_invalid_bytes_add_up_to_what_a_decoder_makes_of_them(data: bytes, where: list[int]) -> None:
    tokenizer = SplitTokenizer(split(data, where))
    detokenizer = IncrementalDetokenizer(tokenizer.decode)
    pieces = [detokenizer.push(i) for i in range(len(tokenizer.pieces))]
    assert "".join(pieces) + detokenizer.flush() == data.decode(errors="replace")


def test_half_a_character_waits() -> None:
    tokenizer = SplitTokenizer([b"a\xe2", b"\x82", b"\xacb"])
    detokenizer = IncrementalDetokenizer(tokenizer.decode)
    assert [detokenizer.push(i) for i in range(3)] == ["a", "", "€b"]


def test_only_a_window_is_decoded() -> None:
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return "x" * len(token_ids)

    detokenizer = IncrementalDetokenizer(decode)
    assert "".join(detokenizer.push(0) for _ in range(500)) == "x" * 500
    assert longest <= 40


def test_only_a_window_is_decoded_of_broken_characters_too() -> None:
    """Whoever allows only such a token would keep the gateway busy otherwise."""
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return bytes(token_ids).decode(errors="replace")

    detokenizer = IncrementalDetokenizer(decode)
    data = [0xFF] * 1000 + list("😀".encode() * 5) + [0xF0, 0x9F] * 200 + list(b"end")
    found = "".join(map(detokenizer.push, data)) + detokenizer.flush()
    assert found == bytes(data).decode(errors="replace")
    assert longest < 100


def test_sentencepiece_style_leading_spaces_stay() -> None:
    words = ["▁one", "▁two", "▁three"] * 20

    def decode(token_ids: Sequence[int]) -> str:  # drops the space before the first word of any text
        return "".join(words[i] for i in token_ids).replace("▁", " ").removeprefix(" ")

    detokenizer = IncrementalDetokenizer(decode)
    assert "".join(detokenizer.push(i) for i in range(60)) == decode(range(60))


@given(
    st.text(alphabet="ab", max_size=40),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts,
)
def test_stop_strings_cut_at_the_first_one(text: str, stops: list[str], where: list[int]) -> None:
    scanner = StopScanner(stops)
    out = "".join(scanner.push(piece.decode()) for piece in split(text.encode(), where)) + scanner.flush()
    found = [text.find(stop) for stop in stops if stop in text]
    assert scanner.stopped == bool(found)
    # Fed in pieces, the scanner may meet a later but shorter stop string first; it never lets one through.
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if not found:
        assert out == text


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    scanner = StopScanner(["END"])
    assert [scanner.push(t) for t in ("a", "E", "N", "x", "EN", "D tail")] == ["a", "", "", "ENx", "", ""]
    assert scanner.stopped


def test_tokens_after_the_stop_string_are_dropped() -> None:
    tokenizer = SplitTokenizer([b"yes", b"ST", b"OP", b"never"])
    output = OutputText(tokenizer.decode, stops=["STOP"])
    assert output.push([0, 1]).text == "yes"
    piece = output.push([2, 3])
    assert (piece.text, piece.token_ids, piece.stopped) == ("", (2,), True)


def test_silent_tokens_have_no_text() -> None:
    tokenizer = SplitTokenizer([b"yes", b"</s>"])
    output = OutputText(tokenizer.decode, silent_ids=[1])
    assert output.push([0, 1]).text + output.flush().text == "yes"


@pytest.mark.parametrize("held", ["EN", "\ufffd"])
def test_the_end_brings_what_was_held_back(held: str) -> None:
    tokenizer = SplitTokenizer([b"a", held.encode()])
    output = OutputText(tokenizer.decode, stops=["END"])
    assert output.push([0, 1]).text == "a"
    assert output.flush().text == held


def test_the_stop_string_stays_if_asked_for() -> None:
    scanner = StopScanner(["END", "E"], keep_stop=True)
    assert [scanner.push(text) for text in ("aE", "ND")] == ["aE", ""]
    scanner = StopScanner(["END"], keep_stop=True)
    assert [scanner.push(text) for text in ("aE", "ND tail")] == ["a", "END"]
    assert scanner.stopped


def test_stop_strings_count_after_min_tokens() -> None:
    tokenizer = SplitTokenizer([b"STOP", b"ST", b"OP", b"never"])
    output = OutputText(tokenizer.decode, stops=["STOP"], min_tokens=2)
    assert output.push([0, 1]).text == "STOPST"
    assert not output.push([2]).stopped
    assert output.push([0]).stopped


def test_offsets_are_where_a_tokens_text_begins() -> None:
    tokenizer = SplitTokenizer([b"h", b"\xe2", b"\x82", b"\xac", b"STO", b"P", b"</s>"])
    output = OutputText(tokenizer.decode, stops=["STOP"], silent_ids=[6])
    assert output.push([6, 0, 1]).offsets == (0, 0, 1)
    assert output.push([2, 3, 4]).offsets == (1, 1, 2)
    assert output.push([5, 0]).offsets == (5,)
