"""The policy file users write, as decode.slo.SLOPolicy. Reads YAML; decides nothing.

ttft_ms: 500              # target for the first token; 0: as fast as possible
itl_ms: 100               # target for the gap between tokens
levels: [lossless, q1]    # what the controller may send, best first
floor: q1                 # the coarsest level allowed
recompute: allow          # or never: whether text may stand in for a chunk
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.yaml_file import ConfigError, YamlDocument, check, did_you_mean, parse_yaml, read_yaml
from decode.slo import SLOPolicy

Milliseconds = Annotated[float, Field(ge=0, le=3_600_000, allow_inf_nan=False)]

# Every level a codec profile has, best first; a policy may leave some out but not reorder them.
KNOWN_LEVELS: tuple[str, ...] = SLOPolicy().levels


class PolicyFile(BaseModel):
    """The keys of a policy, all of them optional."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    ttft_ms: Milliseconds = SLOPolicy().ttft_s * 1000
    itl_ms: Annotated[Milliseconds, Field(gt=0)] = SLOPolicy().itl_s * 1000
    levels: Annotated[list[str], Field(min_length=1, max_length=64)] | None = None
    floor: str | None = None
    recompute: Literal["allow", "never"] = "allow"


def load_policy(path: str | Path, *, known_levels: Sequence[str] = KNOWN_LEVELS) -> SLOPolicy:
    """A policy from a file. Raises ConfigError naming FILE:LINE for every mistake."""
    return policy_from(read_yaml(path), known_levels=known_levels)


def parse_policy(text: str, *, name: str = "<policy>", known_levels: Sequence[str] = KNOWN_LEVELS) -> SLOPolicy:
    """The same for text in memory."""
    return policy_from(parse_yaml(text, name=name), known_levels=known_levels)


def policy_from(document: YamlDocument, *, known_levels: Sequence[str] = KNOWN_LEVELS) -> SLOPolicy:
    """A checked document as a policy: `levels` without `floor` allows all of them."""
    file = check(document, PolicyFile)
    levels = tuple(file.levels) if file.levels is not None else tuple(known_levels)
    default_floor = levels[-1] if file.levels is not None else SLOPolicy().floor
    floor = file.floor if file.floor is not None else default_floor
    problems = _level_problems(document, levels, known_levels)
    if floor not in levels:
        reason = f"`floor: {floor}` is not one of `levels` ({', '.join(levels)})"
        problems.append(f"{document.at(('floor',))}: {reason}; name one of them, or add it to `levels`")
    if problems:
        raise ConfigError(problems)
    return SLOPolicy(
        ttft_s=file.ttft_ms / 1000,
        itl_s=file.itl_ms / 1000,
        levels=levels,
        floor=floor,
        allow_recompute=file.recompute == "allow",
    )


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
