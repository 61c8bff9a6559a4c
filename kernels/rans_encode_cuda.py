"""Encodes integers into the stream on a GPU: the decoder's mirror image. numba-cuda; rans_reference.py says the bytes.

A group of N lanes codes one segment from the last stage's last symbol to the first stage's first, quad by quad (see
rans_decode_cuda.py). Words and exceptions of a (stage, segment) are written downward from the end of a slot of their
own; `pack_kernel` then closes the gaps. What a symbol is depends on nobody's state: integers are read a quad ahead,
tables and divisions by 3 ** m need no waiting. What remains in line: compare, multiply by a reciprocal of the
frequency, correct by one. Integers come at the finest stage, int32 [T, D] a segment.

Legend as in rans_decode_cuda.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import cuda, types

from kernels.rans_decode_cuda import (
    BYTE,
    CONTEXTS,
    FULL,
    HALF_MASK,
    LOW,
    NO_ROOM,
    OK,
    OPTIONS,
    RUNS,
    SIXTEEN,
    VALUE_RANGE,
    i32,
    i64,
    u32,
    u64,
)
from kernels.rans_reference import MAX_MAGNITUDE, lanes_of

# What a job is, int32 [J, ENCODE_FIELDS]. ROW: of the profile's arrays. COARSER: thirds to take before the last stage.
ENCODE_FIELDS = 4
E_ROW, E_TOKENS, E_STAGES, E_COARSER = range(ENCODE_FIELDS)

NUM_RECIPROCALS = 1025
VALUES = 256  # of a base table, from -128 on
FREQUENCY_SHIFT = np.uint32(22)  # of a state, to compare with a frequency


@cuda.jit(device=True)
def _nearest(q, power, magic, lift):
    """q / power to the nearest whole number, |q| <= 2^20, power = 3^m: m times (q + 1) // 3 at once.

    magic: ceil(2^32 / power), or 0 for power 1. lift: a multiple of power over 2^20, to divide without a sign; exact
    as long as the sum is below 2^24 (magic is off by less than power <= 3^5).
    """
    if magic == u64(0):
        return i32(q)
    lifted = u32(i32(q + i32(lift * power) + i32(power >> 1)))
    return i32(i32(u32(u64(u64(lifted) * magic) >> u64(32))) - lift)


@cuda.jit(device=True)
def _base_code(value, table, shared, standins_at):
    """The table's entry of a value, or its stand-in's, and whether that is so."""
    at = u32(value + 128)
    entry = u32(0)
    if at < u32(VALUES):
        entry = u32(shared[u32(u32(table * u32(VALUES)) + at)])
    is_exception = u32(entry >> SIXTEEN) == u32(0)
    if is_exception:
        entry = u32(shared[u32(standins_at + table)])
    return entry, is_exception


@cuda.jit(device=True)
def _third_code(fine, coarse, which, shared, stage_cuts):
    """frequency << 16 | start of the third of `coarse` that `fine` is, and r."""
    r = i32(fine - 3 * coarse)
    context = i32(i32(coarse != 0) + i32(coarse > 1 or coarse < -1))
    cut = u32(shared[u32(stage_cuts + u32(which * u32(CONTEXTS)) + u32(context))])
    symbol = i32(-r) if coarse < 0 else r
    first = u32(cut & HALF_MASK)
    second = u32(cut >> SIXTEEN)
    start = u32(0)
    stop = first
    if symbol == 0:
        start = first
        stop = second
    if symbol == 1:
        start = second
        stop = u32(1024)
    return u32(u32(u32(stop - start) << SIXTEEN) | start), r


@cache
def make_encode_kernel(num_dims: int) -> Any:
    """The kernel for segments of `num_dims` channels."""
    lanes = lanes_of(num_dims)
    quad_dims = RUNS * lanes
    quads = -(-num_dims // quad_dims)
    is_exact = num_dims == quads * quad_dims
    is_one_quad = quads == 1
    is_half_warp = lanes == 16
    log_lanes = 4 if is_half_warp else 5

    @cuda.jit(device=True)
    def emit(x, on, entry, shared, reciprocals_at, slot, cursor, shift, below):
        """Codes one symbol a lane -> state, cursor. Words go to slot[cursor - 1] downward, in lane order."""
        frequency = u32(entry >> SIXTEEN)
        reciprocal = shared[u32(reciprocals_at + frequency)]
        is_big = on and u32(x >> FREQUENCY_SHIFT) >= frequency
        big = u32(cuda.ballot_sync(FULL, is_big))
        if is_half_warp:
            big = u32(u32(big >> shift) & HALF_MASK)
        cursor = i32(cursor - i32(cuda.popc(big)))
        if is_big:
            at = i32(cursor + i32(cuda.popc(u32(big & below))))
            if at >= 0:
                slot[u32(at)] = np.uint16(x & HALF_MASK)
            x = u32(x >> SIXTEEN)
        times = u32(u64(u64(x) * u64(reciprocal)) >> u64(32))  # right, or one too few
        rest = u32(x - u32(times * frequency))
        if rest >= frequency:
            times = u32(times + u32(1))
            rest = u32(rest - frequency)
        y = u32(u32(u32(times << u32(10)) + rest) + u32(entry & HALF_MASK))
        return (y if on else x), cursor

    @cuda.jit(device=True)
    def note(is_exception, value, at, exceptions, cursor, shift, below):
        """Writes exceptions (position, value) downward from exceptions[2 * cursor], in lane order -> cursor."""
        said = u32(cuda.ballot_sync(FULL, is_exception))
        if is_half_warp:
            said = u32(u32(said >> shift) & HALF_MASK)
        cursor = i32(cursor - i32(cuda.popc(said)))
        if is_exception:
            place = i32(cursor + i32(cuda.popc(u32(said & below))))
            if place >= 0:
                exceptions[u32(2 * place)] = at
                exceptions[u32(2 * place + 1)] = value
        return cursor

    @cuda.jit(device=True)
    def read(rows, at, d0):
        """A lane's four integers of a quad whose first channel is d0, at rows[at]."""
        if is_exact:
            return (
                i32(rows[at]), i32(rows[u32(at + u32(lanes))]), i32(rows[u32(at + u32(2 * lanes))]),
                i32(rows[u32(at + u32(3 * lanes))]),
            )  # fmt: skip
        q0 = i32(0)
        q1 = i32(0)
        q2 = i32(0)
        q3 = i32(0)
        if d0 < num_dims:
            q0 = i32(rows[at])
        if d0 + lanes < num_dims:
            q1 = i32(rows[u32(at + u32(lanes))])
        if d0 + 2 * lanes < num_dims:
            q2 = i32(rows[u32(at + u32(2 * lanes))])
        if d0 + 3 * lanes < num_dims:
            q3 = i32(rows[u32(at + u32(3 * lanes))])
        return q0, q1, q2, q3

    @cuda.jit(**OPTIONS)
    def encode_kernel(
        q, q_pos, jobs, num_jobs,  # i32 [*]; i64 [J]: each segment's first integer; i32 [J, ENCODE_FIELDS]
        image, num_tables, num_sets, num_refined,  # u64: what shared memory begins with, see rans_cuda.encode_image
        base_index, group, refine_index, active, num_rows,  # u32 [P, 2, W]; i32 [P]; u32 [M - 1, P, W]; i32 [M, P]
        out, capacity,  # u16 [K, J, capacity]: words, at each slot's end
        exceptions, exception_capacity,  # i32 [K, J, exception_capacity, 2], at each slot's end
        states, num_words, num_exceptions,  # u32 [K, J, N]; i32 [K, J] twice
        status,  # i32 [J]
    ):  # fmt: skip
        # The image, in u32: base tables [n, 256] | their stand-ins' entries [n] | reciprocals [1025] | cuts.
        shared = cuda.shared.array(0, types.uint32)
        shared_pairs = cuda.shared.array(0, types.uint64)
        thread = u32(cuda.threadIdx.x)
        threads = u32(cuda.blockDim.x)
        standins_at = u32(num_tables * VALUES)
        reciprocals_at = u32(standins_at + u32(num_tables))
        cuts_at = u32(reciprocals_at + u32(NUM_RECIPROCALS))
        image_size = u32(u32(cuts_at + u32(num_refined * num_sets * CONTEXTS) + u32(1)) >> u32(1))
        i = thread
        while i < image_size:
            shared_pairs[i] = image[i]
            i = u32(i + threads)
        cuda.syncthreads()

        lane = u32(thread & u32(lanes - 1))
        shift = u32(u32(thread & u32(31)) - lane)
        below = u32(u32(u32(1) << lane) - u32(1))
        job = i32(u32(u32(cuda.blockIdx.x) * u32(threads >> u32(log_lanes))) + u32(thread >> u32(log_lanes)))
        if job - i32(u32(shift >> u32(4))) >= num_jobs:
            return  # the whole warp
        is_job = job < num_jobs
        if not is_job:
            job = i32(num_jobs - 1)
        fields = i32(job * ENCODE_FIELDS)
        row = i32(jobs[fields + E_ROW])
        tokens = i32(jobs[fields + E_TOKENS])
        stages = i32(jobs[fields + E_STAGES])
        coarser = i32(jobs[fields + E_COARSER])
        rows = q[i64(q_pos[job]) : i64(q_pos[job]) + i64(tokens) * num_dims]
        anchor_group = i32(group[row])
        warp_tokens = tokens
        warp_stages = stages
        if is_half_warp:
            warp_tokens = i32(max(tokens, i32(cuda.shfl_xor_sync(FULL, tokens, 16))))
            warp_stages = i32(max(stages, i32(cuda.shfl_xor_sync(FULL, stages, 16))))
        index_at = i32(row * (2 * quads * lanes) + i32(lane))

        code = i32(OK)
        x = LOW
        stage = i32(warp_stages - 1)
        while stage >= 0:
            is_mine = is_job and stage < stages
            piece = i64(i64(stage) * num_jobs + job)
            slot = out[piece * capacity : (piece + 1) * capacity]
            pairs = exceptions[2 * piece * exception_capacity : 2 * (piece + 1) * exception_capacity]
            num_active = i32(0)
            if is_mine:
                num_active = i32(active[i64(stage) * num_rows + row])
            warp_active = num_active
            if is_half_warp:
                warp_active = i32(max(num_active, i32(cuda.shfl_xor_sync(FULL, num_active, 16))))
            refine_at = i64(i64(stage - 1) * num_rows + row) * (quads * lanes) + i64(lane)
            stage_cuts = u32(cuts_at + u32(u32(stage - 1) * u32(num_sets * CONTEXTS)))
            power = i32(1)
            finer = i32(coarser + stages - 1 - stage)
            while finer > 0:
                power = i32(power * 3)
                finer = i32(finer - 1)
            magic = u64(0)
            if power > 1:
                magic = u64(u64(u32(u32(FULL) // u32(power))) + u64(1))
            lift = i32(i32(MAX_MAGNITUDE // power) + 1)
            coarse_power = i32(power * 3)
            coarse_magic = u64(u64(u32(u32(FULL) // u32(coarse_power))) + u64(1))
            coarse_lift = i32(i32(MAX_MAGNITUDE // coarse_power) + 1)

            cursor = i32(capacity)
            exception_cursor = i32(exception_capacity)
            phase = i32(0)
            if anchor_group > 0:
                phase = i32((tokens - 1) % anchor_group)
            tables = u32(0)  # four bytes: a table or set for each run
            delta_tables = u32(0)
            n0 = i32(0)
            n1 = i32(0)
            n2 = i32(0)
            n3 = i32(0)
            if is_mine:
                last = i32((quads - 1) * quad_dims + i32(lane))
                n0, n1, n2, n3 = read(rows, u32((tokens - 1) * num_dims + last), last)
            # The last tokens of a longer neighbour come first: a shorter group starts late.
            t = i32(warp_tokens - 1)
            while t >= 0:
                is_token = is_mine and t < tokens
                quad = i32(quads - 1)
                while quad >= 0:
                    if not is_one_quad or t == warp_tokens - 1:
                        if stage == 0:
                            tables = u32(base_index[u32(index_at + quad * lanes)])
                            delta_tables = u32(base_index[u32(index_at + (quads + quad) * lanes)])
                        elif is_mine:
                            tables = u32(refine_index[u64(refine_at + quad * lanes)])
                    run_dims = i32(quad * quad_dims)
                    d0 = i32(run_dims + i32(lane))
                    at = i32(t * num_dims + d0)
                    q0 = n0
                    q1 = n1
                    q2 = n2
                    q3 = n3
                    if is_token:
                        if quad > 0:
                            n0, n1, n2, n3 = read(rows, u32(at - quad_dims), i32(d0 - quad_dims))
                        elif t > 0:
                            last = i32((quads - 1) * quad_dims + i32(lane))
                            n0, n1, n2, n3 = read(rows, u32((t - 1) * num_dims + last), last)
                    else:
                        q0 = i32(0)
                        q1 = i32(0)
                        q2 = i32(0)
                        q3 = i32(0)
                    largest = max(max(q0, q1), max(q2, q3))
                    least = min(min(q0, q1), min(q2, q3))
                    if largest > MAX_MAGNITUDE or least < -MAX_MAGNITUDE:
                        code = i32(VALUE_RANGE)
                    v0 = _nearest(q0, power, magic, lift)
                    v1 = _nearest(q1, power, magic, lift)
                    v2 = _nearest(q2, power, magic, lift)
                    v3 = _nearest(q3, power, magic, lift)
                    on_0 = is_token and d0 < num_active
                    on_1 = is_token and d0 + lanes < num_active
                    on_2 = is_token and d0 + 2 * lanes < num_active
                    on_3 = is_token and d0 + 3 * lanes < num_active
                    if stage == 0:
                        if is_token and phase > 0:
                            a0, a1, a2, a3 = read(rows, u32(at - phase * num_dims), d0)
                            v0 = i32(v0 - _nearest(a0, power, magic, lift))
                            v1 = i32(v1 - _nearest(a1, power, magic, lift))
                            v2 = i32(v2 - _nearest(a2, power, magic, lift))
                            v3 = i32(v3 - _nearest(a3, power, magic, lift))
                        used = delta_tables if phase > 0 else tables
                        e0, x0 = _base_code(v0, u32(used & BYTE), shared, standins_at)
                        e1, x1 = _base_code(v1, u32(u32(used >> u32(8)) & BYTE), shared, standins_at)
                        e2, x2 = _base_code(v2, u32(u32(used >> u32(16)) & BYTE), shared, standins_at)
                        e3, x3 = _base_code(v3, u32(used >> u32(24)), shared, standins_at)
                    else:
                        c0 = _nearest(q0, coarse_power, coarse_magic, coarse_lift)
                        c1 = _nearest(q1, coarse_power, coarse_magic, coarse_lift)
                        c2 = _nearest(q2, coarse_power, coarse_magic, coarse_lift)
                        c3 = _nearest(q3, coarse_power, coarse_magic, coarse_lift)
                        e0, v0 = _third_code(v0, c0, u32(tables & BYTE), shared, stage_cuts)
                        e1, v1 = _third_code(v1, c1, u32(u32(tables >> u32(8)) & BYTE), shared, stage_cuts)
                        e2, v2 = _third_code(v2, c2, u32(u32(tables >> u32(16)) & BYTE), shared, stage_cuts)
                        e3, v3 = _third_code(v3, c3, u32(tables >> u32(24)), shared, stage_cuts)
                        x0 = False
                        x1 = False
                        x2 = False
                        x3 = False
                    # An inactive channel has no symbol: anything but 0 is an exception. (Tokens not ours are all 0.)
                    x0 = x0 if on_0 else v0 != 0
                    x1 = x1 if on_1 else v1 != 0
                    x2 = x2 if on_2 else v2 != 0
                    x3 = x3 if on_3 else v3 != 0
                    if cuda.ballot_sync(FULL, x0 or x1 or x2 or x3) != 0:
                        exception_cursor = note(x3, v3, i32(at + 3 * lanes), pairs, exception_cursor, shift, below)
                        exception_cursor = note(x2, v2, i32(at + 2 * lanes), pairs, exception_cursor, shift, below)
                        exception_cursor = note(x1, v1, i32(at + lanes), pairs, exception_cursor, shift, below)
                        exception_cursor = note(x0, v0, at, pairs, exception_cursor, shift, below)
                    if run_dims + 3 * lanes < warp_active:
                        x, cursor = emit(x, on_3, e3, shared, reciprocals_at, slot, cursor, shift, below)
                    if run_dims + 2 * lanes < warp_active:
                        x, cursor = emit(x, on_2, e2, shared, reciprocals_at, slot, cursor, shift, below)
                    if run_dims + lanes < warp_active:
                        x, cursor = emit(x, on_1, e1, shared, reciprocals_at, slot, cursor, shift, below)
                    if run_dims < warp_active:
                        x, cursor = emit(x, on_0, e0, shared, reciprocals_at, slot, cursor, shift, below)
                    quad = i32(quad - 1)
                if is_token:
                    phase = i32(phase - 1)
                    if phase < 0:
                        phase = i32(max(anchor_group - 1, 0))
                t = i32(t - 1)
            if is_mine:
                states[u64(piece * lanes + i64(lane))] = x
                if cursor < 0 or exception_cursor < 0:
                    code = i32(NO_ROOM) if code == OK else code
                if lane == u32(0):
                    num_words[u64(piece)] = i32(capacity - cursor)
                    num_exceptions[u64(piece)] = i32(exception_capacity - exception_cursor)
            stage = i32(stage - 1)
        if is_job and code != OK:
            cuda.atomic.max(status, job, code)

    return encode_kernel


@cuda.jit
def pack_kernel(
    jobs, num_jobs, active, num_rows,  # as in encode_kernel
    slots, capacity, exceptions, exception_capacity, states, num_words, num_exceptions, lanes,  # encode_kernel's out
    pos, out,  # i64 [K, J]: where each piece goes, behind its side information; u16 [*]
):  # fmt: skip
    """One block a piece: states, stream, exceptions, one behind the other. Nothing is written past the end of `out`."""
    number = i64(cuda.blockIdx.x)
    stage = i32(number // num_jobs)
    job = i32(number % num_jobs)
    row = i64(jobs[job * ENCODE_FIELDS + E_ROW])
    if stage >= jobs[job * ENCODE_FIELDS + E_STAGES]:
        return
    lanes = i32(lanes)
    before = i32(0)
    if stage > 0:
        before = i32(min(lanes, active[i64(stage - 1) * num_rows + row]))
    new = i32(min(lanes, active[i64(stage) * num_rows + row]) - before)
    length = i32(min(num_words[number], capacity))
    count = i32(min(num_exceptions[number], exception_capacity))
    at = i64(pos[number])
    if at < 0 or at + 2 * new + length + 4 * i64(count) > out.size:
        return  # someone counted wrong; the host compares sizes
    thread = i32(cuda.threadIdx.x)
    threads = i32(cuda.blockDim.x)
    i = thread
    while i < 2 * new:
        state = u32(states[u64(number * lanes + before + (i >> 1))])
        out[u64(at + i)] = np.uint16(state >> SIXTEEN) if i & 1 else np.uint16(state & HALF_MASK)
        i = i32(i + threads)
    at += 2 * i64(new)
    stream = i64(number * capacity + capacity - length)
    i = thread
    while i < length:
        out[u64(at + i)] = slots[u64(stream + i)]
        i = i32(i + threads)
    at += i64(length)
    pairs = i64(2 * (number * exception_capacity + exception_capacity - count))
    i = thread
    while i < 4 * count:
        wide = u32(exceptions[u64(pairs + (i >> 1))])
        out[u64(at + i)] = np.uint16(wide >> SIXTEEN) if i & 1 else np.uint16(wide & HALF_MASK)
        i = i32(i + threads)
