"""MLA decode in Numba: kernels for any machine, one contract, checked against float64.

>>> out, lse = mla_numba.mla_decode(q, kv_cache, block_table, seq_lens)     # docs/contract.md: shapes, dtypes, sentinels
"""

from numba import cuda as _cuda

from .errors import WrongNumbaCuda

__version__ = "0.1.0"

# numba ships an old numba.cuda of its own; numba-cuda replaces it through a .pth file, which is read for site folders only.
if "numba_cuda" not in (_cuda.__file__ or ""):
    raise WrongNumbaCuda(
        f"numba.cuda is {_cuda.__file__}, numba's own copy, but mla_numba needs the package numba-cuda: pip install numba-cuda. "
        "If it lies in a folder on PYTHONPATH, call site.addsitedir on that folder, so that its .pth file is read")

from . import flash_mla
from .api import Plan, merge_states, mla_decode, plan_decode
from .dispatch import available_backends
from .errors import BackendUnavailable, StalePlanError

__all__ = ["BackendUnavailable", "Plan", "StalePlanError", "WrongNumbaCuda", "available_backends", "flash_mla", "merge_states",
           "mla_decode", "plan_decode"]
