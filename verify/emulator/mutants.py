"""The test of the emulator: bugs of synchronisation and layout, each a change of the Hopper kernels' source, each to be caught."""

from dataclasses import dataclass, replace

from verify.cases import MLACase

from .findings import Finding
from .pairs import FEW_SHARE_PARTS, PairFailure, Schedule, check

_DECODE, _STREAM, _SEESAW, _LOAD, _PRODUCTS, _SOFTMAX, _STORE, _MERGE, _CONFIG, _SWAPPED, _SWAPPED_STORE, _PART = (
    f"mla_numba.kernels.hopper_{part}"
    for part in ("decode", "stream", "seesaw", "load", "products", "softmax", "store", "merge", "config", "swapped", "swapped_store",
                 "part"))

_PIECE_BEFORE = ("        # 8 consumer warps arrived, done with the piece before, its Q and its P1; the first piece does not wait.\n"
                 "        ptx.mbarrier_wait_parity(base + u32(Q_EMPTY_SMEM), parity ^ u32(1))\n")
_WORDS_MEET = "        cuda.syncwarp()\n        if lane == 0:\n            # The only arrival; completes with Q's last byte"

# With more than 32 rows, which are wgmma's M. One piece of five blocks with a tail; pieces of one worker; a job in two pieces; one in more,
# which the merge kernel joins.
ONE = (MLACase(seq_lens=(290,), num_heads_q=48, values="rising"), 1)
THREE = (MLACase(seq_lens=(163,), num_heads_q=48, values="rising"), 1)
PAIR = (MLACase(seq_lens=(500,), num_heads_q=24, seq_len_q=2, pages="shuffled"), 2)
NOTHING = (MLACase(seq_lens=(0,) * 3, num_heads_q=48), 1)
SEVERAL = (MLACase(seq_lens=(70, 0, 130), num_heads_q=48, page_size=32, values="alternating"), 1)
# Two row tiles, of one piece and of two; three of two pieces.
TWO = (MLACase(seq_lens=(290,), num_heads_q=128), 2)
TWO_PIECES = (MLACase(seq_lens=(163, 70), num_heads_q=128, values="rising"), 2)
SMALL_PAGES = (MLACase(seq_lens=(75, 130), num_heads_q=48, page_size=16), 1)
# The second job of the first request has rows for one of its two row tiles.
UNEVEN = (MLACase(seq_lens=(150, 130), num_heads_q=96, q_lens=(2, 1)), 2)
FIVE = (MLACase(seq_lens=(500,), num_heads_q=48), 5)
# More items of the merge than it has thread blocks.
ITEMS = (MLACase(seq_lens=(500,), num_heads_q=52), 5)
IDLE = (MLACase(seq_lens=(65,), num_heads_q=48), 3)
# Jobs of one block, several a worker.
BLOCKS = (MLACase(seq_lens=(64, 33, 64, 1, 50), num_heads_q=48), 1)
MANY = (MLACase(seq_lens=(640,), num_heads_q=48, page_size=128, dtype="float16", values="falling"), 4)
# Few rows, which are wgmma's N: 16, 32 and 20 of 32, and the rest as above. Of a pair float16 has the bits to tell which piece's share is
# rounded last.
FEW = (MLACase(seq_lens=(290,), num_heads_q=16, values="rising"), 1)
FEW_PAIR = (MLACase(seq_lens=(500,), num_heads_q=16, seq_len_q=2, pages="shuffled", dtype="float16"), 2)
FEW_20 = (MLACase(seq_lens=(290,), num_heads_q=20, values="rising"), 1)
FEW_NOTHING = (MLACase(seq_lens=(0,) * 3, num_heads_q=16), 1)
FEW_SEVERAL = (MLACase(seq_lens=(70, 0, 130), num_heads_q=16, page_size=32, values="alternating"), 1)
FEW_IDLE = (MLACase(seq_lens=(65,), num_heads_q=16), 3)
FEW_BLOCKS = (MLACase(seq_lens=(64, 33, 64, 1, 50), num_heads_q=16), 1)
FEW_MANY = (MLACase(seq_lens=(640,), num_heads_q=16, page_size=128, dtype="float16", values="falling"), 4)
FEW_MANY_32 = (MLACase(seq_lens=(500,), num_heads_q=16, seq_len_q=2, values="rising"), 5)
SEEDS = 10


@dataclass(frozen=True)
class Mutant:
    """`old` stands once in the module, and becomes `new`. It must show in one of `cases`."""

    name: str
    module: str
    old: str
    new: str
    cases: tuple[tuple[MLACase, int], ...] = (ONE, PAIR)
    also: tuple[tuple[str, str], ...] = ()
    share_parts: int | None = None

    def run(self) -> tuple[str, str, int]:
        """(kind, message, pairs run) of the first failure; kind is "" if there was none."""
        edits = {self.module: [(self.old, self.new), *self.also]}
        runs = 0
        for seed in range(SEEDS):
            for case, num_sms in self.cases:
                runs += 1
                try:
                    check(case, Schedule(seed, num_sms, self.share_parts), edits)
                except PairFailure as failure:
                    return failure.kind, str(failure), runs
                except Finding as finding:
                    return finding.kind, str(finding), runs
        return "", "", runs


def _without(line: str) -> tuple[str, str]:
    """An edit that takes a statement away."""
    return line, line[:len(line) - len(line.lstrip())] + "pass"


_OWN_DONE = "        wait_all()\n        o_fence(regs.o_rmem)\n        p_fence(regs.p_rmem)\n"
_NO_O_FENCE = _OWN_DONE.replace("        o_fence(regs.o_rmem)\n", "")
_OWN_RELEASE = "        release(base, wg, wg, lane)\n"
_OTHER_DONE = "        wait_all()\n        o_fence(regs.o_rmem)\n"
_OTHER_RELEASE = "        release(base, 1 - wg, wg, lane)\n"
_P_STORED = "        store_p(regs.p_rmem, base + u32(P_SMEM[wg]), at)\n"
_P_ARRIVES = ("        # This warpgroup arrives, the other one waits: P, V, maximum and scale are there.\n"
              "        ptx.bar_arrive(u32(P_STORED[wg]), u32(NUM_CONSUMERS))\n")
_RELEASE_V1 = "                release(base, 1, 0, lane)\n"
_P1V1_DONE = ("                # Of the two groups in flight P1 V1 is the older one.\n                wait_all_but_1()\n"
              "                o_fence(o_rmem)\n")
_P0_STORED = "        store_p(regs.p_rmem, base + u32(P0_SMEM), at)\n"
_P0_ARRIVES = ("        # Warpgroup 0 arrives, warpgroup 1 waits: P0, V0, maximum and scale are there.\n"
               "        ptx.bar_arrive(u32(P0_STORED), u32(NUM_CONSUMERS))\n")
_P1_STORED = "            store_p(regs.p_rmem, base + u32(P1_SMEM), at)\n"
_P1_ARRIVES = ("            # Warpgroup 1 arrives, warpgroup 0 waits: P1, V1, maximum and scale are there.\n"
               "            ptx.bar_arrive(u32(P1_STORED), u32(NUM_CONSUMERS))\n")
