"""Mutants of a kernel's PTX: each has one synchronization instruction removed or weakened.

A mutant is PTX text with the lines of the original, so that the lines in what the emulator says are the original's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .body import split_operands
from .parse import parse_ptx, strip_comments
from .syntax import Address, Imm, Instr, Pair, Reg

FENCES = ("fence.", "membar.", "tcgen05.fence", "wgmma.fence", "griddepcontrol.wait")
TX_CHANGE = 16  # bytes: the smallest change that a bulk copy could make


@dataclass(frozen=True)
class Mutant:
    """`kind`: what was done, as the table's row; `opcode`, `line`: to which instruction; `text`: the mutated PTX."""

    kind: str
    line: int
    opcode: str
    change: str  # the statement that replaces it, for people
    text: str

    def __str__(self) -> str:
        return f"PTX line {self.line}, {self.kind}: {self.change or 'removed'}"


class _Statement:
    """An instruction as text that can be taken apart and put together again."""

    def __init__(self, instr: Instr):
        self.instr = instr
        head = re.match(r"(?:@!?\S+\s+)?[a-z][\w.:]*\s*", instr.text)
        self.head = head.group() if head else instr.text
        self.operands = split_operands(instr.text[len(self.head) :])
        self.guard = (re.match(r"@!?\S+\s+", instr.text) or [""])[0]

    def with_operand(self, index: int, text: str, before: str = "", opcode: str | None = None) -> str:
        """The statement with another operand, and what computes it, in a scope of its own."""
        operands = [*self.operands[:index], text, *self.operands[index + 1 :]]
        head = self.head if opcode is None else f"{self.guard}{opcode} "
        statement = f"{head}{', '.join(operands)}"
        return f"{{ {before} {statement}; }}" if before else statement

    def computed(self, index: int, operation: str, amount: int) -> str:
        """The statement with operand `index` put through a 32-bit operation (add, xor) with a constant."""
        value = self.instr.operands[index]
        if isinstance(value, Imm):
            new = int(value.value) + amount if operation == "add" else int(value.value) ^ amount
            return self.with_operand(index, str(new))
        opcode = "add.s32" if operation == "add" else "xor.b32"
        before = f".reg .b32 %mutant; {opcode} %mutant, {self.operands[index]}, {amount};"
        return self.with_operand(index, "%mutant", before)

    def moved(self, index: int, ring: tuple[int, ...], at: frozenset[int], base: int) -> str | None:
        """The statement with the mbarrier at operand `index` replaced by the next one of its ring (offsets from the
        window's `base`), or None where that cannot be spelled.
        """
        address = self.instr.operands[index]
        span = ring[-1] - ring[0] + 8
        if not isinstance(address, Address) or address.more:
            return None
        if not isinstance(address.base, Reg):
            (here,) = at
            step = 8 if here != ring[-1] else 8 - span
            name = getattr(address.base, "name", None)
            return None if name is None else self.with_operand(index, f"[{name}+{address.offset + step}]")
        if address.base.bits != 32:
            return None
        end = base + ring[-1] + 8
        before = (
            f".reg .b32 %mutant, %low; .reg .pred %wraps; add.s32 %mutant, {address.base.name}, {address.offset + 8};"
            f" and.b32 %low, %mutant, 16777215; setp.eq.u32 %wraps, %low, {end};"
            f" @%wraps sub.s32 %mutant, %mutant, {span};"
        )
        return self.with_operand(index, "[%mutant]", before)


