"""KV where it is hardest: key biases, outlier channels, attention sinks, bursts, flat channels, extreme magnitudes.

Every level either keeps its stated error bound (codec_cases.error_bounds) or refuses by name; and the bound is shown to
notice what a broken step would do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from codec_cases import check_error_bound, check_round_trip, error_bounds, make_layout, make_profile, make_rope
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.chunk import decode_chunk, encode_chunk, inspect_blob
from codec.errors import UnencodableTensor
from codec.levels import LevelKind
from codec.profile import Profile, default_profile
from codec.rope import RopeTable, rotate

LAYERS, HEADS, TOKENS, DIM = 2, 2, 160, 64
LAYOUT = make_layout(LAYERS, HEADS, DIM, DIM)
PROFILES = {
    "shipped": default_profile(LAYOUT),
    "static": make_profile(LAYOUT, matrices=True, unturned=1, stages=4),
}
Array = np.ndarray


def plain(rng: np.random.Generator, tokens: int) -> Array:
    return rng.normal(0, 1, (LAYERS, tokens, HEADS, DIM))


def key_bias(rng: np.random.Generator, tokens: int) -> Array:
    """As Qwen2.5's k_proj bias: a few channels stand at 50 to 300, the others move by about 1."""
    bias = np.zeros((LAYERS, 1, HEADS, DIM))
    for layer, head in np.ndindex(LAYERS, HEADS):
        where = rng.choice(DIM, 6, replace=False)
        bias[layer, 0, head, where] = rng.uniform(50, 300, 6) * rng.choice((-1, 1), 6)
    return plain(rng, tokens) + bias


def outlier_channels(rng: np.random.Generator, tokens: int) -> Array:
    x = plain(rng, tokens)
    x[..., [3, 40]] *= 1000
    return x


def sinks(rng: np.random.Generator, tokens: int) -> Array:
    x = plain(rng, tokens)
    x[:, :4] *= 100
    return x


def bursts(rng: np.random.Generator, tokens: int) -> Array:
    factor = np.ones((1, tokens, 1, DIM))
    for _ in range(6):
        start, first = rng.integers(0, tokens), rng.integers(0, DIM)
        factor[:, start : start + 9, :, first : first + 5] = rng.choice((30, 300))
    return plain(rng, tokens) * factor


def flat_channels(rng: np.random.Generator, tokens: int) -> Array:
    x = plain(rng, tokens)
    x[..., :20] = 0
    x[..., 20:30] = 7.25
    x[..., 30] = -1e4
    x[1] = 0
    return x


def denormals(rng: np.random.Generator, tokens: int) -> Array:
    return plain(rng, tokens) * 1e-39


def some_denormals(rng: np.random.Generator, tokens: int) -> Array:
    return plain(rng, tokens) * 10.0 ** rng.choice((-40, -20, -8, 0), (1, 1, 1, DIM))


def every_scale(rng: np.random.Generator, tokens: int) -> Array:
    return plain(rng, tokens) * np.geomspace(1e-6, 1e3, DIM)


def huge(rng: np.random.Generator, tokens: int) -> Array:
    return plain(rng, tokens) * 1e15


def near_max(rng: np.random.Generator, tokens: int) -> Array:
    return rng.uniform(-3.38e38, 3.38e38, (LAYERS, tokens, HEADS, DIM))


