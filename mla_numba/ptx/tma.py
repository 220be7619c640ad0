"""The tensor memory accelerator: boxes of a tensor between global and shared memory. Each instruction is one thread's."""

from functools import cache
from typing import Any

from .instruction import i32, instruction, u16, u32, u64

# L2 policies as `createpolicy.fractional` makes them for all accesses: leave first, stay, neither.
EVICT_FIRST = 0x12F0000000000000
EVICT_LAST = 0x14F0000000000000
EVICT_NORMAL = 0x16F0000000000000


@cache
def make_createpolicy(priority: str, fraction: float = 1.0) -> Any:
    """The intrinsic for `priority` "evict_first", "evict_last" or "evict_normal" of a fraction (0 to 1) of the accesses; the others
    leave a line's priority as it is."""
    @instruction(f"createpolicy.fractional.L2::{priority}.b64 <result>, {fraction};", pure=True)
    def createpolicy() -> u64:
        """`createpolicy.fractional`: an L2 policy. PTX ISA 9.7.9.18."""

    return createpolicy


@instruction("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
             "[<dst_smem>], [<tensor_map>, {<x>, <y>, <z>, <w>}], [<mbar_smem>], <l2_policy>;")
def tma_load_4d(dst_smem: u32, tensor_map: u64, mbar_smem: u32, x: i32, y: i32, z: i32, w: i32, l2_policy: u64) -> None:
    """`cp.async.bulk.tensor.4d`: by one thread; loads the box at (x, y, z, w), innermost first; what lies outside of the tensor reads
    as zeros. Its bytes are counted down at the mbarrier as they arrive. PTX ISA 9.7.9.27.1.2."""


@instruction("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
             "[<dst_smem>], [<tensor_map>, {<x>, <y>, <z>, <w>, <v>}], [<mbar_smem>], <l2_policy>;")
def tma_load_5d(dst_smem: u32, tensor_map: u64, mbar_smem: u32, x: i32, y: i32, z: i32, w: i32, v: i32, l2_policy: u64) -> None:
    """`cp.async.bulk.tensor.5d`: by one thread; `tma_load_4d` with five axes. PTX ISA 9.7.9.27.1.2."""


@instruction("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
             "[<dst_smem>], [<tensor_map>, {<x>, <y>, <z>, <w>}], [<mbar_smem>], <cta_mask>, <l2_policy>;")
def tma_load_4d_multicast(dst_smem: u32, tensor_map: u64, mbar_smem: u32, x: i32, y: i32, z: i32, w: i32, cta_mask: u16,
                          l2_policy: u64) -> None:
    """`cp.async.bulk.tensor.4d.multicast::cluster`: by one thread; `tma_load_4d` to the same place, with the same mbarrier, in each
    block of the cluster whose bit is set in `cta_mask`. PTX ISA 9.7.9.27.1.2."""


@instruction("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
             "[<dst_smem>], [<tensor_map>, {<x>, <y>, <z>, <w>, <v>}], [<mbar_smem>], <cta_mask>, <l2_policy>;")
def tma_load_5d_multicast(dst_smem: u32, tensor_map: u64, mbar_smem: u32, x: i32, y: i32, z: i32, w: i32, v: i32, cta_mask: u16,
                          l2_policy: u64) -> None:
    """`cp.async.bulk.tensor.5d.multicast::cluster`: by one thread; `tma_load_4d_multicast` with five axes. PTX ISA 9.7.9.27.1.2."""


@instruction("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [<tensor_map>, {<x>, <y>, <z>, <w>}], [<src_smem>];")
def tma_store_4d(src_smem: u32, tensor_map: u64, x: i32, y: i32, z: i32, w: i32) -> None:
    """`cp.async.bulk.tensor.4d` to global memory: by one thread, after `fence_proxy_async_shared` and a barrier of those who wrote the
    box; what lies past the tensor's end is not written. Done when its group is. Coordinates from 0: with negative ones an H100 says
    CUDA_ERROR_ILLEGAL_INSTRUCTION. PTX ISA 9.7.9.27.1.2."""


@instruction("cp.async.bulk.prefetch.tensor.4d.L2.global.L2::cache_hint [<tensor_map>, {<x>, <y>, <z>, <w>}], <l2_policy>;")
def tma_prefetch_4d(tensor_map: u64, x: i32, y: i32, z: i32, w: i32, l2_policy: u64) -> None:
    """`cp.async.bulk.prefetch.tensor.4d`: by one thread; brings a box to L2. Orders nothing. PTX ISA 9.7.9.27.1.4."""


@instruction("cp.async.bulk.commit_group;")
def cp_async_bulk_commit_group() -> None:
    """`cp.async.bulk.commit_group`: by one thread; the stores that it began since the last commit become a group. PTX ISA 9.7.9.27.2.1."""


@cache
def make_cp_async_bulk_wait_group(pending: int, read: bool = False) -> Any:
    """The intrinsic that waits until at most `pending` of this thread's youngest groups of stores are unfinished; with `read`, until
    the others have read their shared memory, which may then be written again."""
    @instruction(f"cp.async.bulk.wait_group{'.read' * read} {pending};")
    def cp_async_bulk_wait_group() -> None:
        """`cp.async.bulk.wait_group`: by the thread that committed; without `.read` it then sees what was stored. PTX ISA 9.7.9.27.2.2."""

    return cp_async_bulk_wait_group


@instruction("prefetch.tensormap [<tensor_map>];")
def prefetch_tensormap(tensor_map: u64) -> None:
    """`prefetch.tensormap`: by one thread; brings the tensor map's 128 bytes near. Orders nothing. PTX ISA 9.7.9.15."""
