"""Arithmetic that Numba has no name for; and a float's bits, for which it has `view`, but the integers of verify/emulator, which are
Python's, have not."""

from .instruction import f32, instruction, u32


@instruction("ex2.approx.ftz.f32 <result>, <x>;", pure=True)
def ex2(x: f32) -> f32:
    """`ex2.approx.ftz`: 2^x within 2 units in the last place, 0 for -inf. PTX ISA 9.7.3.21."""


@instruction("lg2.approx.ftz.f32 <result>, <x>;", pure=True)
def lg2_approx(x: f32) -> f32:
    """`lg2.approx.ftz`: log2 x within 2^-22, absolute below 1 and relative above; -inf for 0. PTX ISA 9.7.3.20."""


@instruction("rcp.approx.ftz.f32 <result>, <x>;", pure=True)
def rcp_approx(x: f32) -> f32:
    """`rcp.approx.ftz`: 1 / x within 1 unit in the last place, by one instruction; subnormals are 0. PTX ISA 9.7.3.13."""


@instruction("mul.rn.f32 <result>, <a>, <b>;", pure=True)
def mul_rn(a: f32, b: f32) -> f32:
    """`mul.rn`: a product that fastmath leaves alone. PTX ISA 9.7.3.5."""


@instruction("fma.rn.f32 <result>, <a>, <b>, <c>;", pure=True)
def fma_rn(a: f32, b: f32, c: f32) -> f32:
    """`fma.rn`: a b + c, rounded once, that fastmath leaves alone. PTX ISA 9.7.3.6."""


@instruction("cvt.rn.bf16x2.f32 <result>, <high>, <low>;", pure=True)
def cvt_bf16x2(high: f32, low: f32) -> u32:
    """`cvt.rn.bf16x2.f32`: two floats to a pair of bfloat16, to nearest even. PTX ISA 9.7.9.21."""


@instruction("cvt.rn.f16x2.f32 <result>, <high>, <low>;", pure=True)
def cvt_f16x2(high: f32, low: f32) -> u32:
    """`cvt.rn.f16x2.f32`: two floats to a pair of float16, to nearest even. PTX ISA 9.7.9.21."""


@instruction("mov.b32 <result>, <x>;", pure=True)
def bits_of_f32(x: f32) -> u32:
    """`mov.b32`: a float's bits. PTX ISA 9.7.9.3."""


@instruction("mov.b32 <result>, <bits>;", pure=True)
def f32_of_bits(bits: u32) -> f32:
    """`mov.b32`: the float that has these bits. PTX ISA 9.7.9.3."""


@instruction("prmt.b32 <result>, <a>, <b>, <selector>;", pure=True)
def prmt(a: u32, b: u32, selector: u32) -> u32:
    """`prmt.b32`: four of eight bytes, those of `a` being 0 to 3 and those of `b` 4 to 7; hexadecimal digit i of `selector` says which one
    byte i is. PTX ISA 9.7.9.7."""
