"""What the OpenAI endpoints answer, as dictionaries. Pure.

A format turns the pieces of one request into stream chunks (`first`, `piece`, `last`) or one body (`whole`). The
KV receipt stands in the last chunk of a stream, and in the body otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.completion import Done
from cluster.detokenize import Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A served model, as /v1/models shows it."""

    id: str
    max_context: int
    vocab_size: int
    created: int = 0
    owned_by: str = "kvstream"

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's model object, with the context length under vLLM's name."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": self.owned_by,
            "max_model_len": self.max_context,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """Shared by completions and chat. `prompt_token_ids` is given when the request asked for token ids."""

    kind: Literal["completion", "chat"]
    request_id: str
    model: str
    created: int
    include_usage: bool = False
    prompt_token_ids: tuple[int, ...] | None = None

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any text: a chat names its speaker."""
        if self.kind == "completion":
            return []
        chunk = self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}})])
        if self.prompt_token_ids is not None:
            chunk["prompt_token_ids"] = self.prompt_token_ids
        return [chunk]

    def piece(self, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        """A chunk of text."""
        choice = self._choice(self._text(piece.text))
        if self.prompt_token_ids is not None:
            choice["token_ids"] = piece.token_ids
            if is_first and self.kind == "completion":
                choice["prompt_token_ids"] = self.prompt_token_ids
        return self._chunk([choice])

    def last(self, done: Done) -> list[dict[str, Any]]:
        """The chunk with the finish reason, then usage if asked for. The last has the receipt."""
        text = self._text(done.text) if done.text or self.kind == "completion" else {"delta": {}}
        chunks = [self._chunk([{**self._choice(text), "finish_reason": done.finish_reason}])]
        if self.include_usage:
            chunks.append({**self._chunk([]), "usage": done.usage()})
        chunks[-1]["kv_receipt"] = done.receipt
        return chunks

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text = "".join(piece.text for piece in pieces) + done.text
        content = {"text": text} if self.kind == "completion" else {"message": {"role": "assistant", "content": text}}
        choice: dict[str, Any] = {**self._choice(content), "finish_reason": done.finish_reason}
        body = self._chunk([choice], streamed=False)
        if self.prompt_token_ids is not None:
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
            (choice if self.kind == "completion" else body)["prompt_token_ids"] = self.prompt_token_ids
        return {**body, "usage": done.usage(), "kv_receipt": done.receipt}

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text} if self.kind == "completion" else {"delta": {"content": text}}

    def _choice(self, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": None}

    def _chunk(self, choices: list[dict[str, Any]], *, streamed: bool = True) -> dict[str, Any]:
        chat = self.kind == "chat"
        chunk: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.request_id}",
            "object": ("chat.completion.chunk" if streamed else "chat.completion") if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if streamed and self.include_usage:
            chunk["usage"] = None
        return chunk
