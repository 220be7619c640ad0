"""(case, schedule) pairs: a decode that is drawn, on a machine whose chances are drawn, and one line that runs it again."""

from dataclasses import dataclass

from hypothesis import strategies as st

from mla_numba.kernels.hopper_config import SWAPPED_ROWS
from verify.cases import MLACase
from verify.checks import assert_within
from verify.strategies import EMULATED, mla_cases

from .device import EmulatedGpu, decode
from .findings import Finding
from .language import Edits

DTYPES = ("bfloat16", "float16")
# Pieces that a thread block merges alone, and of more each of those that share: so few that short cases, too, have a merge that is shared.
FEW_SHARE_PARTS = 1


@dataclass(frozen=True)
class Schedule:
    """What decides, besides the case: the machine's chances, how many SMs the work is cut for, how merges are shared (None: as the
    backend has it), and whether requests come in jobs of 16 rows, as those of short calls do (not where queries are ragged)."""

    seed: int
    num_sms: int = 2
    share_parts: int | None = None
    small_tiles: bool = False

    @property
    def options(self) -> str:
        share_parts = "" if self.share_parts is None else f" --share-parts {self.share_parts}"
        small_tiles = " --small-tiles" if self.small_tiles else ""
        return f"--seed {self.seed} --num-sms {self.num_sms}{share_parts}{small_tiles}"


class PairFailure(AssertionError):
    """A pair failed; the message ends with the line that runs it again."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def pairs() -> st.SearchStrategy[tuple[MLACase, Schedule]]:
    schedules = st.builds(Schedule, st.integers(0, 2 ** 16), st.sampled_from((1, 2, 3, 5)),
                          st.sampled_from((None, FEW_SHARE_PARTS)), st.booleans())
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
    changes = {}
    if schedule.share_parts is not None:
        changes = {"merge_alone_parts": schedule.share_parts, "merge_share_parts": schedule.share_parts}
    if schedule.small_tiles and not inputs.ragged:
        changes["rows_per_job"] = min(SWAPPED_ROWS)
    try:
        got_out, got_lse = decode(inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, inputs.head_dim_v, inputs.softmax_scale,
                                  inputs.causal, cu_seqlens_q=inputs.cu_seqlens_q,
                                  device=EmulatedGpu(schedule.seed, num_sms=schedule.num_sms, edits=edits), **changes)
        return max(assert_within("lse", got_lse, lse, lse_bound), assert_within("out", got_out, out, out_bound))
    except (Finding, AssertionError) as error:
        kind = error.kind if isinstance(error, Finding) else "wrong"
        raise PairFailure(kind, f"{error}\n    python -m verify.emulator replay \"{case}\" {schedule.options}") from error
