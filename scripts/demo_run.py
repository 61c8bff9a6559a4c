"""`kvstream demo`: questions about stored documents over links of several speeds, each served in four ways.

A real cluster on Ray, a real server, a real client; only the link is made slow, by a TCP shaper in a process of its
own between decode and prefill worker. All numbers in the table are of requests that this run made.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import random
import socket
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer

from cluster.config import BUNDLED_MODEL, Links, ServeConfig, WorkerLink
from cluster.launch import running_cluster
from decode.slo import SLOPolicy
from scripts.demo_client import Answer, ask
from scripts.demo_report import write_report
from scripts.model_data import encode, recall_document
from transport.shaper import Shaper

SPEEDS_MBPS = (20.0, 100.0, 400.0, 2000.0, float("inf"))
FIXED_LEVEL = "q2"
WAYS: dict[str, dict[str, Any]] = {
    "text": {"mode": "text"},
    "raw": {"mode": "raw"},
    f"fixed {FIXED_LEVEL}": {"mode": FIXED_LEVEL},
    "controller": {"mode": "auto", "ttft_ms": 0},
}
SLACK = "with slack"  # one more row: a target twice as long as the controller needed at best
NUM_DOCUMENTS = 3
DOCUMENT_TOKENS = 3_200
ANSWER_TOKENS = 6
DROP_ANSWER_TOKENS = 64  # long enough for a slow link to refine some chunks while they are drawn
# The run whose link drops, in terms of this machine: the link brings a document at the fixed level in this share of the
# time that computing it takes, drops tenfold when this share of it has come, and the target is this share.
DROP_LINK_SHARE, DROP_AFTER_SHARE, DROP_TARGET_SHARE = 0.2, 0.15, 0.6
FLOOR = "q3"


@dataclass(slots=True, kw_only=True)
class Row:
    """One line of the table: one way at one link speed, over all documents. Milliseconds are medians."""

    link_mbps: float | None  # None: loopback, not shaped
    way: str
    ttft_ms: float
    ttft_all_ms: list[float]
    megabytes: float
    levels: dict[str, int]
    recomputed_share: float
    equal_tokens: int
    num_tokens: int
    target_ms: float | None = None
    met_target: int | None = None


class Demo:
    """The steps of the demo, in order; `progress` is told of every request."""

    def __init__(self, client: httpx.AsyncClient, shaper: Shaper, documents: list[list[int]], progress: Any) -> None:
        self.client, self.shaper, self.documents, self.progress = client, shaper, documents, progress
        self.exact: list[list[int]] = []  # the uncompressed answers
        self.rows: list[Row] = []

    async def ask(self, document: int, kv: dict[str, Any], *, max_tokens: int = ANSWER_TOKENS) -> Answer:
        answer = await ask(self.client, self.documents[document], max_tokens=max_tokens, kv=kv, ignore_eos=True)
        self.progress()
        return answer

    async def store_documents(self) -> None:
        """Each document once through live prefill, which leaves it encoded at the source; and its exact answer."""
        for document in range(len(self.documents)):
            answer = await self.ask(document, {"mode": "lossless"})
            self.exact.append(answer.token_ids)

    async def speed(self, mbps: float, repeats: int) -> None:
        """All ways at one speed. An uncounted request first, at the fixed level: the worker has used this link
        before, as it would have in service, and what it learned is all that it ever knows of the speed."""
        self.shaper.set_rate(mbps)
        await self.ask(0, {"mode": FIXED_LEVEL})
        answers: dict[str, list[Answer]] = {way: [] for way in WAYS}
        asked = list(range(len(self.documents))) * repeats
        for document in asked:
            for way, kv in WAYS.items():
                answers[way].append(await self.ask(document, kv))
        shown = None if mbps == float("inf") else mbps
        self.rows += [self._row(shown, way, found) for way, found in answers.items()]
        fastest_s = statistics.median(answer.ttft_s for answer in answers["controller"])
        target_ms = round(2 * fastest_s * 1e3 + 50)
        slack = [await self.ask(document, {"mode": "auto", "ttft_ms": target_ms}) for document in asked]
        self.rows.append(self._row(shown, SLACK, slack, target_ms))

    def _row(self, mbps: float | None, way: str, answers: list[Answer], target_ms: float | None = None) -> Row:
        levels: dict[str, int] = {}
        for answer in answers:
            for level, count in answer.receipt["levels"].items():
                levels[level] = levels.get(level, 0) + count
        equal = sum(
            a == b
            for answer, exact in zip(answers, itertools.cycle(self.exact), strict=False)
            for a, b in zip(answer.token_ids, exact, strict=True)
        )
        times_ms = [answer.ttft_s * 1e3 for answer in answers]
        return Row(
            link_mbps=mbps,
            way=way,
            ttft_ms=statistics.median(times_ms),
            ttft_all_ms=times_ms,
            megabytes=statistics.mean(answer.receipt["bytes"] for answer in answers) / 1e6,
            levels=levels,
            recomputed_share=levels.get("text", 0) / max(sum(levels.values()), 1),
            equal_tokens=equal,
            num_tokens=sum(len(answer.token_ids) for answer in answers),
            target_ms=target_ms,
            met_target=None if target_ms is None else sum(time_ms <= target_ms for time_ms in times_ms),
        )

    async def drop(self) -> dict[str, Any]:
        """The link drops tenfold once some chunks have come. The answer's receipt is the result: chunks at the floor,
        chunks computed because the rest would come too late, and chunks that were refined after the first token."""
        text_s = statistics.median(row.ttft_ms for row in self.rows if row.way == "text") / 1e3
        num_bytes = statistics.median(row.megabytes for row in self.rows if row.way == f"fixed {FIXED_LEVEL}") * 1e6
        from_mbps = round(num_bytes * 8e-6 / (DROP_LINK_SHARE * text_s), 1)
        target_ms = round(DROP_TARGET_SHARE * text_s * 1e3)
        self.shaper.set_rate(from_mbps)
        await self.ask(0, {"mode": FIXED_LEVEL})
        before = self.shaper.stats()["down_bytes"]
        kv = {"mode": "auto", "ttft_ms": target_ms}
        task = asyncio.create_task(self.ask(NUM_DOCUMENTS - 1, kv, max_tokens=DROP_ANSWER_TOKENS))
        wait_bytes = DROP_AFTER_SHARE * num_bytes
        while self.shaper.stats()["down_bytes"] - before < wait_bytes and not task.done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        self.shaper.set_rate(from_mbps / 10)
        answer = await task
        return {
            "from_mbps": from_mbps,
            "to_mbps": from_mbps / 10,
            "target_ms": target_ms,
            "ttft_ms": answer.ttft_s * 1e3,
            "receipt": answer.receipt,
        }

    async def live(self, fresh: dict[str, list[list[int]]]) -> list[dict[str, Any]]:
        """New documents, computed by the prefill worker or by the decode worker, while others are being answered."""
        self.shaper.set_rate(float("inf"))
        results = []
        for way, kv in {"prefill worker": {"mode": "raw"}, "decode worker": {"mode": "text"}}.items():
            stop = asyncio.Event()
            others = [asyncio.create_task(self._stream_until(stop, seed)) for seed in range(2)]
            await asyncio.sleep(0.5)
            ttfts, windows = [], []
            for prompt in fresh[way]:
                begin = time.perf_counter()
                answer = await ask(self.client, prompt, max_tokens=1, kv=kv)
                windows.append((begin, time.perf_counter()))
                ttfts.append(answer.ttft_s * 1e3)
                self.progress()
            stop.set()
            gaps = [gap for found in await asyncio.gather(*others) for gap in _gaps_within(found, windows)]
            results.append(
                {
                    "computed_by": way,
                    "ttft_ms": statistics.median(ttfts),
                    "itl_p50_ms": _quantile(gaps, 0.5) * 1e3,
                    "itl_p99_ms": _quantile(gaps, 0.99) * 1e3,
                    "itl_max_ms": max(gaps) * 1e3,
                    "num_gaps": len(gaps),
                }
            )
        return results

    async def _stream_until(self, stop: asyncio.Event, seed: int) -> list[float]:
        """Times (perf_counter) of the tokens of short requests asked one after the other."""
        times: list[float] = []
        rng = random.Random(seed)
        while not stop.is_set():
            prompt = [rng.randrange(300, 4000) for _ in range(64)]
            begin = time.perf_counter()
            answer = await ask(self.client, prompt, max_tokens=400, ignore_eos=True)
            times += [begin + at for at in answer.token_at_s] + [float("nan")]
        return times


def run_demo(json_path: Path | None, report_dir: Path, repeats: int = 1) -> int:
    """Run everything, print the table, write the JSON and the report. Returns the exit code.

    `repeats`: how often each question is asked each way at each speed; more take longer and are less noisy.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    begin = time.perf_counter()
    num_steps = (
        NUM_DOCUMENTS + len(SPEEDS_MBPS) * (1 + repeats * NUM_DOCUMENTS * (len(WAYS) + 1)) + 2 + 2 * NUM_DOCUMENTS
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting the cluster", total=num_steps)
        kv_port = _free_port()
        with Shaper(f"127.0.0.1:{kv_port}", rate_mbps=float("inf")) as shaper:
            advertise = shaper.endpoint.removeprefix("tcp://")
            config = ServeConfig(
                port=0,
                link=Links(prefill=(WorkerLink(bind=f"127.0.0.1:{kv_port}", advertise=advertise),)),
                policy=SLOPolicy(ttft_s=0.5, floor=FLOOR),
                prefix_caching=False,  # what is asked again is to cross the link again
            )
            with running_cluster(config) as cluster:
                started_s = time.perf_counter() - begin
                result = asyncio.run(_run(cluster.base_url, shaper, progress, task, repeats))
    result["start_s"] = started_s
    result["seconds"] = time.perf_counter() - begin
    result["machine"] = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    _print(console, result)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1))
        console.print(f"numbers: {json_path}")
    console.print(f"report: {write_report(result, report_dir)}")
    return 0 if _works(console, result) else 1