_P0V0_DONE = "            wait_all()\n            o_fence(o_rmem)\n"
_RELEASE_V0 = "            release(base, 0, 1, lane)\n"
_LAST_PV = ("            wgmma_pv(o_rmem, p_desc + u64(k * NEXT_COLUMNS), v_desc + u64(k * NEXT_ROWS[side]),\n"
            "                     u32(1) if k > 0 else u32(accumulate))\n")
_S_FENCED = "        s_fence(regs.s_rmem)\n"
_P0_IS_FREE = "            ptx.bar_sync(u32(P0_FREE), u32(NUM_CONSUMERS))\n"
_MAX_RAISED = "        max_a, max_b, scale_a, scale_b = raise_max(s_rmem, at, scale_log2e, SCALE_SMEM[wg], parity, is_first)\n"
_MAX0_RAISED = "        max_a, max_b, scale_a, scale_b = raise_max(s_rmem, at, scale_log2e, SCALE0_SMEM, parity, is_first)\n"
_S0_ASKED = "                ptx.bar_arrive(u32(S0_ASKED), u32(NUM_CONSUMERS))\n"
_MAX_STORED = "        if at.thread & u32(3) == 0:\n            store_rows(at.row_smem + u32(MAX_SMEM)"
_ZERO_ENDS = ("        # before either product, has the proxy fence.\n"
              "        ptx.bar_sync(u32(barrier_idx), u32(128))\n")
_CLAIM = "            before = ptx.atom_add_relaxed(counter, u32(1))\n"
_ANNOUNCED = "            announce(part.counter, lane)\n"
_O_STORED = "                    store_o(regs.o_rmem, o_part)\n"
_PACKED_STORED = "                store_packed(regs.o_rmem, o_part, lane)\n"
_CLUSTER_BEGINS = ("            # All threads of both blocks: the other block's mbarriers are there, too.\n"
                   "            ptx.barrier_cluster_wait()\n")
_CLUSTER_ENDS = ("            # All threads of both blocks: nobody loads into the other one, or arrives there, any more.\n"
                 "            ptx.barrier_cluster_arrive_relaxed()\n            ptx.barrier_cluster_wait()\n")
_UNTIL_THERE = "while ptx.ld_acquire(counter) < announced:"
_STATES = "what decides it is the same for all.)\n"
_HIDE_ODD = "                hide_unseen(regs.s_rmem, ptx.opaque_b32(at.base) + u32(K1_SMEM)"
_OWN_BLOCK = "            own_block(regs, at, problem, 0, token, left, all_see, parity)\n"

# The same of few rows.
_FEW_S_DONE = "        wait_all()\n        tile_fence(s_rmem)\n"
_FEW_PV_BEGINS = "        ptx.wgmma_fence()\n        for k in range(K_STEPS):\n            tokens"
_FEW_LAST_PV = "            wgmma_pv(o_rmem.t3, tokens + u64(3 * NEXT_K_TILE), p_tokens, adds)\n"
_FEW_O_DONE = "        wait_all()\n        o_fence(o_rmem)\n"
_FEW_RELEASE = "        release(base, buffer, wg, lane)\n"
_FEW_P_STORED = "        store_p(s_rmem, base + u32(P_SMEM[wg]), at)\n"
_FEW_WARPS_MEET = "        ptx.bar_sync(u32(WARPGROUP + wg), u32(128))\n"
_FEW_MAXIMA_THERE = "        # All 4 warps of this warpgroup: their maxima are there.\n" + _FEW_WARPS_MEET
_FEW_P_THERE = "        # All 4 warps of this warpgroup: P is there, the old maximum has been read.\n" + _FEW_WARPS_MEET
_FEW_MAX_STORED = ("        if at.thread < u32(4):\n            store_rows(at.row_smem + u32(MAX_SMEM), max_rmem)\n"
                   "            store_rows(at.row_smem + u32(SCALE_SMEM[wg]), scale_rmem)\n")
_FEW_OWN_RESCALED = "        rescale(regs.o_rmem, scale_rmem, not is_first)\n        add_pv(regs.o_rmem, base, wg,"
_FEW_OTHER_RESCALED = "        rescale(regs.o_rmem, scale_rmem, not is_first)\n        add_pv(regs.o_rmem, base, 1 - wg,"
_FEW_STATE_STORED = ("            if lane < u32(NUM_ROWS):\n                ptx.st_global_f32(part.state, maximum)\n"
                     "                ptx.st_global_f32(part.state + u64(ROW_BYTES), total)\n")
_FEW_O_STORED = "                    store_tile(regs.o_rmem.t0, o_part)\n"
_FEW_PACKED_STORED = "                store_packed(regs.o_rmem.t0, regs.o_rmem.t1, o_part, lane)\n"
_FEW_WORD = "            word = warp if ends_here else warp & u32(NUM_WARPS // 2)\n"
_FEW_COUNT = "ITEMS_PER_HALF * num_rows // ITEM_ROWS) if"

