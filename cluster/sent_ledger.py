"""What a gateway has sent to workers and they have not reported yet. Pure: events and `now` in, counts out."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.membership import WorkerInfo
from cluster.route_costs import Pending

# A request needs a moment to its worker: what was sent so shortly before a report is not in it.
ON_THE_WAY_S = 0.02


@dataclass(slots=True, kw_only=True, eq=False)
class _Sent:
    decode_id: str
    prompt_tokens: dict[str, int]  # by worker, that it is expected to compute
    at: float


class SentLedger:
    """A request counts from `send` to `ended`, its prompt's tokens to `first_token`."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._sent: dict[int, _Sent] = {}
        self._reported_at: dict[str, float] = {}
        self._ended: list[tuple[str, float, float]] = []  # decode worker, sent and ended at; in no report yet

    def send(self, decode_id: str, prompt_tokens: Mapping[str, int], now: float) -> int:
        """A request goes to a decode worker; workers are expected to compute so much of it. Its number here."""
        number = next(self._numbers)
        self._sent[number] = _Sent(decode_id=decode_id, prompt_tokens=dict(prompt_tokens), at=now)
        return number

    def first_token(self, number: int) -> None:
        self._sent[number].prompt_tokens.clear()

    def ended(self, number: int, now: float) -> None:
        sent = self._sent.pop(number)
        self._ended.append((sent.decode_id, sent.at, now))

    def follow(self, table: Iterable[WorkerInfo], now: float) -> None:
        """A new table has come."""
        self._reported_at = {info.id: now - info.age_s for info in table}
        self._ended = [
            (worker_id, sent_at, ended_at)
            for worker_id, sent_at, ended_at in self._ended
            if worker_id in self._reported_at and self._is_unreported(worker_id, ended_at)
        ]

    def in_flight(self) -> Counter[str]:
        """Requests by decode worker."""
        return Counter(sent.decode_id for sent in self._sent.values())

    def pending(self, now: float) -> dict[str, Pending]:
        """By worker, what its report cannot contain."""
        sent: dict[str, list[tuple[float, int]]] = defaultdict(list)
        requests: Counter[str] = Counter()
        for one in self._sent.values():  # the oldest first
            requests[one.decode_id] += self._is_unreported(one.decode_id, one.at)
            for worker_id, tokens in one.prompt_tokens.items():
                if self._is_unreported(worker_id, one.at):
                    sent[worker_id].append((now - one.at, tokens))
        ended = Counter(
            worker_id
            for worker_id, sent_at, ended_at in self._ended
            if self._is_unreported(worker_id, ended_at) and not self._is_unreported(worker_id, sent_at)
        )
        return {
            worker_id: Pending(
                age_s=now - at, sent=tuple(sent[worker_id]), requests=requests[worker_id], ended=ended[worker_id]
            )
            for worker_id, at in self._reported_at.items()
        }

    def _is_unreported(self, worker_id: str, sent_at: float) -> bool:
        reported_at = self._reported_at.get(worker_id)
        return reported_at is None or sent_at > reported_at - ON_THE_WAY_S
