"""The policy file users write, as decode.slo.SLOPolicy. Reads YAML; decides nothing.

ttft_ms: 500              # target for the first token; 0: as fast as possible
itl_ms: 100               # target for the gap between tokens
levels: [lossless, q1]    # what the controller may send, best first
floor: q1                 # the coarsest level allowed
recompute: allow          # or never: whether text may stand in for a chunk

All keys: policy_schema.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.policy_schema import KNOWN_LEVELS, PolicyFile, RecomputeShare, TenantKeys
from cluster.yaml_file import ConfigError, Where, YamlDocument, check, did_you_mean, parse_yaml, read_yaml
from decode.fair_share import TenantShare
from decode.slo import SLOPolicy

EXACT_LEVELS = ("raw", "lossless")  # nothing of these is left to refine

__all__ = ["KNOWN_LEVELS", "load_policy", "parse_policy", "policy_from", "why_unservable"]


def load_policy(path: str | Path, *, known_levels: Sequence[str] = KNOWN_LEVELS) -> SLOPolicy:
    """A policy from a file. Raises ConfigError naming FILE:LINE for every mistake."""
    return policy_from(read_yaml(path), known_levels=known_levels)


def parse_policy(text: str, *, name: str = "<policy>", known_levels: Sequence[str] = KNOWN_LEVELS) -> SLOPolicy:
    """The same for text in memory."""
    return policy_from(parse_yaml(text, name=name), known_levels=known_levels)


def policy_from(document: YamlDocument, *, known_levels: Sequence[str] = KNOWN_LEVELS) -> SLOPolicy:
    """A checked document as a policy: `levels` without `floor` allows all of them."""
    file = check(document, PolicyFile)
    given = _given(file, TenantShare())
    if file.levels is not None:
        given = {"levels": tuple(file.levels), "floor": file.levels[-1], **given}
    if file.link_prior_mbps is not None:
        given["link_prior_bps"] = file.link_prior_mbps * 1e6
    policy = replace(SLOPolicy(levels=tuple(known_levels)), **given)
    problems = _level_problems(document, policy.levels, known_levels) + _contradictions(document, (), file, policy)
    if file.refine is None:
        policy = replace(policy, refine_to=_refinable(_best_lossy(policy.levels), policy))
    tenants: dict[str, dict[str, Any]] = {}
    for name, keys in (file.tenants or {}).items():
        overrides = _given(keys, policy.share)
        theirs = replace(policy, **overrides)
        problems += _contradictions(document, ("tenants", name), keys, theirs)
        if keys.refine is None and _refinable(policy.refine_to, theirs) is None:
            overrides["refine_to"] = None
        tenants[name] = overrides
    if problems:
        raise ConfigError(problems)
    return replace(policy, tenants=tenants)


def why_unservable(policy: SLOPolicy, *, levels: Sequence[str], num_prefill: int) -> list[str]:
    """What stands between a good policy and this cluster: its codec profile's levels, its prefill workers."""
    reasons: list[str] = []
    for name in ("", *policy.tenants):
        theirs, whose = policy.for_tenant(name), f" of tenant `{name}`" if name else ""
        if not set(theirs.allowed_levels()) & set(levels):
            reasons.append(
                f"the policy{whose} allows {', '.join(theirs.allowed_levels())}, and this model's codec profile has "
                f"{', '.join(levels)}: change `levels`, `floor` or `ceiling`"
            )
        if num_prefill == 0 and not theirs.allow_recompute:
            reasons.append(
                f"without prefill workers all is recomputed, but the policy{whose} says `recompute: never`: write "
                "`allow`, or set num_prefill"
            )
    return reasons


def why_not_in_pages(policy: SLOPolicy, kv_cache_dtype: str) -> list[str]:
    """What stands between a policy and quantized pages: a floor that asks for exact KV, which no such page has."""
    if kv_cache_dtype == "auto":
        return []
    reasons: list[str] = []
    for name in ("", *policy.tenants):
        floor, whose = policy.for_tenant(name).floor, f" of tenant `{name}`" if name else ""
        if floor in EXACT_LEVELS:
            reasons.append(
                f"the policy's floor{whose} is `{floor}`, and {kv_cache_dtype} pages lose a little of whatever comes: "
                "name a lossy floor, or write `kv_cache_dtype: auto`"
            )
    return reasons


