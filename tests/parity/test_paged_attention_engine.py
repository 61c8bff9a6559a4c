"""The engine's GPU side on the CPU: batches through the kernels in Triton's interpreter against the CPU's own batches,
and decode graphs with "capture" replaced by calling the function again."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefill.cuda_attention import RowPlan
from prefill.decode_graphs import StaticRows, padded_rows

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, random, sys, torch
from engine_models import loaded, random_model, random_prompt
from triton_interpreter import fix_floats
from prefill.attention import AttentionRule, Span
from prefill.cuda_attention import CudaPages, CudaQuantizedPages
from prefill.decode_graphs import DecodeGraphs
from prefill.engine import Engine, SequenceSlice
from prefill.kv_layout import KVLayout
from prefill.kv_pool import KVPool
from prefill.quantized_pool import QuantizedKVPool
from prefill.tiled_attention import TiledBatch

fix_floats()
RULES = {
    "plain": AttentionRule(scale=0.25, window=None, softcap=None),
    "window": AttentionRule(scale=0.25, window=70, softcap=None),
    "softcap": AttentionRule(scale=0.5, window=None, softcap=4.0),
}


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def say(name, passed, detail=""):
    print(json.dumps({"name": name, "passed": bool(passed), "detail": str(detail)}), flush=True)


def spans_of(parts, tables, rings):
    spans, row = [], 0
    for i, (start, count) in enumerate(parts):
        spans.append(Span(row=row, num_tokens=count, start=start, block_table=tables[i], ring=rings[i]))
        row += count
    return spans, row


def inputs(layout, rows, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (6, layout.head_dim_k), (2, layout.head_dim_k), (2, layout.head_dim_v)
    return [torch.randn(1, heads, rows + padding, dim, generator=generator).to(layout.torch_dtype)
            for heads, dim in shape]


# Mixed passes: chunks that start and chunks that go on, single rows between them, rows of padding.
PASSES = [[(0, 70), (0, 1), (0, 130), (0, 33)], [(70, 1), (1, 1), (130, 20), (33, 40)],
          [(71, 1), (2, 1), (150, 1), (73, 1)]]
layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim_k=16, head_dim_v=16, dtype="float32")
bf16 = KVLayout(num_layers=1, num_kv_heads=2, head_dim_k=64, head_dim_v=32, dtype="bfloat16")


def mixed(name, rule):
    order = random.Random(1).sample(range(40), 40)
    tables = [order[i * 10 : i * 10 + 10] for i in range(4)]
    pools = KVPool(layout, 40), KVPool(layout, 40)
    pages, worst = CudaPages(pools[0]), 0.0
    for number, parts in enumerate(PASSES):
        spans, rows = spans_of(parts, tables, [None] * 4)
        q, k, v = inputs(layout, rows, number, number)
        got = pages.batch(spans).attend(0, q, k, v, rule)
        want = TiledBatch(pools[1], spans).attend(0, q, k, v, rule)
        worst = max(worst, error(got, want))
        if number:
            worst = max(worst, float(got[0, rows:].abs().max()))
    same = all(torch.equal(a, b) for a, b in zip(pools[0].layer_slots(0), pools[1].layer_slots(0)))
    say(name, worst < 2e-6 and same, (worst, same))


def mixed_quantized(name, rule, kind):
    order = random.Random(1).sample(range(40), 40)
    tables = [order[i * 10 : i * 10 + 10] for i in range(4)]
    pools = [QuantizedKVPool(bf16, 40, kind, max_sequences=5) for _ in range(2)]
    rings = [[pool.rings.allocate() for _ in range(4)] for pool in pools]
    pages, worst = CudaQuantizedPages(pools[0].store), 0.0
    # In plain attention on until every row has had a block leave its ring.
    more = [[(start + i, 1) for start, _ in PASSES[2]] for i in range(1, 30 if name.endswith("plain") else 2)]
    for number, parts in enumerate([*PASSES, *more]):
        spans, rows = spans_of(parts, tables, rings[0])
        q, k, v = inputs(bf16, rows, number % 2, number)
        got = pages.batch(spans).attend(0, q, k, v, rule)
        want = pools[1].make_batch(spans).attend(0, q, k, v, rule)
        if number < 4 or number % 7 == 0:
            worst = max(worst, error(got, want))
    same = all(torch.equal(x, y) for x, y in zip(pools[0].store.tensors(), pools[1].store.tensors()))
    same &= torch.equal(pools[0].store.recent_k.data, pools[1].store.recent_k.data)
    say(name, worst < 1.5e-2 and same, (worst, same))


def graphs(name, kind):
    # Requests come and go; each step is compared with the eager engine, whose tokens both follow.
    dtype = torch.float32 if kind is None else torch.bfloat16
    model = loaded(random_model("llama", dtype, num_hidden_layers=2, hidden_size=64, intermediate_size=64,
                                max_position_embeddings=256, vocab_size=128))
    def make_pool():
        return KVPool(model.layout, 60) if kind is None else QuantizedKVPool(model.layout, 60, kind, max_sequences=6)
    eager, pool = Engine(model, make_pool(), row_multiple=1), make_pool()
    pages = CudaPages(pool) if kind is None else CudaQuantizedPages(pool.store)
    calls = []
    def capture(run):
        calls.append(run)
        return run
    graph = DecodeGraphs(model, pages, pool.block_tokens, max_rows=4, max_context=200, capture=capture)
    draw, live, free, worst, steps, block = random.Random(5), [], list(range(60)), 0.0, 0, pool.block_tokens
    while steps < 20:
        if len(live) < 4 and draw.random() < 0.5:
            prompt = [token % 128 for token in random_prompt(draw.choice([1, 15, 16, 62, 100]), seed=steps)]
            table = [free.pop(draw.randrange(len(free))) for _ in range(10)]
            rings = [None, None] if kind is None else [p.rings.allocate() for p in (eager.pool, pool)]
            item = {"tokens": prompt, "table": table, "rings": rings, "left": draw.randrange(2, 9)}
            logits = eager.forward([SequenceSlice(token_ids=prompt, start=0, block_table=table, ring=rings[0],
                                                  need_logits=True)])
            copy = eager.pool
            if kind is None:
                pool.write(table, 0, *copy.read(table, 0, len(prompt)))
            else:
                pool.restore(table, rings[1], copy.snapshot(table, rings[0]))
            item["tokens"] = prompt + [int(logits[0].argmax())]
            live.append(item)
        if not live:
            continue
        draw.shuffle(live)  # rows change places
        def slices(which):
            return [SequenceSlice(token_ids=x["tokens"][-1:], start=len(x["tokens"]) - 1, ring=x["rings"][which],
                    block_table=x["table"][: len(x["tokens"]) // block + 1], need_logits=True) for x in live]
        want, got = eager.forward(slices(0)), graph.forward(slices(1))
        assert got.shape == want.shape and got.dtype == torch.float32
        worst, steps = max(worst, error(got, want)), steps + 1
        for x, row in zip(live, want):
            x["tokens"].append(int(row.argmax()))
            x["left"] -= 1
        for x in [x for x in live if x["left"] == 0]:
            live.remove(x)
            free += x["table"]
            for p, ring in zip((eager.pool, pool), x["rings"]):
                if ring is not None:
                    p.rings.release(ring)
    say(f"{name}: logits", worst < (1e-5 if kind is None else 3e-2), worst)
    say(f"{name}: one graph a bucket", len(calls) == 3, len(calls))
    if kind is None:
        k, v = (x[pool.null_slot :] for x in pool.layer_slots(0))
        say(f"{name}: the block of zeros", not k.any() and not v.any())
    chunk = SequenceSlice(token_ids=[1, 2], start=0, block_table=[0], need_logits=True)
    far = SequenceSlice(token_ids=[1], start=200, block_table=list(range(20)), need_logits=True)
    one = SequenceSlice(token_ids=[1], start=0, block_table=[0], need_logits=True)
    refused = [graph.forward(x) is None for x in ([chunk], [one, chunk], [far], [one] * 5, [])]
    say(f"{name}: refusals", all(refused), refused)


what = sys.argv[1]
if what == "mixed":
    for name, rule in RULES.items():
        mixed(f"mixed, {name}", rule)
elif what == "graphs":
    graphs("graphs", None)
elif what == "quantized graphs":
    graphs("quantized graphs", "int8")
else:
    for name, rule in RULES.items():
        mixed_quantized(f"{what}, {name}", rule, what)
"""


