"""A kernel that reads: what the read bandwidth is measured with, and what makes the cache's lines clean before a sample."""

from __future__ import annotations

from typing import Any

import numpy as np

READ_THREADS = 256


def _load_16_bytes() -> Any:
    """Two int64 by one load. Numba's arrays promise an alignment of 8, so that the compiler would make two loads of it."""
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    # Numba calls it with a typing context, wanted or not.
    @intrinsic
    def load_16_bytes(typing_context, array, index):  # noqa: ARG001
        def generate(context, builder, signature, arguments):
            pointer = builder.gep(context.make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])
            loaded = builder.load(builder.bitcast(pointer, ir.VectorType(ir.IntType(64), 2).as_pointer()))
            loaded.align = 16
            return context.make_tuple(builder, signature.return_type,
                                      [builder.extract_element(loaded, ir.IntType(32)(half)) for half in range(2)])

        return types.UniTuple(types.int64, 2)(array, index), generate

    return load_16_bytes


def make_read_kernel() -> Any:
    """Sum of an int64 array, not yet compiled; its length must be a multiple of 8 times the threads of the grid."""
    from numba import cuda

    load = _load_16_bytes()
    at = np.uint64

    def read(source, sums):
        step = at(2) * at(cuda.gridsize(1))
        index = at(2) * at(cuda.grid(1))
        total = np.int64(0)
        # Four independent loads in flight.
        while index < at(source.size):
            a, b = load(source, index)
            c, d = load(source, index + step)
            e, f = load(source, index + at(2) * step)
            g, h = load(source, index + at(3) * step)
            total += (a ^ b) + (c ^ d) + (e ^ f) + (g ^ h)
            index += at(4) * step
        sums[cuda.grid(1)] = total

    return read
