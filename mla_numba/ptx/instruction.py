"""`instruction`: an annotated stub becomes a Numba intrinsic that emits one PTX instruction.

    @instruction("mbarrier.init.shared::cta.b64 [<mbar_smem>], <count>;")
    def mbarrier_init(mbar_smem: u32, count: u32) -> None:
        '''...'''

`<name>` stands for an argument, `<result>` for what is returned, `<uid>` for a number that differs at every use (labels), `<kernel>` for
the name of the function that it is part of.
Instructions that touch memory, barriers or other threads keep their place among each other; arithmetic (`pure=True`) may be moved.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

i32, u16, u32, u64, f32 = types.int32, types.uint16, types.uint32, types.uint64, types.float32

# PTX register classes, by the letter that names them in an asm constraint.
_CLASS = {u16: "h", i32: "r", u32: "r", u64: "l", f32: "f"}


def emit(builder: ir.IRBuilder, text: str, constraints: Sequence[str], result: ir.Type, args: Sequence[ir.Value],
         pure: bool = False) -> Any:
    """One `asm`; unless `pure`, volatile and clobbering memory."""
    clobbers = [] if pure else ["~{memory}"]
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(ir.InlineAsm(function, text, ",".join([*constraints, *clobbers]), side_effect=not pure), list(args))


def numbered(text: str, names: Sequence[str]) -> str:
    """`text` with `<name>` as the number that LLVM gives the operand: its place in `names`."""
    def operand(match: re.Match[str]) -> str:
        if match[1] == "kernel":
            return match[0]
        return "${:uid}" if match[1] == "uid" else f"${list(names).index(match[1])}"

    return re.sub(r"<(\w+)>", operand, text)


def array_data(context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value) -> Any:
    """Pointer to the first element of an array argument."""
    return context.make_array(array_type)(context, builder, value=array).data


def element_pointers(context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value, count: int) -> list[Any]:
    """Pointers to the first `count` elements of a `cuda.local.array`: registers, once LLVM has promoted it."""
    data = array_data(context, builder, array_type, array)
    return [builder.gep(data, [ir.Constant(ir.IntType(32), i)]) for i in range(count)]


def vector_load(text: str, letter: str, element: ir.Type, count: int = 4) -> Any:
    """Code for `text`, a load of `count` 32-bit values, to so many places of an array of registers."""
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
        word = ir.IntType(32)
        address_class = "r" if signature.args[2] == u32 else "l"
        loaded = emit(builder, text, ["=" + letter] * count + [address_class], ir.LiteralStructType([element] * count), [args[2]])
        data = array_data(context, builder, signature.args[0], args[0])
        for i in range(count):
            builder.store(builder.extract_value(loaded, i), builder.gep(data, [builder.add(args[1], ir.Constant(word, i))]))
        return context.get_dummy_value()

    return codegen


def instruction(text: str, pure: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: make an intrinsic of a stub whose annotations are the types of its operands."""
    def decorate(stub: Callable[..., Any]) -> Any:
        parameters = list(inspect.signature(stub).parameters)
        annotations = stub.__annotations__
        argument_types = [annotations[name] for name in parameters]
        result_type = annotations["return"]
        names = parameters if result_type is None else ["result", *parameters]
        asm_text = numbered(text, names)
        constraints = ([] if result_type is None else ["=" + _CLASS[result_type]]) + [_CLASS[t] for t in argument_types]

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> Any:
            returned = ir.VoidType() if result_type is None else context.get_value_type(result_type)
            value = emit(builder, asm_text.replace("<kernel>", builder.function.name), constraints, returned, args, pure)
            return context.get_dummy_value() if result_type is None else value

        signature = (types.void if result_type is None else result_type)(*argument_types)
        # Numba wants a typing function with as many named parameters as the intrinsic has.
        namespace = {"signature": signature, "codegen": codegen}
        exec(f"def typing({', '.join(['typingctx', *parameters])}):\n    return signature, codegen\n", namespace)
        typing: Any = namespace["typing"]
        typing.__name__, typing.__doc__, typing.__module__ = stub.__name__, stub.__doc__, stub.__module__
        made = intrinsic(typing)
        made.ptx = text
        made.operands = {name: annotations[name] for name in parameters}
        made.result = result_type
        return made

    return decorate