def one_near_max(rng: np.random.Generator, tokens: int) -> Array:
    x = plain(rng, tokens)
    x[1, tokens // 2, 0, 5] = -3.3e38
    return x


def ramps(rng: np.random.Generator, tokens: int) -> Array:
    return plain(rng, tokens) + np.linspace(0, 500, tokens)[:, None, None] * rng.normal(0, 1, DIM)


def signs(rng: np.random.Generator, tokens: int) -> Array:
    return rng.choice((-1.0, 1.0, -0.0, 0.0), (LAYERS, tokens, HEADS, DIM)) * 5


HARD: dict[str, Callable[[np.random.Generator, int], Array]] = {
    make.__name__: make
    for make in (
        plain, key_bias, outlier_channels, sinks, bursts, flat_channels, denormals, some_denormals, every_scale, huge,
        near_max, one_near_max, ramps, signs,
    )
}  # fmt: skip
REFUSED = {"shipped": {"near_max", "one_near_max"}, "static": {"huge", "near_max", "one_near_max"}}


def make_chunk(name: str, tokens: int, rope: RopeTable | None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """K is made before RoPE and turned, as a model does."""
    k, v = (HARD[name](np.random.default_rng(seed + i), tokens) for i in range(2))
    if rope is not None and "near_max" not in name:
        for layer, head in np.ndindex(LAYERS, HEADS):
            k[layer, :, head] = rotate(k[layer, :, head], *rope.forward())
    return torch.from_numpy(k).to(torch.bfloat16), torch.from_numpy(v).to(torch.bfloat16)


def lossy(profile: Profile) -> list[str]:
    return [level.name for level in profile.levels if level.kind is LevelKind.QUANTIZED]


def bits_a_value(blob: bytes) -> float:
    return 8 * len(blob) / inspect_blob(blob).num_values


@pytest.mark.parametrize("which", PROFILES)
@pytest.mark.parametrize("with_rope", [False, True])
@pytest.mark.parametrize("name", HARD)
def test_every_level_keeps_its_bound_or_refuses_by_name(name: str, with_rope: bool, which: str) -> None:
    profile = PROFILES[which]
    for tokens in (1, 2, TOKENS):
        rope = make_rope(tokens, DIM, start=4000) if with_rope else None
        k, v = make_chunk(name, tokens, rope)
        check_round_trip(k, v, level="raw", profile=profile, rope=rope)
        lossless = len(check_round_trip(k, v, level="lossless", profile=profile, rope=rope))
        sizes, refused = [], []
        for level in lossy(profile):
            try:
                sizes.append(len(check_round_trip(k, v, level=level, profile=profile, rope=rope)))
            except UnencodableTensor as error:
                said = rf"[KV] of layer [01] has values over \d+ steps of level {level}; use lossless or raw"
                assert re.fullmatch(said, str(error))
                refused.append(level)
        assert not refused or (name in REFUSED[which] and not sizes)  # all levels or none: they share their steps
        assert sizes == sorted(sizes, reverse=True)
        if tokens == TOKENS:
            assert bool(refused) == (name in REFUSED[which])
            if which == "shipped" and sizes:  # measured on the chunk itself
                assert sizes[0] < lossless


@pytest.mark.parametrize("scale", [1e-39, 1e-20, 1.0, 1e10, 1e18, 1e25, 1e30, 3e38])
def test_one_token_of_any_size(scale: float) -> None:
    """Measured on itself, a single token is its own mean, whatever its size; beyond the means' range it is refused."""
    profile = PROFILES["shipped"]
    x = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (LAYERS, 1, HEADS, DIM)) * scale).to(torch.bfloat16)
    for level in lossy(profile):
        if scale >= 1e30:
            with pytest.raises(UnencodableTensor, match=f"K of layer 0 .*steps of level {level}"):
                encode_chunk(x, x.clone(), level=level, profile=profile, rope=None)
        else:
            check_round_trip(x, x.clone(), level=level, profile=profile, rope=None)