class Mutator:
    """Makes every mutant of one kernel.

    Args:
        text: the PTX module. kernel: its name.
        places: PTX line → shared offsets of the mbarriers that the instruction there touched in a run of the original.
        rings: arrays of mbarriers that are known by name: ascending offsets, eight bytes apart.
        base: address of shared offset 0.
    """

    def __init__(
        self, text: str, kernel: str, places: Mapping[int, frozenset[int]], rings: list[tuple[int, ...]], base: int
    ):
        self.text, self.places, self.base = strip_comments(text), places, base
        self.instrs = parse_ptx(text).kernels[kernel].instrs
        self.rings = _join_rings([*rings, *(tuple(sorted(offsets)) for offsets in places.values())])
        self.starts = self._find_starts(kernel)

    def _find_starts(self, kernel: str) -> list[int]:
        """Position in the text of every instruction."""
        lines = [0]
        for match in re.finditer("\n", self.text):
            lines.append(match.end())
        starts, cursor = [], self.text.index(kernel)
        for instr in self.instrs:
            cursor = self.text.index(instr.text, max(cursor, lines[instr.line - 1]))
            starts.append(cursor)
            cursor += len(instr.text)
        return starts

    def mutants(self) -> Iterator[Mutant]:
        """In the order of the text."""
        for instr, start in zip(self.instrs, self.starts, strict=True):
            for kind, change in self._changes(instr):
                text = self.text[:start] + change + self.text[start + len(instr.text) :]
                yield Mutant(kind, instr.line, instr.opcode, change, text)

    def _changes(self, instr: Instr) -> Iterator[tuple[str, str]]:
        for prefix, rules in RULES:
            if instr.opcode.startswith(prefix):
                statement = _Statement(instr)
                for rule in rules:
                    for kind, change in rule(self, statement):
                        if change is not None and change != instr.text:
                            yield kind, change
                return

    def move(self, statement: _Statement, index: int) -> str | None:
        """See _Statement.moved; None also for an mbarrier that has no neighbour in its array."""
        at = self.places.get(statement.instr.line)
        ring = next((ring for ring in self.rings if at and set(ring) >= at), None)
        return None if ring is None or len(ring) < 2 else statement.moved(index, ring, at, self.base)


