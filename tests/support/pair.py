"""A prefill and a decode worker in this process, over real sockets, around one small random model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_models import loaded, random_model

from codec.profile import Promise, default_profile
from decode.requests import GenerationRequest, SamplingParams
from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.block_pool import BlockPool
from prefill.engine import Engine, generate_greedy
from prefill.kv_pool import KVPool
from prefill.quantized_pool import QuantizedKVPool
from prefill.runtime import BLOCK_TOKENS, ModelRuntime
from prefill.store import ChunkStore
from prefill.worker import PrefillWorker
from transport.stream_client import StreamClient

LATEST_S = 60.0  # no wait in here is longer; a busy machine is ten times slower


def make_runtime(
    *,
    dtype: torch.dtype = torch.bfloat16,
    num_blocks: int = 1024,
    pages: str = "auto",
    num_rings: int = 16,
    page_kl: float = 0.0,
    promises: Mapping[str, float] | None = None,
) -> ModelRuntime:
    """pages: "auto", or a kind of quantized ones, which lose `page_kl`. promises: by level, nats a token; without them
    no lossy level promises anything."""
    model = loaded(random_model("llama", dtype))
    pool: KVPool | QuantizedKVPool
    if pages == "auto":
        pool = KVPool(model.layout, num_blocks, BLOCK_TOKENS)
    else:
        pool = QuantizedKVPool(model.layout, num_blocks, pages, num_rings)
    profile = default_profile(model.layout, fingerprint=model.fingerprint)
    if promises is not None:
        profile = replace(profile, promise={**profile.promise, **{at: Promise(kl=kl) for at, kl in promises.items()}})
    return ModelRuntime(
        model=model,
        profile=profile,
        pool=pool,
        allocator=BlockPool(num_blocks),
        engine=Engine(model, pool, row_multiple=64),
        page_kl=page_kl,
    )


class Asking:
    """A request on its way. `end`: its last event, None before that and if it was left."""

    def __init__(self, endpoint: str, body: dict[str, Any]) -> None:
        self.tokens: list[int] = []
        self.answers: list[dict[str, Any]] = []  # as they came
        self.end: dict[str, Any] | None = None
        self._endpoint, self._body = endpoint, body
        self._is_leaving = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    async def _run(self) -> None:
        client = StreamClient(self._endpoint)

        async def read() -> None:
            async for event in stream:
                self.answers.append(event)
                self.tokens += event.get("tokens", [])
                if event.keys() & {"finished", "failed", "refused"}:
                    self.end = event

        try:
            async with client.submit(self._body) as stream:
                reader = asyncio.create_task(read())
                while not reader.done() and not self._is_leaving.is_set():  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
        finally:
            await client.close()

    def leave(self) -> None:
        self._is_leaving.set()
        self._thread.join(LATEST_S)
        assert not self._thread.is_alive()

    def wait(self) -> dict[str, Any]:
        """Its last event."""
        until(lambda: not self._thread.is_alive())
        assert self.end is not None, "the stream ended without an end"
        return self.end

    def receipt(self) -> dict[str, Any]:
        end = self.wait()
        assert "finished" in end, end
        return end["finished"]["receipt"]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LATEST_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


class Gate:
    """Keeps a thread from calling a method on until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, when: Callable[..., bool]) -> None:
        original = getattr(owner, method)
        self._open = threading.Event()
        self.reached = threading.Event()

        def held(*args: Any, **options: Any) -> Any:
            if when(*args, **options):
                self.reached.set()
                assert self._open.wait(LATEST_S)
            return original(*args, **options)

        monkeypatch.setattr(owner, method, held)

    def wait(self) -> None:
        assert self.reached.wait(LATEST_S)

    def open(self) -> None:
        self._open.set()


def on_thread(name: str) -> Callable[..., bool]:
    return lambda *_, **__: threading.current_thread().name == name


