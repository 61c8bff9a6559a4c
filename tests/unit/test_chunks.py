"""How prompts are cut and named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill.chunks import KEY_BYTES, KeyChain, chunk_key, chunk_keys, num_loadable_chunks, refinement_name, split_level

tokens = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=150)
sizes = st.sampled_from([16, 32, 48])


def keys(token_ids, size, *, fingerprint="f", cache_salt=""):
    return chunk_keys(token_ids, size, fingerprint=fingerprint, cache_salt=cache_salt)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(1, 0), (255, 0), (256, 0), (257, 1), (512, 1), (513, 2), (4096, 15)]
)
def test_the_last_token_is_never_in_a_chunk(num_tokens: int, expected: int) -> None:
    assert num_loadable_chunks(num_tokens, 256) == expected


@given(tokens, sizes)
def test_a_key_for_each_chunk_and_a_tail_of_one_to_a_chunk(token_ids: list[int], size: int) -> None:
    found = keys(token_ids, size)
    assert len(found) == num_loadable_chunks(len(token_ids), size)
    assert 1 <= len(token_ids) - len(found) * size <= size
    assert all(len(key) == KEY_BYTES for key in found)
    assert len(set(found)) == len(found)


@given(tokens, tokens, sizes)
def test_a_longer_prompt_keeps_the_keys_of_what_it_continues(start: list[int], rest: list[int], size: int) -> None:
    shorter = keys(start, size)
    assert keys(start + rest, size)[: len(shorter)] == shorter


@given(tokens, sizes, st.data())
def test_a_changed_token_changes_its_chunk_and_all_after_it(token_ids: list[int], size: int, data) -> None:
    at = data.draw(st.integers(0, len(token_ids) - 1))
    changed = token_ids.copy()
    changed[at] ^= 1
    for chunk, (old, new) in enumerate(zip(keys(token_ids, size), keys(changed, size), strict=True)):
        assert (old == new) == (chunk < at // size)


@given(tokens, st.lists(st.integers(0, 70), max_size=5))
def test_a_chain_that_grew_is_that_of_the_whole(token_ids: list[int], cuts: list[int]) -> None:
    chain, at = KeyChain(fingerprint="f"), 0
    for cut in [*sorted(cuts), len(token_ids)]:
        chain.extend(token_ids[at:cut])
        at = max(at, min(cut, len(token_ids)))
    whole = KeyChain(token_ids, fingerprint="f")
    assert len(chain) == len(token_ids)
    for size in (16, 32):
        assert chain.blocks(size) == whole.blocks(size)
        assert len(chain.blocks(size)) == len(token_ids) // size
        assert chain.blocks(size, first=1) == whole.blocks(size)[1:]


def test_a_chunk_is_named_after_its_last_block() -> None:
    chain = KeyChain(range(100), fingerprint="f")
    assert chain.chunks(32, 2) == [chunk_key(link, 32) for link in chain.blocks(32)[:2]]


@pytest.mark.parametrize("other", [{"fingerprint": "g"}, {"cache_salt": "tenant"}, {"size": 32}])
def test_model_tenant_and_chunk_size_are_part_of_a_key(other: dict) -> None:
    token_ids = list(range(65))
    options = {"size": 16, **other}
    assert not set(keys(token_ids, 16)) & set(keys(token_ids, **options))


def test_keys_do_not_change_between_versions() -> None:
    """Stores on different machines must agree."""
    (key,) = keys(range(17), 16, fingerprint="model", cache_salt="salt")
    assert key.hex() == "d9d42020d37889d770898f67f5131000"


names = st.text(st.characters(exclude_characters=">"), min_size=1, max_size=8)


@given(names, names)
def test_a_name_of_a_level_or_a_refinement_splits_into_what_it_was_made_of(have: str, level: str) -> None:
    assert split_level(level) == (None, level)
    if have == level:
        with pytest.raises(AssertionError):
            refinement_name(have, level)
    else:
        assert split_level(refinement_name(have, level)) == (have, level)


def test_a_refinement_is_named_as_the_wire_has_it() -> None:
    assert refinement_name("q3", "q1") == "q3>q1"


@pytest.mark.parametrize("name", ["", ">", "q3>", ">q1", "q3>q2>q1", "q3>>q1", "q1>q1"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="names neither"):
        split_level(name)
