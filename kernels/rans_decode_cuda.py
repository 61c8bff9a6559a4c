"""Decodes the stream on a GPU, into bf16 rows of a paged KV pool. numba-cuda; the stream is rans_reference.py's.

A group of N lanes (32 threads, or 16: two groups a warp) decodes one segment, all its stages one after another, since
the lanes' states run on. A *step* decodes N neighbouring channels of a token; four steps are a *quad*: a lane's four
channels d, d + N, d + 2N, d + 3N. With 64 or 128 dims, a token is one quad.

What makes a step short, since steps of a segment cannot overlap:
- words come from a window of 2 * N words in the group's registers: lane j holds word j and word N + j of it, a shuffle
  hands them out, and the N words after it are on their way from memory already;
- the base tables lie in shared memory as slot -> rank (1 byte), rank -> value, frequency, start: 1.25 KB a table;
- the integers of the stage before are read two quads ahead, tables' numbers and cuts before the quad's first step;
- head dims are compiled in, integers and addresses kept to 32 bits: numba widens what is not cast.

Both groups of a warp walk in step and vote together under a full mask: masks of half a warp would split it in two.
Every product and sum goes through the _rn intrinsics: the compiler would fuse a plain a * b + c.

Integers between stages lie in `scratch` as pairs, two 64-bit words a lane and quad: [T, quads, 2, N] of (d, d + N) and
(d + 2N, d + 3N). MODE_ROWS leaves the last stage's there too, for what the pages' writer does not do (matrices, other
dtypes than bf16, rotations across lanes); MODE_PAGES writes bf16 rows; MODE_LOSSLESS joins exponents with their plane
of signs and mantissas and writes bf16 rows.

Legend: J jobs (segments of any chunk), K stages, P rows of the profile's arrays (layer, head of K or V), n tables,
M - 1 refinement stages of `sets` sets each, D channels, N lanes. All arrays are flat and contiguous.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import config, cuda, types
from numba.cuda import libdevice

from kernels.rans_reference import lanes_of

# What a job is, int32 [J, JOB_FIELDS]. ROW: of the profile's arrays. TOKEN: the first of its tokens in row_pos, cos,
# sin. TENSOR: 0 writes out_k, 1 out_v. WHOLE: no stage was cut off. MULTIPLIER: 3 ** (M - K). HALF: half of the dims
# to rotate back: 0, or two runs (2 * N) with a token of one quad, else MODE_ROWS it must be.
JOB_FIELDS = 9
ROW, TOKEN, TOKENS, STAGES, WHOLE, MULTIPLIER, TENSOR, MODE, HALF = range(JOB_FIELDS)
MODE_PAGES, MODE_ROWS, MODE_LOSSLESS = range(3)

OK, OUT_OF_WORDS, BAD_STATE, BAD_FINAL_STATE, UNUSED_WORDS, EXCEPTIONS, VALUE_RANGE, NO_ROOM = range(8)

i32, u32, i64, u64, f32 = np.int32, np.uint32, np.int64, np.uint64, np.float32
FULL = 0xFFFFFFFF
LOW = np.uint32(1 << 16)  # of a state
SLOT_MASK = np.uint32(1023)
PROB_BITS = np.uint32(10)
HALF_MASK = np.uint32(0xFFFF)
BYTE = np.uint32(0xFF)
SIXTEEN = np.uint32(16)
WIDE = np.uint64(32)
NONE = np.uint32(0xFFFFFFFF)  # the next exception's position where there is none
MAX_EXCEPTION = 1 << 21
RANK_BYTES, SYMBOL_WORDS, CONTEXTS = 1024, 64, 3  # per table; per set of cuts
TABLE_WORDS = RANK_BYTES // 4 + SYMBOL_WORDS
RUNS = 4  # of a quad
# 4 blocks of 128 threads a multiprocessor. (The simulator's jit knows no such option.)
OPTIONS: dict[str, Any] = {} if config.ENABLE_CUDASIM else {"max_registers": 128}


@cuda.jit(device=True)
def _word(stream, at, length):
    """Word `at` of a piece's stream, 0 behind its end: nothing outside the piece is ever read."""
    if at < length:
        return u32(stream[at])
    return u32(0)


