"""`kvstream explain`: a receipt as an account that adds up, whatever became of the request; and clear errors."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend, make_app, serving
from fill_world import LEVELS, World
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from decode.receipt import Timeline, build_receipt
from scripts.cli import app
from scripts.explain import MAX_REASONS, NotAReceipt, account, read_receipt
from scripts.explain_timeline import LEGEND, MAX_ROWS, Axis, Span, merged, spans_of

RECEIPT: dict[str, Any] = {
    "request_id": "r1",
    "kv_mode": "auto",
    "source": "prefill-0",
    "sources": ["prefill-0"],
    "prompt_tokens": 600,
    "chunk_tokens": 256,
    "tail_tokens": 88,
    "levels": {"text": 1, "q2": 1},
    "levels_at_end": {"text": 1, "q1": 1},
    "bytes": 60000,
    "refined_bytes": 78000,
    "received_bytes": 150000,
    "recomputed_chunks": 1,
    "live_prefill": False,
    "promised_kl": 0.03,
    "mean_promised_kl": 0.015,
    "quality": {"at_first_token": 0.03, "at_end": 0.01, "generated_on": 0.03},
    "link_mbps": 9.9,
    "ttft_ms": 400.0,
    "ttft_parts_ms": {"queue": 100.0, "open": 10.0, "fill": 190.0, "refine": 20.0, "tail": 80.0},
    "opened_ms": 110.0,
    "target_ms": 350.0,
    "num_decisions": 31,
    "reasons": [{"at_ms": 110.0, "what": "compute 1 from the front, load the others at q2"}],
    "plan": {
        "chunk_tokens": 256,
        "levels": ["text", "q2"],
        "refinements": [{"chunk": 1, "level": "q1", "after_tokens": 3}],
    },
    "chunks": [
        {
            "index": 0, "level": "text", "source": None, "asked_levels": [], "bytes": 0, "bad_blobs": 0,
            "asked_ms": None, "first_part_ms": None, "arrived_ms": None, "compute_ms": 110.0, "filled_ms": 210.0,
            "decode_ms": None, "refinements": [],
        },
        {
            "index": 1, "level": "q2", "source": "prefill-0", "asked_levels": ["q3"], "bytes": 60000, "bad_blobs": 0,
            "asked_ms": 110.0, "first_part_ms": 150.0, "arrived_ms": 260.0, "compute_ms": None, "filled_ms": 300.0,
            "decode_ms": 20.0,
            "refinements": [
                {"level": "q2", "bytes": 9000, "asked_ms": 300.0, "applied_ms": 320.0, "after_tokens": 0},
                {"level": "q1", "bytes": 78000, "asked_ms": 320.0, "applied_ms": 900.0, "after_tokens": 3},
            ],
        },
    ],
}  # fmt: skip

GOLDEN = """\
Met its target of 350.0 ms: first token 300.0 ms after admission, 50.0 ms early.
request r1; 600 prompt tokens in 2 chunks of 256 and a tail of 88; from prefill-0; link 9.9 Mbit/s
at the end.

Time to first token  400.0 ms
  queue     100.0 ms   25%  #####                 waited for room
  open       10.0 ms    2%                        until a source answered
  fill      190.0 ms   48%  ##########            until the last chunk was in place
  refine     20.0 ms    5%  #                     spent on better levels before the first token
  tail       80.0 ms   20%  ####                  the end of the prompt, and the first token
  sum       400.0 ms

Chunks, times in ms
  chunk    level       bytes   wait   wire decode compute  0                     400 ms|      900 ms
  0        text            0                          100         cccccccc             |
  1        q2|q1      60,000   40.0    110   20.0                 ...========,dd+++++++|++++++++++++
  tail                                               80.0                        cccccc|
. asked for  = on the wire  , waits to be decoded  d decoded  c computed  + refined (from asking to
the pages)  | first token.  level: at the first token|at the end

