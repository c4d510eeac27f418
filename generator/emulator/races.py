"""Races: two accesses to one cell of shared or tensor memory, one of them a write, and nothing that orders them.

Every access is checked against the epochs of the accesses before it (see `clocks`, `shadow`), and leaves its own. An
asynchronous operation is checked with what its issuing warp knows at issue; its own accesses belong to a component that
only the matching wait makes known: wait::ld, wait::st, a commit and the wait for its mbarrier, a bulk group's wait, a
wgmma group's wait, the phase of an mbarrier that a load completes. So both a wait that is missing before a signal and a
signal that is missing before an access are found, in whatever order this run happened to execute them.

What is not seen: races between the lanes of one warp (a warp is one agent), and races in global memory.
"""

from __future__ import annotations

import numpy as np

from .clocks import COMPONENT, LINE_SHIFT, ONE, STRONG
from .errors import Hazard
from .memory import TensorMemory
from .order import Order
from .shadow import SharedShadow, TensorShadow

STRONG_WORDS = {"volatile", "relaxed", "acquire", "release"}  # synchronization themselves, as atomics are
NONE = np.iinfo(np.int64).max
WAITS = {  # what makes the work of another agent known; {n}: its number, {line}: where
    "warp": "let warp {n} signal after {line} (mbarrier.arrive, bar.sync) and wait for that signal here",
    "ld": "insert tcgen05.wait::ld after {line}, before the signal by which warp {n} lets others go on, and wait for "
    "that signal here",
    "st": "insert tcgen05.wait::st after {line}, before the signal by which warp {n} lets others go on, and wait for "
    "that signal here",
    "mma": "wait on the mbarrier of the tcgen05.commit that covers {line} first",
    "bulk": "insert cp.async.bulk.wait_group.read 0 in warp {n} after {line}, then a signal, and wait for it here",
    "cp": "insert cp.async.wait_group 0 in warp {n} after {line} (or cp.async.mbarrier.arrive), then a signal, and "
    "wait for it here",
    "wgmma": "insert wgmma.wait_group 0 in warpgroup {n} after {line}, then a signal, and wait for it here",
    "mbarrier": "wait on that mbarrier first",
}
FENCE = "insert fence.proxy.async after {line}, before the signal that lets this warp go on"


