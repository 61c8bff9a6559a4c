"""The bytes of single tokens add up to the text, whatever way the vocabulary spells them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_backend import EOS, ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.token_text import TokenTexts

BUNDLED = Path(__file__).parents[2] / "model"


@pytest.fixture(scope="module")
def bundled() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED)


@given(text=st.text(max_size=40))
def test_byte_level_tokens_add_up(bundled: Any, text: str) -> None:
    texts = TokenTexts(bundled)
    ids = bundled.encode(text, add_special_tokens=False)
    assert b"".join(texts.bytes_of(token) for token in ids) == text.encode()


def test_parts_of_a_character_have_their_own_bytes() -> None:
    texts = TokenTexts(ByteTokenizer())
    assert [texts.bytes_of(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert [texts.text_of(token) for token in (104, 0xE2, EOS)] == ["h", "bytes:\\xe2", "<end>"]


def test_special_tokens_are_shown(bundled: Any) -> None:
    texts = TokenTexts(bundled)
    assert texts.text_of(bundled.eos_token_id) == bundled.eos_token


def sentencepiece() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "▁", "▁he", "llo", *(f"<0x{byte:02X}>" for byte in range(256))]
    spelled = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    spelled.decoder = decoders.Sequence(steps)
    spelled.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=spelled)


def test_sentencepiece_with_byte_fallback() -> None:
    texts = TokenTexts(sentencepiece())
    assert [texts.text_of(token) for token in (1, 2, 3, 4)] == ["<s>", " ", " he", "llo"]
    assert [texts.bytes_of(5 + byte) for byte in "€".encode()] == [b"\xe2", b"\x82", b"\xac"]
    assert texts.bytes_of(99_999) == b"", "models pad their vocabularies beyond the tokenizer's"


def test_other_vocabularies_are_decoded() -> None:
    spelled = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TokenTexts(PreTrainedTokenizerFast(tokenizer_object=spelled)).text_of(1) == "b"
