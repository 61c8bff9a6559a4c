"""The fields of a body that say how its tokens are chosen, with OpenAI's and vLLM's names and limits. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cluster.openai_errors import APIError
from decode.requests import SamplingParams

MAX_TOKEN_ID = 2**31 - 1
MAX_STOPS = 16
MAX_CHOICES = 128  # prompts times n
MAX_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
BadWord = Annotated[str, Field(min_length=1, max_length=256)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


def _token_keys(bias: dict[str, Any]) -> dict[str, Any]:
    for key in bias:
        if not re.fullmatch(r"\d{1,10}", key):
            raise ValueError(f"{key!r} is no token id")
    return bias


class SamplingFields(BaseModel):
    """None is the default everywhere, as if the field were not there."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # Far smaller ones make logits infinite, which no token can be drawn from.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024), AfterValidator(_token_keys)
        ]
        | None
    ) = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=65_536)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=256)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    prompt_logprobs: NumLogprobs | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None

    def num_choices(self) -> int:
        """Answers to each prompt. Raises APIError."""
        n = self.n or 1
        if self.best_of is not None and self.best_of != n:
            raise _invalid("best_of", f"must equal n, which is {n}: all choices are returned")
        return n

    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each generated one; None: no logprobs at all."""
        return None

    def num_prompt_logprobs(self) -> int | None:
        """The same for tokens of the prompt."""
        return self.prompt_logprobs

    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(
        self,
        max_tokens: int,
        *,
        vocab_size: int,
        eos_token_ids: Collection[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
    ) -> SamplingParams:
        """The part that workers see. bad_words: in tokens. Raises APIError."""
        bias = {int(token): float(value) for token, value in (self.logit_bias or {}).items()}
        for name, tokens in (("logit_bias", bias), ("allowed_token_ids", self.allowed_token_ids or ())):
            unknown = [token for token in tokens if token >= vocab_size]
            if unknown:
                raise _invalid(name, f"token id {unknown[0]} is outside the vocabulary of {vocab_size}")
        if (self.min_tokens or 0) > max_tokens:
            raise _invalid("min_tokens", f"{self.min_tokens} is more than max_tokens, which is {max_tokens}")
        # Others can never come.
        stop_token_ids = tuple(token for token in self.stop_token_ids or () if token < vocab_size)
        if (
            self.min_tokens
            and self.allowed_token_ids
            and {*stop_token_ids, *eos_token_ids} >= {*self.allowed_token_ids}
        ):
            raise _invalid(
                "allowed_token_ids", "has only tokens that end the answer, which min_tokens forbids at first"
            )
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(self.top_k or 0, 0),
            min_p=_or(self.min_p, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=tuple(bias.items()),
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_words=tuple(tuple(word) for word in bad_words),
            seed=self.seed,
            stop_token_ids=stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens or 0,
            logprobs=self.num_logprobs(),
            prompt_logprobs=self.num_prompt_logprobs(),
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _invalid(param: str, message: str) -> APIError:
    return APIError(400, f"{param}: {message}", code="invalid_value", param=param)