async def _run(base_url: str, shaper: Shaper, progress: Progress, task: Any, repeats: int) -> dict[str, Any]:
    rng = random.Random(20261120)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    filler = encode(tokenizer, (BUNDLED_MODEL / "heldout.txt").read_text())

    def prompt(number: int) -> list[int]:
        # Different lengths, so that nothing depends on one.
        document = recall_document(rng, tokenizer, filler, DOCUMENT_TOKENS + 97 * number)
        return [*document.context_ids, *document.questions[0].question_ids]

    documents = [prompt(number) for number in range(NUM_DOCUMENTS)]
    fresh = {way: [prompt(number) for number in range(NUM_DOCUMENTS)] for way in ("prefill worker", "decode worker")}
    async with httpx.AsyncClient(base_url=base_url, timeout=120) as client:
        demo = Demo(client, shaper, documents, lambda: progress.advance(task))
        progress.update(task, description="storing documents")
        await demo.store_documents()
        for mbps in SPEEDS_MBPS:
            progress.update(task, description=f"link {_speed(mbps)}")
            await demo.speed(mbps, repeats)
        progress.update(task, description="a link that drops")
        drop = await demo.drop()
        progress.update(task, description="live prefill")
        live = await demo.live(fresh)
    return {
        "document_tokens": [len(document) for document in documents],
        "rows": [asdict(row) for row in demo.rows],
        "drop": drop,
        "live": live,
    }


