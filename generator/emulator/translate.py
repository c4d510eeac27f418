"""A kernel → a program: basic blocks, each a Python function `block(m, ws)` over a batch of warps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from . import ops  # noqa: F401  (fills the instruction table)
from .block import BlockWriter
from .errors import UnsupportedInstruction
from .flow import (
    MOVES,
    Block,
    defs_and_uses,
    entry_of,
    find_blocks,
    fold_scale_d,
    registers,
    solve_joins,
    solve_liveness,
)
from .formats import hardware_nan, pack16
from .hot import HotBlocks
from .loads import find_uses, idle
from .memory import LOCAL_BASE, PARAM_BASE, WINDOW_BASE
from .native import BlockText
from .syntax import Instr, Kernel, Reg, Vector
from .table import Entry
from .values import DTYPE


def join64(low, high):
    """Two u32 → u64."""
    return (high.astype(np.uint64) << np.uint64(32)) | low


def low32(x):
    return (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def high32(x):
    return (x >> np.uint64(32)).astype(np.uint32)


def ws_active(ws, guard):
    """Lanes that run a guarded instruction: None for all, False for none, else bool lead + (32,)."""
    if np.all(guard):
        return ws.mask
    active = ws.full(guard) if ws.mask is None else ws.mask & guard
    return active if active.any() else False


@dataclass
class Program:
    """A translated kernel."""

    kernel: Kernel
    blocks: list[Block]
    functions: list[Callable]
    stored: dict[int, Reg]  # registers that need storage between blocks
    paired: set[int]  # 64-bit registers that are stored as two halves
    checked: set[int]  # registers with a shadow bit: some read may come before any write
    params: list[tuple[int, str]]  # parameter loads: offset, NumPy type
    in_flight: set[int]  # registers that some wgmma uses as D or A
    accumulators: list[tuple[int, ...]]  # D registers of wgmma, stored side by side
    joins: np.ndarray  # bool [block, block], see flow.solve_joins
    opcode_counts: list[Counter]  # by block
    static_shared: int
    source: str
    load_sites: dict[int, int]  # number of each tcgen05.ld by PTX line, see `loads`
    idle_loads: frozenset[int]  # PTX lines of those that deliver nothing that is needed
    read: frozenset[int]  # registers that some instruction reads
    hot: HotBlocks | None = None  # machine code for blocks that deserve it; None: there shall be none

    def opcode_at(self, line: int) -> str:
        """Opcode of the first instruction on a PTX line that does more than compute."""
        found = [(entry_of(instr), instr.opcode) for instr in self.kernel.instrs if instr.line == line]
        return next((opcode for entry, opcode in found if entry is not None and not entry.pure), "?")

    def lines_of(self, block: int) -> tuple[int, int]:
        """First and last PTX line of a block."""
        here = self.blocks[block]
        return self.kernel.instrs[here.start].line, self.kernel.instrs[here.stop - 1].line


class Translator:
    """Translates one kernel."""

    SPECIALS = (
        *(
            f"{r}.{a}"
            for r in ("tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid")
            for a in "xyz"
        ),
        "laneid",
        "warpid",
        "nwarpid",
        "smid",
        "nsmid",
        "gridid",
        "clock",
        "clock_hi",
        "clock64",
        "globaltimer",
        "globaltimer_lo",
        "globaltimer_hi",
        "is_explicit_cluster",
        *(f"lanemask_{order}" for order in ("eq", "le", "lt", "ge", "gt")),
        "cluster_ctarank",
        "cluster_nctarank",
        "dynamic_smem_size",
        "total_smem_size",
    )

    def __init__(self, kernel: Kernel, strict: bool = True, wrap: Callable[[Entry], Callable] | None = None):
        """`strict`: with checks of registers that may be unwritten or in flight. `wrap`: gives what is called in place
        of an entry's function, for those who look on.
        """
        self.strict, self.wrap = strict, wrap
        kernel = self.kernel = replace(kernel, instrs=fold_scale_d(kernel))
        self.blocks = find_blocks(kernel)
        solve_liveness(kernel, self.blocks)
        self.exit_block = len(self.blocks)
        self.block_at = {b.start: b.number for b in self.blocks} | {len(kernel.instrs): self.exit_block}
        self.globals: dict[str, object] = {}
        self.constants: dict[tuple, str] = {}
        self.functions: dict[int, str] = {}
        self.infos: dict[int, str] = {}
        self.stored: dict[int, Reg] = {}
        self.params: list[tuple[int, str]] = []
        self.param_slots: dict[tuple[int, str], int] = {}
        self.paired = self._find_paired()
        self.checked = self._find_checked() if strict else set()
        every = [defs_and_uses(instr) for instr in self.kernel.instrs]
        self.undefined = {r.index for _, uses in every for r in uses} - {r.index for defs, _ in every for r in defs}
        self.in_flight, self.d_registers, self.accumulators = self._find_in_flight()
        if not strict:
            self.in_flight = set()
        self.static_shared, self.shared_offsets = self._place_shared()

    def _find_paired(self) -> set[int]:
        """64-bit registers written as two halves are stored as two halves."""
        paired = set()
        for instr in self.kernel.instrs:
            entry = entry_of(instr)
            packs = instr.opcode in MOVES and isinstance(instr.operands[1], Vector)
            if packs or (entry is not None and entry.dests == ("2",)):
                dest = instr.operands[0]
                if isinstance(dest, Reg) and dest.bits == 64:
                    paired.add(dest.index)
        return paired

    def _find_checked(self) -> set[int]:
        """Registers with a read that some path reaches before any write."""
        checked = set()
        for block in self.blocks:
            defined = block.defined_in
            for instr in self.kernel.instrs[block.start : block.stop]:
                defs, uses = defs_and_uses(instr)
                checked.update(r.index for r in uses if not defined >> r.index & 1)
                if instr.guard is None:
                    for r in defs:
                        defined |= 1 << r.index
        return self._spread(checked)

    def _find_in_flight(self) -> tuple[set[int], set[int], list[tuple[int, ...]]]:
        """Registers that some wgmma uses as D or A, those that are D, and the accumulators: indices that share none."""
        used: set[int] = set()
        accumulators: dict[tuple[int, ...], None] = {}
        for instr in self.kernel.instrs:
            entry = entry_of(instr)
            if entry is not None and entry.in_flight:
                used.update(r.index for operand in instr.operands[:2] for r in registers(operand) if r.bits == 32)
                accumulators[tuple(r.index for r in registers(instr.operands[0]))] = None
        apart, taken = [], set()
        for indices in accumulators:
            if taken.isdisjoint(indices) and len(set(indices)) == len(indices):
                apart.append(indices)
                taken.update(indices)
        return used, {index for indices in accumulators for index in indices}, apart

    def _spread(self, checked: set[int]) -> set[int]:
        """Moves hand an unwritten value on (compilers pack an unused half that way): their destinations count too."""
        moves = [defs_and_uses(i) for i in self.kernel.instrs if i.opcode in MOVES]
        grown = True
        while grown:
            grown = False
            for defs, uses in moves:
                if any(u.index in checked for u in uses):
                    fresh = {d.index for d in defs} - checked
                    checked |= fresh
                    grown = grown or bool(fresh)
        return checked

    def _place_shared(self) -> tuple[int, dict[str, int]]:
        """Static shared variables first, dynamic shared memory after them at its alignment, from WINDOW_BASE."""
        offset, places = 0, {}
        for name, (size, align) in self.kernel.shared.items():
            offset = -(-offset // align) * align
            places[name] = offset
            offset += size
        for name, align in self.kernel.dynamic_shared.items():
            start = -(-offset // align) * align if offset else 0
            places[name] = start
        return max(
            (places[n] for n in self.kernel.dynamic_shared), default=offset
        ) if self.kernel.dynamic_shared else offset, places

    def constant(self, value) -> str:
        key = (type(value), value.tobytes())
        if key not in self.constants:
            self.constants[key] = f"K{len(self.constants)}"
            self.globals[self.constants[key]] = value
        return self.constants[key]

    def function(self, entry) -> str:
        key = id(entry.run)
        if key not in self.functions:
            self.functions[key] = f"F{len(self.functions)}_{getattr(entry.run, '__name__', 'op').strip('<>')}"
            self.globals[self.functions[key]] = entry.run if self.wrap is None else self.wrap(entry)
        return self.functions[key]

    def info(self, instr: Instr) -> str:
        if instr.line not in self.infos:
            name = f"I{instr.line}"
            self.infos[instr.line] = name
            self.globals[name] = instr
        elif self.globals[self.infos[instr.line]] is not instr:
            name = f"I{instr.line}_{len(self.globals)}"
            self.globals[name] = instr
            return name
        return self.infos[instr.line]

    def keep(self, index: int) -> None:
        self.stored[index] = self.kernel.regs[index]

    def param_offset(self, name: str, instr: Instr, offset: int = 0, nbytes: int = 0) -> int:
        """Offset in the parameter space of `nbytes` bytes from `offset` on in parameter `name`."""
        for param in self.kernel.params:
            if param.name == name:
                if not 0 <= offset <= param.size - nbytes:
                    raise UnsupportedInstruction(
                        f"PTX line {instr.line}: {nbytes} bytes at offset {offset} of {name}, which has {param.size}"
                    )
                return param.offset + offset
        raise UnsupportedInstruction(f"PTX line {instr.line}: {name} is not a parameter of {self.kernel.name}")

    def param_slot(self, offset: int, kind: str) -> int:
        key = (offset, kind)
        if key not in self.param_slots:
            self.param_slots[key] = len(self.params)
            self.params.append(key)
        return self.param_slots[key]

    def symbol_address(self, name: str, instr: Instr) -> int:
        if name in self.shared_offsets:
            return WINDOW_BASE + self.shared_offsets[name]
        if name in self.kernel.local:
            return LOCAL_BASE + self.kernel.place_local()[0][name]
        return PARAM_BASE + self.param_offset(name, instr)

    def translate(self) -> Program:
        """Write, compile and bind every block."""
        text: list[str] = []
        load_sites, loads_used = find_uses(self.kernel.instrs, self.blocks) if self.strict else ({}, {})
        texts: list[BlockText] = []
        for block in self.blocks:
            writer = BlockWriter(self, block)
            for position in range(block.start, block.stop):
                if position in loads_used:
                    writer.lines.append(f"m.races.settle(ws, {loads_used[position]})")
                writer.instruction(self.kernel.instrs[position])
            writer.finish()
            text.append(
                f"def block_{block.number}(m, ws):\n    R, D, P, ix, put = m.registers, m.defined, "
                "m.params, ws.index, ws.put\n    Q = m.wgmma.busy\n"
            )
            text.append("".join(f"    {line}\n" for line in writer.lines))
            texts.append(BlockText(writer.lines, writer.kinds))
        source = "".join(text)
        for block in self.blocks:  # registers read before any block stored them still need storage
            for index in range(block.live_in.bit_length()):
                if block.live_in >> index & 1:
                    self.keep(index)
        names = {f"T_{k}": t for k, t in DTYPE.items()}
        names |= {
            "join64": join64,
            "low32": low32,
            "high32": high32,
            "where": np.where,
            "TRUE": np.bool_(True),
            "C16": np.uint32(16),
        }
        names |= {"hardware_nan": hardware_nan, "pack16": pack16, "ws_active": ws_active}
        self.globals |= names
        exec(compile(source, f"<ptx {self.kernel.name}>", "exec"), self.globals)
        instrs = self.kernel.instrs
        program = Program(
            self.kernel,
            self.blocks,
            [self.globals[f"block_{b.number}"] for b in self.blocks],
            self.stored,
            self.paired,
            self.checked,
            self.params,
            self.in_flight,
            self.accumulators,
            solve_joins(self.blocks),
            [Counter(i.opcode for i in instrs[b.start : b.stop]) for b in self.blocks],
            self.static_shared,
            source,
            load_sites,
            idle(self.kernel.instrs, self.blocks) if load_sites else frozenset(),
            frozenset(r.index for i in instrs for r in defs_and_uses(i)[1]),
        )
        if self.wrap is not None:
            return program  # whoever wraps instructions wants to see every one
        constants = sorted(f"{name} {value!r}" for name, value in self.globals.items() if name[0] == "K")
        program.hot = HotBlocks(program, "\n".join([source, *constants]), texts, self.globals, self.d_registers)
        return program
