"""A case's calls of this package, or of another checkout's."""

from types import ModuleType
from typing import Any

from perf.inputs import Inputs


def make_plan(package: ModuleType, inputs: Inputs, backend: str, **knobs: bool) -> Any:
    """Told the longest request, as a server knows it."""
    case = inputs.case
    return package.plan_decode(
        inputs.seq_lens, num_heads_q=case.num_heads_q, seq_len_q=case.seq_len_q, num_heads_kv=case.num_heads_kv, page_size=case.page_size,
        head_dim_qk=case.head_dim_qk, head_dim_v=case.head_dim_v, dtype=case.dtype, causal=case.causal, backend=backend,
        num_workers=case.num_workers, max_seq_len=max(case.seq_lens), **knobs)


def decode(package: ModuleType, inputs: Inputs, plan: Any, backend: str, **knobs: bool) -> tuple[Any, Any]:
    """out, lse; without a plan the call plans for itself."""
    result: tuple[Any, Any] = package.mla_decode(
        *inputs.arrays, head_dim_v=inputs.case.head_dim_v, causal=inputs.case.causal, plan=plan, backend=backend, **knobs)
    return result
