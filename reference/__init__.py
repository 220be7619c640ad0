"""The float64 oracle of MLA decode: dense, dull, NumPy and the standard library only. It knows nothing of mla_numba."""

from reference.mla import merge_states_ref, mla_decode_ref
from reference.rounding import mla_decode_emulated, round_to

__all__ = ["merge_states_ref", "mla_decode_emulated", "mla_decode_ref", "round_to"]
