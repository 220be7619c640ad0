"""Merge of the partial results that `hopper_decode` leaves of jobs in three pieces or more.

    m = max m_i        O = sum 2^(m_i - m) O_i / sum 2^(m_i - m) s_i        lse2 = m + log2 of that sum

of each part O_i, not divided by its sum s_i of exponentials relative to 2^m_i.

Partial O lies as the tensor core left it in the registers of the decode's warps, two by two in hopper_part's 24 bits: of each (slot, KV
head, row tile, warp) 32 strips, strip i the columns 8 i to 8 i + 7 of 16 rows; a lane has four floats of a strip:

    lane l of strip i: rows l / 4 and l / 4 + 8, columns 8 i + 2 (l % 4) and the next, of each

Where rows are wgmma's N (hopper_swapped, `num_rows` 16 or 32) it lies as hopper_swapped_store says: 16 columns of 8 rows are a strip,

    lane l of strip (tile, j): rows 8 j + 2 (l % 4) and the next, columns l / 4 and l / 4 + 8 of the warp's 16 of that tile, of each

and what is said of rows and columns here is so of a lane's floats with the two exchanged.

A warp takes a pair of strips, 32 bytes of a row of out; a thread block of 8 warps eight such pairs, or its share of them: the more parts,
the more blocks share (the table says):

    shares   pairs of a block   warps of a pair   parts of a warp
    1        8                  1                 all, 4 at a time
    2        4                  2                 every 2nd
    4        2                  4                 every 4th
    8        1                  8                 every 8th: 8 of 64

and where a pair has several warps, the first adds up what they found. What decides the order of a sum is the job's number of parts and how
the plan shares merges, which under batch_invariant follows from the kernel.

The grid is (8 pairs, half of O and 16 rows of a job; KV heads; rows of the merge table), as many of the last as fit on the machine, of a
bound that the host knows without the lengths; a block that has done its item goes on to the same of a later row. The grid is launched
programmatically: its blocks come onto the machine as the decode's leave, when all of the decode's have begun. An item does not wait for the
decode's end, but for its own parts: the decode's warps count them up in `counters`, a word for each (job, KV head, row tile, warp), and the
last block that has seen it complete makes it 0 for the next launch. A block that comes before any part goes through its item without loads
and stores meanwhile: a rehearsal, which brings its code near. One that finds some of them there waits for the rest: that takes less time.
"""

from collections import namedtuple
from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from .. import ptx
from ..contract import HEAD_DIM_V, LN_2
from ..scheduler import (
    MERGE_COLUMNS,
    MERGE_FIRST_SLOT,
    MERGE_MAX_SHARES,
    MERGE_NUM_PARTS,
    MERGE_NUM_SHARES,
    MERGE_Q_BATCH,
    MERGE_Q_BEGIN,
    MERGE_Q_LEN,
    MERGE_ROW_BEGIN,
    MERGE_SHARE,
    TOTAL_MERGES,
)
from .hopper_config import (
    BLOCK_M,
    BLOCK_N,
    MINUS_INFINITY,
    NUM_WARPS,
    STRIPS,
    TILE_COLUMNS,
    HopperConfig,
    Partials,
    Results,
)
from .hopper_load import column, load_row
from .hopper_part import PAIR_BYTES, PAIR_WORDS, STRIP_WORDS, load_pair, unpack, words_4_and_5
from .hopper_store import query_and_head

i32, i64, u32, u64, f32 = np.int32, np.int64, np.uint32, np.uint64, np.float32

MERGE_WARPS = MERGE_MAX_SHARES
NUM_THREADS = 32 * MERGE_WARPS


def blocks_per_sm(num_rows: int) -> int:
    """Held together by an SM: what their registers must suffice for. For rows that are wgmma's N three of them would spill."""
    return 3 if num_rows == BLOCK_M else 2


