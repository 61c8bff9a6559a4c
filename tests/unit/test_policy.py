"""Policy and serve files: what they mean, and that every mistake is named with its line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import QUANTIZED_BLOCK_TOKENS, ServeConfig, load_config, parse_bytes
from cluster.policy import KNOWN_LEVELS, load_policy, parse_policy, why_unservable
from cluster.yaml_file import ConfigError
from decode.fair_share import TenantShare
from decode.slo import SLOPolicy
from prefill.quantized_layout import BLOCK_TOKENS

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


def test_shares_are_inherited_key_by_key() -> None:
    text = (
        "share: {max_requests: 8, max_kv_share: 0.5, max_store_share: 0.3}\n"
        "tenants:\n  gold: {share: {weight: 3, max_store_share: 1}}\n  free: {ttft_ms: 900}\n"
    )
    policy = parse_policy(text)
    assert policy.share == TenantShare(max_requests=8, max_blocks_share=0.5, max_store_share=0.3)
    assert policy.shares() == {
        "gold": TenantShare(weight=3.0, max_requests=8, max_blocks_share=0.5, max_store_share=1.0),
        "free": TenantShare(max_requests=8, max_blocks_share=0.5, max_store_share=0.3),
    }
    stored = policy.store_shares()
    assert [stored.of(name) for name in ("gold", "free", "another", "")] == [1.0, 0.3, 0.3, 0.3]
    assert SLOPolicy().store_shares().of("anybody") == 1.0


@pytest.mark.parametrize(
    "share",
    [
        "{weight: 0}",
        "{weight: .inf}",
        "{max_requests: 0}",
        "{max_kv_share: 1.5}",
        "{max_kv_share: 0}",
        "{max_store_share: 0}",
        "{max_store_share: 2}",
        "{size: 1}",
    ],
)
def test_a_share_that_makes_no_sense_is_named_with_its_line(share: str) -> None:
    (problem,) = problems_of(f"tenants:\n  gold:\n    share: {share}\n")
    assert problem.startswith("p.yaml:3:"), problem


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
        ("itl_ms: 5\nfloor:\n", 2, "nothing stands behind this key"),
        ("itl_ms: 5\nceiling: q7\n", 2, "`ceiling: q7` is not one of `levels`"),
        ("ceiling: q3\nitl_ms: 5\n", 1, "coarser than the floor `q2`"),
        ("itl_ms: 5\nfloor: raw\nceiling: q1\n", 3, "coarser than the floor `raw`"),
        ("itl_ms: 5\nrefine: q3\n", 2, "coarser than the floor `q2`"),
        ("levels: [raw, q3]\nrefine: q1\n", 2, "`refine: q1` is not one of `levels` (raw, q3)"),
        ("itl_ms: 5\nrefine: yes\n", 2, "name a level, or `off`"),
        ("recompute:\n  max_share: 1.5\n", 2, "`recompute.max_share`"),
        ("recompute:\n  max_shar: 1\n", 2, "did you mean `max_share`?"),
        ("recompute: 0.5\n", 1, "'allow' or 'never'"),
        ("recompute: never\ninfeasible: text\n", 2, "`recompute: never` forbids"),
        ("ttft_ms: 0\ninfeasible: reject\n", 2, "`ttft_ms: 0` sets none"),
        ("infeasible: none\n", 1, "'best_effort', 'reject' or 'text'"),
        ("itl_ms: 5\nlink_prior_mbps: 0\n", 2, "`link_prior_mbps`"),
        ("tenants:\n  a:\n    floor: q4\n", 3, "`floor: q4` is not one of `levels`"),
        ("levels: [raw, q1]\ntenants:\n  a:\n    floor: q2\n", 4, "(raw, q1); name one of them"),
        ("tenants:\n  a:\n    ceiling: q3\n", 3, "coarser than the floor `q2`"),
        ("ceiling: q2\ntenants:\n  a:\n    floor: q1\n", 4, "coarser than the floor `q1`"),
        ("tenants:\n  a:\n    floor: q1\n    refine: q2\n", 4, "coarser than the floor `q1`"),
        ("infeasible: text\ntenants:\n  a:\n    recompute: never\n", 4, "`recompute: never` forbids"),
        ("infeasible: reject\ntenants:\n  a: {itl_ms: 9}\n  b:\n    ttft_ms: 0\n", 5, "`ttft_ms: 0` sets none"),
        ("tenants:\n  a:\n    levels: [q1]\n", 3, "unknown key `levels`"),
        ("tenants:\n  a:\n    flor: q1\n", 3, "did you mean `floor`?"),
        ("tenants:\n  a: {}\n  a b: {}\n", 3, "letters, digits"),
        ("tenants:\n  a: fast\n", 2, "expected `key: value` lines"),
        ("tenants:\n  a: {}\n  a: {}\n", 3, "already given on line 2"),
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


def test_every_key_lands_in_its_field() -> None:
    text = (
        "levels: [lossless, q1, q2, q3]\nfloor: q3\nceiling: q1\nrefine: lossless\n"
        "recompute: {max_share: 0.25}\ninfeasible: reject\nlink_prior_mbps: 50\n"
    )
    assert parse_policy(text) == SLOPolicy(
        levels=("lossless", "q1", "q2", "q3"),
        floor="q3",
        ceiling="q1",
        refine_to="lossless",
        max_recompute_share=0.25,
        infeasible="reject",
        link_prior_bps=50e6,
    )


@pytest.mark.parametrize(
    ("text", "refine_to"),
    [
        ("", "q1"),
        ("levels: [raw, q2, q3]", "q2"),
        ("levels: [raw, lossless]", None),
        ("floor: lossless", None),
        ("refine: off", None),
        ("refine: 'off'", None),
        ("refine: raw", "raw"),
        ("floor: q1", "q1"),
        ("levels: [lossless, q2, q3]\nfloor: lossless", None),
    ],
)
def test_what_chunks_are_refined_to(text: str, refine_to: str | None) -> None:
    assert parse_policy(text).refine_to == refine_to


def test_recompute_within_a_share_is_allowed_even_if_the_share_is_nothing() -> None:
    policy = parse_policy("recompute: {max_share: 0}")
    assert (policy.allow_recompute, policy.max_recompute_share) == (True, 0.0)
    assert parse_policy("recompute: never").allow_recompute is False


TENANTS = """
floor: q2
recompute: {max_share: 0.5}
tenants:
  gold: {ttft_ms: 100, floor: q1}
  exact: {floor: lossless, recompute: allow}
  007: {refine: off, itl_ms: 50, ceiling: q1, infeasible: text}
  plain: {}
