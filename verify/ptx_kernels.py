"""Kernels that show what each intrinsic of `mla_numba.ptx` does; `verify.ptx_effects` says with what, and what comes out.

Every argument is an address in global memory, or that of a tensor map, as 64 bits. Nothing is imported but what kernels are made of:
the module can be executed again with other meanings of `cuda`, `numpy` and `ptx`.
"""

import numpy as np
from numba import cuda
from numba.cuda import types

from mla_numba import ptx

i32, u16, u32, u64 = np.int32, np.uint16, np.uint32, np.uint64

WARP = 32
ALL_BITS = 0xFFFFFFFF
TILE_BYTES = 64 * 128           # 64 rows of 64 16-bit elements
# Turns of a producer and a consumer with each other.
TURNS = 5

# Arithmetic.


def make_unary(name):
    function = getattr(ptx, name)

    def kernel(out, x):
        at = u64(4 * cuda.threadIdx.x)
        ptx.st_global_f32(out + at, function(ptx.ld_global_f32(x + at)))

    return kernel


def make_convert(name):
    function = getattr(ptx, name)

    def kernel(out, high, low):
        at = u64(4 * cuda.threadIdx.x)
        ptx.st_global_b32(out + at, function(ptx.ld_global_f32(high + at), ptx.ld_global_f32(low + at)))

    return kernel


def make_multiply_add():
    def kernel(products, sums, a, b, c):
        at = u64(4 * cuda.threadIdx.x)
        factor_a, factor_b, term = ptx.ld_global_f32(a + at), ptx.ld_global_f32(b + at), ptx.ld_global_f32(c + at)
        # Two roundings, where `a * b + term` would be one instruction.
        ptx.st_global_f32(products + at, ptx.mul_rn(factor_a, factor_b) + term)
        ptx.st_global_f32(sums + at, ptx.fma_rn(factor_a, factor_b, term))

    return kernel


def make_bytes(selectors):
    def kernel(words, floats, a, b):
        at = u64(4 * cuda.threadIdx.x)
        a_bits, b_bits = ptx.bits_of_f32(ptx.ld_global_f32(a + at)), ptx.bits_of_f32(ptx.ld_global_f32(b + at))
        for i in range(len(selectors)):
            ptx.st_global_b32(words + at + u64(4 * WARP * i), ptx.prmt(a_bits, b_bits, u32(selectors[i])))
        ptx.st_global_f32(floats + at, ptx.f32_of_bits(a_bits ^ (b_bits & u32(0x80000000))))

    return kernel


def make_opaque():
    floats_begin, floats_fence = ptx.make_registers_begin(4), ptx.make_registers_fence(4)
    words_fence = ptx.make_registers_fence(2, types.uint32)

    def kernel(floats, words, x):
        at = u64(16 * cuda.threadIdx.x)
        floats_rmem, words_rmem = cuda.local.array(4, types.float32), cuda.local.array(2, types.uint32)
        floats_begin(floats_rmem)
        for i in range(4):
            floats_rmem[i] = ptx.ld_global_f32(x + at + u64(4 * i))
        for i in range(2):
            words_rmem[i] = ptx.opaque_b32(u32(ptx.ld_global_i32(x + at + u64(4 * i))))
        floats_fence(floats_rmem)
        words_fence(words_rmem)
        for i in range(4):
            ptx.st_global_f32(floats + at + u64(4 * i), floats_rmem[i])
        for i in range(2):
            ptx.st_global_b32(words + u64(8 * cuda.threadIdx.x + 4 * i), words_rmem[i])

    return kernel


# Loads and stores.


def make_shared_memory(num_threads):
    """Every thread reads what its neighbour wrote."""
    def kernel(words, floats, quads, x):
        thread = i32(cuda.threadIdx.x)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        floats_smem, quads_smem = base + u32(4 * num_threads), base + u32(8 * num_threads)
        own = u32(ptx.ld_global_i32(x + u64(4 * thread)))
        ptx.st_shared_i32(base + u32(4 * thread), i32(own))
        ptx.st_shared_f32(floats_smem + u32(4 * thread), ptx.ld_global_f32(x + u64(4 * thread)))
        ptx.st_shared_v4_b32(quads_smem + u32(16 * thread), own, own ^ u32(1), own ^ u32(2), own ^ u32(3))
        # All threads: their words are there.
        cuda.syncthreads()
        neighbour = (thread + 1) % num_threads
        quad_rmem = cuda.local.array(8, types.uint32)
        ptx.ld_shared_v4_b32(quad_rmem, 4, quads_smem + u32(16 * neighbour))
        ptx.st_global_b32(words + u64(4 * thread), u32(ptx.ld_shared_i32(base + u32(4 * neighbour))))
        ptx.st_global_f32(floats + u64(4 * thread), ptx.ld_shared_f32(floats_smem + u32(4 * neighbour)))
        ptx.st_global_v4_b32(quads + u64(16 * thread), quad_rmem[4], quad_rmem[5], quad_rmem[6], quad_rmem[7])

    return kernel


