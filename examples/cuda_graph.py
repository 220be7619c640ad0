"""A decoding step as a CUDA graph: captured once, replayed with other lengths. Needs torch and an NVIDIA GPU.

    python examples/cuda_graph.py
"""

import importlib.util

import mla_numba

NUM_LAYERS, NUM_HEADS, PAGE_SIZE, MAX_PAGES = 2, 128, 64, 16


def main():
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: there is nothing to capture"
    import torch

    if not torch.cuda.is_available():
        return "torch finds no GPU: there is nothing to capture"

    seq_lens = torch.tensor([1000, 70, 3], dtype=torch.int32, device="cuda")
    batch = len(seq_lens)
    num_pages = batch * MAX_PAGES
    block_table = torch.randperm(num_pages, device="cuda").reshape(batch, MAX_PAGES).to(torch.int32)
    caches = [torch.randn(num_pages, PAGE_SIZE, 1, 576, device="cuda").to(torch.bfloat16) for _ in range(NUM_LAYERS)]
    q = torch.randn(batch, 1, NUM_HEADS, 576, device="cuda").to(torch.bfloat16)

    def step():
        """The plan is part of the graph: each replay plans anew, for the lengths that it finds. None may be above max_seq_len."""
        plan = mla_numba.plan_decode(seq_lens, num_heads_q=NUM_HEADS, max_seq_len=MAX_PAGES * PAGE_SIZE)
        return [mla_numba.mla_decode(q, kv_cache, block_table, seq_lens, plan=plan) for kv_cache in caches]

    step()      # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([1000, 70, 3], [1001, 71, 4], [1, 1024, 500]):
        seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        for (out, lse), (eager_out, eager_lse) in zip(captured, step(), strict=True):
            assert torch.equal(out, eager_out) and torch.equal(lse, eager_lse)
    return f"{NUM_LAYERS} layers captured on {torch.cuda.get_device_name()}; three replays, other lengths, bitwise equal to eager calls"


if __name__ == "__main__":
    print(main())
