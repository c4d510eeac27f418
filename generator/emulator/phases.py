"""A warp's log → the steps that the clock replays: stretches of ordinary instructions, and effects between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .clock import ISSUE, chain_cycles, issue_cycles, unit_of
from .flow import defs_and_uses
from .lineinfo import LineTable, callees
from .record import Effect, Recording
from .syntax import Instr

TOP = 3  # opcodes that a stretch is described by


@dataclass
class Run:
    """A stretch of instructions of one function."""

    name: str
    instructions: int
    units: Counter  # cycles that each unit works
    chain: float  # cycles of the longest chain of dependent instructions, those of long blocks in a row
    opcodes: Counter  # cycles by opcode, without modifiers after the first
    first: int  # PTX lines
    last: int

    @property
    def cycles(self) -> float:
        """Of a warp that has the sub-partition to itself."""
        return max(self.chain, *self.units.values(), 0)

    def join(self, other: Run) -> None:
        self.units += other.units
        self.chain += other.chain
        self.instructions += other.instructions
        self.opcodes += other.opcodes
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)

    @property
    def top(self) -> str:
        return ", ".join(f"{name} {cycles:g}" for name, cycles in self.opcodes.most_common(TOP))


class Steps:
    """Steps of each warp of a recording, with the functions that its instructions come from where line info tells."""

    def __init__(self, recording: Recording, table: LineTable | None):
        self.recording, self.table = recording, table
        self._functions: dict[int, str] = {}
        self._blocks: dict[tuple, list[Run | int]] = {}

    def of(self, cta: int, warp: int) -> list[Run | Effect]:
        """Neighbouring stretches of one function are one."""
        steps: list[Run | Effect] = []
        for block, effects in _by_block(self.recording.logs[cta, warp]):
            for part in self._parts(block, effects):
                last = steps[-1] if steps else None
                if isinstance(part, int):
                    steps.append(effects[part])
                elif isinstance(last, Run) and last.name in ("", part.name):
                    last.name = part.name
                    last.join(part)
                elif isinstance(last, Run) and not part.name:
                    last.join(part)
                else:
                    steps.append(Run(part.name, 0, Counter(), 0, Counter(), part.first, part.last))
                    steps[-1].join(part)
        return steps

    def _parts(self, block: int, effects: list[Effect]) -> list[Run | int]:
        """The block's stretches, and between them the positions of its effects."""
        key = (block, tuple(id(e.instr) for e in effects))
        found = self._blocks.get(key)
        if found is None:
            found = self._blocks[key] = self._split(block, effects)
        return found

    def _split(self, block: int, effects: list[Effect]) -> list[Run | int]:
        program, parts, at = self.recording.program, [], 0
        chains = _Chains()
        here = program.blocks[block]
        for instr in program.kernel.instrs[here.start : here.stop]:
            if at < len(effects) and effects[at].instr is instr:
                while at < len(effects) and effects[at].instr is instr:  # several lanes of one copy
                    parts.append(at)
                    at += 1
                chains.end()
                continue
            cycles, name = issue_cycles(instr, self.recording.arch), self.function(instr.line)
            opcode, units = ".".join(instr.opcode.split(".")[:1]), Counter()
            if cycles:
                units[ISSUE] += 1
                units[unit_of(instr.opcode)] += cycles - (unit_of(instr.opcode) == ISSUE)
            spent = Counter({opcode: cycles}) if cycles else Counter()
            run = Run(name, 1, units, chains.add(instr), spent, instr.line, instr.line)
            if parts and isinstance(parts[-1], Run) and name in ("", parts[-1].name):
                parts[-1].join(run)
            else:
                parts.append(run)
        return parts

    def function(self, line: int) -> str:
        """Function of the program that a PTX line comes from, empty where nothing tells."""
        if self.table is None:
            return ""
        if line not in self._functions:
            source = self.table.at(line)
            self._functions[line] = "" if source is None else self.table.function(source)
        return self._functions[line]

    def role(self, steps: list[Run | Effect]) -> str:
        """What a warp is for: the function called by the kernel that most of its cycles belong to; else its work."""
        kinds = Counter(s.kind for s in steps if isinstance(s, Effect))
        spent: Counter = Counter()
        for step in steps:
            if isinstance(step, Run):
                spent[step.name] += step.cycles
            else:
                spent[self.function(step.instr.line)] += 1
        best = self._role_by_calls(spent)
        if best:
            return best
        for kind, name in (
            ("mma", "MMA"),
            ("group", "MMA"),
            ("load", "copies in"),
            ("store", "copies out"),
            ("tmem", "tensor memory"),
        ):
            if kinds[kind]:
                return name
        return ""

    def _role_by_calls(self, spent: Counter) -> str:
        source = next(filter(None, map(self.table.at, self._lines())), None) if self.table is not None else None
        if source is None:
            return ""
        path = self.table.files[source.file]
        calls = callees(path)
        kernel = max((name for name in calls if name in self.recording.kernel), key=len, default=None)
        if kernel is None:
            return ""
        scores = []
        for candidate in calls[kernel]:
            reached = _closure(calls, candidate)
            scores.append((sum(cycles for name, cycles in spent.items() if name in reached), -len(reached), candidate))
        covered, _, best = max(scores, default=(0, 0, ""))
        return best if covered > 0.5 * sum(c for name, c in spent.items() if name in calls and name != kernel) else ""

    def _lines(self) -> Iterator[int]:
        return (instr.line for instr in self.recording.program.kernel.instrs)


class _Chains:
    """The longest chain of dependent instructions so far: how much each instruction makes it longer."""

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        """What follows waits for nothing that came before."""
        self._ready: dict[int, float] = {}
        self._longest = 0.0

    def add(self, instr: Instr) -> float:
        results, operands = defs_and_uses(instr)
        done = max((self._ready.get(r.index, 0.0) for r in operands), default=0.0) + chain_cycles(instr.opcode)
        for register in results:
            self._ready[register.index] = done
        longer = max(done - self._longest, 0.0)
        self._longest += longer
        return longer


def _by_block(log: list[int | Effect]) -> Iterator[tuple[int, list[Effect]]]:
    """Each block that ran, with its effects."""
    block, effects = None, []
    for item in log:
        if isinstance(item, int):
            if block is not None:
                yield block, effects
            block, effects = item, []
        else:
            effects.append(item)
    if block is not None:
        yield block, effects


def _closure(calls: dict[str, set[str]], name: str) -> set[str]:
    """A function and every function of its file that it reaches."""
    found, todo = set(), [name]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo.extend(calls.get(one, ()))
    return found
