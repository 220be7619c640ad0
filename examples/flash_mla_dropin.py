"""FlashMLA's README, with one line changed: torch CUDA tensors if there are any here, else NumPy arrays.

    python examples/flash_mla_dropin.py
"""

import ml_dtypes
import numpy as np

from mla_numba import flash_mla  # was: import flash_mla

try:
    import torch

    USE_TORCH = torch.cuda.is_available()
except ImportError:
    USE_TORCH = False

NUM_LAYERS = 2
s_q, h_q, h_kv, d, dv, block_size = 1, 128, 1, 576, 512, 64
cache_seqlens = np.array([1000, 64, 3], np.int32)


def make_inputs(rng):
    """Random values in pages that are shuffled; the arrays as a server would hold them."""
    b, max_blocks = len(cache_seqlens), -(-cache_seqlens.max() // block_size)
    block_table = rng.permutation(b * max_blocks).reshape(b, max_blocks).astype(np.int32)
    arrays = [rng.standard_normal(shape, np.float32) for shape in ((b, s_q, h_q, d), (b * max_blocks, block_size, h_kv, d))]
    if USE_TORCH:
        arrays = [torch.from_numpy(array).to("cuda", torch.bfloat16) for array in arrays]
        return *arrays, *(torch.from_numpy(array).cuda() for array in (block_table, cache_seqlens))
    return *(array.astype(ml_dtypes.bfloat16) for array in arrays), block_table, cache_seqlens


q, kvcache, block_table, lengths = make_inputs(np.random.default_rng(0))

tile_scheduler_metadata, num_splits = flash_mla.get_mla_metadata(lengths, s_q * h_q // h_kv, h_kv)
for layer in range(NUM_LAYERS):
    o_i, lse_i = flash_mla.flash_mla_with_kvcache(
        q, kvcache, block_table, lengths, dv,
        tile_scheduler_metadata, num_splits, causal=True,
    )
    print(f"layer {layer}: {type(o_i).__module__} out {tuple(o_i.shape)} {o_i.dtype}, lse {tuple(lse_i.shape)}")
