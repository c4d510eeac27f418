"""tcgen05.mma of every kind, shape and data path, as an operation of the tensor core (PTX ISA 9.1 §9.7.16.10).

What kernels use most, kind::f16 with 128 rows a CTA and float32 D, has a faster way through `tensorcore`; this is the
general one. A Product knows from its issue on which shared chunks and which cells of tensor memory it reads and writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .accumulate import BLOCK_SCALED_F4, exponents_of, fused_blocks, fused_dot, mma_model
from .datapath import EVERY_LANE, Cells, Datapath, read, require_columns, require_states, write
from .descriptors import Operand, shared_operand
from .elements import from_shared, from_tensor, numbers, used_bytes
from .errors import Hazard, UnsupportedInstruction
from .instruction import BITS, SCALED, Instruction, decode_instruction
from .memory import CP_PENDING, MMA_PENDING, REASONS, ST_PENDING, UNWRITTEN, VALID, take_chunks
from .tensorcore import A_COLUMNS, require_inside, require_shared

RUNTIME_ID = 3 << 30  # bits of a scale factor's address that its instruction descriptor repeats


@dataclass(frozen=True)
class Call:
    """What the opcode and the operands of one tcgen05.mma say, in one set of CTAs that agree on all of it."""

    kind: str
    group: int
    stationary: bool
    blocks: int
    a_in_tmem: bool
    d: int
    a: int
    b: int
    idesc: int
    accumulate: bool
    scale: int = 0  # D is scaled by 2^-scale before the product is added
    disabled: tuple[int, ...] = ()  # lanes that are not written, 32 a word
    factors: tuple[int, ...] = ()  # addresses of the scale factors of A and of B


@dataclass
class Product:
    """One tcgen05.mma in the tensor core's queue."""

    ctas: np.ndarray
    bits: int  # the same CTAs as a CtaSets int
    call: Call
    instruction: Instruction
    path: Datapath
    d: Cells
    a: Operand | Cells
    b: Operand
    factors: tuple[Cells, ...]
    where: object
    remaining: int = 0  # CTAs where it is not executed yet
    pending = MMA_PENDING
    opcode = "tcgen05.mma"

    def shared_operands(self) -> list[tuple[str, Operand]]:
        """(name, chunks) that it reads in shared memory."""
        return [(f"operand {name}", x) for name, x in (("A", self.a), ("B", self.b)) if isinstance(x, Operand)]

    def cells_read(self) -> list[tuple[str, Cells]]:
        """(name, cells) that it reads in tensor memory, besides D."""
        found = [("operand A", self.a)] if isinstance(self.a, Cells) else []
        return found + list(zip(("the scale factors of A", "the scale factors of B"), self.factors, strict=False))

    def cells_written(self) -> Cells:
        return self.d

    def flop(self) -> int:
        return 2 * self.instruction.rows * self.instruction.n * self.instruction.k * len(self.ctas)

    # -- execution -----------------------------------------------------------------------------------------------------
    def execute(self, m, ctas: np.ndarray) -> None:
        """Read the operands and write D in these CTAs."""
        if m.strict:
            self._check_operands(m, ctas)
        how, path, columns = self.instruction, self.path, self.d.count
        a = self._a(m, ctas)  # [n, groups or 1, rows, K]
        b = self._b(m, ctas).reshape(len(ctas), path.groups, columns, -1)
        a = np.broadcast_to(a, (*b.shape[:2], *a.shape[2:]))
        words = read(m.tmem, ctas, self.d.start, columns, path)
        c = _numbers_of(words, how.d) if self.call.accumulate else None
        if c is not None and self.call.scale:
            c = c * np.float32(2.0**-self.call.scale)
        result = self._scaled(m, ctas, a, b, c) if how.blocks else self._plain(m, a, b, c)
        new = _words_of(result, how.d)
        if any(self.call.disabled):
            new = np.where(self._kept(m, ctas), words, new)
        write(m.tmem, ctas, self.d.start, path, new)

    def _check_operands(self, m, ctas) -> None:
        where = self.where.during("when it executes")
        for name, operand in self.shared_operands():
            require_operand(m, ctas, operand, name[-1], self.instruction, where)
        for name, cells in self.cells_read():
            require_states(m, ctas, cells, (VALID, MMA_PENDING, CP_PENDING), name, where)

    def _a(self, m, ctas) -> np.ndarray:
        how = self.instruction
        if isinstance(self.a, Cells):
            a = from_tensor(read(m.tmem, ctas, self.a.start, A_COLUMNS, self.path), how.a)
        else:
            a = _matrix(m, ctas, self.a, how.a, how.packed)[:, None]
        return -a if how.a_sign < 0 else a

    def _b(self, m, ctas) -> np.ndarray:
        """[n, N, K]: what the CTAs of a pair each have of it, joined."""
        how = self.instruction
        b = _matrix(m, ctas, self.b, how.b, how.packed)
        if how.group == 2:
            b = np.repeat(b.reshape(len(ctas) // 2, how.n, -1), 2, axis=0)
        return -b if how.b_sign < 0 else b

    def _plain(self, m, a, b, c) -> np.ndarray:
        how = self.instruction
        if m.accumulation == "exact" and how.d != "s32":
            return fused_dot(a, b, c, (how.a, how.b), mma_model(how.d))
        product = np.matmul(a, b.swapaxes(2, 3))  # integers are exact: 32 products of 16 bits
        if how.d != "s32":
            return product if c is None else c + product
        total = product.astype(np.int64) + (0 if c is None else c)
        return np.clip(total, -(1 << 31), (1 << 31) - 1) if how.saturate else total

    def _scaled(self, m, ctas, a, b, c) -> np.ndarray:
        """Block scaling: element k of a row is multiplied by the row's factor for the block that holds k."""
        how = self.instruction
        each = how.k // how.blocks
        factors = [np.repeat(f, each, axis=-1) for f in self._factors(m, ctas)]
        scaled = [x.astype(np.float64) * f for x, f in zip((a, b), factors, strict=True)]
        if m.accumulation != "exact":
            product = np.matmul(scaled[0], scaled[1].swapaxes(2, 3))
            return (product if c is None else product + c).astype(np.float32)
        powers = [exponents_of(f, "e4m3" if how.scale == "ue4m3" else "ue8m0") for f in factors]
        if not how.packed:
            powers = [p + exponents_of(x, f) for p, x, f in zip(powers, (a, b), (how.a, how.b), strict=True)]
            return fused_blocks(scaled[0][..., None], scaled[1][..., None], *powers, c, mma_model("f32"))
        blocks = [x.reshape(*x.shape[:-1], -1, 16) for x in scaled]
        return fused_blocks(*blocks, *(p[..., ::16] for p in powers), c, BLOCK_SCALED_F4)

    def _factors(self, m, ctas) -> tuple[np.ndarray, np.ndarray]:
        """Scale factors [n, groups, rows of A or columns of the group, blocks], from copies that have to agree."""
        how, groups = self.instruction, self.path.groups
        found = []
        for side, cells, first in (("A", self.factors[0], how.sf_a), ("B", self.factors[1], how.sf_b)):
            shared = 4 // groups if side == "B" else 4  # quarters of lanes that hold a copy of the same factors
            count = self.d.count if side == "B" else self.path.rows
            words = read(m.tmem, ctas, cells.start, cells.count, Datapath(32, 4))  # [n, quarters, 32, columns]
            data = (
                np.ascontiguousarray(words.swapaxes(2, 3))
                .view(np.uint8)
                .reshape(len(ctas), -1, shared, 32 * cells.count, 4)
            )
            data = data[:, :, :, :count, first : first + how.blocks]
            if m.strict and (data != data[:, :, :1]).any():
                place = f"the scale factors of {side} from {m.labels.column_at(cells.start)} on"
                raise Hazard(
                    f"{self.where}: {place} differ between the warps' lanes: each group of 32 lanes holds a copy "
                    "(tcgen05.cp .warpx4 makes them)"
                )
            values = numbers(how.scale, data[:, :, 0])
            found.append(np.broadcast_to(values, (len(ctas), groups, count, how.blocks)))
        return found[0], found[1]

    def _kept(self, m, ctas) -> np.ndarray:
        """Lanes whose D stays as it is: bool [n, groups, rows, 1]."""
        words = np.array(self.call.disabled, np.uint32).reshape(-1, 4)
        lanes = (words[..., None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool)  # [CTAs of the group, 4, 32]
        if self.path.half is not None:
            lanes = lanes[..., 16 * self.path.half : 16 * self.path.half + 16]
        each = m.cluster.rank(ctas) % 2 if len(words) == 2 else np.zeros(len(ctas), int)
        return lanes[each].reshape(len(ctas), self.path.groups, self.path.rows, 1)


def _matrix(m, ctas, operand: Operand, name: str, packed: bool) -> np.ndarray:
    """A shared operand: float32 [n, rows, K]."""
    chunks = take_chunks(m.smem.chunks, ctas, operand.chunks)[..., None].view(np.uint8)
    values = from_shared(chunks, name, packed)
    return values.swapaxes(1, 2) if operand.mn_major else values


def _numbers_of(words: np.ndarray, form: str) -> np.ndarray:
    """D as tensor memory holds it, one element a column → float32 or int32."""
    if form == "f16":
        return words.astype(np.uint16).view(np.float16).astype(np.float32)
    return words.view(np.float32 if form == "f32" else np.int32)


def _words_of(values: np.ndarray, form: str) -> np.ndarray:
    if form == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.ascontiguousarray(values.astype(np.float32 if form == "f32" else np.int32)).view(np.uint32)


def require_operand(m, ctas, operand: Operand, name: str, how: Instruction, where) -> None:
    """The operand's bytes may be read by the tensor core; padding of narrow elements may be anything."""
    used = used_bytes(how.a if name == "A" else how.b, how.packed)
    if used == 16 or not m.strict:
        require_shared(m, ctas, operand, name, where)
        return
    require_inside(m, operand, name, where)
    states = take_chunks(m.smem.chunk_state, ctas, operand.chunks)[..., None].view(np.uint8)[..., :used]
    bad = states != VALID
    if bad.any():
        cta, *rest = np.argwhere(bad)[0]
        offset = int(operand.chunks[tuple(rest[:-1])]) * 16 + int(rest[-1])
        place = f"operand {name} of CTA {m.name_cta(ctas[cta])} at {m.labels.shared_at(offset)}"
        raise Hazard(f"{where}: {place} may not be read: {REASONS[int(states[bad][0])]}")


# -- issue -------------------------------------------------------------------------------------------------------------
def issue_product(m, ctas: np.ndarray, call: Call, where) -> None:
    """Check a tcgen05.mma and queue it. `ctas`: all that take part, ascending."""
    how = decode_instruction(call.idesc, call.kind, call.group, call.stationary, call.blocks, where)
    path = _datapath(how, call, where)
    d = Cells(call.d & 0xFFFF, how.n // path.groups, _enabled(path, call.disabled))
    require_columns(m, ctas, d, "accumulator", where)
    if m.strict:
        _check_accumulator(m, ctas, d, call.accumulate, where)
    a = _operand_a(m, ctas, how, path, call, where)
    b = shared_operand(call.b, how.n // how.group, how.b_mn, where, BITS[how.b])
    require_operand(m, ctas, b, "B", how, where)
    factors = _scale_factors(m, ctas, how, path, call, where)
    if m.strict:
        m.tmem.state[d.index(ctas)] = MMA_PENDING
    bits = m.queue.sets.bits(ctas)
    m.tensor_core.issue(Product(ctas, bits, call, how, path, d, a, b, factors, where))


def _datapath(how: Instruction, call: Call, where) -> Datapath:
    lane = call.d >> 16
    path = how.datapath(lane // 16)
    if lane not in ((0, 16) if path.half is not None else (0,)):
        allowed = "lane 0 or 16" if path.half is not None else "lane 0"
        raise Hazard(f"{where}: the accumulator's TMEM address {call.d:#x} must start at {allowed}")
    if call.scale and call.kind not in ("f16", "tf32"):
        raise Hazard(f"{where}: kind::{call.kind} has no scale-input-d")
    if not 0 <= call.scale <= 15:
        raise Hazard(f"{where}: scale-input-d {call.scale}: it must be from 0 to 15")
    return path


def _enabled(path: Datapath, disabled: tuple[int, ...]) -> np.ndarray:
    """Halves of quarters of which at least one lane is written, in some CTA."""
    lanes = path.lanes
    if any(disabled):
        words = np.bitwise_and.reduce(np.array(disabled, np.uint32).reshape(-1, 4), axis=0)
        off = np.stack([words & 0xFFFF, words >> np.uint32(16)], 1) == 0xFFFF
        lanes = lanes & ~off
    return lanes


def _check_accumulator(m, ctas, d: Cells, accumulate: bool, where) -> None:
    state = m.tmem.state[d.index(ctas)]
    for code in (ST_PENDING, CP_PENDING):
        if (state == code).any():
            raise Hazard(f"{where}: the accumulator may not be used: {REASONS[code]}")
    if accumulate and (state == UNWRITTEN).any():
        raise Hazard(
            f"{where}: accumulates onto {d.count} columns from {m.labels.column_at(d.start)} on, which were "
            "never written: the first MMA must not accumulate"
        )


def _operand_a(m, ctas, how: Instruction, path: Datapath, call: Call, where) -> Operand | Cells:
    if not call.a_in_tmem:
        operand = shared_operand(call.a, how.rows, how.a_mn, where, BITS[how.a])
        require_operand(m, ctas, operand, "A", how, where)
        return operand
    if how.a_mn:
        raise Hazard(f"{where}: A in TMEM cannot be transposed")
    if call.a >> 16 != call.d >> 16:
        raise Hazard(f"{where}: A in TMEM ({call.a:#x}) must start at the lane of D ({call.d:#x})")
    if how.packed:
        raise UnsupportedInstruction(f"{where}: kind::{how.kind} with A in TMEM is not supported")
    cells = Cells(call.a & 0xFFFF, A_COLUMNS, path.lanes)
    require_columns(m, ctas, cells, "A operand", where)
    if m.strict:
        require_states(m, ctas, cells, (VALID, CP_PENDING), "operand A", where)
    return cells


def _scale_factors(m, ctas, how: Instruction, path: Datapath, call: Call, where) -> tuple[Cells, ...]:
    """Columns that hold the scale factors: one for 32 rows, a byte a factor."""
    if how.kind not in SCALED:
        return ()
    counts = -(-how.rows // 32), -(-how.n // path.groups // 32)
    found = []
    for side, address, count in zip("AB", call.factors, counts, strict=True):
        address &= ~RUNTIME_ID
        if address >> 16:
            raise Hazard(f"{where}: the scale factors of {side} ({address:#x}) must start at lane 0")
        cells = Cells(address, count, EVERY_LANE)
        require_columns(m, ctas, cells, f"scale factors of {side}", where)
        if m.strict:
            require_states(m, ctas, cells, (VALID, CP_PENDING), f"the scale factors of {side}", where)
        found.append(cells)
    return tuple(found)
