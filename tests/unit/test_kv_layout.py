"""prefill/kv_layout.py: which tokens sliding windows still read, against a model of one query at a time."""

from __future__ import annotations

import random

import pytest

from prefill.kv_layout import KVLayout, dead_blocks, first_key, layer_runs, layers_needed, live_blocks, window_groups


def layout(*windows: int | None) -> KVLayout:
    return KVLayout(
        num_layers=len(windows), num_kv_heads=2, head_dim_k=8, head_dim_v=4, dtype="bfloat16", windows=windows
    )


def sees(window: int | None, query: int, key: int) -> bool:
    return key <= query and (window is None or key > query - window)


def test_without_windows_every_layer_sees_everything() -> None:
    plain = KVLayout(num_layers=3, num_kv_heads=2, head_dim_k=8, head_dim_v=4, dtype="bfloat16")
    assert plain.windows == (None, None, None) and not plain.has_windows
    assert plain == layout(None, None, None) and plain != layout(None, 4, None)
    assert plain.bytes_per_token == 3 * 2 * 12 * 2
    with pytest.raises(AssertionError):
        KVLayout(num_layers=3, num_kv_heads=2, head_dim_k=8, head_dim_v=4, dtype="bfloat16", windows=(4,))


@pytest.mark.parametrize("seed", range(20))
def test_layers_needed_are_those_that_some_later_query_reads(seed: int) -> None:
    rng = random.Random(seed)
    windows = tuple(rng.choice([None, 1, 2, rng.randint(3, 60)]) for _ in range(5))
    for _ in range(30):
        start = rng.randint(0, 100)
        stop = start + rng.randint(1, 40)
        query = rng.randint(stop - 1, 200)
        expected = tuple(
            i
            for i, window in enumerate(windows)
            if any(sees(window, later, key) for later in range(query, query + 3) for key in range(start, stop))
        )
        assert layers_needed(layout(*windows), start, stop, first_query=query) == expected, (seed, start, stop, query)


@pytest.mark.parametrize("seed", range(20))
def test_live_blocks_are_the_most_that_a_sequence_ever_needs(seed: int) -> None:
    rng = random.Random(seed)
    window, block, chunk = rng.choice([None, rng.randint(1, 70)]), rng.choice([1, 4, 16]), rng.randint(1, 40)
    total = rng.randint(1, 150)
    most = done = 0
    while done < total:  # each step writes `count` tokens, whose queries read their windows
        count = min(rng.randint(1, chunk), total - done)
        needed = {
            key // block
            for query in range(done, done + count)
            for key in range(done + count)
            if sees(window, query, key) or key >= done
        }
        assert min(needed) >= dead_blocks(window, done, block)
        most = max(most, len(needed))
        done += count
    assert most <= live_blocks(window, total, block, chunk), (window, block, chunk, total)
    if window is not None and total > window + chunk + block:
        assert live_blocks(window, total, block, chunk) <= most + -(-chunk // block) + 1


def test_numbers_of_gemma_3() -> None:
    """A window of 1,024 in five layers of six, a prompt of 32,768 tokens in chunks of 256."""
    gemma = layout(*([1024] * 5 + [None]) * 2)
    assert window_groups(gemma) == {1024: (0, 1, 2, 3, 4, 6, 7, 8, 9, 10), None: (5, 11)}
    needed = [layers_needed(gemma, at, at + 256, first_query=32_767) for at in range(0, 32_768, 256)]
    assert needed[:124] == [(5, 11)] * 124 and needed[124:] == [tuple(range(12))] * 4
    assert layer_runs(needed[0]) == [(5, 6), (11, 12)] and layer_runs(needed[-1]) == [(0, 12)]
    # A sequence that goes on at 32,000 needs more of them.
    assert layers_needed(gemma, 30_976, 31_232, first_query=32_000) == tuple(range(12))
    assert (first_key(1024, 32_767), dead_blocks(1024, 32_767, 16)) == (31_744, 1984)
    assert (live_blocks(1024, 32_768, 16), live_blocks(None, 32_768, 16)) == (65, 2048)
    assert live_blocks(1024, 32_768, 16, chunk_tokens=256) == 81 and live_blocks(1024, 100, 16) == 7
