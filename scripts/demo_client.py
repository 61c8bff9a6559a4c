"""One streamed completion as a client sees it: times of the tokens, the tokens, the KV receipt."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came back. Times are seconds since the request was sent."""

    token_ids: list[int] = field(default_factory=list)
    token_at_s: list[float] = field(default_factory=list)
    receipt: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        return self.token_at_s[0]


async def ask(
    client: httpx.AsyncClient,
    prompt: list[int],
    *,
    max_tokens: int,
    kv: dict[str, Any] | None = None,
    ignore_eos: bool = False,
) -> Answer:
    """Ask for a greedy completion of a prompt given as token ids. Raises RuntimeError with the server's message."""
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
        "ignore_eos": ignore_eos,
        "kv": kv or {},
    }
    answer = Answer()
    begin = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            tokens = event["choices"][0].get("token_ids") if event["choices"] else None
            for token in tokens or ():
                answer.token_ids.append(token)
                answer.token_at_s.append(time.perf_counter() - begin)
            answer.receipt = event.get("kv_receipt") or answer.receipt
    return answer
