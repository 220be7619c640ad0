"""vLLM's Triton decode kernel, as its TRITON_MLA backend calls it."""

# Every peer has the same methods, whether it needs all their arguments or not.
# ruff: noqa: ARG002

import inspect
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any

from perf.cases import Case
from perf.inputs import Inputs
from perf.peers.base import Peer, import_first, version_of, why_no_gpu, why_no_import, why_not_deepseek

_MODULES = ("vllm.v1.attention.ops.triton_decode_attention", "vllm.attention.ops.triton_decode_attention", "triton_decode_attention")
# Thread blocks that fill a large GPU without splits; below, only many splits are worth their compilation (some seconds each), above few.
_MANY_BLOCKS = 264
_ROWS_PER_BLOCK = 16


class TritonMla(Peer):
    name = "triton"

    def available(self) -> str | None:
        return why_no_gpu() or why_no_import("triton") or why_no_import(*_MODULES)

    def _module(self) -> ModuleType:
        return import_first(*_MODULES)

    def version(self) -> str:
        return f"{version_of(self._module().__file__, 'vllm')}, triton {version('triton')}"

    def supports(self, case: Case) -> str | None:
        if case.seq_len_q != 1:
            return "one query per request only"
        if case.suite.startswith("sweep"):
            return "not in the sweeps: a compilation of some seconds for every number of heads and page size"
        return why_not_deepseek(case)

    def variants(self, case: Case) -> tuple[str, ...]:
        blocks = case.batch * -(-case.num_heads_q // _ROWS_PER_BLOCK)
        return ("4", "8") if blocks >= _MANY_BLOCKS else ("16", "32")

    def tuning_key(self, case: Case) -> Any:
        return case.num_heads_q, case.page_size, self.variants(case)

    def prepare(self, inputs: Inputs, variant: str) -> Callable[[], Any]:
        import torch

        decode, case, num_splits = self._module().decode_attention_fwd, inputs.case, int(variant)
        q = inputs.q[:, 0]
        floats = {"dtype": torch.float32, "device": q.device}
        partials = torch.empty(case.batch, case.num_heads_q, num_splits, case.head_dim_v + 1, **floats)
        # Else it makes the scales in every call, with a copy from the host.
        known = inspect.signature(decode).parameters
        extras = {name: value for name, value in (("k_scale", torch.ones((), **floats)), ("v_scale", torch.ones((), **floats)),
                                                  ("is_mla", True)) if name in known}
        values = inputs.kv_cache[..., :case.head_dim_v]

        def call() -> Any:
            out = torch.empty(case.batch, case.num_heads_q, case.head_dim_v, dtype=q.dtype, device=q.device)
            lse = torch.empty(case.batch, case.num_heads_q, **floats)
            decode(q, inputs.kv_cache, values, out, lse, inputs.block_table, inputs.seq_lens, partials, num_splits, case.head_dim_qk**-0.5,
                   case.page_size, **extras)
            return out, lse

        return call

    def result(self, raw: Any, inputs: Inputs) -> tuple[Any, Any]:
        return raw[0][:, None], raw[1][..., None]