# 16 rows by 8 pairs of strips, or a share of them, are an item.
ITEM_ROWS = 16
PAIR = 2
ITEMS_PER_HALF = STRIPS // (PAIR * MERGE_WARPS)
ITEMS_PER_GROUP = 2 * ITEMS_PER_HALF
# Parts that a warp loads at a time: their latencies overlap.
UNROLL = 4
BATCH, BATCH_WORDS, BATCH_STATES = UNROLL * PAIR * 4, UNROLL * PAIR_WORDS, UNROLL * 4
# What a lane hands to the first warp of its pair: maximum and sum of two rows, four floats of O in each strip.
O_STATE = 4
O_FLOATS = 4 * PAIR
STATE_FLOATS = O_STATE + O_FLOATS
LANE_BYTES, WARP_BYTES = 4 * STATE_FLOATS, 32 * 4 * STATE_FLOATS
STATES_SMEM = MERGE_WARPS * 32 * STATE_FLOATS
# Of all warps: maxima and sums, and what O is to be multiplied by.
ENDS, WEIGHTS = O_STATE * MERGE_WARPS, 2 * MERGE_WARPS
ROWS_SMEM = 2 * ITEM_ROWS

# What a block's warps share: their states, by address; where each of an item's rows goes, and then where the lse of each goes; how many
# announcements of its parts thread 0 has seen.
Shared = namedtuple("Shared", "states_smem rows_smem announced_smem")
# Where a lane's share of slot 0 lies: words 0 to 3 of its pair of strips, 4 and 5, its rows' states.
LaneParts = namedtuple("LaneParts", "words last_words state")
# What a launch has in common, and which item of a row of the table a block has.
Shape = namedtuple("Shape", "row_tiles heads_per_kv")
Item = namedtuple("Item", "group half row_group kv_head")


def merge_signature() -> types.Type:
    """Types of the kernel's arguments, in the order of `hopper_merge`'s."""
    i, stride, address = types.int32, types.int64, types.uint64
    return types.void(address, address, address, address, address, address, stride, stride, stride, address, stride, stride, stride,
                      i, i, types.float32)