def _works(console: Console, result: dict[str, Any]) -> bool:
    """Whether what was seen is what kvstream promises; says what is not."""
    problems = []
    for row in result["rows"]:
        if row["way"] in ("text", "raw") and row["equal_tokens"] != row["num_tokens"]:
            problems.append(f"{row['way']} at {_speed(row['link_mbps'])} did not give the exact answer")
    receipt = result["drop"]["receipt"]
    levels = {*receipt["levels"], *receipt["levels_at_end"]}
    if len(levels - {"text"}) < 2 or "text" not in levels:
        problems.append(
            f"the drop run used {', '.join(sorted(levels))}: a recomputed chunk, and chunks refined after the first "
            "token, were expected"
        )
    for problem in problems:
        console.print(f"[red]{problem}[/red]")
    return not problems


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"stored documents of {min(result['document_tokens'])} tokens and more: time to first token")
    for name in ("link", "way", "TTFT ms", "MB", "levels", "recomputed", "tokens equal"):
        table.add_column(name, justify="left" if name in ("link", "way", "levels") else "right", no_wrap=True)
    last = None
    for row in result["rows"]:
        if last is not None and row["link_mbps"] != last:
            table.add_section()
        levels = " ".join(f"{level}:{count}" for level, count in row["levels"].items())
        way = row["way"] if row["target_ms"] is None else f"{row['way']}, {row['target_ms']:.0f} ms"
        table.add_row(
            _speed(row["link_mbps"]) if row["link_mbps"] != last else "",
            way,
            f"{row['ttft_ms']:.0f}",
            f"{row['megabytes']:.2f}",
            levels,
            f"{row['recomputed_share']:.0%}",
            f"{row['equal_tokens']}/{row['num_tokens']}",
        )
        last = row["link_mbps"]
    console.print(table)
    drop = result["drop"]
    console.print(
        f"link drops from {drop['from_mbps']:.0f} to {drop['to_mbps']:.0f} Mbit/s in mid-transfer: first token after "
        f"{drop['ttft_ms']:.0f} ms (target {drop['target_ms']} ms), levels {drop['receipt']['levels']}, "
        f"after the answer's last token {drop['receipt']['levels_at_end']}"
    )
    live = Table(title="new documents (live prefill), beside two streams of other requests")
    for name in ("computed by", "TTFT ms", "others' ITL p50 ms", "p99 ms", "max ms"):
        live.add_column(name, justify="right")
    for row in result["live"]:
        live.add_row(
            row["computed_by"], *(f"{row[key]:.1f}" for key in ("ttft_ms", "itl_p50_ms", "itl_p99_ms", "itl_max_ms"))
        )
    console.print(live)
    console.print(f"{result['seconds']:.0f} s in all, {result['start_s']:.0f} s of them to start the cluster")


def _speed(mbps: float | None) -> str:
    return "loopback" if mbps in (None, float("inf")) else f"{mbps:g} Mbit/s"


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _gaps_within(times: list[float], windows: list[tuple[float, float]]) -> list[float]:
    """Gaps between tokens of one request (nan parts requests) that overlap one of the windows."""
    return [
        after - before
        for before, after in itertools.pairwise(times)
        if after - before >= 0 and any(before < stop and after > start for start, stop in windows)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
