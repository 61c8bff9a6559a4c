"""The keys of a policy file: what each takes and what it means. Data only: files are read and mapped in policy.py."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from decode.slo import Infeasible, SLOPolicy

# Every level a codec profile has, best first; a policy may leave some out but not reorder them.
KNOWN_LEVELS: tuple[str, ...] = SLOPolicy().levels
TENANT_NAME = r"[A-Za-z0-9][A-Za-z0-9._\-]{0,63}"
TENANT_NAME_RULE = "a tenant's name is 1 to 64 letters, digits, dots, dashes and underscores"
JSON_SCHEMA = "https://json-schema.org/draft/2020-12/schema"


def check_tenant_name(name: str) -> str:
    """The name, or a ValueError. No name holds a NUL, which ends it where it is put before a request's salt."""
    if not re.fullmatch(TENANT_NAME, name):
        raise ValueError(TENANT_NAME_RULE)
    return name


def _off(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as false; `on` means nothing here."""
    if isinstance(value, bool):
        if value:
            raise ValueError("name a level, or `off`")
        return "off"
    return value


Milliseconds = Annotated[float, Field(ge=0, le=3_600_000, allow_inf_nan=False)]
Level = Annotated[str, WithJsonSchema({"type": "string", "enum": list(KNOWN_LEVELS)})]
LevelOrOff = Annotated[str, BeforeValidator(_off), WithJsonSchema({"enum": [*KNOWN_LEVELS, "off", False]})]
TenantName = Annotated[str, AfterValidator(check_tenant_name)]


class RecomputeShare(BaseModel):
    """Computing from text, within a bound."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        description="The largest share of a prompt's chunks that may be computed while a source can be had, 0 to 1."
    )


Recompute = Annotated[
    Annotated[Literal["allow", "never"], Tag("word")] | Annotated[RecomputeShare, Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, dict | RecomputeShare) else "word"),
]


class Share(BaseModel):
    """What is left out is the policy's, or no limit."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    weight: Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None = Field(
        default=None, description="Service in proportion to it while several tenants wait. Default: 1."
    )
    max_requests: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Served at once.")
    max_waiting: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Waiting at once; more are refused with 429."
    )
    max_kv_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Of the KV pages, above 0 up to 1."
    )
    max_store_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Of each worker's chunk store, in RAM and on disk, above 0 up to 1. At its share, a tenant's own "
        "chunks go for its new ones.",
    )


class TenantKeys(BaseModel):
    """What one tenant has otherwise than the others. Whatever is left out is the policy's."""

    # None: left out. A key with nothing behind it is a mistake, not a way to leave it out.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    ttft_ms: Milliseconds | None = Field(
        default=None,
        description="Target for the first token, milliseconds from admission; 0: as fast as possible. Default: 500.",
    )
    itl_ms: Annotated[Milliseconds, Field(gt=0)] | None = Field(
        default=None,
        description="Target for the gap between tokens, milliseconds; bounds how much prompt is computed between two "
        "decode steps. Default: 100.",
    )
    floor: Level | None = Field(
        default=None,
        description="The coarsest level allowed, one of `levels`. Default: q2; if `levels` is given, its last.",
    )
    ceiling: Level | None = Field(
        default=None,
        description="The best level sent before the first token, one of `levels`. Default: the first of `levels`.",
    )
    refine: LevelOrOff | None = Field(
        default=None,
        description="What coarser chunks are refined to after the first token, while the link has room: one of "
        "`levels`, or off. Default: the best lossy one of `levels`; off if the floor is better than that.",
    )
    recompute: Recompute | None = Field(
        default=None,
        description="allow: chunks may be computed from their text where that helps to meet the target. never: only "
        "while no source is there. {max_share: 0.5}: at most this share of a prompt's chunks. Default: allow.",
    )
    share: Share | None = Field(
        default=None,
        description="What a tenant may have of each worker, where several want it. Default: all weigh the same, "
        "and nothing is limited.",
    )
    infeasible: Infeasible | None = Field(
        default=None,
        description="When not even the floor can be in time. best_effort: serve as fast as possible. reject: refuse "
        "the request. text: compute all of the prompt. Default: best_effort.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _has_a_value(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("nothing stands behind this key; give it a value, or leave it out")
        return value


class PolicyFile(TenantKeys):
    """Targets for latency and bounds for quality, for all requests and for those of single tenants."""

    levels: Annotated[list[Level], Field(min_length=1, max_length=64)] | None = Field(
        default=None,
        description=f"What a chunk of KV may be sent as, best first. Default: [{', '.join(KNOWN_LEVELS)}].",
        json_schema_extra={"uniqueItems": True},
    )
    link_prior_mbps: Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None = Field(
        default=None,
        description="What a link never seen is taken for, Mbit/s. Default: 400.",
    )
    tenants: Annotated[dict[TenantName, TenantKeys], Field(max_length=1024)] | None = Field(
        default=None,
        description="By a tenant's name, what holds for its requests instead. Which API key is whose stands in the "
        "serve file.",
        json_schema_extra={"propertyNames": {"pattern": f"^{TENANT_NAME}$"}},
    )


class UntitledSchema(GenerateJsonSchema):
    """Without titles, which would only repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class _NullFreeSchema(UntitledSchema):
    """Without null, which is how these models say that a key is left out; in a file it cannot stand."""

    def nullable_schema(self, schema: Any) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        described = super().default_schema(schema)
        return {key: value for key, value in described.items() if (key, value) != ("default", None)}


def policy_json_schema() -> dict[str, Any]:
    """JSON Schema of a policy file. What relates two keys is not in it (that the floor is one of the levels)."""
    schema = PolicyFile.model_json_schema(schema_generator=_NullFreeSchema)
    for described in schema["$defs"]["TenantKeys"]["properties"].values():
        described["description"] = described["description"].split(" Default: ")[0] + " Default: the policy's."
    return {"$schema": JSON_SCHEMA, **schema, "title": "kvstream policy"}
