"""FlashInfer's BatchMLAPagedAttentionWrapper."""

# Every peer has the same methods, whether it needs all their arguments or not.
# ruff: noqa: ARG002

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from perf.cases import Case
from perf.inputs import Inputs
from perf.peers.base import Peer, import_first, version_of, why_no_gpu, why_no_import, why_not_deepseek

_WORKSPACE_BYTES = 128 * 2**20


class FlashInfer(Peer):
    name = "flashinfer"

    def available(self) -> str | None:
        return why_no_gpu() or why_no_import("flashinfer.mla")

    def version(self) -> str:
        return version_of(import_first("flashinfer").__file__, "flashinfer-python", "flashinfer")

    def supports(self, case: Case) -> str | None:
        if case.num_heads_kv != 1:
            return "one KV head only"
        return why_not_deepseek(case)

    def prepare(self, inputs: Inputs, variant: str) -> Callable[[], Any]:
        import torch

        case = inputs.case
        q = inputs.q.view(-1, case.num_heads_q, case.head_dim_qk)
        columns = -(-np.array(case.seq_lens) // case.page_size)
        page_ids = np.concatenate([row[:count] for row, count in zip(inputs.block_table_host, columns, strict=True)])
        indptr = np.concatenate(([0], np.cumsum(columns))).astype(np.int32)
        q_indptr = np.arange(case.batch + 1, dtype=np.int32) * case.seq_len_q
        to_device = {"device": q.device}
        wrapper = import_first("flashinfer.mla").BatchMLAPagedAttentionWrapper(torch.empty(_WORKSPACE_BYTES, dtype=torch.int8, **to_device))
        wrapper.plan(torch.as_tensor(q_indptr, **to_device), torch.as_tensor(indptr, **to_device), torch.as_tensor(page_ids, **to_device),
                     inputs.seq_lens, case.num_heads_q, case.head_dim_v, case.head_dim_qk - case.head_dim_v, case.page_size, case.causal,
                     case.head_dim_qk**-0.5, q.dtype, q.dtype)
        kv = inputs.kv_cache[:, :, 0]
        latent, rope = slice(None, case.head_dim_v), slice(case.head_dim_v, None)
        return lambda: wrapper.run(q[..., latent], q[..., rope], kv[..., latent], kv[..., rope], return_lse=True)

    def result(self, raw: Any, inputs: Inputs) -> tuple[Any, Any]:
        out, lse2 = raw
        case = inputs.case
        return (out.view(case.batch, case.seq_len_q, case.num_heads_q, case.head_dim_v),
                (lse2 * math.log(2)).view(case.batch, case.seq_len_q, case.num_heads_q).transpose(1, 2))
