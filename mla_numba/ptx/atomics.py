"""Words of global memory that thread blocks share. Each instruction is one thread's; all see each other in the whole GPU."""

from .instruction import f32, instruction, u32, u64


@instruction("atom.acq_rel.gpu.global.add.u32 <result>, [<address>], <value>;")
def atom_add_acq_rel(address: u64, value: u32) -> u32:
    """`atom.acq_rel.gpu.add`: adds, and returns what was there; releases what this thread did before (and, after a warp's barrier, its
    warp), acquires what others released here. PTX ISA 9.7.13.5."""


@instruction("atom.relaxed.gpu.global.add.u32 <result>, [<address>], <value>;")
def atom_add_relaxed(address: u64, value: u32) -> u32:
    """`atom.relaxed.gpu.add`: adds, and returns what was there; orders nothing else. PTX ISA 9.7.13.5."""


@instruction("atom.acq_rel.gpu.global.cas.b32 <result>, [<address>], <expected>, <value>;")
def atom_cas_acq_rel(address: u64, expected: u32, value: u32) -> u32:
    """`atom.acq_rel.gpu.cas`: stores `value` where `expected` was, and returns what was there; releases and acquires as
    `atom_add_acq_rel` does. PTX ISA 9.7.13.5."""


@instruction("red.relaxed.gpu.global.add.f32 [<address>], <value>;")
def red_add_f32(address: u64, value: f32) -> None:
    """`red.relaxed.gpu.add`: adds a float; orders nothing, not even the additions. PTX ISA 9.7.13.6."""


@instruction("red.release.gpu.global.add.u32 [<address>], <value>;")
def red_add_u32(address: u64, value: u32) -> None:
    """`red.release.gpu.add`: adds, and releases what this thread did before, as an arrival that nobody needs the number of. PTX ISA
    9.7.13.6."""


@instruction("red.relaxed.gpu.global.inc.u32 [<address>], <bound>;")
def red_inc_u32(address: u64, bound: u32) -> None:
    """`red.inc`: adds 1, or sets to 0 what is `bound` or more, so that the last of a known number begins a count anew. Orders nothing.
    PTX ISA 9.7.13.6."""


@instruction("ld.acquire.gpu.global.u32 <result>, [<address>];")
def ld_acquire(address: u64) -> u32:
    """`ld.acquire.gpu`: what another thread block released. PTX ISA 9.7.9.8."""


@instruction("st.relaxed.gpu.global.u32 [<address>], <value>;")
def st_relaxed(address: u64, value: u32) -> None:
    """`st.relaxed.gpu`: a word that other thread blocks watch. PTX ISA 9.7.9.11."""
