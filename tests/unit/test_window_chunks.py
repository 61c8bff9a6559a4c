"""decode/window_chunks.py against queries and keys one by one, and the names that layers are asked for by."""

from __future__ import annotations

import random

import pytest

from decode.window_chunks import WindowChunks
from prefill.chunks import MAX_NAMED_LAYERS, part_name, refinement_name, split_level, split_part
from transport.limits import Limits


def sees(window: int | None, query: int, key: int) -> bool:
    return key <= query and (window is None or key > query - window)


def random_windows(rng: random.Random) -> tuple[int | None, ...]:
    kinds = [None, *(rng.randint(1, 70) for _ in range(rng.randint(1, 3)))]
    return tuple(rng.choice(kinds) for _ in range(rng.randint(1, 6)))


@pytest.mark.parametrize("seed", range(200))
def test_no_query_misses_a_key_of_what_is_loaded_and_computed(seed: int) -> None:
    rng = random.Random(seed)
    windows, size, num_chunks = random_windows(rng), rng.choice([4, 16, 32]), rng.randint(1, 9)
    chunks = WindowChunks(windows, chunk_tokens=size, num_chunks=num_chunks)
    computed = {index for index in range(num_chunks) if rng.random() < 0.3}
    found = chunks.to_load(lambda index, is_seen: is_seen and index in computed)
    queries = [query for index in computed if found[index] != () for query in range(index * size, (index + 1) * size)]
    queries.append(num_chunks * size)
    for index in range(num_chunks):
        if index in computed and found[index] != ():
            continue
        layers = range(len(windows)) if found[index] is None else found[index]
        for layer, window in enumerate(windows):
            is_seen = any(
                sees(window, query, key) and query >= (index + 1) * size
                for query in queries
                for key in range(index * size, (index + 1) * size)
            )
            assert (layer in layers) == is_seen, (seed, index, layer)  # all that is seen, and nothing else
        assert chunks.share(found[index]) == len(layers) / len(windows)


@pytest.mark.parametrize("seed", range(200))
def test_lacking_are_the_chunks_that_a_computed_one_would_see_in_part(seed: int) -> None:
    rng = random.Random(seed)
    windows, size, num_chunks = random_windows(rng), rng.choice([4, 16, 32]), rng.randint(2, 9)
    chunks = WindowChunks(windows, chunk_tokens=size, num_chunks=num_chunks)
    every = range(len(windows))
    parts = {
        index: tuple(layer for layer in every if rng.random() < 0.5)
        for index in range(num_chunks)
        if rng.random() < 0.6 and chunks.has_windows
    }

    def lacking(chunk: int) -> list[int]:
        return [
            before
            for before in sorted(parts)
            if before < chunk
            and any(
                sees(windows[layer], chunk * size, key)
                for layer in set(every).difference(parts[before])
                for key in range(before * size, (before + 1) * size)
                if windows[layer] is not None  # a layer that sees all is never left out
            )
        ]

    parts = {  # as loading leaves them: layers that see all are there
        index: tuple(sorted({*layers, *(layer for layer in every if windows[layer] is None)}))
        for index, layers in parts.items()
    }
    parts = {index: layers for index, layers in parts.items() if len(layers) < len(windows)}
    for chunk in range(num_chunks):
        assert chunks.lacking(chunk, parts) == lacking(chunk)
    goal = rng.randrange(num_chunks)
    again = chunks.again([goal], parts)
    left = {index: layers for index, layers in parts.items() if index not in again}
    assert not chunks.lacking(goal, left) and not any(chunks.lacking(index, left) for index in again)


def test_without_windows_all_is_loaded() -> None:
    for windows in ((), (None, None)):
        chunks = WindowChunks(windows, chunk_tokens=16, num_chunks=3)
        assert not chunks.has_windows
        assert chunks.to_load(lambda index, is_seen: False) == [None] * 3
        assert chunks.share(None) == 1.0 and chunks.lacking(2, {}) == [] and chunks.again([2], {}) == set()


@pytest.mark.parametrize("seed", range(50))
def test_names_of_layers_come_back(seed: int) -> None:
    rng = random.Random(seed)
    layers = tuple(sorted(rng.sample(range(MAX_NAMED_LAYERS), rng.randint(1, MAX_NAMED_LAYERS))))
    for whole in ("raw", "lossless", "q1", refinement_name("q3", "q1")):
        name = part_name(whole, layers)
        assert split_part(name) == (whole, layers) and len(name) <= Limits().level_chars
        assert split_part(part_name(whole, None)) == (whole, None)


@pytest.mark.parametrize(
    "name", ["q1/", "/2", "q1/0", "q1/02", "q1/2A", "q1/-1", "q1/+1", "q1/ 1", "q1/0x2", "q1/2/3", "q1/g", "q1/1_0"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="layers are named as in q1/2a"):
        split_part(name)


def test_a_name_with_layers_is_no_known_level() -> None:
    assert split_level("q3>q1/2a") == ("q3", "q1/2a")
