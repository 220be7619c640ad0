"""8 x 8 matrices of 16-bit elements between shared memory and the registers of a warp, and within those.

Lane l gives the address of row l % 8 of matrix l / 8, and holds row l / 4, columns 2 (l % 4) and the next, of each; with `trans`
column l / 4, rows 2 (l % 4) and the next. Rows are 16 bytes, at addresses that are multiples of 16.
"""

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .instruction import i32, instruction, u32, vector_load


@intrinsic
def ldmatrix_x4(typingctx: Any, registers: Any, first: Any, row_smem: Any) -> Any:
    """`ldmatrix.x4`: by a whole warp; loads four matrices to registers[first:first + 4]. PTX ISA 9.7.14.5.15."""
    return types.void(registers, i32, u32), vector_load("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", "r",
                                                        ir.IntType(32))


@intrinsic
def ldmatrix_x4_trans(typingctx: Any, registers: Any, first: Any, row_smem: Any) -> Any:
    """`ldmatrix.x4.trans`: by a whole warp; loads four matrices, transposed, to registers[first:first + 4]. PTX ISA 9.7.14.5.15."""
    return types.void(registers, i32, u32), vector_load("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", "r",
                                                        ir.IntType(32))


@instruction("stmatrix.sync.aligned.m8n8.x4.shared.b16 [<row_smem>], {<a>, <b>, <c>, <d>};")
def stmatrix_x4(row_smem: u32, a: u32, b: u32, c: u32, d: u32) -> None:
    """`stmatrix.x4`: by a whole warp; stores four matrices. PTX ISA 9.7.14.5.16."""


@instruction("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [<row_smem>], {<a>, <b>, <c>, <d>};")
def stmatrix_x4_trans(row_smem: u32, a: u32, b: u32, c: u32, d: u32) -> None:
    """`stmatrix.x4.trans`: by a whole warp; stores four matrices, transposed. PTX ISA 9.7.14.5.16."""


@instruction("movmatrix.sync.aligned.m8n8.trans.b16 <result>, <value>;")
def movmatrix_trans(value: u32) -> u32:
    """`movmatrix.trans`: by a whole warp; a matrix that it holds by rows comes to be held by columns. PTX ISA 9.7.14.5.17."""
