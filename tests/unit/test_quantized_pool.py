"""prefill/quantized_{rings,layout,pool}.py: bookkeeping under random operations, exact bytes, and copies that equal the
computed path bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_dense import through_blocks

from prefill.attention import AttentionRule, Span
from prefill.kv_layout import KVLayout
from prefill.quantized_layout import (
    BLOCK_TOKENS,
    KINDS,
    RECENT_TOKENS,
    RING_TOKENS,
    PageMix,
    QuantizedPagesUnsupported,
    block_bytes,
    blocks_for,
    boundary,
    sequence_bytes,
    settled_tokens,
)
from prefill.quantized_mix import read_page_kl, read_page_mix, write_page_mix
from prefill.quantized_pool import QuantizedKVPool
from prefill.quantized_rings import RecentRings, RingsExhausted

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim_k=32, head_dim_v=16, dtype="bfloat16")
NUM_BLOCKS = 24
RULE = AttentionRule(scale=0.2, window=None, softcap=None)


def random_kv(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYOUT.num_layers, num_tokens, LAYOUT.num_kv_heads)
    k = torch.randn(*shape, LAYOUT.head_dim_k, generator=generator).bfloat16()
    return k, torch.randn(*shape, LAYOUT.head_dim_v, generator=generator).bfloat16()


def new_pool(kind: str, max_sequences: int = 3) -> QuantizedKVPool:
    return QuantizedKVPool(LAYOUT, NUM_BLOCKS, kind, max_sequences)


def compute(pool: QuantizedKVPool, table: list[int], ring: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Tokens pass through the attention, as in a forward pass over all layers."""
    span = Span(row=0, num_tokens=k.shape[1], start=start, block_table=table, ring=ring)
    batch = pool.make_batch([span])
    for layer in range(LAYOUT.num_layers):
        k_new, v_new = (x[layer].transpose(0, 1)[None] for x in (k, v))
        q = k_new.repeat_interleave(2, 1)
        batch.attend(layer, q, k_new, v_new, RULE)