def make_global_memory():
    def kernel(words, floats, pairs, quads, x):
        thread = i32(cuda.threadIdx.x)
        at = u64(4 * thread)
        quad_rmem, words_rmem = cuda.local.array(8, types.float32), cuda.local.array(6, types.uint32)
        ptx.prefetch_global_l2(x + u64(16 * thread))
        ptx.ld_global_v4_f32(quad_rmem, 4, x + u64(16 * thread))
        ptx.st_global_b32(words + at, u32(ptx.ld_global_i32(x + at)))
        ptx.st_global_f32(floats + at, ptx.ld_global_f32(x + at))
        ptx.st_global_v4_f32(quads + u64(16 * thread), quad_rmem[7], quad_rmem[6], quad_rmem[5], quad_rmem[4])
        ptx.ld_global_v2_b32(words_rmem, 0, x + u64(16 * thread + 8))
        ptx.ld_global_v4_b32(words_rmem, 2, x + u64(16 * thread))
        ptx.st_global_v2_b32(pairs + u64(16 * thread), words_rmem[0], words_rmem[1])
        ptx.st_global_v2_b32(pairs + u64(16 * thread + 8), words_rmem[5], words_rmem[2])

    return kernel


def make_ldmatrix(name):
    load = getattr(ptx, name)

    def kernel(out, x):
        lane = i32(cuda.threadIdx.x)
        row_smem = ((ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)) + u32(16 * lane)
        row_rmem, matrices_rmem = cuda.local.array(4, types.uint32), cuda.local.array(8, types.uint32)
        for i in range(4):
            row_rmem[i] = u32(ptx.ld_global_i32(x + u64(16 * lane + 4 * i)))
        ptx.st_shared_v4_b32(row_smem, row_rmem[0], row_rmem[1], row_rmem[2], row_rmem[3])
        cuda.syncwarp()
        load(matrices_rmem, 4, row_smem)
        ptx.st_global_v4_b32(out + u64(16 * lane), matrices_rmem[4], matrices_rmem[5], matrices_rmem[6], matrices_rmem[7])

    return kernel


def make_stmatrix(name):
    store = getattr(ptx, name)

    def kernel(out, x):
        lane = i32(cuda.threadIdx.x)
        row_smem = ((ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)) + u32(16 * lane)
        row_rmem, matrices_rmem = cuda.local.array(4, types.uint32), cuda.local.array(4, types.uint32)
        for i in range(4):
            matrices_rmem[i] = u32(ptx.ld_global_i32(x + u64(16 * lane + 4 * i)))
        store(row_smem, matrices_rmem[0], matrices_rmem[1], matrices_rmem[2], matrices_rmem[3])
        cuda.syncwarp()
        ptx.ld_shared_v4_b32(row_rmem, 0, row_smem)
        ptx.st_global_v4_b32(out + u64(16 * lane), row_rmem[0], row_rmem[1], row_rmem[2], row_rmem[3])

    return kernel


def make_movmatrix():
    def kernel(out, x):
        at = u64(4 * cuda.threadIdx.x)
        ptx.st_global_b32(out + at, ptx.movmatrix_trans(u32(ptx.ld_global_i32(x + at))))

    return kernel


# Words that thread blocks share.


def make_tickets(name):
    """Every thread draws a number, and marks it."""
    draw = getattr(ptx, name)

    def kernel(counter, marks):
        ticket = draw(counter, u32(1))
        ptx.st_global_b32(marks + u64(4) * u64(ticket), ticket ^ u32(ALL_BITS))

    return kernel


def make_lock(turns):
    """One thread of each block counts under a lock, in plain loads and stores; a comparison that fails changes nothing."""
    def kernel(lock, count, other, seen):
        if cuda.threadIdx.x == 0:
            for _ in range(turns):
                while ptx.atom_cas_acq_rel(lock, u32(0), u32(1)) != u32(0):
                    pass
                ptx.st_global_f32(count, ptx.ld_global_f32(count) + np.float32(1))
                ptx.atom_cas_acq_rel(lock, u32(1), u32(0))
            ptx.st_global_b32(seen + u64(4 * cuda.blockIdx.x), ptx.atom_cas_acq_rel(other, u32(7), u32(9)))

    return kernel


