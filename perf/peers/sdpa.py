"""PyTorch's scaled_dot_product_attention on K and V that were gathered beforehand: its best case, as it knows no pages."""

# Every peer has the same methods, whether it needs all their arguments or not.
# ruff: noqa: ARG002

from collections.abc import Callable
from typing import Any

from perf.cases import Case
from perf.inputs import Inputs
from perf.peers.base import Peer, version_of, why_no_gpu

# Beyond it the gathered copy, and the scores that its plain path keeps, say more about memory than about attention.
_MOST_TOKENS = 32768


class Sdpa(Peer):
    name = "sdpa"

    def available(self) -> str | None:
        return why_no_gpu()

    def version(self) -> str:
        return version_of(None, "torch")

    def supports(self, case: Case) -> str | None:
        if case.varlen or case.seq_len_q != 1 or case.num_heads_kv != 1:
            return "equal lengths, one query and one KV head only"
        if sum(case.seq_lens) > _MOST_TOKENS:
            return f"more than {_MOST_TOKENS} tokens to gather"
        return None

    def prepare(self, inputs: Inputs, variant: str) -> Callable[[], Any]:
        import torch

        case = inputs.case
        length = case.seq_lens[0]
        k = inputs.kv_cache[inputs.block_table.long()].view(case.batch, 1, -1, case.head_dim_qk)[:, :, :length].contiguous()
        v = k[..., :case.head_dim_v].contiguous()
        # Heads that share K and V are as good as queries: (batch, 1, heads, dim).
        return lambda: torch.nn.functional.scaled_dot_product_attention(inputs.q, k, v, scale=case.head_dim_qk**-0.5)

    def result(self, raw: Any, inputs: Inputs) -> tuple[Any, None]:
        return raw, None
