"""What others would do with a prompt's stored KV on a link whose trace is known to the script, in closed form.

Each way opens as ours does (a round trip, then the first request) and frames its bytes as ours does. From there on each
gets more than it would in practice: chunks follow each other without gaps, and no other message costs anything. The
oracle knows the trace; CacheGen's rule knows the throughput of the last chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.cost_model import CostModel
from transport.limits import Pacing
from transport.rate_trace import RateTrace
from transport.simulation import HEADER_BYTES

TEXT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request: when it comes, how long it is, and what link it meets."""

    at: float
    prompt_tokens: int
    num_chunks: int
    trace: RateTrace
    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """levels: of the chunks, in the order of the prompt; "text" for computed ones."""

    ttft_s: float
    levels: tuple[str, ...]
    num_bytes: float

    @property
    def recomputed_share(self) -> float:
        return self.levels.count(TEXT) / max(len(self.levels), 1)


class Baselines:
    """levels: allowed, best first; the last is the floor."""

    def __init__(self, costs: CostModel, levels: Sequence[str]) -> None:
        self.costs, self.levels = costs, tuple(levels)
        self.sizes: Mapping[str, float] = costs.chunk_bytes
        # A level that is not better than a smaller one is of no use to a planner.
        self.ladder = [
            level
            for level in levels
            if not any(
                self.sizes[other] < self.sizes[level] and costs.promised_kl[other] <= costs.promised_kl[level]
                for other in levels
            )
        ]

    def tail_s(self, job: Job) -> float:
        return self.costs.slice_seconds(job.num_chunks * self.costs.chunk_tokens, job.prompt_tokens)

    def compute_s(self, num_chunks: int) -> float:
        return self.costs.compute_s(0, num_chunks * self.costs.chunk_tokens)

    def sends_at(self, job: Job) -> float:
        """When the source can begin to send: the prompt's token ids have reached it, and it was told what of it."""
        return job.trace.finish_time(job.at, 3.0 * job.prompt_tokens) + 3 * job.delay_s

    def sent_bytes(self, job: Job, level: str) -> float:
        """One chunk with the headers of its parts."""
        part = min(max(job.trace.mean_bytes_per_s * Pacing().part_s, Pacing().min_part_bytes), Pacing().max_part_bytes)
        return self.sizes[level] * (1 + HEADER_BYTES / part)

    def load_s(self, job: Job, levels: Sequence[str]) -> float:
        """Until chunks of these levels, sent in this order, are all decoded."""
        at, done = self.sends_at(job), 0.0
        for level in levels:
            at = job.trace.finish_time(at, self.sent_bytes(job, level))
            done = max(done, at + job.delay_s) + self.costs.decode_s.get(level, 0.0) + self.costs.event_s
        return max(done - job.at, 0.0)

    def _outcome(self, job: Job, fill_s: float, levels: Sequence[str]) -> Outcome:
        num_bytes = sum(self.sizes[level] for level in levels if level != TEXT)
        return Outcome(ttft_s=fill_s + self.tail_s(job), levels=tuple(levels), num_bytes=num_bytes)

    def fixed(self, job: Job, level: str) -> Outcome:
        levels = [level] * job.num_chunks
        return self._outcome(job, self.load_s(job, levels), levels)

    def text(self, job: Job) -> Outcome:
        return self._outcome(job, self.compute_s(job.num_chunks), [TEXT] * job.num_chunks)

    # -- the oracle -----------------------------------------------------------------------------------------------

    def fastest(self, job: Job, *, recompute: bool) -> Outcome:
        """The earliest first token that any schedule could give."""
        best: Outcome | None = None
        for level in self.levels:
            counts = range(job.num_chunks + 1) if recompute else (0,)
            low, high = 0, len(counts) - 1
            while low < high:  # computing more takes longer, loading fewer takes less
                middle = (low + high) // 2
                if self.compute_s(counts[middle]) >= self.load_s(job, [level] * (job.num_chunks - counts[middle])):
                    high = middle
                else:
                    low = middle + 1
            for count in {counts[max(low - 1, 0)], counts[low]}:
                levels = [TEXT] * count + [level] * (job.num_chunks - count)
                fill_s = max(self.compute_s(count), self.load_s(job, levels[count:]))
                found = self._outcome(job, fill_s, levels)
                best = found if best is None or found.ttft_s < best.ttft_s else best
        assert best is not None
        return best

    def oracle(self, job: Job, target_s: float, *, recompute: bool) -> Outcome:
        """The best quality that is in time; the fastest where nothing is."""
        fastest = self.fastest(job, recompute=recompute)
        budget_s = target_s - self.tail_s(job)
        if fastest.ttft_s > target_s:
            return fastest
        count = 0
        while recompute and count < job.num_chunks and self.compute_s(count + 1) <= budget_s:
            count += 1
        rest = job.num_chunks - count
        fits = next((at for at in self.ladder if self.load_s(job, [at] * rest) <= budget_s), None)
        if fits is None:
            return fastest
        low, high = 0, rest
        index = self.ladder.index(fits)
        if index:
            better = self.ladder[index - 1]
            while low < high:  # as many of the next better level as fit
                middle = (low + high + 1) // 2
                if self.load_s(job, [better] * middle + [fits] * (rest - middle)) <= budget_s:
                    low = middle
                else:
                    high = middle - 1
            levels = [better] * low + [fits] * (rest - low)
        else:
            levels = [fits] * rest
        fill_s = max(self.compute_s(count), self.load_s(job, levels))
        return self._outcome(job, fill_s, [TEXT] * count + levels)

    # -- CacheGen's rule ------------------------------------------------------------------------------------------

    def cachegen(self, job: Job, target_s: float, *, recompute: bool, last_bytes_per_s: float) -> Outcome:
        """Chunk after chunk: the best that the last chunk's throughput brings, and that this worker decodes, within an
        equal share of the time."""
        at = self.sends_at(job)
        share_s = (target_s - self.tail_s(job) - (at - job.at)) / max(job.num_chunks, 1)
        rate, done, levels = last_bytes_per_s, 0.0, []
        size = self.costs.chunk_tokens
        for chunk in range(job.num_chunks):
            text_s = self.costs.compute_s(chunk * size, (chunk + 1) * size)
            if recompute and text_s <= share_s:
                levels.append(TEXT)
                done = at = max(done, at) + text_s
                continue
            fits = (
                level
                for level in self.ladder
                if max(self.sizes[level] / rate, self.costs.decode_s.get(level, 0.0) + self.costs.event_s) <= share_s
            )
            level = next(fits, self.ladder[-1])
            if recompute and self.sizes[level] / rate > max(share_s, text_s):
                level = TEXT
                done = at = max(done, at) + text_s
            else:
                end = job.trace.finish_time(at, self.sent_bytes(job, level))
                rate = self.sizes[level] / max(end - at, 1e-9)
                at = end
                done = max(done, at + job.delay_s) + self.costs.decode_s.get(level, 0.0) + self.costs.event_s
            levels.append(level)
        return self._outcome(job, max(done - job.at, 0.0), levels)