def _given(keys: TenantKeys, share: TenantShare) -> dict[str, Any]:
    """The keys that are given, as fields of SLOPolicy. share: what a part of one is added to."""
    fields: dict[str, Any] = {}
    if keys.ttft_ms is not None:
        fields["ttft_s"] = keys.ttft_ms / 1000
    if keys.itl_ms is not None:
        fields["itl_s"] = keys.itl_ms / 1000
    if keys.floor is not None:
        fields["floor"] = keys.floor
    if keys.ceiling is not None:
        fields["ceiling"] = keys.ceiling
    if keys.refine is not None:
        fields["refine_to"] = None if keys.refine == "off" else keys.refine
    if keys.recompute is not None:
        fields["allow_recompute"] = keys.recompute != "never"
        fields["max_recompute_share"] = keys.recompute.max_share if isinstance(keys.recompute, RecomputeShare) else 1.0
    if keys.share is not None:
        limits = keys.share
        given: dict[str, Any] = {
            "weight": limits.weight,
            "max_requests": limits.max_requests,
            "max_waiting": limits.max_waiting,
            "max_blocks_share": limits.max_kv_share,
            "max_store_share": limits.max_store_share,
        }
        fields["share"] = replace(share, **{name: value for name, value in given.items() if value is not None})
    if keys.infeasible is not None:
        fields["infeasible"] = keys.infeasible
    return fields


def _best_lossy(levels: Sequence[str]) -> str | None:
    return next((level for level in levels if level not in EXACT_LEVELS), None)


def _refinable(level: str | None, policy: SLOPolicy) -> str | None:
    """`level`, unless the floor forbids whatever could be refined to it."""
    if level is None or level not in policy.levels or policy.floor not in policy.levels:
        return None
    return level if policy.levels.index(level) <= policy.levels.index(policy.floor) else None


def _level_problems(document: YamlDocument, levels: Sequence[str], known: Sequence[str]) -> list[str]:
    problems: list[str] = []
    best_so_far = -1
    for i, level in enumerate(levels):
        at = document.at(("levels", i))
        if level == "text":
            problems.append(f"{at}: `text` is not a level; computing from text is set by `recompute: allow` or `never`")
        elif level not in known:
            hint = did_you_mean(level, known) or f"; the levels are {', '.join(known)}"
            problems.append(f"{at}: unknown level `{level}`{hint}")
        elif level in levels[:i]:
            problems.append(f"{at}: level `{level}` is listed twice; leave one out")
        elif known.index(level) < best_so_far:
            problems.append(f"{at}: levels go from best to worst, so `{level}` belongs before `{levels[i - 1]}`")
        else:
            best_so_far = known.index(level)
    return problems


def _contradictions(document: YamlDocument, where: Where, keys: TenantKeys, policy: SLOPolicy) -> list[str]:
    """Where the keys at `where` contradict the levels, each other or what they inherit. `policy`: all in force."""
    problems: list[str] = []

    def at(*candidates: str) -> str:
        """The first of these keys that is given here: it is what made the contradiction."""
        key = next((key for key in candidates if getattr(keys, key) is not None), candidates[0])
        return document.at((*where, key))

    levels = policy.levels
    for key, value in (("floor", policy.floor), ("ceiling", policy.ceiling), ("refine", keys.refine)):
        is_ours = getattr(keys, key) is not None or (key == "floor" and not where)
        if is_ours and value not in levels and not (key == "refine" and value == "off"):
            hint = "name one of them" if where else "name one of them, or add it to `levels`"
            problems.append(f"{at(key)}: `{key}: {value}` is not one of `levels` ({', '.join(levels)}); {hint}")
    rank = {level: i for i, level in enumerate(levels)}
    floor, ceiling, refine = (rank.get(str(level)) for level in (policy.floor, policy.ceiling, keys.refine))
    if floor is not None and ceiling is not None and floor < ceiling and (keys.floor or keys.ceiling or not where):
        problems.append(
            f"{at('ceiling', 'floor')}: the ceiling `{policy.ceiling}` is coarser than the floor `{policy.floor}`, so "
            "no level is left; give a better ceiling or a coarser floor"
        )
    if floor is not None and refine is not None and refine > floor:
        problems.append(
            f"{at('refine')}: `refine: {keys.refine}` is coarser than the floor `{policy.floor}`, so nothing would be "
            "refined; name a better level, or write `refine: off`"
        )
    if policy.infeasible == "text" and not policy.allow_recompute and (keys.infeasible or keys.recompute):
        problems.append(
            f"{at('infeasible', 'recompute')}: `infeasible: text` computes the prompt, and `recompute: never` forbids "
            "that; change one of them"
        )
    if policy.infeasible != "best_effort" and policy.ttft_s == 0 and (keys.infeasible or keys.ttft_ms is not None):
        problems.append(
            f"{at('infeasible', 'ttft_ms')}: `infeasible: {policy.infeasible}` needs a target that can be missed, and "
            "`ttft_ms: 0` sets none; give a target, or write `infeasible: best_effort`"
        )
    return problems
