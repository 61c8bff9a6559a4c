"""The configuration of `kvstream serve`, from YAML and command line. Reads files; starts nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from cluster.policy import load_policy, policy_from, why_not_in_pages, why_unservable
from cluster.policy_schema import (
    JSON_SCHEMA,
    KNOWN_LEVELS,
    TENANT_NAME,
    TENANT_NAME_RULE,
    UntitledSchema,
    policy_json_schema,
)
from cluster.yaml_file import ConfigError, YamlDocument, check, read_yaml
from decode.slo import SLOPolicy

# That of prefill/quantized_layout.py, which loads torch: mistakes in a file are told at once.
QUANTIZED_BLOCK_TOKENS = 32
BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "model"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class StartRefused(Exception):
    """The server cannot start as configured; the message says what to do. The command line exits with 2."""


def parse_bytes(value: Any) -> Any:
    """512, "256MB" or "1.5 GiB" as a number of bytes; anything else is passed on for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{value!r} is no size; write it like 512MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _check_address(value: Any) -> Any:
    if isinstance(value, str):
        host, colon, port = value.rpartition(":")
        if "://" in value:
            raise ValueError(f"{value!r}: leave out what stands before the host; write HOST:PORT")
        if not (host and colon and port.isdigit() and 0 <= int(port) <= 65535):
            raise ValueError(f"{value!r} is no address; write HOST:PORT (port 0: any free one)")
    return value


Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(gt=0),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*(([KkMmGg][Ii]?)?[Bb])?\s*$"},
            ]
        }
    ),
]
Address = Annotated[
    str, BeforeValidator(_check_address), WithJsonSchema({"type": "string", "pattern": "^.+:[0-9]{1,5}$"})
]

# A key, or a list of keys, or a mapping from each key to the tenant that it stands for (nothing: none).
_API_KEYS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}},
        {
            "type": "object",
            "propertyNames": {"minLength": 1},
            "additionalProperties": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": f"^{TENANT_NAME}$"}]},
        },
    ]
}


class WorkerLink(BaseModel):
    """Where one worker listens, and the address that others are told (a shaper, a NAT, another interface)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bind: Address | None = Field(default=None, description="HOST:PORT to listen on; port 0: any free one.")
    advertise: Address | None = Field(default=None, description="HOST:PORT that others connect to. Default: `bind`.")


class DecodeLink(WorkerLink):
    """A decode worker listens twice: `bind` and `advertise` are for tokens, the others for the chunks it keeps."""

    kv_bind: Address | None = Field(
        default=None, description="HOST:PORT to serve kept chunks on; port 0: any free one. Default: any free port."
    )
    kv_advertise: Address | None = Field(
        default=None,
        description="HOST:PORT that others load kept chunks from. Default: `kv_bind`; with `advertise` alone, others "
        "are not told of these chunks.",
    )


class Links(BaseModel):
    """Endpoints of single workers, in their order; others choose for themselves."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prefill: tuple[WorkerLink, ...] = Field(default=(), strict=False, description="Where prefill workers serve KV.")
    decode: tuple[DecodeLink, ...] = Field(
        default=(), strict=False, description="Where decode workers serve tokens, and the chunks that they keep."
    )


class ServeFile(BaseModel):
    """The keys of a serve file. Every one has a default that serves the bundled model locally."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field(
        default=str(BUNDLED_MODEL),
        description="Folder that transformers loads, relative to this file. Default: the bundled model.",
    )
    model_name: str | None = Field(default=None, description="What clients call it. Default: the folder's name.")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="What the model computes in.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where workers compute: cpu, cuda, or auto, which is a GPU wherever there is one for every worker.",
    )
    num_prefill: int = Field(default=1, ge=0, le=1024, description="Workers that turn prompts into KV.")
    num_decode: int = Field(default=1, ge=1, le=1024, description="Workers that turn KV into tokens.")
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Compute threads of a worker. Default: the cores of the node divided among its workers.",
    )
    chunk_tokens: int = Field(
        default=256,
        ge=16,
        le=4096,
        multiple_of=16,
        description="Tokens in a chunk of KV, the unit that is stored, sent and chosen a level for.",
    )
    kv_blocks: int | None = Field(
        default=None,
        ge=1,
        description="A worker's paged pool in blocks of 16 tokens, 32 where they are quantized. Default: eight full "
        "contexts. Not with kv_memory.",
    )
    kv_memory: Bytes | None = Field(
        default=None, description="A worker's paged pool in bytes, such as 1GiB. Not with kv_blocks."
    )
    kv_cache_dtype: Literal["auto", "int8", "int4", "fp8"] = Field(
        default="auto",
        description="What the pages of decode workers hold. auto: the model's dtype. int8, int4, fp8: fewer bits, so "
        "that two to three times the tokens fit; KV is then never exact (docs/quantized-pages.md).",
    )
    max_num_seqs: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Requests that a decode worker serves at once; with quantized pages each takes the memory of 64 "
        "tokens in the model's dtype. Default: 256, or 64 with quantized pages.",
    )
    prefill_decodes: bool = Field(
        default=True,
        description="Prefill workers also decode, when decode workers have more to do: with the pages that one full "
        "context leaves of theirs, at least half. Not those with `link.prefill.advertise`. false: they only compute "
        "prompts.",
    )
    prefix_caching: bool = Field(
        default=True,
        description="Decode workers keep what they served: its pages, which requests with the same prefix share, and "
        "chunks in a store of their own. false: they keep nothing, and every prompt is loaded or computed anew.",
    )
    page_ttl_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Pages that decode workers keep after a request are forgotten when nobody used them for so many "
        "seconds. Default: only when others need them.",
    )
    store_bytes: Bytes = Field(default=512 * 2**20, description="Encoded chunks that a worker keeps in RAM, in bytes.")
    store_path: str | None = Field(
        default=None,
        description="Directory, on every node, in which workers keep chunks on disk, each in a folder of its own name. "
        "They survive restarts. Default: chunks are kept in RAM only.",
    )
    store_disk_bytes: Bytes = Field(
        default=8 * 2**30, description="The most that a worker keeps on disk, in bytes. Only with store_path."
    )
    store_ttl_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Chunks that nobody used for so many seconds are dropped. Default: never.",
    )
    host: str = Field(
        default="127.0.0.1", description="Where the gateway listens; 0.0.0.0 to be reached from elsewhere."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Its port; 0: any free one.")
    api_keys: Annotated[dict[str, str], WithJsonSchema(_API_KEYS_SCHEMA)] = Field(
        default={},
        description="Asked for on every path but /health: a key, a list of keys, or a mapping from each key to the "
        "tenant whose part of the policy holds for it (nothing behind a key: no tenant). Default: no key is asked for.",
    )
    address: str = Field(
        default="local", description="local: a Ray of its own. auto or HOST:PORT: a Ray cluster that runs."
    )
    insecure: bool = Field(
        default=False, description="true: KV and tokens off loopback without encryption and authentication."
    )
    link: Links = Field(default=Links(), description="Endpoints of single workers. Default: any free port.")
    policy: Annotated[SLOPolicy, WithJsonSchema({"type": "string"})] = Field(
        default=SLOPolicy(),
        description="The SLO policy, or the name of its file, relative to this one; a file is looked at once a second "
        "and takes effect when it changes.",
    )


class ServeConfig(ServeFile):
    """All that `cluster.launch.serve` needs. `policy_file`: where the policy was read, if it has a file of its own."""

    policy_file: Path | None = None


def serve_json_schema() -> dict[str, Any]:
    """JSON Schema of a serve file, with that of the policy inside."""
    schema = ServeFile.model_json_schema(schema_generator=UntitledSchema)
    policy = policy_json_schema()
    schema["$defs"] |= policy.pop("$defs")
    schema["$defs"]["PolicyFile"] = {key: value for key, value in policy.items() if key != "$schema"}
    keys = schema["properties"]
    del keys["model"]["default"]  # a path on the machine that prints it
    keys["policy"] = {
        "description": keys["policy"]["description"],
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/PolicyFile"}],
    }
    return {"$schema": JSON_SCHEMA, **schema, "title": "kvstream serve file"}


def load_config(path: str | Path | None, **overrides: Any) -> ServeConfig:
    """The file (or the defaults), with what the command line says on top; None overrides nothing.

    `policy` may be a mapping in the file or the name of a policy file, relative to the file that names it.
    Raises ConfigError naming FILE:LINE for every mistake.
    """
    document = read_yaml(path) if path is not None else YamlDocument(name="command line", data={})
    return config_from(document, base=Path(path).parent if path is not None else Path.cwd(), **overrides)


def config_from(document: YamlDocument, *, base: Path, **overrides: Any) -> ServeConfig:
    """The same for a document already read."""
    data = dict(document.data)
    given = {key: value for key, value in overrides.items() if value is not None}
    policy_file = given.pop("policy", None)
    if policy_file is not None:
        data["policy"] = load_policy(policy_file)
    elif "policy" in data:
        if isinstance(data["policy"], str):
            policy_file = base / data["policy"]
        data["policy"] = _policy_of(document, data["policy"], base)
    data |= given
    if "api_keys" in data:
        data["api_keys"] = _tenants_by_key(document, data["api_keys"])
    if isinstance(data.get("model"), str) and "model" not in given and (base / data["model"]).is_dir():
        data["model"] = str((base / data["model"]).resolve())
    file = check(YamlDocument(name=document.name, data=data, lines=document.lines), ServeFile)
    problems = _contradictions(document, file)
    if problems:
        raise ConfigError(problems)
    return ServeConfig(**dict(file), policy_file=None if policy_file is None else Path(policy_file))


def _policy_of(document: YamlDocument, value: Any, base: Path) -> SLOPolicy:
    if isinstance(value, str):
        path = base / value
        if not path.is_file():
            raise ConfigError([f"{document.at(('policy',))}: policy file {path} does not exist"])
        return load_policy(path)
    if not isinstance(value, dict):
        raise ConfigError([f"{document.at(('policy',))}: `policy` is a mapping or the name of a policy file"])
    inner = {where[1:]: line for where, line in document.lines.items() if where[:1] == ("policy",)}
    return policy_from(YamlDocument(name=document.name, data=value, lines=inner), known_levels=KNOWN_LEVELS)


def _tenants_by_key(document: YamlDocument, value: Any) -> dict[str, str]:
    """Every form of `api_keys` as a mapping; "": no tenant. Keys are secrets: no message repeats one."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | dict):
        reason = "`api_keys` is a key, a list of keys, or a mapping from keys to tenants"
        raise ConfigError([f"{document.at(('api_keys',))}: {reason}"])
    tenants: dict[str, str] = {}
    problems: list[str] = []
    entries = value.items() if isinstance(value, dict) else ((key, None) for key in value)
    for i, (key, tenant) in enumerate(entries):
        at = document.at(("api_keys", key if isinstance(value, dict) else i))
        if not isinstance(key, str):
            problems.append(f"{at}: entry {i + 1} of `api_keys` is no text; put it in quotes")
        elif not key.strip():
            problems.append(f"{at}: an entry of `api_keys` is empty; leave it out to serve without a key")
        elif key.strip() in tenants:
            problems.append(f"{at}: entry {i + 1} of `api_keys` is listed twice; leave one out")
        elif tenant is not None and not (isinstance(tenant, str) and re.fullmatch(TENANT_NAME, tenant)):
            problems.append(
                f"{at}: entry {i + 1} of `api_keys` names no tenant: {TENANT_NAME_RULE}; nothing: no tenant"
            )
        else:
            tenants[key.strip()] = tenant or ""
    if problems:
        raise ConfigError(problems)
    return tenants


