"""A backend and a tokenizer without a model, and a server around them, for tests of gateway and load generator."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI
from tokenizers import decoders, pre_tokenizers

from cluster.gateway import create_app
from cluster.openai_answers import ModelCard
from decode.requests import (
    FailedEvent,
    FinishedEvent,
    GenerationEvent,
    GenerationRequest,
    PromptLogprobsEvent,
    RequestRefused,
    TokenLogprobs,
    TokensEvent,
)

EOS = 256
MAX_CONTEXT = 512
LEVELS = ("raw", "lossless", "q1", "q2")


class ByteTokenizer:
    """A token per UTF-8 byte, spelled as byte-level BPE spells it; 256 ends a text."""

    chat_template = "yes"
    backend_tokenizer = SimpleNamespace(decoder=decoders.ByteLevel())
    added_tokens_decoder = {EOS: "<end>"}
    _spelling = sorted(pre_tokenizers.ByteLevel.alphabet())

    def convert_ids_to_tokens(self, token_id: int) -> str:
        printable = [char for char in self._spelling if ord(char) < 256]
        others = [char for char in self._spelling if ord(char) >= 256]
        bytes_of = {ord(char): char for char in printable}
        return bytes_of.get(token_id) or others[sum(byte not in bytes_of for byte in range(token_id))]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        if any(message["role"] == "wizard" for message in conversation):
            raise ValueError("no wizards")
        text = "".join(f"<{message['role']}>{message['content']}" for message in conversation)
        return text + ("<assistant>" if options["add_generation_prompt"] else "")


def logprobs_of(token: int, num_top: int) -> TokenLogprobs:
    """Bytes 200, 201, ... are the likeliest; the token itself is not among them but for them."""
    top = tuple((200 + i, -0.5 - i) for i in range(num_top))
    return TokenLogprobs(logprob=dict(top).get(token, -token / 10), rank=30, top=top)


class FakeBackend:
    """Answers every prompt with `reply`, byte by byte. A prompt may ask for trouble by what it says:

    "refuse": not admitted (429). "fail": fails after two tokens. "fail first": fails before any.
    "vanish": ends without a last event. "crash": raises. "hang": waits until cancelled. "unlucky": of several choices,
    the second fails before any token, when the first has begun.

    Of several choices each answers with its number behind the reply. Logprobs: see `logprobs_of`.
    """

    def __init__(self, reply: str = "héllo wörld €5", *, step_s: float = 0.0) -> None:
        self.reply = reply
        self.step_s = step_s
        self.requests: list[GenerationRequest] = []
        self.running = 0
        self.started = threading.Event()
        self.has_answered = threading.Event()
        self.cancelled = threading.Event()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        self.requests.append(request)
        prompt = bytes(i for i in request.token_ids if i < 256).decode(errors="replace")
        if "refuse" in prompt:
            raise RequestRefused("too busy; try again", status=429, code="overloaded")
        self.running += 1
        self.started.set()
        try:
            if "unlucky" in prompt and request.request_id.endswith("-1"):
                await asyncio.to_thread(self.has_answered.wait, 10)
            if "fail first" in prompt or ("unlucky" in prompt and request.request_id.endswith("-1")):
                yield FailedEvent(status=503, code="no_worker", message="no decode worker is left")
                return
            number = request.request_id.rpartition("-")[2] if request.group else ""
            tokens = [*f"{self.reply}{number}".encode(), EOS]
            num_top = request.sampling.prompt_logprobs
            for start in range(1, len(request.token_ids), 2) if num_top is not None else ():
                scored = tuple(logprobs_of(token, num_top) for token in request.token_ids[start : start + 2])
                yield PromptLogprobsEvent(start=start, logprobs=scored)
            num_top = request.sampling.logprobs
            wanted = request.sampling.max_tokens
            for n, token in enumerate(tokens[:wanted], start=1):
                await asyncio.sleep(self.step_s)
                logprobs = None if num_top is None else (logprobs_of(token, num_top),)
                yield TokensEvent(token_ids=(token,), logprobs=logprobs)
                self.has_answered.set()
                if n == 2:
                    if "fail" in prompt:
                        yield FailedEvent(status=502, code="worker_lost", message="the worker went away")
                        return
                    if "vanish" in prompt:
                        return
                    if "crash" in prompt:
                        raise RuntimeError("a bug")
                    if "hang" in prompt:
                        await asyncio.sleep(3600)
            yield FinishedEvent(
                finish_reason="stop" if wanted >= len(tokens) else "length",
                prompt_tokens=len(request.token_ids),
                completion_tokens=min(wanted, len(tokens)),
                receipt=self._receipt(request.request_id),
            )
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        finally:
            self.running -= 1

    def _receipt(self, request_id: str) -> dict[str, Any]:
        chunks = [{"index": 0, "level": "q1", "bytes": 1000}, {"index": 1, "level": "text", "bytes": 0}]
        return {"request_id": request_id, "chunks": chunks}

    async def metrics_text(self) -> str:
        return "kvstream_num_requests_waiting 0\n"

    async def health(self) -> dict[str, Any]:
        return {"status": "ok", "workers": 2}

    async def receipt(self, request_id: str) -> dict[str, Any] | None:
        known = any(request.request_id == request_id for request in self.requests)
        return self._receipt(request_id) if known else None


def make_app(backend: FakeBackend, **options: Any) -> FastAPI:
    """The gateway over a fake."""
    card = ModelCard(id="tiny", max_context=MAX_CONTEXT, vocab_size=257)
    return create_app(backend, models=[card], tokenizer=ByteTokenizer(), levels=LEVELS, eos_token_ids=(EOS,), **options)


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app under uvicorn in a thread, on a free port; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
