"""mma.sync: fragments straight from global memory, every type and shape of the emulator's table."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from ...emulator.table import TABLE
from ..case import Array, Case, Rule
from .wgmma import DTYPES, draw

BLOCK, GRID = 32, 8
_INTEGER = {"s8": np.int8, "u8": np.uint8}
VALUES = ("normal", "wide", "special", "cancelling", "subnormal")


def cases(seed: int) -> Iterator[Case]:
    for name in TABLE:
        if not re.match(r"mma\.sync\.aligned\.m\d+n\d+k\d+\.row\.col", name):
            continue
        types = name.split(".")[-4:]
        if all(t in DTYPES for t in types[1:3]):
            for values in VALUES:
                yield _case(name, types, values, np.random.default_rng([seed, zlib.crc32(name.encode())]))
        elif all(t in _INTEGER for t in types[1:3]):
            yield _case(name, types, "integer", np.random.default_rng([seed, zlib.crc32(name.encode())]))


def _fragment(kind: str, elements: int, values: str, rng: np.random.Generator) -> np.ndarray:
    """u32 [registers, threads] of random elements."""
    if values == "integer":
        return rng.integers(0, 2**32, elements * (1 if kind in _INTEGER else 4) // 4, np.uint32)
    dtype = np.dtype(DTYPES.get(kind, np.float32))
    return draw(values, kind, elements, rng).astype(dtype).view(np.uint32)


def _case(name: str, types: list[str], values: str, rng: np.random.Generator) -> Case:
    m, n, k = (int(x) for x in re.search(r"m(\d+)n(\d+)k(\d+)", name).groups())
    d_kind, a_kind, b_kind, c_kind = types
    parts = {
        "a": _fragment(a_kind, m * k * GRID, values, rng),
        "b": _fragment(b_kind, n * k * GRID, values, rng),
        "c": _fragment(c_kind, m * n * GRID, values if values != "special" else "normal", rng),
    }
    lines, names, first = [], {}, 10
    for array, value in parts.items():
        count = len(value) // (BLOCK * GRID)
        names[array] = [f"%r{first + i}" for i in range(count)]
        lines.append(f"mad.lo.u32 %r0, %block, {BLOCK * count}, %thread; mad.wide.u32 %d0, %r0, 4, %{array};")
        lines += [f"ld.global.b32 {r}, [%d0+{4 * BLOCK * i}];" for i, r in enumerate(names[array])]
        first += count
    registers = m * n // BLOCK // (2 if d_kind == "f16" else 1)
    d = [f"%r{first + i}" for i in range(registers)]
    vectors = ", ".join("{" + ", ".join(r) + "}" for r in (d, *names.values()))
    lines.append(f"{name} {vectors};")
    lines.append(f"mad.lo.u32 %r0, %block, {BLOCK * registers}, %thread; mad.wide.u32 %d0, %r0, 4, %y;")
    lines += [f"st.global.b32 [%d0+{4 * BLOCK * i}], {r};" for i, r in enumerate(d)]
    output = Array("y", np.full(BLOCK * GRID * registers, 0xA5A5A5A5, np.uint32), True)
    arguments = [*(Array(array, value) for array, value in parts.items()), output]
    rule = Rule("f32" if d_kind == "f32" else "bits")
    fast = None if values == "integer" else _bound(parts, types, k)
    return Case("matrix", f"{name}, {values} values", "\n".join(lines), arguments, rule, GRID, BLOCK, fast=fast)


def _numbers(words: np.ndarray, kind: str) -> np.ndarray:
    return words.view(np.dtype(DTYPES.get(kind, np.float32))).astype(np.float64)


def _bound(parts: dict[str, np.ndarray], types: list[str], k: int) -> Rule:
    """What another order of float32 additions may change."""
    d_kind, a_kind, b_kind, c_kind = types
    kinds = {"a": a_kind, "b": b_kind, "c": c_kind}
    largest = {
        name: np.nanmax(np.abs(np.nan_to_num(_numbers(parts[name], kind), posinf=0, neginf=0)))
        for name, kind in kinds.items()
    }
    total = float(k * largest["a"] * largest["b"] + largest["c"])
    bits = 12 if ml_dtypes.finfo(DTYPES[a_kind]).bits == 8 else 22
    if d_kind == "f16":
        return Rule("f16", 2.0**-10, total * 2.0**-9, "float16 sums in another order", True)
    return Rule("f32", 0, total * 2.0**-bits, "float32 sums in another order", True)
