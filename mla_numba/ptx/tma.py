"""The tensor memory accelerator: boxes of a tensor, from global memory to shared memory, behind an mbarrier."""

from .instruction import i32, instruction, u32, u64

# createpolicy encodings for L2, as CUTLASS's TMA::CacheHintSm90 lists them: leave first, stay.
EVICT_FIRST = 0x12F0000000000000
EVICT_LAST = 0x14F0000000000000


@instruction("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
             "[<dst_smem>], [<tensor_map>, {<x>, <y>, <z>, <w>}], [<mbar_smem>], <l2_policy>;")
def tma_load_4d(dst_smem: u32, tensor_map: u64, mbar_smem: u32, x: i32, y: i32, z: i32, w: i32, l2_policy: u64) -> None:
    """`cp.async.bulk.tensor.4d`: by one thread; loads the box at (x, y, z, w), innermost first; what lies outside of the tensor reads
    as zeros. Its bytes are counted down at the mbarrier as they arrive. PTX ISA 9.7.9.27.1.2."""


@instruction("prefetch.tensormap [<tensor_map>];")
def prefetch_tensormap(tensor_map: u64) -> None:
    """`prefetch.tensormap`: by one thread; brings the tensor map's 128 bytes near. Orders nothing. PTX ISA 9.7.9.15."""
