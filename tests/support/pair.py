"""A prefill and a decode worker in this process, over real sockets, around one small random model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from engine_models import loaded, random_model

from codec.profile import default_profile
from decode.requests import GenerationRequest, SamplingParams
from decode.slo import SLOPolicy
from decode.worker import DecodeWorker
from prefill.block_allocator import BlockAllocator
from prefill.engine import Engine, generate_greedy
from prefill.kv_pool import KVPool
from prefill.runtime import BLOCK_TOKENS, ModelRuntime
from prefill.worker import PrefillWorker
from transport.stream_client import StreamClient


def make_runtime(*, dtype: torch.dtype = torch.bfloat16, num_blocks: int = 1024) -> ModelRuntime:
    model = loaded(random_model("llama", dtype))
    pool = KVPool(model.layout, num_blocks, BLOCK_TOKENS)
    return ModelRuntime(
        model=model,
        profile=default_profile(model.layout, fingerprint=model.fingerprint),
        pool=pool,
        allocator=BlockAllocator(num_blocks),
        engine=Engine(model, pool, row_multiple=64),
    )


class Pair:
    """Prompts go in, answers come out; `reference` is the same engine without disaggregation."""

    def __init__(self, prefill: PrefillWorker, decode: DecodeWorker, alone: ModelRuntime) -> None:
        self.prefill, self.decode, self.alone = prefill, decode, alone

    def reference(self, token_ids: list[int], max_tokens: int) -> list[int]:
        return generate_greedy(self.alone.engine, self.alone.allocator, token_ids, max_tokens)

    def body(
        self, token_ids: list[int], *, max_tokens: int = 8, with_source: bool = True, **options: Any
    ) -> dict[str, Any]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(
            request_id=options.pop("request_id", f"r{time.monotonic_ns()}"),
            token_ids=tuple(token_ids),
            sampling=options.pop("sampling", sampling),
            **options,
        )
        source = {"id": "prefill-0", "endpoint": self.prefill.endpoint, "public_key": None}
        return {"kind": "generate", "request": request.to_wire(), "source": source if with_source else None}

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

    def check(self) -> None:
        """Nothing is left behind anywhere."""
        assert self.prefill.wait_until_idle(30)
        deadline = time.monotonic() + 10
        while self.decode.stats()["kv_cache_usage_perc"] and time.monotonic() < deadline:
            time.sleep(0.01)
        self.decode.check_integrity()
        self.prefill.check_integrity()
        assert self.decode.stats()["kv_cache_usage_perc"] == 0


@contextmanager
def around(
    runtime: Callable[[], ModelRuntime], *, policy: SLOPolicy | None = None, chunk_tokens: int = 256
) -> Iterator[Pair]:
    """A pair whose workers each have a runtime of their own, as they would in processes of their own."""
    prefill = PrefillWorker(runtime())
    decode = DecodeWorker(runtime(), policy=policy or SLOPolicy(ttft_s=30.0), chunk_tokens=chunk_tokens)
    try:
        yield Pair(prefill, decode, runtime())
    finally:
        decode.shutdown()
        prefill.shutdown()


def running_pair(
    *, policy: SLOPolicy | None = None, chunk_tokens: int = 256, **options: Any
) -> AbstractContextManager[Pair]:
    """Around the small random model."""
    return around(lambda: make_runtime(**options), policy=policy, chunk_tokens=chunk_tokens)
