"""Notes for a trace, one function a family of instructions: `note(recorder, m, ws, active, instr, operands, result)`.

It runs after the instruction, and adds an Effect to the log of every traced warp that executed it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .clock import matrix_cycles
from .memory import WINDOW_BASE

_NOTES: list[tuple[re.Pattern, Callable]] = []


def of(name: str) -> Callable | None:
    """What notes the instruction of this name, None for those of which a trace needs no more than the cycles."""
    for pattern, note in _NOTES:
        if pattern.match(name):
            return note
    return None


def _notes(pattern: str) -> Callable[[Callable], Callable]:
    def register(note: Callable) -> Callable:
        _NOTES.append((re.compile(pattern), note))
        return note

    return register


def _count_by_target(r, cta: int, addresses: np.ndarray) -> list[tuple[tuple[int, int], int]]:
    unique, counts = np.unique(addresses, return_counts=True)
    return [(r.target(cta, address), int(n)) for address, n in zip(unique.tolist(), counts.tolist(), strict=True)]


# -- mbarriers ---------------------------------------------------------------------------------------------------------
@_notes(r"mbarrier\.init\.")
def init(r, m, ws, active, instr, operands, result):
    for warp, cta, _, (addresses, counts) in r.warps(ws, active, *operands[:2]):
        made = [
            r.new_barrier(*r.target(cta, a), int(c)).key
            for a, c in dict(zip(addresses.tolist(), counts.tolist(), strict=True)).items()
        ]
        r.add(cta, warp, instr, "init", keys=made)


@_notes(r"mbarrier\.arrive|mbarrier\.expect_tx")
def arrive(r, m, ws, active, instr, operands, result):
    expects = ".expect_tx" in instr.opcode
    given = operands[1] if len(operands) > 1 and operands[1] is not None else 1
    for warp, cta, _, (addresses, values) in r.warps(ws, active, operands[0], given):
        signals = []
        for (target, offset), lanes in _count_by_target(r, cta, addresses):
            barrier, value = r.barrier(target, offset), int(values[0])
            if expects:
                signals.append(barrier.expect(value * lanes))
            if not instr.opcode.startswith("mbarrier.expect_tx"):
                signals.append(barrier.arrive(lanes if expects else lanes * value, "_drop" in instr.opcode))
        r.add(cta, warp, instr, "arrive", signals=signals)


@_notes(r"cp\.async\.mbarrier\.arrive\.noinc")
def arrive_on_copies(r, m, ws, active, instr, operands, result):
    for warp, cta, _, (addresses,) in r.warps(ws, active, operands[0]):
        signals = [r.barrier(*target).arrive(lanes) for target, lanes in _count_by_target(r, cta, addresses)]
        r.add(cta, warp, instr, "arrive", signals=signals)


@_notes(r"mbarrier\.(try|test)_wait")
def wait(r, m, ws, active, instr, operands, result):
    """A spin of failed tries is one wait: what it ran since its first try is forgotten."""
    for warp, cta, _, (addresses, done) in r.warps(ws, active, operands[0], result):
        target, offset = r.target(cta, addresses[0])
        barrier, log = r.barrier(target, offset), r.log(cta, warp)
        phase = int(m.mbarriers.phase[m.mbarriers.slot(offset), target])
        at = len(log) - 2
        while at >= 0 and type(log[at]) is int:
            at -= 1
        if at >= 0 and log[at].kind == "poll" and log[at].instr is instr:
            del log[at - 1 : -1]
        if done.all():
            r.add(cta, warp, instr, "wait", key=barrier.key, phase=phase - 1)
        else:
            r.add(cta, warp, instr, "poll", key=barrier.key, phase=phase)


@_notes(r"(st|red)\.async\.")
def store_async(r, m, ws, active, instr, operands, result):
    """Bytes that a warp's lanes send to shared memory: they count on the mbarrier at once on this clock."""
    width = int(re.search(r"[busf](\d+)$", instr.opcode)[1]) // 8
    each = width * (len(operands[1]) if isinstance(operands[1], tuple) else 1)
    for warp, cta, _, (addresses,) in r.warps(ws, active, operands[2]):
        signals = [r.barrier(*target).load(each * lanes) for target, lanes in _count_by_target(r, cta, addresses)]
        r.add(cta, warp, instr, "arrive", signals=signals)


@_notes(r"mbarrier\.complete_tx")
def complete_bytes(r, m, ws, active, instr, operands, result):
    for warp, cta, _, (addresses, values) in r.warps(ws, active, *operands[:2]):
        counts = _count_by_target(r, cta, addresses)
        signals = [r.barrier(*target).load(int(values[0]) * lanes) for target, lanes in counts]
        r.add(cta, warp, instr, "arrive", signals=signals)


