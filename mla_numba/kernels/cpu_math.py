"""Scalar arithmetic of the cpu kernels: storage formats to float32 and back, and 2 ** x. Branch-free after the loop over a tile is
unswitched on `dtype`, so that LLVM vectorises every loop that calls them.

Elements of every dtype travel as unsigned integers of their size: Numba has neither bfloat16 nor float16 on the CPU.
"""

from functools import partial

import numpy as np
from numba import njit

# For functions that only compiled code calls; without the wrappers that Python would need they compile in half the time.
helper = partial(njit, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

BFLOAT16, FLOAT16, FLOAT32 = range(3)

_TWO_POW_112 = np.float32(2.0**112)
_HALF_OVERFLOW = np.float32(65536.0)
_HALF_MIN_NORMAL = np.float32(2.0**-14)
# Adding 0.75 to less than 2**-14 leaves a float32 whose last place is 2**-24, the spacing of float16's subnormals.
_HALF_SUBNORMAL_ROUNDER = np.float32(0.75)
# Adding 1.5 * 2**23 leaves the nearest integer in the low bits of a float32.
_INTEGER_ROUNDER = np.float32(1.5 * 2**23)
_EXP2_FLUSH = np.float32(-126.0)
# 2 ** f = 1 + C1 f + ... + C6 f**6 on [-1/2, 1/2], minimax in relative error (2e-9; the rounding of float32 dominates).
_C1, _C2, _C3 = np.float32(0.6931471824645996), np.float32(0.24022647738456726), np.float32(0.055503323674201965)
_C4, _C5, _C6 = np.float32(0.00961843691766262), np.float32(0.0013398873852565885), np.float32(0.00015353361959569156)
_ONE = np.float32(1)


@helper()
def _float_of(bits):
    return np.uint32(bits).view(np.float32)


@helper()
def _bits_of(x):
    return np.float32(x).view(np.uint32)


@helper()
def widen(bits, dtype):
    """The float32 value of one stored element; exact, NaN stays NaN."""
    bits = np.uint32(bits)
    if dtype == BFLOAT16:
        return _float_of(bits << np.uint32(16))
    if dtype == FLOAT16:
        # float16's exponent moved into float32's is 112 too small, for subnormals too.
        magnitude = _float_of((bits & np.uint32(0x7FFF)) << np.uint32(13)) * _TWO_POW_112
        special = np.uint32(0x7F800000) if magnitude >= _HALF_OVERFLOW else np.uint32(0)
        return _float_of(_bits_of(magnitude) | special | (bits & np.uint32(0x8000)) << np.uint32(16))
    return _float_of(bits)


@helper()
def narrow(x, dtype):
    """The stored element nearest to float32 `x`, ties to even; NaN stays NaN."""
    bits = _bits_of(x)
    if dtype == BFLOAT16:
        rounded = np.uint32(bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return np.uint32(rounded if x == x else np.uint32(0x7FC0))
    if dtype == FLOAT16:
        sign = bits >> np.uint32(16) & np.uint32(0x8000)
        bits &= np.uint32(0x7FFFFFFF)
        magnitude = _float_of(bits)
        subnormal = _bits_of(magnitude + _HALF_SUBNORMAL_ROUNDER) - _bits_of(_HALF_SUBNORMAL_ROUNDER)
        normal = np.uint32(bits - np.uint32(112 << 23) + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) >> np.uint32(13)
        rounded = subnormal if magnitude < _HALF_MIN_NORMAL else min(normal, np.uint32(0x7C00))
        return np.uint32(sign | (rounded if x == x else np.uint32(0x7E00)))
    return bits


@helper()
def exp2(x):
    """2 ** x for x <= 0, within 2 ulp; results below the normal float32, 2 ** -126, become 0. NaN stays NaN."""
    shifted = x + _INTEGER_ROUNDER
    f = x - (shifted - _INTEGER_ROUNDER)
    y = (((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _ONE
    y *= _float_of((_bits_of(shifted) << np.uint32(23)) + np.uint32(0x3F800000))
    return np.float32(0) if x < _EXP2_FLUSH else y
