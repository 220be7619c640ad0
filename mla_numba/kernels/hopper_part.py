"""A part of O that hopper_merge reads, in the workspace: two strips, of which a lane has 8 floats, in 24 bytes a lane.

The last byte of each float is left out. What remains is within 2^-15 of it whatever its size; infinities stay, and so does the NaN that
arithmetic gives, 0x7FFFFFFF. Of four floats a, b, c, d three keep their place, and have a byte of the fourth one for their last (byte 0):

    byte     3  2  1  0
    word 0   a3 a2 a1 d1        Words 0 to 2 are a lane's floats of the first strip, words 3 to 5 those of the second. A warp's words 0 to
    word 1   b3 b2 b1 d2        3 are 512 bytes side by side, 16 of each lane; 4 and 5 are the next 256, 8 of each lane.
    word 2   c3 c2 c1 d3

It is a quarter less to write where an SM writes 32 bytes a cycle, 128 KB of 64 rows, at the end of a call (H200: 1 us of 43 for 128 heads
and 65,536 tokens). Of a job in two pieces O stays as it was: the one that ends last takes its own from registers, and results must not
depend on which one that is.
"""

import numpy as np

from .. import ptx
from .hopper_config import STRIP_BYTES, inline

u32, u64 = np.uint32, np.uint64

# A lane's words of a strip, of both strips, and the bytes of all lanes.
STRIP_WORDS = 3
PAIR_WORDS = 2 * STRIP_WORDS
PAIR_BYTES = 32 * 4 * PAIR_WORDS
ALL_BUT_LAST = 0xFFFFFF00
# Selectors of `prmt`: bytes 3 to 1 of the first word over byte 1, 2 or 3 of the second; and d's bytes out of three words, in two steps.
OVER_1, OVER_2, OVER_3 = 0x3215, 0x3216, 0x3217
LAST_OF_TWO, LAST_OF_THREE = 0x0400, 0x4210


@inline
def words_4_and_5(lane_address, lane):
    """Where a lane's last two words lie, if `lane_address` is where its first four do."""
    return lane_address + u64(u32(STRIP_BYTES) - lane * u32(8))


@inline
def pack(a, b, c, d):
    """Three words of four floats."""
    last = ptx.bits_of_f32(d)
    return (ptx.prmt(ptx.bits_of_f32(a), last, u32(OVER_1)), ptx.prmt(ptx.bits_of_f32(b), last, u32(OVER_2)),
            ptx.prmt(ptx.bits_of_f32(c), last, u32(OVER_3)))


@inline
def unpack(floats_rmem, first, words_rmem, word):
    """Four floats, from floats_rmem[first] on, of the three words from words_rmem[word] on."""
    for i in range(STRIP_WORDS):
        floats_rmem[first + i] = ptx.f32_of_bits(words_rmem[word + i] & u32(ALL_BUT_LAST))
    last = ptx.prmt(ptx.prmt(words_rmem[word], words_rmem[word + 1], u32(LAST_OF_TWO)), words_rmem[word + 2], u32(LAST_OF_THREE))
    floats_rmem[first + STRIP_WORDS] = ptx.f32_of_bits(last & u32(ALL_BUT_LAST))


@inline
def store_pair(lane_address, last_address, one_rmem, i, other_rmem, j):
    """Floats i to i + 3 of one strip and j to j + 3 of another."""
    w0, w1, w2 = pack(one_rmem[i], one_rmem[i + 1], one_rmem[i + 2], one_rmem[i + 3])
    w3, w4, w5 = pack(other_rmem[j], other_rmem[j + 1], other_rmem[j + 2], other_rmem[j + 3])
    ptx.st_global_v4_b32(lane_address, w0, w1, w2, w3)
    ptx.st_global_v2_b32(last_address, w4, w5)


@inline
def load_pair(words_rmem, word, lane_address, last_address):
    """A lane's words to words_rmem[word:word + PAIR_WORDS]."""
    ptx.ld_global_v4_b32(words_rmem, word, lane_address)
    ptx.ld_global_v2_b32(words_rmem, word + 4, last_address)
