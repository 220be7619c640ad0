"""Each intrinsic emits the instruction that it is named after, assembles, and says where the PTX ISA describes it; each has an effect.
Levels: l0. What the effects are shows on a GPU: verify/test_l1_ptx.py.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from numba import cuda

pytestmark = pytest.mark.l0
if cuda.config.ENABLE_CUDASIM:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

# After the skip: the simulator lacks what they import.
import numpy as np  # noqa: E402
from numba.cuda import types  # noqa: E402

from mla_numba import ptx  # noqa: E402
from mla_numba.host.compiler import compile_kernel, without_gpu  # noqa: E402
from verify import ptx_kernels  # noqa: E402
from verify.ptx_effects import EFFECTS  # noqa: E402

INSTRUCTIONS = {name: getattr(ptx, name) for name in ptx.__all__ if hasattr(getattr(ptx, name), "ptx")}
MADE = {"wgmma_wait_group": ptx.make_wgmma_wait_group(3), "setmaxnreg_inc": ptx.make_setmaxnreg("inc", 232),
        "setmaxnreg_dec": ptx.make_setmaxnreg("dec", 40), "cp_async_wait_group": ptx.make_cp_async_wait_group(2),
        "parameter_address": ptx.make_parameter_address(0), "cp_async_bulk_wait_group": ptx.make_cp_async_bulk_wait_group(1),
        "cp_async_bulk_wait_group_read": ptx.make_cp_async_bulk_wait_group(1, read=True),
        **{f"createpolicy_{priority}": ptx.make_createpolicy(priority, 0.5) for priority in ("evict_first", "evict_last", "evict_normal")}}
ALL = {**INSTRUCTIONS, **MADE}


def _ptx_of(kernel, *arguments, num_threads=128):
    with without_gpu():
        text, _ = cuda.compile(kernel, types.void(*arguments), device=False, abi="numba", cc=(9, 0, "a"), output="ptx",
                               launch_bounds=(num_threads, 1))
    return text


def _calling(instruction):
    """A kernel that executes the instruction on its arguments, and their types."""
    names = list(instruction.operands)
    # The result is stored, or the compiler would drop what has no other effect.
    assignment = "" if instruction.result is None else "out[0] = "
    namespace = {"instruction": instruction}
    exec(f"def kernel({', '.join(['out', *names])}):\n    {assignment}instruction({', '.join(names)})\n", namespace)
    return namespace["kernel"], (types.CPointer(instruction.result or types.uint32), *instruction.operands.values())


def _with_registers(text):
    """Regular expression for the instruction's text with any registers as operands and any number in labels."""
    parts = re.split(r"(<\w+>)", re.sub(r"\s+", " ", text.replace(r"\22", '"')))
    special = {"<uid>": r"\d+", "<kernel>": r"\w+"}
    return "".join(special.get(part, r"%\w+") if part.startswith("<") else re.escape(part) for part in parts)


@pytest.mark.parametrize("name", ALL)
def test_instruction_is_in_the_ptx(name):
    kernel, arguments = _calling(ALL[name])
    assert re.search(_with_registers(ALL[name].ptx), re.sub(r"\s+", " ", _ptx_of(kernel, *arguments)))


@pytest.mark.parametrize("name", ALL)
def test_instruction_assembles(name):
    kernel, arguments = _calling(ALL[name])
    cubin, _ = compile_kernel(SimpleNamespace(kernel=lambda: kernel, types=lambda: types.void(*arguments), num_threads=128, fastmath=False,
                                               blocks_per_sm=1))
    assert cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("name", [name for name in ptx.__all__ if not name.isupper()])
def test_docstring_says_where_it_is_described(name):
    item = getattr(ptx, name)
    assert re.search(r"PTX ISA\s+\d|No instruction|The intrinsic", item.__doc__)


