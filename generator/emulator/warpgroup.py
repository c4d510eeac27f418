"""The tensor core of Hopper: wgmma under way, by warp (PTX ISA 9.1 §9.7.15).

Each warp of a warpgroup computes its own 16 of the 64 rows, so warps are executed independently and still run together
in wide batches. A wgmma takes effect at the wgmma.wait_group that covers it, as late as the program allows: operands in
shared memory are read then, and D is written to the machine's registers then. From issue to that wait its registers are
in flight.
"""

from __future__ import annotations

import numpy as np

from .accumulate import fused_dot, wgmma_model
from .chains import STORAGE, Chain, alike, decode, products
from .descriptors import Operand
from .errors import Hazard
from .memory import take_chunks
from .tensorcore import require_shared

FENCED, SET, USED = range(3)  # what became of a register since the last wgmma.fence; SET: constants were moved into it


class Warpgroups:
    """Every wgmma of one wave that has been issued and not waited for."""

    def __init__(self, machine):
        self.machine = machine
        self.chains: list[Chain] = []
        self.committed = np.zeros((machine.n_warps, machine.n_cta), np.int64)  # groups, by warp
        self.busy = [0] * len(machine.program.kernel.regs)  # uses of a register by chains in flight
        self.rows = {index: row for row, index in enumerate(sorted(machine.program.in_flight))}
        self.unfenced = np.full((len(self.rows), machine.n_warps, machine.n_cta), USED, np.uint8)  # registers, by warp
        self.open: Chain | None = None  # the last chain, while the next wgmma may still extend it

    # -- issue ---------------------------------------------------------------------------------------------------------
    def issue(self, ws, active, d, form, a, b, accumulate, a_registers, where) -> None:
        """`a`: a descriptor array, or four registers; `b`: a descriptor array; all broadcast to lead + (32,)."""
        warps, ctas = ws.flat_pairs()
        chosen = whole_warps(ws, active, where)
        if isinstance(a, tuple):
            step = (np.stack([ws.full(x).reshape(-1, 32) for x in a]), self._uniform(ws, b, "B", where))
        else:
            step = (self._uniform(ws, a, "A", where), self._uniform(ws, b, "B", where))
        flags = ws.full(accumulate).reshape(-1, 32)
        if (flags != flags[:, :1]).any():
            raise Hazard(f"{where}: the lanes of a warp give different values of scale-d")
        chain = Chain(
            warps, ctas, self.committed[warps, ctas], d, form, flags[:, 0], [step], list(a_registers), where, ws
        )
        if chosen is not None:
            chain = chain.part(chosen)
        self._check_registers(chain)
        for side in (0, 1):
            if side or not chain.from_registers:
                self._require(chain, side, where)
        self._count(a_registers, 1)
        last = self.open
        if (
            last is not None
            and last.batch is chain.batch is not None
            and last.d == d
            and last.form == form
            and last.from_registers == chain.from_registers
            and chain.accumulate.all()
        ):
            last.steps.append(step)
            last.a_registers += a_registers
            last.reads += chain.reads
            return
        self._count(d, 1)
        self.chains.append(chain)
        self.open = chain

    @staticmethod
    def _uniform(ws, descriptor, name: str, where) -> int | np.ndarray:
        values = np.asarray(descriptor)
        first = values.reshape(-1)[0]
        if (values == first).all():
            return int(first)
        lanes = ws.full(values).reshape(-1, 32)
        if (lanes != lanes[:, :1]).any():
            raise Hazard(f"{where}: the lanes of a warp give different descriptors of {name}")
        return lanes[:, 0]

    def _check_registers(self, chain: Chain) -> None:
        """Registers in flight may be used again only as the same accumulator, or as A."""
        if not self.machine.strict or not any(self.busy[i] for i in (*chain.d, *chain.a_registers)):
            return
        d, a = set(chain.d), set(chain.a_registers)
        for other in self.chains:
            overlap = d & set(other.d) if other.d != chain.d or other.form.d != chain.form.d else set()
            overlap |= d & set(other.a_registers) | a & set(other.d)
            if overlap and _meet(chain, other):
                name = self.machine.program.kernel.regs[min(overlap)].name
                raise Hazard(f"{chain.where}: uses register {name}, {_in_flight(other)}")

    def _require(self, chain: Chain, side: int, where) -> None:
        """The operand's bytes may be read by the asynchronous proxy."""
        if not self.machine.strict:
            return
        for at in alike([step[side] for step in chain.steps], len(chain.warps)):
            ctas = np.unique(chain.ctas[at])
            for operand in chain.operands(side, int(at[0]), where):
                require_shared(self.machine, ctas, operand, "AB"[side], where)
                chain.reads.append(("AB"[side], np.isin(np.arange(len(chain.warps)), at), operand))
                self.machine.races.wgmma(
                    where.instr, chain.warps[at], chain.ctas[at], chain.group[at], "AB"[side], operand
                )

    def _count(self, registers, change: int) -> None:
        for index in registers:
            self.busy[index] += change

    # -- registers in flight -------------------------------------------------------------------------------------------
    def touch(self, ws, index: int, lanes, instr, name: str, as_a: bool = False) -> None:
        """An ordinary instruction reads or writes a register that some chain uses; `as_a`: a wgmma reads it as A."""
        running = ws.full(lanes) if ws.mask is None else ws.full(lanes) & ws.mask
        for chain in self.chains:
            if index in chain.d or (not as_a and index in chain.a_registers):
                here = np.zeros((self.machine.n_warps, self.machine.n_cta), bool)
                here[chain.warps, chain.ctas] = True
                bad = running & here[ws.index][..., None]
                if bad.any():
                    where = self.machine.where(ws, instr, bad)
                    raise Hazard(f"{where}: touches register {name}, {_in_flight(chain, index)}")

    def used(self, ws, registers: list[int], only_set: bool) -> None:
        """Ordinary instructions of these warps read or wrote D, or wrote A, of some wgmma; `only_set`: only moves of
        constants did.
        """
        warps, ctas = ws.flat_pairs()
        at = np.array([self.rows[i] for i in registers])[:, None], warps, ctas
        self.unfenced[at] = np.where(self.unfenced[at] == FENCED, SET, self.unfenced[at]) if only_set else USED

    def fence(self, ws, active, where) -> None:
        warps, ctas = self._which(ws, active, where)
        self.unfenced[:, warps, ctas] = FENCED

    def require_fence(self, ws, active, registers: list[int], instr) -> None:
        """A wgmma uses these registers: a wgmma.fence must have come after the last ordinary use of each, and one
        before the first wgmma of a warp.
        """
        where = self.machine.where(ws, instr, True if active is None else active)
        if active is False:
            return
        warps, ctas = self._which(ws, active, where)
        found = self.unfenced[np.array([self.rows[i] for i in registers])[:, None], warps, ctas]
        advice = self.machine.races.advice if self.machine.races else None
        if advice and (found == SET).any():
            advice.accumulator_set(instr)
        bad = (found == USED).any(axis=1)
        if bad.any():
            name = self.machine.program.kernel.regs[registers[int(np.argmax(bad))]].name
            raise Hazard(
                f"{where}: uses register {name}, which ordinary instructions used with no wgmma.fence since: insert "
                "wgmma.fence.sync.aligned before it"
            )

    @staticmethod
    def _which(ws, active, where) -> tuple[np.ndarray, np.ndarray]:
        """Warp and CTA of each warp of the batch that runs an aligned instruction."""
        chosen = whole_warps(ws, active, where)
        warps, ctas = ws.flat_pairs()
        return (warps, ctas) if chosen is None else (warps[chosen], ctas[chosen])

    def check_overwrite(self, ctas: np.ndarray, chunks: np.ndarray, where) -> None:
        """Somebody writes these 16-byte chunks of shared memory: no wgmma in flight may still have to read them."""
        if not self.chains:
            return
        low, high = int(chunks.min()) * 16, int(chunks.max() + 1) * 16
        for chain in self.chains:
            for name, readers, operand in chain.reads:
                if operand.high <= low or high <= operand.low:
                    continue
                hit = np.isin(ctas, chain.ctas[readers]) & np.isin(chunks, operand.chunks)
                if hit.any():
                    place = self.machine.labels.shared_at(int(chunks[hit][0]) * 16)
                    raise Hazard(
                        f"{where}: overwrites {place}, which is operand {name} of a wgmma in flight "
                        f"({chain.where}): wait for it first (wgmma.wait_group)"
                    )

    # -- completion ----------------------------------------------------------------------------------------------------
    def commit(self, ws, active, where) -> None:
        warps, ctas = self._which(ws, active, where)
        self.committed[warps, ctas] += 1
        self.open = None

    def wait(self, ws, active, pending: int, where) -> None:
        """All but the latest `pending` groups of these warps take effect."""
        warps, ctas = self._which(ws, active, where)
        self.open = None
        limit = np.full(self.committed.shape, -1, np.int64)
        limit[warps, ctas] = self.committed[warps, ctas] - pending
        if self.machine.races:
            self.machine.races.wgmma_waited(warps, ctas, np.maximum(self.committed[warps, ctas] - pending, 0))
        left = []
        for chain in self.chains:
            done = chain.group < limit[chain.warps, chain.ctas]
            if done.all():
                self._execute(chain)
                self._count((*chain.d, *chain.a_registers), -1)
                continue
            left.append(chain.part(~done) if done.any() else chain)
            if done.any():
                self._execute(chain.part(done))
        self.chains = left

    def check_exit(self) -> None:
        whole = self.committed[: len(self.committed) // 4 * 4].reshape(-1, 4, self.committed.shape[1])
        uneven = (whole != whole[:, :1]).any(axis=1)
        if uneven.any() and self.machine.strict:
            group, cta = (int(i) for i in np.argwhere(uneven)[0])
            raise Hazard(
                f"CTA {self.machine.name_cta(cta)}: the warps of warpgroup {group} executed "
                f"{whole[group, :, cta].tolist()} wgmma.commit_group: all four must execute the same wgmma instructions"
            )
        if self.chains:
            raise Hazard(
                f"{self.chains[0].where}: the warp exits with this wgmma in flight: wgmma.wait_group is missing"
            )

    def _execute(self, chain: Chain) -> None:
        where = chain.where.during("when it executes")
        for at in alike([b for _, b in chain.steps], len(chain.warps)):
            for warps, ctas, position in products(chain.warps[at], chain.ctas[at]):
                position = at[position]
                operands = chain.operands(1, int(position[0, 0]), where)
                for operand in operands:
                    require_shared(self.machine, ctas, operand, "B", where)
                b = self._shared(operands, ctas, chain.form.b, chain.form.b_mn, None)  # [c, N, K]
                a = self._a(chain, warps, ctas, position, where)  # [c, w · 16, K]
                if self.machine.accumulation == "exact" or chain.form.d == "s32":
                    self._by_instruction(chain, warps, ctas, position, a, b)
                    continue
                if chain.form.d == "f32" and self.machine.fuses:
                    self._write(chain, warps, ctas, position, np.matmul(a, b.swapaxes(1, 2)))
                    continue
                # a float16 accumulator is rounded by every instruction; where schedules are compared bit by bit, how
                # many of a chain, and of how many warps, run together must not show
                k = a.shape[2] // len(chain.steps)
                for step in range(len(chain.steps)):
                    span = slice(step * k, step * k + k)
                    product = self._product(a[..., span], b[..., span])
                    self._write(chain, warps, ctas, position, product, step > 0)

    def _product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """A [c, w · 16, K] times B [c, N, K]; a warp by itself, which BLAS rounds alike whatever runs beside it, where
        schedules are compared.
        """
        if self.machine.fuses:
            return np.matmul(a, b.swapaxes(1, 2))
        c, rows, k = a.shape
        return np.matmul(a.reshape(c, rows // 16, 16, k), b.swapaxes(1, 2)[:, None]).reshape(c, rows, -1)

    def _by_instruction(self, chain: Chain, warps, ctas, position, a, b) -> None:
        """A [c, w · 16, K], B [c, N, K]: every instruction's sum by itself, rounded or saturated."""
        form, steps = chain.form, len(chain.steps)
        adds = np.repeat(chain.accumulate[position].T, 16, axis=1)[..., None]
        d = np.where(adds, self._accumulator(chain, warps, ctas), 0)
        k = a.shape[2] // steps
        for step in range(steps):
            span = slice(step * k, step * k + k)
            if form.d == "s32":
                product = np.matmul(a[..., span], b[..., span].swapaxes(1, 2)).astype(np.int64)  # exact: K is 32
                d = product + d
                d = np.clip(d, -(1 << 31), (1 << 31) - 1) if form.saturate else d.astype(np.int32)
            else:
                left = a[..., span] if form.sign > 0 else -a[..., span]
                d = fused_dot(left, b[..., span], d, (form.a, form.b), wgmma_model(form.a, form.d))
        self._put(chain, warps, ctas, d)

    def _accumulator(self, chain: Chain, warps, ctas) -> np.ndarray:
        """D [c, w · 16, N] as the registers hold it: float32 or int32."""
        form, registers = chain.form, self.machine.registers
        index = np.ix_(warps, ctas)
        words = np.stack([registers[register][index] for register in chain.d])  # [registers, w, c, 32]
        if form.d == "f16":
            values = np.stack([part.astype(np.uint16).view(np.float16) for part in (words, words >> np.uint32(16))], 1)
            values = values.astype(np.float32)
        else:
            values = words.view(np.int32 if form.d == "s32" else np.float32)
        values = values.reshape(form.n // 8, 2, 2, len(warps), len(ctas), 8, 4)
        values = values.transpose(4, 3, 1, 5, 0, 6, 2)  # [c, w, row half, row, n / 8, lane, element]
        return values.reshape(len(ctas), len(warps) * 16, form.n)

    def _put(self, chain: Chain, warps, ctas, d: np.ndarray) -> None:
        """The inverse of `_accumulator`."""
        form, registers = chain.form, self.machine.registers
        if form.d == "f16":
            words = np.ascontiguousarray(d.astype(np.float16)).view(np.uint32)  # pairs of neighbours in n
        else:
            words = d.astype(np.int32 if form.d == "s32" else np.float32).view(np.uint32)
        elements = words.shape[2] // (form.n // 8) // 4
        words = words.reshape(len(ctas), len(warps), 2, 8, form.n // 8, 4, elements)
        words = words.transpose(4, 2, 6, 1, 0, 3, 5).reshape(len(chain.d), len(warps), len(ctas), 32)
        for register, word in zip(chain.d, words, strict=True):
            registers[register][np.ix_(warps, ctas)] = word

    def _a(self, chain: Chain, warps, ctas, position, where) -> np.ndarray:
        form = chain.form
        if chain.from_registers:
            bits = np.stack([a for a, _ in chain.steps])[:, :, position]  # [steps, 4, w, c, 32]
            size = STORAGE[form.a]().itemsize
            parts = np.ascontiguousarray(bits).view(STORAGE[form.a])
            parts = parts.reshape(len(chain.steps), 2, 2, len(warps), len(ctas), 8, 4, 4 // size)
            parts = parts.transpose(4, 3, 2, 5, 0, 1, 6, 7)  # [c, w, row half, row, step, k half, lane, element]
            return decode(form.a, parts.reshape(len(ctas), len(warps) * 16, -1))
        count = position.size
        flat = position.reshape(-1)
        descriptors = [a if isinstance(a, int) else a[flat] for a, _ in chain.steps]
        result = None
        column = np.arange(count) % len(ctas)
        for same in alike(descriptors, count):
            for w, c, at in products(same // len(ctas), column[same]):
                operands = chain.operands(0, int(flat[same[at[0, 0]]]), where)
                for operand in operands:
                    require_shared(self.machine, ctas[c], operand, "A", where)
                tile = self._shared(operands, ctas[c], form.a, form.a_mn, warps[w] % 4)
                if len(c) == len(ctas) and len(w) == len(warps):
                    return tile
                if result is None:
                    result = np.empty((len(ctas), len(warps), 16, tile.shape[2]), np.float32)
                result[c[:, None], w] = tile.reshape(len(c), len(w), 16, -1)
        return result.reshape(len(ctas), len(warps) * 16, -1)

    def _shared(self, operands: list[Operand], ctas, dtype: str, mn_major: bool, quarters) -> np.ndarray:
        """A shared operand: float32 [n, rows, K]; of A only the rows of these quarters of the warpgroup."""
        chunks = np.concatenate([o.chunks for o in operands], axis=0 if mn_major else 1)
        if quarters is not None and list(quarters) != [0, 1, 2, 3]:
            span = 2 if mn_major else 16
            rows = (quarters[:, None] * span + np.arange(span)).reshape(-1)
            chunks = chunks[:, rows] if mn_major else chunks[rows]
        values = decode(dtype, take_chunks(self.machine.smem.chunks, ctas, chunks).view(STORAGE[dtype]))
        return values.swapaxes(1, 2) if mn_major else values

    def _write(self, chain: Chain, warps, ctas, position, product, again: bool = False) -> None:
        """Products [c, w · 16, N] → the D registers of each lane, added to them where the chain says so."""
        form, registers = chain.form, self.machine.registers
        if form.sign < 0:
            product = -product
        fragments = product.reshape(len(ctas), len(warps), 2, 8, form.n // 8, 4, 2)
        fragments = fragments.transpose(4, 2, 6, 1, 0, 3, 5)  # [n / 8, row half, element, w, c, row, lane]
        fragments = fragments.reshape(form.n // 2, len(warps), len(ctas), 32)
        w, c = _run(warps), _run(ctas)
        index = (w, c) if isinstance(w, slice) and isinstance(c, slice) else np.ix_(warps, ctas)
        adds = chain.accumulate[position][..., None]
        every, some = again or bool(adds.all()), again or bool(adds.any())
        block = self.machine.accumulators.get(chain.d)
        if form.d == "f32" and block is not None:
            view = block.view(np.float32)
            at = (slice(None), *index)
            old = view[at] if some else None
            view[at] = (
                fragments if not some else old + fragments if every else np.where(adds, old + fragments, fragments)
            )
            return
        for i, register in enumerate(chain.d):
            if form.d == "f32":
                old = registers[register][index].view(np.float32)
                new = fragments[i] if not some else np.where(adds | again, old + fragments[i], fragments[i])
                registers[register][index] = new.view(np.uint32)
                continue
            pair = fragments[2 * i : 2 * i + 2].transpose(1, 2, 3, 0)
            if some:
                old = np.ascontiguousarray(registers[register][index])[..., None].view(np.float16).astype(np.float32)
                pair = np.where((adds | again)[..., None], old + pair, pair)
            registers[register][index] = np.ascontiguousarray(pair.astype(np.float16)).view(np.uint32)[..., 0]


def whole_warps(ws, active, where) -> np.ndarray | None:
    """Positions in the batch of the warps that run an aligned instruction; None for all of them.

    Raises:
        Hazard: part of a warp runs it.
    """
    if active is None:
        return None
    lanes = ws.full(active).reshape(-1, 32)
    if (lanes != lanes[:, :1]).any():
        raise Hazard(f"{where}: executed by part of a warp: all 32 lanes must converge on it")
    return None if lanes.all() else np.nonzero(lanes[:, 0])[0]


def _run(numbers: np.ndarray) -> slice | np.ndarray:
    """Ascending neighbours as a slice."""
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


def _meet(one: Chain, other: Chain) -> bool:
    """Whether two chains share a warp."""
    return bool(np.isin(one.warps << 32 | one.ctas, other.warps << 32 | other.ctas).any())


def _in_flight(chain: Chain, index: int | None = None) -> str:
    kind = "an accumulator register" if index is None or index in chain.d else "a register of operand A"
    return (
        f"{kind} of a wgmma in flight ({chain.where}): commit it and wait first (wgmma.commit_group, wgmma.wait_group)"
    )
