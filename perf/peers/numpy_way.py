"""What one writes without a library: gather the pages, then matmul, softmax, matmul in float32. The cpu backend's peer."""

# Every peer has the same methods, whether it needs all their arguments or not.
# ruff: noqa: ARG002

from collections.abc import Callable
from typing import Any

import numpy as np

from perf.cases import Case
from perf.inputs import Inputs
from perf.peers.base import Peer


class NumpyWay(Peer):
    name = "numpy"
    library = "numpy"

    def available(self) -> str | None:
        return None

    def version(self) -> str:
        return f"numpy {np.__version__}"

    def supports(self, case: Case) -> str | None:
        return None if case.num_heads_kv == 1 else "one KV head only"

    def prepare(self, inputs: Inputs, variant: str) -> Callable[[], Any]:
        return lambda: _decode(inputs)

    def result(self, raw: Any, inputs: Inputs) -> tuple[Any, Any]:
        return raw


def _decode(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    case = inputs.case
    out = np.empty((case.batch, case.seq_len_q, case.num_heads_q, case.head_dim_v), inputs.q.dtype)
    lse = np.empty((case.batch, case.num_heads_q, case.seq_len_q), np.float32)
    scale = np.float32(case.head_dim_qk**-0.5)
    for request, length in enumerate(case.seq_lens):
        k = inputs.pages(request).reshape(-1, case.head_dim_qk).astype(np.float32)
        for query in range(case.seq_len_q):
            seen = k[:length - (case.seq_len_q - 1 - query if case.causal else 0)]
            scores = inputs.q[request, query].astype(np.float32) @ seen.T * scale
            largest = scores.max(axis=1, keepdims=True)
            p = np.exp(scores - largest)
            total = p.sum(axis=1, keepdims=True)
            out[request, query] = p @ seen[:, :case.head_dim_v] / total
            lse[request, :, query] = (largest + np.log(total))[:, 0]
    return out, lse