@functools.cache
def run(what: str) -> list[dict[str, object]]:
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TRITON_INTERPRET": "1"}
    env |= {"PYTHONPATH": str(ROOT / "tests" / "support")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, what], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "count"),
    [("mixed", 3), ("int4", 3), ("int8", 3), ("fp8", 3), ("graphs", 4), ("quantized graphs", 3)],
)
def test_as_the_cpu_computes(what: str, count: int) -> None:
    rows = run(what)
    assert len(rows) == count
    assert all(row["passed"] for row in rows), rows


# What needs no kernel


def test_buckets_are_powers_of_two_and_then_multiples_of_16() -> None:
    assert [padded_rows(n, 1, 64) for n in (1, 2, 3, 5, 9, 32, 33, 48, 49, 64, 65)] == [
        1, 2, 4, 8, 16, 32, 48, 48, 64, 64, None,
    ]  # fmt: skip
    for multiple in (1, 2, 4, 16):
        for rows in range(1, 65):
            padded = padded_rows(rows, multiple, 64)
            assert padded is not None and padded >= rows and padded % multiple == 0
    assert padded_rows(3, 3, 4) is None  # 6 rows would be needed


def plan(tables: list[list[int]], slots: list[int]) -> RowPlan:
    return RowPlan(lengths=[len(t) * 4 for t in tables], slots=slots, tables=tables)


def test_static_rows_hold_the_batch_and_harmless_padding() -> None:
    static = StaticRows(max_rows=8, max_blocks=6, device=torch.device("cpu"))
    static.fill([7, 8, 9], [3, 7, 11], plan([[1], [2, 3], [4, 5, 6]], [7, 15, 27]), rows=4)
    static.fill([5], [7], plan([[2, 9]], [39]), rows=2)
    ids, positions = static.inputs(2)
    new = static.new_rows(2, max_length=24)
    assert ids.tolist() == [[5, 0]] and positions.tolist() == [[7, 0]]
    assert new.slots.tolist() == [39, -1]
    assert new.rows.lengths.tolist() == [8, 0] and new.rows.q_rows.tolist() == [0, 1]
    assert new.rows.tables[0, :2].tolist() == [2, 9]


def test_static_rows_upload_tables_only_where_they_changed() -> None:
    static = StaticRows(max_rows=4, max_blocks=6, device=torch.device("cpu"))
    tables = [[1], [2, 3]]
    static.fill([1, 1], [3, 7], plan(tables, [0, 0]), rows=2)
    assert static.num_table_uploads == 2
    tables[1] = [2, 3]  # equal, but another list
    static.fill([1, 1], [3, 7], plan(tables, [0, 0]), rows=2)
    assert static.num_table_uploads == 2
    tables[1].append(5)  # the list that was given before: a copy must have been kept
    static.fill([1, 1], [3, 11], plan(tables, [0, 0]), rows=2)
    assert static.num_table_uploads == 3
    assert static.new_rows(2, 24).rows.tables[1, :3].tolist() == [2, 3, 5]
    static.fill([1, 1], [3, 11], plan(tables[::-1], [0, 0]), rows=2)
    assert static.num_table_uploads == 5
    assert static.new_rows(2, 24).rows.tables[0, :3].tolist() == [2, 3, 5]
