"""wgmma: the tensor core's asynchronous matrix multiply of a warpgroup, its fences, and its operands' descriptors."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .instruction import array_data, element_pointers, emit, i32, instruction, numbered, u32, u64


def matrix_descriptor(stride_bytes: int, leading_bytes: int = 16) -> int:
    """Of an operand in shared memory with 128-byte swizzle, without its address; PTX ISA 9.7.15.5.1.2.

    Rows of 64 16-bit elements, 8 rows an atom of 1,024 bytes. `stride_bytes` leads from atom to atom along the rows, `leading_bytes` on to
    the next 64 columns of a transposed operand (V); a K-major one (Q, K, P) has no use for it, nor has a transposed A, of 64 columns.

    Bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16, 62-63 swizzle."""
    return 1 << 62 | stride_bytes >> 4 << 32 | leading_bytes >> 4 << 16



@instruction("wgmma.fence.sync.aligned;")
def wgmma_fence() -> None:
    """`wgmma.fence`: by a warpgroup; before its first wgmma, and whenever registers that one reads were written. PTX ISA 9.7.15.7.1."""


@instruction("wgmma.commit_group.sync.aligned;")
def wgmma_commit_group() -> None:
    """`wgmma.commit_group`: by a warpgroup; what it issued since the last commit becomes a group. PTX ISA 9.7.15.7.2."""


@cache
def make_wgmma_wait_group(pending: int) -> Any:
    """The intrinsic that waits until at most `pending` of the youngest groups are unfinished."""
    @instruction(f"wgmma.wait_group.sync.aligned {pending};")
    def wgmma_wait_group() -> None:
        """`wgmma.wait_group`: by a warpgroup; the registers and the shared memory of finished groups may be touched. PTX ISA 9.7.15.7.3."""

    return wgmma_wait_group


@cache
def make_wgmma(n: int, dtype: str, a_in_registers: bool = False, b_transposed: bool = False, a_transposed: bool = False) -> Any:
    """The intrinsic D (64 x n, float32) = A (64 x 16) B (16 x n) + D, by a warpgroup; PTX ISA 9.7.15.5.2.

    Its arguments: D, a `cuda.local.array` of n/2 floats; A, a descriptor, or an array of registers and the first of the four that it
    takes; the descriptor of B; `accumulate`, 0 to begin D anew. It reads A, B and D at any time up to the wait for its group.

    A row in shared memory is 64 elements of one row of A or column of B (K-major); transposed (MN-major), one k of 64 rows or columns.

    D of thread t: register i is row 16 (t / 32) + (t % 32) / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2.
    """
    if a_in_registers and a_transposed:
        raise ValueError("wgmma takes a transposed A from shared memory only, not with a_in_registers")
    count = n // 2
    element = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    a_names = ["a0", "a1", "a2", "a3"] if a_in_registers else ["a"]
    d_names = [f"d{i}" for i in range(count)]
    a_text = "{<a0>, <a1>, <a2>, <a3>}" if a_in_registers else "<a>"
    majors = f"{int(b_transposed)}" if a_in_registers else f"{int(a_transposed)}, {int(b_transposed)}"
    text = numbered("{\n.reg .pred p;\nsetp.ne.b32 p, <accumulate>, 0;\n"
                    f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{element}.{element} {{{', '.join(f'<{d}>' for d in d_names)}}}, "
                    f"{a_text}, <b>, p, 1, 1, {majors};\n}}", [*d_names, *a_names, "b", "accumulate"])
    constraints = ["=f"] * count + (["r"] * 4 if a_in_registers else ["l"]) + ["l", "r"] + [str(i) for i in range(count)]

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
        pointers = element_pointers(context, builder, signature.args[0], args[0], count)
        values = [builder.load(pointer) for pointer in pointers]
        operands = args[1:]
        if a_in_registers:
            data = array_data(context, builder, signature.args[1], args[1])
            places = [builder.gep(data, [builder.add(args[2], ir.Constant(ir.IntType(32), i))]) for i in range(4)]
            operands = [*(builder.load(place) for place in places), *args[3:]]
        returned = emit(builder, text, constraints, ir.LiteralStructType([value.type for value in values]), [*operands, *values])
        for i, pointer in enumerate(pointers):
            builder.store(builder.extract_value(returned, i), pointer)
        return context.get_dummy_value()

    if a_in_registers:
        @intrinsic
        def wgmma(typingctx: Any, d: Any, a: Any, first: Any, b: Any, accumulate: Any) -> Any:
            return types.void(d, a, i32, u64, u32), codegen
    else:
        @intrinsic
        def wgmma(typingctx: Any, d: Any, a: Any, b: Any, accumulate: Any) -> Any:
            return types.void(d, u64, u64, u32), codegen
    return wgmma
