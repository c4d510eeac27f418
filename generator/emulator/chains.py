"""What a wgmma says and holds: its form, the chain of steps onto one accumulator, and warps that can run together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import ml_dtypes
import numpy as np

from .descriptors import Operand, wgmma_operand
from .formats import bf16_to_f32, f16_to_f32

STORAGE = {"bf16": np.uint16, "f16": np.uint16, "tf32": np.uint32, "e4m3": np.uint8, "e5m2": np.uint8}
STORAGE |= {"u8": np.uint8, "s8": np.uint8}
FP8 = {
    name: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    for name, dtype in (("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2))
}


def decode(name: str, bits: np.ndarray) -> np.ndarray:
    """Operand bits → float32; tf32 drops the low 13 bits of the mantissa (§9.7.15.5.2)."""
    if name == "bf16":
        return bf16_to_f32(bits)
    if name == "f16":
        return f16_to_f32(bits)
    if name == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if name in ("u8", "s8"):
        return bits.view(np.int8 if name == "s8" else np.uint8).astype(np.float32)
    return FP8[name][bits]


@dataclass(frozen=True)
class Form:
    """What an opcode and its immediates say. `k` elements an instruction are always 32 bytes."""

    n: int
    d: str  # "f32", "f16" or "s32"
    a: str
    b: str
    sign: int  # the product of the two negations
    a_mn: bool
    b_mn: bool
    saturate: bool = False  # of s32: clamp each instruction's sum, where it would wrap around

    @property
    def registers(self) -> int:
        """Registers of D a thread."""
        return self.n // 4 if self.d == "f16" else self.n // 2


@cache
def form_of(opcode: str, negate_a: int, negate_b: int, a_mn: bool, b_mn: bool) -> Form:
    shape, d, a, b = opcode.removesuffix(".satfinite").split(".")[-4:]
    n = int(shape[shape.index("n") + 1 : shape.index("k")])
    return Form(n, d, a, b, negate_a * negate_b, a_mn, b_mn, opcode.endswith(".satfinite"))


@dataclass
class Chain:
    """Successive wgmma of some warps onto one accumulator: their k extents are multiplied in one go.

    A descriptor is an int where all warps agree, else u64 [warps]; A in registers is u32 [4, warps, 32].
    """

    warps: np.ndarray
    ctas: np.ndarray
    group: np.ndarray  # number of the wgmma group that each warp will commit it to
    d: tuple[int, ...]  # register indices
    form: Form
    accumulate: np.ndarray  # bool [warps]: whether the first step adds to D
    steps: list[tuple[int | np.ndarray, int | np.ndarray]]
    a_registers: list[int]  # register indices of A, as often as they are used
    where: object
    batch: object  # the Warps it was issued for
    reads: list[tuple[str, np.ndarray, Operand]] = field(default_factory=list)  # side, which warps, chunks

    def part(self, chosen: np.ndarray) -> Chain:
        """The same for some of its warps."""
        pick = lambda x: x if isinstance(x, int) else x[..., chosen, :] if x.ndim == 3 else x[chosen]  # noqa: E731
        return replace(
            self,
            warps=self.warps[chosen],
            ctas=self.ctas[chosen],
            group=self.group[chosen],
            accumulate=self.accumulate[chosen],
            steps=[(pick(a), pick(b)) for a, b in self.steps],
            a_registers=list(self.a_registers),
            batch=None,
            reads=[(side, who[chosen], operand) for side, who, operand in self.reads if who[chosen].any()],
        )

    @property
    def from_registers(self) -> bool:
        return isinstance(self.steps[0][0], np.ndarray) and self.steps[0][0].ndim == 3

    def operands(self, side: int, at: int, where) -> list[Operand]:
        """Shared-memory operands of every step, as warp number `at` gave them."""
        rows, mn, dtype = (64, self.form.a_mn, self.form.a) if side == 0 else (self.form.n, self.form.b_mn, self.form.b)
        size = STORAGE[dtype]().itemsize
        return [wgmma_operand(step_at(step[side], at), rows, mn, size, where) for step in self.steps]


def step_at(descriptor: int | np.ndarray, warp: int) -> int:
    return descriptor if isinstance(descriptor, int) else int(descriptor[warp])


def alike(descriptors: list[int | np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Warps that agree on every descriptor: positions, ascending."""
    varying = [d for d in descriptors if not isinstance(d, int)]
    if not varying:
        yield np.arange(count)
        return
    _, which = np.unique(np.stack(varying), axis=1, return_inverse=True)
    which = which.reshape(-1)
    for number in range(int(which.max()) + 1):
        yield np.nonzero(which == number)[0]


def products(warps: np.ndarray, ctas: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(warp, CTA) pairs as products: warps [w], CTAs [c], and the position of each pair [w, c]."""
    rows: dict[bytes, list[np.ndarray]] = {}
    for warp in np.unique(warps):
        at = np.nonzero(warps == warp)[0]
        at = at[np.argsort(ctas[at])]
        rows.setdefault(ctas[at].tobytes(), []).append(at)
    for same in rows.values():
        at = np.stack(same)
        yield warps[at[:, 0]], ctas[at[0]], at
