"""What a gateway asks of a decode worker and what comes back. Plain data: no I/O, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled"]

# How the KV of a prompt is to be had. "auto" leaves it to the SLO controller; "text" computes the prompt on the
# decode worker; any other value is a codec level ("raw", "lossless", "q1", ...) that every chunk must use.
KVMode = str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. Temperature 0 is greedy; a seed makes a request repeatable."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt on its way to tokens. Stop *strings* are the gateway's business: workers see token ids only.

    `ttft_s`, `itl_s` and `floor` override the policy for this request; None leaves the policy's value. `tenant` names
    whose part of the policy holds. `cache_salt` keeps stored contexts apart.
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

    def to_wire(self) -> dict[str, Any]:
        """A dictionary that msgpack can carry."""
        return asdict(self)

    @classmethod
    def from_wire(cls, body: dict[str, Any]) -> GenerationRequest:
        """The inverse of `to_wire`; sequences come back as tuples."""
        sampling = {**body["sampling"], "stop_token_ids": tuple(body["sampling"]["stop_token_ids"])}
        return cls(**{**body, "token_ids": tuple(body["token_ids"]), "sampling": SamplingParams(**sampling)})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensEvent:
    """Newly sampled tokens, in order."""

    token_ids: tuple[int, ...]


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


GenerationEvent = TokensEvent | FinishedEvent | FailedEvent


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
