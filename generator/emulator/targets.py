"""The emulated targets: what a CTA may have, and instructions that ptxas takes for sm_100a and refuses for sm_90a (a
kernel that has one could not have been compiled).

`check` looks at a module once, when it is loaded. The patterns are those of the instruction table's spellings: where
there is a ptxas, test_ptxas.py holds them against what it says of every one.
"""

from __future__ import annotations

import re

from .errors import LaunchError
from .syntax import Instr, Module

SMEM_LIMIT = {"sm_90a": 232448, "sm_100a": 232448}  # opt-in shared memory a CTA, CUDA programming guide, table 27

NEEDS_SM_100 = re.compile(
    r"tcgen05\.|clusterlaunchcontrol\."
    r"|.*\.cta_group::[12]\b|.*\.f32x2\b"  # tensor copies for a CTA pair; two floats at once
    r"|(?:add|sub|fma)\..*\bf32\.b?f16$|redux\..*\.f32$"
    r"|(?:ld|st)\.(?:.*\.)?(?:v8\.[busf]32|v4\.[busf]64)$"  # 32 bytes a lane
    r"|cvt\.r[nz]\.satfinite\.(?:relu\.)?tf32\.|cvt\..*\b(?:e2m3|e3m2)x2\b"
    r"|tensormap\.replace\..*swizzle_atomicity"
)


def needs_sm_100(instr: Instr) -> bool:
    """Whether ptxas refuses the instruction for sm_90a. Three operands of min and max are such a case, too."""
    if NEEDS_SM_100.match(instr.opcode):
        return True
    return instr.opcode.startswith(("min.", "max.")) and len(instr.operands) > 3


def check(module: Module) -> None:
    """Raises LaunchError for the first instruction that the module's target does not have."""
    if not module.target.startswith("sm_90"):
        return
    for kernel in module.kernels.values():
        for instr in kernel.instrs:
            if needs_sm_100(instr):
                operands = f" with {len(instr.operands) - 1} sources" if instr.opcode.startswith(("min", "max")) else ""
                raise LaunchError(
                    f"PTX line {instr.line} ({instr.opcode}): {module.target} has no such instruction{operands}, it "
                    "needs sm_100a: compile the program for sm_100a (--arch sm_100a), or write it without"
                )
