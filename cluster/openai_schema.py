"""What the OpenAI endpoints accept and answer, as data. Pure: no web framework, no tokenizer.

Fields that other servers know and this one does not support are refused by name; fields nobody knows are
ignored, as OpenAI's clients expect; inside `kv`, which is ours, unknown keys are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from cluster.kv_options import KVOptions
from cluster.openai_errors import APIError
from cluster.sampling_fields import MAX_STOPS, NumLogprobs, SamplingFields, TokenId

REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")

# Known elsewhere, not here: the values that ask for nothing, and so are accepted.
_INERT: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "use_beam_search": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "prompt_embeds": (),
    "continue_final_message": (False,),
}

_UNIONS = {
    "prompt": "must be a string or a list of token ids, or a list of these",
    "stop": f"must be a string or a list of at most {MAX_STOPS} strings, none of them empty",
    "content": "must be a string or a list of {type: text, text: ...} parts; no other parts are supported",
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


def _without_nul(text: str) -> str:
    if "\0" in text:  # it parts a tenant from the salt: nobody may write himself into another one's store
        raise ValueError("must not hold the character U+0000")
    return text


class GenerationBody(SamplingFields):
    """What both endpoints share. _inert: as _INERT, of one endpoint."""

    _inert: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256), AfterValidator(_without_nul)] | None = None
    request_id: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    kv: KVOptions | None = None

    def token_limit(self) -> int | None:
        """The most tokens wanted, where the request says so."""
        return self.max_tokens

    def check_prompt_logprobs(self) -> None:
        """Raises APIError for what cannot be had together with logprobs of the prompt."""
        if self.num_prompt_logprobs() is None:
            return
        if self.stream:
            raise APIError(
                400, "logprobs of the prompt (prompt_logprobs, or echo with logprobs) cannot be streamed",
                code="unsupported", param="stream",
            )  # fmt: skip
        if self.kv is not None and (self.kv.plan is not None or self.kv.mode not in ("auto", "text")):
            raise APIError(
                400, "logprobs of the prompt need it computed from its text: leave out kv.plan and kv.mode",
                code="invalid_value", param="kv",
            )  # fmt: skip


class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    _inert: ClassVar[dict[str, tuple[Any, ...]]] = {"top_logprobs": (0,)}

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    add_special_tokens: bool = True
    logprobs: Annotated[NumLogprobs | None, BeforeValidator(lambda value: None if value is False else value)] = None
    echo: bool | None = None

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        """An echo has logprobs where the answer has."""
        if self.prompt_logprobs is None and self.echo:
            return self.logprobs
        return self.prompt_logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each text or token ids, not empty. Raises APIError."""
        prompt: Any = self.prompt
        is_list = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        prompts: list[str | list[int]] = prompt if is_list else [prompt]
        if not all(prompts):
            raise APIError(400, "prompt is empty", code="invalid_value", param="prompt")
        return prompts


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat. Content is text, or a list of text parts."""

    model_config = ConfigDict(strict=True)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def text(self) -> str:
        """All text of the message."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    _inert: ClassVar[dict[str, tuple[Any, ...]]] = {"echo": (False,)}

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    add_generation_prompt: bool = True
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None

    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise APIError(
                400, "top_logprobs: needs `logprobs: true` beside it", code="invalid_value", param="top_logprobs"
            )
        return None