@cache
def make_merge_kernel(dtype: str, num_rows: int) -> Callable[..., None]:
    """The kernel, not yet compiled. Grid (ITEMS_PER_GROUP for each 16 rows of a job that may be in use, KV heads, any), NUM_THREADS
    threads."""
    config = HopperConfig(dtype, BLOCK_N, 1, num_rows)
    IS_SWAPPED, WARP_PART, NUM_STATES = config.is_swapped, config.warp_part_bytes, config.num_states
    # A state is num_rows maxima, then as many sums. Of a lane's two rows the second one is 8 further, or, swapped, the next one.
    SUMS_OFFSET, NEXT_ROW = 4 * num_rows, 4 if IS_SWAPPED else 8 * 4
    STATE_BYTES = 2 * SUMS_OFFSET
    # Swapped, what waits for a warpgroup's columns waits for its 4 warps, which count up one word; and for any 16 rows.
    ANNOUNCEMENTS, ITEMS_PER_COUNTER = (NUM_WARPS // 2, ITEMS_PER_HALF * num_rows // ITEM_ROWS) if IS_SWAPPED else (1, ITEMS_PER_HALF)
    # From row to row and from column to column of a lane's four floats of a strip.
    ROW, COLUMN = (1, 2) if IS_SWAPPED else (2, 1)
    to_pair = ptx.cvt_bf16x2 if dtype == "bfloat16" else ptx.cvt_f16x2
    inline = cuda.jit(device=True, forceinline=True)

    @inline
    def add_batch(state_rmem, states_rmem, words_rmem, count):
        """Take `count` parts into the running state: maxima (0, 1), sums (2, 3), O of either strip (from 4 on)."""
        o_rmem = cuda.local.array(BATCH, types.float32)
        for i in range(count * PAIR):
            unpack(o_rmem, 4 * i, words_rmem, STRIP_WORDS * i)
        for r in range(2):
            largest = state_rmem[r]
            for i in range(count):
                largest = max(largest, states_rmem[4 * i + r])
            if largest > MINUS_INFINITY:
                scale = ptx.ex2(state_rmem[r] - largest)
                state_rmem[r] = largest
                state_rmem[2 + r] *= scale
                for c in range(2 * PAIR):
                    state_rmem[O_STATE + c // 2 * 4 + ROW * r + COLUMN * (c % 2)] *= scale
                for i in range(count):
                    weight = ptx.ex2(states_rmem[4 * i + r] - largest)
                    state_rmem[2 + r] += weight * states_rmem[4 * i + 2 + r]
                    for c in range(2 * PAIR):
                        at = c // 2 * 4 + ROW * r + COLUMN * (c % 2)
                        state_rmem[O_STATE + at] += weight * o_rmem[i * PAIR * 4 + at]

    @inline
    def merge_parts(state_rmem, lane_parts, slot, slot_step, part, num_parts, stride, is_rehearsal):
        """Parts part, part + stride, ... in order; the first one's in `slot`, the next one's `slot_step` further."""
        words_rmem, states_rmem = cuda.local.array(BATCH_WORDS, types.uint32), cuda.local.array(BATCH_STATES, types.float32)
        for r in range(2):
            state_rmem[r] = MINUS_INFINITY
        for i in range(2, STATE_FLOATS):
            state_rmem[i] = f32(0)
        # A rehearsal takes the way of parts that count.
        no_maximum = f32(0) if is_rehearsal else MINUS_INFINITY
        while part < num_parts:
            for i in range(UNROLL):
                for r in range(2):
                    states_rmem[4 * i + r], states_rmem[4 * i + 2 + r] = no_maximum, f32(0)
                for c in range(PAIR_WORDS):
                    words_rmem[PAIR_WORDS * i + c] = u32(0)
                if part < num_parts and not is_rehearsal:
                    state_address = lane_parts.state + u64(slot) * u64(NUM_STATES * STATE_BYTES)
                    for r in range(2):
                        states_rmem[4 * i + r] = ptx.ld_global_f32(state_address + u64(r * NEXT_ROW))
                        states_rmem[4 * i + 2 + r] = ptx.ld_global_f32(state_address + u64(SUMS_OFFSET + r * NEXT_ROW))
                    slot_bytes = u64(slot) * u64(NUM_WARPS * WARP_PART)
                    load_pair(words_rmem, PAIR_WORDS * i, lane_parts.words + slot_bytes, lane_parts.last_words + slot_bytes)
                part, slot = u32(part + stride), u32(slot + slot_step)
            add_batch(state_rmem, states_rmem, words_rmem, UNROLL)

    @inline
    def hand_on(state_rmem, place):
        """A warp's state to shared memory, 48 bytes of each lane: of eight lanes no two meet in a bank."""
        for i in range(0, STATE_FLOATS, 4):
            ptx.st_shared_v4_b32(place + u32(4 * i), ptx.bits_of_f32(state_rmem[i]), ptx.bits_of_f32(state_rmem[i + 1]),
                                 ptx.bits_of_f32(state_rmem[i + 2]), ptx.bits_of_f32(state_rmem[i + 3]))

    @inline
    def add_warps(state_rmem, place, num_warps):
        """The states of a pair's warps, in order; this lane's of the first one lies at `place`."""
        ends_rmem, weights_rmem = cuda.local.array(ENDS, types.uint32), cuda.local.array(WEIGHTS, types.float32)
        o_rmem = cuda.local.array(O_FLOATS, types.uint32)
        for w in range(MERGE_WARPS):
            for r in range(2):
                ends_rmem[O_STATE * w + r], ends_rmem[O_STATE * w + 2 + r] = ptx.bits_of_f32(MINUS_INFINITY), u32(0)
            if w < num_warps:
                ptx.ld_shared_v4_b32(ends_rmem, O_STATE * w, place + u32(w * WARP_BYTES))
        for r in range(2):
            largest = MINUS_INFINITY
            for w in range(MERGE_WARPS):
                largest = max(largest, ptx.f32_of_bits(ends_rmem[O_STATE * w + r]))
            total = f32(0)
            for w in range(MERGE_WARPS):
                weight = ptx.ex2(ptx.f32_of_bits(ends_rmem[O_STATE * w + r]) - largest) if largest > MINUS_INFINITY else f32(0)
                weights_rmem[2 * w + r] = weight
                total += weight * ptx.f32_of_bits(ends_rmem[O_STATE * w + 2 + r])
            state_rmem[r], state_rmem[2 + r] = largest, total
        for i in range(O_STATE, STATE_FLOATS):
            state_rmem[i] = f32(0)
        for w in range(MERGE_WARPS):
            if w < num_warps:
                for i in range(0, O_FLOATS, 4):
                    ptx.ld_shared_v4_b32(o_rmem, i, place + u32(w * WARP_BYTES + 4 * (O_STATE + i)))
                for r in range(2):
                    for c in range(2 * PAIR):
                        at = c // 2 * 4 + ROW * r + COLUMN * (c % 2)
                        state_rmem[O_STATE + at] += weights_rmem[2 * w + r] * ptx.f32_of_bits(o_rmem[at])

    @inline
    def first_of_8(pair, first_of_16):
        """Swapped, a pair has 8 rows of 16."""
        return u32(first_of_16 + u32(pair & u32(1)) * u32(8))

    @inline
    def first_tile(pair):
        """And columns of two tiles, of which this is the first."""
        return u32(pair & u32(2))

    @inline
    def find_row(row, merge, kv_head, heads_per_kv, results):
        """(where a packed row of the job goes, where its lse goes); zeros past the job's last row."""
        out, lse = u64(0), u64(0)
        q_batch, q_begin = i64(column(merge, MERGE_Q_BATCH)), u32(column(merge, MERGE_Q_BEGIN))
        if row < u32(u32(column(merge, MERGE_Q_LEN)) * heads_per_kv):
            query, head_of_kv = query_and_head(row, heads_per_kv)
            token, head = i64(u32(q_begin + query)), i64(u32(u32(kv_head * heads_per_kv) + head_of_kv))
            out = results.out + u64(q_batch * results.out_batch_stride + token * results.out_token_stride + head * results.out_head_stride)
            lse = results.lse + u64(q_batch * results.lse_batch_stride + token * results.lse_token_stride + head * results.lse_head_stride)
        return out, lse

    @inline
    def store_lse(address, maximum, total, results):
        ptx.st_global_f32(address, (maximum + ptx.lg2_approx(total)) * f32(LN_2) if total > f32(0) else results.empty_lse)

    @inline
    def store_state(state_rmem, rows_smem, half, pair, results, is_rehearsal):
        """Results of this lane's two rows."""
        lane = ptx.opaque_b32(u32(cuda.threadIdx.x)) & u32(31)
        column_bytes = u32(half * u32(HEAD_DIM_V) + pair * u32(PAIR * 16) + (lane & u32(3)) * u32(4))
        for r in range(2):
            row = u32((lane >> u32(2)) + u32(8 * r))
            address = rows_smem[row]
            if address != u64(0):
                total = state_rmem[2 + r]
                factor = ptx.rcp_approx(total) if total > f32(0) else f32(0)
                for s in range(PAIR):
                    low, high = state_rmem[O_STATE + 4 * s + 2 * r], state_rmem[O_STATE + 4 * s + 2 * r + 1]
                    packed = to_pair(high * factor, low * factor)
                    if not is_rehearsal:
                        ptx.st_global_b32(address + u64(u32(column_bytes + u32(16 * s))), packed)
                if column_bytes == 0 and not is_rehearsal:
                    store_lse(rows_smem[u32(row + u32(ITEM_ROWS))], state_rmem[r], total, results)

    @inline
    def store_swapped(state_rmem, rows_smem, half, pair, results, is_rehearsal):
        """Results of 8 rows: a lane has two of them, and after a transposition one, of which it has two columns side by side."""
        lane = ptx.opaque_b32(u32(cuda.threadIdx.x)) & u32(31)
        factor_a = ptx.rcp_approx(state_rmem[2]) if state_rmem[2] > f32(0) else f32(0)
        factor_b = ptx.rcp_approx(state_rmem[3]) if state_rmem[3] > f32(0) else f32(0)
        column_bytes = u32(half * u32(HEAD_DIM_V) + first_tile(pair) * u32(2 * TILE_COLUMNS) + (pair >> u32(2)) * u32(32)
                           + (lane & u32(3)) * u32(4))
        row = first_of_8(pair, lane >> u32(2))
        address = rows_smem[row]
        stores = address != u64(0) and not is_rehearsal
        for s in range(PAIR):
            for c in range(2):
                at = O_STATE + 4 * s + 2 * c
                packed = ptx.movmatrix_trans(to_pair(state_rmem[at + 1] * factor_b, state_rmem[at] * factor_a))
                if stores:
                    ptx.st_global_b32(address + u64(u32(column_bytes + u32(s * 2 * TILE_COLUMNS + 16 * c))), packed)
        # Of row lane / 4: lane / 8 has it, as its first or second one.
        owner, is_odd = i32(lane >> u32(3)), lane & u32(4) != 0
        sum_a, sum_b = cuda.shfl_sync(0xFFFFFFFF, state_rmem[2], owner), cuda.shfl_sync(0xFFFFFFFF, state_rmem[3], owner)
        max_a, max_b = cuda.shfl_sync(0xFFFFFFFF, state_rmem[0], owner), cuda.shfl_sync(0xFFFFFFFF, state_rmem[1], owner)
        total, maximum = sum_b if is_odd else sum_a, max_b if is_odd else max_a
        if column_bytes == 0 and stores:
            store_lse(rows_smem[u32(row + u32(ITEM_ROWS))], maximum, total, results)

    store = store_swapped if IS_SWAPPED else store_state

    @inline
    def await_parts(counter, announced):
        """Until the decode has counted `announced` up."""
        if cuda.threadIdx.x == 0:
            # The decode's blocks have all begun, and wait for no block of this grid.
            while ptx.ld_acquire(counter) < announced:
                pass
        # All warps: the parts are there.
        cuda.syncthreads()

    @inline
    def merge_item(state_rmem, shared, merge, num_parts, item, warp, lane, shape, partials, results):
        """An item of a row of the table: 8 pairs of strips of 16 rows, or this share of them."""
        states_smem, rows_smem, announced_smem = shared
        group, half, row_group = item.group, item.half, item.row_group
        num_shares, share = u32(column(merge, MERGE_NUM_SHARES)), u32(column(merge, MERGE_SHARE))
        first_of_job = u32(column(merge, MERGE_FIRST_SLOT))
        first_row = u32(u32(column(merge, MERGE_ROW_BEGIN)) + row_group * u32(ITEM_ROWS))
        if first_row < u32(u32(column(merge, MERGE_Q_LEN)) * shape.heads_per_kv):
            # The warps from first_warp on have one pair, of every so many-th part each; a block's pairs lie so far apart, too.
            first_part = u32(warp & (num_shares - u32(1)))
            first_warp = u32(warp - first_part)
            pair = u32(group * u32(MERGE_WARPS) + first_warp + share)
            # Slots are (slot, KV head, row tile) of O, 8 warps' parts, and of states, each warpgroup's or, swapped, each warp's.
            row_in_tile = row_group % u32(NUM_WARPS // 2) * u32(ITEM_ROWS)
            if IS_SWAPPED:
                # A warp has four pairs of these 16 rows.
                tile, word = u32(0), half * u32(NUM_WARPS // 2)
                part_warp = word + (pair >> u32(2))
                # Of the same rows in neighbouring tiles.
                pair_of_warp = first_tile(pair) * u32(num_rows // 16) + first_of_8(pair, row_in_tile) // u32(8)
                state, state_row = part_warp, first_of_8(pair, row_in_tile) + (lane & u32(3)) * u32(2)
            else:
                tile, part_warp = row_group // u32(NUM_WARPS // 2), half * u32(NUM_WARPS // 2) + row_group % u32(NUM_WARPS // 2)
                word, pair_of_warp = part_warp, pair
                state, state_row = half, row_in_tile + (lane >> u32(2))
            step = u32(u32(cuda.gridDim.y) * shape.row_tiles)
            first_slot = u32(u32(first_of_job * step) + u32(item.kv_head * shape.row_tiles) + tile)
            words = partials.o + u64(part_warp * u32(WARP_PART) + pair_of_warp * u32(PAIR_BYTES) + lane * u32(16))
            lane_parts = LaneParts(words, words_4_and_5(words, lane),
                                   partials.states + u64(state * u32(STATE_BYTES) + state_row * u32(4)))
            counter = partials.counters + u64(first_slot * u32(NUM_WARPS) + word) * u64(4)
            announced = u32(num_parts * u32(ANNOUNCEMENTS))
            num_announced = u32(0)
            if cuda.threadIdx.x == 0:
                num_announced = ptx.ld_acquire(counter)
            # While that comes: where the rows go, a division and products of 64 bits. (After the parts it would take 0 to 0.6 us more of
            # 10 to 43, H200.)
            out, lse = find_row(u32(first_row + (lane & u32(ITEM_ROWS - 1))), merge, item.kv_head, shape.heads_per_kv, results)
            if cuda.threadIdx.x < ITEM_ROWS:
                rows_smem[lane], rows_smem[u32(lane + u32(ITEM_ROWS))] = out, lse
            if cuda.threadIdx.x == 0:
                announced_smem[0] = num_announced
            # All warps: how many parts are there, and where the rows go.
            cuda.syncthreads()
            num_announced = announced_smem[0]
            # If none is, a rehearsal: all but loads and stores, so that the code is near when they are (up to 3 us of 25, H100). If some
            # are, the last one comes sooner than a rehearsal ends (up to 2 us of 32, H200).
            is_rehearsal = num_announced == u32(0)
            while True:
                if not is_rehearsal and num_announced < announced:
                    await_parts(counter, announced)
                if cuda.threadIdx.x == 0 and not is_rehearsal:
                    # Of the blocks that see it complete the last one begins the count anew, for the next launch.
                    ptx.red_inc_u32(counter, u32(announced + num_shares * u32(ITEMS_PER_COUNTER) - u32(1)))
                merge_parts(state_rmem, lane_parts, u32(first_slot + first_part * step), u32(num_shares * step), first_part, num_parts,
                            num_shares, is_rehearsal)
                if num_shares > 1:
                    place = states_smem + warp * u32(WARP_BYTES) + lane * u32(LANE_BYTES)
                    hand_on(state_rmem, place)
                    # All warps: their states are there. (All of a block come here together: what decides it is the same for all.)
                    cuda.syncthreads()
                    if first_part == 0:
                        add_warps(state_rmem, place, num_shares)
                if first_part == 0:
                    store(state_rmem, rows_smem, half, ptx.opaque_b32(pair), results, is_rehearsal)
                if not is_rehearsal:
                    break
                is_rehearsal = False

    def hopper_merge(merges, totals, o_partial, state_partial, counters, out, out_batch_stride, out_token_stride, out_head_stride, lse,
                     lse_batch_stride, lse_head_stride, lse_token_stride, row_tiles, heads_per_kv, empty_lse):
        partials = Partials(o_partial, state_partial, counters)
        shape = Shape(u32(row_tiles), u32(heads_per_kv))
        results = Results(out, out_batch_stride, out_token_stride, out_head_stride, lse, lse_batch_stride, lse_head_stride,
                          lse_token_stride, empty_lse)
        # States are stored and loaded 16 bytes at a time.
        shared = Shared(ptx.smem_address(cuda.shared.array(STATES_SMEM, types.float32, alignment=16)),
                        cuda.shared.array(ROWS_SMEM, types.uint64), cuda.shared.array(1, types.uint32))
        # By a shuffle, as in hopper_decode: shuffles have no second copies then (8 instructions, 80 with few rows).
        warp, lane = u32(cuda.shfl_sync(0xFFFFFFFF, i32(u32(cuda.threadIdx.x) >> u32(5)), 0)), u32(cuda.threadIdx.x) & u32(31)
        state_rmem = cuda.local.array(STATE_FLOATS, types.float32)
        place, row = u32(cuda.blockIdx.x), u32(cuda.blockIdx.z)
        item = Item(place % u32(ITEMS_PER_HALF), place // u32(ITEMS_PER_HALF) % u32(2), place // u32(ITEMS_PER_GROUP),
                    u32(cuda.blockIdx.y))
        # The tables are older than the decode. The first row is loaded beside the number of rows, in use or not: it is in the table.
        num_rows = u32(ptx.ld_global_i32(totals + u64(4 * TOTAL_MERGES)))
        merge = load_row(merges, row, MERGE_COLUMNS, i32(lane))
        # Before the number is looked at, lest the row be loaded only then: a shuffle stays where it is.
        num_parts = u32(column(merge, MERGE_NUM_PARTS))
        while row < num_rows:
            merge_item(state_rmem, shared, merge, num_parts, item, warp, lane, shape, partials, results)
            row = u32(row + u32(cuda.gridDim.z))
            if row < num_rows:
                # All warps: they are done with what is in shared memory of the item before.
                cuda.syncthreads()
                merge = load_row(merges, row, MERGE_COLUMNS, i32(lane))
                num_parts = u32(column(merge, MERGE_NUM_PARTS))
        if u32(cuda.blockIdx.x) + u32(cuda.blockIdx.y) + u32(cuda.blockIdx.z) == 0:
            # One block for all, with work or without: if none waited, the next grid could start before the decode has ended.
            ptx.griddepcontrol_wait()

    return hopper_merge
