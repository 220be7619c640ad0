"""Asynchronous copies of 16 bytes by each thread, from global to shared memory, past the registers."""

from functools import cache
from typing import Any

from .instruction import instruction, u32, u64


@instruction("cp.async.cg.shared::cta.global [<dst_smem>], [<src>], 16;")
def cp_async_16(dst_smem: u32, src: u64) -> None:
    """`cp.async.cg`: by one thread; begins to copy 16 bytes, through L2 alone, between addresses that are multiples of 16. Done only
    for who waits for its group, or at an mbarrier. PTX ISA 9.7.9.25.3.1."""


@instruction("cp.async.cg.shared::cta.global [<dst_smem>], [<src>], 16, <num_bytes>;")
def cp_async_16_zfill(dst_smem: u32, src: u64, num_bytes: u32) -> None:
    """`cp.async.cg` with a source size: as `cp_async_16`, but only the first `num_bytes` (at most 16) are read, the others written as
    zeros. PTX ISA 9.7.9.25.3.1."""


@instruction("cp.async.commit_group;")
def cp_async_commit_group() -> None:
    """`cp.async.commit_group`: by one thread; what it began to copy since the last commit becomes a group. PTX ISA 9.7.9.25.3.2."""


@cache
def make_cp_async_wait_group(pending: int) -> Any:
    """The intrinsic that waits until at most `pending` of this thread's youngest groups are unfinished."""
    @instruction(f"cp.async.wait_group {pending};")
    def cp_async_wait_group() -> None:
        """`cp.async.wait_group`: by one thread, which then sees what its finished groups copied; others do after a barrier. PTX ISA
        9.7.9.25.3.3."""

    return cp_async_wait_group


@instruction("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [<mbar_smem>];")
def cp_async_mbarrier_arrive_noinc(mbar_smem: u32) -> None:
    """`cp.async.mbarrier.arrive.noinc`: by one thread; one arrival, of those that `mbarrier_init` counts, once all that this thread
    began to copy is there. PTX ISA 9.7.13.15.15."""
