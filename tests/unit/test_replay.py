"""A plan that came with a request: every mistake is named, and what happened once is read back as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.fill_chunks import TEXT, ChunkLog, Refinement
from decode.replay import BadPlan, Replay, ReplayStep, plan_of, read_replay

KNOWN = ("raw", "lossless", "q1", "q2", "q3")


def plan(**changes: Any) -> dict[str, Any]:
    return {"chunk_tokens": 64, "levels": ["q3", "q2", TEXT], "refinements": [], **changes}


def read(found: Any) -> Replay:
    return read_replay(found, num_chunks=3, chunk_tokens=64, known=KNOWN)


def step(chunk: Any = 0, level: Any = "q1", after_tokens: Any = 2) -> dict[str, Any]:
    return {"chunk": chunk, "level": level, "after_tokens": after_tokens}


def test_a_plan_is_read() -> None:
    found = read(plan(refinements=[step(1, "q1", 9), step(0, "q2", 4)]))
    assert found.levels == ("q3", "q2", TEXT)
    assert found.steps == (
        ReplayStep(chunk=0, level="q2", after_tokens=4),
        ReplayStep(chunk=1, level="q1", after_tokens=9),
    )


def test_refinements_may_be_left_out() -> None:
    without = plan()
    del without["refinements"]
    assert read(without).steps == ()


def test_a_prompt_without_chunks_has_a_plan() -> None:
    empty = read_replay({"chunk_tokens": 64, "levels": []}, num_chunks=0, chunk_tokens=64, known=KNOWN)
    assert empty == Replay(levels=(), steps=())


def test_a_chunk_may_rise_twice_even_after_the_same_token() -> None:
    found = read(plan(refinements=[step(0, "q2", 4), step(0, "q1", 4), step(0, "raw", 5)]))
    assert [(s.level, s.after_tokens) for s in found.steps] == [("q2", 4), ("q1", 4), ("raw", 5)]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (None, "a plan has chunk_tokens, levels"),
        ([], "a plan has chunk_tokens, levels"),
        ("plan", "a plan has chunk_tokens, levels"),
        ({}, "'chunk_tokens'"),
        ({"chunk_tokens": 64}, "'levels'"),
        (plan(levels=None), "a plan has"),
        (plan(levels=7), "a plan has"),
        (plan(refinements=None), "a plan has"),
        (plan(refinements=[3]), "a plan has"),
        (plan(refinements=["chunk"]), "a plan has"),
        (plan(refinements=[{"chunk": 0, "level": "q1"}]), "'after_tokens'"),
        (plan(refinements=[{"chunk": 0, "after_tokens": 1}]), "'level'"),
        (plan(chunk_tokens=128), "chunks of 128 tokens, this server uses 64"),
        (plan(chunk_tokens="64"), "chunks of 64 tokens, this server uses 64"),
        (plan(levels=["q3"]), "it has 1 chunks, this prompt has 3"),
        (plan(levels=["q3"] * 4), "it has 4 chunks, this prompt has 3"),
        (plan(levels=["q3", "q9", TEXT]), "'q9'; known are raw, lossless, q1, q2, q3"),
        (plan(levels=["q3", "", TEXT]), "it names level ''"),
        (plan(levels=["q3", None, TEXT]), "it names level None"),
        (plan(levels=["q3", ["q2"], TEXT]), "it names level ['q2']"),
        (plan(levels=["q3", {"q2": 1}, TEXT]), "it names level {'q2': 1}"),
        (plan(refinements=[step(level="q3>q1")]), "it names level 'q3>q1'"),
        (plan(refinements=[step(level=None)]), "it names level None"),
        (plan(refinements=[step(chunk=3)]), "chunk 3 after 2 tokens"),
        (plan(refinements=[step(chunk=-1)]), "chunk -1 after 2 tokens"),
        (plan(refinements=[step(chunk="0")]), "chunk '0' after 2 tokens"),
        (plan(refinements=[step(chunk=True)]), "chunk True after 2 tokens"),
        (plan(refinements=[step(chunk=None)]), "chunk None after 2 tokens"),
        (plan(refinements=[step(after_tokens=0)]), "chunk 0 after 0 tokens"),
        (plan(refinements=[step(after_tokens=-1)]), "chunk 0 after -1 tokens"),
        (plan(refinements=[step(after_tokens="2")]), "chunk 0 after '2' tokens"),
        (plan(refinements=[step(after_tokens=None)]), "chunk 0 after None tokens"),
        (plan(refinements=[step(after_tokens=1.5)]), "chunk 0 after 1.5 tokens"),
        (plan(refinements=[step(after_tokens=float("nan"))]), "chunk 0 after nan tokens"),
        (plan(refinements=[step(), step(after_tokens="2")]), "chunk 0 after '2' tokens"),
        (plan(refinements=[step(chunk=2)]), "chunk 2 from text to q1: not better"),
        (plan(refinements=[step(level=TEXT)]), "chunk 0 from q3 to text: not better"),
        (plan(refinements=[step(level="q3")]), "chunk 0 from q3 to q3: not better"),
        (plan(refinements=[step(1, "q3")]), "chunk 1 from q2 to q3: not better"),
        (plan(refinements=[step(0, "q1", 2), step(0, "q2", 3)]), "chunk 0 from q1 to q2: not better"),
        (plan(refinements=[step(0, "q2", 3), step(0, "q1", 2)]), "chunk 0 from q1 to q2: not better"),
    ],
)
def test_every_mistake_is_named(bad: Any, says: str) -> None:
    with pytest.raises(BadPlan) as found:
        read(bad)
    assert says in str(found.value)


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 70),
        st.floats(),
        st.sampled_from([*KNOWN, TEXT, "chunk", "level", ""]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["chunk_tokens", "levels", "refinements", "chunk", "level", "after_tokens"]), inner
        ),
    ),
    max_leaves=12,
)


@given(
    st.one_of(
        json_values,
        st.fixed_dictionaries(
            {
                "chunk_tokens": st.just(64),
                "levels": st.lists(st.sampled_from([*KNOWN, TEXT]), min_size=3, max_size=3),
                "refinements": st.lists(
                    st.fixed_dictionaries({"chunk": json_values, "level": json_values, "after_tokens": json_values}),
                    max_size=3,
                ),
            }
        ),
    )
)
def test_anything_else_is_a_bad_plan_and_no_other_error(found: Any) -> None:
    try:
        replay = read(found)
    except BadPlan:
        return
    assert len(replay.levels) == 3 and set(replay.levels) <= {*KNOWN, TEXT}
    assert all(type(s.after_tokens) is int and s.after_tokens >= 1 and 0 <= s.chunk < 3 for s in replay.steps)
    assert list(replay.steps) == sorted(replay.steps, key=lambda s: s.after_tokens)


# -- there and back -----------------------------------------------------------------------------------------------


def log_of(first: str, later: list[tuple[str, int]]) -> ChunkLog:
    steps = [Refinement(level=at, bytes=1, asked_at=0.0, applied_at=0.0, after_tokens=after) for at, after in later]
    return ChunkLog(first_level=first, level=later[-1][0] if later else first, refinements=steps)


def test_what_was_refined_before_the_first_token_is_its_level_there() -> None:
    found = plan_of([log_of("q1", [("q2", 0), ("q1", 0)]), log_of(TEXT, [])], 64)
    assert found == {"chunk_tokens": 64, "levels": ["q1", TEXT], "refinements": []}


@st.composite
def logs(draw: st.DrawFn) -> list[ChunkLog]:
    """Chunks as a fill leaves them: each rises, at tokens that never go back."""
    made = []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            made.append(log_of(TEXT, []))
            continue
        levels = draw(st.lists(st.sampled_from(KNOWN), min_size=1, unique=True))
        levels.sort(key=KNOWN.index, reverse=True)
        after = sorted(draw(st.lists(st.integers(1, 50), min_size=len(levels) - 1, max_size=len(levels) - 1)))
        made.append(log_of(levels[0], list(zip(levels[1:], after))))
    return made


@given(logs())
def test_a_receipts_plan_can_be_followed_and_says_the_same_again(chunks: list[ChunkLog]) -> None:
    made = plan_of(chunks, 64)
    replay = read_replay(json.loads(json.dumps(made)), num_chunks=len(chunks), chunk_tokens=64, known=KNOWN)
    at = list(replay.levels)
    assert at == [log.first_level for log in chunks]
    for s in replay.steps:
        at[s.chunk] = s.level
    assert at == [log.level for log in chunks]
    again = [
        log_of(level, [(s.level, s.after_tokens) for s in replay.steps if s.chunk == index])
        for index, level in enumerate(replay.levels)
    ]
    assert plan_of(again, 64) == made