def make_reduction():
    def kernel(floats, words, rounds, x):
        thread = i32(cuda.threadIdx.x)
        at = u64(4 * (i32(cuda.blockIdx.x) * i32(cuda.blockDim.x) + thread))
        ptx.red_add_f32(floats + u64(4 * (thread & 3)), ptx.ld_global_f32(x + at))
        ptx.red_add_u32(words + u64(4 * (thread & 3)), u32(thread))
        ptx.red_inc_u32(rounds + u64(4 * (thread & 3)), u32(8))

    return kernel


def make_message():
    """Block 0 of a cluster, whose blocks run together, writes and raises a flag; block 1 reads when it has seen it."""
    def kernel(out, data, flag, x):
        lane = i32(cuda.threadIdx.x)
        at = u64(4 * lane)
        if cuda.blockIdx.x == 0:
            ptx.st_global_f32(data + at, ptx.ld_global_f32(x + at))
            cuda.syncwarp()
            if lane == 0:
                ptx.fence_acq_rel_gpu()
                ptx.st_relaxed(flag, u32(1))
        else:
            if lane == 0:
                while ptx.ld_acquire(flag) == u32(0):
                    pass
            cuda.syncwarp()
            ptx.st_global_f32(out + at, ptx.ld_global_f32(data + at))

    return kernel


def make_arrivals(num_blocks):
    """All blocks of a cluster but the last write and arrive at a counter; the last reads what they wrote."""
    def kernel(out, data, counter, x):
        lane, block = i32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        at = u64(4 * (block * WARP + lane))
        if block < num_blocks - 1:
            ptx.st_global_f32(data + at, ptx.ld_global_f32(x + at))
            cuda.syncwarp()
            if lane == 0:
                ptx.red_add_u32(counter, u32(1))
        else:
            if lane == 0:
                while ptx.ld_acquire(counter) < u32(num_blocks - 1):
                    pass
            cuda.syncwarp()
            for other in range(num_blocks - 1):
                at = u64(4 * (other * WARP + lane))
                ptx.st_global_f32(out + at, ptx.ld_global_f32(data + at))

    return kernel


# Barriers.


def make_phases():
    """One thread walks an mbarrier through its phases, and looks at both parities after each step."""
    def kernel(seen):
        mbar = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        if cuda.threadIdx.x == 0:
            for step in range(7):
                if step == 0:
                    ptx.mbarrier_init(mbar, u32(4))
                elif step == 1:
                    ptx.mbarrier_arrive_count(mbar, u32(3))
                elif step == 2:
                    ptx.mbarrier_arrive(mbar)
                elif step == 3:
                    ptx.mbarrier_arrive_count(mbar, u32(4))
                elif step == 4:
                    ptx.mbarrier_wait_parity(mbar, u32(1))
                elif step == 5:
                    ptx.mbarrier_inval(mbar)
                    ptx.mbarrier_init(mbar, u32(1))
                else:
                    ptx.mbarrier_arrive(mbar)
                ptx.st_global_b32(seen + u64(8 * step), ptx.mbarrier_test_wait_parity(mbar, u32(0)))
                ptx.st_global_b32(seen + u64(8 * step + 4), ptx.mbarrier_test_wait_parity(mbar, u32(1)))

    return kernel


def make_pipeline():
    """Warp 0 hands words to warp 1 through two buffers, each with an mbarrier for full and one for empty."""
    def kernel(out, x):
        thread = i32(cuda.threadIdx.x)
        warp, lane = thread >> 5, thread & 31
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        full, empty = base + u32(2 * 4 * WARP), base + u32(2 * 4 * WARP + 16)
        if thread == 0:
            for buffer in range(2):
                ptx.mbarrier_init(full + u32(8 * buffer), u32(WARP))
                ptx.mbarrier_init(empty + u32(8 * buffer), u32(WARP))
            ptx.fence_mbarrier_init()
        # All threads: the mbarriers are there.
        cuda.syncthreads()
        for turn in range(TURNS):
            buffer, parity = turn & 1, u32(turn >> 1 & 1)
            words, mbar_offset = base + u32(4 * WARP * buffer), u32(8 * buffer)
            at = u64(4 * (turn * WARP + lane))
            if warp == 0:
                # 32 readers arrived, one use ago; the first use does not wait.
                ptx.mbarrier_wait_parity(empty + mbar_offset, parity ^ u32(1))
                ptx.st_shared_i32(words + u32(4 * lane), ptx.ld_global_i32(x + at))
                ptx.mbarrier_arrive(full + mbar_offset)
            else:
                # 32 writers arrived.
                ptx.mbarrier_wait_parity(full + mbar_offset, parity)
                ptx.st_global_b32(out + at, u32(ptx.ld_shared_i32(words + u32(4 * ((lane + 1) & 31)))))
                ptx.mbarrier_arrive(empty + mbar_offset)

    return kernel


