"""Loads, stores and addresses, where Numba's arrays would cost 64-bit arithmetic, and the 8 x 8 matrix moves."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .instruction import array_data, element_pointers, emit, f32, i32, instruction, u32, u64


@intrinsic
def smem_address(typingctx: Any, array: Any) -> Any:
    """`cvta.to.shared`: the 32-bit shared-memory address of an array of shared memory. PTX ISA 9.7.9.20."""
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
        address = builder.ptrtoint(array_data(context, builder, signature.args[0], args[0]), ir.IntType(64))
        return emit(builder, "{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }", ["=r", "l"], ir.IntType(32), [address], pure=True)

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
def st_shared_v4(address: u32, a: u32, b: u32, c: u32, d: u32) -> None:
    """`st.shared.v4`: 16 bytes to an address that is a multiple of 16. PTX ISA 9.7.9.11."""


@instruction("ld.global.nc.b32 <result>, [<address>];")
def ld_global_i32(address: u64) -> i32:
    """`ld.global.nc`: an integer that nobody writes while the kernel runs. PTX ISA 9.7.9.8."""


@instruction("ld.global.f32 <result>, [<address>];")
def ld_global_f32(address: u64) -> f32:
    """`ld.global`: a float. PTX ISA 9.7.9.8."""


@intrinsic
def ld_global_v4_f32(typingctx: Any, registers: Any, first: Any, address: Any) -> Any:
    """`ld.global.v4`: four floats to registers[first:first + 4] from an address that is a multiple of 16. PTX ISA 9.7.9.8."""
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
        loaded = emit(builder, "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", ["=f"] * 4 + ["l"], ir.LiteralStructType([ir.FloatType()] * 4),
                      [args[2]])
        data = array_data(context, builder, signature.args[0], args[0])
        for i in range(4):
            builder.store(builder.extract_value(loaded, i), builder.gep(data, [builder.add(args[1], ir.Constant(ir.IntType(32), i))]))
        return context.get_dummy_value()

    return types.void(registers, i32, u64), codegen


@instruction("st.global.v2.b32 [<address>], {<a>, <b>};")
def st_global_v2_b32(address: u64, a: u32, b: u32) -> None:
    """`st.global.v2`: 8 bytes to an address that is a multiple of 8. PTX ISA 9.7.9.11."""


@instruction("st.global.b32 [<address>], <value>;")
def st_global_b32(address: u64, value: u32) -> None:
    """`st.global`: 4 bytes. PTX ISA 9.7.9.11."""


@instruction("st.global.f32 [<address>], <value>;")
def st_global_f32(address: u64, value: f32) -> None:
    """`st.global`: a float. PTX ISA 9.7.9.11."""


@instruction("st.global.v2.f32 [<address>], {<a>, <b>};")
def st_global_v2_f32(address: u64, a: f32, b: f32) -> None:
    """`st.global.v2`: two floats to an address that is a multiple of 8. PTX ISA 9.7.9.11."""


@instruction("stmatrix.sync.aligned.m8n8.x4.shared.b16 [<row_smem>], {<a>, <b>, <c>, <d>};")
def stmatrix_x4(row_smem: u32, a: u32, b: u32, c: u32, d: u32) -> None:
    """`stmatrix.x4`: by a whole warp; stores four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix
    l / 8, and holds row l / 4, columns 2 (l % 4) and the next, of each. PTX ISA 9.7.14.5.16."""


@intrinsic
def ldmatrix_x4(typingctx: Any, registers: Any, first: Any, row_smem: Any) -> Any:
    """`ldmatrix.x4`: by a whole warp; loads four 8 x 8 matrices of 16-bit elements to registers[first:first + 4], the reverse of
    `stmatrix_x4`. PTX ISA 9.7.14.5.15."""
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
        word = ir.IntType(32)
        loaded = emit(builder, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", ["=r"] * 4 + ["r"],
                      ir.LiteralStructType([word] * 4), [args[2]])
        data = array_data(context, builder, signature.args[0], args[0])
        for i in range(4):
            builder.store(builder.extract_value(loaded, i), builder.gep(data, [builder.add(args[1], ir.Constant(word, i))]))
        return context.get_dummy_value()

    return types.void(registers, i32, u32), codegen


@instruction("mov.b32 <result>, <value>;")
def opaque_b32(value: u32) -> u32:
    """`mov`: the same value, of which the compiler knows nothing: what is computed from it in a loop stays in the loop, where it
    costs an instruction, instead of a register each all along it."""


def make_registers_fence(count: int, element: Any = f32) -> Any:
    """An intrinsic that makes the compiler believe that the first `count` registers of an array are read and written here.

    No instruction. wgmma reads and writes its registers between issue and wait, of which LLVM knows nothing: what touches them
    before stays before, what touches them after stays after.
    """
    letter = "f" if element == f32 else "r"

    @intrinsic
    def registers_fence(typingctx: Any, registers: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
            pointers = element_pointers(context, builder, signature.args[0], args[0], count)
            values = [builder.load(pointer) for pointer in pointers]
            returned = emit(builder, "", ["=" + letter] * count + [str(i) for i in range(count)],
                            ir.LiteralStructType([value.type for value in values]), values)
            for i, pointer in enumerate(pointers):
                builder.store(builder.extract_value(returned, i), pointer)
            return context.get_dummy_value()

        return types.void(registers), codegen

    return registers_fence
