"""The arrays of a case, made once for all contenders: normal values, pages in random order.

q and K are N(0, 1), so logits have standard deviation 1 with the default scale. In torch on the GPU where torch is there, since the peers
take its tensors; else by NumPy, uploaded through Numba.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_numba.dtypes import NUMPY_DTYPE, STORAGE_DTYPE
from perf.cases import Case, block_table
from verify.targets import to_numpy

LIBRARIES = ("torch", "numba", "numpy")
# NumPy draws normal numbers slowly: so many bytes of them, which the pages of a larger cache repeat.
POOL_BYTES = 2**26


@dataclass(frozen=True)
class Inputs:
    """q, kv_cache, block_table and seq_lens in the contract's shapes, as arrays of `library`; block_table_host is NumPy's copy."""

    case: Case
    library: str
    q: Any
    kv_cache: Any
    block_table: Any
    seq_lens: Any
    block_table_host: np.ndarray
    kv_cache_host: np.ndarray | None    # None where `library` can gather pages itself

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        return self.q, self.kv_cache, self.block_table, self.seq_lens

    def pages(self, request: int) -> np.ndarray:
        """The pages of a request, in order, in host memory."""
        columns = -(-self.case.seq_lens[request] // self.case.page_size)
        ids = self.block_table_host[request, :columns]
        if self.kv_cache_host is not None:
            return self.kv_cache_host[ids]
        import torch

        return to_numpy(self.kv_cache[torch.as_tensor(ids, device=self.kv_cache.device).long()], self.case.dtype)


def make_inputs(case: Case, library: str, seed: int = 0) -> Inputs:
    """The inputs of a case; `library` is one of `LIBRARIES`."""
    rng = np.random.default_rng(seed)
    table, num_pages = block_table(case, rng)
    seq_lens = np.array(case.seq_lens, np.int32)
    q_shape = case.batch, case.seq_len_q, case.num_heads_q, case.head_dim_qk
    kv_shape = num_pages, case.page_size, case.num_heads_kv, case.head_dim_qk
    if library == "torch":
        import torch

        options = {"device": "cuda", "dtype": getattr(torch, case.dtype), "generator": torch.Generator("cuda").manual_seed(seed)}
        return Inputs(case, library, torch.randn(q_shape, **options), torch.randn(kv_shape, **options),
                      torch.as_tensor(table, device="cuda"), torch.as_tensor(seq_lens, device="cuda"), table, None)
    q = rng.standard_normal(q_shape, np.float32).astype(NUMPY_DTYPE[case.dtype])
    kv_cache = _tiled_normal(kv_shape, case.dtype, rng)
    if library == "numpy":
        return Inputs(case, library, q, kv_cache, table, seq_lens, table, kv_cache)
    from numba import cuda

    device = [cuda.to_device(array.view(STORAGE_DTYPE[str(array.dtype)])) for array in (q, kv_cache, table, seq_lens)]
    return Inputs(case, library, *device, table, kv_cache)


def _tiled_normal(shape: tuple[int, int, int, int], dtype: str, rng: np.random.Generator) -> np.ndarray:
    result = np.empty(shape, NUMPY_DTYPE[dtype])
    pool_pages = max(1, min(shape[0], POOL_BYTES * shape[0] // result.nbytes))
    pool = rng.standard_normal((pool_pages, *shape[1:]), np.float32).astype(result.dtype)
    for begin in range(0, shape[0], pool_pages):
        part = result[begin:begin + pool_pages]
        part[:] = pool[:len(part)]
    return result
