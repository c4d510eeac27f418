"""Which instruction first needs what a tcgen05.ld delivers: the point from which the load is known to be complete.

The hardware holds an instruction back until the registers that it reads have arrived, so a true dependency completes
the load as tcgen05.wait::ld does (kernels in wide use rely on it). A move is no use: compilers drop it; what it
hands on is followed. A static analysis over the blocks, done once a kernel.
"""

from __future__ import annotations

from .flow import MOVES, Block, defs_and_uses
from .syntax import Instr

LOAD, WAIT = "tcgen05.ld.", "tcgen05.wait::ld"


def idle(instrs: list[Instr], blocks: list[Block]) -> frozenset[int]:
    """PTX lines of the loads none of whose registers any instruction needs on any path, waited for or not."""
    sites, uses = find_uses(instrs, blocks, waits=False)
    needed = {site for found in uses.values() for site in found}
    return frozenset(line for line, site in sites.items() if site not in needed)


def find_uses(
    instrs: list[Instr], blocks: list[Block], waits: bool = True
) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Number of each load by its PTX line, and by instruction index the loads that are complete once it executes;
    `waits`: whether tcgen05.wait::ld completes them before.
    """
    sites: dict[int, int] = {}
    for instr in instrs:
        if instr.opcode.startswith(LOAD):
            sites.setdefault(instr.line, len(sites))
    uses: dict[int, list[int]] = {}
    if not sites:
        return sites, uses
    entry: dict[int, dict[int, int]] = {0: {}}  # block → register → loads it may still wait for, as bits
    todo = [0]
    while todo:
        number = todo.pop()
        leaving = _pass(instrs, blocks[number], dict(entry[number]), sites, uses, waits)
        for after in blocks[number].successors:
            if after >= len(blocks):
                continue
            before = entry.get(after)
            merged = dict(leaving) if before is None else dict(before)
            for register, bits in leaving.items():
                merged[register] = merged.get(register, 0) | bits
            if merged != before:
                entry[after] = merged
                todo.append(after)
    return sites, uses


def _pass(instrs, block: Block, holds: dict[int, int], sites, uses, waits: bool) -> dict[int, int]:
    """Walk one block; `holds` becomes what its end knows."""
    for position in range(block.start, block.stop):
        instr = instrs[position]
        if instr.opcode.startswith(WAIT):
            if waits and instr.guard is None:
                holds.clear()
            continue
        written, read = defs_and_uses(instr)
        bits = 0
        for register in read:
            bits |= holds.get(register.index, 0)
        if instr.opcode in MOVES:
            for register in written:
                kept = holds.pop(register.index, 0) if instr.guard is not None else 0
                holds.pop(register.index, None)
                if bits | kept:
                    holds[register.index] = bits | kept
            continue
        if bits:
            found = uses.setdefault(position, [])
            found += [site for site in range(bits.bit_length()) if bits >> site & 1 and site not in found]
            holds = {register: left for register, held in holds.items() if (left := held & ~bits)}
        own = 1 << sites[instr.line] if instr.opcode.startswith(LOAD) else 0
        for register in written:
            if own:
                holds[register.index] = own
            elif instr.guard is None:
                holds.pop(register.index, None)
    return holds
