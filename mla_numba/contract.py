"""The fixed numbers and names of the contract: what callers, kernels and tests agree on (docs/contract.md says it in words)."""

import math

# DeepSeek-V2/V3 and Kimi K2: one latent vector per token, its first 512 columns serve as V, the last 64 carry RoPE.
HEAD_DIM_LATENT = 512
HEAD_DIM_ROPE = 64
HEAD_DIM_QK = HEAD_DIM_LATENT + HEAD_DIM_ROPE
HEAD_DIM_V = HEAD_DIM_LATENT

DTYPES = ("bfloat16", "float16", "float32")
BACKENDS = ("hopper", "simt", "cpu")

# lse of a query row that sees no token; its out is exactly 0.
EMPTY_LSE = {"+inf": math.inf, "-inf": -math.inf}

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

# With batch_invariant=True a request is cut every so many tokens, whatever else is in the batch.
INVARIANT_SPLIT_TOKENS = 1024
