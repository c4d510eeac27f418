"""Hot blocks in machine code: the pure lines of a block's function as LLVM regions between its effects.

A block's text (see `block`) is the source: each line that is a pure expression is run on symbols, what remains is kept
as it is. Values that an effect reads are handed over as NumPy arrays in a scratch memory, what it returns goes there
too. Registers are read and written where they are stored, so that both forms of a block may take turns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .symbolic import Graph, NotTraceable, Symbol
from .values import CANONICAL, DTYPE

_ASSIGN = re.compile(r"(v\d+) = (.+)")
_LOAD = re.compile(r"(v\d+) = ([RD])\[(\d+)\](?:\[([01])\])?\[ix\]")
_PARAM = re.compile(r"(v\d+) = P\[(\d+)\]\.astype\(T_(\w)\)")
_PUT = re.compile(r"put\(([RD])\[(\d+)\](?:\[([01])\])?, (.+)\)")
_NAME = re.compile(r"\bv\d+\b")
_IMPURE = re.compile(r"\b(?:m|ws|R|D|P|ix|put)\b")
_STACKED = re.compile(r"((?:v\d+, )+)= (F\d+_ld_32x32b\(.*\))|(F\d+_st_32x32b\(.*), \(((?:v\d+, )+)\)\)")
_LEAVES = ("input", "load", "param", "const")


@dataclass
class BlockText:
    """A block as its writer left it: lines, and the kind (see `values`) of each name that an effect delivers."""

    lines: list[str]
    kinds: dict[str, str]


@dataclass
class Native:
    """A block's other form: the text of its function and of its regions, and where values lie in the scratch memory.

    `views`: (first unit, NumPy type, how many values side by side, 0 for one). `loops`: symbol → ufunc, types.
    """

    text: str
    ir: str
    views: list[tuple[int, str, int]]
    units: int
    loops: dict[str, tuple[str, str]]
    regions: int


@dataclass
class _Line:
    """One line of the text, as the planner sees it."""

    text: str
    python: bool  # it runs in Python
    stores: list[tuple[Symbol, int]] = field(default_factory=list)  # registers that it writes natively
    forced: list[Symbol] = field(default_factory=list)  # loads that must happen before it


def register_places(stored: dict[int, Any], paired: set[int], checked: set[int]) -> dict[tuple[str, int, int], int]:
    """(R or D, register, half) → place in the table of register addresses."""
    places: dict[tuple[str, int, int], int] = {}
    for index in sorted(stored):
        for half in (0, 1) if index in paired else (0,):
            places["R", index, half] = len(places)
    for index in sorted(checked):
        places["D", index, 0] = len(places)
    return places


class Planner:
    """Turns one block's text into its native form."""

    def __init__(self, block: BlockText, names: dict[str, Any], regs: list, places: dict, volatile: set[int]):
        """`names`: what the text's functions and constants are. `volatile`: registers that an effect may change."""
        self.block, self.names, self.regs, self.places, self.volatile = block, names, regs, places, volatile
        self.graph = Graph()
        self.symbols: dict[str, Symbol | np.generic] = {}
        self.python: set[str] = set()  # names that Python text defines whatever happens
        self.cheap: dict[str, str] = {}  # names that Python can define by itself: its line
        self.lines: list[_Line] = []
        self.changes = 0  # effects so far that may change registers

    # -- reading the text ----------------------------------------------------------------------------------------------
    def read(self) -> None:
        lines = self.block.lines
        trailing = len(lines)  # what stands at the end: registers written, the branch
        while trailing and lines[trailing - 1].startswith(("put(", "m.goto(", "m.branch(", "m.wgmma.used(")):
            trailing -= 1
        for i, text in enumerate(lines):
            if not (self._load(text) or self._param(text) or self._put(text, i >= trailing) or self._pure(text)):
                self._effect(text, i >= trailing)
        self.trailing = trailing

    def _load(self, text: str) -> bool:
        match = _LOAD.fullmatch(text)
        if match is None:
            return False
        name, space, index, half = match[1], match[2], int(match[3]), int(match[4] or 0)
        dtype = np.bool_ if space == "D" else np.uint32 if match[4] else DTYPE[CANONICAL[self.regs[index].bits]]
        place = self.places[space, index, half]
        version = (
            self.changes if place in self.volatile else 0
        )  # the same register, read again after it may have changed
        self.symbols[name] = self.graph.node("load", dtype, extra=(place, version))
        self.cheap[name] = text
        self.lines.append(_Line(text, False))
        return True

    def _param(self, text: str) -> bool:
        match = _PARAM.fullmatch(text)
        if match is None:
            return False
        self.symbols[match[1]] = self.graph.node("param", DTYPE[match[3]], extra=int(match[2]))
        self.cheap[match[1]] = text
        self.lines.append(_Line(text, False))
        return True

    def _put(self, text: str, trailing: bool) -> bool:
        match = _PUT.fullmatch(text)
        if match is None:
            return False
        space, index, half = match[1], int(match[2]), int(match[3] or 0)
        value = self._evaluate(match[4])
        place = self.places.get((space, index, half))
        if not trailing or value is None or place is None or isinstance(value, Symbol) and value.op == "input":
            self._effect(text, trailing)
            return True
        dtype = np.dtype(
            np.bool_ if space == "D" else np.uint32 if match[3] else DTYPE[CANONICAL[self.regs[index].bits]]
        )
        value = self.graph.cast(value, dtype) if not isinstance(value, Symbol) else value
        if value.dtype != dtype:
            raise NotTraceable(f"{text}: {value.dtype}")
        self.lines.append(_Line(text, False, stores=[(value, place)]))
        return True

    def _pure(self, text: str) -> bool:
        match = _ASSIGN.fullmatch(text)
        if match is None or _IMPURE.search(match[2]):
            return False
        value = self._evaluate(match[2])
        if value is None:
            return False
        self.symbols[match[1]] = value
        known = not isinstance(value, Symbol) or value.op in (*_LEAVES, "view")
        if known and all(n in self.cheap or n in self.python for n in _NAME.findall(match[2])):
            self.cheap[match[1]] = text
        self.lines.append(_Line(text, False))
        return True

    def _evaluate(self, expression: str) -> Any:
        """The value of an expression on symbols; None if it cannot be traced."""
        if any(name not in self.symbols for name in _NAME.findall(expression)):
            return None
        try:
            value = eval(expression, self.names, self.symbols)
        except Exception:  # whatever stops the trace: the line stays as it is, and shows its own errors when it runs
            return None
        return value if isinstance(value, (Symbol, np.generic)) else None

    def _effect(self, text: str, trailing: bool = False) -> None:
        forced = []
        if not trailing and ("wgmma" in text or text.startswith("put(")):
            forced = [n for n in self.graph.nodes if n.op == "load" and n.extra == (n.extra[0], self.changes)]
            forced = [n for n in forced if n.extra[0] in self.volatile]  # read before it, and it may change them
            self.changes += 1
        self.lines.append(_Line(text, True, forced=forced))
        head, _, rest = text.partition(" = ")
        if not rest or "(" in head.removeprefix("if ").split(":")[0]:
            return
        for name in _NAME.findall(head.split(":")[-1]):
            self.python.add(name)
            dtype = self._delivered(name, rest)
            if dtype is not None:
                self.symbols[name] = self.graph.node("input", dtype, extra=name)
            else:
                self.symbols.pop(name, None)

    def _delivered(self, name: str, expression: str) -> Any:
        if name in self.block.kinds:
            return DTYPE[self.block.kinds[name]]
        if expression.startswith("m.special["):
            return np.uint32
        window = re.fullmatch(r"m\.window\(ws, (K\d+)\)", expression)
        return self.names[window[1]].dtype if window else None

    # -- regions -------------------------------------------------------------------------------------------------------
    def plan(self, name: str) -> Native:
        self.read()
        needed = self._needed_by_python()
        self._cut(needed)
        self._place(needed)
        return self._write(name, needed)

    def _needed_by_python(self) -> list[list[str]]:
        """For each line, the names that Python reads there; cheap ones become lines of their own."""
        needed: list[list[str]] = []
        cheap: set[str] = set()
        self.reads: set[str] = set()
        for line in self.lines:
            names = []
            if line.python:
                head, _, rest = line.text.partition(" = ")
                reads = line.text if not rest or head.startswith("if ") else rest
                every = dict.fromkeys(_NAME.findall(reads))
                self.reads.update(every)
                names = [n for n in every if n not in self.python]
            needed.append(names)
            cheap.update(n for n in names if n in self.cheap)
        for line in reversed(self.lines):  # what a cheap line reads must be there too
            match = None if line.python else _ASSIGN.fullmatch(line.text)
            if match is not None and match[1] in cheap:
                self.reads.update(_NAME.findall(match[2]))
                cheap.update(n for n in _NAME.findall(match[2]) if n in self.cheap)
                line.python = True
        return [[n for n in names if n not in cheap] for names in needed]

    def _rematerialized(self, node: Symbol) -> bool:
        if node.op == "load":
            return node.extra[0] not in self.volatile
        return node.op in _LEAVES or node.op == "view"

    def _cut(self, needed: list[list[str]]) -> None:
        """Assign each node to the first region that needs it; a region stands before the line that needs it."""
        self.region_of: dict[int, int] = {}
        self.before: dict[int, int] = {}  # line → region
        self.wanted: list[list[Symbol]] = []  # by region: nodes that go to the scratch memory
        self.stores: list[list[tuple[Symbol, int]]] = []
        stores = [s for line in self.lines for s in line.stores]
        first_store = self.trailing if stores else None
        for i, names in enumerate(needed):
            roots = [self.symbols[n] for n in names] + self.lines[i].forced
            if i == first_store:
                later = [self.symbols[n] for after in needed[i:] for n in after]
                roots += [*later, *(value for value, _ in stores)]
            fresh = [r for r in roots if r.number not in self.region_of]
            if not fresh and i != first_store:
                continue
            region = self.before[i] = len(self.wanted)
            self.wanted.append([])
            self.stores.append(stores if i == first_store else [])
            stack = list(fresh)
            while stack:
                node = stack.pop()
                if node.number in self.region_of:
                    continue
                self.region_of[node.number] = region
                stack.extend(node.args)
        self.saved: dict[int, Symbol] = {}
        names = [self.symbols[n] for names in needed for n in names] + [f for line in self.lines for f in line.forced]
        for node in names:
            self._save(node)
        for node in self.graph.nodes:
            mine = self.region_of.get(node.number)
            for arg in node.args if mine is not None else ():
                while self.region_of[arg.number] != mine and arg.op == "view":
                    arg = arg.args[0]
                if self.region_of[arg.number] != mine and not self._rematerialized(arg):
                    self._save(arg)
        for stores, region in zip(self.stores, range(len(self.stores)), strict=True):
            for value, _ in stores:
                while self.region_of[value.number] != region and value.op == "view":
                    value = value.args[0]
                if self.region_of[value.number] != region and not self._rematerialized(value):
                    self._save(value)

    def _save(self, node: Symbol) -> None:
        if node.number not in self.saved:
            self.saved[node.number] = node
            self.wanted[self.region_of[node.number]].append(node)

    def _place(self, needed: list[list[str]]) -> None:
        """Units of the scratch memory; operands that go together side by side."""
        self.units: dict[int, int] = {}
        self.used = 0
        self.views: list[tuple[int, str, int]] = []
        self.stacked: dict[int, int] = {}  # line → number of its view of several values
        for i, line in enumerate(self.lines):
            match = _STACKED.fullmatch(line.text) if line.python else None
            if match is None:
                continue
            nodes = [self.symbols.get(n) for n in _NAME.findall(match[1] or match[4])]
            if not all(isinstance(n, Symbol) and n.dtype == np.uint32 for n in nodes):
                continue
            if len({n.number for n in nodes}) < len(nodes) or any(n.number in self.units for n in nodes):
                continue
            if match[4] and any(n.number not in self.saved for n in nodes):
                continue
            self.stacked[i] = len(self.views)
            self.views.append((self.used, "u4", len(nodes)))
            for node in nodes:
                self._unit(node)

    def _unit(self, node: Symbol) -> int:
        found = self.units.get(node.number)
        if found is None:
            found = self.units[node.number] = self.used
            self.used += 2 if node.dtype.itemsize == 8 else 1
        return found

    def _view(self, node: Symbol) -> int:
        view = (self._unit(node), node.dtype.str, 0)
        if view not in self.views:
            self.views.append(view)
        return self.views.index(view)

    # -- writing -------------------------------------------------------------------------------------------------------
    def _write(self, name: str, needed: list[list[str]]) -> Native:
        from llvmlite import ir  # a process whose blocks are all cold does without

        from .lower import RegionWriter

        module = ir.Module(name)
        loops: dict[str, tuple[str, str]] = {}
        consumed = self._consumed()
        for node in self.graph.nodes:
            if node.number in consumed or node.number in self.saved:
                self._unit(node)
        for region, wanted in enumerate(self.wanted):
            writer = RegionWriter(module, f"{name}_{region}", loops, self.units)
            stores = [(n, "scratch", None) for n in wanted]
            stores += [(n, "register", place) for n, place in self.stores[region]]
            writer.write(stores, lambda n, here=region: n.number in self.saved and self.region_of[n.number] < here)
        text, shown = [], set()
        for i, line in enumerate(self.lines):
            if i in self.before:
                text.append(f"N{self.before[i]}(*A)")
            text += self._hand_over(i, needed[i], shown)
            if not line.python:
                continue
            text += self._python_line(i, line, consumed)
        return Native("\n".join(text), str(module), self.views, self.used, loops, len(self.wanted))

    def _consumed(self) -> set[int]:
        """Inputs that some region reads."""
        found = {value.number for stores in self.stores for value, _ in stores}
        for node in self.graph.nodes:
            if node.number in self.region_of:
                found.update(a.number for a in node.args)
        found.update(self.saved)
        return {n for n in found if self.graph.nodes[n].op == "input"}

    def _hand_over(self, i: int, names: list[str], shown: set[str]) -> list[str]:
        """Values from the scratch memory as arrays of their own: what an effect keeps must not change under it."""
        if i in self.stacked and "_st_" in self.lines[i].text:
            match = _STACKED.fullmatch(self.lines[i].text)
            names = [n for n in names if n not in _NAME.findall(match[4])]
        fresh = [n for n in names if n not in shown]
        shown.update(fresh)
        return [f"{n} = X[{self._view(self.symbols[n])}].copy()" for n in fresh]

    def _python_line(self, i: int, line: _Line, consumed: set[int]) -> list[str]:
        if i in self.stacked:
            match = _STACKED.fullmatch(line.text)
            view = f"X[{self.stacked[i]}]"
            if match[4]:
                return [f"{match[3]}, {view})"]
            names = enumerate(_NAME.findall(match[1]))
            return [f"{view}[...] = {match[2]}", *(f"{n} = {view}[{k}].copy()" for k, n in names if n in self.reads)]
        lines = [line.text]
        head, _, rest = line.text.partition(" = ")
        if rest and not line.text.startswith(("if ", "put(")):
            lines += self._take(_NAME.findall(head.split(":")[-1]), consumed)
        return lines

    def _take(self, names: list[str], consumed: set[int]) -> list[str]:
        found = [(n, self.symbols.get(n)) for n in names]
        return [f"X[{self._view(s)}][...] = {n}" for n, s in found if isinstance(s, Symbol) and s.number in consumed]
