"""`kv` in a request's body: how the prompt's KV is to be had. Data only; levels are checked in openai_schema.py."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from cluster.policy_schema import Milliseconds

# As many chunks as a transfer has, and so many refinements that a plan with all of them passes on the token stream.
MAX_PLAN_LEVELS = 4096
MAX_PLAN_REFINEMENTS = 65_536

LevelName = Annotated[str, Field(min_length=1, max_length=64)]


class PlanRefinement(BaseModel):
    """A chunk that is at `level` from the moment on that so many tokens have been generated."""

    model_config = ConfigDict(extra="forbid", strict=True)

    chunk: Annotated[int, Field(ge=0, lt=MAX_PLAN_LEVELS)]
    level: LevelName
    after_tokens: Annotated[int, Field(ge=1, lt=2**31)]


class KVPlan(BaseModel):
    """A receipt's `plan`, to be followed: the level of every loadable chunk ("text": computed), then refinements."""

    model_config = ConfigDict(extra="forbid", strict=True)

    chunk_tokens: Annotated[int, Field(ge=1, le=4096)]
    levels: Annotated[list[LevelName], Field(max_length=MAX_PLAN_LEVELS)]
    refinements: Annotated[list[PlanRefinement], Field(max_length=MAX_PLAN_REFINEMENTS)] = []


class KVOptions(BaseModel):
    """What a request asks otherwise than the policy. None leaves it to the policy. `plan` leaves nothing to choose."""

    model_config = ConfigDict(extra="forbid", strict=True)

    mode: str = "auto"
    floor: str | None = None
    ttft_ms: Milliseconds | None = None
    itl_ms: Annotated[Milliseconds, Field(gt=0)] | None = None
    plan: KVPlan | None = None