class Races(Order):
    """The epochs of one wave's shared and tensor memory."""

    def __init__(self, machine):
        super().__init__(machine)
        self.shared = SharedShadow(machine.n_cta, machine.smem.stride)
        self.tensor = TensorShadow(TensorMemory.COLUMNS, machine.n_cta)
        machine.mbarriers.races = self
        sites = max(len(machine.program.load_sites), 1)
        self.outstanding = np.full((sites, machine.n_warps, machine.n_cta), NONE)  # when each tcgen05.ld was issued

    # -- shared memory, ordinary instructions --------------------------------------------------------------------------
    def access(self, ws, active, instr, offsets, nbytes: int, write: bool, ctas=None, sync: bool = False) -> None:
        """Lanes read or write `nbytes` bytes of shared memory at `offsets`, of their own CTA or of `ctas`.

        `sync`: an atomic, which is both.
        """
        shape = np.broadcast_shapes(np.shape(offsets), (*ws.lead, 1), np.shape(ctas) if ctas is not None else ())
        offsets = np.broadcast_to(offsets, shape)
        warp, own = np.broadcast_to(ws.warp, shape), np.broadcast_to(ws.cta, shape)
        cta = own if ctas is None else np.broadcast_to(ctas, shape)
        lanes = None
        if active is not None:
            shape = np.broadcast_shapes(shape, np.shape(active))
            on = np.broadcast_to(active, shape)
            offsets, warp, own, cta = (np.broadcast_to(x, shape)[on] for x in (offsets, warp, own, cta))
            lanes = np.nonzero(on)[-1]
        self._access(instr, warp, own, lanes, cta, offsets, nbytes, write, sync)

    def rows(self, ws, instr, offsets, write: bool) -> None:
        """Warps read or write rows of 16 bytes at `offsets` [lead, rows] (ldmatrix, stmatrix)."""
        warp, cta = (np.broadcast_to(x, offsets.shape) for x in (ws.warp, ws.cta))
        self._access(instr, warp, cta, None, cta, offsets, 16, write, False)

    def _access(self, instr, warp, own, lanes, cta, offsets, nbytes, write, sync, mine=None) -> None:
        clocks, shared = self.clocks, self.shared
        base = clocks.base[warp, own]
        strong = sync or not STRONG_WORDS.isdisjoint(instr.opcode.split("."))
        for epochs, read, byte in shared.marks(cta, offsets, nbytes, write):
            bad = clocks.behind(epochs, base)
            if strong:
                bad &= epochs & STRONG == 0
            if bad.any():
                at = np.unravel_index(int(np.argmax(bad)), bad.shape)
                here = self.machine.at(instr, int(warp[at]), int(own[at]), self._lane(at, lanes))
                self._raise(
                    here, int(warp[at]), write, self._place(int(cta[at]), int(own[at]), int(offsets[at]) + byte),
                    int(epochs[at]), read, int(own[at]), False,
                )  # fmt: skip
        if strong and mine is None:
            self.through_cells(instr, warp, own, cta, offsets, write, sync)
        if mine is None:
            mine = clocks.epoch(warp, own, instr.line) | (STRONG if strong else 0)
        plane = shared.plane_of(nbytes)
        plane.touch(int(offsets.min()), int(offsets.max()) + nbytes)
        if not write:
            readers = self._readers(mine, cta)
            for number in np.unique(readers).tolist():
                read = plane.read_by(number)
                which = readers == number
                for cell in plane.indices(offsets[which], nbytes):
                    read[cta[which], cell] = mine[which]
            return
        for cell in plane.indices(offsets, nbytes):
            plane.write[cta, cell] = mine
            kept = plane.write[cta, cell]
            if (kept != mine).any() and not strong:  # another warp of the same batch wrote it too
                at = np.unravel_index(int(np.argmax(kept != mine)), mine.shape)
                here = self.machine.at(instr, int(warp[at]), int(own[at]), self._lane(at, lanes))
                place = self._place(int(cta[at]), int(own[at]), int(offsets[at]))
                self._raise(here, int(warp[at]), True, place, int(kept[at]), False, int(own[at]), False)

    @staticmethod
    def _lane(at: tuple, lanes: np.ndarray | None) -> int | None:
        return int(lanes[at]) if lanes is not None else int(at[-1]) if len(at) > 1 else None

    # -- shared memory, asynchronous reads and writes ------------------------------------------------------------------
    def read_chunks(self, instr, warps, ctas, targets, chunks, mine: np.ndarray, what="reads") -> None:
        """Asynchronous work that warp `warps[i]` of CTA `ctas[i]` issues reads chunks of CTA `targets[i]`.

        `chunks`: int array, the same in all of them, or a slice; `mine`: epoch of each row's read.
        """
        clocks, shared = self.clocks, self.shared
        low, high = _span(chunks)
        pick = _picker(targets, chunks)
        base = clocks.base[warps, ctas].reshape(-1, *(1,) * (1 if isinstance(chunks, slice) else chunks.ndim))
        for epochs, _, byte in shared.chunk_marks(pick, low, high, False):
            bad = clocks.behind(epochs, base, by_proxy=True)
            if bad.any():
                self._chunk_race(instr, warps, ctas, targets, chunks, epochs, bad, byte, False, False, what)
        readers = self._readers(mine, targets)
        shared.chunks.touch(low, high)
        for number in np.unique(readers).tolist():
            which = readers == number
            _store(shared.chunks.read_by(number), targets[which], chunks, mine[which])

    def _readers(self, mine: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Number of the plane that keeps a component's reads: by its local number, and by how far its rank lies from
        the rank of the CTA whose memory it reads, so that no two of a cluster share one.
        """
        size, component = self.clocks.size, mine & COMPONENT
        return component // size * size + (component - self.clocks.rank[targets]) % size

    def write_chunks(self, instr, warps, ctas, targets, chunks, mine: np.ndarray, atomic: bool = False) -> None:
        """Warp `warps[i]` of CTA `ctas[i]` issues an asynchronous write or reduction of chunks of CTA `targets[i]`."""
        clocks, shared = self.clocks, self.shared
        low, high = _span(chunks)
        base = clocks.base[warps, ctas].reshape(-1, *(1,) * (1 if isinstance(chunks, slice) else chunks.ndim))
        for epochs, read, byte in shared.chunk_marks(_picker(targets, chunks), low, high, True):
            bad = clocks.behind(epochs, base, by_proxy=True)
            if atomic:
                bad &= epochs & STRONG == 0
            if bad.any():
                self._chunk_race(instr, warps, ctas, targets, chunks, epochs, bad, byte, read, True, "overwrites")
        shared.chunks.touch(low, high)
        _store(shared.chunks.write, targets, chunks, mine | (STRONG if atomic else 0))

    def _chunk_race(self, instr, warps, ctas, targets, chunks, epochs, bad, byte, read, write, what) -> None:
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        row = at[0]
        chunk = chunks.start + at[1] if isinstance(chunks, slice) else chunks[at[1:]]
        warp, cta, target = int(warps[row]), int(ctas[row]), int(targets[row])
        epoch = int(epochs[at])
        place = self._place(target, cta, int(chunk) * 16 + byte)
        here = self.machine.at(instr, warp, cta)
        known = epoch < self.clocks.warps[warp, cta, 0, epoch & COMPONENT]
        self._raise(here, warp, write, place, epoch, read, cta, known, what)

    # -- tensor memory -------------------------------------------------------------------------------------------------
    def tmem_load(self, ws, instr, cells: tuple, chosen=None) -> None:
        """tcgen05.ld of `cells`, an index into arrays like `TensorShadow.write` that gives [columns, warps, halves,
        CTAs] for a batch that is a product, else [columns, warps of the batch or of `chosen`, (halves)].
        """
        self._tmem_warps(ws, instr, cells, chosen, "ld", False)

    def tmem_store(self, ws, instr, cells: tuple, chosen=None) -> None:
        """tcgen05.st, likewise."""
        self._tmem_warps(ws, instr, cells, chosen, "st", True)

    def _tmem_warps(self, ws, instr, cells, chosen, kind: str, write: bool) -> None:
        clocks, tensor = self.clocks, self.tensor
        agent = clocks.agent(kind)
        warps, ctas = ws.flat_pairs()
        if chosen is not None:
            warps, ctas = warps[chosen], ctas[chosen]
        if self.advice:
            self.advice.tensor(warps, ctas, instr, True)
        mine = agent.epoch(warps, ctas, instr.line)
        axes = tensor.write[cells].ndim
        shaped = lambda x: _lead_in(x, ws, axes)  # noqa: E731
        base, ours = shaped(clocks.base[warps, ctas]), shaped(mine & COMPONENT)
        marks = [(tensor.write, False)]
        if write:
            marks += [(read, True) for read in tensor.reads.values()]
        for array, read in marks:
            epochs = array[cells]
            bad = clocks.behind(epochs, base)
            if write and not read:  # the stores of one warp are executed in order
                bad &= epochs & COMPONENT != ours
            if bad.any():
                self._tmem_race(warps, ctas, shaped, instr, cells, epochs, bad, read, write)
        if write:
            tensor.write[cells] = shaped(mine)
            return
        for group in np.unique(warps // 4).tolist():
            which = warps // 4 == group
            array = tensor.read_by(group)
            array[cells] = shaped(mine) if which.all() else np.where(shaped(which), shaped(mine), array[cells])
        program = self.machine.program
        if instr.line not in program.idle_loads:  # those are complete when a later load or wait is
            self.outstanding[program.load_sites[instr.line], warps, ctas] = agent.time[warps, ctas]
        agent.tick(warps, ctas)

    def settle(self, ws, sites: list[int]) -> None:
        """An instruction of these warps needs what the tcgen05.ld of these numbers deliver: they are complete."""
        warps, ctas = ws.flat_pairs()
        if self.advice:
            self.advice.used_early([s for s in sites if (self.outstanding[s, warps, ctas] != NONE).any()])
        self._settle(warps, ctas, sites)

    def _settle(self, warps, ctas, sites) -> None:
        agent = self.clocks.agent("ld")
        for site in sites:
            self.outstanding[site, warps, ctas] = NONE
        agent.known(warps, ctas, np.minimum(self.outstanding[:, warps, ctas].min(axis=0), agent.time[warps, ctas]))

    def waited_for(self, kind: str, ws, active) -> None:
        """tcgen05.wait::ld, wait::st: the warps' earlier loads or stores are complete."""
        warps, ctas = self.chosen(ws, active)
        agent = self.clocks.agent(kind)
        if kind == "ld":
            self._settle(warps, ctas, range(len(self.outstanding)))
            return
        agent.tick(warps, ctas)
        agent.known(warps, ctas, agent.time[warps, ctas])

    def _tmem_race(self, warps, ctas, shaped, instr, cells, epochs, bad, read, write) -> None:
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        row = int(np.broadcast_to(shaped(np.arange(len(warps))), epochs.shape)[at])
        first = cells[0]
        columns = np.arange(first.start, first.stop) if isinstance(first, slice) else first
        columns = columns.reshape(*columns.shape, *(1,) * (epochs.ndim - columns.ndim))
        place = self.machine.labels.column_at(int(np.broadcast_to(columns, epochs.shape)[at]))
        here = self.machine.at(instr, int(warps[row]), int(ctas[row]))
        self._raise(here, int(warps[row]), write, place, int(epochs[at]), read, int(ctas[row]), False)

    def tensor_work(self, op) -> None:
        """A warp issues an operation of the tensor core (`tensorcore.Work`), for its CTA or for the pair."""
        clocks, instr = self.clocks, op.where.instr
        issuers = dict(zip(*(x.tolist() for x in reversed(self.chosen(op.where.ws, op.where.lanes))), strict=True))
        targets = self.machine.queue.sets.array(op.bits)
        ctas = np.array([cta if cta in issuers else cta - 1 for cta in targets.tolist()])
        warps = np.array([issuers[cta] for cta in ctas.tolist()])
        if self.advice:
            self.advice.tensor(warps, ctas, instr, False)
        mine = clocks.agent("mma").epoch(warps, ctas, instr.line)
        for name, operand in op.shared_operands():
            self.read_chunks(instr, warps, ctas, targets, operand.chunks, mine, f"reads {name} at")
        for name, cells in op.cells_read():
            self._tensor_cells(instr, warps, ctas, targets, cells, mine, False, f"reads {name} at")
            self.tensor.read_by("mma")[cells.index(_run(targets))] = mine
        cells = op.cells_written()
        self._tensor_cells(instr, warps, ctas, targets, cells, mine, True, "writes")
        self.tensor.write[cells.index(_run(targets))] = mine

    def _tensor_cells(self, instr, warps, ctas, targets, cells, mine, write, what) -> None:
        """Work that one warp issues to the tensor core runs in order; anything else must be known to be over."""
        base, ours = self.clocks.base[warps, ctas], mine & COMPONENT
        marks = [(self.tensor.write, False)]
        if write:
            marks += [(read, True) for read in self.tensor.reads.values()]
        for array, read in marks:
            epochs = array[cells.index(_run(targets))]
            bad = self.clocks.behind(epochs, base) & (epochs & COMPONENT != ours)
            if bad.any():
                at = np.unravel_index(int(np.argmax(bad)), bad.shape)
                row, column = int(at[-1]), cells.start + int(at[0])
                place = self.machine.labels.column_at(column) + self._owner(int(targets[row]), int(ctas[row]))
                here = self.machine.at(instr, int(warps[row]), int(ctas[row]))
                self._raise(here, int(warps[row]), write, place, int(epochs[at]), read, int(ctas[row]), False, what)

    def allocate_columns(self, ws, instr, columns: slice, cta: int) -> None:
        """tcgen05.alloc of one CTA: whoever uses the columns must know that they are allocated."""
        warps, ctas = ws.flat_pairs()
        mine = self.clocks.epoch(warps[ctas == cta][:1], ctas[ctas == cta][:1], instr.line)
        self.tensor.write[columns][..., cta] = mine

    def release_columns(self, ws, instr, columns: slice) -> None:
        """tcgen05.dealloc: everything that uses the columns must be known to be over."""
        warps, own = ws.flat_pairs()
        base = self.clocks.base[warps, own]
        for array, read in [(self.tensor.write, False)] + [(r, True) for r in self.tensor.reads.values()]:
            epochs = array[columns][:, :, :, own]
            bad = self.clocks.behind(epochs, base)
            if bad.any():
                at = np.unravel_index(int(np.argmax(bad)), bad.shape)
                row = int(at[3])
                place = self.machine.labels.column_at(columns.start + int(at[0]))
                here = self.machine.at(instr, int(warps[row]), int(own[row]))
                self._raise(here, int(warps[row]), True, place, int(epochs[at]), read, int(own[row]), False, "frees")
            array[columns][:, :, :, own] = 0

    # -- bulk copies, cp.async, wgmma ----------------------------------------------------------------------------------
    def loads(self, instr, begun: list[tuple], where) -> None:
        """Loads are issued: (warp, CTA, CTA of the data, CTA of the mbarrier, slot, shared offset, bytes) each."""
        alike: dict[tuple, list] = {}
        for warp, cta, target, bar, slot, offset, nbytes in begun:
            alike.setdefault((slot, offset, nbytes), []).append((warp, cta, target, bar))
        for (slot, offset, nbytes), rows in alike.items():
            warps, ctas, targets, bars = np.array(rows).T
            epochs = self._signalling(instr, warps, ctas, slot, bars, where)
            chunks = slice(offset // 16, (offset + nbytes) // 16)
            self.write_chunks(instr, warps, ctas, targets, chunks, epochs)
        warps, ctas = np.unique(np.array([row[:2] for row in begun]), axis=0).T
        self.clocks.tick(warps, ctas)

    def stores(self, instr, warps, ctas, targets, slots, offsets, nbytes: int, atomic: bool, where) -> None:
        """Lanes issue st.async or red.async to CTA `targets[i]`, which signal the mbarrier there at `slots[i]`."""
        mine = np.empty(len(warps), np.int64)
        for slot in np.unique(slots).tolist():
            here = slots == slot
            mine[here] = self._signalling(instr, warps[here], ctas[here], slot, targets[here], where)
        if atomic:
            mine |= STRONG
        self._access(instr, warps, ctas, None, targets, offsets, nbytes, True, atomic, mine)
        self.clocks.tick(*np.unique(np.stack([warps, ctas]), axis=1))

    def copy_between(
        self, instr, warp: int, cta: int, source, target: int, offset: int, nbytes: int, slot, atomic, where
    ):
        """A bulk copy (or reduction) of chunks `source` to another CTA of the cluster, where it signals an mbarrier."""
        warps, ctas, targets = (np.array([x]) for x in (warp, cta, target))
        mine = self._signalling(instr, warps, ctas, slot, targets, where)
        self.read_chunks(instr, warps, ctas, ctas, source, mine)
        chunks = slice(offset // 16, (offset + nbytes) // 16)
        self.write_chunks(instr, warps, ctas, targets, chunks, mine, atomic)
        self.clocks.tick(warps, ctas)

    def _signalling(self, instr, warps, ctas, slot: int, bars, where) -> np.ndarray:
        """Epochs of asynchronous writes that complete the phase under way of the mbarriers of CTAs `bars`, to which
        their issuers' clocks go.
        """
        self.check_initialized(slot, bars, warps, ctas, where)
        if self.advice:
            self.advice.used_by_others(slot, f"a copy signals at PTX line {instr.line}")
        self.publish(self.pending.a[slot], bars, warps, ctas)
        return np.array([self.phase_epoch(slot, bar, instr.line) for bar in bars.tolist()])

    def copies(self, instr, warps, ctas, offsets, size: int) -> dict[tuple[int, int], int]:
        """Lanes issue cp.async to `offsets` of their CTA; returns the time of it by (warp, CTA)."""
        agent = self.clocks.agent("cp")
        mine = agent.epoch(warps, ctas, instr.line)
        self._access(instr, warps, ctas, None, ctas, offsets, size, True, False, mine)
        pairs = np.unique(np.stack([warps, ctas]), axis=1)
        times = dict(zip(map(tuple, pairs.T.tolist()), agent.time[pairs[0], pairs[1]].tolist(), strict=True))
        agent.tick(*pairs)
        return times

    def bulk_read(self, instr, warp: int, cta: int, chunks) -> int:
        """A bulk store reads chunks of its own CTA; returns the time of it, for `bulk_known`."""
        one = np.array([warp]), np.array([cta])
        agent = self.clocks.agent("bulk")
        self.read_chunks(instr, *one, one[1], chunks, agent.epoch(*one, instr.line))
        time = int(agent.time[warp, cta])
        agent.tick(*one)
        return time

    def known_before(self, kind: str, warp: int, cta: int, outstanding) -> None:
        """The warp has waited for all of its work of this kind but what began at the times `outstanding`."""
        agent = self.clocks.agent(kind)
        until = min(outstanding, default=int(agent.time[warp, cta]))
        agent.known(np.array([warp]), np.array([cta]), np.array([until]))

    def wgmma(self, instr, warps, ctas, group, name: str, operand) -> None:
        """Warps issue a wgmma that reads an operand, as part of their group number `group[i]`."""
        for quarter in range(4) if name == "A" else (None,):  # of A, each warp reads its own 16 rows
            mine = np.ones(len(warps), bool) if quarter is None else warps % 4 == quarter
            if not mine.any():
                continue
            chunks, span = operand.chunks, 2 if operand.mn_major else 16
            if quarter is not None:
                rows = slice(quarter * span, quarter * span + span)
                chunks = chunks[:, rows] if operand.mn_major else chunks[rows]
            local = np.array([self.clocks.component("wgmma", n) for n in (warps[mine] // 4).tolist()])
            epochs = (group[mine] + 1) * ONE | local * self.clocks.size + self.clocks.rank[ctas[mine]]
            some = warps[mine], ctas[mine], ctas[mine]
            self.read_chunks(instr, *some, chunks, epochs | instr.line << LINE_SHIFT, f"reads operand {name} at")

    def wgmma_waited(self, warps, ctas, complete) -> None:
        """Groups before number `complete[i]` of these warps are complete."""
        clocks = self.clocks
        component = np.array([clocks.component("wgmma", n) for n in (warps // 4).tolist()])
        component = component * clocks.size + clocks.rank[ctas]
        for row in (0, 1):
            at = clocks.base[warps, ctas] + component + row * clocks.capacity
            clocks.flat[at] = np.maximum(clocks.flat[at], (complete + 1) * ONE)

    # -- messages ------------------------------------------------------------------------------------------------------
    def _owner(self, target: int, cta: int) -> str:
        return "" if target == cta else f" of CTA {self.machine.name_cta(target)}"

    def _place(self, target: int, cta: int, offset: int) -> str:
        return self.machine.labels.shared_at(offset) + self._owner(target, cta)

    def _raise(
        self, here, warp, write: bool, place: str, epoch: int, read: bool, cta: int, fence: bool, what=""
    ) -> None:
        kind, number, rank = self.clocks.kind_of(epoch & COMPONENT)
        line = self.line(epoch >> LINE_SHIFT & 0xFFFFF)
        other = cta - cta % self.clocks.size + rank
        of = f" of CTA {self.machine.name_cta(other)}" if other != cta else ""
        verb = "reads" if read else "writes"
        if kind == "mbarrier":
            who = f"the load at {line} ({self.machine.mbarriers.name(number)}{of}) writes"
        elif kind == "wgmma":
            who = f"a wgmma of warpgroup {number}{of} {verb} at {line}"
        else:
            who = f"warp {number}{of} {verb} at {line}"
        what = what or ("overwrites" if write else "reads")
        remedy = (FENCE if fence else WAITS[kind]).format(n=f"{number}{of}", line=line)
        between = "with no fence.proxy.async between" if fence else "and nothing orders the two"
        raise Hazard(f"{here}: {what} {place}, which {who}, {between}: {remedy}")


def _span(chunks) -> tuple[int, int]:
    """Bytes that chunks lie in."""
    if isinstance(chunks, slice):
        return chunks.start * 16, chunks.stop * 16
    return int(chunks.min()) * 16, int(chunks.max()) * 16 + 16


def _run(ctas: np.ndarray):
    """Ascending neighbours as a slice."""
    first, last = int(ctas[0]), int(ctas[-1])
    return slice(first, last + 1) if last - first + 1 == len(ctas) else ctas


def _picker(targets: np.ndarray, chunks):
    at = _run(targets) if (np.diff(targets) > 0).all() else targets
    if isinstance(at, slice) or isinstance(chunks, slice):
        return lambda array: array[at][:, chunks]
    return lambda array: array[at.reshape(-1, *(1,) * chunks.ndim), chunks]


def _store(array: np.ndarray, targets: np.ndarray, chunks, values: np.ndarray) -> None:
    values = values.reshape(-1, *(1,) * (1 if isinstance(chunks, slice) else chunks.ndim))
    at = _run(targets) if (np.diff(targets) > 0).all() else targets
    if isinstance(at, slice) or isinstance(chunks, slice):
        array[at, chunks] = values
    else:
        array[at.reshape(-1, *(1,) * chunks.ndim), chunks] = values


def _lead_in(values: np.ndarray, ws, axes: int) -> np.ndarray:
    """One value a warp → broadcastable to TMEM cells: [columns, warps, halves, CTAs] or [columns, n, (halves)]."""
    if axes == 4:
        return values.reshape(ws.lead)[None, :, None, :]
    return values.reshape(1, -1, *(1,) * (axes - 2))
