"""The bytes and the text of single tokens, for logprobs. Reads a tokenizer; no I/O.

A token may be a part of a character, so its text alone is not enough to know it by: byte-level and byte-fallback
vocabularies are read for the bytes themselves.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from cluster.chat import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_SPACE = "▁"  # U+2581, SentencePiece's space

Kind = Literal["byte_level", "sentencepiece", "text"]


class TokenTexts:
    """Of one tokenizer, remembered as they are asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Any = tokenizer
        self._kind = _kind(tokenizer)
        # Special and other added tokens stand in the vocabulary as they are.
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._known: dict[int, bytes] = {token: str(item).encode() for token, item in added.items()}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to the text."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._read(token_id)
        return found

    def text_of(self, token_id: int) -> str:
        """The token's text; of one that is no whole UTF-8, "bytes:" and an escape for each byte, as OpenAI does."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _read(self, token_id: int) -> bytes:
        if self._kind == "text":
            return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()  # type: ignore[no-any-return]
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""  # an id beyond the tokenizer's own, as models with padded vocabularies have them
        if self._kind == "byte_level":
            return b"".join(_FROM_ALPHABET.get(char) or char.encode() for char in piece)
        match = _BYTE_TOKEN.fullmatch(piece)
        return bytes.fromhex(match[1]) if match else piece.replace(_WORD_SPACE, " ").encode()


def _kind(tokenizer: Tokenizer) -> Kind:
    """How the vocabulary spells bytes, by the tokenizer's decoder."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return "text"
    state = json.loads(decoder.__getstate__())
    steps = [step["type"] for step in state.get("decoders", [state])]
    if "ByteLevel" in steps:
        return "byte_level"
    return "sentencepiece" if {"ByteFallback", "Metaspace", "Replace"} & set(steps) else "text"


def _alphabet() -> dict[str, bytes]:
    """GPT-2's: printable bytes stand for themselves, the others, in order, for U+0100 and on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {
        chr(256 + place): bytes([byte]) for place, byte in enumerate(others)
    }


_FROM_ALPHABET = _alphabet()