def make_named_barriers():
    """Warp 0 hands words to warp 1 through one buffer: barrier 1 says that it is full, barrier 2 that it is empty."""
    def kernel(out, x):
        thread = i32(cuda.threadIdx.x)
        warp, lane = thread >> 5, thread & 31
        words = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        for turn in range(TURNS):
            at = u64(4 * (turn * WARP + lane))
            if warp == 0:
                if turn > 0:
                    # Warp 1 arrives, warp 0 waits: the words have been read.
                    ptx.bar_sync(u32(2), u32(2 * WARP))
                ptx.st_shared_i32(words + u32(4 * lane), ptx.ld_global_i32(x + at))
                # Warp 0 arrives, warp 1 waits: the words are there.
                ptx.bar_arrive(u32(1), u32(2 * WARP))
            else:
                ptx.bar_sync(u32(1), u32(2 * WARP))
                ptx.st_global_b32(out + at, u32(ptx.ld_shared_i32(words + u32(4 * ((lane + 1) & 31)))))
                if turn < TURNS - 1:
                    ptx.bar_arrive(u32(2), u32(2 * WARP))

    return kernel


# Asynchronous copies.


def make_copy_groups(num_threads):
    """Every thread copies into two groups, waits for the first, then for both, and passes on its neighbour's 16 bytes of each."""
    wait_all_but_1, wait_all = ptx.make_cp_async_wait_group(1), ptx.make_cp_async_wait_group(0)

    def kernel(out, x):
        thread = i32(cuda.threadIdx.x)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        quad_rmem = cuda.local.array(4, types.uint32)
        for group in range(2):
            at = 16 * (group * num_threads + thread)
            ptx.cp_async_16(base + u32(at), x + u64(at))
            ptx.cp_async_commit_group()
        for group in range(2):
            if group == 0:
                wait_all_but_1()
            else:
                wait_all()
            # All threads: their copies of this group are there.
            cuda.syncthreads()
            ptx.ld_shared_v4_b32(quad_rmem, 0, base + u32(16 * (group * num_threads + (thread + 1) % num_threads)))
            ptx.st_global_v4_b32(out + u64(16 * (group * num_threads + thread)), quad_rmem[0], quad_rmem[1], quad_rmem[2], quad_rmem[3])

    return kernel


def make_copy_zfill():
    """Thread t copies its first t % 17 bytes of 16."""
    wait_all = ptx.make_cp_async_wait_group(0)

    def kernel(out, x):
        thread = i32(cuda.threadIdx.x)
        own = ((ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)) + u32(16 * thread)
        quad_rmem = cuda.local.array(4, types.uint32)
        ptx.st_shared_v4_b32(own, u32(ALL_BITS), u32(ALL_BITS), u32(ALL_BITS), u32(ALL_BITS))
        ptx.cp_async_16_zfill(own, x + u64(16 * thread), u32(thread % 17))
        ptx.cp_async_commit_group()
        wait_all()
        ptx.ld_shared_v4_b32(quad_rmem, 0, own)
        ptx.st_global_v4_b32(out + u64(16 * thread), quad_rmem[0], quad_rmem[1], quad_rmem[2], quad_rmem[3])

    return kernel


def make_copy_mbarrier(num_threads):
    """Every thread's copy arrives at an mbarrier, where its neighbour waits."""
    def kernel(out, x):
        thread = i32(cuda.threadIdx.x)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        mbar = base + u32(16 * num_threads)
        quad_rmem = cuda.local.array(4, types.uint32)
        if thread == 0:
            ptx.mbarrier_init(mbar, u32(num_threads))
            ptx.fence_mbarrier_init()
        # All threads: the mbarrier is there.
        cuda.syncthreads()
        ptx.cp_async_16(base + u32(16 * thread), x + u64(16 * thread))
        ptx.cp_async_mbarrier_arrive_noinc(mbar)
        ptx.mbarrier_wait_parity(mbar, u32(0))
        ptx.ld_shared_v4_b32(quad_rmem, 0, base + u32(16 * ((thread + 1) % num_threads)))
        ptx.st_global_v4_b32(out + u64(16 * thread), quad_rmem[0], quad_rmem[1], quad_rmem[2], quad_rmem[3])

    return kernel


# TMA.


