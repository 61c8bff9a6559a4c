"""The quality of KV blocks, against a model that keeps, for every token, all that went into it."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefill.block_pool import BlockPool
from prefill.page_quality import EXACT, UNKNOWN, PageQuality

Q1, Q2, Q3 = 0.001, 0.01, 0.1


@pytest.fixture
def pages() -> PageQuality:
    return PageQuality()


def test_a_loaded_block_is_as_good_as_it_was_loaded(pages: PageQuality) -> None:
    pages.filled([1, 2], Q2)
    pages.filled([3], EXACT)
    assert pages.worst([1, 2]) == Q2 and pages.worst([3]) == EXACT and pages.worst([1, 3]) == Q2
    assert pages.meets([1, 2, 3], Q2) and pages.meets([3], EXACT) and not pages.meets([3, 1], Q1)
    assert pages.worst([]) == EXACT and pages.meets([], EXACT)


def test_unknown_quality_meets_no_number(pages: PageQuality) -> None:
    pages.filled([1], UNKNOWN)
    assert not pages.meets([1], 1e9) and pages.meets([1], UNKNOWN)


def test_what_is_computed_inherits_the_worst_below_it(pages: PageQuality) -> None:
    pages.filled([1], Q1)
    pages.filled([2], Q3)
    pages.computed([3, 4], below=[1, 2])
    pages.computed([5], below=[1])
    assert (pages.worst([3]), pages.worst([4]), pages.worst([5])) == (Q3, Q3, Q1)
    pages.computed([6], below=[5])
    assert pages.worst([6]) == Q1
    pages.computed([7], below=[])
    assert pages.worst([7]) == EXACT


def test_refining_lowers_the_tag_of_what_was_loaded_only(pages: PageQuality) -> None:
    pages.filled([1, 2], Q3)
    pages.computed([3], below=[1, 2])
    pages.refined([1, 2], Q1)
    assert pages.worst([1, 2]) == Q1
    assert pages.worst([3]) == Q3, "it was computed on the coarse KV"
    pages.computed([4], below=[1, 2])
    assert pages.worst([4]) == Q1
    pages.computed([5], below=[1, 2, 3])
    assert pages.worst([5]) == Q3


def test_a_block_filled_token_by_token_keeps_the_worst_it_ever_saw(pages: PageQuality) -> None:
    pages.filled([1], Q3)
    pages.computed([2], below=[1, 2])  # its own earlier tokens are below it too
    pages.refined([1], Q1)
    pages.computed([2], below=[1, 2])
    assert pages.worst([2]) == Q3
    pages.filled([2], Q1)  # all of it anew
    assert pages.worst([2]) == Q1


def test_a_released_block_holds_nothing(pages: PageQuality) -> None:
    pages.filled([1], Q1)
    pages.released([1, 2])
    assert len(pages) == 0
    for use in (
        lambda: pages.worst([1]),
        lambda: pages.meets([1], Q3),
        lambda: pages.refined([1], EXACT),
        lambda: pages.computed([2], below=[1]),
    ):
        with pytest.raises(AssertionError, match="holds nothing"):
            use()


@pytest.mark.parametrize("kl", [-0.1, math.nan])
def test_what_is_no_quality_is_a_bug(pages: PageQuality, kl: float) -> None:
    pages.filled([1], Q1)
    for use in (lambda: pages.filled([1], kl), lambda: pages.refined([1], kl), lambda: pages.meets([1], kl)):
        with pytest.raises(AssertionError):
            use()


def test_a_tag_left_on_a_freed_block_is_found(pages: PageQuality) -> None:
    allocator = BlockPool(4)
    blocks = allocator.allocate(2)
    pages.filled(blocks, Q1)
    pages.check_integrity(allocator)
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="was freed"):
        pages.check_integrity(allocator)
    pages.released(blocks)
    pages.check_integrity(allocator)


NUM_BLOCKS = 6
qualities = st.sampled_from([EXACT, Q1, Q2, Q3, UNKNOWN])
some_blocks = st.lists(st.integers(0, NUM_BLOCKS - 1), unique=True, max_size=NUM_BLOCKS)


class Pages(RuleBasedStateMachine):
    """The model: per block what it was loaded at, and a list of all qualities of KV that it was ever computed on."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockPool(NUM_BLOCKS)
        self.pages = PageQuality()
        self.loaded: dict[int, float] = {}
        self.seen: dict[int, list[float]] = {}
        self.used: list[int] = []

    def model(self, block: int) -> float:
        return max([self.loaded.get(block, EXACT), *self.seen[block]])

    def held(self, blocks: list[int]) -> list[int]:
        return [block for block in blocks if block in self.seen]

    @rule(count=st.integers(1, 3))
    def allocate(self, count: int) -> None:
        if self.allocator.can_allocate(count):
            self.used += self.allocator.allocate(count)

    @rule(blocks=some_blocks, kl=qualities)
    def fill(self, blocks: list[int], kl: float) -> None:
        blocks = [block for block in blocks if block in self.used]
        self.pages.filled(blocks, kl)
        for block in blocks:
            self.loaded[block], self.seen[block] = kl, []

    @precondition(lambda self: self.used)
    @rule(blocks=some_blocks, below=some_blocks)
    def compute(self, blocks: list[int], below: list[int]) -> None:
        blocks = [block for block in blocks if block in self.used]
        below = [block for block in below if block in self.seen or block in blocks]
        found = [self.model(block) for block in below if block in self.seen]
        self.pages.computed(blocks, below)
        for block in blocks:
            self.seen.setdefault(block, []).extend(found)

    @rule(blocks=some_blocks, kl=qualities)
    def refine(self, blocks: list[int], kl: float) -> None:
        blocks = self.held(blocks)
        self.pages.refined(blocks, kl)
        for block in blocks:
            self.loaded[block] = kl

    @rule(blocks=some_blocks)
    def release(self, blocks: list[int]) -> None:
        blocks = [block for block in blocks if block in self.used]
        self.pages.released(blocks)
        self.allocator.release(blocks)
        for block in blocks:
            self.used.remove(block)
            self.loaded.pop(block, None)
            self.seen.pop(block, None)

    @rule(blocks=some_blocks, kl=qualities)
    def ask(self, blocks: list[int], kl: float) -> None:
        blocks = self.held(blocks)
        assert self.pages.meets(blocks, kl) == all(self.model(block) <= kl for block in blocks)
        assert self.pages.worst(blocks) == max([self.model(block) for block in blocks], default=EXACT)

    @invariant()
    def tags_are_those_of_the_model(self) -> None:
        self.pages.check_integrity(self.allocator)
        assert len(self.pages) == len(self.seen)
        assert all(self.pages.worst([block]) == self.model(block) for block in self.seen)


Pages.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
TestPages = Pages.TestCase


def test_a_block_that_lacks_layers_is_known_until_it_is_filled_anew(pages: PageQuality) -> None:
    pages.filled([1, 2], 0.0, whole_from=70)
    pages.filled([3], 0.0, whole_from=90)
    pages.filled([4], 0.0)
    assert [pages.whole_from(blocks) for blocks in ([4, 1], [1, 3, 2], [4], [])] == [70, 90, 0, 0]
    assert pages.meets([1, 2, 3], 0.0), "whoever has it lacks nothing that it needs"
    pages.filled([1], 0.1)
    pages.released([2])
    assert pages.whole_from([1, 2]) == 0 and pages.whole_from([3]) == 90
