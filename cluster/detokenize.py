"""Token ids to text, one token at a time, with stop strings. Pure: the tokenizer comes in as a function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from decode.requests import TokenLogprobs

REPLACEMENT = "\ufffd"  # what decoders put where bytes are no (or not yet) valid UTF-8
_WINDOW_TOKENS = 16
_MAX_WINDOW_TOKENS = 64  # of a text that is never complete, as broken characters one after the other are


class IncrementalDetokenizer:
    """Text that later tokens can no longer change.

    A character may be spread over several tokens. UTF-8 decoders put exactly one U+FFFD for an unfinished
    character, so at most one trailing U+FFFD is held back; all before it is final. Only a short window of tokens
    is decoded each time; it starts where the text was once complete, some tokens back, as context for tokenizers
    (SentencePiece) that treat the first token of a text differently.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._emitted_chars = 0  # of the window's text
        self._complete_at = 0  # tokens of the window after which the text last was complete

    def push(self, token_id: int) -> str:
        """The text that has become final with this token, often one word, at times nothing."""
        self._window.append(token_id)
        text = self._decode(self._window)
        final_chars = len(text) - 1 if text.endswith(REPLACEMENT) else len(text)
        new = text[self._emitted_chars : final_chars]
        self._emitted_chars = max(final_chars, self._emitted_chars)
        if final_chars == len(text):
            if len(self._window) > _WINDOW_TOKENS and self._complete_at:
                del self._window[: self._complete_at]
                self._emitted_chars = len(self._decode(self._window))
            self._complete_at = len(self._window)
        elif len(self._window) > _MAX_WINDOW_TOKENS:
            num_held = len(text) - self._emitted_chars
            del self._window[:-_WINDOW_TOKENS]
            self._emitted_chars = len(self._decode(self._window)) - num_held
            self._complete_at = 0
        return new

    def flush(self) -> str:
        """What was held back, at the end of the output."""
        text = self._decode(self._window) if self._window else ""
        rest, self._emitted_chars = text[self._emitted_chars :], len(text)
        return rest


class StopScanner:
    """Cuts text before the first stop string (or behind it), holding back only what could still become one."""

    def __init__(self, stops: Sequence[str], *, keep_stop: bool = False) -> None:
        assert all(stops), "a stop string is empty"
        self._stops = tuple(stops)
        self._keep_stop = keep_stop
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string. After `stopped`, nothing."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at, len(stop)) for at, stop in ((text.find(stop), stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            at, size = min(found)
            return text[: at + size if self._keep_stop else at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the output ends without a stop string."""
        rest, self._held = ("" if self.stopped else self._held), ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning (not the whole) of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New text and the tokens it came with. offsets: where in the answer (in characters) the text of each token
    begins; logprobs: one for each token, if asked for. `stopped`: a stop string was found; nothing follows."""

    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    stopped: bool = False


class OutputText:
    """Detokenizer and stop strings together. `silent_ids` (end of sequence) have no text. `keep_stop`: the stop string
    stays in the text. Stop strings count in what comes after the first `min_tokens` tokens."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        stops: Sequence[str] = (),
        silent_ids: Collection[int] = (),
        keep_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(decode)
        self._scanner = StopScanner(stops, keep_stop=keep_stop)
        self._silent_ids = frozenset(silent_ids)
        self._free_tokens = min_tokens  # so many more are not searched for stop strings
        self._num_chars = 0

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> Piece:
        """The piece for newly sampled tokens; tokens after a stop string are dropped."""
        text, offsets = "", []
        for token_id in token_ids:
            offsets.append(self._num_chars)
            if token_id not in self._silent_ids:
                new = self._detokenizer.push(token_id)
                self._num_chars += len(new)
                text += self._scanner.push(new) if self._free_tokens <= 0 else new
            self._free_tokens -= 1
            if self._scanner.stopped:
                break
        count = len(offsets)
        return Piece(
            text=text,
            token_ids=tuple(token_ids[:count]),
            offsets=tuple(offsets),
            logprobs=None if logprobs is None else tuple(logprobs[:count]),
            stopped=self._scanner.stopped,
        )

    def flush(self) -> Piece:
        """The end of the text."""
        text = self._scanner.push(self._detokenizer.flush())
        return Piece(text=text + self._scanner.flush(), token_ids=(), stopped=self._scanner.stopped)
