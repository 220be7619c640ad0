"""Names of element types, and the types that kernels see them as: Numba has no bfloat16 arrays, so those travel as bit patterns."""

import ml_dtypes
import numpy as np

# Name -> the NumPy type that a caller's array has.
NUMPY_DTYPE = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
}
# Name -> the NumPy type that a kernel is given.
STORAGE_DTYPE = {**NUMPY_DTYPE, "bfloat16": np.dtype(np.uint16)}
