"""The instruction table: one entry an instruction, with the section of the PTX ISA that it implements.

Two kinds of entry:

`@alu(names, signature, isa)`   a pure elementwise function of NumPy arrays. The translator may call it on any batch of
                                warps, and twice for a packed pair of float32.
`@effect(names, signature, isa)` a function `f(machine, warps, active, instr, *sources)` that touches state and returns
                                its destination values (one, a tuple, or None).

`names` expands braces, so that every legal spelling stands in the table by itself: "st.shared{::cta,}.{b32,u32}". Where
qualifiers multiply into tens of thousands of spellings (loads, stores, atomics), `@family` keeps the patterns as they
are, and `find` matches an opcode with them.
A signature lists the operands in PTX order, destinations first, as `dest,dest=source,source`:
    p predicate   h,i u16,s16   u,s,f u32,s32,f32   U,S,d u64,s64,f64   2 a pair of f32 in 64 bits   e float16
    a address → an integer array   T tensor address → (u64 address, coordinates)   k immediate → a Python number
    x address or 64-bit descriptor → ("tmem" | "desc", array)
    a leading `*` makes a vector operand, a leading `?` an optional one (as a second destination: the p of `d|p`),
    `_` in a destination is dropped
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

RESULT = "$result"  # ends the name of an instruction's second half, which the parser writes
BITS = {"p": 1, "h": 16, "i": 16, "e": 16, "u": 32, "s": 32, "f": 32, "U": 64, "S": 64, "d": 64, "2": 64}


@dataclass(frozen=True)
class Entry:
    """One instruction: what executes it, how its operands are read, where the ISA defines it."""

    name: str
    run: Callable
    dests: tuple[str, ...]
    sources: tuple[str, ...]
    isa: str
    pure: bool
    starts_block: bool = False  # the scheduler may stop a warp before it (a wait that can fail)
    ends_block: bool = False  # the scheduler regains control after it
    in_flight: bool = False  # wgmma: D is also a source, and its registers are in use until a wait


TABLE: dict[str, Entry] = {}
FAMILIES: dict[str, list[Entry]] = {}  # by mnemonic; an entry's name is its pattern
_seen: dict[str, Entry] = {}


@cache
def _parts(pattern: str) -> tuple[tuple[str, ...], ...]:
    split = enumerate(re.split(r"\{([^{}]*)\}", pattern))
    return tuple(tuple(part.split(",")) if i % 2 else (part,) for i, part in split if i % 2 or part)


def expand(pattern: str) -> list[str]:
    """ "a{b,c}d{,e}" → ["abd", "abde", "acd", "acde"]."""
    return ["".join(choice) for choice in itertools.product(*_parts(pattern))]


def _spells(parts: tuple[tuple[str, ...], ...], name: str) -> bool:
    """Whether a pattern expands to `name`."""
    if not parts:
        return not name
    return any(name.startswith(choice) and _spells(parts[1:], name[len(choice) :]) for choice in parts[0])


def _signature(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    dests, sources = text.split("=")
    return tuple(d for d in dests.split(",") if d), tuple(s for s in sources.split(",") if s)


def find(opcode: str) -> Entry | None:
    """The entry of an opcode, None for one that the table does not know."""
    found = TABLE.get(opcode)
    if found is None:
        found = _seen.get(opcode)
    if found is None:
        for entry in FAMILIES.get(opcode.split(".")[0], ()):
            if _spells(_parts(entry.name), opcode):
                found = _seen[opcode] = replace(entry, name=opcode)
                break
    return found


def _register(names: str, run: Callable, signature: str, isa: str, pure: bool, **flags) -> None:
    dests, sources = _signature(signature)
    for pattern in names.split():
        for name in expand(pattern):
            if name in TABLE:
                raise ValueError(f"the instruction table holds {name} twice")
            TABLE[name] = Entry(name, run, dests, sources, isa, pure, **flags)


def alu(names: str, signature: str, isa: str) -> Callable:
    """Register a pure elementwise instruction."""

    def decorate(run: Callable) -> Callable:
        _register(names, run, signature, isa, True)
        return run

    return decorate


def effect(names: str, signature: str, isa: str, **flags) -> Callable:
    """Register an instruction with effects on memory, barriers or the schedule."""

    def decorate(run: Callable) -> Callable:
        _register(names, run, signature, isa, False, **flags)
        return run

    return decorate


def family(names: str, signature: str, isa: str) -> Callable:
    """Register an instruction with effects under patterns that are matched, not listed."""
    dests, sources = _signature(signature)

    def decorate(run: Callable) -> Callable:
        for pattern in names.split():
            mnemonic = re.match(r"\w+", pattern)[0]
            FAMILIES.setdefault(mnemonic, []).append(Entry(pattern, run, dests, sources, isa, False))
        return run

    return decorate