@pytest.mark.parametrize("level", ["q1", "q2", "q3"])
def test_what_hard_keys_cost(level: str) -> None:
    """Bits a value of K above those of plain keys: biases are means and cost nothing; outliers cost little."""
    profile, rope = PROFILES["shipped"], make_rope(TOKENS, DIM, start=4000)
    cost = {}
    for name in HARD.keys() - REFUSED["shipped"]:
        k, _ = make_chunk(name, TOKENS, rope)
        zeros = torch.zeros_like(k)
        empty = len(encode_chunk(zeros, zeros, level=level, profile=profile, rope=rope)) / 2
        size = len(encode_chunk(k, zeros, level=level, profile=profile, rope=rope)) - empty
        cost[name] = 8 * size / k.numel()
    assert {"q1": 5.6, "q2": 4.0, "q3": 2.4}[level] < cost["plain"] < {"q1": 6.0, "q2": 4.4, "q3": 2.9}[level]
    for name, most in {"key_bias": 0.05, "huge": 0.05, "outlier_channels": 0.2, "bursts": 0.2}.items():
        assert abs(cost[name] - cost["plain"]) < most, name
    assert max(cost.values()) < cost["plain"] + 0.2
    assert cost["denormals"] < 0.4 and cost["flat_channels"] < 0.4 * cost["plain"]


def test_a_few_live_channels_among_nearly_dead_ones_are_coded() -> None:
    """The typical spread is then next to nothing; steps must still reach the channels that live (once refused)."""
    profile = PROFILES["shipped"]
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1e-25, (LAYERS, TOKENS, HEADS, DIM)))
    x[..., ::3] *= 1e25
    x = x.to(torch.bfloat16)
    for level in lossy(profile):
        blob = check_round_trip(x, x.clone(), level=level, profile=profile, rope=None)
        out, _ = decode_chunk(blob, profile=profile, rope=None)
        assert float((out - x).float().square().mean() / x.float().square().mean()) < 1e-2
        assert bits_a_value(blob) < 5


def test_keys_with_biases_are_as_exact_as_without() -> None:
    """Against what the model computed before bf16: the biases' own rounding is there, and next to no more."""
    profile, rope = PROFILES["shipped"], make_rope(TOKENS, DIM, start=4000)
    k, v = make_chunk("key_bias", TOKENS, rope)
    p, _ = make_chunk("plain", TOKENS, rope)
    errors = []
    for x in (k, p):
        out, _ = decode_chunk(encode_chunk(x, v, level="q1", profile=profile, rope=rope), profile=profile, rope=rope)
        small = x.float().abs() < 8  # where bf16 itself is fine enough to see it
        errors.append(float((out.float() - x.float())[small].square().mean().sqrt()))
    assert errors[0] < 1.3 * errors[1]


# ---------------------------------------------------------------- the bound itself


def judge(k: torch.Tensor, v: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor], blob: bytes, profile: Profile,
          rope: RopeTable | None) -> None:  # fmt: skip
    for which, (old, new) in enumerate(zip((k, v), out)):
        check_error_bound(old, new, blob, profile, "KV"[which], rope if which == 0 else None)


@pytest.mark.parametrize("which", PROFILES)
@pytest.mark.parametrize("with_rope", [False, True])
def test_a_broken_step_would_not_keep_the_bound(which: str, with_rope: bool) -> None:
    profile = PROFILES[which]
    rope = make_rope(TOKENS, DIM, start=4000) if with_rope else None
    k, v = make_chunk("plain", TOKENS, rope)
    level = lossy(profile)[1]
    blob = encode_chunk(k, v, level=level, profile=profile, rope=rope)
    good = decode_chunk(blob, profile=profile, rope=rope)
    judge(k, v, good, blob, profile, rope)

    coarser = encode_chunk(k, v, level=lossy(profile)[2], profile=profile, rope=rope)
    other_rope = make_rope(TOKENS, DIM, start=4001)
    bound = torch.from_numpy(error_bounds(blob, "V", profile)[0]).float()[:, None]
    moved = [x.clone() for x in good]
    moved[1][1, 7, 1, 9] += 2.2 * bound[1, 0, 1, 9] + 0.05
    broken = {
        "decoded at a coarser stage": decode_chunk(coarser, profile=profile, rope=rope),
        "one value two bounds off": tuple(moved),
        "tokens shifted by one": tuple(torch.roll(x, 1, dims=1) for x in good),
        "neighbouring channels swapped": tuple(x[..., torch.arange(DIM) ^ 1] for x in good),
        "heads swapped": tuple(x.flip(2) for x in good),
        "means forgotten": (good[0] - 1.0, good[1] - 1.0),
        "all zeros": tuple(torch.zeros_like(x) for x in good),
    }
    if rope is not None:
        broken["turned by another position"] = decode_chunk(blob, profile=profile, rope=other_rope)
    for what, out in broken.items():
        with pytest.raises(AssertionError, match="of its bound"):
            judge(k, v, out, blob, profile, rope)  # type: ignore[arg-type]
            pytest.fail(what)


