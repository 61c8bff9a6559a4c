"""Who holds pages and who waits for them, without an engine: the test does what the worker would."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exact_pages import exact_runtime

from codec.profile import Promise
from decode.active_request import ActiveRequest
from decode.page_holders import PageHolders
from decode.requests import GenerationRequest, SamplingParams
from decode.scheduler import Phase, Scheduler, Sequence
from decode.tagged_pages import TaggedPages

KL = {"lossless": 0.0, "q1": 0.01, "q3": 0.1}


class World:
    """The worker's part of it."""

    def __init__(self, num_blocks: int = 64) -> None:
        profile = SimpleNamespace(level_names=tuple(KL), promise={name: Promise(kl=kl) for name, kl in KL.items()})
        self.runtime = exact_runtime(num_blocks, profile)
        self.pages = TaggedPages(self.runtime, chunk_tokens=16)
        self.requests: dict[str, ActiveRequest] = {}
        self.scheduler = Scheduler(num_blocks=num_blocks)
        self.holders = PageHolders(owner=self, scheduler=self.scheduler, pages=self.pages, requests=self.requests)
        self.begun: list[str] = []

    def submit(self, key: str, tokens: list[int], level: str, *, max_tokens: int = 4) -> None:
        sampling = SamplingParams(max_tokens=max_tokens)
        request = GenerationRequest(request_id=key, token_ids=tuple(tokens), sampling=sampling)
        state: Any = SimpleNamespace(
            request=request,
            chain=self.pages.chain(tokens, ""),
            max_kl=KL[level],
            pages=None,
            fill_tokens=len(tokens),
            prompt_tokens=len(tokens),
            saved=None,
        )
        self.requests[key] = state
        self.holders.submit(key, deadline=0.0, now=0.0)
        self.holders.admit(0.0)

    def admitted(self, key: str, sequence: Sequence | None, arrival: int, now: float) -> Sequence:
        table = self.requests[key].pages
        assert table is not None
        return sequence or Sequence(
            key=key, request=self.requests[key].request, block_table=table.blocks, deadline=0.0, arrival=arrival
        )

    def begin_fill(self, sequence: Sequence, now: float) -> None:
        self.begun.append(sequence.key)

    def gives_up(self, sequence: Sequence) -> None:
        pass

    def loaded(self, key: str, level: str) -> None:
        """All of its prompt is in place, and its answer begins."""
        state = self.requests[key]
        assert state.pages is not None
        stop = state.prompt_tokens
        self.pages.loaded(state.pages, state.pages.cached_tokens, stop, level)
        self.pages.share(state.pages, stop)
        sequence = self.scheduler.get(key)
        assert sequence is not None
        sequence.phase = Phase.RUNNING
        self.holders.filled(key)
        self.holders.admit(0.0)

    def end(self, key: str) -> None:
        self.holders.ended(key, 0.0)
        del self.requests[key]
        self.holders.admit(0.0)
        self.holders.check_integrity()


def test_nobody_waits_for_who_lost_its_place_to_something_better() -> None:
    world = World()
    prompt = list(range(65))
    world.submit("first", prompt[:33], "q3")
    world.loaded("first", "q3")
    world.submit("lossy", prompt, "q3")  # takes those two blocks, and fills two more
    assert world.requests["lossy"].pages is not None and world.requests["lossy"].pages.cached_tokens == 32
    world.submit("strict", prompt[:17], "lossless")
    world.loaded("strict", "lossless")  # its first block is better: what continued the other one is forgotten
    world.loaded("lossy", "q3")
    world.holders.check_integrity()
    world.submit("later", prompt, "q3")
    assert world.begun == ["first", "lossy", "strict", "later"]
    for key in world.begun:
        world.end(key)