@cuda.jit(device=True)
def _wide(words, at):
    """The 32-bit number at word `at`, low half first."""
    return u32(u32(words[u64(at)]) | u32(u32(words[u64(at + 1)]) << SIXTEEN))


@cuda.jit(device=True)
def _exception(words, tail, number, count, last, limit):
    """Exception `number`: position (NONE behind the last), value, whether it is in order and in range."""
    if number >= count:
        return NONE, i32(0), True
    at = _wide(words, tail + 4 * i64(number))
    value = i32(_wide(words, tail + 4 * i64(number) + 2))
    if i64(at) <= i64(last) or i64(at) >= i64(limit) or value > MAX_EXCEPTION or value < -MAX_EXCEPTION:
        return NONE, i32(0), False
    return at, value, True


@cuda.jit(device=True)
def _context(q):
    """min(|q|, 2), whatever the q of an unused lane may be."""
    return i32(i32(q != 0) + i32(q > 1 or q < -1))


@cuda.jit(device=True)
def _low(pair):
    return i32(u32(pair & u64(FULL)))


@cuda.jit(device=True)
def _high(pair):
    return i32(u32(pair >> WIDE))


@cuda.jit(device=True)
def _pair(low, high):
    return u64(u64(u32(low)) | u64(u64(u32(high)) << WIDE))


@cuda.jit(device=True)
def _bf16(x):
    """float32 (finite) -> bf16 bits, to nearest even."""
    bits = u32(libdevice.float_as_int(x))
    odd = u32(u32(bits >> SIXTEEN) & u32(1))
    return u32(u32(bits + u32(0x7FFF) + odd) >> SIXTEEN)


@cuda.jit(device=True)
def _dequantized(q, multiplier, step, mean):
    return libdevice.fadd_rn(libdevice.fmul_rn(f32(i32(q * multiplier)), step), mean)


@cuda.jit(device=True)
def _rotated(a, b, c, s):
    """A pair of channels rotated: a c - b s, b c + a s."""
    first = libdevice.fadd_rn(libdevice.fmul_rn(a, c), f32(-libdevice.fmul_rn(b, s)))
    return first, libdevice.fadd_rn(libdevice.fmul_rn(b, c), libdevice.fmul_rn(a, s))


@cuda.jit(device=True)
def _joined(q, plain, at):
    """Exponent q + 128 and the byte of sign and mantissa at `at` -> bf16 bits."""
    plane = u32(plain[u64(at)])
    sign = u32(u32(plane & u32(128)) << u32(8))
    return u32(u32(u32(u32(q + 128) & BYTE) << u32(7)) | u32(sign | u32(plane & u32(127))))


