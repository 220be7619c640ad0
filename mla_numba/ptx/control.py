"""Registers of a warpgroup, programmatic dependent launch, parameters of a kernel."""

from functools import cache
from typing import Any

from .instruction import instruction, u64


@cache
def make_setmaxnreg(action: str, count: int) -> Any:
    """The intrinsic for `action` "inc" or "dec" and `count` registers a thread, a multiple of 8."""
    @instruction(f"setmaxnreg.{action}.sync.aligned.u32 {count};")
    def setmaxnreg() -> None:
        """`setmaxnreg`: by a warpgroup; gives registers back, or waits until there are so many. PTX ISA 9.7.19.5."""

    return setmaxnreg


@instruction("griddepcontrol.wait;")
def griddepcontrol_wait() -> None:
    """`griddepcontrol.wait`: waits until the grids before this one have ended and their memory is visible. PTX ISA 9.7.13.13."""


@instruction("griddepcontrol.launch_dependents;")
def griddepcontrol_launch_dependents() -> None:
    """`griddepcontrol.launch_dependents`: the next grid may start once every block has said so or ended. PTX ISA 9.7.13.13."""


@instruction(r".pragma \22nounroll\22;")
def nounroll() -> None:
    """`.pragma "nounroll"`: no instruction; as the first in a loop, keeps the assembler from unrolling it. PTX ISA 11.9.1."""


@cache
def make_parameter_address(idx: int) -> Any:
    """The intrinsic for parameter `idx` of the kernel, where each element of a tuple is a parameter."""
    @instruction(f"cvta.param.u64 <result>, <kernel>_param_{idx};", pure=True)
    def parameter_address() -> u64:
        """`cvta.param`: by any thread, in the kernel's own body; where the parameter lies. Orders nothing. PTX ISA 9.7.9.20."""

    return parameter_address
