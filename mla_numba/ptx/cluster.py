"""Thread blocks of a cluster: their barrier, and each other's shared memory and mbarriers.

An address of the cluster's shared memory is one that `mapa_shared_cluster` made, or a block's own. No block may end while others
touch its shared memory: a cluster's barrier comes before the end.
"""

from .instruction import f32, instruction, u32


@instruction("mov.u32 <result>, %cluster_ctarank;", pure=True)
def cluster_ctarank() -> u32:
    """`%cluster_ctarank`: this block's number in its cluster. PTX ISA 10.16."""


@instruction("mapa.shared::cluster.u32 <result>, <address>, <cta_rank>;", pure=True)
def mapa_shared_cluster(address: u32, cta_rank: u32) -> u32:
    """`mapa.shared::cluster`: where in the cluster's shared memory block `cta_rank` has what this one has at `address`. PTX ISA
    9.7.9.23."""


@instruction("barrier.cluster.arrive.release.aligned;")
def barrier_cluster_arrive() -> None:
    """`barrier.cluster.arrive`: by all threads of the cluster, whole warps; releases what this thread did before. PTX ISA 9.7.13.3."""


@instruction("barrier.cluster.arrive.relaxed.aligned;")
def barrier_cluster_arrive_relaxed() -> None:
    """`barrier.cluster.arrive.relaxed`: `barrier_cluster_arrive` that releases nothing but what `fence_mbarrier_init` has; without the
    MEMBAR.ALL.GPU that the other one is in machine code. PTX ISA 9.7.13.3."""


@instruction("barrier.cluster.wait.acquire.aligned;")
def barrier_cluster_wait() -> None:
    """`barrier.cluster.wait`: by all threads of the cluster, whole warps; waits until all have arrived, acquires what they released.
    PTX ISA 9.7.13.3."""


@instruction("mbarrier.arrive.shared::cluster.b64 _, [<mbar_cluster>];")
def mbarrier_arrive_remote(mbar_cluster: u32) -> None:
    """`mbarrier.arrive.shared::cluster`: by one thread; one arrival at the mbarrier of any block of the cluster. Releases what this thread
    did before to its own block only: enough where it is done reading what another block's TMA will overwrite. In machine code
    `mbarrier_arrive_cluster` is this behind a MEMBAR.ALL.GPU. PTX ISA 9.7.13.15.13."""


@instruction("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [<mbar_cluster>];")
def mbarrier_arrive_cluster(mbar_cluster: u32) -> None:
    """`mbarrier.arrive.shared::cluster`: by one thread; one arrival at the mbarrier of any block of the cluster; releases what this
    thread did before, to who waits by `mbarrier_wait_parity_cluster`. PTX ISA 9.7.13.15.13."""


@instruction("""{
.reg .pred done;
WAIT_<uid>:
mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [<mbar_smem>], <parity>;
@!done bra WAIT_<uid>;
}""")
def mbarrier_wait_parity_cluster(mbar_smem: u32, parity: u32) -> None:
    """`mbarrier.try_wait.parity.acquire.cluster` in a loop: `mbarrier_wait_parity` on a block's own mbarrier, which acquires what the
    cluster's other blocks released there too. PTX ISA 9.7.13.15.16."""


@instruction("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [<address>], <value>, [<mbar_cluster>];")
def st_async_b32(address: u32, value: u32, mbar_cluster: u32) -> None:
    """`st.async`: by one thread; begins to store 4 bytes in another block of a cluster of two or more. They are counted down at an
    mbarrier of that block as they arrive, and seen by who waits there. PTX ISA 9.7.9.12."""


@instruction("ld.shared::cluster.b32 <result>, [<address>];")
def ld_shared_cluster_b32(address: u32) -> u32:
    """`ld.shared::cluster`: 4 bytes. PTX ISA 9.7.9.8."""


@instruction("ld.shared::cluster.f32 <result>, [<address>];")
def ld_shared_cluster_f32(address: u32) -> f32:
    """`ld.shared::cluster`: a float. PTX ISA 9.7.9.8."""