@_notes(r"clusterlaunchcontrol\.try_cancel")
def try_cancel(r, m, ws, active, instr, operands, result):
    """The response, 16 bytes, is there at once on this clock."""
    for warp, cta, _, (addresses,) in r.warps(ws, active, operands[1]):
        everyone = m.cluster.peers(cta, (1 << m.cluster.size) - 1)
        reached = everyone if ".multicast" in instr.opcode else [cta]
        offsets = [r.target(cta, address)[1] for address in addresses.tolist()]
        signals = [r.barrier(peer, offset).load(16) for offset in offsets for peer in reached]
        r.add(cta, warp, instr, "arrive", signals=signals)


# -- copies ------------------------------------------------------------------------------------------------------------
@_notes(r"cp\.async\.bulk\.tensor\.\dd\.shared::(cta|cluster)\.global")
def tensor_load(r, m, ws, active, instr, operands, result):
    destination, (address, coordinates), barrier = operands[:3]
    mask = operands[3] if ".multicast" in instr.opcode else None
    for warp, cta, _, rows in r.warps(
        ws, active, destination, address, barrier, 0 if mask is None else mask, *coordinates
    ):
        for to, source, bar, peers, *point in zip(*(row.tolist() for row in rows), strict=True):
            tensor = m.params_maps[source]
            text = f"{r.global_name(tensor.address)}{point}"
            _load(r, m, cta, warp, instr, to, bar, peers if mask is not None else None, tensor.box_bytes, text)


@_notes(r"cp\.(reduce\.)?async\.bulk\.shared::(cta|cluster)\.(global|shared::cta)\.mbarrier")
def bulk_load(r, m, ws, active, instr, operands, result):
    multicast = ".multicast" in instr.opcode
    for warp, cta, _, rows in r.warps(ws, active, *operands[: 5 if multicast else 4]):
        for to, source, nbytes, bar, *mask in zip(*(row.tolist() for row in rows), strict=True):
            within = ".shared::cta.mbarrier" in instr.opcode
            text = r.shared_name(r.target(cta, source)[1]) if within else r.global_name(source)
            _load(r, m, cta, warp, instr, to, bar, mask[0] if multicast else None, nbytes, text)


def _load(r, m, cta, warp, instr, to, bar, mask, nbytes, text) -> None:
    bar_cta, bar_offset = r.target(cta, bar)
    reached = [bar_cta] if mask is None else m.cluster.peers(cta, int(mask))
    signals = [r.barrier(peer, bar_offset).load(nbytes) for peer in reached]
    name = r.shared_name(r.target(cta, to)[1])
    r.add(cta, warp, instr, "load", nbytes=nbytes, signals=signals, name=name, text=text)


@_notes(r"cp\.async\.bulk\.tensor\.\dd\.global\.shared::cta|cp\.reduce\.async\.bulk\.tensor")
def tensor_store(r, m, ws, active, instr, operands, result):
    (address, coordinates), source = operands[:2]
    for warp, cta, _, rows in r.warps(ws, active, address, source, *coordinates):
        copies = zip(*(row.tolist() for row in rows), strict=True)
        for to, at, *point in dict.fromkeys(copies):  # a copy that several lanes execute alike is one
            tensor = m.params_maps[to]
            text = f"{r.global_name(tensor.address)}{point} = {r.shared_name(r.target(cta, at)[1])}"
            r.add(cta, warp, instr, "store", nbytes=tensor.box_bytes, name=r.global_name(tensor.address), text=text)


@_notes(r"cp\.(reduce\.)?async\.bulk\.global\.shared::cta")
def bulk_store(r, m, ws, active, instr, operands, result):
    for warp, cta, _, rows in r.warps(ws, active, *operands[:3]):
        for to, at, nbytes in zip(*(row.tolist() for row in rows), strict=True):
            text = f"{r.global_name(to)} = {r.shared_name(r.target(cta, at)[1])}"
            r.add(cta, warp, instr, "store", nbytes=nbytes, name=r.global_name(to), text=text)


@_notes(r"cp\.async\.bulk\.(commit|wait)_group")
def bulk_group(r, m, ws, active, instr, operands, result):
    for warp, cta, _, _ in r.warps(ws, active):
        if "commit" in instr.opcode:
            r.add(cta, warp, instr, "store_commit")
        else:
            r.add(cta, warp, instr, "store_wait", pending=int(operands[0]), read=".read" in instr.opcode)


# -- tensor cores ------------------------------------------------------------------------------------------------------
_K_BITS = 256  # of a row of A in one tcgen05.mma, PTX ISA 9.1 §9.7.16.2.1, whatever the type
_WIDTH = {"tf32": 32, "f16": 16, "f8f6f4": 8, "i8": 8, "mxf8f6f4": 8, "mxf4": 4, "mxf4nvf4": 4}