def same_state(one: QuantizedKVPool, other: QuantizedKVPool, table: list[int], ring: int, num_tokens: int) -> bool:
    """Bits of the settled pages and of the ring."""
    blocks = table[: settled_tokens(num_tokens) // BLOCK_TOKENS]
    tensors = zip(one.store.tensors(), other.store.tensors())
    pages = all(torch.equal(a[blocks], b[blocks]) for a, b in tensors)
    ends = [x.read(table, ring, settled_tokens(num_tokens), num_tokens) for x in (one, other)]
    return pages and one.rings.state(ring) == other.rings.state(ring) and all(map(torch.equal, *ends))


def test_the_boundary_leaves_32_to_63_tokens_before_the_query() -> None:
    for position in range(500):
        before = position - boundary(position)
        assert boundary(position) % BLOCK_TOKENS == 0
        if position >= RECENT_TOKENS:
            assert RECENT_TOKENS <= before < RECENT_TOKENS + BLOCK_TOKENS
        else:
            assert boundary(position) == 0
        assert before < RING_TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_tensors(kind: str) -> None:
    pool = new_pool(kind)
    tensors = pool.store.tensors()
    assert pool.bytes_per_token * BLOCK_TOKENS * NUM_BLOCKS == sum(x.nbytes for x in tensors)
    rings = [pool.store.recent_k.data, pool.store.recent_v.data]
    assert pool.ring_bytes * (3 + 1) == sum(x.nbytes for x in rings)  # the ring of zeros is beside the rings
    assert pool.num_bytes == sum(x.nbytes for x in tensors) + 3 * pool.ring_bytes
    sizes = {num_tokens: sequence_bytes(LAYOUT, pool.kind, num_tokens) for num_tokens in (1, 64, 65, 3500)}
    assert sizes[1] == sizes[64] == pool.ring_bytes and sizes[65] > sizes[64]
    assert sizes[3500] == 108 * BLOCK_TOKENS * pool.bytes_per_token + pool.ring_bytes


def test_bytes_of_known_shapes() -> None:
    """By hand: 32 heads of 128, 32 layers (Llama-2-7B's KV)."""
    layout = KVLayout(num_layers=32, num_kv_heads=32, head_dim_k=128, head_dim_v=128, dtype="bfloat16")
    per_head = {"int8": 128 + 128 + 4 * 128 / 32 + 4, "int4": 64 + 64 + 4 * 128 / 32 + 4, "fp8": 256 + 8 / 32}
    for kind, expected in per_head.items():
        got = (sequence_bytes(layout, kind, 96 + 64) - sequence_bytes(layout, kind, 64)) / 96  # type: ignore[arg-type]
        assert got == 32 * 32 * expected


def test_kinds_that_cannot_be() -> None:
    with pytest.raises(QuantizedPagesUnsupported, match="use one of int8, int4, fp8"):
        new_pool("int3")
    odd = KVLayout(num_layers=1, num_kv_heads=1, head_dim_k=9, head_dim_v=8, dtype="bfloat16")
    with pytest.raises(QuantizedPagesUnsupported, match="fill whole bytes, and this model's keys have 9: use int8"):
        QuantizedKVPool(odd, 1, "int4", 1)
    QuantizedKVPool(odd, 1, "int8", 1)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_written_equals_computed(kind: str, seed: int) -> None:
    """The same tokens, cut differently, some received and some computed, in whatever order of cuts."""
    rng = random.Random(seed)
    length = rng.randint(1, 300)
    k, v = random_kv(length, seed % 1000)
    table = rng.sample(range(NUM_BLOCKS), 12)
    pools = [new_pool(kind), new_pool(kind)]
    for pool in pools:
        ring, start = pool.rings.allocate(), 0
        while start < length:
            count = min(length - start, rng.choice([1, 3, 32, 64, 100, 256]))
            part = k[:, start : start + count], v[:, start : start + count]
            if pool is pools[0] or rng.random() < 0.5:
                pool.write(table, ring, start, *part)
            else:
                compute(pool, table, ring, start, *part)
            start += count
            pool.rings.check_integrity()
    assert same_state(*pools, table, ring, length)


@pytest.mark.parametrize("kind", KINDS)
def test_read_gives_what_blocks_give_back_and_recents_as_they_were(kind: str) -> None:
    pool, table, length = new_pool(kind), [5, 2, 9, 1, 7, 0], 200
    ring = pool.rings.allocate()
    k, v = random_kv(length)
    pool.write(table, ring, 0, k, v)
    settled = settled_tokens(length)
    assert settled == 160 == pool.rings.settled(ring)
    for start, stop in ((0, length), (0, 1), (31, 33), (40, 165), (159, 161), (170, 200)):
        got = pool.read(table, ring, start, stop)
        for layer in range(LAYOUT.num_layers):
            for mine, x, is_keys in ((got[0], k, True), (got[1], v, False)):
                old = through_blocks(x[layer], kind, is_keys=is_keys)[:settled]
                assert torch.equal(mine[layer], torch.cat((old, x[layer, settled:]))[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_that_arrive_out_of_order(kind: str) -> None:
    """The back is loaded while the front is computed in a ring of its own; they meet in the middle."""
    length, meeting = 256 + 128, 128
    k, v = random_kv(length)
    table = list(range(16))
    expected, pool = new_pool(kind), new_pool(kind)
    ring = expected.rings.allocate()
    expected.write(table, ring, 0, k, v)
    assert pool.rings.allocate() == ring
    front = pool.rings.allocate()
    pool.write(table, ring, 256, k[:, 256:], v[:, 256:])
    compute(pool, table, front, 0, k[:, :100], v[:, :100])
    pool.write(table, None, meeting, k[:, meeting:256], v[:, meeting:256])
    compute(pool, table, front, 100, k[:, 100:meeting], v[:, 100:meeting])
    pool.settle(table, front)
    pool.rings.release(front)
    pool.rings.check_integrity()
    assert pool.rings.length(ring) == length
    pages = zip(expected.store.tensors(), pool.store.tensors())
    settled_blocks = settled_tokens(length) // BLOCK_TOKENS
    assert all(torch.equal(a[:settled_blocks], b[:settled_blocks]) for a, b in pages)
    more_k, more_v = random_kv(70, seed=5)
    for x in (expected, pool):
        compute(x, table, ring, length, more_k, more_v)
    recents = [x.read(table, ring, settled_tokens(length + 70), length + 70) for x in (expected, pool)]
    assert all(map(torch.equal, *recents))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stop"), [(0, 96), (64, 192), (128, 224), (192, 224), (0, 224)])
def test_better_kv_replaces_what_is_there(kind: str, start: int, stop: int) -> None:
    """A refinement, while the sequence goes on: as if the better KV had come at once."""
    length = 230
    coarse, fine = random_kv(length, seed=1), random_kv(length, seed=2)
    table = list(range(10, 20))
    mixed = tuple(torch.cat((a[:, :start], b[:, start:stop], a[:, stop:]), 1) for a, b in zip(coarse, fine))
    pool, expected = new_pool(kind), new_pool(kind)
    ring = expected.rings.allocate()
    expected.write(table, ring, 0, *mixed)
    pool.rings.allocate()
    pool.write(table, ring, 0, *coarse)
    pool.write(table, ring, start, *(x[:, start:stop] for x in fine))
    assert same_state(pool, expected, table, ring, length)


@pytest.mark.parametrize("kind", KINDS)
def test_forks_and_snapshots_go_on_as_the_original(kind: str) -> None:
    length, more = 150, 90
    k, v = random_kv(length + more)
    table = list(range(8))
    pool = new_pool(kind)
    ring, twin = pool.rings.allocate(), pool.rings.allocate()
    pool.write(table, ring, 0, k[:, :length], v[:, :length])
    pool.fork(ring, twin)
    shared = pool.rings.settled(ring) // BLOCK_TOKENS
    own = table[:shared] + list(range(8, 14))
    saved = pool.snapshot(table, ring)
    compute(pool, table, ring, length, k[:, length:], v[:, length:])
    compute(pool, own, twin, length, k[:, length:], v[:, length:])
    other = new_pool(kind)
    back = other.rings.allocate()
    elsewhere = list(range(23, 11, -1))
    other.restore(elsewhere, back, saved)
    compute(other, elsewhere, back, length, k[:, length:], v[:, length:])
    expected = pool.read(table, ring, 0, length + more)
    for got in (pool.read(own, twin, 0, length + more), other.read(elsewhere, back, 0, length + more)):
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [32, 96, 117])
def test_resuming_from_pages_alone(kind: str, length: int) -> None:
    """A prefix hit: recents are what pages give back, and pages that others share are not written."""
    k, v = random_kv(128)
    pool, table = new_pool(kind), [3, 4, 5, 6, 7, 8]
    ring = pool.rings.allocate()
    pool.write(table, ring, 0, k, v)
    pool.settle(table, ring)
    before = [x[table[:4]].clone() for x in pool.store.tensors()]
    hit = pool.rings.allocate()
    pool.resume(table, hit, length)
    assert all(map(torch.equal, pool.read(table, hit, 0, length), pool.read(table, None, 0, length)))
    own = table[: length // BLOCK_TOKENS] + [10, 11, 12, 13, 14]
    compute(pool, own, hit, length, *random_kv(100, seed=8))
    pool.rings.check_integrity()
    after = [x[table[:4]] for x in pool.store.tensors()]
    assert all(map(torch.equal, before, after))


MIX = PageMix(keys=("int8", "int2"), values=("int2", "int4"))


def test_a_mix_counts_and_computes_as_its_layers_do() -> None:
    """Layer by layer the bits of pools of one kind, and the bytes of its own tensors."""
    k, v = random_kv(200)
    table = list(range(8))
    pool = QuantizedKVPool(LAYOUT, NUM_BLOCKS, "int4", 1, mix=MIX)
    ring = pool.rings.allocate()
    compute(pool, table, ring, 0, k, v)
    assert pool.num_bytes == sum(x.nbytes for x in pool.store.tensors()) + pool.ring_bytes
    assert pool.num_bytes == NUM_BLOCKS * block_bytes(LAYOUT, pool.kind, MIX) + pool.ring_bytes
    got = pool.read(table, ring, 0, 160)
    for layer in range(LAYOUT.num_layers):
        for mine, x, kinds, is_keys in ((got[0], k, MIX.keys, True), (got[1], v, MIX.values, False)):
            assert torch.equal(mine[layer], through_blocks(x[layer, :160], kinds[layer], is_keys=is_keys))
    twin = QuantizedKVPool(LAYOUT, NUM_BLOCKS, "int4", 1, mix=MIX)
    twin.write(table, twin.rings.allocate(), 0, k, v)
    assert same_state(pool, twin, table, ring, 200)


def test_a_mix_is_kept_beside_the_model(tmp_path: Path) -> None:
    assert read_page_mix(tmp_path, "int4", LAYOUT) is None
    path = write_page_mix(tmp_path, "int4", MIX)
    assert read_page_mix(tmp_path, "int4", LAYOUT) == MIX and read_page_mix(tmp_path, "int8", LAYOUT) is None
    for content, words in (
        ("nonsense", "is no page mix"),
        ("[]", "is no page mix"),
        ('{"int4": {"keys": ["int5"], "values": []}}', "unknown kind 'int5'"),
        ('{"int4": {"keys": ["int8"], "values": ["int8"]}}', "has 1 layers of keys, and the model has 2"),
    ):
        path.write_text(content)
        with pytest.raises(QuantizedPagesUnsupported, match=words):
            read_page_mix(tmp_path, "int4", LAYOUT)


def test_what_a_mix_loses_stands_beside_it(tmp_path: Path) -> None:
    assert read_page_kl(tmp_path, "int4") is None
    path = write_page_mix(tmp_path, "int4", MIX, kl=0.002)
    write_page_mix(tmp_path, "int8", MIX)
    assert read_page_kl(tmp_path, "int4") == 0.002 and read_page_mix(tmp_path, "int4", LAYOUT) == MIX
    assert read_page_kl(tmp_path, "int8") is None and read_page_kl(tmp_path, "fp8") is None
    for content in ('{"int4": {"kl": "much"}}', '{"int4": {"kl": -1}}', '{"int4": {"kl": NaN}}', '{"int4": 3}'):
        path.write_text(content)
        with pytest.raises(QuantizedPagesUnsupported, match="is no page mix"):
            read_page_kl(tmp_path, "int4")


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("seed", range(5))
def test_chunks_in_any_order_and_a_ring_that_moves_behind_them(kind: str, seed: int) -> None:
    """Some are computed in the ring, the others come into the pages in any order, of which only the last 32 tokens are
    kept beside: what follows finds the same bits as if all had been computed in one go."""
    rng = random.Random(seed)
    size, num_chunks = rng.choice([32, 64, 96]), 6
    loadable, more = size * num_chunks, 100
    k, v = random_kv(loadable + more, seed=seed)
    table = list(range(14, 14 + (loadable + more) // 32 + 1))
    plain, pool = (QuantizedKVPool(LAYOUT, 48, kind, 1) for _ in range(2))
    ours, theirs = pool.begin_sequence(), plain.begin_sequence()
    compute(plain, table, theirs, 0, k, v)
    loaded = {chunk for chunk in range(num_chunks) if rng.random() < 0.5}
    computed = [chunk for chunk in range(num_chunks) if chunk not in loaded]
    # All of a prompt's loaded chunks come before, after or between those that are computed on them.
    recents: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    left = sorted(loaded, key=lambda _: rng.random())

    def load(chunk: int) -> None:
        start, stop = chunk * size, (chunk + 1) * size
        pool.write(table, None, start, k[:, start:stop], v[:, start:stop])
        recents[stop] = k[:, stop - 32 : stop], v[:, stop - 32 : stop]

    for chunk in computed:
        while left and (rng.random() < 0.3 or any(before < chunk for before in left)):
            load(left.pop())
        start, stop = chunk * size, (chunk + 1) * size
        pool.continue_at(table, ours, start, recents.get(start))
        compute(pool, table, ours, start, k[:, start:stop], v[:, start:stop])
        pool.rings.check_integrity()
    for chunk in left:
        load(chunk)
    pool.continue_at(table, ours, loadable, recents.get(loadable))
    compute(pool, table, ours, loadable, k[:, loadable:], v[:, loadable:])
    length = loadable + more
    blocks = table[: settled_tokens(length) // 32]
    assert all(torch.equal(a[blocks], b[blocks]) for a, b in zip(pool.store.tensors(), plain.store.tensors()))
    ends = [one.read(table, ring, settled_tokens(length), length) for one, ring in ((pool, ours), (plain, theirs))]
    assert all(map(torch.equal, *ends)) and pool.rings.settled(ours) == plain.rings.settled(theirs)


def test_rings_run_out_and_come_back() -> None:
    rings = RecentRings(2)
    assert {rings.allocate(), rings.allocate()} == {0, 1}
    with pytest.raises(RingsExhausted, match="raise max_sequences"):
        rings.allocate()
    rings.extend(1, 0, 10)
    rings.release(1)
    assert rings.allocate() == 1 and rings.is_fresh(1)
    with pytest.raises(AssertionError, match="not in use"):
        rings.release(5)


@pytest.mark.parametrize(
    ("start", "stop", "words"), [(5, 9, "behind 4 tokens"), (0, 4, "behind 4 tokens"), (4, 4, r"\(4, 4\)")]
)
def test_gaps_and_overlaps_are_bugs(start: int, stop: int, words: str) -> None:
    rings = RecentRings(1)
    ring = rings.allocate()
    rings.extend(ring, 0, 4)
    with pytest.raises(AssertionError, match=words):
        rings.extend(ring, start, stop)


def test_computing_in_a_ring_without_the_tokens_before_is_a_bug() -> None:
    pool = new_pool("int4")
    ring = pool.rings.allocate()
    with pytest.raises(AssertionError, match="no ring has them"):
        compute(pool, list(range(8)), ring, 64, *random_kv(100))


def test_a_ring_that_starts_too_late_is_a_bug() -> None:
    rings = RecentRings(1)
    ring = rings.allocate()
    with pytest.raises(AssertionError, match="lacks recent tokens"):
        rings.extend(ring, 256, 256 + 20)


@pytest.mark.parametrize("seed", range(20))
def test_bookkeeping_survives_random_operations(seed: int) -> None:
    """1,000 operations; a model that remembers every token by itself says what is settled and what a ring must hold."""
    rng = random.Random(seed)
    rings, used = RecentRings(6), {}
    for _ in range(1000):
        kind = rng.choice(["allocate", "extend", "extend", "extend", "settle", "release", "fork", "resume"])
        if kind in ("allocate", "fork", "resume"):
            if len(used) == 6:
                with pytest.raises(RingsExhausted):
                    rings.allocate()
                continue
            ring = rings.allocate()
            assert ring not in used
            used[ring] = set()
            grown = [other for other, settled in used.items() if rings.length(other)]
            if kind == "fork" and grown:
                source = rng.choice(grown)
                rings.restore(ring, rings.state(source))
                used[ring] = set(used[source])
            elif kind == "resume":
                length = rng.randint(1, 400)
                assert rings.resume(ring, length) == boundary(length)
                used[ring] = set(range(length // BLOCK_TOKENS))
        elif used:
            ring = rng.choice(list(used))
            if kind == "release":
                rings.release(ring)
                del used[ring]
                continue
            length = rings.length(ring)
            if kind == "extend":
                stop = length + rng.choice([1, 1, 2, 31, 32, 33, 64, 65, 256, 300])
                due = rings.extend(ring, length, stop)
                # What is due is among the new tokens or still in the ring.
                assert due[0] == due[1] or due[0] >= length - RING_TOKENS
                length = stop
            else:
                due = rings.settle(ring)
            blocks = set(range(due[0] // BLOCK_TOKENS, due[1] // BLOCK_TOKENS))
            assert not blocks & used[ring], "a block is quantized once"
            used[ring] |= blocks
            assert used[ring] >= set(range(boundary(max(length - 1, 0)) // BLOCK_TOKENS))
            assert used[ring] == set(range(rings.settled(ring) // BLOCK_TOKENS))
        rings.check_integrity()
    assert rings.num_free == 6 - len(used)
    assert blocks_for(3500) == 108