@pytest.mark.parametrize("which", PROFILES)
@pytest.mark.parametrize("level", ["q1", "q2", "q3"])
def test_the_bound_is_reached(which: str, level: str) -> None:
    """Errors fill the bins, so a step twice as fine as stated, or a bound twice too wide, would be seen."""
    profile = PROFILES[which]
    plans = profile.lossy.k, profile.lossy.v
    if plans[0] is not None and plans[1] is not None:  # without a matrix, whose bound is a sum that no error reaches
        none = np.full_like(plans[0].matrix, -1)
        full = np.full_like(plans[0].active, DIM)
        k_plan, v_plan = (replace(plan, matrix=none, active=full) for plan in plans if plan is not None)
        profile = replace(profile, lossy=replace(profile.lossy, k=k_plan, v=v_plan))
    k, v = make_chunk("plain", TOKENS, None)
    blob = encode_chunk(k, v, level=level, profile=profile, rope=None)
    out = decode_chunk(blob, profile=profile, rope=None)
    for which_tensor, (old, new) in enumerate(zip((k, v), out)):
        bound = error_bounds(blob, "KV"[which_tensor], profile)[0][:, None]
        ratio = (old - new).float().abs().numpy() / bound
        assert 0.9 < ratio.max() < 1.8  # bf16 rounds behind it
        assert abs(float(np.square(ratio).mean()) - 1 / 3) < 0.05  # as good as uniform over the bins


@given(
    tokens=st.integers(1, 5), dims=st.sampled_from([(16, 16), (24, 7), (72, 64)]),
    backend=st.sampled_from(["numba", "numba", "reference"]),
    which=st.sampled_from(["shipped", "static"]), level=st.sampled_from(["q1", "q2", "q3"]), with_rope=st.booleans(),
    low=st.integers(-45, 3), high=st.integers(-3, 20), share=st.sampled_from([0.0, 0.02, 0.5]),
    bias=st.sampled_from([0.0, 1.0, 300.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=80)
def test_any_mixture_of_magnitudes(  # type: ignore[no-untyped-def]
    tokens, dims, backend, which, level, with_rope, low, high, share, bias, seed
) -> None:
    layout = make_layout(2, 1, *dims)
    profile = default_profile(layout) if which == "shipped" else make_profile(layout, matrices=True, group=2)
    rng = np.random.default_rng(seed)
    both = []
    for dim in dims:
        x = rng.normal(0, 1, (2, tokens, 1, dim)) * 10.0 ** rng.integers(min(low, high), high + 1, dim)
        x[rng.random(x.shape) < share] *= 10.0 ** rng.integers(0, 6)
        both.append(torch.from_numpy(x + bias * rng.integers(-1, 2, dim)).to(torch.bfloat16))
    rope = make_rope(tokens, dims[0] // 4 * 2, start=seed % 999) if with_rope else None
    try:
        check_round_trip(both[0], both[1], level=level, profile=profile, rope=rope, backend=backend)
    except UnencodableTensor as error:
        assert re.match(r"[KV] of layer [01] ", str(error))
        largest = max(float(x.abs().max()) for x in both)
        reach = 2.0**20 * (2.0**60 if which == "shipped" else 1e-3)
        assert largest > reach / 64  # not without need
