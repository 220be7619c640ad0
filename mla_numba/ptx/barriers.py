"""Barriers and fences: mbarriers, named barriers, and the fences between the generic and the asynchronous proxy."""

from .instruction import instruction, u32, u64


@instruction("mbarrier.init.shared::cta.b64 [<mbar_smem>], <count>;")
def mbarrier_init(mbar_smem: u32, count: u32) -> None:
    """`mbarrier.init`: by one thread, once; `count` arrivals complete a phase. Seen by the async proxy after
    `fence_mbarrier_init`, by other threads after a barrier. PTX ISA 9.7.13.15.9."""


@instruction("mbarrier.inval.shared::cta.b64 [<mbar_smem>];")
def mbarrier_inval(mbar_smem: u32) -> None:
    """`mbarrier.inval`: by one thread, when nobody waits or arrives any more; its 8 bytes may then be used for something else. PTX ISA
    9.7.13.15.10."""


@instruction("fence.mbarrier_init.release.cluster;")
def fence_mbarrier_init() -> None:
    """`fence.mbarrier_init`: by the thread that initialised; makes the mbarriers known to the cluster and to TMA. PTX ISA 9.7.13.4."""


@instruction("mbarrier.arrive.shared::cta.b64 _, [<mbar_smem>];")
def mbarrier_arrive(mbar_smem: u32) -> None:
    """`mbarrier.arrive`: by one thread; one arrival; releases what this thread did before. PTX ISA 9.7.13.15.13."""


@instruction("mbarrier.arrive.shared::cta.b64 _, [<mbar_smem>], <count>;")
def mbarrier_arrive_count(mbar_smem: u32, count: u32) -> None:
    """`mbarrier.arrive` with a count: by one thread; `count` arrivals, no more than the phase waits for; releases what this thread did
    before. PTX ISA 9.7.13.15.13."""


@instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [<mbar_smem>], <num_bytes>;")
def mbarrier_arrive_expect_tx(mbar_smem: u32, num_bytes: u32) -> None:
    """`mbarrier.arrive.expect_tx`: by one thread; one arrival, and the phase also waits for `num_bytes` of TMA. PTX ISA 9.7.13.15.13."""


@instruction("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [<mbar_smem>], <num_bytes>;")
def mbarrier_expect_tx(mbar_smem: u32, num_bytes: u32) -> None:
    """`mbarrier.expect_tx`: by one thread, before its arrival; the phase also waits for `num_bytes` of TMA. Orders nothing. PTX ISA
    9.7.13.15.11."""


@instruction("""{
.reg .pred done;
mbarrier.test_wait.parity.shared::cta.b64 done, [<mbar_smem>], <parity>;
selp.b32 <result>, 1, 0, done;
}""")
def mbarrier_test_wait_parity(mbar_smem: u32, parity: u32) -> u32:
    """`mbarrier.test_wait.parity`: 1 if the phase of this parity is complete, else 0, at once; 1 acquires as `mbarrier_wait_parity`
    does. PTX ISA 9.7.13.15.16."""


@instruction("""{
.reg .pred done;
WAIT_<uid>:
mbarrier.try_wait.parity.shared::cta.b64 done, [<mbar_smem>], <parity>;
@!done bra WAIT_<uid>;
}""")
def mbarrier_wait_parity(mbar_smem: u32, parity: u32) -> None:
    """`mbarrier.try_wait.parity` in a loop: waits until the phase of this parity is complete (a fresh mbarrier counts as having
    completed parity 1); acquires what the arrivals released, and the bytes that TMA wrote. PTX ISA 9.7.13.15.16."""


@instruction("bar.sync <barrier_idx>, <num_threads>;")
def bar_sync(barrier_idx: u32, num_threads: u32) -> None:
    """`bar.sync`: by whole warps; arrives at a named barrier and waits until `num_threads` have. PTX ISA 9.7.13.1."""


@instruction("bar.arrive <barrier_idx>, <num_threads>;")
def bar_arrive(barrier_idx: u32, num_threads: u32) -> None:
    """`bar.arrive`: by whole warps; arrives at a named barrier without waiting; releases earlier accesses. PTX ISA 9.7.13.1."""


@instruction("fence.proxy.async.shared::cta;")
def fence_proxy_async_shared() -> None:
    """`fence.proxy.async`: by each thread that wrote shared memory with ordinary stores, before the barrier after which wgmma or
    TMA may touch it. PTX ISA 9.7.13.4."""


@instruction("fence.proxy.async;")
def fence_proxy_async() -> None:
    """`fence.proxy.async`: `fence_proxy_async_shared` for all memory: between ordinary accesses and those of TMA and wgmma, either
    way. PTX ISA 9.7.13.4."""


@instruction("fence.acq_rel.gpu;")
def fence_acq_rel_gpu() -> None:
    """`fence.acq_rel.gpu`: orders this thread's accesses before and after it for the whole GPU. PTX ISA 9.7.13.4."""


@instruction("fence.acq_rel.cluster;")
def fence_acq_rel_cluster() -> None:
    """`fence.acq_rel.cluster`: orders this thread's accesses before and after it for the cluster. PTX ISA 9.7.13.4."""


@instruction("fence.proxy.tensormap::generic.acquire.gpu [<tensor_map>], 128;")
def fence_proxy_tensormap_acquire(tensor_map: u64) -> None:
    """`fence.proxy.tensormap`: by the thread that will issue TMA, before the first use of a tensor map that lies in global memory
    and was written by a copy. PTX ISA 9.7.13.4."""