What the controller decided, and why  31 plans looked at
     110.0 ms  compute 1 from the front, load the others at q2

Quality  the worst level used promises a KL divergence of at most 0.03 nats a token; 0.015 as a mean
         over all chunks. A bound on the mean over many tokens.
         pages of the chunks: 0.03 at the first token, 0.01 at the end; tail and answer rest on
         0.03.
Bytes    60,000 for the first token, 78,000 to refine after it, 12,000 not used.
Levels   1 text, 1 q2 at the first token, 1 text, 1 q1 at the end.

To have it again  with 1 refinement after the first token
  send the same prompt with this plan as `kv.plan`: the same chunks, computed, loaded and refined
  alike, give the same KV at every token.
  plan=$(kvstream explain r1 --plan-only)
  curl URL/v1/completions -H 'content-type: application/json' \\
    -d '{"prompt": "...", "max_tokens": 32, "kv": {"plan": '"$plan"'}}'
"""


def receipt_with(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RECEIPT), **changes}


def text_of(receipt: dict[str, Any], width: int = 100) -> str:
    return "".join(f"{line.plain}\n" for line in account(receipt, width=width))


def chunk(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RECEIPT["chunks"][1]), "refinements": [], **changes}


def test_golden() -> None:
    assert text_of(receipt_with()) == GOLDEN


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"target_ms": 300.0}, "Met its target of 300.0 ms: first token 300.0 ms after admission, 0.0 ms early."),
        ({"target_ms": 250.0}, "Missed its target of 250.0 ms: first token 300.0 ms after admission, 50.0 ms late."),
        ({"target_ms": 0.0}, "No target, as fast as possible: first token 300.0 ms after admission."),
        ({"ttft_ms": None}, "No first token: the request failed or was cancelled before it."),
    ],
)
def test_the_target_counts_from_admission(changes: dict[str, Any], verdict: str) -> None:
    assert text_of(receipt_with(**changes)).splitlines()[0] == verdict


def test_parts_that_do_not_add_up_are_named() -> None:
    parts = {**RECEIPT["ttft_parts_ms"], "tail": 81.0}
    assert "they add up to 401.0 ms, not to 400.0 ms" in text_of(receipt_with(ttft_parts_ms=parts))
    # each is rounded to a thousandth
    parts["tail"] = 80.004
    assert "  sum       400.0 ms\n" in text_of(receipt_with(ttft_parts_ms=parts))


@given(st.integers(100, 200))
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    sources = [chunk(index=i, source=f"prefill-{i % 2}") for i in range(40)]
    long = [{"at_ms": 1e6, "what": "source 0 lost: " + "word " * 60}]
    for receipt in (receipt_with(), receipt_with(chunks=sources, reasons=long)):
        assert max(map(len, text_of(receipt, width).splitlines())) <= width


def test_the_bars_take_the_room_there_is() -> None:
    for width in (90, 110, 160):
        (tail,) = [line for line in text_of(receipt_with(), width).splitlines() if line.startswith("  tail ")][1:]
        assert tail.endswith("|") and len(tail) < width
        (head,) = [line for line in text_of(receipt_with(), width).splitlines() if line.startswith("  chunk ")]
        assert len(head) == width


@pytest.mark.parametrize("seed", range(6))
def test_receipts_of_real_fills(seed: int) -> None:
    """What decode/receipt.py writes is what this reads: sums, chunks, and every level are in the account."""
    quantized = ("q1", "q2", "q3")
    world = World(
        rate=lambda now: 10 ** (4.7 + seed / 3) / (1 if now < 0.3 else 5),
        more_rates=((lambda now: 1e5),) * (seed % 2),
        ttft_s=(0.0, 0.4, 2.0)[seed % 3],
        levels=quantized,
        refine_levels=quantized if seed % 2 else (),
    )
    fill = world.run()
    assert world.ready_at is not None
    timeline = Timeline(
        received_at=0.0,
        admitted_at=0.0,
        opened_at=world.latency_s,
        filled_at=world.ready_at,
        first_token_at=world.ttft_s_reached,
    )
    receipt = build_receipt(
        request_id="r",
        kv_mode="auto",
        prompt_tokens=256 * 13 + 1,
        chunk_tokens=256,
        sources=[f"p{i}" for i in range(len(world.pipes))],
        timeline=timeline,
        fill=fill,
        promised_kl=dict.fromkeys(LEVELS, 0.1),
        ended_at=world.now,
    )
    text = text_of(read_receipt(json.loads(json.dumps(receipt))))
    head, *rows = text[text.index("Chunks") : text.index(". asked for")].splitlines()[1:]
    bar = head.index("compute") + len("compute")
    assert [row.split()[0] for row in rows] == [*map(str, range(13)), "tail"]
    for row, found in zip(rows, receipt["chunks"], strict=False):
        assert row.split()[1].split("|")[0] == found["level"]
        assert ("c" in row[bar:]) == (found["compute_ms"] is not None)
        assert ("+" in row[bar:]) == bool(found["refinements"])
    assert f"  sum    {receipt['ttft_ms']:>8,.1f} ms\n" in text
    assert f"{receipt['bytes']:,} for the first token" in text


def test_every_field_may_be_missing_or_null() -> None:
    bare = {"request_id": "r", "ttft_parts_ms": {}, "chunks": []}
    assert text_of(bare).startswith("No first token")
    for name in set(RECEIPT) - set(bare):
        assert text_of(receipt_with(**{name: None}))
        assert text_of({key: value for key, value in receipt_with().items() if key != name})
    nothing = dict.fromkeys(RECEIPT["chunks"][0]) | {"index": 0, "refinements": [], "asked_levels": []}
    assert text_of(receipt_with(chunks=[nothing, {}]))


def test_a_cancelled_request_shows_how_far_it_came() -> None:
    """Asked for and never come: the wait goes on to the end. Nothing to reproduce."""
    chunks = [
        chunk(level=None, first_part_ms=None, arrived_ms=None, filled_ms=None, decode_ms=None, bytes=0),
        chunk(level=None, arrived_ms=None, filled_ms=None, decode_ms=None, bytes=0),
    ]
    parts = {"queue": 100.0, "open": None, "fill": None, "refine": None, "tail": None}
    receipt = receipt_with(
        ttft_ms=None, ttft_parts_ms=parts, plan=None, chunks=chunks, bytes=0, reasons=[{"at_ms": 200.0, "what": "x"}]
    )
    text = text_of(receipt)
    assert re.search(r"^  fill +- +until", text, re.MULTILINE)
    assert "0 of chunks in place" in text
    assert "sum" not in text and "kv.plan" not in text and "Quality" not in text
    waiting, arriving = [line for line in text.splitlines() if line.startswith(("  0 ", "  1 "))]
    assert waiting.endswith("..") and arriving.endswith("==") and "." in arriving


def test_a_prompt_without_chunks() -> None:
    text = text_of(receipt_with(chunks=[], levels={}, levels_at_end={}, promised_kl=0.0, mean_promised_kl=0.0))
    assert "exact" in text and "Chunks" not in text and "Bytes" not in text


def test_layers_that_windows_left_out_are_counted() -> None:
    chunks = [chunk(layers=layers) for layers in (0, 0, 4, None)]
    text = " ".join(text_of(receipt_with(chunks=chunks, chunks_in_part=3)).split())
    assert "Layers 3 of 4 chunks in part: sliding windows have left the other layers; of 2 of these nothing" in text
    assert "Layers" not in text_of(receipt_with(chunks=chunks, chunks_in_part=0))


def test_quantized_pages_are_not_called_exact() -> None:
    quality = {"at_first_token": 0.001, "at_end": 0.001, "generated_on": 0.001}
    exact = {"promised_kl": 0, "mean_promised_kl": 0, "quality": quality}
    assert "exact:" in text_of(receipt_with(**exact, kv_cache_dtype="bfloat16"))
    told = text_of(receipt_with(**exact, kv_cache_dtype="int4"))
    assert "stood in int4 pages" in told and "0.001 at the end" in told and "exact" not in told


def test_quality_that_nothing_is_known_of() -> None:
    assert "see `kvstream calibrate`" in text_of(receipt_with(promised_kl=None, mean_promised_kl=None))
    unknown = {"at_first_token": None, "at_end": 0.0, "generated_on": None}
    assert "no promise at the first token, exact at the end" in text_of(receipt_with(quality=unknown))


@pytest.mark.parametrize(("num_chunks", "per_row"), [(24, 1), (25, 2), (105, 5), (4096, 171)])
def test_long_prompts_are_folded(num_chunks: int, per_row: int) -> None:
    """Into at most 24 rows that hold all chunks, their bytes and their levels."""
    chunks = [chunk(index=i, level="text" if i % 7 == 0 else "q3", bytes=10) for i in range(num_chunks)]
    text = text_of(receipt_with(chunks=chunks))
    rows = text[text.index("Chunks") : text.index(". asked for")].splitlines()[2:-1]
    assert len(rows) == -(-num_chunks // per_row) <= MAX_ROWS
    of_row = f"{10 * per_row:,}"
    assert all(f" {of_row} " in row for row in rows[:-1])
    assert (f"{per_row} a row" in text) == (per_row > 1)
    if num_chunks == 105:
        assert rows[0].split()[:3] == ["0-4", "text:1", "q3:4"] and rows[-1].split()[0] == "100-104"


def test_many_reasons_are_cut_in_the_middle() -> None:
    reasons = [{"at_ms": float(i), "what": f"reason {i}."} for i in range(200)]
    text = text_of(receipt_with(reasons=reasons))
    half = MAX_REASONS // 2
    assert f"reason {half - 1}." in text and f"reason {half}." not in text
    assert f"{200 - MAX_REASONS} more, see --json" in text and f"reason {200 - half}." in text


def test_words_of_others_cannot_move_the_cursor() -> None:
    text = text_of(receipt_with(reasons=[{"at_ms": 1.0, "what": "refused\x1b[2J\r\nby its source"}]))
    assert "\x1b" not in text and "\r" not in text


@pytest.mark.parametrize(
    "bad",
    [
        *(None, 5, [], {}, {"request_id": "r"}),
        {**RECEIPT, "chunks": 3},
        {**RECEIPT, "chunks": [3]},
        {**RECEIPT, "ttft_parts_ms": None},
        {**RECEIPT, "reasons": "x"},
    ],
)
def test_what_is_no_receipt(bad: Any) -> None:
    with pytest.raises(NotAReceipt):
        read_receipt(bad)


def test_the_receipt_inside_an_answer() -> None:
    assert read_receipt({"id": "cmpl-r1", "kv_receipt": RECEIPT}) is RECEIPT


# -- bars ---------------------------------------------------------------------------------------------------------


def span(symbol: str, begin_ms: float, end_ms: float) -> Span:
    return Span(symbol=symbol, begin_ms=begin_ms, end_ms=end_ms)


def test_bars_have_two_scales() -> None:
    axis = Axis(first_ms=100.0, end_ms=10_000.0, width=20)
    assert axis.bar([span("=", 0, 50), span("d", 50, 100), span("+", 5_050, 10_000)]) == "======ddddddd|   +++"
    assert Axis(first_ms=100.0, end_ms=100.0, width=10).bar([span("c", 50, 100)]) == "     ccccc"


def test_short_spans_have_a_cell_and_later_ones_win() -> None:
    axis = Axis(first_ms=None, end_ms=1000.0, width=10)
    assert axis.bar([span(".", 0, 900), span("=", 450, 451), span("d", 999, 1000)]) == "....=....d"
    assert axis.bar([span("c", 1000, 1000)]) == "         c"
    assert Axis(first_ms=None, end_ms=0.0, width=4).bar([span("c", 0, 0)]) == "c   "


def test_an_arrival_before_the_last_request_is_of_a_damaged_blob() -> None:
    again = chunk(asked_ms=300.0, first_part_ms=None, arrived_ms=260.0, filled_ms=None, decode_ms=None)
    assert spans_of(again, 500.0) == [span(".", 300.0, 500.0)]


def test_a_chunk_that_was_asked_for_and_then_computed() -> None:
    spans = spans_of(chunk(first_part_ms=None, arrived_ms=None, compute_ms=200.0, decode_ms=None), 500.0)
    assert spans == [span(".", 110.0, 200.0), span("c", 200.0, 300.0)]


def test_merged_bars_show_what_says_most() -> None:
    assert merged([". =d |", "..,cc|", "+ ,  |"]) == "+.=cc|"
    assert set(LEGEND) >= set("+.=cd,|")


# -- the command --------------------------------------------------------------------------------------------------


def run(*args: str | Path, code: int = 0, **env: str) -> str:
    done = CliRunner().invoke(app, ["explain", *map(str, args)], env={"COLUMNS": "100", "OPENAI_API_KEY": "", **env})
    assert done.exit_code == code, (done.exit_code, done.output, done.exception)
    assert "Traceback" not in done.output
    return done.output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(RECEIPT))
    return path


def test_from_a_file(file: Path) -> None:
    assert run("--file", file).splitlines()[0] == GOLDEN.splitlines()[0]
    assert json.loads(run("--file", file, "--json")) == RECEIPT
    plan = run("--file", file, "--plan-only")
    assert json.loads(plan) == RECEIPT["plan"] and plan.count("\n") == 1


def test_errors_say_what_to_do(file: Path, tmp_path: Path) -> None:
    def refused(*args: str | Path) -> str:
        (line,) = run(*args, code=2).splitlines()
        return line

    assert "name one request id" in refused()
    assert "name one request id" in refused("r1", "--file", file)
    assert "choose one" in refused("--file", file, "--json", "--plan-only")
    assert "cannot be read: No such file" in refused("--file", tmp_path / "none")
    assert "--base-url" in refused("r1", "--base-url", "http://127.0.0.1:9")
    assert "--base-url" in refused("r1", "--base-url", "127.0.0.1:9")
    assert "--base-url" in refused("r1", "--base-url", "http://[")
    file.write_text("{")
    assert "not valid JSON" in refused("--file", file)
    file.write_text("{}")
    assert "not a KV receipt: it has no `request_id`" in refused("--file", file)
    file.write_text(json.dumps({**RECEIPT, "plan": None}))
    assert "no plan to follow" in refused("--file", file, "--plan-only")


class Backend(FakeBackend):
    def _receipt(self, request_id: str) -> dict[str, Any]:
        return {**RECEIPT, "request_id": request_id}


def test_from_a_server() -> None:
    backend = Backend()
    with serving(make_app(backend, api_keys={"right": ""})) as url:
        answer = httpx.post(
            f"{url}/v1/completions", json={"prompt": "x"}, headers={"authorization": "Bearer right"}, timeout=30
        ).json()
        text = run(answer["id"], "--base-url", f"{url}/v1", "--api-key", "right")
        assert text.startswith("Met its target") and f"--base-url {url} --plan-only" in text
        assert run(answer["id"], "--base-url", url, OPENAI_API_KEY="right").startswith("Met its target")
        for args, said in (
            ((answer["id"], "--api-key", "wrong"), "does not take this key: give one of its `api_keys`"),
            ((answer["id"],), "asks for a key: give one of its `api_keys`"),
            (("other", "--api-key", "right"), "keeps no receipt of other"),
        ):
            (line,) = run(*args, "--base-url", url, code=2).splitlines()
            assert said in line