def make_tma_load(boxes, expect_apart):
    """Boxes of [64, 64] at the coordinates given, over shared memory full of ones; `held`: whether the phase was complete before."""
    num_boxes = len(boxes)
    num_bytes = num_boxes * TILE_BYTES

    def kernel(out, held, tensor_map):
        thread = i32(cuda.threadIdx.x)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        mbar = base + u32(num_bytes)
        quad_rmem = cuda.local.array(4, types.uint32)
        if thread == 0:
            ptx.prefetch_tensormap(tensor_map)
            ptx.mbarrier_init(mbar, u32(1))
            ptx.fence_mbarrier_init()
        for at in range(16 * thread, num_bytes, 16 * i32(cuda.blockDim.x)):
            ptx.st_shared_v4_b32(base + u32(at), u32(ALL_BITS), u32(ALL_BITS), u32(ALL_BITS), u32(ALL_BITS))
        ptx.fence_proxy_async_shared()
        # All threads: the mbarrier and the ones are there.
        cuda.syncthreads()
        if thread == 0:
            ptx.fence_proxy_tensormap_acquire(tensor_map)
            if expect_apart:
                ptx.mbarrier_expect_tx(mbar, u32(num_bytes))
                ptx.mbarrier_arrive(mbar)
            else:
                ptx.mbarrier_arrive_expect_tx(mbar, u32(num_bytes))
            ptx.st_global_b32(held, ptx.mbarrier_test_wait_parity(mbar, u32(0)))
            for box in range(num_boxes):
                x, y, z, w = boxes[box]
                ptx.tma_prefetch_4d(tensor_map, i32(x), i32(y), i32(z), i32(w), u64(ptx.EVICT_NORMAL))
                ptx.tma_load_4d(base + u32(box * TILE_BYTES), tensor_map, mbar, i32(x), i32(y), i32(z), i32(w), u64(ptx.EVICT_FIRST))
        # Thread 0 arrived, all bytes came.
        ptx.mbarrier_wait_parity(mbar, u32(0))
        for at in range(16 * thread, num_bytes, 16 * i32(cuda.blockDim.x)):
            ptx.ld_shared_v4_b32(quad_rmem, 0, base + u32(at))
            ptx.st_global_v4_b32(out + u64(at), quad_rmem[0], quad_rmem[1], quad_rmem[2], quad_rmem[3])

    return kernel


def make_tma_load_5d(boxes, num_tiles, parameter):
    """Boxes of [num_tiles, 64, 64] at the coordinates given: tiles of one z side by side along x, which are an axis of their own. If the
    tensor map begins at parameter `parameter`, that is what is used, without a fence."""
    num_boxes = len(boxes)
    box_bytes = num_tiles * TILE_BYTES
    num_bytes = num_boxes * box_bytes
    map_address = None if parameter is None else ptx.make_parameter_address(parameter)

    def kernel(tensor_map, out):
        thread = i32(cuda.threadIdx.x)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        mbar = base + u32(num_bytes)
        quad_rmem = cuda.local.array(4, types.uint32)
        if thread == 0:
            ptx.mbarrier_init(mbar, u32(1))
            ptx.fence_mbarrier_init()
        # All threads: the mbarrier is there.
        cuda.syncthreads()
        if thread == 0:
            if parameter is None:
                at_map = tensor_map
                ptx.fence_proxy_tensormap_acquire(at_map)
            else:
                at_map = map_address()
            ptx.mbarrier_arrive_expect_tx(mbar, u32(num_bytes))
            for box in range(num_boxes):
                x, y, z, w, v = boxes[box]
                ptx.tma_load_5d(base + u32(box * box_bytes), at_map, mbar, i32(x), i32(y), i32(z), i32(w), i32(v), u64(ptx.EVICT_FIRST))
        # Thread 0 arrived, all bytes came.
        ptx.mbarrier_wait_parity(mbar, u32(0))
        for at in range(16 * thread, num_bytes, 16 * i32(cuda.blockDim.x)):
            ptx.ld_shared_v4_b32(quad_rmem, 0, base + u32(at))
            ptx.st_global_v4_b32(out + u64(at), quad_rmem[0], quad_rmem[1], quad_rmem[2], quad_rmem[3])

    return kernel


