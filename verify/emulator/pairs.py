"""(case, schedule) pairs: a decode that is drawn, on a machine whose chances are drawn, and one line that runs it again."""

from dataclasses import dataclass

from hypothesis import strategies as st

from verify.cases import MLACase
from verify.checks import assert_within
from verify.strategies import EMULATED, mla_cases

from .device import EmulatedGpu, decode
from .findings import Finding
from .language import Edits

DTYPES = ("bfloat16", "float16")
# The merge kernel's other way, for jobs of many parts, with few.
FEW_PARTS_2: Edits = {"mla_numba.kernels.hopper_merge": [("FEW_PARTS = 16", "FEW_PARTS = 2")]}


@dataclass(frozen=True)
class Schedule:
    """What decides, besides the case: the machine's chances, how many SMs the work is cut for, which way short merges go."""

    seed: int
    num_sms: int = 2
    few_parts: bool = True

    def gpu(self, edits: Edits | None = None) -> EmulatedGpu:
        return EmulatedGpu(self.seed, num_sms=self.num_sms, edits=edits or (None if self.few_parts else FEW_PARTS_2))

    @property
    def options(self) -> str:
        return f"--seed {self.seed} --num-sms {self.num_sms}{'' if self.few_parts else ' --many-parts'}"


class PairFailure(AssertionError):
    """A pair failed; the message ends with the line that runs it again."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def pairs() -> st.SearchStrategy[tuple[MLACase, Schedule]]:
    schedules = st.builds(Schedule, st.integers(0, 2 ** 16), st.sampled_from((1, 2, 3, 5)), st.booleans())
    return st.tuples(mla_cases(EMULATED, ragged=True, dtypes=DTYPES), schedules)


def check(case: MLACase, schedule: Schedule, edits: Edits | None = None) -> float:
    """Run a pair; returns the worst error / bound.

    Raises
    ------
    PairFailure
        The machine found something (its kind is the failure's), or a result is wrong ("wrong").
    NotImplementedError
        The backend refuses the case.
    """
    inputs = case.build()
    out, lse, out_bound, lse_bound = inputs.bounds()
    try:
        got_out, got_lse = decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, inputs.head_dim_v, inputs.softmax_scale,
                                  inputs.causal, cu_seqlens_q=inputs.cu_seqlens_q, device=schedule.gpu(edits))
        return max(assert_within("lse", got_lse, lse, lse_bound), assert_within("out", got_out, out, out_bound))
    except (Finding, AssertionError) as error:
        kind = error.kind if isinstance(error, Finding) else "wrong"
        raise PairFailure(kind, f"{error}\n    python -m verify.emulator replay \"{case}\" {schedule.options}") from error
