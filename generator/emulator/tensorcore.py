"""The tensor core of each CTA: a FIFO of MMAs that read their operands and write D when a commit completes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from .accumulate import fused_dot, mma_model
from .datapath import EVERY_LANE, Cells
from .descriptors import Operand, Shape
from .errors import Hazard
from .formats import bf16_to_f32, f16_to_f32
from .memory import COPIED, MMA_PENDING, REASONS, VALID, TensorMemory, take_chunks

A_COLUMNS = 8  # of A in tensor memory: 32 bytes a lane


class Work(Protocol):
    """An asynchronous tcgen05 operation: what it reads and writes is known from its issue on."""

    bits: int  # CTAs that take part, as a CtaSets int
    remaining: int  # those where it is not executed yet
    where: object
    pending: int  # state of the cells that it is going to write
    opcode: str

    def shared_operands(self) -> list[tuple[str, Operand]]: ...

    def cells_read(self) -> list[tuple[str, Cells]]: ...

    def cells_written(self) -> Cells: ...

    def flop(self) -> int: ...


@dataclass
class Mma:
    """One tcgen05.mma in one set of CTAs that agree on every operand."""

    ctas: np.ndarray
    bits: int  # the same CTAs as a CtaSets int
    d: int
    shape: Shape
    a: Operand | int  # shared chunks, or the first TMEM column
    b: Operand
    accumulate: bool
    where: object
    remaining: int = 0  # CTAs where it is not executed yet
    pending = MMA_PENDING
    opcode = "tcgen05.mma"

    def shared_operands(self) -> list[tuple[str, Operand]]:
        """(name, chunks) that it reads in shared memory."""
        return [(name, x) for name, x in (("operand A", self.a), ("operand B", self.b)) if not isinstance(x, int)]

    def cells_read(self) -> list[tuple[str, Cells]]:
        """(name, cells) that it reads in tensor memory, besides D."""
        return [("operand A", Cells(self.a, A_COLUMNS, EVERY_LANE))] if isinstance(self.a, int) else []

    def cells_written(self) -> Cells:
        return Cells(self.d, self.shape.n, EVERY_LANE)

    def flop(self) -> int:
        return 2 * self.shape.m * self.shape.n * 16 * len(self.ctas)

    def fuses_with(self, later: Mma) -> bool:
        """Same accumulator and kind of operands, and `later` adds to it: their k extents may be concatenated."""
        return (
            later.accumulate
            and later.d == self.d
            and later.shape == self.shape
            and isinstance(later.a, int) == isinstance(self.a, int)
            and later.bits == self.bits
        )


def check_columns(m, ctas, start, count, what, where) -> None:
    if start + count > TensorMemory.COLUMNS or not m.tmem.allocated[start : start + count, ctas].all():
        raise Hazard(f"{where}: {what} in TMEM columns {start} to {start + count - 1}, which are not all allocated")


def require_tmem(m, ctas, start, count, where, legal) -> None:
    if not m.strict:
        return
    state = m.tmem.state[start : start + count, :, :, ctas]
    bad = np.logical_and.reduce([state != code for code in legal])
    if bad.any():
        raise Hazard(
            f"{where}: the A operand at {m.labels.column_at(start + int(np.argwhere(bad)[0, 0]))} may not "
            f"be read: {REASONS[int(state[bad][0])]}"
        )


def require_inside(m, operand: Operand, name: str, where) -> None:
    if operand.low < 0 or operand.high > m.smem.size:
        raise Hazard(
            f"{where}: the descriptor of {name} reaches shared offsets {operand.low} to "
            f"{operand.high - 1}, the CTA has {m.smem.size} bytes"
        )


def require_shared(m, ctas, operand: Operand, name: str, where) -> None:
    require_inside(m, operand, name, where)
    found = m.smem.invalid_chunk(ctas, operand.chunks) if m.strict else None
    if found is None:
        return
    worse = m.smem.invalid_chunk(ctas, operand.chunks, (VALID, COPIED))  # cp.async without a proxy fence is tolerated
    cta, chunk, state = worse or found
    what = name if " " in name else f"operand {name}"
    what = f"{what} of CTA {m.name_cta(cta)} at {m.labels.shared_at(chunk * 16)} may not be read: {REASONS[state]}"
    if worse is not None:
        raise Hazard(f"{where}: {what}")
    if m.races.advice:
        m.races.advice.warn(f"PTX line {where.instr.line} ({where.instr.opcode}): {what}")


class TensorCore:
    """Runs queued MMAs in issue order; neighbours that accumulate onto each other become one matrix product."""

    def __init__(self, machine):
        self.machine = machine
        self.waiting: list[list[Mma]] = []  # taken and not executed, in chains that become one product each
        self.checked: dict[tuple, tuple] = {}  # fast mode: operands of MMAs found legal, while TMEM stays allocated
        self.issued: list[Work] = []  # not executed everywhere yet, in issue order

    def issue(self, op: Work) -> None:
        """Queue an operation whose destination is marked as pending already."""
        self.machine.work["mma_flop"] += op.flop()
        op.remaining = op.bits
        if self.machine.races:
            self.machine.races.tensor_work(op)
        if self.machine.strict:
            self.issued.append(op)
        self.machine.queue.add(op.bits, {}, lambda bits: self._take(op, bits), fifo=True)

    def check_overwrite(self, ctas: np.ndarray, chunks: np.ndarray, where) -> None:
        """Somebody writes these 16-byte chunks of shared memory: nothing under way may still have to read them.

        `ctas`, `chunks`: int arrays of one shape.
        """
        if not self.issued:
            return
        low, high = int(chunks.min()) * 16, int(chunks.max() + 1) * 16
        sets, touched = self.machine.queue.sets, None
        for op in self.issued:
            for name, operand in op.shared_operands():
                if operand.high <= low or high <= operand.low:
                    continue
                touched = sets.bits(np.unique(ctas)) if touched is None else touched
                if not op.remaining & touched:
                    continue
                hit = np.isin(ctas, sets.array(op.remaining)) & np.isin(chunks, operand.chunks)
                if hit.any():
                    place = self.machine.labels.shared_at(int(chunks[hit][0]) * 16)
                    raise Hazard(
                        f"{where}: overwrites {place}, which is {name} of a {op.opcode} that is not known to "
                        f"be complete ({op.where}): wait on the mbarrier of its tcgen05.commit first"
                    )

    def check_columns_read(self, ctas: np.ndarray, column: np.ndarray, columns: int, where, lanes=None) -> None:
        """A tcgen05.st writes `columns` columns from `column[i]` on in CTA `ctas[i]`: likewise for tensor memory.

        `lanes`: (quarters, halves) that the warps write, None for whatever the operation reads.
        """
        for op in self.issued:
            for name, cells in op.cells_read():
                hit = (column < cells.stop) & (cells.start < column + columns)
                if not hit.any():
                    continue
                if lanes is not None:
                    used = cells.lanes[lanes]
                    hit &= used if used.ndim == 1 else used.any(axis=1)
                hit &= np.isin(ctas, self.machine.queue.sets.array(op.remaining))
                if hit.any():
                    place = self.machine.labels.column_at(cells.start)
                    raise Hazard(
                        f"{where}: overwrites {place}, which is {name} of a {op.opcode} that is not known to be "
                        f"complete ({op.where}): wait on the mbarrier of its tcgen05.commit first"
                    )

    def _take(self, op: Work, bits: int) -> None:
        op.remaining &= ~bits
        if not isinstance(op, Mma):
            self.flush()
            op.execute(self.machine, self.machine.queue.sets.array(bits))
            self._finish(op.cells_written(), bits)
            return
        for part in (bits,) if self.machine.schedule.seed is None else self.machine.cluster.split(bits):
            self._collect(op if part == op.bits else self._part(op, part))

    def _part(self, op: Mma, bits: int) -> Mma:
        return replace(op, ctas=self.machine.queue.sets.array(bits), bits=bits, remaining=0)

    def _collect(self, op: Mma) -> None:
        before = next((chain for chain in reversed(self.waiting) if chain[0].bits & op.bits), None)  # in some CTA
        if self.machine.fuses and before is not None and before[-1].fuses_with(op):
            before.append(op)
        else:
            self.waiting.append([op])

    def _finish(self, cells: Cells, bits: int) -> None:
        """These cells are written in these CTAs."""
        m = self.machine
        if not m.strict:
            return
        m.tmem.state[cells.index(m.queue.sets.array(bits))] = VALID
        self.issued = [op for op in self.issued if op.remaining]
        for later in self.issued:  # one further back in the queue will overwrite them: still not for reading
            still, other = later.remaining & bits, later.cells_written()
            if still and other.overlaps(cells):
                m.tmem.state[other.index(m.queue.sets.array(still))] = later.pending

    def flush(self) -> None:
        """Execute what has been collected."""
        chains, self.waiting = self.waiting, []
        for ops in chains:
            self._execute(ops)

    def _execute(self, ops: list[Mma]) -> None:
        m, first = self.machine, ops[0]
        shape, ctas, n = first.shape, first.ctas, len(first.ctas)
        for op in ops if m.strict else ():
            if isinstance(op.a, int):
                require_tmem(m, ctas, op.a, 8, op.where.during("when it executes"), (VALID, MMA_PENDING))
            else:
                require_shared(m, ctas, op.a, "A", op.where.during("when it executes"))
            require_shared(m, ctas, op.b, "B", op.where.during("when it executes"))
        a = self._a(ops, ctas) * np.float32(shape.a_sign) if shape.a_sign < 0 else self._a(ops, ctas)
        b = self._shared([op.b for op in ops], ctas, shape.b_bf16)
        if shape.b_sign < 0:
            b = -b
        if shape.group > 1:  # each CTA of the pair brought its share of N; both need all of it
            b = np.repeat(b.reshape(n // shape.group, shape.n, -1), shape.group, axis=0)
        if m.accumulation == "exact":
            self._accumulate_exactly(first, len(ops), a, b)
        else:
            self._accumulate(first, a, b)
        self.issued = [op for op in self.issued if op.remaining]
        self._finish(first.cells_written(), first.bits)

    def _accumulate(self, first: Mma, a: np.ndarray, b: np.ndarray) -> None:
        """D = A·B (+ D) in float32, for A transposed [n, K, M] and B [n, N, K]."""
        shape, ctas, n = first.shape, first.ctas, len(first.ctas)
        span = slice(first.d, first.d + shape.n)
        product = np.matmul(b, a)  # [n, N, M]: the transpose of D
        rows = product.reshape(n, shape.n, 4, 32).transpose(1, 2, 0, 3)
        view = self.machine.tmem.data.view(np.float32)
        if first.accumulate:
            rows = rows + view[span, :, ctas]
        view[span, :, ctas] = rows

    def _accumulate_exactly(self, first: Mma, steps: int, a: np.ndarray, b: np.ndarray) -> None:
        """As `_accumulate`, for each instruction by itself."""
        shape, ctas, n = first.shape, first.ctas, len(first.ctas)
        view = self.machine.tmem.data.view(np.float32)
        at = (slice(first.d, first.d + shape.n), slice(None), ctas)
        d = view[at].transpose(2, 0, 1, 3).reshape(n, shape.n, 128) if first.accumulate else None
        forms = tuple("bf16" if bf16 else "f16" for bf16 in (shape.b_bf16, shape.a_bf16))
        a, k = a.swapaxes(1, 2), a.shape[1] // steps
        for step in range(steps):
            span = slice(step * k, step * k + k)
            d = fused_dot(b[..., span], a[..., span], d, forms, mma_model("f32"))
        view[at] = d.reshape(n, shape.n, 4, 32).transpose(1, 2, 0, 3)

    def _a(self, ops: list[Mma], ctas: np.ndarray) -> np.ndarray:
        """A transposed: float32 [n, K, M]."""
        shape = ops[0].shape
        if isinstance(ops[0].a, int):
            columns = np.concatenate([np.arange(op.a, op.a + 8) for op in ops])
            packed = self.machine.tmem.data[columns][:, :, ctas]  # [8·steps, 4, n, 32]
            halves = packed.view(np.uint16).reshape(*packed.shape, 2)
            bits = halves.transpose(2, 0, 4, 1, 3).reshape(len(ctas), -1, 128)
            return (bf16_to_f32 if shape.a_bf16 else f16_to_f32)(np.ascontiguousarray(bits))
        return self._shared([op.a for op in ops], ctas, shape.a_bf16).swapaxes(1, 2)

    def _shared(self, operands: list[Operand], ctas: np.ndarray, bf16: bool) -> np.ndarray:
        """A shared operand: float32 [n, rows, K]."""
        mn_major = operands[0].mn_major
        chunks = np.concatenate([o.chunks for o in operands], axis=0 if mn_major else 1)
        bits = take_chunks(self.machine.smem.chunks, ctas, chunks).view(np.uint16)  # [n, rows or K, the other]
        values = (bf16_to_f32 if bf16 else f16_to_f32)(bits)
        return values.swapaxes(1, 2) if mn_major else values
