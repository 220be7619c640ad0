"""FlashAttention-3's MLA path (q_v), as vLLM builds it; vLLM's default on Hopper.

`vllm.vllm_flash_attn`, or the same two functions in a module `fa3_interface` with the extension `_vllm_fa3_C.abi3.so` beside it.
"""

# Every peer has the same methods, whether it needs all their arguments or not.
# ruff: noqa: ARG002

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from perf.cases import Case
from perf.inputs import Inputs
from perf.peers.base import Peer, import_first, one_line, version_of, why_no_gpu, why_not_deepseek

_EXTENSION = "_vllm_fa3_C.abi3.so"
# Splits; its own choice first.
_VARIANTS = ("auto", "1", "4", "8", "16")


@cache
def _load() -> tuple[ModuleType, Path]:
    """The interface and the extension's file; raises if one of them cannot be loaded."""
    import torch

    module = import_first("vllm.vllm_flash_attn.flash_attn_interface", "fa3_interface")
    extension = Path(str(module.__file__)).with_name(_EXTENSION)
    if not hasattr(torch.ops._vllm_fa3_C, "fwd"):
        if not extension.exists():
            raise FileNotFoundError(f"{extension} is missing (xz -dk {extension}.xz, if that is there)")
        torch.ops.load_library(str(extension))
    return module, extension


class Fa3(Peer):
    name = "fa3"

    def available(self) -> str | None:
        reason = why_no_gpu((9, 0))
        if reason is None:
            try:
                _load()
            except Exception as error:
                reason = one_line(error)
        return reason

    def version(self) -> str:
        return version_of(_load()[1], "vllm")

    def supports(self, case: Case) -> str | None:
        if case.page_size % 16:
            return f"pages of {case.page_size}: it takes multiples of 16"
        if case.num_heads_kv != 1:
            return "one KV head only"
        return why_not_deepseek(case)

    def variants(self, case: Case) -> tuple[str, ...]:
        return _VARIANTS

    def prepare(self, inputs: Inputs, variant: str) -> Callable[[], Any]:
        import torch

        interface, case = _load()[0], inputs.case
        num_splits = 0 if variant == "auto" else int(variant)
        q = inputs.q.view(-1, case.num_heads_q, case.head_dim_qk)
        latent, rope = slice(None, case.head_dim_v), slice(case.head_dim_v, None)
        cu_seqlens_q = torch.arange(0, case.batch + 1, device=q.device, dtype=torch.int32) * case.seq_len_q
        max_seqlen_k = max(case.seq_lens)
        metadata = interface.get_scheduler_metadata(
            batch_size=case.batch, max_seqlen_q=case.seq_len_q, max_seqlen_k=max_seqlen_k, num_heads_q=case.num_heads_q, num_heads_kv=1,
            headdim=case.head_dim_qk - case.head_dim_v, headdim_v=case.head_dim_v, cache_seqlens=inputs.seq_lens, qkv_dtype=q.dtype,
            cu_seqlens_q=cu_seqlens_q, page_size=case.page_size, causal=case.causal, num_splits=num_splits)
        return lambda: interface.flash_attn_varlen_func(
            q=q[..., rope], k=inputs.kv_cache[..., rope], v=inputs.kv_cache[..., latent], q_v=q[..., latent],
            max_seqlen_q=case.seq_len_q, cu_seqlens_q=cu_seqlens_q, max_seqlen_k=max_seqlen_k, seqused_k=inputs.seq_lens,
            block_table=inputs.block_table, softmax_scale=case.head_dim_qk**-0.5, causal=case.causal, return_softmax_lse=True,
            fa_version=3, scheduler_metadata=metadata, num_splits=num_splits)

    def result(self, raw: Any, inputs: Inputs) -> tuple[Any, Any]:
        out, lse = raw
        case = inputs.case
        # (heads, tokens) to (batch, heads, queries).
        return (out.view(case.batch, case.seq_len_q, case.num_heads_q, case.head_dim_v),
                lse.view(case.num_heads_q, case.batch, case.seq_len_q).transpose(0, 1))
