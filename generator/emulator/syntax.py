"""What PTX text is parsed into: operands, instructions, variables, kernels, modules (PTX ISA 9.1, sections 4 to 6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .lineinfo import Source

TYPE_BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b128": 128, "f16x2": 32, "bf16x2": 32, "bf16": 16}
TYPE_BITS |= {f"{kind}{bits}": bits for kind in "busf" for bits in (16, 32, 64)}


class Reg(NamedTuple):
    """A virtual register: a number unique in its kernel, its name in the text, its width in bits (1 for predicates)."""

    index: int
    name: str
    bits: int


class Imm(NamedTuple):
    """An immediate: an int, or a float with `is_float` (0fXXXXXXXX and 0dXXXXXXXXXXXXXXXX are exact)."""

    value: int | float
    is_float: bool = False


class Special(NamedTuple):
    """A special register such as %tid.x."""

    name: str


class Symbol(NamedTuple):
    """A parameter, a variable or a label, by name."""

    name: str


class Address(NamedTuple):
    """`[base + offset]`, with the coordinates of a tensor copy or further address operands in `more`."""

    base: Reg | Symbol | Imm
    offset: int
    more: tuple = ()


class Vector(NamedTuple):
    """`{a, b, …}`."""

    items: tuple


class Pair(NamedTuple):
    """`d|p`: a destination and its predicate."""

    first: object
    second: object


class Not(NamedTuple):
    """`!p`."""

    reg: Reg


SINK = Symbol("_")


class Instr(NamedTuple):
    """One instruction: its opcode with all modifiers, operands, guard (a register and whether it is negated), PTX
    line.
    """

    opcode: str
    operands: tuple
    guard: Reg | None
    guard_negated: bool
    line: int
    text: str
    source: Source | None = None  # where the PTX carries line information


class Param(NamedTuple):
    """A kernel parameter: size and alignment in bytes, offset in the parameter space."""

    name: str
    size: int
    align: int
    offset: int


@dataclass(frozen=True)
class Variable:
    """A variable of the module in global or constant memory: one number or address (symbol, offset, mask, shift) an
    element, zero where the initializer ends early.
    """

    name: str
    space: str
    nbytes: int
    align: int
    kind: str
    values: tuple
    line: int


@dataclass
class Kernel:
    """One `.entry`: parameters, instructions, labels (name → index of the instruction that follows), shared
    variables.
    """

    name: str
    params: list[Param] = field(default_factory=list)
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    regs: list[Reg] = field(default_factory=list)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → (bytes, align), static
    dynamic_shared: dict[str, int] = field(default_factory=dict)  # name → align
    local: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → (bytes, align), of each thread
    directives: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)  # of its module

    def place_local(self) -> tuple[dict[str, int], int]:
        """Offset of each local variable, and the bytes that a thread needs for all of them."""
        places, offset = {}, 0
        for name, (size, align) in self.local.items():
            places[name] = -(-offset // align) * align
            offset = places[name] + size
        return places, offset


@dataclass
class Module:
    """A PTX module: target, version, its kernels by name, and the source files of `.file` directives."""

    target: str
    version: str
    kernels: dict[str, Kernel]
    files: dict[int, str]
    variables: dict[str, Variable] = field(default_factory=dict)