def test_everything_has_an_effect():
    """But for nounroll, which is for the assembler."""
    used = set(re.findall(r"\bptx\.(\w+)", Path(ptx_kernels.__file__).read_text()))
    named = {part for effect in EFFECTS.values() for part in effect.configuration}
    assert set(ptx.__all__) - used - named == {"nounroll"}


@pytest.mark.parametrize("effect", EFFECTS.values(), ids=EFFECTS)
class TestEffects:
    def test_compiles(self, effect):
        """To registers: an accumulator in memory would be stored before its wgmma has ended."""
        _, report = compile_kernel(effect)
        assert "0 bytes stack frame, 0 bytes spill stores" in report

    def test_arguments(self, effect):
        code, inputs = effect.kernel().__code__, effect.inputs(np.random.default_rng(0))
        assert list(code.co_varnames[:code.co_argcount]) == ["tensor_map" if name in effect.tensor_maps else name for name in inputs]

    def test_is_more_than_nothing(self, effect):
        inputs = effect.inputs(np.random.default_rng(0))
        effect.check(inputs, {**inputs, **effect.expected(inputs)})
        with pytest.raises(AssertionError):
            effect.check(inputs, inputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n", [8, 16, 32, 64, 256])
@pytest.mark.parametrize("a_form", ["shared", "registers", "transposed"])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_wgmma(n, dtype, a_form, b_transposed):
    a_in_registers, a_transposed = a_form == "registers", a_form == "transposed"
    wgmma, count = ptx.make_wgmma(n, dtype, a_in_registers, b_transposed, a_transposed), n // 2
    if a_in_registers:
        def kernel(out, a, b):
            d_rmem = cuda.local.array(count, types.float32)
            for i in range(count):
                d_rmem[i] = np.float32(0)
            a_rmem = cuda.local.array(4, types.uint32)
            for i in range(4):
                a_rmem[i] = np.uint32(a)
            wgmma(d_rmem, a_rmem, 0, b, np.uint32(1))
            for i in range(count):
                out[i] = d_rmem[i]
    else:
        def kernel(out, a, b):
            d_rmem = cuda.local.array(count, types.float32)
            for i in range(count):
                d_rmem[i] = np.float32(0)
            wgmma(d_rmem, a, b, np.uint32(1))
            for i in range(count):
                out[i] = d_rmem[i]
    text = _ptx_of(kernel, types.CPointer(types.float32), types.uint64, types.uint64)
    element = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    (line,) = re.findall(r"wgmma\.mma_async\S+ .*", text)
    assert line.startswith(f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{element}.{element} ")
    d, rest = re.match(r"\S+ \{(.*?)\}, (.*);", line).groups()
    assert len(d.split(", ")) == count
    # Scale A, scale B, then the transpositions: of A only if it is in shared memory.
    assert rest.endswith(f", p, 1, 1, {int(b_transposed)}" if a_in_registers else f", p, 1, 1, {int(a_transposed)}, {int(b_transposed)}")
    # The accumulator is registers, not memory.
    assert ".local" not in text


def test_wgmma_transposes_no_registers():
    with pytest.raises(ValueError, match="from shared memory only"):
        ptx.make_wgmma(64, "bfloat16", a_in_registers=True, a_transposed=True)


def test_descriptors():
    """PTX ISA 9.7.15.5.1.2: leading offset / 16 in bits 16-29, stride offset / 16 in bits 32-45, swizzle 128 B = 1 in bits 62-63."""
    for descriptor, leading, stride in ((ptx.matrix_descriptor(1024), 1, 64), (ptx.matrix_descriptor(1024, 8192), 8192 // 16, 64),
                                        (ptx.matrix_descriptor(5120, 1024), 1024 // 16, 5120 // 16)):
        assert descriptor >> 62 == 1
        assert descriptor >> 32 & 0x3FFF == stride
        assert descriptor >> 16 & 0x3FFF == leading
        assert descriptor & 0x3FFF == 0
