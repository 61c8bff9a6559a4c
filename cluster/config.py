"""The configuration of `kvstream serve`, from YAML and command line. Reads files; starts nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cluster.policy import KNOWN_LEVELS, load_policy, policy_from
from cluster.yaml_file import ConfigError, YamlDocument, check, read_yaml
from decode.slo import SLOPolicy

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
        if not (host and colon and port.isdigit() and 0 <= int(port) <= 65535):
            raise ValueError(f"{value!r} is no address; write HOST:PORT (port 0: any free one)")
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Address = Annotated[str, BeforeValidator(_check_address)]


class WorkerLink(BaseModel):
    """Where one worker listens, and the address that others are told (a shaper, a NAT, another interface)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bind: Address | None = None
    advertise: Address | None = None


class Links(BaseModel):
    """Endpoints of single workers (prefill: KV, decode: tokens), in their order; others choose for themselves."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prefill: tuple[WorkerLink, ...] = Field(default=(), strict=False)
    decode: tuple[WorkerLink, ...] = Field(default=(), strict=False)


class ServeConfig(BaseModel):
    """All that `cluster.launch.serve` needs. Every field has a default that serves the bundled model locally.

    threads: compute threads per worker; None: the cores of the node divided among its workers.
    kv_blocks / kv_memory: size of a worker's paged pool, in blocks of 16 tokens or in bytes (not both).
    store_bytes: encoded chunks that a prefill worker keeps in RAM.
    address: "local" starts a Ray of its own; else the address of a running one ("auto": this machine's).
    insecure: allow KV links off loopback without CURVE.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = str(BUNDLED_MODEL)
    model_name: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    num_prefill: int = Field(default=1, ge=0, le=1024)
    num_decode: int = Field(default=1, ge=1, le=1024)
    threads: int | None = Field(default=None, ge=1, le=1024)
    chunk_tokens: int = Field(default=256, ge=16, le=4096, multiple_of=16)
    kv_blocks: int | None = Field(default=None, ge=1)
    kv_memory: Bytes | None = None
    store_bytes: Bytes = 512 * 2**20
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_keys: tuple[str, ...] = Field(default=(), strict=False)
    address: str = "local"
    insecure: bool = False
    link: Links = Links()
    policy: SLOPolicy = SLOPolicy()


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
    policy_path = given.pop("policy", None)
    if policy_path is not None:
        data["policy"] = load_policy(policy_path)
    elif "policy" in data:
        data["policy"] = _policy_of(document, data["policy"], base)
    if isinstance(data.get("api_keys"), str):
        data["api_keys"] = [data["api_keys"]]
    if isinstance(data.get("model"), str) and "model" not in given and (base / data["model"]).is_dir():
        data["model"] = str((base / data["model"]).resolve())
    config = check(YamlDocument(name=document.name, data={**data, **given}, lines=document.lines), ServeConfig)
    problems = list(_contradictions(document, config))
    if problems:
        raise ConfigError(problems)
    return config


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


def _contradictions(document: YamlDocument, config: ServeConfig) -> list[str]:
    problems: list[str] = []
    if config.kv_blocks is not None and config.kv_memory is not None:
        problems.append(f"{document.at(('kv_memory',))}: `kv_memory` and `kv_blocks` set the same thing; keep one")
    for role, count in (("prefill", config.num_prefill), ("decode", config.num_decode)):
        listed = len(getattr(config.link, role))
        if listed > count:
            at = document.at(("link", role))
            problems.append(f"{at}: `link.{role}` lists {listed} workers but `num_{role}` is {count}")
    if any(not key.strip() for key in config.api_keys):
        problems.append(
            f"{document.at(('api_keys',))}: an entry of `api_keys` is empty; leave it out to serve without a key"
        )
    if config.num_prefill == 0 and not config.policy.allow_recompute:
        at = document.at(("num_prefill",))
        problems.append(f"{at}: without prefill workers all is recomputed, but the policy says `recompute: never`")
    return problems
