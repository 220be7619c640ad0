"""Hopper's instructions as Numba intrinsics: one per PTX instruction, named after it. The only folder that knows LLVM.

Addresses in shared memory are 32-bit integers, in global memory 64-bit ones; arrays in registers are `cuda.local.array`s that are
indexed by constants alone. Sections are those of the PTX ISA, version 9.0.
"""

from .arithmetic import cvt_bf16x2, cvt_f16x2, ex2, fma_rn, mul_rn
from .barriers import (
    bar_arrive,
    bar_sync,
    fence_acq_rel_gpu,
    fence_mbarrier_init,
    fence_proxy_async_shared,
    fence_proxy_tensormap_acquire,
    mbarrier_arrive,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
)
from .control import griddepcontrol_launch_dependents, griddepcontrol_wait, make_setmaxnreg
from .memory import (
    atom_add_acq_rel,
    ld_acquire,
    ld_global_f32,
    ld_global_i32,
    ld_global_v4_f32,
    ld_shared_f32,
    ld_shared_i32,
    ld_shared_v4_b32,
    ldmatrix_x4,
    make_registers_fence,
    opaque_b32,
    smem_address,
    st_global_b32,
    st_global_f32,
    st_global_v4_b32,
    st_global_v4_f32,
    st_relaxed,
    st_shared_f32,
    st_shared_i32,
    st_shared_v4_b32,
    stmatrix_x4,
)
from .mma import DESCRIPTOR_K_MAJOR, DESCRIPTOR_MN_MAJOR, make_wgmma, make_wgmma_wait_group, wgmma_commit_group, wgmma_fence
from .tma import EVICT_FIRST, EVICT_LAST, prefetch_tensormap, tma_load_4d

__all__ = [name for name in dir() if not name.startswith("_")]