class TokenizeBody(BaseModel):
    """POST /tokenize: a prompt or the messages of a chat."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


B = TypeVar("B", bound=BaseModel)


def parse_body(raw: bytes, schema: type[B]) -> B:
    """A request body checked against its schema. Raises APIError 400 that names the field."""
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise APIError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise APIError(400, "the body must be a JSON object", code="invalid_json")
    if issubclass(schema, GenerationBody):
        refuse_unsupported(data, schema._inert)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        item = error.errors(include_url=False, include_input=False)[0]
        # unions put the names of their branches ("str", "list[int]") into the path
        steps = [str(step) for step in item["loc"] if re.fullmatch(r"(?!str$)[a-z0-9_]+", str(step))]
        message = (
            _UNIONS.get(steps[-1], item["msg"].removeprefix("Value error, "))
            if item["type"] != "missing"
            else "is missing"
        )
        field = ".".join(steps)
        raise APIError(400, f"{field}: {message}", code="invalid_value", param=field) from None


def refuse_unsupported(data: dict[str, Any], more: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises APIError for a field that would change the answer and that this server, or the endpoint, does not have."""
    for name, inert in {**_INERT, **more}.items():
        value = data.get(name)
        if value is None or any(value == ok and isinstance(value, bool) == isinstance(ok, bool) for ok in inert):
            continue
        allowed = f"; leave it out or send {inert[0]!r}" if inert else "; leave it out"
        raise APIError(400, f"`{name}` is not supported{allowed}", code="unsupported", param=name)


def check_kv_options(options: KVOptions, levels: Sequence[str]) -> None:
    """Raises APIError 400 naming the levels there are, or what contradicts what."""

    def known(value: str, allowed: Sequence[str], param: str, what: str = "level") -> None:
        if value not in allowed:
            message = f"unknown {what} {value!r}; one of {', '.join(allowed)}"
            raise APIError(400, message, code="unknown_level", param=param)

    known(options.mode, ("auto", "text", *levels), "kv.mode", "KV mode")
    if options.floor is not None:
        known(options.floor, levels, "kv.floor")
    plan = options.plan
    if plan is None:
        return
    for name, given in (("mode", options.mode != "auto"), ("floor", options.floor is not None)):
        if given:
            message = f"kv.plan says the level of every chunk, and kv.{name} says another; leave one out"
            raise APIError(400, message, code="invalid_value", param="kv.plan")
    for i, level in enumerate(plan.levels):
        known(level, ("text", *levels), f"kv.plan.levels.{i}")
    for i, refinement in enumerate(plan.refinements):
        known(refinement.level, levels, f"kv.plan.refinements.{i}.level")
        if refinement.chunk >= len(plan.levels):
            param = f"kv.plan.refinements.{i}.chunk"
            message = f"{param}: there is no chunk {refinement.chunk} among the plan's {len(plan.levels)} levels"
            raise APIError(400, message, code="invalid_value", param=param)


def milliseconds_header(headers: Mapping[str, str], name: str, *, may_be_zero: bool = True) -> float | None:
    """A header's number of milliseconds; None if it is not there. Raises APIError 400 naming it."""
    value = headers.get(name)
    if value is None:
        return None
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = math.nan
    if not 0 <= milliseconds <= 3_600_000 or (milliseconds == 0 and not may_be_zero):
        raise APIError(400, f"{name}: {value!r} is no number of milliseconds", code="invalid_value", param=name)
    return milliseconds


def tenants_salt(tenant: str, salt: str) -> str:
    """The salt under which a tenant's chunks are stored. Neither part has a NUL, so no two pairs make the same one."""
    return f"{tenant}\0{salt}" if tenant else salt


def resolve_max_tokens(wanted: int | None, *, prompt_tokens: int, max_context: int, default: int | None) -> int:
    """How many tokens may be generated. `default` None: all that the context leaves. Raises APIError 400."""
    room = max_context - prompt_tokens
    if wanted is None and room >= 1:
        return min(default, room) if default is not None else room
    if wanted is None or wanted > room:
        asked = f"{wanted} tokens to generate (max_tokens)" if wanted is not None else "at least one to generate"
        raise APIError(
            400,
            f"the model's context is {max_context} tokens, but the request needs "
            f"{prompt_tokens + (wanted or 1)}: "
            f"{prompt_tokens} in the prompt and {asked}. Shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
            param="max_tokens" if room >= 1 else "prompt",
        )
    return wanted
