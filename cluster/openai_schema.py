"""What the OpenAI endpoints accept and answer, as data. Pure: no web framework, no tokenizer.

Fields that other servers know and this one does not support are refused by name; fields nobody knows are
ignored, as OpenAI's clients expect; inside `kv`, which is ours, unknown keys are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from cluster.kv_options import KVOptions
from decode.requests import SamplingParams

REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")
MAX_TOKEN_ID = 2**31 - 1
MAX_STOPS = 16

# Known elsewhere, not here: the values that ask for nothing, and so are accepted.
_INERT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "priority": (0,),
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
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "continue_final_message": (False,),
}

_UNIONS = {
    "prompt": "must be a string or a list of token ids",
    "stop": f"must be a string or a list of at most {MAX_STOPS} strings, none of them empty",
    "content": "must be a string or a list of {type: text, text: ...} parts; no other parts are supported",
}

_ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class APIError(Exception):
    """An error that a client sees: HTTP status and the body OpenAI's clients know."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """{"error": {...}}"""
        default = "internal_error" if self.status >= 500 else "invalid_request_error"
        kind = _ERROR_TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


def _without_nul(text: str) -> str:
    if "\0" in text:  # it parts a tenant from the salt: nobody may write himself into another one's store
        raise ValueError("must not hold the character U+0000")
    return text


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]


class GenerationBody(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256), AfterValidator(_without_nul)] | None = None
    request_id: str | None = None
    kv: KVOptions | None = None

    def token_limit(self) -> int | None:
        """The most tokens wanted, where the request says so."""
        return self.max_tokens

    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The part that workers see."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    add_special_tokens: bool = True

    def single_prompt(self) -> str | list[int]:
        """The one prompt, text or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise APIError(
                    400, "one prompt per request is supported; send several requests instead",
                    code="unsupported", param="prompt",
                )  # fmt: skip
            prompt = prompt[0]
        if not prompt:
            raise APIError(400, "prompt is empty", code="invalid_value", param="prompt")
        return prompt  # type: ignore[no-any-return]


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

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    add_generation_prompt: bool = True

    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


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
        refuse_unsupported(data)
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


def refuse_unsupported(data: dict[str, Any]) -> None:
    """Raises APIError for a field that would change the answer and that this server does not have."""
    for name, inert in _INERT.items():
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
