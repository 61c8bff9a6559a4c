"""What the OpenAI endpoints answer, as dictionaries. Pure.

A format turns the pieces of a request's choices into stream chunks (`first`, `piece`, `last`, `end`) or one body
(`whole`). The KV receipt stands in the last chunk of a stream, and in the body otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.completion import Done
from cluster.detokenize import Piece
from cluster.openai_logprobs import Scored, chat_logprobs, completion_logprobs, prompt_logprobs
from cluster.token_text import TokenTexts


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
class Prompt:
    """token_ids of one prompt; if the answer begins with it, its text and where in it each token's begins."""

    token_ids: tuple[int, ...]
    text: str = ""
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """Shared by completions and chat. Choice `index` answers prompt `index // n`."""

    kind: Literal["completion", "chat"]
    request_id: str
    model: str
    created: int
    prompts: tuple[Prompt, ...]
    texts: TokenTexts
    n: int = 1
    include_usage: bool = False
    with_token_ids: bool = False
    with_logprobs: bool = False
    with_prompt_logprobs: bool = False
    echo: bool = False

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    def first(self, index: int) -> list[dict[str, Any]]:
        """Chunks of a choice before any text: a chat names its speaker, an echo repeats the prompt."""
        if self.kind == "completion":
            return [self._chunk([self._choice(index, {"text": self._prompt(index).text})])] if self.echo else []
        chunk = self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])
        if self.with_token_ids:
            chunk["prompt_token_ids"] = self._prompt(index).token_ids
        return [chunk]

    def piece(self, index: int, piece: Piece, *, is_first: bool) -> dict[str, Any]:
        """A chunk of text."""
        choice = self._choice(index, self._text(piece.text))
        if self.with_logprobs:
            choice["logprobs"] = self._logprobs(index, [piece])
        if self.with_token_ids:
            choice["token_ids"] = piece.token_ids
            if is_first and self.kind == "completion":
                choice["prompt_token_ids"] = self._prompt(index).token_ids
        return self._chunk([choice])

    def last(self, index: int, done: Done) -> dict[str, Any]:
        """The chunk with a choice's finish reason."""
        text = self._text(done.text) if done.text or self.kind == "completion" else {"delta": {}}
        return self._chunk([{**self._choice(index, text), "finish_reason": done.finish_reason}])

    def end(self, last: dict[str, Any], dones: Sequence[Done]) -> list[dict[str, Any]]:
        """`last`, the chunk that ends the last choice to end, then usage if asked for. The last has the receipt."""
        chunks = [last]
        if self.include_usage:
            chunks.append({**self._chunk([]), "usage": self._usage(dones)})
        chunks[-1] |= _receipts(dones)
        return chunks

    def whole(self, pieces: Sequence[Sequence[Piece]], dones: Sequence[Done]) -> dict[str, Any]:
        """The body of an answer that is not streamed. Both by choice."""
        choices = [self._whole_choice(i, of_choice, dones[i]) for i, of_choice in enumerate(pieces)]
        body = self._chunk(choices, streamed=False)
        if self.kind == "chat":
            if self.with_token_ids:
                body["prompt_token_ids"] = self.prompts[0].token_ids
            if self.with_prompt_logprobs:
                body["prompt_logprobs"] = self._prompt_logprobs(0, dones)
        else:
            for i, choice in enumerate(choices):
                if self.with_token_ids:
                    choice["prompt_token_ids"] = self._prompt(i).token_ids
                if self.with_prompt_logprobs:
                    choice["prompt_logprobs"] = self._prompt_logprobs(i, dones)
                if self.echo and self.with_logprobs:
                    choice["logprobs"] = self._logprobs(i, pieces[i], echoed=self._of_prompt(i, dones))
        return {**body, "usage": self._usage(dones), **_receipts(dones)}

    def _whole_choice(self, index: int, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces) + done.text
        if self.kind == "completion":
            content: dict[str, Any] = {"text": self._prompt(index).text + text}
        else:
            content = {"message": {"role": "assistant", "content": text}}
        choice = {**self._choice(index, content), "finish_reason": done.finish_reason}
        if self.with_logprobs:
            choice["logprobs"] = self._logprobs(index, pieces)
        if self.with_token_ids:
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
        return choice

    def _prompt(self, index: int) -> Prompt:
        return self.prompts[index // self.n]

    def _logprobs(self, index: int, pieces: Sequence[Piece], echoed: Sequence[Scored] = ()) -> dict[str, Any]:
        scored = [item for piece in pieces for item in zip(piece.token_ids, piece.logprobs or (), strict=True)]
        if self.kind == "chat":
            return chat_logprobs(scored, self.texts)
        prompt = self._prompt(index)
        offsets = [len(prompt.text) + offset for piece in pieces for offset in piece.offsets]
        return completion_logprobs([*echoed, *scored], [*(prompt.offsets if echoed else ()), *offsets], self.texts)

    def _of_prompt(self, index: int, dones: Sequence[Done]) -> list[Scored]:
        """The prompt's tokens and their logprobs, which the prompt's first choice was asked for."""
        found = dones[index // self.n * self.n].prompt_logprobs
        assert found is not None
        return list(zip(self._prompt(index).token_ids, [None, *found], strict=True))

    def _prompt_logprobs(self, index: int, dones: Sequence[Done]) -> list[Any]:
        found = dones[index // self.n * self.n].prompt_logprobs
        assert found is not None
        return prompt_logprobs(self._prompt(index).token_ids, found, self.texts)

    def _usage(self, dones: Sequence[Done]) -> dict[str, int]:
        """As OpenAI reports it: a prompt counts once, whatever the number of its choices."""
        prompt = sum(done.prompt_tokens for done in dones[:: self.n])
        completion = sum(done.completion_tokens for done in dones)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text} if self.kind == "completion" else {"delta": {"content": text}}

    def _choice(self, index: int, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": None}

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


def _receipts(dones: Sequence[Done]) -> dict[str, Any]:
    """That of the first choice; of several, all of them beside it."""
    receipts = [done.receipt for done in dones]
    return {"kv_receipt": receipts[0], **({"kv_receipts": receipts} if len(receipts) > 1 else {})}