"""


def test_tenants_have_what_they_say_and_the_rest_from_the_policy() -> None:
    policy = parse_policy(TENANTS)
    gold, exact = policy.for_tenant("gold"), policy.for_tenant("exact")
    assert (gold.ttft_s, gold.floor, gold.refine_to, gold.max_recompute_share) == (0.1, "q1", "q1", 0.5)
    assert (exact.ttft_s, exact.max_recompute_share) == (0.5, 1.0)
    assert exact.refine_to is None, "the policy's q1 is coarser than this tenant's floor"
    bond = policy.for_tenant("007")
    assert (bond.refine_to, bond.itl_s, bond.ceiling, bond.infeasible) == (None, 0.05, "q1", "text")
    assert bond.allowed_levels() == ("q1", "q2")
    for name in ("plain", "", "nobody"):
        assert replace(policy.for_tenant(name), tenants={}) == replace(policy, tenants={})


def test_a_policy_for_this_cluster() -> None:
    policy = parse_policy("levels: [raw, q3]\ntenants: {a: {floor: raw}, b: {recompute: never}}")
    assert why_unservable(policy, levels=["raw", "q3"], num_prefill=1) == []
    (reason,) = why_unservable(policy, levels=["q3"], num_prefill=1)
    assert "tenant `a`" in reason
    (reason,) = why_unservable(policy, levels=["raw"], num_prefill=0)
    assert "tenant `b`" in reason


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("policy-*.yaml")), ids=lambda p: p.name)
def test_the_example_policies_are_valid(path: Path) -> None:
    policy = load_policy(path)
    for name in ("", *policy.tenants):
        assert policy.for_tenant(name).allowed_levels()


def test_the_chat_example_is_the_default_written_out_and_its_comments_are_valid_too() -> None:
    path = EXAMPLES / "policy-chat.yaml"
    assert load_policy(path) == SLOPolicy()
    text = path.read_text()
    for commented in ("ceiling:", "tenants:", "  gold:", "  free:"):
        assert f"# {commented}" in text
        text = text.replace(f"# {commented}", commented)
    policy = parse_policy(text)
    assert policy.ceiling == "lossless"
    assert set(policy.tenants) == {"gold", "free"}


# -- the serve file --------------------------------------------------------------------------------------------


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
    assert config.api_keys == {"secret": ""}
    assert config.kv_memory == 3 * 2**29


def test_a_policy_inline_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "fast.yaml").write_text("ttft_ms: 0\n")
    (tmp_path / "slow.yaml").write_text("ttft_ms: 9000\n")
    assert load_config(write(tmp_path, "policy:\n  ttft_ms: 70\n")).policy.ttft_s == 0.07
    path = write(tmp_path, "policy: fast.yaml\n")
    assert load_config(path).policy.ttft_s == 0
    assert load_config(path, policy=tmp_path / "slow.yaml").policy.ttft_s == 9


@pytest.mark.parametrize(
    ("text", "by_key"),
    [
        ("api_keys: one", {"one": ""}),
        ("api_keys: [one, two]", {"one": "", "two": ""}),
        (
            "api_keys:\n  one: gold\n  two:\n  0123: gold\n  on: x",
            {"one": "gold", "two": "", "0123": "gold", "on": "x"},
        ),
        ("port: 1", {}),
    ],
)
def test_keys_and_whose_they_are(tmp_path: Path, text: str, by_key: dict[str, str]) -> None:
    assert load_config(write(tmp_path, text)).api_keys == by_key


def test_a_key_on_the_command_line_takes_the_place_of_those_in_the_file(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "api_keys: {a: gold}"), api_keys=["b"]).api_keys == {"b": ""}


def test_no_message_repeats_a_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(write(tmp_path, "api_keys: {sk-secret: not a name}"))
    assert "sk-secret" not in str(raised.value)


def test_the_policys_file_is_remembered_where_it_has_one(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("ttft_ms: 0\n")
    assert load_config(write(tmp_path, "policy: p.yaml\n")).policy_file == tmp_path / "p.yaml"
    assert load_config(write(tmp_path, "policy: {ttft_ms: 5}\n")).policy_file is None
    path = write(tmp_path, "policy: {ttft_ms: 5}\n")
    assert load_config(path, policy=str(tmp_path / "p.yaml")).policy_file == tmp_path / "p.yaml"


def test_links_of_single_workers(tmp_path: Path) -> None:
    path = write(tmp_path, "link:\n  prefill:\n    - bind: 127.0.0.1:7100\n      advertise: 127.0.0.1:7000\n")
    (link,) = load_config(path).link.prefill
    assert (link.bind, link.advertise) == ("127.0.0.1:7100", "127.0.0.1:7000")
    path = write(tmp_path, "link:\n  decode: [{kv_bind: '127.0.0.1:7100', kv_advertise: '[::1]:7000'}]\n")
    (decode,) = load_config(path).link.decode
    assert (decode.bind, decode.kv_bind, decode.kv_advertise) == (None, "127.0.0.1:7100", "[::1]:7000")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("prot: 1\n", 1, "did you mean `port`?"),
        ("host: x\nport: 70000\n", 2, "`port`"),
        ("num_decode: 0\n", 1, "`num_decode`"),
        ("kv_blocks: 5\nkv_memory: 1GB\n", 2, "set the same thing"),
        ("store_bytes: lots\n", 1, "like 512MB"),
        ("port: 1\npage_ttl_s: 0\n", 2, "`page_ttl_s`"),
        ("page_ttl_s: .inf\n", 1, "`page_ttl_s`"),
        ("store_ttl_s: .nan\n", 1, "`store_ttl_s`"),
        ("prefix_caching: false\npage_ttl_s: 60\n", 2, "`prefix_caching: false` keeps none"),
        ("dtype: int4\n", 1, "'bfloat16' or 'float32'"),
        ("device: gpu\n", 1, "'auto', 'cpu' or 'cuda'"),
        ("link:\n  prefill:\n    - bind: nowhere\n", 3, "HOST:PORT"),
        ("link:\n  prefill:\n    - bid: 1.2.3.4:5\n", 3, "did you mean `bind`?"),
        ("link:\n  decode: [{}, {}]\n", 2, "`num_decode` is 1"),
        ("link:\n  decode:\n    - kv_advertise: somewhere\n", 3, "HOST:PORT"),
        ("link:\n  prefill:\n    - kv_advertise: 1.2.3.4:5\n", 3, "unknown key `kv_advertise`"),
        ("prefix_caching: false\nlink:\n  decode:\n    - kv_bind: 1.2.3.4:5\n", 4, "`kv_bind` is for chunks"),
        ("policy:\n  itl_ms: 5\n  tft_ms: 5\n", 3, "did you mean `ttft_ms`?"),
        ("port: 1\npolicy: none.yaml\n", 2, "does not exist"),
        ("policy: 7\n", 1, "`policy`"),
        ("api_keys: ['']\n", 1, "empty"),
        ("api_keys:\n  - a\n  - 7\n", 3, "entry 2 of `api_keys` is no text; put it in quotes"),
        ("api_keys:\n  - a\n  - a\n", 3, "listed twice"),
        ("api_keys:\n  sk-a: gold\n  sk-b: the others\n", 3, "entry 2 of `api_keys` names no tenant"),
        ("port: 1\napi_keys: 7\n", 2, "a list of keys, or a mapping from keys to tenants"),
        ("num_prefill: 0\npolicy: {tenants: {a: {recompute: never}}}\n", 1, "of tenant `a`"),
        ("policy_file: p.yaml\n", 1, "unknown key `policy_file`"),
        ("policy:\n  tenants:\n    a:\n      floor: q9\n", 4, "not one of `levels`"),
        ("num_prefill: 0\npolicy: {recompute: never}\n", 1, "without prefill workers"),
        ("chunk_tokens: 100\n", 1, "multiple of 16"),
        ("kv_cache_dtype: int5\n", 1, "'int8', 'int4' or 'fp8'"),
        ("kv_cache_dtype: int4\nchunk_tokens: 80\n", 2, "write 96"),
        ("port: 1\nkv_cache_dtype: int8\npolicy: {floor: lossless}\n", 2, "the policy's floor is `lossless`"),
        ("kv_cache_dtype: fp8\npolicy: {tenants: {a: {floor: raw}}}\n", 1, "floor of tenant `a` is `raw`"),
        ("max_num_seqs: 500\n", 1, "`max_num_seqs`"),
    ],
)
def test_mistakes_in_a_serve_file_are_named_by_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert any(p.startswith(f"{path}:{line}:") and says in p for p in raised.value.problems), raised.value.problems


def test_quantized_pages_are_a_key(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "kv_cache_dtype: int4\nmax_num_seqs: 12\nchunk_tokens: 96\n"))
    assert (config.kv_cache_dtype, config.max_num_seqs) == ("int4", 12)
    assert (
        load_config(None).kv_cache_dtype == "auto" and load_config(None, kv_cache_dtype="fp8").kv_cache_dtype == "fp8"
    )
    assert QUANTIZED_BLOCK_TOKENS == BLOCK_TOKENS


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("512", 512), ("2KB", 2000), ("1.5 GiB", 3 * 2**29), ("3mb", 3_000_000)]
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes
