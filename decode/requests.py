"""What a gateway asks of a decode worker and what comes back. Plain data: no I/O, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled"]

# How the KV of a prompt is to be had. "auto" leaves it to the SLO controller; "text" computes the prompt on the
# decode worker; any other value is a codec level ("raw", "lossless", "q1", ...) that every chunk must use.
KVMode = str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn, with vLLM's names and meanings. Temperature 0 is greedy; a seed makes a request
    repeatable. decode/sampling_reference.py says in which order these apply.

    presence_penalty, frequency_penalty: of generated tokens; repetition_penalty: of the prompt's too. logit_bias:
    (token id, added to its logit). bad_words: token sequences that are not completed. min_tokens: until then no token
    that would end the answer. logprobs, prompt_logprobs: so many of the likeliest tokens beside each token's own
    (0: its own only; None: none).
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every prompt token has to be computed here: loaded or shared KV has no logits."""
        return self.prompt_logprobs is not None

    @classmethod
    def from_wire(cls, body: dict[str, Any]) -> SamplingParams:
        """From the dictionary that `asdict` made and msgpack carried; sequences come back as tuples."""
        allowed = body["allowed_token_ids"]
        return cls(
            **{
                **body,
                "logit_bias": tuple((token, bias) for token, bias in body["logit_bias"]),
                "allowed_token_ids": None if allowed is None else tuple(allowed),
                "bad_words": tuple(map(tuple, body["bad_words"])),
                "stop_token_ids": tuple(body["stop_token_ids"]),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt on its way to tokens. Stop *strings* are the gateway's business: workers see token ids only.

    `ttft_s`, `itl_s` and `floor` override the policy for this request; None leaves the policy's value. `tenant` names
    whose part of the policy holds. `cache_salt` keeps stored contexts apart. `priority`: lower is sooner. `group`: of
    requests with one prompt (the choices of `n`); they belong on one decode worker, where they can share its pages.
    `plan`: a receipt's plan to be followed: {"chunk_tokens", "levels", "refinements"}, see docs/slo-controller.md.
    """

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    kv_mode: KVMode = "auto"
    ttft_s: float | None = None
    floor: str | None = None
    cache_salt: str = ""
    tenant: str = ""
    itl_s: float | None = None
    plan: dict[str, Any] | None = None
    priority: int = 0
    group: str = ""

    def to_wire(self) -> dict[str, Any]:
        """A dictionary that msgpack can carry. Not `asdict`, which copies every token by itself: 25 ms for 30,000."""
        return {**_shallow(self), "sampling": _shallow(self.sampling)}

    @classmethod
    def from_wire(cls, body: dict[str, Any]) -> GenerationRequest:
        """The inverse of `to_wire`; sequences come back as tuples."""
        sampling = SamplingParams.from_wire(body["sampling"])
        return cls(**{**body, "token_ids": tuple(body["token_ids"]), "sampling": sampling})


def _shallow(item: SamplingParams | GenerationRequest) -> dict[str, Any]:
    return {each.name: getattr(item, each.name) for each in fields(item)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Of one token, in nats, under the model's own distribution (before penalties, bias, temperature, truncation).
    rank: 1 for the likeliest. top: (token id, logprob) of the likeliest, best first; of equals the least id first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]

    def to_wire(self) -> list[Any]:
        return [self.logprob, self.rank, self.top]

    @classmethod
    def from_wire(cls, body: list[Any]) -> TokenLogprobs:
        logprob, rank, top = body
        return cls(logprob=logprob, rank=rank, top=tuple((token, value) for token, value in top))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensEvent:
    """Newly sampled tokens, in order. logprobs: one for each, if the request asked for them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobsEvent:
    """Logprobs of the prompt tokens from `start` on (never 0: the first token has none). They come in order and before
    the first token; a request that begins anew on another worker begins them anew."""

    start: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvent:
    """The last event of a request that ended well. `receipt` is the KV receipt as a plain dictionary."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    receipt: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedEvent:
    """The last event of a request that ended badly after it had been admitted."""

    status: int
    code: str
    message: str


GenerationEvent = TokensEvent | PromptLogprobsEvent | FinishedEvent | FailedEvent


class RequestRefused(Exception):
    """A request that cannot be served, with the HTTP status and an error that says what to do."""

    def __init__(
        self, message: str, *, status: int = 400, code: str = "invalid_request", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
