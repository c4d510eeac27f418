"""The clock of a trace: how many cycles things take, in a model. These are not measurements.

The emulator is functional: it knows what waits for what, not how long anything takes. A trace replays what happened
with the figures below, so that overlap or its absence can be seen. Each CTA has a multiprocessor of its own, with four
sub-partitions (warp w issues on number w mod 4), a tensor core that runs matrix products in issue order, and a copy
engine. A sub-partition issues one instruction a cycle to units that work side by side: what keeps the special-function
unit busy leaves the others free. A stretch of instructions takes as long as the busiest unit, or as its longest chain
of dependent instructions. Bank conflicts and caches are not modelled, and PTX is not what the hardware executes, so a
moved or merged instruction may cost nothing there.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from .syntax import Instr, Vector


class Constant(NamedTuple):
    """A figure of the model: its value and unit, and where it comes from ("assumed" where nothing is documented)."""

    value: float
    unit: str
    source: str


_GUIDE = "CUDA C++ programming guide, throughput of native arithmetic instructions, compute capability 9.0 and 10.0"
CONSTANTS = {
    "issue": Constant(1, "cycles a warp-instruction of a sub-partition", "CUDA C++ programming guide: four schedulers"),
    "f32": Constant(32, "results a cycle of a sub-partition (f32, f16x2)", _GUIDE),
    "integer": Constant(16, "results a cycle of a sub-partition (32-bit integer, compare, select, convert)", _GUIDE),
    "special": Constant(4, "results a cycle of a sub-partition (ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh)", _GUIDE),
    "shuffle": Constant(8, "results a cycle of a sub-partition (shfl)", _GUIDE),
    "shared": Constant(
        128, "bytes a cycle of a multiprocessor (ld, st, ldmatrix, stmatrix of any memory)", "32 banks of 4 bytes"
    ),
    "chain": Constant(4, "cycles from an instruction to one that needs its result", "assumed"),
    "chain special": Constant(20, "the same for ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh and shfl", "assumed"),
    "chain memory": Constant(30, "the same for ld, atom and ldmatrix", "assumed"),
    "tmem": Constant(1, "32-bit columns a cycle of a warp (tcgen05.ld, tcgen05.st)", "assumed"),
    "sm_90a": Constant(
        4096, "16-bit FLOP a cycle of a multiprocessor", "989 TFLOP/s dense bf16, 132 multiprocessors, 1.83 GHz (H100)"
    ),
    "sm_100a": Constant(
        8192, "16-bit FLOP a cycle of a multiprocessor", "2.25 PFLOP/s dense bf16, 148 multiprocessors, 1.86 GHz (B200)"
    ),
    "copy": Constant(64, "bytes a cycle of a copy engine, shared by loads and stores", "assumed"),
    "latency": Constant(700, "cycles from the last byte's request to its arrival", "assumed"),
    "signal": Constant(
        20, "cycles from the end of a barrier's phase to the waiting warp's next instruction", "assumed"
    ),
}
SHOWN_AS = "one cycle is shown as one nanosecond"

_SPECIAL = ("ex2.", "lg2.", "rcp.", "rsqrt.", "sqrt.", "sin.", "cos.", "tanh.")
_FREE = ("mov.", "cvta.", "ld.param.", "nop")
_MEMORY = ("ld.", "st.", "ldmatrix.", "stmatrix.", "atom.", "red.")
_FLOAT = re.compile(r"^(add|sub|mul|fma|mad|neg|abs)\.(?:[a-z.]+\.)?(f32x2|f32|f16x2|bf16x2|f16|bf16|f64)$")
_INTEGER = re.compile(r"\.(u|s|b)(8|16|32|64)\b|^(setp|selp|min|max|cvt|set|lop3|prmt|shf|bfe|bfi|not|and|or|xor)\b")
_SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)\.")


def _rate(name: str) -> float:
    return CONSTANTS[name].value


ISSUE, FLOAT, INTEGER, SPECIAL, SHUFFLE, MEMORY = "issue", "float", "integer", "special", "shuffle", "memory"


def issue_cycles(instr: Instr, arch: str) -> float:
    """Cycles for which an instruction of one warp occupies its unit; 0 for moves, which are renamings."""
    return _issue_cycles(instr.opcode, _registers(instr), arch)


@lru_cache(maxsize=4096)
def unit_of(opcode: str) -> str:
    """The unit of an ordinary instruction: a multiprocessor has one for memory, a sub-partition the others."""
    if opcode.startswith(_MEMORY):
        return MEMORY
    if opcode.startswith(_SPECIAL):
        return SPECIAL
    if opcode.startswith("shfl."):
        return SHUFFLE
    if opcode.startswith("mma.") or _FLOAT.match(opcode):
        return FLOAT
    return INTEGER if _is_integer(opcode) else ISSUE


@lru_cache(maxsize=4096)
def chain_cycles(opcode: str) -> float:
    """Cycles from an instruction to one that needs its result; 0 for moves."""
    if opcode.startswith(_FREE):
        return 0
    if opcode.startswith(_MEMORY):
        return _rate("chain memory")
    return _rate("chain special" if opcode.startswith((*_SPECIAL, "shfl.")) else "chain")


def _registers(instr: Instr) -> int:
    return max((len(o.items) for o in instr.operands if isinstance(o, Vector)), default=1)


@lru_cache(maxsize=4096)
def _issue_cycles(opcode: str, registers: int, arch: str) -> float:
    if opcode.startswith(_FREE):
        return 0
    if opcode.startswith("mma."):
        return max(matrix_cycles(opcode, *map(int, _SHAPE.search(opcode).groups()), arch) * 4, 1)
    if opcode.startswith(_MEMORY):
        bits = re.search(r"[bfus](\d+)$", opcode)
        bytes_each = 4 if "matrix" in opcode or bits is None else max(int(bits[1]) // 8, 1)
        return max(32 * bytes_each * registers / _rate("shared"), _rate("issue"))
    if opcode.startswith(_SPECIAL):
        return 32 / _rate("special")
    if opcode.startswith("shfl."):
        return 32 / _rate("shuffle")
    found = _FLOAT.match(opcode)
    if found:
        return 32 / _rate("f32") * (2 if found[2] in ("f32x2", "f64") else 1)
    return 32 / _rate("integer") if _is_integer(opcode) else _rate("issue")


def _is_integer(opcode: str) -> bool:
    return bool(_INTEGER.search(opcode)) and not opcode.startswith(("mbarrier", "cp.", "tcgen05", "bar"))


def matrix_cycles(opcode: str, m: int, n: int, k: int, arch: str) -> float:
    """Cycles of a multiprocessor's tensor core for an m x n x k product of the opcode's types, at the full rate."""
    return 2 * m * n * k / (_rate(arch) * type_factor(opcode))


def type_factor(opcode: str) -> float:
    """Rate of an opcode's operand type relative to 16-bit ones."""
    if "tf32" in opcode:
        return 0.5
    if "mxf4" in opcode:
        return 4
    return 2 if re.search(r"f8f6f4|e4m3|e5m2|\bi8\b|\.[us]8\b", opcode) else 1