class Pair:
    """Prompts go in, answers come out; `reference` is the same engine without disaggregation."""

    def __init__(self, prefill: PrefillWorker, decode: DecodeWorker, alone: ModelRuntime) -> None:
        self.prefill, self.decode, self.alone = prefill, decode, alone

    def reference(self, token_ids: list[int], max_tokens: int) -> list[int]:
        return generate_greedy(self.alone.engine, self.alone.allocator, token_ids, max_tokens)

    def body(
        self,
        token_ids: list[int],
        *,
        max_tokens: int = 8,
        with_source: bool = True,
        endpoints: Sequence[str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """endpoints: of the sources, if it is not the pair's own."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(
            request_id=options.pop("request_id", f"r{time.monotonic_ns()}"),
            token_ids=tuple(token_ids),
            sampling=options.pop("sampling", sampling),
            **options,
        )
        if endpoints is None:
            endpoints = [self.prefill.endpoint] if with_source else []
        sources = [
            {"id": f"prefill-{index}", "endpoint": endpoint, "public_key": None}
            for index, endpoint in enumerate(endpoints)
        ]
        return {"kind": "generate", "request": request.to_wire(), "sources": sources}

    def ask(self, token_ids: list[int], **options: Any) -> tuple[list[int], dict[str, Any]]:
        """The tokens and the receipt of one request."""
        return self.ask_all([self.body(token_ids, **options)])[0]

    def ask_all(self, bodies: list[dict[str, Any]]) -> list[tuple[list[int], dict[str, Any]]]:
        """The same for many at once."""

        async def one(client: StreamClient, body: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
            tokens: list[int] = []
            async for event in client.submit(body):
                if "refused" in event or "failed" in event:
                    return [], event
                tokens += event.get("tokens", [])
                if "finished" in event:
                    return tokens, event["finished"]["receipt"]
            raise AssertionError("the stream ended without an end")

        async def everything() -> list[tuple[list[int], dict[str, Any]]]:
            client = StreamClient(self.decode.endpoint)
            try:
                return await asyncio.wait_for(asyncio.gather(*(one(client, body) for body in bodies)), 120)
            finally:
                await client.close()

        return asyncio.run(everything())

    def begin(self, token_ids: list[int], **options: Any) -> Asking:
        """A request in a thread of its own."""
        return Asking(self.decode.endpoint, self.body(token_ids, **options))

    def check(self) -> None:
        """Nothing is left behind anywhere."""
        assert self.prefill.wait_until_idle(30)
        deadline = time.monotonic() + 10
        while self.decode.stats()["kv_cache_usage_perc"] and time.monotonic() < deadline:
            time.sleep(0.01)
        self.decode.check_integrity()
        self.prefill.check_integrity()
        assert self.decode.stats()["kv_cache_usage_perc"] == 0
        assert not self.decode._requests and not self.decode._holders._ended
        assert self.decode._puller._links.num_shares == 0
        assert self.decode._puller._client.num_transfers == 0
        while len(self.prefill._transfers) and time.monotonic() < deadline:
            time.sleep(0.01)  # the goodbye is on its way
        assert len(self.prefill._transfers) == 0


@contextmanager
def around(
    runtime: Callable[[], ModelRuntime],
    *,
    policy: SLOPolicy | None = None,
    chunk_tokens: int = 256,
    prefix_caching: bool = False,
    store: ChunkStore | None = None,
    prefill_runtime: Callable[[], ModelRuntime] | None = None,
) -> Iterator[Pair]:
    """A pair whose workers each have a runtime of their own, as they would in processes of their own. Without prefix
    caching every prompt has to come over the link, however often it is asked. prefill_runtime: if it differs."""
    prefill = PrefillWorker((prefill_runtime or runtime)())
    decode = DecodeWorker(
        runtime(),
        policy=policy or SLOPolicy(ttft_s=30.0),
        chunk_tokens=chunk_tokens,
        prefix_caching=prefix_caching,
        store=store,
    )
    try:
        yield Pair(prefill, decode, runtime())
    finally:
        decode.shutdown()
        prefill.shutdown()


def running_pair(
    *, policy: SLOPolicy | None = None, num_blocks: int = 1024, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> AbstractContextManager[Pair]:
    """Around the small random model. options: as for `around`."""
    return around(lambda: make_runtime(dtype=dtype, num_blocks=num_blocks), policy=policy, **options)
