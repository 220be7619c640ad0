"""Loads, stores and addresses, where Numba's arrays would cost 64-bit arithmetic."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .instruction import array_data, element_pointers, emit, f32, i32, instruction, u32, u64, vector_load


@intrinsic
def smem_address(typingctx: Any, array: Any) -> Any:
    """`cvta.to.shared`: the 32-bit shared-memory address of an array of shared memory. PTX ISA 9.7.9.20."""
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
        address = builder.ptrtoint(array_data(context, builder, signature.args[0], args[0]), ir.IntType(64))
        text = "{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }"
        return emit(builder, text, ["=r", "l"], ir.IntType(32), [address], pure=True)

    return u32(array), codegen


@instruction("ld.shared.f32 <result>, [<address>];")
def ld_shared_f32(address: u32) -> f32:
    """`ld.shared`: a float. PTX ISA 9.7.9.8."""


@instruction("st.shared.f32 [<address>], <value>;")
def st_shared_f32(address: u32, value: f32) -> None:
    """`st.shared`: a float. PTX ISA 9.7.9.11."""


@instruction("ld.shared.b32 <result>, [<address>];")
def ld_shared_i32(address: u32) -> i32:
    """`ld.shared`: an integer. PTX ISA 9.7.9.8."""


@instruction("st.shared.b32 [<address>], <value>;")
def st_shared_i32(address: u32, value: i32) -> None:
    """`st.shared`: an integer. PTX ISA 9.7.9.11."""


@instruction("st.shared.v4.b32 [<address>], {<a>, <b>, <c>, <d>};")
def st_shared_v4_b32(address: u32, a: u32, b: u32, c: u32, d: u32) -> None:
    """`st.shared.v4`: 16 bytes to an address that is a multiple of 16. PTX ISA 9.7.9.11."""


@instruction("ld.global.nc.b32 <result>, [<address>];")
def ld_global_i32(address: u64) -> i32:
    """`ld.global.nc`: an integer that nobody writes while the kernel runs. PTX ISA 9.7.9.9."""


@instruction("prefetch.global.L2 [<address>];")
def prefetch_global_l2(address: u64) -> None:
    """`prefetch.global.L2`: by one thread; brings the line at an address to L2. Orders nothing. PTX ISA 9.7.9.15."""


@instruction("ld.global.f32 <result>, [<address>];")
def ld_global_f32(address: u64) -> f32:
    """`ld.global`: a float. PTX ISA 9.7.9.8."""


@intrinsic
def ld_global_v4_f32(typingctx: Any, registers: Any, first: Any, address: Any) -> Any:
    """`ld.global.v4`: four floats to registers[first:first + 4] from an address that is a multiple of 16. PTX ISA 9.7.9.8."""
    return types.void(registers, i32, u64), vector_load("ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", "f", ir.FloatType())


@intrinsic
def ld_global_v4_b32(typingctx: Any, registers: Any, first: Any, address: Any) -> Any:
    """`ld.global.v4`: 16 bytes to registers[first:first + 4] from an address that is a multiple of 16. PTX ISA 9.7.9.8."""
    return types.void(registers, i32, u64), vector_load("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "r", ir.IntType(32))


@intrinsic
def ld_global_v2_b32(typingctx: Any, registers: Any, first: Any, address: Any) -> Any:
    """`ld.global.v2`: 8 bytes to registers[first:first + 2] from an address that is a multiple of 8. PTX ISA 9.7.9.8."""
    return types.void(registers, i32, u64), vector_load("ld.global.v2.b32 {$0, $1}, [$2];", "r", ir.IntType(32), 2)


@intrinsic
def ld_shared_v4_b32(typingctx: Any, registers: Any, first: Any, address: Any) -> Any:
    """`ld.shared.v4`: 16 bytes to registers[first:first + 4] from an address that is a multiple of 16. PTX ISA 9.7.9.8."""
    return types.void(registers, i32, u32), vector_load("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "r", ir.IntType(32))


@instruction("st.global.v4.f32 [<address>], {<a>, <b>, <c>, <d>};")
def st_global_v4_f32(address: u64, a: f32, b: f32, c: f32, d: f32) -> None:
    """`st.global.v4`: four floats to an address that is a multiple of 16. PTX ISA 9.7.9.11."""


@instruction("st.global.v4.b32 [<address>], {<a>, <b>, <c>, <d>};")
def st_global_v4_b32(address: u64, a: u32, b: u32, c: u32, d: u32) -> None:
    """`st.global.v4`: 16 bytes to an address that is a multiple of 16. PTX ISA 9.7.9.11."""


@instruction("st.global.v2.b32 [<address>], {<a>, <b>};")
def st_global_v2_b32(address: u64, a: u32, b: u32) -> None:
    """`st.global.v2`: 8 bytes to an address that is a multiple of 8. PTX ISA 9.7.9.11."""


@instruction("st.global.b32 [<address>], <value>;")
def st_global_b32(address: u64, value: u32) -> None:
    """`st.global`: 4 bytes. PTX ISA 9.7.9.11."""


@instruction("st.global.f32 [<address>], <value>;")
def st_global_f32(address: u64, value: f32) -> None:
    """`st.global`: a float. PTX ISA 9.7.9.11."""


@instruction("mov.b32 <result>, <value>;")
def opaque_b32(value: u32) -> u32:
    """`mov`: the same value, of which the compiler knows nothing: what is computed from it in a loop stays in the loop, where it
    costs an instruction, instead of a register each all along it. PTX ISA 9.7.9.3."""


def make_registers_begin(count: int) -> Any:
    """An intrinsic that makes the compiler believe that the first `count` floats of an array are written here.

    No instruction; what they hold is unknown. To LLVM a wgmma reads its accumulator even where it does not accumulate: without this what
    the array held before would need its registers up to there.
    """
    return _empty_asm(count, f32, reads=False)


def make_registers_fence(count: int, element: Any = f32) -> Any:
    """An intrinsic that makes the compiler believe that the first `count` registers of an array are read and written here.

    No instruction. wgmma reads and writes its registers between issue and wait, of which LLVM knows nothing: what touches them
    before stays before, what touches them after stays after.
    """
    return _empty_asm(count, element, reads=True)


def _empty_asm(count: int, element: Any, reads: bool) -> Any:
    letter, kind = ("f", ir.FloatType()) if element == f32 else ("r", ir.IntType(32))

    @intrinsic
    def empty_asm(typingctx: Any, registers: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
            pointers = element_pointers(context, builder, signature.args[0], args[0], count)
            values = [builder.load(pointer) for pointer in pointers] if reads else []
            returned = emit(builder, "", ["=" + letter] * count + [str(i) for i in range(len(values))],
                            ir.LiteralStructType([kind] * count), values)
            for i, pointer in enumerate(pointers):
                builder.store(builder.extract_value(returned, i), pointer)
            return context.get_dummy_value()

        return types.void(registers), codegen

    return empty_asm
