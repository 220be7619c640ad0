"""Decode inside `torch.compile`, in one graph: as an operator, which Dynamo does not look into. Needs torch, with a GPU or without.

    python examples/torch_compile.py
"""

import importlib.util

import mla_numba

NUM_HEADS, HEAD_DIM_V, PAGE_SIZE, MAX_PAGES, HIDDEN = 16, 512, 64, 4, 256


def main():
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: there is nothing to compile"
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Operators take tensors and numbers: the plan of the step lies here. Where torch makes CUDA graphs (mode="reduce-overhead"), leave it
    # out: replays would go by the tables of the step that was captured, where a call without a plan plans anew in each.
    plan_of = {}

    @torch.library.custom_op("mla_numba_example::decode", mutates_args=())
    def decode(q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor,
               seq_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mla_numba.mla_decode(q, kv_cache, block_table, seq_lens, plan=plan_of["step"])

    @decode.register_fake
    def _(q, *_):
        batch, seq_len_q, num_heads_q, _ = q.shape
        return q.new_empty(batch, seq_len_q, num_heads_q, HEAD_DIM_V), q.new_empty(batch, num_heads_q, seq_len_q, dtype=torch.float32)

    batch = 3
    num_pages = batch * MAX_PAGES
    block_table = torch.randperm(num_pages, device=device).reshape(batch, MAX_PAGES).to(torch.int32)
    kv_cache = torch.randn(num_pages, PAGE_SIZE, 1, 576, device=device).to(torch.bfloat16)
    w_q = torch.randn(HIDDEN, NUM_HEADS * 576, device=device).to(torch.bfloat16) / HIDDEN**0.5
    w_o = torch.randn(NUM_HEADS * HEAD_DIM_V, HIDDEN, device=device).to(torch.bfloat16)

    def layer(hidden, seq_lens):
        q = (hidden @ w_q).unflatten(-1, (NUM_HEADS, 576))
        out, _ = decode(q, kv_cache, block_table, seq_lens)
        return hidden + out.flatten(2) @ w_o

    # Any backend will do. With fullgraph=True torch raises an error if it has to leave the graph.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ([200, 70, 3], [201, 71, 4]):
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        plan_of["step"] = mla_numba.plan_decode(seq_lens, num_heads_q=NUM_HEADS, max_seq_len=max(lengths))
        hidden = torch.randn(batch, 1, HIDDEN, device=device).to(torch.bfloat16)
        assert torch.equal(compiled(hidden, seq_lens), layer(hidden, seq_lens))
    return f"a layer compiled in one graph for {device}; two steps, other lengths, bitwise equal to eager calls"


if __name__ == "__main__":
    print(main())
