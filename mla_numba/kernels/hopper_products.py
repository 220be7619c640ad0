"""The consumers' products: S = Q K^T and O += P V by wgmma, how Q and P get to where the tensor core reads them, and how K's buffers are
given back."""

from types import SimpleNamespace

import numpy as np
from numba.cuda import types

from .. import ptx
from .hopper_config import (
    ATOM_BYTES,
    EMPTY_SMEM,
    FULL_SMEM,
    K0_SMEM,
    K1_SMEM,
    K_STEPS,
    LEFT_TILES,
    P1_SMEM,
    Q_SMEM,
    SIDE_BEGIN,
    TILE_BYTES,
    HopperConfig,
    inline,
)

u32, u64 = np.uint32, np.uint64

# In a descriptor addresses count 16 bytes. The next tile of Q; the next 16 columns of a K-major row.
NEXT_TILE, NEXT_COLUMNS = TILE_BYTES >> 4, 32 >> 4


def make_products(config: HopperConfig) -> SimpleNamespace:
    """The functions below, by name, and the forms of the descriptors that they make."""
    wgmma_qk = ptx.make_wgmma(64, config.dtype)
    wgmma_qk_rmem = ptx.make_wgmma(64, config.dtype, a_in_registers=True)
    wgmma_pv = ptx.make_wgmma(256, config.dtype, b_transposed=True)
    wgmma_pv_rmem = ptx.make_wgmma(256, config.dtype, a_in_registers=True, b_transposed=True)
    wait_all, wait_all_but_1 = ptx.make_wgmma_wait_group(0), ptx.make_wgmma_wait_group(1)
    o_fence, s_fence, p_fence = ptx.make_registers_fence(128), ptx.make_registers_fence(32), ptx.make_registers_fence(16, types.uint32)
    CLUSTER_SIZE = config.cluster_size
    # Of Q and P; of a side of a block as K and as V, whose next tile and next 16 rows are so far away.
    K_MAJOR = u64(ptx.matrix_descriptor(ATOM_BYTES))
    SIDE_K_MAJOR = tuple(u64(ptx.matrix_descriptor(config.next_atom_bytes(side))) for side in range(2))
    SIDE_MN_MAJOR = tuple(u64(ptx.matrix_descriptor(config.next_atom_bytes(side), config.next_tile_bytes)) for side in range(2))
    NEXT_K_TILE, NEXT_ROWS = config.next_tile_bytes >> 4, tuple(2 * config.next_atom_bytes(side) >> 4 for side in range(2))

    @inline
    def descriptor(form, address):
        """Of a matrix in shared memory. In a cluster bits 24 and up of an address are the block's number, which a descriptor has no place
        for: there they would change the distance between V's columns."""
        if CLUSTER_SIZE > 1:
            address = u32(address & u32(0x3FFFF))
        return form | u64(u32(address) >> u32(4))

    @inline
    def matrix_row(tile_smem, k, at):
        """The row of 16 bytes that this lane gives ldmatrix or stmatrix for columns 16 k to 16 k + 15 of its warp's rows."""
        row = (at.thread >> u32(5)) * u32(16) + (at.lane & u32(15))
        chunk = u32(2 * k) + (at.lane >> u32(4))
        return tile_smem + row * u32(128) + ((chunk ^ (row & u32(7))) << u32(4))

    @inline
    def load_q8(q8_rmem, at):
        """Q's last tile to registers, as wgmma's A; its place becomes P1's."""
        for k in range(K_STEPS):
            ptx.ldmatrix_x4(q8_rmem, 4 * k, matrix_row(at.base + u32(P1_SMEM), k, at))

    @inline
    def store_p(p_rmem, p_smem, at):
        """P to shared memory in the swizzled layout; each warp its own 16 rows."""
        for k in range(K_STEPS):
            ptx.stmatrix_x4(matrix_row(p_smem, k, at), p_rmem[4 * k], p_rmem[4 * k + 1], p_rmem[4 * k + 2], p_rmem[4 * k + 3])
        # Before the barrier after which the other warpgroup's wgmma reads it.
        ptx.fence_proxy_async_shared()

    @inline
    def qk_side(regs, base, buffer, side, parity, accumulate):
        """S (+)= Q K^T over the dims of one side of a block; of the last tile Q comes from registers. A group."""
        k_smem = base + u32(K1_SMEM if buffer else K0_SMEM)
        # Producer's TMA of this side; bit 0 of `parity` is of the buffer's use.
        ptx.mbarrier_wait_parity(base + u32(FULL_SMEM + (buffer * 2 + side) * 8), parity & u32(1))
        q_desc = descriptor(K_MAJOR, base + u32(Q_SMEM))
        k_desc = descriptor(SIDE_K_MAJOR[side], k_smem)
        ptx.wgmma_fence()
        first = SIDE_BEGIN[side] * NEXT_TILE
        for tile in range(LEFT_TILES):
            for k in range(K_STEPS):
                wgmma_qk(regs.s_rmem, q_desc + u64(first + tile * NEXT_TILE + k * NEXT_COLUMNS),
                         k_desc + u64(first + tile * NEXT_K_TILE + k * NEXT_COLUMNS), u32(1) if tile > 0 or k > 0 else u32(accumulate))
        if side == 1:
            for k in range(K_STEPS):
                wgmma_qk_rmem(regs.s_rmem, regs.q8_rmem, 4 * k, k_desc + u64(first + LEFT_TILES * NEXT_K_TILE + k * NEXT_COLUMNS), u32(1))
        ptx.wgmma_commit_group()

    @inline
    def ask_qk(regs, base, buffer, parity):
        """Ask the tensor core for S of a block, its sides in the order in which they come."""
        s_fence(regs.s_rmem)
        qk_side(regs, base, buffer, 1 if buffer else 0, parity, False)
        qk_side(regs, base, buffer, 0 if buffer else 1, parity, True)

    @inline
    def await_qk(regs):
        """Until S, and whatever else is in flight, is there."""
        wait_all()
        s_fence(regs.s_rmem)

    @inline
    def qk_block(regs, base, buffer, parity):
        """S of a block."""
        ask_qk(regs, base, buffer, parity)
        await_qk(regs)

    @inline
    def pv_rmem(o_rmem, p_rmem, v_smem, side, accumulate):
        """O (+)= P V of a side's columns, P from registers."""
        v_desc = descriptor(SIDE_MN_MAJOR[side], v_smem)
        ptx.wgmma_fence()
        for k in range(K_STEPS):
            wgmma_pv_rmem(o_rmem, p_rmem, 4 * k, v_desc + u64(k * NEXT_ROWS[side]), u32(1) if k > 0 else u32(accumulate))
        ptx.wgmma_commit_group()

    @inline
    def pv_smem(o_rmem, p_smem, v_smem, side, accumulate):
        """O (+)= P V of a side's columns, P from shared memory: the other warpgroup's."""
        p_desc = descriptor(K_MAJOR, p_smem)
        v_desc = descriptor(SIDE_MN_MAJOR[side], v_smem)
        ptx.wgmma_fence()
        for k in range(K_STEPS):
            wgmma_pv(o_rmem, p_desc + u64(k * NEXT_COLUMNS), v_desc + u64(k * NEXT_ROWS[side]),
                     u32(1) if k > 0 else u32(accumulate))
        ptx.wgmma_commit_group()

    @inline
    def release(base, buffer, side, lane):
        """This warp is done with one side of a K buffer. 4 warps of each block that shares it make the phase, the producers wait."""
        if lane == 0:
            mbar = base + u32(EMPTY_SMEM + (buffer * 2 + side) * 8)
            ptx.mbarrier_arrive(mbar)
            if CLUSTER_SIZE > 1:
                ptx.mbarrier_arrive_remote(ptx.mapa_shared_cluster(mbar, ptx.cluster_ctarank() ^ u32(1)))

    @inline
    def add_own_pv(regs, base, v_smem, wg, lane, accumulate):
        """O (+)= P V of the block in this warpgroup's own buffer, whose side of V is free then."""
        o_fence(regs.o_rmem)
        p_fence(regs.p_rmem)
        pv_rmem(regs.o_rmem, regs.p_rmem, v_smem, wg, accumulate)
        wait_all()
        o_fence(regs.o_rmem)
        p_fence(regs.p_rmem)
        release(base, wg, wg, lane)

    @inline
    def add_other_pv(regs, base, p_smem, v_smem, wg, lane, accumulate):
        """O (+)= P V of the block in the other warpgroup's buffer, the same."""
        o_fence(regs.o_rmem)
        pv_smem(regs.o_rmem, p_smem, v_smem, wg, accumulate)
        wait_all()
        o_fence(regs.o_rmem)
        release(base, 1 - wg, wg, lane)

    return SimpleNamespace(load_q8=load_q8, store_p=store_p, qk_side=qk_side, ask_qk=ask_qk, await_qk=await_qk, qk_block=qk_block,
                           pv_smem=pv_smem, add_own_pv=add_own_pv, add_other_pv=add_other_pv, release=release, wait_all=wait_all,
                           wait_all_but_1=wait_all_but_1, o_fence=o_fence, s_fence=s_fence, descriptor=descriptor, K_MAJOR=K_MAJOR,
                           SIDE_K_MAJOR=SIDE_K_MAJOR, SIDE_MN_MAJOR=SIDE_MN_MAJOR, NEXT_K_TILE=NEXT_K_TILE, NEXT_ROWS=NEXT_ROWS)
