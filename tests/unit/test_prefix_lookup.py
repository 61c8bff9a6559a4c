"""The gateway's question to the index: with the right keys, in time or not at all."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.prefix_lookup
from cluster.prefix_index import Coverage
from cluster.prefix_lookup import RETRY_S, PrefixLookup
from prefill.chunks import chunk_keys

TOKENS = list(range(100))


class Controller:
    """Answers, or fails, or never answers."""

    def __init__(self, how: str = "answers") -> None:
        self.how, self.asked = how, list[bytes]()

    async def holders(self, keys: bytes) -> dict[str, Any]:
        self.asked.append(keys)
        if self.how == "fails":
            raise RuntimeError("the actor died")
        if self.how == "hangs":
            await asyncio.Event().wait()
        return {"d0": ("d0-1", 3, 4, 0)}


def lookup(controller: Controller) -> PrefixLookup:
    return PrefixLookup(controller.holders, fingerprint="model", chunk_tokens=16)


def test_the_keys_are_those_of_the_prompts_chunks() -> None:
    controller = Controller()
    found = asyncio.run(lookup(controller).holders(TOKENS, "salt"))
    assert found == {"d0": Coverage(incarnation="d0-1", pages=3, ram=4)}
    assert controller.asked == [b"".join(chunk_keys(TOKENS, 16, fingerprint="model", cache_salt="salt"))]


@pytest.mark.parametrize(("num_tokens", "num_asked"), [(1, 0), (16, 0), (17, 1)])
def test_a_prompt_of_one_chunk_or_less_is_not_asked_for(num_tokens: int, num_asked: int) -> None:
    controller = Controller()
    asyncio.run(lookup(controller).holders(TOKENS[:num_tokens], ""))
    assert len(controller.asked) == num_asked


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_an_absent_controller_costs_one_wait_a_second(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.prefix_lookup, "TIMEOUT_S", 0.01)
    now = [100.0]
    monkeypatch.setattr(cluster.prefix_lookup, "time", SimpleNamespace(monotonic=lambda: now[0]))
    controller = Controller(how)
    asking = lookup(controller)

    async def scene() -> None:
        for _ in range(3):
            assert await asking.holders(TOKENS, "") == {}
        assert len(controller.asked) == 1 and asking.num_failed == 1
        now[0] += RETRY_S
        controller.how = "answers"
        assert await asking.holders(TOKENS, "") != {}

    asyncio.run(scene())
