"""FlashMLA's dense decode, `flash_mla`, in any epoch of its Python interface."""

# Every peer has the same methods, whether it needs all their arguments or not.
# ruff: noqa: ARG002

import sys
from typing import Any

from perf.cases import Case
from perf.inputs import Inputs
from perf.peers.base import Peer, import_first, version_of, why_no_gpu, why_no_import, why_not_deepseek


class FlashMla(Peer):
    name = "flashmla"

    def available(self) -> str | None:
        return why_no_gpu((9, 0)) or why_no_import("flash_mla")

    def version(self) -> str:
        module = import_first("flash_mla")
        extension = sys.modules.get("vllm._flashmla_C", module)
        return version_of(extension.__file__, "flash_mla", "vllm")

    def supports(self, case: Case) -> str | None:
        # It answers other dims, and more SMs than its merge has room for, by ending the process.
        if case.page_size != 64:
            return f"pages of {case.page_size}: it has 64 only"
        return why_not_deepseek(case)

    def prepare(self, inputs: Inputs, variant: str) -> Any:
        flash_mla, case = import_first("flash_mla"), inputs.case
        # Today's function ignores its arguments and leaves the schedule to the first call, which is not timed; the older ones made it here.
        metadata, num_splits = flash_mla.get_mla_metadata(inputs.seq_lens, case.seq_len_q * case.num_heads_q // case.num_heads_kv,
                                                          case.num_heads_kv)
        return lambda: flash_mla.flash_mla_with_kvcache(*inputs.arrays, case.head_dim_v, metadata, num_splits, causal=case.causal)

    def result(self, raw: Any, inputs: Inputs) -> tuple[Any, Any]:
        return raw[0], raw[1]
