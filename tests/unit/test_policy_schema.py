"""The JSON Schemas of policy and serve file: valid, described, and of one mind with the loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.config import load_config, serve_json_schema
from cluster.policy import parse_policy
from cluster.policy_schema import TenantKeys, policy_json_schema
from cluster.yaml_file import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def plain(text: str) -> Any:
    """As an editor sees a file: YAML, parsed."""
    return yaml.safe_load(text)


def keys_of(schema: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property that a schema knows, however deep."""
    if isinstance(schema, dict):
        for name, described in schema.get("properties", {}).items():
            yield f"{where}.{name}", described
        for key, inner in schema.items():
            yield from keys_of(inner, f"{where}.{key}")
    elif isinstance(schema, list):
        for inner in schema:
            yield from keys_of(inner, where)


@pytest.mark.parametrize("make", [policy_json_schema, serve_json_schema])
def test_the_schemas_are_valid_and_describe_every_key(make: Callable[[], dict[str, Any]]) -> None:
    schema = make()
    Draft202012Validator.check_schema(schema)
    found = dict(keys_of(schema))
    assert len(found) > 15
    assert [name for name, described in found.items() if len(described.get("description", "")) < 10] == []
    assert {name.split(".")[-1] for name in found} >= set(TenantKeys.model_fields)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("policy-*.yaml")), ids=lambda p: p.name)
def test_the_policy_schema_accepts_the_examples(path: Path) -> None:
    Draft202012Validator(policy_json_schema()).validate(plain(path.read_text()))
    serve = {"policy": plain(path.read_text())}
    Draft202012Validator(serve_json_schema()).validate(serve)


def test_the_serve_schema_accepts_the_example_and_every_form_of_keys() -> None:
    validator = Draft202012Validator(serve_json_schema())
    validator.validate(plain((EXAMPLES / "serve.yaml").read_text()))
    for text in (
        "api_keys: sk",
        "api_keys: [a, b]",
        "api_keys: {a: gold, b: }",
        "policy: p.yaml\nkv_memory: 1.5 GiB",
        "link: {prefill: [{bind: '1.2.3.4:0'}]}",
    ):
        validator.validate(plain(text))


@pytest.mark.parametrize(
    "text",
    [
        "ttft: 5",
        "ttft_ms: -5",
        "ttft_ms: '500'",
        "ttft_ms: .inf",
        "ttft_ms:",
        "itl_ms: 0",
        "levels: []",
        "levels: [q1, q1]",
        "levels: [q4]",
        "levels: q1",
        "floor: text",
        "floor:",
        "ceiling: best",
        "refine: on",
        "refine: 3",
        "refine: text",
        "recompute: maybe",
        "recompute: 0.5",
        "recompute: {max_share: 2}",
        "recompute: {allow: true}",
        "recompute: {}",
        "infeasible: give_up",
        "link_prior_mbps: 0",
        "link_prior_mbps: fast",
        "tenants: []",
        "tenants: {a: }",
        "tenants: {a b: {}}",
        "tenants: {a: {levels: [q1]}}",
        "tenants: {a: {tenants: {}}}",
        "tenants: {a: {link_prior_mbps: 5}}",
        "tenants: {a: {floor: q9}}",
    ],
)
def test_loader_and_schema_refuse_the_same(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_policy(text, name="p.yaml")
    assert all(problem.startswith("p.yaml:1:") for problem in raised.value.problems)
    assert not Draft202012Validator(policy_json_schema()).is_valid(plain(text))
    assert not Draft202012Validator(serve_json_schema()).is_valid({"policy": plain(text)})


@pytest.mark.parametrize(
    "text",
    [
        "prot: 1",
        "port: 70000",
        "num_decode: 0",
        "dtype: int4",
        "device: gpu",
        "kv_memory: 5K",
        "api_keys: 7",
        "api_keys: ['']",
        "api_keys: [7]",
        "api_keys: {a: 7}",
        "api_keys: {a: b c}",
        "api_keys: {a: {tenant: b}}",
        "link: {prefill: [{bind: nowhere}]}",
        "chunk_tokens: 100",
    ],
)
def test_loader_and_schema_refuse_the_same_serve_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)
    assert not Draft202012Validator(serve_json_schema()).is_valid(plain(text))