@cuda.jit(device=True)
def _base_symbol(x, is_on, table, shared_bytes, shared_words):
    """Takes one symbol of a base table off the state -> state before its refill, integer (0 where not is_on)."""
    at = u32(table * u32(TABLE_WORDS))
    slot = u32(x & SLOT_MASK)
    rank = u32(shared_bytes[u32(u32(at << u32(2)) + slot)])
    entry = u32(shared_words[u32(u32(at + rank) + u32(RANK_BYTES // 4))])
    frequency = u32(u32(entry >> PROB_BITS) & u32(0x7FF))
    y = u32(u32(frequency * u32(x >> PROB_BITS)) + u32(slot - u32(entry & SLOT_MASK)))
    if is_on:
        return y, i32(i32(u32(entry >> u32(21))) - i32(128))
    return x, i32(0)


@cuda.jit(device=True)
def _third(x, is_on, cut, coarse):
    """Takes one symbol of a refinement table off the state -> state before its refill, r."""
    slot = u32(x & SLOT_MASK)
    first = u32(cut & HALF_MASK)
    second = u32(cut >> SIXTEEN)
    is_second = slot >= second
    is_first = slot >= first
    start = second if is_second else (first if is_first else u32(0))
    stop = u32(1024) if is_second else (second if is_first else first)
    y = u32(u32(u32(stop - start) * u32(x >> PROB_BITS)) + u32(slot - start))
    symbol = i32(i32(is_first) + i32(is_second) - i32(1))
    if is_on:
        return y, (i32(-symbol) if coarse < 0 else symbol)
    return x, i32(0)


@cache
def make_decode_kernel(num_dims: int) -> Any:
    """The kernel for segments of `num_dims` channels."""
    lanes = lanes_of(num_dims)
    quad_dims = RUNS * lanes
    quads = -(-num_dims // quad_dims)
    is_exact = num_dims == quads * quad_dims  # no lane stands for a channel that is not there
    is_one_quad = quads == 1
    is_half_warp = lanes == 16
    log_lanes = 4 if is_half_warp else 5

    @cuda.jit(device=True)
    def refill(x, is_on, near, used, shift, below):
        """Hands the window's next words to the lanes that need one -> state, words used so far."""
        need = is_on and x < LOW
        needy = u32(cuda.ballot_sync(FULL, need))
        if is_half_warp:
            needy = u32(u32(needy >> shift) & HALF_MASK)
        k = u32(used + u32(cuda.popc(u32(needy & below))))
        source = i32(u32(u32(k & u32(lanes - 1)) + shift))
        both = u32(cuda.shfl_sync(FULL, i32(near), source))
        word = u32(both & HALF_MASK) if k < u32(lanes) else u32(both >> SIXTEEN)
        if need:
            x = u32(u32(x << SIXTEEN) | word)
        return x, u32(used + u32(cuda.popc(needy)))

    @cuda.jit(device=True)
    def slide(near, ahead, used, window, stream, length, lane):
        """Moves the window on once N of its words are used up."""
        if used >= u32(lanes):
            used = u32(used - u32(lanes))
            window = u32(window + u32(lanes))
            near = u32(u32(near >> SIXTEEN) | u32(ahead << SIXTEEN))
            ahead = _word(stream, u32(window + u32(2 * lanes) + lane), length)
        return near, ahead, used, window

    @cuda.jit(device=True)
    def patched(words, tail, number, count, at_next, value_next, limit, stop, at, f0, f1, f2, f3):
        """Puts the exceptions below position `stop` in the places at, at + N, at + 2N, at + 3N of f0 to f3."""
        is_fine = True
        while at_next < stop:
            if at_next == at:
                f0 = value_next
            if at_next == u32(at + u32(lanes)):
                f1 = value_next
            if at_next == u32(at + u32(2 * lanes)):
                f2 = value_next
            if at_next == u32(at + u32(3 * lanes)):
                f3 = value_next
            number = i32(number + 1)
            at_next, value_next, is_good = _exception(words, tail, number, count, at_next, limit)
            is_fine = is_fine and is_good
        return number, at_next, value_next, is_fine, f0, f1, f2, f3

    @cuda.jit(device=True)
    def put(out_k, out_v, tensor, at, d0, v0, v1, v2, v3):
        """A lane's four bf16 values of a quad to one of the two tensors."""
        if tensor == 0:
            if is_exact or d0 < num_dims:
                out_k[u64(at)] = np.uint16(v0)
            if is_exact or d0 + lanes < num_dims:
                out_k[u64(at + lanes)] = np.uint16(v1)
            if is_exact or d0 + 2 * lanes < num_dims:
                out_k[u64(at + 2 * lanes)] = np.uint16(v2)
            if is_exact or d0 + 3 * lanes < num_dims:
                out_k[u64(at + 3 * lanes)] = np.uint16(v3)
        else:
            if is_exact or d0 < num_dims:
                out_v[u64(at)] = np.uint16(v0)
            if is_exact or d0 + lanes < num_dims:
                out_v[u64(at + lanes)] = np.uint16(v1)
            if is_exact or d0 + 2 * lanes < num_dims:
                out_v[u64(at + 2 * lanes)] = np.uint16(v2)
            if is_exact or d0 + 3 * lanes < num_dims:
                out_v[u64(at + 3 * lanes)] = np.uint16(v3)

    @cuda.jit(**OPTIONS)
    def decode_kernel(
        words, plain, pos, size, exceptions,  # u16 [*]; the same as u8; i64, i32, i32 [K, J]
        jobs, out_pos, scratch_pos, num_jobs,  # i32 [J, JOB_FIELDS]; i64 [J]: where each segment starts
        planes_pos,  # i64 [J]: lossless: the first byte in `plain` of each segment's plane
        image, num_tables, num_sets, num_refined,  # u64: what shared memory begins with, see rans_cuda.shared_image
        base_index, group, refine_index, active, num_rows,  # u32 [P, 2, W]; i32 [P]; u32 [M - 1, P, W]; i32 [M, P]
        step, mean,  # f32 [P, quads, 4, N] twice
        cos, sin, num_angles, row_pos,  # f32 [tokens, angles] twice; i64 [tokens]: each token's offset in out
        out_k, out_v, scratch,  # u16 [*] twice (bf16); u64 [*]
        status,  # i32 [J]: 0 or the code of what is wrong
    ):  # fmt: skip
        # W = quads * N: byte r of an index's word is the table of its lane's run r. Shared memory: the image, then
        # the anchors' integers, i32 [groups, quads, 4, N].
        shared_bytes = cuda.shared.array(0, types.uint8)
        shared_words = cuda.shared.array(0, types.uint32)
        shared_ints = cuda.shared.array(0, types.int32)
        shared_pairs = cuda.shared.array(0, types.uint64)
        thread = u32(cuda.threadIdx.x)
        threads = u32(cuda.blockDim.x)
        cuts_at = u32(num_tables * TABLE_WORDS)
        image_size = u32((cuts_at + u32(num_refined * num_sets * CONTEXTS) + u32(1)) >> u32(1))
        i = thread
        while i < image_size:
            shared_pairs[i] = image[i]
            i = u32(i + threads)
        cuda.syncthreads()

        lane = u32(thread & u32(lanes - 1))
        in_block = u32(thread >> u32(log_lanes))
        shift = u32(u32(thread & u32(31)) - lane)  # my group's place in a vote
        below = u32(u32(u32(1) << lane) - u32(1))
        anchors_at = u32(u32(2) * image_size + u32(in_block * u32(quads * quad_dims)) + lane)
        job = i32(u32(u32(cuda.blockIdx.x) * u32(threads >> u32(log_lanes))) + in_block)
        if job - i32(u32(shift >> u32(4))) >= num_jobs:
            return  # the whole warp
        is_sound = job < num_jobs
        if not is_sound:
            job = i32(num_jobs - 1)
        fields = i32(job * JOB_FIELDS)
        row = i32(jobs[fields + ROW])
        token = i64(jobs[fields + TOKEN])
        tokens = i32(jobs[fields + TOKENS])
        stages = i32(jobs[fields + STAGES])
        multiplier = i32(jobs[fields + MULTIPLIER])
        tensor = i32(jobs[fields + TENSOR])
        mode = i32(jobs[fields + MODE])
        half = i32(jobs[fields + HALF])
        out_at = i64(out_pos[job]) + i64(lane)
        anchor_group = i32(group[row])
        values = i64(tokens) * (quads * quad_dims)
        pairs = scratch[i64(scratch_pos[job]) : i64(scratch_pos[job]) + (values >> 1)]
        limit = i32(tokens * num_dims)
        num_quads = u32(tokens * quads)
        # Both groups of a warp take the longer way; the shorter's lanes idle at its end.
        warp_tokens = tokens
        warp_stages = stages
        if is_half_warp:
            warp_tokens = i32(max(tokens, i32(cuda.shfl_xor_sync(FULL, tokens, 16))))
            warp_stages = i32(max(stages, i32(cuda.shfl_xor_sync(FULL, stages, 16))))

        code = i32(OK)
        x = LOW
        stage = i32(0)
        while stage < warp_stages:
            is_mine = is_sound and stage < stages
            is_last = stage == stages - 1
            num_active = i32(0)
            new = i32(0)
            first = i64(0)
            tail = i64(0)
            num_exceptions = i32(0)
            if is_mine:
                piece = i64(stage) * num_jobs + job
                begin = i64(pos[piece])
                num_active = i32(active[i64(stage) * num_rows + row])
                before = i32(0)
                if stage > 0:
                    before = i32(min(lanes, i32(active[i64(stage - 1) * num_rows + row])))
                new = i32(min(lanes, num_active) - before)
                num_exceptions = i32(exceptions[piece])
                first = i64(begin + 2 * i64(new))
                tail = i64(begin + i64(size[piece]) - 4 * i64(num_exceptions))
                plane_end = i64(planes_pos[job]) + limit if mode == MODE_LOSSLESS else i64(0)
                if (
                    begin < 0
                    or num_exceptions < 0
                    or first > tail
                    or begin + i64(size[piece]) > words.size
                    or plane_end > plain.size
                ):
                    code = i32(OUT_OF_WORDS)
                    is_sound = False  # nothing more of this segment is read or written
                    is_mine = False
                    num_active = i32(0)
                    num_exceptions = i32(0)
                    first = tail
                elif before <= i32(lane) and i32(lane) < before + new:
                    x = _wide(words, begin + 2 * i64(i32(lane) - before))
                    if x < LOW:
                        code = i32(BAD_STATE) if code == OK else code
            length = u32(tail - first)
            stream = words[first:tail]
            # The window, and the words behind it.
            far = u32(_word(stream, u32(lane + u32(lanes)), length) << SIXTEEN)
            near = u32(_word(stream, lane, length) | far)
            ahead = _word(stream, u32(lane + u32(2 * lanes)), length)
            window = u32(0)  # the window's first word
            used = u32(0)  # words taken out of it
            number = i32(0)
            at_next, value_next, is_fine = _exception(words, tail, number, num_exceptions, -1, limit)
            if not is_fine:
                code = i32(EXCEPTIONS) if code == OK else code
            warp_active = num_active
            if is_half_warp:
                warp_active = i32(max(num_active, i32(cuda.shfl_xor_sync(FULL, num_active, 16))))
            writes_pairs = not is_last or mode == MODE_ROWS
            writes_lossless = is_last and mode == MODE_LOSSLESS
            writes_values = is_last and mode == MODE_PAGES

            index_at = i32(row * (2 * quads * lanes) + i32(lane))
            refine_at = i64(i64(stage - 1) * num_rows + row) * (quads * lanes) + i64(lane)
            row_at = i32(row * (quads * quad_dims) + i32(lane))
            stage_cuts = u32(cuts_at + u32(u32(stage - 1) * u32(num_sets * CONTEXTS)))
            tables = u32(0)  # four bytes: a table or set for each run
            delta_tables = u32(0)
            sets = u32(0)
            s0 = f32(0)
            s1 = f32(0)
            s2 = f32(0)
            s3 = f32(0)
            m0 = f32(0)
            m1 = f32(0)
            m2 = f32(0)
            m3 = f32(0)
            # The integers of this quad, the next and the one after.
            now_a = u64(0)
            now_b = u64(0)
            next_a = u64(0)
            next_b = u64(0)
            if stage > 0 and is_mine:
                now_a = pairs[lane]
                now_b = pairs[u32(lane + u32(lanes))]
                if num_quads > u32(1):
                    next_a = pairs[u32(lane + u32(2 * lanes))]
                    next_b = pairs[u32(lane + u32(3 * lanes))]
            phase = i32(0)  # t mod the anchor group
            here = u32(lane)  # of this quad's first pair
            t = i32(0)
            while t < warp_tokens:
                is_token = is_mine and t < tokens
                page = i64(0)
                if is_last and mode != MODE_ROWS and is_token:
                    page = out_at + i64(row_pos[u64(token + t)])
                quad = i32(0)
                while quad < quads:
                    if not is_one_quad or t == 0:
                        if stage == 0:
                            tables = u32(base_index[u32(index_at + quad * lanes)])
                            delta_tables = u32(base_index[u32(index_at + (quads + quad) * lanes)])
                        elif is_mine:
                            sets = u32(refine_index[u64(refine_at + quad * lanes)])
                        if writes_values:
                            of = u32(row_at + quad * quad_dims)
                            s0 = step[of]
                            m0 = mean[of]
                            s1 = step[u32(of + u32(lanes))]
                            m1 = mean[u32(of + u32(lanes))]
                            s2 = step[u32(of + u32(2 * lanes))]
                            m2 = mean[u32(of + u32(2 * lanes))]
                            s3 = step[u32(of + u32(3 * lanes))]
                            m3 = mean[u32(of + u32(3 * lanes))]
                    run_dims = i32(quad * quad_dims)
                    d0 = i32(run_dims + i32(lane))
                    on_0 = is_token and d0 < num_active
                    on_1 = is_token and d0 + lanes < num_active
                    on_2 = is_token and d0 + 2 * lanes < num_active
                    on_3 = is_token and d0 + 3 * lanes < num_active
                    f0 = i32(0)
                    f1 = i32(0)
                    f2 = i32(0)
                    f3 = i32(0)
                    c0 = i32(0)
                    c1 = i32(0)
                    c2 = i32(0)
                    c3 = i32(0)
                    if stage == 0:
                        used_tables = delta_tables if phase > 0 else tables
                        if run_dims < warp_active:
                            x, f0 = _base_symbol(x, on_0, u32(used_tables & BYTE), shared_bytes, shared_words)
                            x, used = refill(x, on_0, near, used, shift, below)
                            near, ahead, used, window = slide(near, ahead, used, window, stream, length, lane)
                        if run_dims + lanes < warp_active:
                            table = u32(u32(used_tables >> u32(8)) & BYTE)
                            x, f1 = _base_symbol(x, on_1, table, shared_bytes, shared_words)
                            x, used = refill(x, on_1, near, used, shift, below)
                            near, ahead, used, window = slide(near, ahead, used, window, stream, length, lane)
                        if run_dims + 2 * lanes < warp_active:
                            table = u32(u32(used_tables >> u32(16)) & BYTE)
                            x, f2 = _base_symbol(x, on_2, table, shared_bytes, shared_words)
                            x, used = refill(x, on_2, near, used, shift, below)
                            near, ahead, used, window = slide(near, ahead, used, window, stream, length, lane)
                        if run_dims + 3 * lanes < warp_active:
                            x, f3 = _base_symbol(x, on_3, u32(used_tables >> u32(24)), shared_bytes, shared_words)
                            x, used = refill(x, on_3, near, used, shift, below)
                            near, ahead, used, window = slide(near, ahead, used, window, stream, length, lane)
                    else:
                        c0 = _low(now_a)
                        c1 = _high(now_a)
                        c2 = _low(now_b)
                        c3 = _high(now_b)
                        set_0 = u32(sets & BYTE)
                        set_1 = u32(u32(sets >> u32(8)) & BYTE)
                        set_2 = u32(u32(sets >> u32(16)) & BYTE)
                        set_3 = u32(sets >> u32(24))
                        cut_0 = u32(shared_words[u32(stage_cuts + u32(set_0 * u32(CONTEXTS)) + u32(_context(c0)))])
                        cut_1 = u32(shared_words[u32(stage_cuts + u32(set_1 * u32(CONTEXTS)) + u32(_context(c1)))])
                        cut_2 = u32(shared_words[u32(stage_cuts + u32(set_2 * u32(CONTEXTS)) + u32(_context(c2)))])
                        cut_3 = u32(shared_words[u32(stage_cuts + u32(set_3 * u32(CONTEXTS)) + u32(_context(c3)))])
                        now_a = next_a
                        now_b = next_b
                        later = u32(u32(t * quads + quad) + u32(2))
                        if is_token and later < num_quads:
                            at_later = u32(u32(later * u32(2 * lanes)) + lane)
                            next_a = pairs[at_later]
                            next_b = pairs[u32(at_later + u32(lanes))]
                        if run_dims < warp_active:
                            x, f0 = _third(x, on_0, cut_0, c0)
                            x, used = refill(x, on_0, near, used, shift, below)
                            near, ahead, used, window = slide(near, ahead, used, window, stream, length, lane)
                        if run_dims + lanes < warp_active:
                            x, f1 = _third(x, on_1, cut_1, c1)
                            x, used = refill(x, on_1, near, used, shift, below)
                            near, ahead, used, window = slide(near, ahead, used, window, stream, length, lane)
                        if run_dims + 2 * lanes < warp_active:
                            x, f2 = _third(x, on_2, cut_2, c2)
                            x, used = refill(x, on_2, near, used, shift, below)
                            near, ahead, used, window = slide(near, ahead, used, window, stream, length, lane)
                        if run_dims + 3 * lanes < warp_active:
                            x, f3 = _third(x, on_3, cut_3, c3)
                            x, used = refill(x, on_3, near, used, shift, below)
                            near, ahead, used, window = slide(near, ahead, used, window, stream, length, lane)
                    if is_token:
                        quad_end = i32(run_dims + quad_dims)
                        stop = u32(t * num_dims + (quad_end if is_exact else min(quad_end, num_dims)))
                        if at_next < stop:
                            number, at_next, value_next, is_fine, f0, f1, f2, f3 = patched(
                                words, tail, number, num_exceptions, at_next, value_next, limit, stop,
                                u32(t * num_dims + d0), f0, f1, f2, f3,
                            )  # fmt: skip
                            if not is_fine:
                                code = i32(EXCEPTIONS) if code == OK else code
                        q0 = i32(3 * c0 + f0)
                        q1 = i32(3 * c1 + f1)
                        q2 = i32(3 * c2 + f2)
                        q3 = i32(3 * c3 + f3)
                        if stage == 0 and anchor_group > 0:
                            anchor = u32(anchors_at + u32(run_dims))
                            if phase == 0:
                                shared_ints[anchor] = q0
                                shared_ints[u32(anchor + u32(lanes))] = q1
                                shared_ints[u32(anchor + u32(2 * lanes))] = q2
                                shared_ints[u32(anchor + u32(3 * lanes))] = q3
                            else:
                                q0 = i32(q0 + shared_ints[anchor])
                                q1 = i32(q1 + shared_ints[u32(anchor + u32(lanes))])
                                q2 = i32(q2 + shared_ints[u32(anchor + u32(2 * lanes))])
                                q3 = i32(q3 + shared_ints[u32(anchor + u32(3 * lanes))])
                        if writes_pairs:
                            pairs[here] = _pair(q0, q1)
                            pairs[u32(here + u32(lanes))] = _pair(q2, q3)
                        if writes_values:
                            y0 = _dequantized(q0, multiplier, s0, m0)
                            y1 = _dequantized(q1, multiplier, s1, m1)
                            y2 = _dequantized(q2, multiplier, s2, m2)
                            y3 = _dequantized(q3, multiplier, s3, m3)
                            if is_one_quad and half > 0:
                                angle = i64(i64(token + t) * num_angles + i64(lane))
                                y0, y2 = _rotated(y0, y2, cos[u64(angle)], sin[u64(angle)])
                                y1, y3 = _rotated(y1, y3, cos[u64(angle + lanes)], sin[u64(angle + lanes)])
                            put(
                                out_k, out_v, tensor, page + i64(run_dims), d0,
                                _bf16(y0), _bf16(y1), _bf16(y2), _bf16(y3),
                            )  # fmt: skip
                        elif writes_lossless:
                            lowest = min(min(q0, q1), min(q2, q3))
                            highest = max(max(q0, q1), max(q2, q3))
                            if lowest < -128 or highest > 127:
                                code = i32(VALUE_RANGE) if code == OK else code
                            plane = i64(planes_pos[job]) + i64(t * num_dims + d0)
                            v0 = u32(0)
                            if is_exact or d0 < num_dims:
                                v0 = _joined(q0, plain, plane)
                            v1 = u32(0)
                            v2 = u32(0)
                            v3 = u32(0)
                            if is_exact or d0 + lanes < num_dims:
                                v1 = _joined(q1, plain, plane + lanes)
                            if is_exact or d0 + 2 * lanes < num_dims:
                                v2 = _joined(q2, plain, plane + 2 * lanes)
                            if is_exact or d0 + 3 * lanes < num_dims:
                                v3 = _joined(q3, plain, plane + 3 * lanes)
                            put(out_k, out_v, tensor, page + i64(run_dims), d0, v0, v1, v2, v3)
                    here = u32(here + u32(2 * lanes))
                    quad = i32(quad + 1)
                phase = i32(phase + 1)
                if phase >= anchor_group:
                    phase = i32(0)
                t = i32(t + 1)
            if is_mine:
                taken = u32(window + used)
                if number != num_exceptions:
                    code = i32(EXCEPTIONS) if code == OK else code
                if taken > length:
                    code = i32(OUT_OF_WORDS) if code == OK else code
                if taken < length:
                    code = i32(UNUSED_WORDS) if code == OK else code
                if is_last and jobs[fields + WHOLE] != 0 and x != LOW:
                    code = i32(BAD_FINAL_STATE) if code == OK else code
            stage = i32(stage + 1)
        if job < num_jobs and code != OK:
            cuda.atomic.max(status, job, code)

    return decode_kernel