def make_tma_multicast(cluster_size):
    """Each block of cluster w loads its share of the rows of page w for all of them."""
    share_bytes = TILE_BYTES // cluster_size
    share_rows = share_bytes // 128

    def kernel(out, tensor_map):
        thread, block = i32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        mbar = base + u32(TILE_BYTES)
        quad_rmem = cuda.local.array(4, types.uint32)
        if thread == 0:
            ptx.mbarrier_init(mbar, u32(1))
            ptx.fence_mbarrier_init()
        # All threads of the cluster: its mbarriers are there.
        ptx.barrier_cluster_arrive()
        ptx.barrier_cluster_wait()
        if thread == 0:
            ptx.fence_proxy_tensormap_acquire(tensor_map)
            ptx.mbarrier_arrive_expect_tx(mbar, u32(TILE_BYTES))
            rank = i32(ptx.cluster_ctarank())
            ptx.tma_load_4d_multicast(base + u32(rank * share_bytes), tensor_map, mbar, i32(64), i32(rank * share_rows), i32(1),
                                      i32(block // cluster_size), u16((1 << cluster_size) - 1), u64(ptx.EVICT_LAST))
        # Thread 0 arrived, all bytes came, from all blocks.
        ptx.mbarrier_wait_parity_cluster(mbar, u32(0))
        for at in range(16 * thread, TILE_BYTES, 16 * i32(cuda.blockDim.x)):
            ptx.ld_shared_v4_b32(quad_rmem, 0, base + u32(at))
            ptx.st_global_v4_b32(out + u64(block * TILE_BYTES + at), quad_rmem[0], quad_rmem[1], quad_rmem[2], quad_rmem[3])
        # All threads of the cluster: none is written to any more.
        ptx.barrier_cluster_arrive()
        ptx.barrier_cluster_wait()

    return kernel


def make_tma_multicast_turns(num_pages, num_threads):
    """A ring of one place in each of two blocks: each loads half of the rows of every page's first tile for both, when all threads of both
    have read the page before."""
    share_bytes = TILE_BYTES // 2
    share_rows = share_bytes // 128

    def kernel(out, tensor_map):
        thread, rank = i32(cuda.threadIdx.x), ptx.cluster_ctarank()
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        full, empty = base + u32(TILE_BYTES), base + u32(TILE_BYTES + 8)
        quad_rmem = cuda.local.array(4, types.uint32)
        if thread == 0:
            ptx.mbarrier_init(full, u32(1))
            ptx.mbarrier_init(empty, u32(2 * num_threads))
            ptx.fence_mbarrier_init()
        cuda.syncwarp()
        ptx.barrier_cluster_arrive_relaxed()
        # All threads of this block: its mbarriers are there.
        cuda.syncthreads()
        # All threads of both blocks: the other one's mbarriers are there.
        ptx.barrier_cluster_wait()
        if thread == 0:
            ptx.fence_proxy_tensormap_acquire(tensor_map)
        for page in range(num_pages):
            if thread == 0:
                # All threads of both blocks arrived; the first page does not wait.
                ptx.mbarrier_wait_parity(empty, u32(page & 1) ^ u32(1))
                ptx.mbarrier_arrive_expect_tx(full, u32(TILE_BYTES))
                ptx.tma_load_5d_multicast(base + rank * u32(share_bytes), tensor_map, full, i32(0), i32(rank * u32(share_rows)), i32(0),
                                          i32(1), i32(page), u16(3), u64(ptx.EVICT_NORMAL))
            cuda.syncwarp()
            # Thread 0 arrived, all bytes came, from both blocks.
            ptx.mbarrier_wait_parity(full, u32(page & 1))
            for at in range(16 * thread, TILE_BYTES, 16 * num_threads):
                ptx.ld_shared_v4_b32(quad_rmem, 0, base + u32(at))
                ptx.st_global_v4_b32(out + u64((i32(cuda.blockIdx.x) * num_pages + page) * TILE_BYTES + at), quad_rmem[0], quad_rmem[1],
                                     quad_rmem[2], quad_rmem[3])
            ptx.mbarrier_arrive(empty)
            ptx.mbarrier_arrive_remote(ptx.mapa_shared_cluster(empty, rank ^ u32(1)))
        # All threads of both blocks: nobody loads into the other one, or arrives there, any more.
        ptx.barrier_cluster_arrive_relaxed()
        ptx.barrier_cluster_wait()

    return kernel


def make_tma_store(boxes, fence_name):
    """Boxes of [64, 64] to the coordinates given, all from the same shared memory, each written when the one before has been read."""
    fence = getattr(ptx, fence_name)
    num_boxes = len(boxes)
    wait_read, wait_written = ptx.make_cp_async_bulk_wait_group(0, read=True), ptx.make_cp_async_bulk_wait_group(0)

    def kernel(tensor_map, tiles):
        thread = i32(cuda.threadIdx.x)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        if thread == 0:
            ptx.fence_proxy_tensormap_acquire(tensor_map)
        for box in range(num_boxes):
            for at in range(4 * thread, TILE_BYTES, 4 * i32(cuda.blockDim.x)):
                ptx.st_shared_i32(base + u32(at), ptx.ld_global_i32(tiles + u64(box * TILE_BYTES + at)))
            fence()
            # All threads: the box is there.
            cuda.syncthreads()
            if thread == 0:
                x, y, z, w = boxes[box]
                ptx.tma_store_4d(base, tensor_map, i32(x), i32(y), i32(z), i32(w))
                ptx.cp_async_bulk_commit_group()
                wait_read()
            # All threads: the box has been read.
            cuda.syncthreads()
        if thread == 0:
            wait_written()

    return kernel


def make_policy(priority):
    create = ptx.make_createpolicy(priority)

    def kernel(out):
        policy = create()
        if cuda.threadIdx.x == 0:
            ptx.st_global_b32(out, u32(policy))
            ptx.st_global_b32(out + u64(4), u32(policy >> u64(32)))

    return kernel


# Clusters.


def make_cluster_neighbours(cluster_size):
    """Every thread reads what the thread of its number wrote in the next block of its cluster."""
    def kernel(ranks, words, floats, x):
        thread = i32(cuda.threadIdx.x)
        at = u64(4 * (i32(cuda.blockIdx.x) * i32(cuda.blockDim.x) + thread))
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        own = base + u32(4 * thread)
        ptx.st_shared_i32(own, ptx.ld_global_i32(x + at))
        rank = ptx.cluster_ctarank()
        # All threads of the cluster: their words are there.
        ptx.barrier_cluster_arrive()
        ptx.barrier_cluster_wait()
        theirs = ptx.mapa_shared_cluster(own, (rank + u32(1)) % u32(cluster_size))
        ptx.st_global_b32(ranks + at, rank)
        ptx.st_global_b32(words + at, ptx.ld_shared_cluster_b32(theirs))
        ptx.st_global_f32(floats + at, ptx.ld_shared_cluster_f32(theirs))
        # All threads of the cluster: nobody reads any more.
        ptx.barrier_cluster_arrive()
        ptx.barrier_cluster_wait()

    return kernel


def make_cluster_store(num_threads, cluster_size):
    """Every thread stores in the next block of its cluster, which waits for all the bytes at its mbarrier."""
    def kernel(out, x):
        thread = i32(cuda.threadIdx.x)
        at = u64(4 * (i32(cuda.blockIdx.x) * num_threads + thread))
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        own, mbar = base + u32(4 * thread), base + u32(4 * num_threads)
        if thread == 0:
            ptx.mbarrier_init(mbar, u32(1))
            ptx.fence_mbarrier_init()
            ptx.mbarrier_arrive_expect_tx(mbar, u32(4 * num_threads))
        # All threads of the cluster: its mbarriers are there.
        ptx.barrier_cluster_arrive()
        ptx.barrier_cluster_wait()
        peer = (ptx.cluster_ctarank() + u32(1)) % u32(cluster_size)
        ptx.st_async_b32(ptx.mapa_shared_cluster(own, peer), u32(ptx.ld_global_i32(x + at)), ptx.mapa_shared_cluster(mbar, peer))
        ptx.mbarrier_wait_parity_cluster(mbar, u32(0))
        ptx.st_global_b32(out + at, u32(ptx.ld_shared_i32(own)))
        # All threads of the cluster: none is written to any more.
        ptx.barrier_cluster_arrive()
        ptx.barrier_cluster_wait()

    return kernel


def make_cluster_arrivals(num_threads):
    """Every thread of block 1 writes in its block and arrives at the mbarrier of block 0, whose threads then read it."""
    def kernel(out, x):
        thread, rank = i32(cuda.threadIdx.x), ptx.cluster_ctarank()
        at = u64(4 * thread)
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        own, mbar = base + u32(4 * thread), base + u32(4 * num_threads)
        if thread == 0 and rank == u32(0):
            ptx.mbarrier_init(mbar, u32(num_threads))
            ptx.fence_mbarrier_init()
        # All threads of the cluster: the mbarrier is there.
        ptx.barrier_cluster_arrive()
        ptx.barrier_cluster_wait()
        if rank == u32(1):
            ptx.st_shared_i32(own, ptx.ld_global_i32(x + at))
            ptx.mbarrier_arrive_cluster(ptx.mapa_shared_cluster(mbar, u32(0)))
        else:
            # All threads of block 1 arrived.
            ptx.mbarrier_wait_parity_cluster(mbar, u32(0))
            neighbour = base + u32(4 * ((thread + 1) % num_threads))
            ptx.st_global_b32(out + at, ptx.ld_shared_cluster_b32(ptx.mapa_shared_cluster(neighbour, u32(1))))
        # All threads of the cluster: nobody reads any more.
        ptx.barrier_cluster_arrive()
        ptx.barrier_cluster_wait()

    return kernel


def make_cluster_message():
    """Block 0 writes in its shared memory and raises a flag in global memory; block 1 reads when it has seen it."""
    def kernel(out, flag, x):
        lane, rank = i32(cuda.threadIdx.x), ptx.cluster_ctarank()
        at = u64(4 * lane)
        own = ((ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)) + u32(4 * lane)
        if rank == u32(0):
            ptx.st_shared_i32(own, ptx.ld_global_i32(x + at))
            cuda.syncwarp()
            if lane == 0:
                ptx.fence_acq_rel_cluster()
                ptx.st_relaxed(flag, u32(1))
        else:
            if lane == 0:
                while ptx.ld_acquire(flag) == u32(0):
                    pass
            cuda.syncwarp()
            ptx.st_global_b32(out + at, ptx.ld_shared_cluster_b32(ptx.mapa_shared_cluster(own, u32(0))))
        # All threads of the cluster: nobody reads any more.
        ptx.barrier_cluster_arrive()
        ptx.barrier_cluster_wait()

    return kernel


# The grid, and the registers of warpgroups.


def make_dependent_grids():
    """Launched twice, programmatically: the second grid works on what the first has left."""
    def kernel(values):
        at = values + u64(4 * (i32(cuda.blockIdx.x) * i32(cuda.blockDim.x) + i32(cuda.threadIdx.x)))
        ptx.griddepcontrol_launch_dependents()
        ptx.griddepcontrol_wait()
        ptx.st_global_f32(at, ptx.ld_global_f32(at) * np.float32(3) + np.float32(1))

    return kernel


def make_register_moves(less, more):
    """Warpgroup 0 gives registers to the others; every thread adds the number of its warpgroup."""
    give, take = ptx.make_setmaxnreg("dec", less), ptx.make_setmaxnreg("inc", more)

    def kernel(out, x):
        thread = i32(cuda.threadIdx.x)
        at = u64(4 * thread)
        if thread < 128:
            give()
            ptx.st_global_b32(out + at, u32(ptx.ld_global_i32(x + at)))
        else:
            take()
            ptx.st_global_b32(out + at, u32(ptx.ld_global_i32(x + at) + (thread >> 7)))

    return kernel


# The tensor core.


def make_product(n, dtype, a_in_registers, b_transposed, a_transposed):
    """D (64 x n) = A (64 x 64) B (64 x n), A and B from swizzled tiles."""
    wgmma, wait = ptx.make_wgmma(n, dtype, a_in_registers, b_transposed, a_transposed), ptx.make_wgmma_wait_group(0)
    copied, d_fence, a_fence = ptx.make_cp_async_wait_group(0), ptx.make_registers_fence(n // 2), ptx.make_registers_fence(16, types.uint32)
    a_form = ptx.matrix_descriptor(1024)
    b_form = ptx.matrix_descriptor(1024, TILE_BYTES) if b_transposed else a_form
    # 16 of K further on, in descriptors' units of 16 bytes: 16 rows, or 16 columns.
    a_step, b_step = (16 * 128 // 16 if transposed else 16 * 2 // 16 for transposed in (a_transposed, b_transposed))
    b_bytes, count = 128 * (max(n, 64) if b_transposed else n), n // 2

    def kernel(out, a, b):
        thread = i32(cuda.threadIdx.x)
        lane = thread & 31
        base = (ptx.smem_address(cuda.shared.array(0, types.uint8)) + u32(1023)) & u32(0xFFFFFC00)
        b_smem = base + u32(TILE_BYTES)
        d_rmem, a_rmem = cuda.local.array(count, types.float32), cuda.local.array(16, types.uint32)
        for at in range(16 * thread, TILE_BYTES, 16 * 128):
            ptx.cp_async_16(base + u32(at), a + u64(at))
        for at in range(16 * thread, b_bytes, 16 * 128):
            ptx.cp_async_16(b_smem + u32(at), b + u64(at))
        ptx.cp_async_commit_group()
        copied()
        ptx.fence_proxy_async_shared()
        # All threads: A and B are there.
        cuda.syncthreads()
        a_desc, b_desc = u64(a_form) | u64(base >> u32(4)), u64(b_form) | u64(b_smem >> u32(4))
        if a_in_registers:
            row = (thread >> 5) * 16 + (lane & 15)
            for k in range(4):
                ptx.ldmatrix_x4(a_rmem, 4 * k, base + u32(128 * row + 16 * ((2 * k + (lane >> 4)) ^ (row & 7))))
        ptx.wgmma_fence()
        for k in range(4):
            if a_in_registers:
                wgmma(d_rmem, a_rmem, 4 * k, b_desc + u64(b_step * k), u32(1) if k > 0 else u32(0))
            else:
                wgmma(d_rmem, a_desc + u64(a_step * k), b_desc + u64(b_step * k), u32(1) if k > 0 else u32(0))
        ptx.wgmma_commit_group()
        wait()
        d_fence(d_rmem)
        if a_in_registers:
            a_fence(a_rmem)
        own = out + u64(4 * (((thread >> 5) * 16 + (lane >> 2)) * n + 2 * (lane & 3)))
        for i in range(count // 4):
            for half in range(2):
                at = own + u64(32 * (i + half * n))
                ptx.st_global_f32(at, d_rmem[4 * i + 2 * half])
                ptx.st_global_f32(at + u64(4), d_rmem[4 * i + 2 * half + 1])

    return kernel
