"""Policy and serve files: what they mean, and that every mistake is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ServeConfig, load_config, parse_bytes
from cluster.policy import KNOWN_LEVELS, load_policy, parse_policy
from cluster.yaml_file import ConfigError
from decode.slo import SLOPolicy

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        parse_policy(text, name="p.yaml")
    return raised.value.problems


def test_a_full_policy_in_seconds() -> None:
    text = "ttft_ms: 800\nitl_ms: 50.5\nlevels: [lossless, q1, q3]\nfloor: q1\nrecompute: never\n"
    assert parse_policy(text) == SLOPolicy(
        ttft_s=0.8, itl_s=0.0505, levels=("lossless", "q1", "q3"), floor="q1", allow_recompute=False
    )


def test_an_empty_policy_is_the_default() -> None:
    assert parse_policy("# nothing\n") == SLOPolicy(levels=KNOWN_LEVELS)


def test_levels_without_a_floor_allow_all_of_them() -> None:
    assert parse_policy("levels: [raw, q3]").floor == "q3"


def test_zero_means_as_fast_as_possible() -> None:
    assert parse_policy("ttft_ms: 0").ttft_s == 0


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("ttft_ms: 1\nttft: 2\n", 2, "unknown key `ttft`; did you mean `ttft_ms`?"),
        ("xyzzy: 2\n", 1, "known keys: ttft_ms, itl_ms"),
        ("itl_ms: 100\n\nttft_ms: -5\n", 3, "`ttft_ms`"),
        ("itl_ms: 0\n", 1, "`itl_ms`"),
        ("ttft_ms: .nan\n", 1, "`ttft_ms`"),
        ("ttft_ms: '500'\n", 1, "valid number"),
        ("ttft_ms: 1\nttft_ms: 2\n", 2, "already given on line 1"),
        ("levels:\n  - raw\n  - q1\nfloor: q2\n", 4, "not one of `levels` (raw, q1)"),
        ("levels:\n  - raw\n  - raw\n", 3, "listed twice"),
        ("levels:\n  - q2\n  - q1\n", 3, "belongs before `q2`"),
        ("levels:\n  - raw\n  - losless\n", 3, "did you mean `lossless`?"),
        ("levels:\n  - text\n", 2, "`recompute: allow`"),
        ("levels: []\n", 1, "`levels`"),
        ("recompute: maybe\n", 1, "'allow' or 'never'"),
        ("ttft_ms: 1\nlevels: [raw\n", 3, "not valid YAML"),
        ("- ttft_ms\n", 1, "key: value"),
        ("a: &a [x]\nb: !!python/object:os.system 1\n", 2, "not valid YAML"),
    ],
)
def test_mistakes_are_named_by_line(text: str, line: int, says: str) -> None:
    found = problems_of(text)
    assert any(p.startswith(f"p.yaml:{line}:") and says in p for p in found), found


def test_all_mistakes_are_named_at_once() -> None:
    assert len(problems_of("ttft: 1\nitl_ms: -1\nrecompute: no way\n")) == 3


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_policy(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="folder"):
        load_policy(tmp_path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("policy-*.yaml")), ids=lambda p: p.name)
def test_the_example_policies_are_valid(path: Path) -> None:
    assert load_policy(path).floor in KNOWN_LEVELS


def test_the_example_serve_file_is_the_default_written_out() -> None:
    assert load_config(EXAMPLES / "serve.yaml") == ServeConfig()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "port: 9000\nnum_decode: 3\napi_keys: secret\nkv_memory: 1.5GiB\n")
    config = load_config(path, port=9001, host=None)
    assert (config.port, config.num_decode, config.host) == (9001, 3, "127.0.0.1")
    assert config.api_keys == ("secret",)
    assert config.kv_memory == 3 * 2**29


def test_a_policy_inline_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "fast.yaml").write_text("ttft_ms: 0\n")
    (tmp_path / "slow.yaml").write_text("ttft_ms: 9000\n")
    assert load_config(write(tmp_path, "policy:\n  ttft_ms: 70\n")).policy.ttft_s == 0.07
    path = write(tmp_path, "policy: fast.yaml\n")
    assert load_config(path).policy.ttft_s == 0
    assert load_config(path, policy=tmp_path / "slow.yaml").policy.ttft_s == 9


def test_links_of_single_workers(tmp_path: Path) -> None:
    path = write(tmp_path, "link:\n  prefill:\n    - bind: 127.0.0.1:7100\n      advertise: 127.0.0.1:7000\n")
    (link,) = load_config(path).link.prefill
    assert (link.bind, link.advertise) == ("127.0.0.1:7100", "127.0.0.1:7000")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("prot: 1\n", 1, "did you mean `port`?"),
        ("host: x\nport: 70000\n", 2, "`port`"),
        ("num_decode: 0\n", 1, "`num_decode`"),
        ("kv_blocks: 5\nkv_memory: 1GB\n", 2, "set the same thing"),
        ("store_bytes: lots\n", 1, "like 512MB"),
        ("dtype: int4\n", 1, "'bfloat16' or 'float32'"),
        ("link:\n  prefill:\n    - bind: nowhere\n", 3, "HOST:PORT"),
        ("link:\n  prefill:\n    - bid: 1.2.3.4:5\n", 3, "did you mean `bind`?"),
        ("link:\n  decode: [{}, {}]\n", 2, "`num_decode` is 1"),
        ("policy:\n  itl_ms: 5\n  tft_ms: 5\n", 3, "did you mean `ttft_ms`?"),
        ("port: 1\npolicy: none.yaml\n", 2, "does not exist"),
        ("policy: 7\n", 1, "`policy`"),
        ("api_keys: ['']\n", 1, "empty"),
        ("num_prefill: 0\npolicy: {recompute: never}\n", 1, "without prefill workers"),
        ("chunk_tokens: 100\n", 1, "multiple of 16"),
    ],
)
def test_mistakes_in_a_serve_file_are_named_by_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert any(p.startswith(f"{path}:{line}:") and says in p for p in raised.value.problems), raised.value.problems


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("512", 512), ("2KB", 2000), ("1.5 GiB", 3 * 2**29), ("3mb", 3_000_000)]
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes
