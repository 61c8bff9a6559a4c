"""Paged attention on the CPU: reads keys and values in their pages, each row in one fixed order. The fast twin of
`attention_reference.py`.

Arithmetic only. Prefill rows and decode rows go through the same few vector steps (`attention_simd.py`), and what a row
gives depends on nothing but its query and the keys it may see (*schedule-invariance*):
- keys are cut at absolute positions 0, 256, 512, ...: a row visits its tiles in ascending order;
- a score, a weight and a weighted value are each summed in one lane in ascending order, in float32;
- what a row must not see weighs exactly 0, and adding 0 changes no bit. So it does not matter how many rows of other
  positions share the tile, or how far beyond its own position a row's tile reaches.

Work comes as *items*: some rows of one sequence and one KV head. Threads share a counter and take the next one.

Shapes: `N` packed rows, `Hq` query heads, `H` KV heads, `G = Hq / H`, `D`/`Dv` head dims, `W` words of D
(attention_simd).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit
from numba.core.registry import cpu_target

from kernels.attention_simd import (
    BLOCK_SIZES,
    LEAST_EXPONENT,
    STATE,
    TILE,
    copy_row,
    pack_keys,
    pack_values,
    prefetch,
    score,
    softmax,
    softmax_capped,
    store_row,
    weigh_16,
    weigh_64,
)
from kernels.vector_math import has_bf16, pointer, take_ticket

# What the files of steps hold: numba's cache watches this file only (a test keeps it up to date).
STEPS = "841f3a00569a48d5"
STRIP = 64  # keys whose scores are computed at once
MAX_ROWS = 192  # of an item: its sums stay in L2, and packing a tile is a few percent of the work on it
ITEM_FIELDS = (
    5  # where its block table starts, position of its first token, its first packed row, its tokens, its KV head
)


def has_bf16_products() -> bool:
    """Whether the CPU multiplies pairs of bf16 numbers (AVX512-BF16)."""
    return has_bf16(cpu_target.target_context)


@njit(nogil=True, cache=True)
def store_tokens(new, slots, width, pages):
    """pages[slots[i] * width :] = new[i * width :] for all i; flat arrays of one dtype."""
    for i in range(len(slots)):
        copy_row(new, i * width, width, pages, slots[i] * width)


@njit(nogil=True)
def _first_tile(start, window):
    return max(0, start - window + 1) // TILE if window else 0


@njit(nogil=True)
def _list_slots(tables, item, tile, block_tokens, null_slot, slots):
    """The slots of an item's tile, with the null slot behind them up to a whole strip; how many that makes."""
    first_key = tile * TILE
    count = min(TILE, item[1] + item[3] - first_key)
    padded = (count + STRIP - 1) // STRIP * STRIP
    at, block, offset = 0, item[0] + first_key // block_tokens, first_key % block_tokens
    while at < count:
        slot = np.int64(tables[block]) * block_tokens + offset
        taken = min(count - at, block_tokens - offset)
        for i in range(taken):
            slots[at + i] = slot + i
        at, block, offset = at + taken, block + 1, 0
    slots[count:padded] = null_slot
    return padded


@njit(nogil=True)
def _attend_block(
    rows, row, start, count, group, window, is_capped, rule, depth, width_v,
    item_queries, keys, values, scores, weights, sums, state,
):  # fmt: skip
    """Rows `row .. row + rows` of an item over a tile of `count` keys. `start`: the position of the item's first row,
    which like all positions here counts from the tile's first key."""
    values_a_word = len(scores) // len(weights)
    last = start + (row + rows - 1) // group
    if last < 0 or (window and start + row // group - window + 1 >= count):
        return
    sixteens = min(count, last + 16) // 16  # later keys are hidden from all of these rows
    for strip in range(0, sixteens * 16, STRIP):
        score(rows, item_queries, row * depth, depth, keys, strip, scores)
    for i in range(rows):
        position = start + (row + i) // group
        seen_from = max(0, position - window + 1) if window else 0
        line = i * (TILE // values_a_word)
        if is_capped:
            softmax_capped(
                scores, i * TILE, seen_from, position + 1, sixteens, rule,
                weights, line, state, (row + i) * STATE,
            )  # fmt: skip
        else:
            softmax(
                scores, i * TILE, seen_from, position + 1, sixteens, rule,
                weights, line, state, (row + i) * STATE,
            )  # fmt: skip
    words = sixteens * 16 // values_a_word
    column = 0
    while column + 64 <= width_v:
        weigh_64(rows, weights, words, values, column, width_v, sums, row * width_v, state, row * STATE)
        column += 64
    while column < width_v:
        weigh_16(rows, weights, words, values, column, width_v, sums, row * width_v, state, row * STATE)
        column += 16


# One layer's call, as its threads find it in memory. Addresses of flat arrays: `items` [n, ITEM_FIELDS] int64,
# `counter` [1] int64 of items taken, `threads` [1] int64 of threads begun, `tables` int32 of the block tables one
# behind the other, `queries` [N, Hq, W] words, the pages [.., H, D] and [.., H, Dv], `out` [N, Hq, Dv], `scratch` bytes
# a thread, `rule` float32 [3]: what to multiply a score with (to base 2), and with a softcap (`is_capped`) what before
# tanh and what after. `window`: keys that a query sees, 0 for all.
CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            "items num_items counter threads tables queries k_pages v_pages out rule scratch scratch_bytes is_capped "
            "window group block_tokens null_slot num_kv_heads dim_k dim_v"
        ).split()
    ]
)
_ANY = 1 << 40  # elements of an array whose length does not matter


@njit(nogil=True)
def _scratch_sizes(values_a_word, dim_k, dim_v):
    """What a thread needs, in 4-byte elements: slots of a tile, those of the next, an item's queries, a tile's keys and
    values in words, a block's scores and weights, an item's sums and states. All of them whole cache lines."""
    depth, width_v = dim_k // values_a_word, (dim_v + 15) // 16 * 16
    block = BLOCK_SIZES[0] * TILE
    return (
        2 * TILE,
        2 * TILE,
        MAX_ROWS * depth,
        (depth + 15) // 16 * 16 * TILE,
        TILE // values_a_word * width_v,
        block,
        block // values_a_word,
        MAX_ROWS * width_v,
        MAX_ROWS * STATE,
    )


@njit(nogil=True)
def _part(address, sizes, index, count, kind):
    for i in range(index):
        address += 4 * sizes[i]
    return carray(pointer(address), count, kind)


@njit(nogil=True)
def _attend(call, page, word, values_a_word):
    """Computes items until none is left. `page`: uint16 for bf16, or float32; `word`: uint32 for pairs, or float32."""
    items = carray(pointer(call.items), (call.num_items, ITEM_FIELDS), np.int64)
    counter = carray(pointer(call.counter), 1, np.int64)
    tables = carray(pointer(call.tables), _ANY, np.int32)
    queries = carray(pointer(call.queries), _ANY, word)
    k_pages = carray(pointer(call.k_pages), _ANY, page)
    v_pages = carray(pointer(call.v_pages), _ANY, page)
    out = carray(pointer(call.out), _ANY, page)
    rule = carray(pointer(call.rule), 3, np.float32)
    block_tokens, null_slot, num_kv_heads = call.block_tokens, call.null_slot, call.num_kv_heads
    dim_k, dim_v, group, window, is_capped = call.dim_k, call.dim_v, call.group, call.window, call.is_capped != 0
    num_heads = num_kv_heads * group
    width_v = (dim_v + 15) // 16 * 16
    depth = dim_k // values_a_word
    sizes = _scratch_sizes(values_a_word, dim_k, dim_v)
    memory = call.scratch + take_ticket(carray(pointer(call.threads), 1, np.int64)) * call.scratch_bytes
    slots = _part(memory, sizes, 0, TILE, np.int64)
    ahead = _part(memory, sizes, 1, TILE, np.int64)
    item_queries = _part(memory, sizes, 2, sizes[2], word)
    keys = _part(memory, sizes, 3, sizes[3], word)
    values = _part(memory, sizes, 4, sizes[4], word)
    scores = _part(memory, sizes, 5, sizes[5], np.float32)
    weights = _part(memory, sizes, 6, sizes[6], word)
    sums = _part(memory, sizes, 7, sizes[7], np.float32)
    state = _part(memory, sizes, 8, sizes[8], np.float32)

    while True:
        ticket = take_ticket(counter)
        if ticket >= len(items):
            break
        item = items[ticket]
        start, first_row, num_tokens, head = item[1], item[2], item[3], item[4]
        num_rows = num_tokens * group
        for token in range(num_tokens):
            source = ((first_row + token) * num_heads + head * group) * depth
            for i in range(group * depth):
                item_queries[token * group * depth + i] = queries[source + i]
        for row in range(num_rows):
            state[row * STATE] = LEAST_EXPONENT
            state[row * STATE + 1] = 0.0
            for i in range(width_v):
                sums[row * width_v + i] = 0.0
        tile, tiles = _first_tile(start, window), (start + num_tokens + TILE - 1) // TILE
        padded = _list_slots(tables, item, tile, block_tokens, null_slot, slots)
        while tile < tiles:
            # While this tile is computed, memory begins to send what this thread most likely computes next.
            next_item, next_tile, padded_ahead = item, tile + 1, 0
            next_ticket = counter[0]
            if next_tile == tiles and next_ticket < len(items):
                next_item = items[next_ticket]
                next_tile = _first_tile(next_item[1], window)
            if tile + 1 < tiles or next_ticket < len(items):
                padded_ahead = _list_slots(tables, next_item, next_tile, block_tokens, null_slot, ahead)
            for i in range(0, TILE, 16):
                if i < padded:
                    pack_keys(k_pages, slots, i, num_kv_heads, head, dim_k, keys)
                    pack_values(v_pages, slots, i, num_kv_heads, head, dim_v, values, width_v)
                if i < padded_ahead:
                    prefetch(k_pages, ahead, i, num_kv_heads, next_item[4], dim_k)
                    prefetch(v_pages, ahead, i, num_kv_heads, next_item[4], dim_v)
            row = 0
            while row < num_rows:
                left = num_rows - row
                rows = 6 if left >= 6 else 4 if left >= 4 else 2 if left >= 2 else 1
                _attend_block(
                    rows, row, start - tile * TILE, padded, group, window, is_capped, rule, depth, width_v,
                    item_queries, keys, values, scores, weights, sums, state,
                )  # fmt: skip
                row += rows
            slots, ahead = ahead, slots
            padded = padded_ahead
            tile += 1
        for row in range(num_rows):
            target = (first_row + row // group) * num_heads + head * group + row % group
            store_row(sums, row * width_v, dim_v, state, row * STATE + 1, out, target * dim_v)


def _pairs(call):
    _attend(carray(call, 1, CALL)[0], np.uint16, np.uint32, 2)


def _bf16(call):
    _attend(carray(call, 1, CALL)[0], np.uint16, np.float32, 1)


def _float32(call):
    _attend(carray(call, 1, CALL)[0], np.float32, np.float32, 1)


@cache
def attention_thread(*, is_bf16: bool, paired: bool) -> Any:
    """A ctypes function of the address of a CALL, for each of its threads. `paired`: words are pairs of bf16. Compiled
    on the first use on this machine, which takes some seconds."""
    function = _pairs if paired else _bf16 if is_bf16 else _float32
    return cfunc("void(voidptr)", cache=True)(function).ctypes


def scratch_bytes(*, paired: bool, dim_k: int, dim_v: int) -> int:
    """A thread's memory; it has to begin on a cache line."""
    return 4 * sum(_scratch_sizes.py_func(2 if paired else 1, dim_k, dim_v))
