"""Several requests as one: the choices of `n`, and several prompts. They run at once and are merged. No HTTP.

What a client gets is all of them or an error: nothing is passed on before each has its first token (until then a
failure can still have its HTTP status), and if one fails, the others are cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from cluster.completion import Done
from cluster.detokenize import Piece

MAX_UNREAD = 2  # of one run

Run = AsyncGenerator[Piece | Done, None]


async def merge(runs: Sequence[Run]) -> AsyncGenerator[tuple[int, Piece | Done], None]:
    """(index, what that run gave), as they come; each run's last is Done. Raises what the first to fail raises.
    Closing closes all runs."""
    if len(runs) == 1:
        async with aclosing(runs[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Piece | Done | Exception]] = asyncio.Queue()
    # A client that reads slowly slows every run, as it slows a single one; and no run gets ahead of the others.
    permits = [asyncio.Semaphore(MAX_UNREAD) for _ in runs]
    pumps = [asyncio.create_task(_pump(i, run, queue, permits[i])) for i, run in enumerate(runs)]
    try:
        silent, num_running = set(range(len(runs))), len(runs)
        held: list[tuple[int, Piece | Done]] = []
        while num_running:
            index, found = await queue.get()
            if isinstance(found, Exception):
                raise found
            permits[index].release()
            num_running -= isinstance(found, Done)
            silent.discard(index)
            held.append((index, found))
            if not silent:
                for each in held:
                    yield each
                held = []
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int, run: Run, queue: asyncio.Queue[tuple[int, Piece | Done | Exception]], permits: asyncio.Semaphore
) -> None:
    async with aclosing(run):
        try:
            async for item in run:
                await permits.acquire()
                queue.put_nowait((index, item))
        except Exception as error:
            queue.put_nowait((index, error))