def _contradictions(document: YamlDocument, config: ServeFile) -> list[str]:
    problems: list[str] = []
    if config.kv_blocks is not None and config.kv_memory is not None:
        problems.append(f"{document.at(('kv_memory',))}: `kv_memory` and `kv_blocks` set the same thing; keep one")
    if config.page_ttl_s is not None and not config.prefix_caching:
        reason = "`page_ttl_s` is for pages that are kept, and `prefix_caching: false` keeps none; leave one out"
        problems.append(f"{document.at(('page_ttl_s',))}: {reason}")
    for role, count in (("prefill", config.num_prefill), ("decode", config.num_decode)):
        listed = len(getattr(config.link, role))
        if listed > count:
            at = document.at(("link", role))
            problems.append(f"{at}: `link.{role}` lists {listed} workers but `num_{role}` is {count}")
    for i, link in enumerate(config.link.decode):
        given = next((key for key in ("kv_bind", "kv_advertise") if getattr(link, key) is not None), None)
        if given is not None and not config.prefix_caching:
            at = document.at(("link", "decode", i, given))
            problems.append(f"{at}: `{given}` is for chunks that are kept, and `prefix_caching: false` keeps none")
    if config.kv_cache_dtype != "auto" and config.chunk_tokens % QUANTIZED_BLOCK_TOKENS:
        at, least = document.at(("chunk_tokens",)), -(-config.chunk_tokens // QUANTIZED_BLOCK_TOKENS)
        problems.append(
            f"{at}: `chunk_tokens: {config.chunk_tokens}` is no multiple of {QUANTIZED_BLOCK_TOKENS}, the tokens of a "
            f"block of {config.kv_cache_dtype} pages: write {least * QUANTIZED_BLOCK_TOKENS}"
        )
    reasons = why_unservable(config.policy, levels=config.policy.levels, num_prefill=config.num_prefill)
    problems += [f"{document.at(('num_prefill',))}: {reason}" for reason in reasons]
    reasons = why_not_in_pages(config.policy, config.kv_cache_dtype)
    return problems + [f"{document.at(('kv_cache_dtype',))}: {reason}" for reason in reasons]