def _join_rings(rings: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Arrays that share an mbarrier are one; only neighbours eight bytes apart make an array."""
    joined: list[set[int]] = []
    for ring in map(set, rings):
        apart = [other for other in joined if not other & ring]
        joined = [*apart, ring.union(*(other for other in joined if other & ring))]
    tuples = [tuple(sorted(ring)) for ring in joined if ring]
    return [ring for ring in tuples if ring[-1] - ring[0] == 8 * (len(ring) - 1)]


Changes = Iterator[tuple[str, str | None]]
Rule = Callable[[Mutator, _Statement], Changes]


def _removed(kind: str) -> Rule:
    def rule(_, statement: _Statement) -> Changes:
        yield f"{kind} removed", ""

    return rule


def _stage(kind: str, index: int | Callable[[Instr], int]) -> Rule:
    """The mbarrier's address moved to its neighbour in the array."""

    def rule(mutator: Mutator, statement: _Statement) -> Changes:
        at = index if isinstance(index, int) else index(statement.instr)
        yield f"{kind}: stage index off by one", mutator.move(statement, at)

    return rule


def _wait(_, statement: _Statement) -> Changes:
    predicate = statement.operands[0]
    yield "mbarrier wait removed", f"{statement.guard}mov.pred {predicate}, 1"
    yield "mbarrier wait: phase flipped", statement.computed(2, "xor", 1)


def _init_count(_, statement: _Statement) -> Changes:
    yield "mbarrier.init: count + 1", statement.computed(1, "add", 1)
    yield "mbarrier.init: count - 1", statement.computed(1, "add", -1)


def _expect_tx(_, statement: _Statement) -> Changes:
    index = len(statement.operands) - 1
    name = statement.instr.opcode.split(".expect_tx")[0]
    yield f"{name}.expect_tx: bytes + {TX_CHANGE}", statement.computed(index, "add", TX_CHANGE)
    yield f"{name}.expect_tx: bytes - {TX_CHANGE}", statement.computed(index, "add", -TX_CHANGE)
    if name == "mbarrier.arrive":
        plain = statement.instr.opcode.replace(".expect_tx", "")
        yield (
            "mbarrier.arrive.expect_tx: only arrives",
            f"{statement.guard}{plain} {', '.join(statement.operands[:-1])}",
        )


def _group_wait(_, statement: _Statement) -> Changes:
    (pending,) = statement.instr.operands
    kind = _family(statement.instr)
    yield f"{kind}: one group more left", f"{statement.head}{int(pending.value) + 1}"


def _elect(_, statement: _Statement) -> Changes:
    first = statement.instr.operands[0]
    if isinstance(first, Pair):
        lane, predicate = (part.strip() for part in statement.operands[0].split("|"))
        guard = statement.guard
        leader = "" if lane == "_" else f"{guard}mov.b32 {lane}, 0; "
        yield "elect.sync: every lane", f"{leader}{guard}mov.pred {predicate}, 1"


def _barrier_count(_, statement: _Statement) -> Changes:
    if len(statement.operands) > 1:
        kind = _family(statement.instr)
        yield f"{kind}: 32 threads more", statement.computed(1, "add", 32)
        yield f"{kind}: 32 threads less", statement.computed(1, "add", -32)


def _barrier_number(_, statement: _Statement) -> Changes:
    if len(statement.operands) > 1:  # one that only this instruction takes part in may have any number
        yield f"{_family(statement.instr)}: another barrier", statement.computed(0, "xor", 8)


def _barrier_weakened(_, statement: _Statement) -> Changes:
    if len(statement.operands) > 1 and ".sync" in statement.instr.opcode:
        weak = statement.instr.opcode.replace(".sync", ".arrive")
        yield f"{_family(statement.instr)}: only arrives", f"{statement.guard}{weak} {', '.join(statement.operands)}"


def _family(instr: Instr) -> str:
    """The name of an instruction for the table: without state spaces, shapes and types."""
    words = instr.opcode.split(".")
    keep = [
        w for w in words if w not in ("shared", "shared::cta", "cta", "aligned", "b64", "sync", "relaxed", "parity")
    ]
    if words[0] in ("bar", "barrier") and "cluster" not in words:
        return "bar." + ("warp." if "warp" in words else "") + ("sync" if "sync" in words else "arrive")
    return ".".join(keep)


def _any(rule: Callable[[str], Rule]) -> Rule:
    """A rule whose kind is the instruction's family."""

    def named(mutator: Mutator, statement: _Statement) -> Changes:
        yield from rule(_family(statement.instr))(mutator, statement)

    return named


def _tma_barrier(instr: Instr) -> int:
    """The mbarrier is the last address operand of a bulk copy."""
    return max(i for i, operand in enumerate(instr.operands) if isinstance(operand, Address))


def _arrive_address(instr: Instr) -> int:
    return next(i for i, operand in enumerate(instr.operands) if isinstance(operand, Address))


RULES: tuple[tuple[str, tuple[Rule, ...]], ...] = (  # the first prefix that fits
    ("mbarrier.try_wait", (_wait, _stage("mbarrier wait", 1))),
    ("mbarrier.test_wait", (_wait, _stage("mbarrier wait", 1))),
    ("mbarrier.init", (_removed("mbarrier.init"), _init_count)),
    ("mbarrier.inval", (_removed("mbarrier.inval"),)),
    (
        "mbarrier.arrive.expect_tx",
        (_removed("mbarrier.arrive.expect_tx"), _expect_tx, _stage("mbarrier.arrive.expect_tx", _arrive_address)),
    ),
    ("mbarrier.arrive", (_removed("mbarrier.arrive"), _stage("mbarrier.arrive", _arrive_address))),
    ("mbarrier.expect_tx", (_removed("mbarrier.expect_tx"), _expect_tx, _stage("mbarrier.expect_tx", 0))),
    ("cp.async.mbarrier.arrive", (_removed("cp.async.mbarrier.arrive"), _stage("cp.async.mbarrier.arrive", 0))),
    ("tcgen05.commit", (_removed("tcgen05.commit"), _stage("tcgen05.commit", 0))),
    ("tcgen05.wait", (_any(_removed),)),
    *(("cp.async.bulk" + kind, (_any(_removed),)) for kind in (".commit_group",)),
    *((f"{kind}.commit_group", (_any(_removed),)) for kind in ("cp.async", "wgmma")),
    *((f"{kind}.wait_group", (_any(_removed), _group_wait)) for kind in ("cp.async.bulk", "cp.async", "wgmma")),
    ("cp.async.wait_all", (_any(_removed),)),
    *((f"cp.async.bulk.tensor.{rank}d.shared", (_stage("TMA load", _tma_barrier),)) for rank in range(1, 6)),
    ("cp.async.bulk.shared", (_stage("bulk load", _tma_barrier),)),
    *((prefix, (_any(_removed),)) for prefix in FENCES),
    ("elect.sync", (_elect,)),
    ("bar.warp.sync", (_any(_removed),)),
    ("barrier.cluster", (_any(_removed),)),
    ("bar", (_any(_removed), _barrier_weakened, _barrier_count, _barrier_number)),
)