class Life(World):
    """Requests of all qualities at random, with what their pages hold: the key of the block and what was lost."""

    BLOCK = 16

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        super().__init__(self.rng.randrange(8, 30))
        self.content: dict[int, tuple[bytes, float]] = {}  # by block
        self.levels: dict[str, dict[int, str]] = {}  # by request, of blocks that were loaded
        self.runtime.exact_pool.write = self._written
        self._refining: tuple[str, float] | None = None
        self.documents = [[self.rng.randrange(3) for _ in range(200)] for _ in range(2)]
        self.num_submitted = 0
        self.pinned: list[Sequence] = []  # a blob is being decoded, say

    def _written(self, table: list[int], start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        assert self._refining is not None
        key, kl = self._refining
        for index in range(start // self.BLOCK, (start + k.shape[1]) // self.BLOCK):
            name, lost = self.content[table[index]]
            assert name == self.requests[key].chain.blocks(self.BLOCK)[index]
            self.content[table[index]] = name, kl
            assert lost >= kl, "better pages were overwritten"

    # -- what happens ----------------------------------------------------------------------------------------------

    def new_request(self) -> None:
        self.num_submitted += 1
        rng, document = self.rng, self.rng.choice(self.documents)
        tokens = document[: rng.randrange(1, 6 * self.BLOCK)] + [9] * rng.choice([0, 0, 3])
        if (len(tokens) + 100) // self.BLOCK + 1 > self.pages._blocks.num_blocks:
            return
        key = f"r{self.num_submitted}"
        self.levels[key] = {}
        self.submit(key, tokens, rng.choice(list(KL)), max_tokens=rng.choice([1, 5, 100]))

    def fill(self, key: str, sequence: Sequence) -> None:
        """All that has to be there, up to the tail; then that."""
        state = self.requests[key]
        assert state.pages is not None
        blocks, chain = state.pages.blocks, state.chain
        last = (state.fill_tokens - 1) // self.BLOCK
        for index in range(state.pages.cached_tokens // self.BLOCK, last):
            level = self.rng.choice([name for name, kl in KL.items() if kl <= (state.max_kl or 0.0)])
            start, stop = index * self.BLOCK, (index + 1) * self.BLOCK
            self.content[blocks[index]] = chain.blocks(self.BLOCK)[index], KL[level]
            self.levels[key][index] = level
            self.pages.loaded(state.pages, start, stop, level)
        self.pages.share(state.pages, last * self.BLOCK)
        sequence.phase = Phase.TAIL
        self.compute(key, max(last * self.BLOCK, state.pages.cached_tokens), state.fill_tokens)
        sequence.phase = Phase.RUNNING
        self.holders.filled(key)
        self.holders.admit(0.0)

    def compute(self, key: str, start: int, stop: int) -> None:
        state = self.requests[key]
        assert state.pages is not None
        blocks, keys = state.pages.blocks, state.chain.blocks(self.BLOCK)
        lost = max((self.content[block][1] for block in blocks[: start // self.BLOCK]), default=0.0)
        for index in range(start // self.BLOCK, -(-stop // self.BLOCK)):
            before = self.content[blocks[index]][1] if index * self.BLOCK < start else 0.0
            name = keys[index] if index < len(keys) else b""
            self.content[blocks[index]] = name, max(lost, before)
        self.pages.computed(state.pages, start, stop)
        self.pages.share(state.pages, stop)

    def step(self) -> None:
        rows = self.scheduler.next_rows(0)
        rows = self.scheduler.rows_with_pages(
            rows, 0.0, grow=self.holders.grow, spill=lambda sequence: self.holders.spill(sequence, 0.0)
        )
        for row in rows:
            sequence = row.sequence
            self.compute(sequence.key, row.start, row.stop)
            self.drawn(sequence)

    def drawn(self, sequence: Sequence) -> None:
        token = self.rng.randrange(3)
        sequence.output.append(token)
        self.requests[sequence.key].chain.extend([token])
        if len(sequence.output) == sequence.request.sampling.max_tokens:
            self.end(sequence.key)

    def refine(self, key: str) -> None:
        state = self.requests[key]
        if state.pages is None or not self.levels[key]:
            return
        index, level = self.rng.choice(sorted(self.levels[key].items()))
        better = self.rng.choice([name for name in KL if KL[name] <= KL[level]])
        self._refining, kv = (key, KL[better]), torch.zeros(1, self.BLOCK, 1, 1)
        self.pages.refine(state.pages, index * self.BLOCK, kv, kv, better)
        self.levels[key][index] = better

    def gives_up(self, sequence: Sequence) -> None:
        self.levels[sequence.key] = {}

    def act(self) -> None:
        rng = self.rng
        if rng.random() < 0.3 and len(self.requests) < 12:
            self.new_request()
        filling = self.scheduler.in_phase(Phase.FILLING)
        if filling and rng.random() < 0.6:
            sequence = rng.choice(filling)
            self.fill(sequence.key, sequence)
            self.drawn(sequence)
        self.step()
        running = self.scheduler.in_phase(Phase.RUNNING)
        if running and rng.random() < 0.3:
            self.refine(rng.choice(running).key)
        if running and rng.random() < 0.1:
            self.pinned.append(rng.choice(running))
            self.pinned[-1].pins += 1
        if self.pinned and rng.random() < 0.2:
            self.unpin()
        if self.requests and rng.random() < 0.03:
            self.end(rng.choice(sorted(self.requests)))

    def unpin(self) -> None:
        sequence = self.pinned.pop(0)
        sequence.pins -= 1
        self.holders.unpinned(sequence, 0.0)

    def check(self) -> None:
        self.holders.check_integrity()
        for sequence in self.scheduler.in_phase(Phase.RUNNING):
            state = self.requests[sequence.key]
            keys, num_written = state.chain.blocks(self.BLOCK), sequence.num_tokens - 1
            for index in range(num_written // self.BLOCK):
                name, lost = self.content[sequence.block_table[index]]
                assert name == keys[index], "a page holds something else"
                assert state.pages is not None
                tag = self.pages.worst_kl(state.pages, index * self.BLOCK, (index + 1) * self.BLOCK)
                assert tag is not None and lost <= tag <= (state.max_kl or 0.0), (lost, tag, state.max_kl)


@pytest.mark.parametrize("seed", range(60))
def test_pages_hold_what_their_requests_count_on(seed: int) -> None:
    """Whoever came, gave way, was cancelled, or refined what others share."""
    life = Life(seed)
    for _ in range(150):
        life.act()
        life.check()
    for key in sorted(life.requests):
        life.end(key)
    while life.pinned:
        life.unpin()
    life.holders.check_integrity()
    life.pages.forget_cached()
    assert life.pages.usage() == 0.0 and life.pages.num_cached == 0
