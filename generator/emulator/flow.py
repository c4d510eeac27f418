"""Control flow of a kernel: basic blocks, liveness, and which reads may see a register that was never written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .errors import UnsupportedInstruction
from .syntax import Address, Imm, Instr, Kernel, Not, Pair, Reg, Vector
from .table import Entry, find

CONTROL = {"bra", "bra.uni", "ret", "exit"}
SPACES = ("global", "param", "local", "shared", "shared::cta", "shared::cluster")  # generic: the address itself
MOVES = {f"cvta.{way}{space}.u64" for way in ("", "to.") for space in SPACES} | {
    f"mov.{t}" for t in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "b128", "pred")
}
PARAM_LOADS = {
    f"ld.param.{v}{t}"
    for v in ("", "v2.", "v4.")
    for t in ("b8", "u8", "s8", "b16", "u16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")
}
IGNORED = {"nop"}
ACTIONS = (
    "st.",
    "red.",
    "atom.",
    "cp.",
    "tcgen05.",
    "wgmma.",
    "mbarrier.arrive",
    "mbarrier.init",
    "bar",
    "ret",
    "exit",
)


def entry_of(instr: Instr) -> Entry | None:
    """The table entry of an instruction, None for those the translator handles itself.

    Raises:
        UnsupportedInstruction: unknown opcode or modifier.
    """
    if instr.opcode in CONTROL or instr.opcode in MOVES or instr.opcode in PARAM_LOADS or instr.opcode in IGNORED:
        return None
    found = find(instr.opcode)
    if found is None:
        raise UnsupportedInstruction(
            f"PTX line {instr.line}: the emulator does not know {instr.opcode!r} in {instr.text!r}"
        )
    return found


def registers(operand) -> Iterator[Reg]:
    """Every register an operand mentions."""
    if isinstance(operand, Reg):
        yield operand
    elif isinstance(operand, Not):
        yield operand.reg
    elif isinstance(operand, Pair):
        yield from registers(operand.first)
        yield from registers(operand.second)
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers(item)
    elif isinstance(operand, Address):
        yield from registers(operand.base)
        for item in operand.more:
            yield from registers(item)


def defs_and_uses(instr: Instr) -> tuple[list[Reg], list[Reg]]:
    """Registers written and read; a guarded write also reads the old value."""
    entry = entry_of(instr)
    if instr.opcode in CONTROL or instr.opcode in IGNORED:
        n_dests = 0
    elif entry is None:
        n_dests = 1
    else:
        n_dests = len(entry.dests)
        if n_dests == 2 and instr.operands and (isinstance(instr.operands[0], Pair) or entry.dests[1][0] == "?"):
            n_dests = 1
    defs = [r for operand in instr.operands[:n_dests] for r in registers(operand)]
    uses = [r for operand in instr.operands[n_dests:] for r in registers(operand)]
    if instr.guard is not None:
        uses.append(instr.guard)
    if entry is not None and entry.in_flight and (instr.operands[3] != Imm(0) or instr.guard is not None):
        uses += defs  # D is added to
    return defs, uses


def fold_scale_d(kernel: Kernel) -> list[Instr]:
    """The instructions, with scale-d of each wgmma an immediate where its block sets it to a constant: then it is known
    which of them do not read D.
    """
    instrs, constants = [], {}
    starts = set(kernel.labels.values())
    for i, instr in enumerate(kernel.instrs):
        if i in starts or instr.opcode in CONTROL:
            constants = {}
        entry = entry_of(instr)
        if entry is not None and entry.in_flight and len(instr.operands) > 3:
            scale = constants.get(instr.operands[3])
            if scale is not None:
                instr = instr._replace(operands=(*instr.operands[:3], Imm(scale), *instr.operands[4:]))
        known = None
        if instr.guard is None and len(instr.operands) >= 2 and isinstance(instr.operands[0], Reg):
            values = [o.value if isinstance(o, Imm) else constants.get(o) for o in instr.operands[1:]]
            if None not in values and instr.opcode in ("mov.b32", "mov.u32", "mov.s32", "mov.pred"):
                known = values[0]
            elif None not in values and instr.opcode in ("setp.ne.b32", "setp.ne.u32", "setp.ne.s32"):
                known = int(values[0] != values[1])
        for reg in defs_and_uses(instr)[0]:
            constants.pop(reg, None)
            if known is not None:
                constants[reg] = known
        instrs.append(instr)
    return instrs


@dataclass
class Block:
    """Straight-line code: instruction indices [start, stop), successors, registers live at entry and exit (bit
    sets).
    """

    number: int
    start: int
    stop: int
    successors: list[int] = field(default_factory=list)
    exits: bool = False  # some lanes may leave the kernel here
    live_in: int = 0
    live_out: int = 0
    defined_in: int = 0
    waits: bool = False  # begins with a wait that may fail
    acts: bool = False  # does something that another warp can notice
    arm_of: int = -1  # of a block without waits and barriers that only leads on: where, if that is further down


def find_blocks(kernel: Kernel) -> list[Block]:
    """Split a kernel into blocks; a block begins at every wait that may fail and ends after every barrier."""
    instrs = kernel.instrs
    leaders = {0, *kernel.labels.values()}
    for i, instr in enumerate(instrs):
        entry = entry_of(instr)
        if instr.opcode in CONTROL or (entry is not None and entry.ends_block):
            leaders.add(i + 1)
        if entry is not None and entry.starts_block:
            leaders.add(i)
    starts = sorted(s for s in leaders if s < len(instrs))
    at = {s: n for n, s in enumerate(starts)}
    at[len(instrs)] = len(starts)  # falling off the end is an exit
    blocks = []
    for n, start in enumerate(starts):
        stop = starts[n + 1] if n + 1 < len(starts) else len(instrs)
        last = instrs[stop - 1]
        block = Block(n, start, stop)
        if last.opcode.startswith("bra"):
            block.successors.append(at[kernel.labels[last.operands[0].name]])
        if not (last.opcode in CONTROL and last.guard is None) and n + 1 < len(starts):
            block.successors.append(n + 1)
        block.acts = any(i.opcode.startswith(ACTIONS) and i.opcode != "bar.warp.sync" for i in instrs[start:stop])
        first = entry_of(instrs[start])
        block.waits = first is not None and first.starts_block
        blocks.append(block)
    for block in blocks:
        last = instrs[block.stop - 1]
        leaves = last.opcode in ("ret", "exit") or any(s >= len(blocks) for s in block.successors)
        block.exits = leaves or not block.successors
        block.successors = [s for s in block.successors if s < len(blocks)]
        entry = entry_of(last)
        meets = entry is not None and entry.ends_block
        if (
            not (block.exits or block.waits or meets)
            and len(block.successors) == 1
            and block.successors[0] > block.number
        ):
            block.arm_of = block.successors[0]
    return blocks


def solve_liveness(kernel: Kernel, blocks: list[Block]) -> None:
    """Fill live_in and live_out (backward) and defined_in (forward, registers written on every path)."""
    gen, kill, written = [], [], []
    for block in blocks:
        used = defined = wrote = 0
        for instr in kernel.instrs[block.start : block.stop]:
            defs, uses = defs_and_uses(instr)
            for r in uses:
                used |= (1 << r.index) & ~defined
            for r in defs:
                bit = 1 << r.index
                if instr.guard is None:
                    wrote |= bit
                    defined |= bit
                else:
                    used |= bit & ~defined
        gen.append(used)
        kill.append(defined)
        written.append(wrote)
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            out = 0
            for s in block.successors:
                out |= blocks[s].live_in
            new = gen[block.number] | (out & ~kill[block.number])
            if out != block.live_out or new != block.live_in:
                block.live_out, block.live_in, changed = out, new, True
    everything = (1 << len(kernel.regs)) - 1
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block in blocks:
        block.defined_in = 0 if block.number == 0 else everything
        for s in block.successors:
            predecessors[s].append(block.number)
    changed = True
    while changed:
        changed = False
        for block in blocks[1:]:
            known = everything if predecessors[block.number] else 0
            for p in predecessors[block.number]:
                known &= blocks[p].defined_in | written[p]
            if known != block.defined_in:
                block.defined_in, changed = known, True


def solve_joins(blocks: list[Block]) -> np.ndarray:
    """bool [n + 1, n + 1]: block p lies on every path from block q to the exit (p postdominates q, p ≠ q).

    Lanes of a diverged warp that stand at p wait there for lanes that stand at q. Row and column n are the exit.
    """
    n = len(blocks)
    everything = (1 << n) - 1
    after = [1 << block.number if block.exits else everything for block in blocks]
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            if not block.exits:
                common = everything
                for s in block.successors:
                    common &= after[s]
                new = common | 1 << block.number
                if new != after[block.number]:
                    after[block.number], changed = new, True
    joins = np.zeros((n + 1, n + 1), bool)
    for q, bits in enumerate(after):
        joins[[p for p in range(n) if bits >> p & 1 and p != q], q] = True
    return joins
