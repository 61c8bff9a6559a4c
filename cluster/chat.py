"""Prompts and chats to token ids, through whatever tokenizer the model came with. No web framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from jinja2 import TemplateError

from cluster.openai_errors import APIError
from cluster.openai_schema import ChatBody, CompletionBody, GenerationBody, Message


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the gateway uses."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


def prompt_token_ids(tokenizer: Tokenizer, body: GenerationBody, *, vocab_size: int) -> list[list[int]]:
    """The prompts of a completion or the one of a chat. Raises APIError."""
    if isinstance(body, CompletionBody):
        return [_completion_token_ids(tokenizer, prompt, body, vocab_size) for prompt in body.prompts()]
    assert isinstance(body, ChatBody)
    text = render_chat(tokenizer, body.messages, add_generation_prompt=body.add_generation_prompt)
    return [_not_empty(tokenizer.encode(text, add_special_tokens=False))]


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """Each word as it is spelled at the beginning of a text and, where the tokens are others, after a space; as vLLM
    does it."""
    found: list[list[int]] = []
    for word in words:
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        found += [plain] if plain else []
        if spaced and plain and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return found


def _completion_token_ids(
    tokenizer: Tokenizer, prompt: str | list[int], body: CompletionBody, vocab_size: int
) -> list[int]:
    """Token ids are taken as they are."""
    if isinstance(prompt, str):
        return _not_empty(tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens))
    if max(prompt) >= vocab_size:
        raise APIError(
            400,
            f"token id {max(prompt)} is outside the vocabulary of {vocab_size}",
            code="invalid_value",
            param="prompt",
        )
    return prompt


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The text that the template makes of a chat. What the template itself refuses becomes an APIError."""
    if not getattr(tokenizer, "chat_template", None):
        raise APIError(
            400,
            "this model has no chat template; use /v1/completions",
            code="no_chat_template",
            param="messages",
        )
    conversation = [{"role": m.role, "content": m.text(), **({"name": m.name} if m.name else {})} for m in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        message = f"the model's chat template refuses these messages: {error}"
        raise APIError(400, message, code="chat_template_error", param="messages") from None
    assert isinstance(text, str)
    return text


def _not_empty(token_ids: list[int]) -> list[int]:
    if not token_ids:
        raise APIError(400, "the prompt has no tokens", code="invalid_value", param="prompt")
    return token_ids
