"""What a request would cost on a worker: plain estimates from what the worker has reported. Pure.

Everything is in seconds. The estimates choose between workers and ways; the decode worker's own plan (decode/plan.py)
decides later, with what it knows of its links.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.prefix_index import Coverage, num_leading

# The keys of a worker's stats that routing reads.
TOKENS_PER_S = "prefill_tokens_per_s"  # prompt tokens that it computes in whole chunks, alone
WAITING_TOKENS = "waiting_prompt_tokens"  # prompt tokens that it has taken on and not yet computed
WAITING_REQUESTS = "num_requests_waiting"  # not admitted yet: no pages are free
REQUESTS = "decode_sequences"  # admitted and not yet ended
BUSY = "prefill_busy"  # share of the time lately in which a prefill worker computed
ROWS = "decode_running_rows"  # requests that generate
STEP_S = "decode_step_s"  # one decode step of these rows
BASE_S = "decode_base_s"  # what a step takes besides its rows
ROW_S = "decode_row_s"  # what one more row adds to it
ANSWER_TOKENS = "answer_tokens"  # of an answer, on average lately; 0: none has ended yet
LOAD_RAM_S = "load_s_per_token_ram"  # from its own store into its pages, a token
LOAD_DISK_S = "load_s_per_token_disk"
PULL_S = "load_s_per_token_remote"  # from another worker's store
ADMISSION_S = "admission_s"  # between two admissions while requests wait for pages
MAY_AGGREGATE = "policy_allows_aggregated"  # 0: its policy bounds what is computed on the decode worker

# For what a worker has not reported. They only rank workers: no prompt is kept from a prefill worker because of them.
DEFAULTS: Mapping[str, float] = {
    TOKENS_PER_S: 5000.0,
    LOAD_RAM_S: 2e-5,
    LOAD_DISK_S: 3e-5,
    PULL_S: 1e-4,
    ADMISSION_S: 0.05,
    BASE_S: 0.01,
    ROW_S: 0.002,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteWeights:
    """disturbance: how much a second of delay of one running request counts against a second of the new one's time to
    first token. max_price: the share of its time to first token that a request may lose for that. tie_share: estimates
    as close as this are equal, and the document's claim decides. answer: how much a second of the answer counts against
    a second before it; 0: only the first token counts. companion: how much a second counts that the steps of an answer
    take from a prefill worker's prompts."""

    disturbance: float = 1.0
    max_price: float = 0.25
    tie_share: float = 0.02
    answer: float = 1.0
    companion: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """What this gateway has sent to a worker since its last report, which is `age_s` old. sent: (how long ago, seconds;
    prompt tokens that it has to compute), oldest first; requests: that it decodes; ended: earlier ones that have ended
    since."""

    age_s: float = 0.0
    sent: tuple[tuple[float, int], ...] = ()
    requests: int = 0
    ended: int = 0

    def backlog_tokens(self, reported_tokens: float, tokens_per_s: float) -> float:
        """Prompt tokens that the worker has left to compute by now, if it has computed all the time."""
        left, at_s = reported_tokens, self.age_s
        for ago_s, tokens in self.sent:
            left = max(0.0, left - max(0.0, at_s - ago_s) * tokens_per_s) + tokens
            at_s = min(at_s, ago_s)
        return max(0.0, left - at_s * tokens_per_s)


