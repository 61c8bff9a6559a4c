"""From a checked body to what is asked of workers and how it is answered. No HTTP: headers come as a mapping."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.chat import Tokenizer
from cluster.detokenize import IncrementalDetokenizer, OutputText
from cluster.kv_options import KVOptions
from cluster.openai_answers import AnswerFormat, ModelCard, Prompt
from cluster.openai_errors import APIError
from cluster.openai_schema import (
    REQUEST_ID,
    CompletionBody,
    GenerationBody,
    check_kv_options,
    milliseconds_header,
    resolve_max_tokens,
    tenants_salt,
)
from cluster.sampling_fields import MAX_CHOICES
from cluster.token_text import TokenTexts
from decode.requests import GenerationRequest

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's; a chat may use all that its context leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One HTTP request: whose and for which model, its prompts, its bad words in tokens."""

    kind: Literal["completion", "chat"]
    request_id: str
    tenant: str
    headers: Mapping[str, str]
    card: ModelCard
    prompts: Sequence[Sequence[int]]
    bad_words: Sequence[Sequence[int]]


def generation_requests(
    body: GenerationBody, asked: Asked, *, levels: Sequence[str], eos_token_ids: Collection[int]
) -> list[GenerationRequest]:
    """One for each choice, those of a prompt in a row. Raises APIError.

    Of several, each has the request's id with a number behind it. Those of one prompt form a group; a given seed counts
    up from one to the next, and only the first computes the prompt's logprobs.
    """
    options = body.kv or KVOptions()
    check_kv_options(options, levels)
    # The body wins over the headers, which are checked all the same.
    ttft_ms = milliseconds_header(asked.headers, "x-slo-ttft-ms")
    ttft_ms = ttft_ms if options.ttft_ms is None else options.ttft_ms
    itl_ms = milliseconds_header(asked.headers, "x-slo-tpot-ms", may_be_zero=False)
    itl_ms = itl_ms if options.itl_ms is None else options.itl_ms
    if not REQUEST_ID.fullmatch(asked.request_id):
        message = "request_id: 1 to 128 letters, digits, dots, colons, dashes or underscores"
        raise APIError(400, message, code="invalid_value", param="request_id")
    n = body.num_choices()
    if len(asked.prompts) * n > MAX_CHOICES:
        message = f"{len(asked.prompts)} prompts with {n} choices each; a request has at most {MAX_CHOICES} choices"
        raise APIError(400, message, code="invalid_value", param="prompt")
    body.check_prompt_logprobs()
    requests: list[GenerationRequest] = []
    for place, token_ids in enumerate(asked.prompts):
        max_tokens = resolve_max_tokens(
            body.token_limit(),
            prompt_tokens=len(token_ids),
            max_context=asked.card.max_context,
            default=None if asked.kind == "chat" else DEFAULT_COMPLETION_TOKENS,
        )
        sampling = body.sampling(
            max_tokens, vocab_size=asked.card.vocab_size, eos_token_ids=eos_token_ids, bad_words=asked.bad_words
        )
        request = GenerationRequest(
            request_id=asked.request_id,
            token_ids=tuple(token_ids),
            sampling=sampling,
            kv_mode=options.mode,
            ttft_s=None if ttft_ms is None else ttft_ms / 1000,
            floor=options.floor,
            cache_salt=tenants_salt(asked.tenant, body.cache_salt or ""),
            tenant=asked.tenant,
            itl_s=None if itl_ms is None else itl_ms / 1000,
            plan=None if options.plan is None else options.plan.model_dump(),
            priority=body.priority or 0,
        )
        if len(asked.prompts) * n == 1:
            return [request]
        for i in range(n):
            seed = None if sampling.seed is None else sampling.seed + i
            requests.append(
                replace(
                    request,
                    request_id=f"{asked.request_id}-{len(requests)}",
                    sampling=replace(sampling, seed=seed, prompt_logprobs=sampling.prompt_logprobs if i == 0 else None),
                    group=f"{asked.request_id}-{place}" if n > 1 else "",
                )
            )
    return requests


def answer_format(
    body: GenerationBody, asked: Asked, *, tokenizer: Tokenizer, texts: TokenTexts, created: int
) -> AnswerFormat:
    """How it is answered. Decodes the prompts where they are echoed."""
    echo = isinstance(body, CompletionBody) and bool(body.echo)
    return AnswerFormat(
        kind=asked.kind,
        request_id=asked.request_id,
        model=asked.card.id,
        created=created,
        prompts=tuple(_echoed(ids, tokenizer, body) if echo else Prompt(token_ids=tuple(ids)) for ids in asked.prompts),
        texts=texts,
        n=body.num_choices(),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        with_token_ids=bool(body.return_token_ids),
        with_logprobs=body.num_logprobs() is not None,
        with_prompt_logprobs=body.prompt_logprobs is not None,
        echo=echo,
    )


def _echoed(token_ids: Sequence[int], tokenizer: Tokenizer, body: GenerationBody) -> Prompt:
    """The text is that of the tokens, so that it fits their offsets."""
    skip = body.skip_special_tokens is not False
    text = IncrementalDetokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=skip))
    pieces, offsets = "", []
    for token in token_ids:
        offsets.append(len(pieces))
        pieces += text.push(token)
    return Prompt(token_ids=tuple(token_ids), text=pieces + text.flush(), offsets=tuple(offsets))


def output_text(body: GenerationBody, tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> OutputText:
    """The text of one choice. What ends an answer is not shown, unless the body wants it."""
    skip, keep_stop = body.skip_special_tokens is not False, bool(body.include_stop_str_in_output)
    ends = {*(body.stop_token_ids or ()), *(() if body.ignore_eos else eos_token_ids)}
    return OutputText(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=skip),
        stops=body.stops(),
        silent_ids=() if keep_stop else ends,
        keep_stop=keep_stop,
        min_tokens=body.min_tokens or 0,
    )