@_notes(r"tcgen05\.mma\.")
def mma(r, m, ws, active, instr, operands, result):
    d, (kind, a), b, idesc = operands[:4]
    group = 2 if "cta_group::2" in instr.opcode else 1
    data = re.search(r"\.kind::(\w+)", instr.opcode)[1]
    for warp, cta, _, rows in r.warps(ws, active, d, a, b, idesc):
        to, left, right, shape = (int(row[0]) for row in rows)
        rows_m, n, k = (shape >> 24 & 31) * 16, (shape >> 17 & 63) * 8, _K_BITS // _WIDTH[data]
        name_a = r.column_name(left & 0xFFFF) if kind == "tmem" else r.shared_name(_descriptor_offset(left))
        name_b = r.shared_name(_descriptor_offset(right))
        cycles = matrix_cycles(data, max(rows_m // group, 128), n, k, r.recording.arch)  # M = 64 fills half the rows
        name = f"{r.column_name(to & 0xFFFF)} = {name_a} x {name_b}"
        where = tuple(r.first + cta + i for i in range(group))
        r.add(cta, warp, instr, "mma", name=name, ctas=where, cycles=cycles, flops=2 * rows_m * n * k)


def _descriptor_offset(descriptor: int) -> int:
    return ((descriptor & 0x3FFF) << 4) - WINDOW_BASE


@_notes(r"tcgen05\.commit\.")
def commit(r, m, ws, active, instr, operands, result):
    mask = operands[1] if len(operands) > 1 else None
    for warp, cta, _, (addresses, masks) in r.warps(ws, active, operands[0], 0 if mask is None else mask):
        target, offset = r.target(cta, addresses[0])
        reached = [target] if mask is None else m.cluster.peers(cta, int(masks[0]))
        r.add(cta, warp, instr, "commit", signals=[r.barrier(peer, offset).arrive(1) for peer in reached])


@_notes(r"tcgen05\.(ld|st)\.")
def tensor_memory(r, m, ws, active, instr, operands, result):
    registers = len(result) if ".ld." in instr.opcode else len(operands[-1])
    verb = instr.opcode[:10]
    for warp, cta, _, (addresses,) in r.warps(ws, active, operands[0]):
        column = int(addresses[0]) & 0xFFFF
        r.add(cta, warp, instr, "tmem", name=f"{verb} {r.column_name(column)}", cycles=registers, column=column)


@_notes(r"wgmma\.")
def wgmma(r, m, ws, active, instr, operands, result):
    """A product of a warpgroup is noted with its first warp; every warp counts the groups that it committed."""
    for warp, cta, _, _ in r.warps(ws, active):
        key = ("wgmma", r.first + cta, warp // 4)
        if ".commit_group" in instr.opcode:
            r.add(cta, warp, instr, "group", key=key, phase=r.count(key, warp), leads=warp % 4 == 0)
        elif ".wait_group" in instr.opcode:
            phase = r.counters.get((key, warp), 0) - 1 - int(operands[0])
            r.add(cta, warp, instr, "wait", key=key, phase=phase)
        elif ".mma_async" in instr.opcode and warp % 4 == 0:
            rows, n, k = (int(x) for x in re.search(r"\.m(\d+)n(\d+)k(\d+)", instr.opcode).groups())
            cycles = matrix_cycles(instr.opcode, rows, n, k, r.recording.arch)
            name = f"wgmma {rows}x{n}, warps {warp} to {warp + 3}"
            facts = {"ctas": (r.first + cta,), "cycles": cycles, "flops": 2 * rows * n * k, "group": key}
            r.add(cta, warp, instr, "mma", name=name, **facts)


# -- barriers of warps -------------------------------------------------------------------------------------------------
@_notes(r"bar(rier)?(\.cta)?\.(sync|arrive|red)\b[^$]*$")
def bar(r, m, ws, active, instr, operands, result):
    counts = operands[1] if len(operands) > 1 and operands[1] is not None else 32 * m.n_warps
    for warp, cta, _, (ids, expected) in r.warps(ws, active, operands[0], counts):
        place = (r.first + cta, int(ids[0]))
        generation, arrived = r.bar_state.get(place, (0, 0))
        key, full = ("bar", *place), arrived + 32 >= int(expected[0])
        r.bar_state[place] = (generation + 1, 0) if full else (generation, arrived + 32)
        r.add(cta, warp, instr, "bar", key=key, phase=generation, blocks=".arrive" not in instr.opcode)


@_notes(r"barrier\.cluster\.(arrive|wait)")
def cluster_barrier(r, m, ws, active, instr, operands, result):
    """Lanes of a diverged warp come one part after the other."""
    for warp, cta, lanes, _ in r.warps(ws, active):
        key = ("cluster", (r.first + cta) // m.cluster.size)
        arrives = ".arrive" in instr.opcode
        before = r.count(key, cta, warp, arrives, by=len(lanes))
        phase = before // min(32, m.threads - 32 * warp)
        if arrives:
            r.add(cta, warp, instr, "bar", key=key, phase=phase, blocks=False)
        else:
            r.add(cta, warp, instr, "wait", key=key, phase=phase)
