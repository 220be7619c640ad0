"""The GPU gives what the emulator gives, within the bound of one accumulation each. Levels: l1."""

import pytest
from numba import cuda

if cuda.config.ENABLE_CUDASIM:
    pytest.skip("the simulator has no Hopper kernels", allow_module_level=True)

from verify.cases import MLACase
from verify.checks import assert_within
from verify.emulator.device import EmulatedGpu, decode
from verify.emulator.mutants import MANY, NOTHING, ONE, PAIR, SEVERAL
from verify.levels import on_hopper
from verify.targets import ours

pytestmark = on_hopper()

CASES = [case for case, _ in (ONE, PAIR, SEVERAL, MANY, NOTHING)]
CASES += [MLACase(seq_lens=(300, 129), num_heads_q=128, seq_len_q=2, page_size=16, dtype="float16", values="alternating"),
          MLACase(seq_lens=(64, 190), num_heads_q=12, num_heads_kv=4, q_lens=(2, 3), values="large", pages="shuffled")]
# Enough for jobs of one piece, of two, and of more; few, as the emulator is slow.
NUM_WORKERS = 5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_equals_emulator(case: MLACase) -> None:
    inputs = case.build()
    out_bound, lse_bound = inputs.bounds()[2:]
    arrays = (inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, inputs.head_dim_v, inputs.softmax_scale, inputs.causal)
    # Cut for as many workers, of as many row tiles each: the same pieces, merged in the same order.
    device = EmulatedGpu(num_sms=cuda.get_current_device().MULTIPROCESSOR_COUNT)
    out, lse = decode(*arrays, cu_seqlens_q=inputs.cu_seqlens_q, device=device, num_workers=NUM_WORKERS)
    gpu = ours("hopper")
    got_out, got_lse = gpu(inputs, plan=gpu.plan(inputs, NUM_WORKERS))
    assert_within("lse", got_lse, lse, 2 * lse_bound)
    assert_within("out", got_out, out, 2 * out_bound)
