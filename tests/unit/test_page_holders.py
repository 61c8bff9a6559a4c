"""Who holds pages and who waits for them, without an engine: the test does what the worker would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from codec.profile import Promise
from decode.active_request import ActiveRequest
from decode.page_holders import PageHolders
from decode.requests import GenerationRequest, SamplingParams
from decode.scheduler import Phase, Scheduler, Sequence
from decode.tagged_pages import TaggedPages
from prefill.block_pool import BlockPool

KL = {"lossless": 0.0, "q3": 0.1}


class World:
    """The worker's part of it."""

    def __init__(self, num_blocks: int = 64) -> None:
        profile = SimpleNamespace(level_names=tuple(KL), promise={name: Promise(kl=kl) for name, kl in KL.items()})
        runtime: Any = SimpleNamespace(
            pool=None, allocator=BlockPool(num_blocks), profile=profile, model=SimpleNamespace(fingerprint="f")
        )
        self.pages = TaggedPages(runtime, chunk_tokens=16)
        self.requests: dict[str, ActiveRequest] = {}
        self.scheduler = Scheduler(num_blocks=num_blocks)
        self.holders = PageHolders(owner=self, scheduler=self.scheduler, pages=self.pages, requests=self.requests)
        self.begun: list[str] = []

    def submit(self, key: str, tokens: list[int], level: str) -> None:
        request = GenerationRequest(request_id=key, token_ids=tuple(tokens), sampling=SamplingParams(max_tokens=4))
        state: Any = SimpleNamespace(
            request=request,
            chain=self.pages.chain(tokens, ""),
            max_kl=KL[level],
            pages=None,
            fill_tokens=len(tokens),
            prompt_tokens=len(tokens),
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
        blocks, stop = state.pages.blocks, state.prompt_tokens
        self.pages.loaded(blocks, state.pages.cached_tokens, stop, level)
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
