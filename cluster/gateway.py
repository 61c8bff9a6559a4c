"""The OpenAI-compatible HTTP front: a FastAPI app over a Backend. Knows neither Ray nor sockets nor models.

app = create_app(backend, models=[ModelCard(...)], tokenizer=tokenizer, levels=profile.level_names)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cluster.answer_stream import collect, events
from cluster.backend import Backend
from cluster.chat import Tokenizer, bad_word_ids, prompt_token_ids, render_chat
from cluster.completion import run_request
from cluster.fan_out import merge
from cluster.generation import Asked, answer_format, generation_requests, output_text
from cluster.http_shell import (
    ID_KEY,
    TENANT_KEY,
    ClientGone,
    EventStream,
    FrontDoor,
    error_response,
    on_client_gone,
    on_http_error,
    on_unexpected,
    to_json,
    unless_client_leaves,
)
from cluster.metrics import GatewayMetrics
from cluster.openai_answers import AnswerFormat, ModelCard
from cluster.openai_errors import APIError
from cluster.openai_schema import ChatBody, CompletionBody, GenerationBody, TokenizeBody, parse_body
from cluster.token_text import TokenTexts
from decode.requests import GenerationRequest

log = logging.getLogger(__name__)
T = TypeVar("T")

HEALTH_TIMEOUT_S = 5.0


def kvstream_version() -> str:
    """The installed version."""
    try:
        return version("kvstream")
    except PackageNotFoundError:
        return "unknown"


def create_app(
    backend: Backend,
    *,
    models: Sequence[ModelCard],
    tokenizer: Tokenizer,
    levels: Sequence[str],
    eos_token_ids: Collection[int] = (),
    api_keys: Mapping[str, str] | None = None,
    max_body_bytes: int = 8 * 2**20,
    stall_s: float = 60.0,
) -> FastAPI:
    """The app, ready for uvicorn. `levels`: the codec's, best first; the first model is the default. `api_keys`: by
    key, the tenant that it stands for, or ""; without any, no key is asked for."""
    gateway = Gateway(
        backend,
        models=models,
        tokenizer=tokenizer,
        levels=levels,
        eos_token_ids=eos_token_ids,
        stall_s=stall_s,
    )
    app = FastAPI(title="kvstream", version=kvstream_version(), docs_url=None, redoc_url=None)

    def post(path: str, endpoint: Callable[..., Any], schema: Any) -> None:
        body = {"content": {"application/json": {"schema": schema.model_json_schema()}}, "required": True}
        app.add_api_route(path, endpoint, methods=["POST"], openapi_extra={"requestBody": body})

    post("/v1/completions", gateway.completions, CompletionBody)
    post("/v1/chat/completions", gateway.chat_completions, ChatBody)
    post("/tokenize", gateway.tokenize, TokenizeBody)
    app.add_api_route("/v1/models", gateway.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{model_id:path}", gateway.show_model, methods=["GET"])
    app.add_api_route("/v1/receipts/{request_id}", gateway.receipt, methods=["GET"])
    app.add_api_route("/health", gateway.health, methods=["GET"])
    app.add_api_route("/metrics", gateway.metrics_text, methods=["GET"])
    app.add_api_route("/version", gateway.version, methods=["GET"])
    app.add_exception_handler(APIError, gateway.on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientGone, on_client_gone)
    app.add_exception_handler(Exception, on_unexpected)
    app.add_middleware(FrontDoor, api_keys=api_keys or {}, max_body_bytes=max_body_bytes)
    return app


class Gateway:
    """The endpoints and what they share."""

    def __init__(
        self,
        backend: Backend,
        *,
        models: Sequence[ModelCard],
        tokenizer: Tokenizer,
        levels: Sequence[str],
        eos_token_ids: Collection[int],
        stall_s: float,
    ) -> None:
        assert models, "a gateway serves at least one model"
        self._backend = backend
        self._models = {card.id: card for card in models}
        self._default_model = models[0]
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)
        self._levels = tuple(levels)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._stall_s = stall_s
        self._metrics = GatewayMetrics()
        self._in_flight: set[str] = set()
        # Tokenizing a long prompt takes milliseconds that other streams should not wait for; one thread, as
        # tokenizers are not promised to be safe with several.
        self._tokenizer_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    # -- generation--

    async def completions(self, request: Request) -> Response:
        body = parse_body(await request.body(), CompletionBody)
        return await self._answer(request, body, "completion")

    async def chat_completions(self, request: Request) -> Response:
        body = parse_body(await request.body(), ChatBody)
        return await self._answer(request, body, "chat")

    async def _answer(self, request: Request, body: GenerationBody, kind: Literal["completion", "chat"]) -> Response:
        card = self._card(body.model)
        asked, generations, answer = await self._off_loop(lambda: self._prepare(request, body, card, kind))
        request.scope[ID_KEY] = asked.request_id
        in_use = {asked.request_id, *(generation.request_id for generation in generations)}
        if in_use & self._in_flight:
            message = f"request_id {asked.request_id!r} is in use"
            raise APIError(409, message, code="request_id_in_use", param="request_id")
        self._in_flight |= in_use
        items = merge(
            [
                run_request(
                    self._backend,
                    generation,
                    output_text(body, self._tokenizer, self._eos_token_ids),
                    self._metrics,
                    counts_prompt=i % answer.n == 0,
                )
                for i, generation in enumerate(generations)
            ]
        )

        async def close() -> None:
            self._in_flight -= in_use
            await items.aclose()

        try:
            if not body.stream:
                try:
                    whole = await unless_client_leaves(request.receive, collect(items, answer))
                finally:
                    await close()
                return Response(to_json(whole), media_type="application/json")
            # Nothing is promised to the client before the first token: a request that fails until then gets its
            # HTTP status, not a stream that starts well.
            first = await unless_client_leaves(request.receive, anext(items))
        except BaseException:
            await close()
            raise
        return EventStream(events(first, items, answer, self._metrics), close=close, stall_s=self._stall_s)

    def _prepare(
        self, request: Request, body: GenerationBody, card: ModelCard, kind: Literal["completion", "chat"]
    ) -> tuple[Asked, list[GenerationRequest], AnswerFormat]:
        """All that is to be known before anything is asked of workers. In the tokenizer's thread."""
        asked = Asked(
            kind=kind,
            request_id=body.request_id if body.request_id is not None else request.scope[ID_KEY],
            tenant=request.scope.get(TENANT_KEY, ""),
            headers=request.headers,
            card=card,
            prompts=prompt_token_ids(self._tokenizer, body, vocab_size=card.vocab_size),
            bad_words=bad_word_ids(self._tokenizer, body.bad_words or ()),
        )
        generations = generation_requests(body, asked, levels=self._levels, eos_token_ids=self._eos_token_ids)
        answer = answer_format(body, asked, tokenizer=self._tokenizer, texts=self._texts, created=int(time.time()))
        return asked, generations, answer

    # -- the rest--

    async def tokenize(self, request: Request) -> Response:
        body = parse_body(await request.body(), TokenizeBody)
        card = self._card(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise APIError(400, "send either `prompt` or `messages`", code="invalid_value", param="prompt")

        def tokens() -> list[int]:
            if body.messages is None:
                return self._tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
            text = render_chat(self._tokenizer, body.messages, add_generation_prompt=body.add_generation_prompt)
            return self._tokenizer.encode(text, add_special_tokens=False)

        token_ids = await self._off_loop(tokens)
        return _json({"count": len(token_ids), "max_model_len": card.max_context, "tokens": token_ids})

    async def list_models(self) -> Response:
        return _json({"object": "list", "data": [card.to_dict() for card in self._models.values()]})

    async def show_model(self, model_id: str) -> Response:
        return _json(self._card(model_id).to_dict())

    async def receipt(self, request_id: str) -> Response:
        plain = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        for candidate in dict.fromkeys((request_id, plain, f"{plain}-0")):  # of several choices, the first one's
            receipt = await self._backend.receipt(candidate)
            if receipt is not None:
                return _json(receipt)
        raise APIError(404, f"no receipt of a request {request_id!r} is kept", code="receipt_not_found")

    async def health(self) -> Response:
        try:
            report = await asyncio.wait_for(self._backend.health(), HEALTH_TIMEOUT_S)
        except Exception as error:
            report = {"status": "unavailable", "reason": f"{type(error).__name__}: {error}"}
        return _json(report, status=200 if report.get("status") == "ok" else 503)

    async def metrics_text(self) -> Response:
        try:
            workers = await asyncio.wait_for(self._backend.metrics_text(), HEALTH_TIMEOUT_S)
        except Exception:
            # Whatever it was: the gateway's own figures are worth more with a hole than not at all.
            log.exception("no metrics from the workers")
            workers = ""
        return Response(self._metrics.text() + workers, media_type="text/plain; version=0.0.4")

    async def version(self) -> Response:
        return _json({"version": kvstream_version()})

    async def on_api_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        self._metrics.failure.labels(status=str(error.status)).inc()
        return error_response(error)

    def _card(self, name: str | None) -> ModelCard:
        card = self._models.get(name) if name is not None else self._default_model
        if card is None:
            known = ", ".join(self._models)
            raise APIError(
                404,
                f"there is no model {name!r} here; models: {known}",
                code="model_not_found",
                param="model",
            )
        return card

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, work)


def _json(value: Any, *, status: int = 200) -> Response:
    return Response(to_json(value), status_code=status, media_type="application/json")