NOTHING_PENDING = Pending()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Its loadable chunks and the rest."""

    num_tokens: int
    num_chunks: int
    chunk_tokens: int

    @property
    def tail_tokens(self) -> int:
        return self.num_tokens - self.num_chunks * self.chunk_tokens

    @property
    def all_chunks(self) -> int:
        """A bitmap."""
        return (1 << self.num_chunks) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCosts:
    """rows: requests that generate there, or beside it on the same cores; step_s: one decode step of theirs, which
    every pass of a prompt takes longer. next_step_s: one of all requests that it has, and of one more. waiting_tokens:
    of prompts, that it has to compute; wait_s: until it begins with a new one. beside_tokens: those of the worker with
    which it takes turns on the same cores; beside_busy: the share of the time in which that one computes. load_ram_s,
    load_disk_s, pull_s: a token. is_measured: whether it has told its speed."""

    token_s: float
    waiting_tokens: float
    wait_s: float
    rows: float
    step_s: float
    next_step_s: float
    load_ram_s: float
    load_disk_s: float
    pull_s: float
    chunk_tokens: int
    is_measured: bool
    busy: float = 0.0
    beside_tokens: float = 0.0
    beside_busy: float = 0.0

    @classmethod
    def of(
        cls,
        stats: Mapping[str, float],
        *,
        in_flight: int,
        pending: Pending,
        chunk_tokens: int,
        beside: WorkerCosts | None = None,
    ) -> WorkerCosts:
        """in_flight: this gateway's requests there; all that is known of a worker that reports nothing: then each
        counts as one chunk of prompt and one row. beside: the worker on the same cores, as if it were alone."""

        def told(key: str) -> float:
            return max(stats.get(key, DEFAULTS[key]), 1e-9)

        token_s = 1.0 / told(TOKENS_PER_S)
        rows = stats.get(ROWS)
        rows = in_flight if rows is None else rows + pending.requests
        step_s, row_s = stats.get(STEP_S), told(ROW_S)
        step_s = rows * row_s if step_s is None else step_s + pending.requests * row_s
        step_s = step_s if rows > 0 else 0.0
        requests = stats.get(REQUESTS)
        requests = in_flight if requests is None else requests + pending.requests - pending.ended
        requests += stats.get(WAITING_REQUESTS, 0.0)
        if beside is not None:
            rows, step_s = rows + beside.rows, step_s + beside.step_s
        waiting_tokens = stats.get(WAITING_TOKENS)
        if waiting_tokens is None:
            waiting_tokens = in_flight * chunk_tokens
        else:
            waiting_tokens = pending.backlog_tokens(waiting_tokens, 1.0 / (token_s + step_s / chunk_tokens))
        return cls(
            token_s=token_s,
            waiting_tokens=waiting_tokens,
            wait_s=waiting_tokens * (token_s + step_s / chunk_tokens)
            + stats.get(WAITING_REQUESTS, 0.0) * told(ADMISSION_S),
            rows=rows,
            step_s=step_s,
            next_step_s=told(BASE_S) + (max(0.0, requests) + 1) * row_s,
            load_ram_s=told(LOAD_RAM_S),
            load_disk_s=told(LOAD_DISK_S),
            pull_s=told(PULL_S),
            chunk_tokens=chunk_tokens,
            is_measured=stats.get(TOKENS_PER_S, 0.0) > 0,
            busy=stats.get(BUSY, 0.0),
            beside_tokens=beside.waiting_tokens if beside is not None else 0.0,
            beside_busy=beside.busy if beside is not None else 0.0,
        )

    def compute_s(self, num_tokens: int) -> float:
        """Prompt tokens, chunk by chunk; each pass carries the running rows along."""
        return num_tokens * self.token_s + max(1.0, num_tokens / self.chunk_tokens) * self.step_s

    def turns_s(self, num_tokens: float) -> float:
        """What the worker beside it computes of prompts before this one has computed its own and so many tokens."""
        return min(self.beside_tokens, self.waiting_tokens + num_tokens) * self.token_s

    def answer_s(self, num_tokens: float, prompt_tokens: float) -> float:
        """An answer after a prompt of which so many tokens were computed here. What is left then of the prompts beside
        takes turns with its steps."""
        left = max(0.0, self.beside_tokens - self.waiting_tokens - prompt_tokens)
        return num_tokens * self.next_step_s + min(left, num_tokens * self.chunk_tokens) * self.token_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalEstimate:
    """A prompt on one decode worker. missing: chunks that are stored nowhere, or cheaper to compute than to load;
    load_s: for the rest; alone_s: to the first token, computing the missing ones here; compute_tokens: so many."""

    missing: int
    load_s: float
    compute_tokens: int
    alone_s: float


def on_decode_worker(
    costs: WorkerCosts, prompt: Prompt, *, own: Coverage | None, stored: int, may_load: bool
) -> LocalEstimate:
    """own: what the worker holds itself; stored: bitmap of what others could give it. Nothing is loaded that would be
    computed sooner."""
    hits = num_leading(own.pages) if own is not None else 0
    rest = prompt.all_chunks & ~((1 << hits) - 1)
    missing, load_s = rest, 0.0
    if may_load:
        ways = [(costs.pull_s, stored)]
        if own is not None:
            ways += [(costs.load_ram_s, own.ram), (costs.load_disk_s, own.disk)]
        for token_load_s, bitmap in sorted(ways):
            if token_load_s < costs.token_s:
                load_s += (missing & bitmap).bit_count() * prompt.chunk_tokens * token_load_s
                missing &= ~bitmap
    tokens = missing.bit_count() * prompt.chunk_tokens + prompt.tail_tokens
    alone_s = max(costs.wait_s, load_s) + costs.compute_s(tokens) + costs.turns_s(tokens)
    return LocalEstimate(missing=missing, load_s=load_s, compute_tokens=tokens, alone_s=alone_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillEstimate:
    """The chunks `missing` by way of a prefill worker: `compute_tokens` there, `ready_s` until the last is computed;
    price_s: what that costs the requests that generate on its cores."""

    ready_s: float
    price_s: float
    compute_tokens: int

    @property
    def cost_s(self) -> float:
        return self.ready_s + self.price_s


def on_prefill_worker(
    costs: WorkerCosts, prompt: Prompt, *, own: Coverage | None, stored: int, missing: int, weights: RouteWeights
) -> PrefillEstimate:
    """It computes from the front up to the last missing chunk, except what it has itself, and what it fetches from
    others because that is faster. stored: bitmap of what others could give it."""
    up_to = (1 << missing.bit_length()) - 1
    in_ram = own.pages | own.ram if own is not None else 0
    in_any = own.any_tier if own is not None else 0
    size = prompt.chunk_tokens
    fetched = up_to & stored & ~in_any if costs.pull_s < costs.token_s else 0
    tokens = (up_to & ~in_any & ~fetched).bit_count() * size
    load_s = (up_to & in_ram).bit_count() * size * costs.load_ram_s
    load_s += (up_to & in_any & ~in_ram).bit_count() * size * costs.load_disk_s
    load_s += fetched.bit_count() * size * costs.pull_s
    ready_s = costs.wait_s + load_s + costs.compute_s(tokens) + costs.turns_s(tokens)
    price_s = disturbance_price_s(costs, tokens, ready_s, weights)
    return PrefillEstimate(ready_s=ready_s, price_s=price_s, compute_tokens=tokens)


def through_prefill_s(costs: WorkerCosts, prompt: Prompt, local: LocalEstimate, prefill: PrefillEstimate) -> float:
    """To the first token, with the missing chunks from a prefill worker: they travel while the next ones are computed,
    the last one after that, and the decode worker computes the tail."""
    chunk_s = prompt.chunk_tokens * costs.pull_s
    arrived_s = max(prefill.ready_s + chunk_s, local.missing.bit_count() * chunk_s, local.load_s, costs.wait_s)
    return arrived_s + costs.compute_s(prompt.tail_tokens)


def disturbance_price_s(costs: WorkerCosts, num_tokens: int, ttft_s: float, weights: RouteWeights) -> float:
    """What computing so many tokens here costs the requests that generate here, in seconds of this one's time to
    first token: their number times the delay of each. Bounded, so that no request pays much for the others."""
    return min(weights.disturbance * costs.rows * num_tokens * costs.token_s, weights.max_price * ttft_s)


def companion_price_s(costs: WorkerCosts, answer_tokens: float, weights: RouteWeights) -> float:
    """What the answer's steps take from the prompts on the same cores, if there are any."""
    return weights.companion * costs.beside_busy * answer_tokens * costs.next_step_s


def is_better_alone(alone_s: float, price_s: float, through_s: float) -> bool:
    """Whether to serve aggregated. Never is a request sent through a prefill worker that this would make slower than
    alone, except by the (bounded) price of what it spares the others."""
    return alone_s + price_s <= through_s


def expected_answer(stats: Sequence[Mapping[str, float]], max_tokens: int | None) -> float:
    """Tokens, by what the workers have seen lately: `max_tokens` alone is often far more than is used."""
    seen = [tokens for one in stats if (tokens := one.get(ANSWER_TOKENS, 0.0)) > 0]
    mean = sum(seen) / len(seen) if seen else 0.0
    return mean if max_tokens is None else min(mean, max_tokens)