MUTANTS = (
    # Fences between the proxies, and of wgmma's registers.
    Mutant("P0 and P1 without a proxy fence", _PRODUCTS, *_without("        ptx.fence_proxy_async_shared()")),
    Mutant("P0 and P1 without a proxy fence, seesaw", _PRODUCTS, *_without("        ptx.fence_proxy_async_shared()"), cases=(TWO,)),
    Mutant("mbarriers not announced to TMA", _DECODE, *_without("            ptx.fence_mbarrier_init()")),
    Mutant("P V without wgmma.fence", _PRODUCTS, "        v_desc = descriptor(SIDE_MN_MAJOR[side], v_smem)\n        ptx.wgmma_fence()\n"
           "        for k in range(K_STEPS):\n            wgmma_pv_rmem", "        v_desc = descriptor(SIDE_MN_MAJOR[side], v_smem)\n"
           "        for k in range(K_STEPS):\n            wgmma_pv_rmem"),
    Mutant("S used before the wait", _PRODUCTS, "        wait_all()\n" + _S_FENCED, _S_FENCED),
    Mutant("O used without a registers fence", _PRODUCTS, _OWN_DONE, _NO_O_FENCE),
    Mutant("O used without a registers fence, seesaw", _PRODUCTS, _OWN_DONE, _NO_O_FENCE, cases=(TWO,)),
    Mutant("wgmma not committed", _PRODUCTS, _LAST_PV + "        ptx.wgmma_commit_group()\n", _LAST_PV),
    # Buffers given back too early.
    Mutant("V freed before its product is done", _PRODUCTS, _OWN_DONE + _OWN_RELEASE, _OWN_RELEASE + _OWN_DONE),
    Mutant("other warpgroup's V freed before its product is done", _PRODUCTS, _OTHER_DONE + _OTHER_RELEASE,
           _OTHER_RELEASE + _OTHER_DONE),
    Mutant("V0 freed before its product is done", _PRODUCTS, _OWN_DONE + _OWN_RELEASE, _OWN_RELEASE + _OWN_DONE, cases=(TWO,)),
    Mutant("one group too few awaited", _SEESAW, _P1V1_DONE, _P1V1_DONE.replace("wait_all_but_1()", "ptx.make_wgmma_wait_group(2)()"),
           cases=(TWO,)),
    Mutant("V1 freed before its product is awaited", _SEESAW, _P1V1_DONE + _RELEASE_V1, _RELEASE_V1 + _P1V1_DONE, cases=(TWO,)),
    Mutant("V0 freed before its product is awaited", _SEESAW, _P0V0_DONE + _RELEASE_V0, _RELEASE_V0 + _P0V0_DONE, cases=(TWO,)),
    Mutant("producer does not wait for readers", _LOAD, *_without(
        "        ptx.mbarrier_wait_parity(base + u32(EMPTY_SMEM + (buffer * 2 + side) * 8), (turns >> u32(buffer) & u32(1)) ^ u32(1))")),
    Mutant("Q loaded over the piece before", _LOAD, _PIECE_BEFORE, "", cases=(SEVERAL,)),
    Mutant("piece announced before all lanes have described it", _LOAD, _WORDS_MEET, _WORDS_MEET.partition("\n")[2]),
    Mutant("tiles of the odd block one step early", _LOAD, "load_side(base, 1, 0, turns, ", "load_side(base, 1, 0, turns ^ u32(1 << 1), "),
    # Barriers: order, counts, phases, numbers.
    Mutant("P announced before it is stored", _STREAM, _P_STORED + _P_ARRIVES, _P_ARRIVES + _P_STORED),
    Mutant("P0 stored over the results of the piece before", _STREAM,
           *_without("            ptx.bar_sync(u32(P0_FREE), u32(NUM_CONSUMERS))"), cases=(SEVERAL,),
           also=(_without("        ptx.bar_arrive(u32(P0_FREE), u32(NUM_CONSUMERS))"),)),
    Mutant("maximum read and written without syncwarp", _SOFTMAX, "        cuda.syncwarp()\n" + _MAX_STORED, _MAX_STORED),
    Mutant("P0 announced before it is stored", _SEESAW, _P0_STORED + _P0_ARRIVES, _P0_ARRIVES + _P0_STORED, cases=(TWO,)),
    Mutant("P1 announced before it is stored", _SEESAW, _P1_ARRIVES, "", cases=(TWO,), also=((_P1_STORED, _P1_ARRIVES + _P1_STORED),)),
    Mutant("P0 stored over the results of the piece before, seesaw", _SEESAW,
           *_without("            ptx.bar_sync(u32(P0_FREE), u32(NUM_CONSUMERS))"), cases=((TWO_PIECES[0], 2),),
           also=(_without("        ptx.bar_arrive(u32(P0_FREE), u32(NUM_CONSUMERS))"),)),
    Mutant("maximum announced before it is stored", _SEESAW, _P0_ARRIVES, "", cases=(TWO,),
           also=((_MAX0_RAISED, _P0_ARRIVES + _MAX0_RAISED),)),
    Mutant("S of an even block asked for in silence", _SEESAW, _S0_ASKED, "", cases=(TWO,)),
    Mutant("maximum read and written without syncwarp, seesaw", _SOFTMAX, "        cuda.syncwarp()\n" + _MAX_STORED, _MAX_STORED,
           cases=(TWO,)),
    Mutant("sums read without a barrier", _SOFTMAX, "        # Both warpgroups arrive and wait: each other's sums, and the last maximum.\n"
           "        ptx.bar_sync(u32(SUMS), u32(NUM_CONSUMERS))\n", ""),
    Mutant("maximum begun before the last one is read", _STREAM, _P0_IS_FREE + _MAX_RAISED, "            pass\n" + _MAX_RAISED,
           cases=(BLOCKS,), also=((_P_STORED, "        if is_first:\n" + _P0_IS_FREE + _P_STORED),)),
    Mutant("maximum begun before the last one is read, seesaw", _SEESAW, _P0_IS_FREE + _MAX0_RAISED, "            pass\n" + _MAX0_RAISED,
           cases=((TWO_PIECES[0], 2),), also=((_P0_STORED, "        if is_first:\n" + _P0_IS_FREE + _P0_STORED),)),
    Mutant("maximum not begun", _STREAM, "SCALE_SMEM[wg], parity, is_first)", "SCALE_SMEM[wg], parity, False)"),
    Mutant("maximum not begun, seesaw", _SEESAW, "SCALE0_SMEM, parity, is_first)", "SCALE0_SMEM, parity, False)", cases=(TWO,)),
    Mutant("Q free before all lanes have read it", _STORE, "        # All lanes have read Q's last tile.\n        cuda.syncwarp()\n", "",
           cases=(BLOCKS,)),
    Mutant("Q freed twice", _STORE, " and (in_step or ptx.ld_shared_i32(words + u32(PIECE_NUM_BLOCKS)) & i32(1) == 0)", "",
           cases=(BLOCKS,)),
    Mutant("stage read before it is written", _STORE, "                # The lanes' matrices are there.\n"
           "                cuda.syncwarp()\n", ""),
    Mutant("stage written before it is read", _STORE, "                # They have been read.\n"
           "                cuda.syncwarp()\n", ""),
    Mutant("rehearsal reads a block table", _LOAD, "        num_pages = num_pages if request >= 0 else i32(0)\n", "", cases=(IDLE,)),
    Mutant("tail zeroed while K is read", _SOFTMAX, "        # All 4 warps of this warpgroup, whose wgmma have read these rows as K.\n"
           "        ptx.bar_sync(u32(barrier_idx), u32(128))\n", ""),
    Mutant("tail not awaited by the warpgroup", _SOFTMAX, _ZERO_ENDS, ""),
    Mutant("consumers go on before the mbarriers are there", _DECODE, *_without(
        "            ptx.bar_sync(u32(MBARRIERS_MADE), u32(NUM_THREADS))")),
    Mutant("producer's lanes go on before the mbarriers are there", _DECODE, *_without(
        "            # The producer's lanes: lane 0 has made them.\n            cuda.syncwarp()")),
    Mutant("nobody says that the mbarriers are there", _DECODE, *_without(
        "            ptx.bar_arrive(u32(MBARRIERS_MADE), u32(NUM_THREADS))")),
    Mutant("mbarriers awaited by the consumers alone", _DECODE, "            ptx.bar_sync(u32(MBARRIERS_MADE), u32(NUM_THREADS))",
           "            ptx.bar_sync(u32(MBARRIERS_MADE), u32(NUM_CONSUMERS))"),
    Mutant("buffer freed by three warps", _DECODE, "8 * i), u32(NUM_WARPS // 2 * CLUSTER_SIZE)",
           "8 * i), u32(NUM_WARPS // 2 * CLUSTER_SIZE - 1)"),
    Mutant("buffer freed by five warps", _DECODE, "8 * i), u32(NUM_WARPS // 2 * CLUSTER_SIZE)",
           "8 * i), u32(NUM_WARPS // 2 * CLUSTER_SIZE + 1)"),
    Mutant("Q freed by seven warps", _DECODE, "ptx.mbarrier_init(base + u32(Q_EMPTY_SMEM), u32(NUM_WARPS))",
           "ptx.mbarrier_init(base + u32(Q_EMPTY_SMEM), u32(NUM_WARPS - 1))", cases=(SEVERAL,)),
    Mutant("half of a side's bytes expected", _LOAD, "u32(SIDE_TILES[side] * TILE_BYTES))", "u32(SIDE_TILES[side] * TILE_BYTES // 2))"),
    Mutant("right side too far left", _LOAD, "row, i32(tile), kv_head", "row, i32(tile // u32(4) * u32(3)), kv_head"),
    Mutant("K read a phase early", _DECODE, "        parity = u32(0)\n        while", "        parity = u32(1)\n        while"),
    Mutant("phase not flipped", _STREAM, _OWN_BLOCK + "            parity = u32(parity ^ u32(1))\n", _OWN_BLOCK),
    Mutant("phase not flipped, seesaw", _SEESAW, "                parity = u32(parity ^ u32(1))\n" + _HIDE_ODD, _HIDE_ODD, cases=(TWO,)),
    Mutant("two barriers of one number", _CONFIG, "WARPGROUP, MBARRIERS_MADE = 1, 2, 3,", "WARPGROUP, MBARRIERS_MADE = 1, 2, 2,"),
    Mutant("barrier for one warpgroup", _STREAM, "        ptx.bar_arrive(u32(P_STORED[wg]), u32(NUM_CONSUMERS))",
           "        ptx.bar_arrive(u32(P_STORED[wg]), u32(128))"),
    # Two thread blocks that load for each other.
    Mutant("other block's mbarriers not awaited", _DECODE, _CLUSTER_BEGINS, "            pass\n", cases=(TWO,),
           also=(("            ptx.barrier_cluster_arrive_relaxed()\n        elif wg == 2:", "            pass\n        elif wg == 2:"),)),
    Mutant("block ends while the other one needs it", _DECODE, _CLUSTER_ENDS, "            pass\n", cases=((TWO[0], 4),)),
    Mutant("buffer freed for its own block's loads only", _PRODUCTS, *_without(
        "                ptx.mbarrier_arrive_remote(ptx.mapa_shared_cluster(mbar, ptx.cluster_ctarank() ^ u32(1)))"), cases=(TWO,)),
    Mutant("buffer filled while the other block reads", _DECODE, "8 * i), u32(NUM_WARPS // 2 * CLUSTER_SIZE)",
           "8 * i), u32(NUM_WARPS // 2)", cases=(TWO,)),
    Mutant("block's number in a descriptor", _PRODUCTS, *_without("            address = u32(address & u32(0x3FFFF))"), cases=(TWO,)),
    Mutant("both blocks load the same half", _LOAD, "first = ptx.cluster_ctarank() * u32(HALF_TILES)", "first = u32(HALF_TILES)",
           cases=(TWO,)),
    Mutant("block without rows leaves the other one alone", _LOAD, "(tile_idx() & i32(-CLUSTER_SIZE)) * BLOCK_M", "tile_idx() * BLOCK_M",
           cases=(UNEVEN,)),
    # Layouts.
    Mutant("swizzle of four rows", _PRODUCTS, "(chunk ^ (row & u32(7)))", "(chunk ^ (row & u32(3)))"),
    Mutant("next rows of V by half", _PRODUCTS, "2 * config.next_atom_bytes(side) >> 4", "config.next_atom_bytes(side) >> 4"),
    Mutant("V's columns a tile apart by half", _PRODUCTS, "config.next_tile_bytes)) for", "config.next_tile_bytes // 2)) for"),
    Mutant("warp's part of the stage is another's", _STORE, "(thread_idx >> u32(5)) * u32(STAGE_BYTES)",
           "(thread_idx >> u32(5) & u32(3)) * u32(STAGE_BYTES)"),
    Mutant("right side's atoms as near as the left's", _LOAD, "u32(NEXT_BOX[side])", "u32(NEXT_BOX[0])", cases=(SMALL_PAGES,)),
    Mutant("page of each box", _LOAD, "u32(lane) // u32(BOXES_PER_PAGE)", "u32(lane)", cases=(SMALL_PAGES,)),
    Mutant("tail of the right side zeroed where the left's would be", _SOFTMAX, "u32(NEXT_ATOM[1]) if side", "u32(NEXT_ATOM[0]) if side",
           cases=(SMALL_PAGES,)),
    Mutant("mask one token late", _SOFTMAX, "seen_a <= i32", "seen_a < i32"),
    Mutant("O not rescaled in a second step", _STREAM, "scale_b, not is_first)", "scale_b, wg == 1 or parity >= u32(2 * NEXT_STEP))"),
    Mutant("O not rescaled in a second step, seesaw", _SEESAW, "scale_b, not is_first)", "scale_b, parity >= u32(2 * NEXT_STEP))",
           cases=(TWO_PIECES,)),
    Mutant("O not rescaled by the second block of a step", _STREAM, "scale_b, not is_first)", "scale_b, parity >= u32(NEXT_STEP))"),
    Mutant("O begun by each step", _STREAM, "wg, lane, not is_first)", "wg, lane, wg == 1)"),
    Mutant("O not begun by the first product", _STREAM, "wg, lane, not is_first)", "wg, lane, True)"),
    Mutant("O of a request without tokens not begun", _DECODE, "            else:\n                clear_o(regs.o_rmem)\n", "",
           cases=(NOTHING,)),
    Mutant("P1 over Q's tile 7", _CONFIG, "P1_SMEM = Q_SMEM + (NUM_TILES - 1) * TILE_BYTES",
           "P1_SMEM = Q_SMEM + (NUM_TILES - 2) * TILE_BYTES"),
    Mutant("maximum over P0's last row", _CONFIG, "MAX_SMEM = P0_SMEM + TILE_BYTES\n", "MAX_SMEM = P0_SMEM + TILE_BYTES - 256\n"),
    Mutant("rows of a page off by one", _LOAD, "% u32(BLOCKS_PER_PAGE) * u32(BLOCK_N))", "% u32(BLOCKS_PER_PAGE) * u32(BLOCK_N) + 1)"),
    Mutant("K0 a tile further on", _CONFIG, "K0_SMEM = Q_SMEM + NUM_TILES * TILE_BYTES", "K0_SMEM = Q_SMEM + (NUM_TILES + 1) * TILE_BYTES"),
    # Registers and warps.
    Mutant("more registers than there are", _CONFIG, "CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40",
           "CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 40"),
    Mutant("collective in one lane", _STORE, _CLAIM + "        return u32(cuda.shfl_sync(0xFFFFFFFF, i32(before), 0))",
           _CLAIM + "            before = u32(cuda.shfl_sync(0xFFFFFFFF, i32(before), 0))\n        return before", cases=(PAIR,)),
    # Between thread blocks and grids.
    Mutant("pair announced before it is stored", _STORE, _ANNOUNCED, "            pass\n", cases=(PAIR,),
           also=((_O_STORED, "                    announce(counter, lane)\n" + _O_STORED),)),
    Mutant("pair merged when claimed", _STORE, "ANNOUNCED = 3", "ANNOUNCED = 2", cases=(PAIR,)),
    Mutant("counter left as it is", _STORE, *_without("            ptx.st_relaxed(counter, u32(0))"), cases=(PAIR,)),
    Mutant("rehearsal stores where a piece does", _STORE, "u32(ptx.ld_shared_i32(words + u32(PIECE_FIRST_SLOT)))",
           "(u32(0) if num_parts == 0 else u32(ptx.ld_shared_i32(words + u32(PIECE_FIRST_SLOT))))", cases=((MANY[0], 7),)),
    Mutant("rehearsal counts as a part", _STORE, "            counter = u64(0) if is_rehearsal else counter\n", "",
           cases=((MANY[0], 7),)),
    Mutant("parts announced before they are stored", _STORE, _ANNOUNCED, "            pass\n", cases=(MANY,),
           also=((_PACKED_STORED, "                announce(counter, lane)\n" + _PACKED_STORED),)),
    Mutant("pair's O stored as parts are", _STORE, _O_STORED, "    " + _PACKED_STORED, cases=(PAIR,)),
    Mutant("part's O stored as a pair's is", _STORE, _PACKED_STORED, _O_STORED[4:], cases=(MANY,)),
    Mutant("a float's last byte but one another's", _PART, "OVER_3 = 0x3215", "OVER_3 = 0x3216", cases=(MANY,)),
    Mutant("two bytes of a float exchanged", _PART, "= 0x0400, 0x4210", "= 0x4000, 0x4120", cases=(MANY,)),
    Mutant("last words of a lane over its neighbour's", _PART, "lane * u32(8))", "lane * u32(12))", cases=(MANY,)),
    Mutant("last words exchanged", _PART, "last_address, w4, w5)", "last_address, w5, w4)", cases=(MANY,)),
    Mutant("pairs of strips over one another", _STORE, "o_part + u64(i * PAIR_BYTES)", "o_part + u64(i * (PAIR_BYTES - 128))",
           cases=(MANY,)),
    Mutant("parts merged before they are there", _MERGE, _UNTIL_THERE, "while False:", cases=(MANY,)),
    Mutant("parts merged when some are there", _MERGE, "if not is_rehearsal and num_announced < announced:",
           "if not is_rehearsal and num_announced == u32(0):", cases=(MANY,)),
    Mutant("one part too few awaited", _MERGE, _UNTIL_THERE, _UNTIL_THERE.replace("announced:", "announced - u32(1):"), cases=(MANY,)),
    Mutant("parts' counter left as it is", _MERGE, *_without("                    ptx.red_inc_u32(counter, u32(announced + num_shares "
           "* u32(ITEMS_PER_COUNTER) - u32(1)))"), cases=(MANY,)),
    Mutant("parts' counter begun anew too early", _MERGE, "* u32(ITEMS_PER_COUNTER) - u32(1)))", "* u32(ITEMS_PER_COUNTER) - u32(2)))",
           cases=(MANY,)),
    Mutant("parts awaited by one warp only", _MERGE, "        # All warps: the parts are there.\n        cuda.syncthreads()\n", "",
           cases=(MANY,)),
    Mutant("merge ends without having waited", _MERGE, *_without("            ptx.griddepcontrol_wait()"), cases=(PAIR,)),
    Mutant("merge reads states that are not there", _MERGE, _STATES + "                    cuda.syncthreads()\n", _STATES, (MANY,),
           share_parts=FEW_SHARE_PARTS),
    Mutant("merge acts on a word that is not there", _MERGE, "and where the rows go.\n            cuda.syncthreads()\n",
           "and where the rows go.\n", cases=(MANY,), share_parts=FEW_SHARE_PARTS),
    Mutant("merge begins an item over the one before", _MERGE, "of the item before.\n                cuda.syncthreads()\n",
           "of the item before.\n", cases=(ITEMS,), share_parts=FEW_SHARE_PARTS),
    Mutant("merge leaves out a warp's parts", _MERGE, "add_warps(state_rmem, place, num_shares)",
           "add_warps(state_rmem, place, u32(num_shares - u32(1)))", (FIVE,), share_parts=FEW_SHARE_PARTS),
    Mutant("merge's states aligned as floats are", _MERGE, "types.float32, alignment=16)", "types.float32)", (MANY,),
           share_parts=FEW_SHARE_PARTS),
    Mutant("merge's warps overwrite one another's states", _MERGE, "32 * 4 * STATE_FLOATS", "16 * 4 * STATE_FLOATS", (MANY,),
           share_parts=FEW_SHARE_PARTS),
    Mutant("merge mixes up its shares", _MERGE, "first_warp + share)", "first_warp + share % u32(1))", (MANY,),
           share_parts=FEW_SHARE_PARTS),
    # Few rows: fences, and what is in flight.
    Mutant("P without a proxy fence, few rows", _SWAPPED, *_without("        ptx.fence_proxy_async_shared()"), cases=(FEW,)),
    Mutant("P V without wgmma.fence, few rows", _SWAPPED, _FEW_PV_BEGINS, _FEW_PV_BEGINS.partition("\n")[2], cases=(FEW,)),
    Mutant("S not committed, few rows", _SWAPPED, "u32(accumulate))\n        ptx.wgmma_commit_group()\n\n    @inline\n    def qk_block",
           "u32(accumulate))\n\n    @inline\n    def qk_block", cases=(FEW,)),
    Mutant("P V not committed, few rows", _SWAPPED, _FEW_LAST_PV + "        ptx.wgmma_commit_group()\n", _FEW_LAST_PV, cases=(FEW,)),
    Mutant("S used before the wait, few rows", _SWAPPED, _FEW_S_DONE, "        tile_fence(s_rmem)\n", cases=(FEW,)),
    Mutant("S used without a registers fence, few rows", _SWAPPED, _FEW_S_DONE, "        wait_all()\n", cases=(FEW,)),
    Mutant("O used before the wait, few rows", _SWAPPED, _FEW_O_DONE, "        o_fence(o_rmem)\n", cases=(FEW,)),
    Mutant("O used without a registers fence, few rows", _SWAPPED, _FEW_O_DONE, "        wait_all()\n", cases=(FEW,)),
    Mutant("O's last tile used without a registers fence, few rows", _SWAPPED, *_without("        tile_fence(o_rmem.t3)"), cases=(FEW,)),
    Mutant("V freed before its product is done, few rows", _SWAPPED, _FEW_O_DONE + _FEW_RELEASE, _FEW_RELEASE + _FEW_O_DONE, cases=(FEW,)),
    Mutant("K read before its side is there, few rows", _SWAPPED, *_without("        ptx.mbarrier_wait_parity(base + u32(FULL_SMEM + "
           "(buffer * 2 + side) * 8), parity & u32(1))"), cases=(FEW,)),
    # Few rows: barriers.
    Mutant("warps' maxima read without a barrier, few rows", _SWAPPED, _FEW_MAXIMA_THERE, "", cases=(FEW,)),
    Mutant("warps' maxima announced before they are stored, few rows", _SWAPPED, _FEW_MAXIMA_THERE, "", cases=(FEW,),
           also=(("        block_max(max_rmem, s_rmem, at, wg)\n", _FEW_MAXIMA_THERE + "        block_max(max_rmem, s_rmem, at, wg)\n"),)),
    Mutant("P multiplied by without a barrier, few rows", _SWAPPED, _FEW_P_THERE, "", cases=(FEW,)),
    Mutant("P multiplied by before it is there, few rows", _SWAPPED, _FEW_P_STORED, "", cases=(FEW,),
           also=((_FEW_P_THERE, _FEW_P_THERE + _FEW_P_STORED),)),
    Mutant("maximum written before the old one is read, few rows", _SWAPPED, _FEW_P_THERE + _FEW_MAX_STORED,
           _FEW_MAX_STORED + _FEW_P_THERE, cases=(FEW,)),
    Mutant("barrier for half a warpgroup, few rows", _SWAPPED, _FEW_P_THERE, _FEW_P_THERE.replace("u32(128)", "u32(64)"), cases=(FEW,)),
    Mutant("maximum begun before the last one is read, few rows", _SWAPPED, _P0_IS_FREE, "            pass\n", cases=(FEW_BLOCKS,),
           also=((_FEW_MAX_STORED, _FEW_MAX_STORED + "        if is_first:\n" + _P0_IS_FREE),)),
    Mutant("P announced before it is stored, few rows", _SWAPPED, _P_ARRIVES, "", cases=(FEW,),
           also=((_FEW_P_STORED, _P_ARRIVES + _FEW_P_STORED),)),
    Mutant("maximum announced before it is stored, few rows", _SWAPPED, _FEW_MAX_STORED + _P_ARRIVES, _P_ARRIVES + _FEW_MAX_STORED,
           cases=(FEW,)),
    Mutant("barrier for one warpgroup, few rows", _SWAPPED, "        ptx.bar_arrive(u32(P_STORED[wg]), u32(NUM_CONSUMERS))",
           "        ptx.bar_arrive(u32(P_STORED[wg]), u32(128))", cases=(FEW,)),
    Mutant("sums read without a barrier, few rows", _SWAPPED, *_without("        ptx.bar_sync(u32(SUMS), u32(NUM_CONSUMERS))"),
           cases=(FEW,)),
    Mutant("Q not freed by the last block, few rows", _SWAPPED, *_without("            release_q(base, lane, u32(0), True)"),
           cases=(FEW_BLOCKS,)),
    Mutant("tail zeroed while K is read, few rows", _SOFTMAX, "        # All 4 warps of this warpgroup, whose wgmma have read these rows "
           "as K.\n        ptx.bar_sync(u32(barrier_idx), u32(128))\n", "", cases=(FEW,)),
    # Few rows: values and layouts.
    Mutant("Q's tiles as far apart as those of 64 rows, few rows", _SWAPPED, "NEXT_TOKENS = config.q_tile_bytes >> 4",
           "NEXT_TOKENS = TILE_BYTES >> 4", cases=(FEW,)),
    Mutant("K's right side where the left one begins, few rows", _SWAPPED, "u64(SIDE_OFFSET[side])", "u64(SIDE_OFFSET[0])", cases=(FEW,)),
    Mutant("next tokens of V by half, few rows", _PRODUCTS, "2 * config.next_atom_bytes(side) >> 4", "config.next_atom_bytes(side) >> 4",
           cases=(FEW,)),
    Mutant("a tile of O of another's columns, few rows", _SWAPPED, "tokens + u64(2 * NEXT_K_TILE)", "tokens + u64(NEXT_K_TILE)",
           cases=(FEW,)),
    Mutant("P1 over P0, few rows", _SWAPPED, "P0_SMEM + config.q_tile_bytes)", "P0_SMEM)", cases=(FEW,)),
    Mutant("P1 over P0's last rows, few rows", _SWAPPED, "P0_SMEM + config.q_tile_bytes)", "P0_SMEM + config.q_tile_bytes // 2)",
           cases=(FEW_PAIR,)),
    Mutant("swizzle of four rows, few rows", _SWAPPED, "(chunk ^ (row & u32(7)))", "(chunk ^ (row & u32(3)))", cases=(FEW,)),
    Mutant("warp's tokens of P another's, few rows", _SWAPPED, "chunk = (at.thread >> u32(5)) * u32(2)",
           "chunk = (at.thread >> u32(6)) * u32(2)", cases=(FEW,)),
    Mutant("P's tokens and rows exchanged, few rows", _SWAPPED, "ptx.stmatrix_x4_trans", "ptx.stmatrix_x4", cases=(FEW,)),
    Mutant("rows of P behind the first 16 over them, few rows", _SWAPPED, "u32(8 * j * 128)", "u32(0 * j)", cases=(FEW_PAIR,)),
    Mutant("warp's maxima another's, few rows", _SWAPPED, "(at.thread >> u32(5)) * u32(4 * NUM_ROWS), max_rmem)",
           "(at.thread >> u32(6)) * u32(4 * NUM_ROWS), max_rmem)", cases=(FEW,)),
    Mutant("warp's sums another's, few rows", _SWAPPED, "(thread_idx >> u32(5)) * u32(4 * NUM_ROWS), sums_rmem)",
           "(thread_idx >> u32(6)) * u32(4 * NUM_ROWS), sums_rmem)", cases=(FEW,)),
    Mutant("sums of one warpgroup, few rows", _SWAPPED, "for w in range(NUM_WARPS)", "for w in range(4)", cases=(FEW_PAIR,)),
    Mutant("sums of half a warp, few rows", _SWAPPED, "total + cuda.shfl_xor_sync(0xFFFFFFFF, total, 16)", "total", cases=(FEW,)),
    Mutant("maximum of one warp, few rows", _SWAPPED, "        for w in range(4):\n            load_rows", "        for w in range(1):\n"
           "            load_rows", cases=((replace(FEW[0], values="large"), 1), FEW_MANY)),
    Mutant("maximum of half a warp, few rows", _SWAPPED, "max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, 16))", "value",
           cases=((replace(FEW[0], values="large"), 1), FEW_MANY)),
    Mutant("rows of a thread a row apart, few rows", _DECODE, "(lane & u32(3)) * u32(2) if IS_SWAPPED", "(lane & u32(3)) if IS_SWAPPED",
           cases=(FEW,)),
    Mutant("rows behind the first 16 at their place, few rows", _SWAPPED, "        for i in range(ROWS):\n            values[i] = "
           "ptx.ld_shared_f32(address + u32(4 * (8 * (i // 2) + i % 2)))", "        for i in range(ROWS):\n            values[i] = "
           "ptx.ld_shared_f32(address + u32(4 * (8 * (i // 2 % 2) + i % 2)))", cases=(FEW_PAIR,)),
    Mutant("mask one token late, few rows", _SWAPPED, "if seen <= i32(0):", "if seen < i32(0):", cases=(FEW, FEW_PAIR)),
    Mutant("mask one token late 8 tokens further, few rows", _SWAPPED, "if seen <= i32(8):", "if seen < i32(8):",
           cases=((replace(FEW[0], seq_lens=(300,)), 1),)),
    Mutant("mask of the first row, few rows", _SWAPPED, "i32(row_of(at.lane, i))", "i32(row_of(at.lane, 0))", cases=(FEW_PAIR,)),
    Mutant("mask of the neighbouring row, few rows", _SWAPPED, "i32(row_of(at.lane, i))", "i32(row_of(at.lane, i ^ 1))",
           cases=((replace(FEW_PAIR[0], num_heads_q=15), 1),)),
    Mutant("mask of the first warp's tokens, few rows", _SWAPPED, "(at.thread >> u32(5)) * u32(16)))\n", "u32(0)))\n", cases=(FEW,)),
    Mutant("maximum not begun, few rows", _SWAPPED, "scale_log2e, parity, is_first)\n        exponentiate",
           "scale_log2e, parity, False)\n        exponentiate", cases=(FEW,)),
    Mutant("sums not rescaled by the other block, few rows", _SWAPPED, *_without("            regs.sums_rmem[i] *= scale_rmem[i]"),
           cases=(FEW,)),
    Mutant("O not rescaled by the own block, few rows", _SWAPPED, _FEW_OWN_RESCALED, _FEW_OWN_RESCALED.partition("\n")[2], cases=(FEW,)),
    Mutant("O not rescaled by the other block, few rows", _SWAPPED, _FEW_OTHER_RESCALED, _FEW_OTHER_RESCALED.partition("\n")[2],
           cases=(FEW,)),
    Mutant("O not rescaled in a second step, few rows", _SWAPPED, _FEW_OWN_RESCALED,
           _FEW_OWN_RESCALED.replace("not is_first", "wg == 1 or parity >= u32(2 * NEXT_STEP)"), cases=(FEW, FEW_PAIR)),
    Mutant("rescaling decided by a thread's first row, few rows", _SWAPPED, *_without(
        "            needed = needed | (scale_rmem[i] != f32(1))"), cases=(FEW, FEW_PAIR, FEW_SEVERAL)),
    Mutant("O's last tile not rescaled, few rows", _SWAPPED, *_without("                    o_rmem.t3[first + half] *= scale_rmem[i]"),
           cases=(FEW,)),
    Mutant("O rescaled before there is one, few rows", _SWAPPED, "needed and has_o", "needed", cases=(FEW,)),
    Mutant("O begun by each step, few rows", _SWAPPED, "wg, wg, lane, not is_first)", "wg, wg, lane, wg == 1)", cases=(FEW, FEW_PAIR)),
    Mutant("O begun by each step of the other block, few rows", _SWAPPED, "wg, at.lane, not is_first)", "wg, at.lane, wg == 0)",
           cases=(FEW, FEW_PAIR)),
    Mutant("O not begun by the first product, few rows", _SWAPPED, "wg, wg, lane, not is_first)", "wg, wg, lane, True)", cases=(FEW,)),
    Mutant("O of a request without tokens not begun, few rows", _DECODE, "            else:\n                clear_o(regs.o_rmem)\n", "",
           cases=(FEW_NOTHING,)),
    Mutant("half of Q's bytes expected, few rows", _LOAD, "u32(NUM_TILES * Q_TILE_BYTES)", "u32(NUM_TILES * Q_TILE_BYTES // 2)",
           cases=(FEW,)),
    Mutant("as many bytes of Q expected as of 64 rows, few rows", _LOAD, "u32(NUM_TILES * Q_TILE_BYTES)", "u32(NUM_TILES * TILE_BYTES)",
           cases=(FEW,)),
    Mutant("warps' maxima over Q, few rows", _CONFIG, "WARP_MAX_SMEM = Q_SMEM + NUM_TILES * SWAPPED_ROWS[-1] * 128",
           "WARP_MAX_SMEM = Q_SMEM + (NUM_TILES - 1) * SWAPPED_ROWS[-1] * 128", cases=(FEW_PAIR,)),
    Mutant("sums over the warps' maxima, few rows", _CONFIG, "WARP_SUM_SMEM = WARP_MAX_SMEM + NUM_WARPS * SWAPPED_ROWS[-1] * 4",
           "WARP_SUM_SMEM = WARP_MAX_SMEM", cases=(FEW, FEW_BLOCKS)),
    Mutant("results over the sums, few rows", _CONFIG, "SWAPPED_STAGE_SMEM = WARP_SUM_SMEM + NUM_WARPS * SWAPPED_ROWS[-1] * 4",
           "SWAPPED_STAGE_SMEM = WARP_SUM_SMEM", cases=(FEW, FEW_BLOCKS)),
    # Few rows: a piece's end.
    Mutant("stage read before it is written, few rows", _SWAPPED_STORE,
           "        # The lanes' matrices are there.\n        cuda.syncwarp()\n", "", cases=(FEW,)),
    Mutant("warp's part of the stage is another's, few rows", _SWAPPED_STORE, "warp * u32(NUM_ROWS * STAGE_ROW_BYTES)",
           "(warp & u32(3)) * u32(NUM_ROWS * STAGE_ROW_BYTES)", cases=(FEW,)),
    Mutant("swizzle of the stage of four rows, few rows", _SWAPPED_STORE, "& u32(1)) ^ (row & u32(7))) << u32(4))",
           "& u32(1)) ^ (row & u32(3))) << u32(4))", cases=(FEW,)),
    Mutant("a tile of the stage over another, few rows", _SWAPPED_STORE, "rows ^ u32(96)", "rows ^ u32(64)", cases=(FEW,)),
    Mutant("factors of the neighbouring row, few rows", _SWAPPED_STORE, "i32(row_of(lane, i))", "i32(row_of(lane, i ^ 1))", cases=(FEW,)),
    Mutant("results of one row more than there are, few rows", _SWAPPED_STORE, "if address != 0:", "if True:", cases=(FEW_20,)),
    Mutant("columns of the first warp, few rows", _SWAPPED_STORE, "(warp & u32(3)) * u32(32)", "u32(0)", cases=(FEW,)),
    Mutant("rows behind the first 16 not stored, few rows", _SWAPPED_STORE, "range(0, NUM_ROWS, 4)", "range(0, 16, 4)", cases=(FEW_PAIR,)),
    Mutant("lse of the first 16 rows only, few rows", _SWAPPED_STORE, "warp == 0 and lane < u32(NUM_ROWS)", "warp == 0 and lane < u32(16)",
           cases=(FEW_PAIR,)),
    Mutant("a tile of a part over another, few rows", _SWAPPED_STORE, "store_tile(regs.o_rmem.t2, o_part + u64(2 * PAIRS * STRIP_BYTES))",
           "store_tile(regs.o_rmem.t2, o_part + u64(PAIRS * STRIP_BYTES))", cases=(FEW_PAIR,)),
    Mutant("a tile of the other piece twice, few rows", _SWAPPED_STORE, "add_tile(o_rmem.t2, other_o + u64(2 * PAIRS * STRIP_BYTES)",
           "add_tile(o_rmem.t2, other_o + u64(PAIRS * STRIP_BYTES)", cases=(FEW_PAIR,)),
    Mutant("parts of a warp another's, few rows", _SWAPPED_STORE, "u32(NUM_WARPS)) + warp)", "u32(NUM_WARPS)) + (warp & u32(6)))",
           cases=(FEW_MANY,)),
    Mutant("states of a part over another's, few rows", _SWAPPED_STORE, "u64(part_warp) * u64(2 * ROW_BYTES)",
           "u64(part_warp) * u64(ROW_BYTES)", cases=(FEW_MANY,)),
    Mutant("sums of a part over its maxima, few rows", _SWAPPED_STORE, "ptx.st_global_f32(part.state + u64(ROW_BYTES), total)",
           "ptx.st_global_f32(part.state, total)", cases=(FEW_MANY,)),
    Mutant("a pair's warps claim their warpgroup's word, few rows", _SWAPPED_STORE, _FEW_WORD,
           _FEW_WORD.replace("warp if ends_here else ", ""), cases=(FEW_PAIR,)),
    Mutant("warps of many parts count up a word each, few rows", _SWAPPED_STORE, _FEW_WORD,
           _FEW_WORD.replace(" if ends_here else warp & u32(NUM_WARPS // 2)", ""), cases=(FEW_MANY,)),
    Mutant("both warpgroups count up one word, few rows", _SWAPPED_STORE, _FEW_WORD,
           _FEW_WORD.replace("warp & u32(NUM_WARPS // 2)", "u32(0)"), cases=(FEW_MANY,)),
    Mutant("pair announced before it is stored, few rows", _SWAPPED_STORE, _ANNOUNCED, "            pass\n", cases=(FEW_PAIR,),
           also=((_FEW_O_STORED, "                    announce(counter, lane)\n" + _FEW_O_STORED),)),
    Mutant("parts announced before they are stored, few rows", _SWAPPED_STORE, _ANNOUNCED, "            pass\n", cases=(FEW_MANY,),
           also=((_FEW_PACKED_STORED, "                announce(counter, lane)\n" + _FEW_PACKED_STORED),)),
    Mutant("parts announced before their states are stored, few rows", _SWAPPED_STORE, _FEW_STATE_STORED + _ANNOUNCED,
           _ANNOUNCED + _FEW_STATE_STORED, cases=(FEW_MANY,)),
    Mutant("pair merged before it is announced, few rows", _SWAPPED_STORE, *_without("                await_announced(part.counter, lane)"),
           cases=(FEW_PAIR,)),
    Mutant("a piece takes its own slot for the other's, few rows", _SWAPPED_STORE, "i64(-distance) if is_second else distance", "i64(0)",
           cases=(FEW_PAIR,)),
    Mutant("rehearsal counts as a part, few rows", _SWAPPED_STORE, "            counter = u64(0) if is_rehearsal else counter\n", "",
           cases=((FEW_MANY[0], 7),)),
    Mutant("rehearsal stores where a piece does, few rows", _SWAPPED_STORE, "u32(ptx.ld_shared_i32(words + u32(PIECE_FIRST_SLOT)))",
           "(u32(0) if num_parts == 0 else u32(ptx.ld_shared_i32(words + u32(PIECE_FIRST_SLOT))))", cases=((FEW_MANY[0], 7),)),
    # Few rows: the merge.
    Mutant("parts merged before they are there, few rows", _MERGE, _UNTIL_THERE, "while False:", cases=(FEW_MANY,)),
    Mutant("parts awaited of one warp of four, few rows", _MERGE, "u32(num_parts * u32(ANNOUNCEMENTS))", "u32(num_parts)",
           cases=(FEW_MANY,)),
    Mutant("parts awaited of three warps of four, few rows", _MERGE, "(NUM_WARPS // 2, ITEMS_PER_HALF",
           "(NUM_WARPS // 2 - 1, ITEMS_PER_HALF", cases=(FEW_MANY,)),
    Mutant("one announcement too few awaited, few rows", _MERGE, _UNTIL_THERE, _UNTIL_THERE.replace("announced:", "announced - u32(1):"),
           cases=(FEW_MANY,)),
    Mutant("parts' counter begun anew too early, few rows", _MERGE, _FEW_COUNT, "ITEMS_PER_HALF) if", cases=(FEW_MANY_32,)),
    Mutant("parts' counter begun anew too late, few rows", _MERGE, _FEW_COUNT, "2 * " + _FEW_COUNT, cases=(FEW_MANY_32,)),
    Mutant("merge waits for the other warpgroup, few rows", _MERGE, "tile, word = u32(0), half * u32(NUM_WARPS // 2)",
           "tile, word = u32(0), (half ^ u32(1)) * u32(NUM_WARPS // 2)", cases=(FEW_MANY,), also=(
               ("part_warp = word + (pair >> u32(2))", "part_warp = half * u32(NUM_WARPS // 2) + (pair >> u32(2))"),)),
    Mutant("strips of the wrong tile, few rows", _MERGE, "first_tile(pair) * u32(num_rows // 16)", "u32(0)", cases=(FEW_MANY,)),
    Mutant("second strip of the same tile, few rows", _SWAPPED_STORE, "tile_rmem, 4 * j, next_rmem, 4 * j)",
           "tile_rmem, 4 * j, tile_rmem, 4 * j)", cases=(FEW_MANY,)),
    Mutant("pair of tiles over the first one, few rows", _SWAPPED_STORE, "o_part + u64(PAIRS * PAIR_BYTES), lane)",
           "o_part, lane)", cases=(FEW_MANY,)),
    Mutant("strips of the wrong rows, few rows", _MERGE, "first_of_8(pair, row_in_tile) // u32(8)", "row_in_tile // u32(8)",
           cases=(FEW_MANY,)),
    Mutant("strips of the wrong warp, few rows", _MERGE, "part_warp = word + (pair >> u32(2))", "part_warp = word", cases=(FEW_MANY,)),
    Mutant("states of the wrong warp, few rows", _MERGE, "state, state_row = part_warp,", "state, state_row = half,", cases=(FEW_MANY,)),
    Mutant("states of the wrong rows, few rows", _MERGE, "first_of_8(pair, row_in_tile) + (lane & u32(3)) * u32(2)",
           "row_in_tile + (lane & u32(3)) * u32(2)", cases=(FEW_MANY,)),
    Mutant("states of a lane's rows 8 apart, few rows", _MERGE, "4 if IS_SWAPPED else 8 * 4", "8 * 4", cases=(FEW_MANY,)),
    Mutant("a lane's rows and columns exchanged, few rows", _MERGE, "(1, 2) if IS_SWAPPED", "(2, 1) if IS_SWAPPED",
           cases=((replace(FEW_MANY[0], values="normal"), 4),)),
    Mutant("results not transposed, few rows", _MERGE, "ptx.movmatrix_trans(to_pair(state_rmem[at + 1] * factor_b, "
           "state_rmem[at] * factor_a))", "to_pair(state_rmem[at + 1] * factor_b, state_rmem[at] * factor_a)", cases=(FEW_MANY,)),
    Mutant("results of 8 rows over the others, few rows", _MERGE, "row = first_of_8(pair, lane >> u32(2))",
           "row = lane >> u32(2)", cases=(FEW_MANY,)),
    Mutant("lse of the neighbouring row, few rows", _MERGE, "is_odd = i32(lane >> u32(3)), lane & u32(4) != 0",
           "is_odd = i32(lane >> u32(3)), lane & u32(4) == 0", cases=(FEW_MANY,)),
    Mutant("merge stores rows that are not there, few rows", _MERGE,
           "        if row < u32(u32(column(merge, MERGE_Q_LEN)) * heads_per_kv):", "        if True:",
           cases=((replace(FEW_MANY_32[0], seq_len_q=1, num_heads_q=20), 5),)),
    Mutant("merge reads states that are not there, few rows", _MERGE, _STATES + "                    cuda.syncthreads()\n", _STATES,
           (FEW_MANY,), share_parts=FEW_SHARE_PARTS),
)
