"""Every elementwise instruction of the emulator's table, one case an opcode."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

import numpy as np

from ...emulator.table import TABLE, Entry
from ..case import Array, Case, Rule
from .inputs import WIDTH, operand

COUNT, BLOCK = 2048, 128
LUTS = (0x80, 0xFE, 0x96, 0xEA, 0x1B)
# Operands that the ISA leaves undefined beyond some values: source → what keeps it among the others.
LIMITED = {
    "bfe": {1: lambda x: x % 256, 2: lambda x: x % 256},
    "bfi": {2: lambda x: x % 256, 3: lambda x: x % 256},
    "fns": {1: lambda x: x % 32, 2: lambda x: x % 80 - 40},
}
_FLOAT_TYPES = ("f16", "bf16", "f32", "f64")

# Bounds of approximations, PTX ISA 9.1 §9.7.3, §9.7.4: what the instruction promises against the exact result. Both
# sides may err, so two results may differ by the bound of one plus the rounding of the other.
APPROXIMATE: tuple[tuple[str, float, float, str], ...] = (
    (r"ex2\.approx.*\.f32", 2**-22, 0, "§9.7.3.21: 2^-22 relative"),
    (r"lg2\.approx.*\.f32", 2**-22, 2**-22, "§9.7.3.20: 2^-22 absolute in [0.5, 2], relative elsewhere"),
    (r"(sin|cos)\.approx.*\.f32", 0, 2**-20.5, "§9.7.3.18, .19: 2^-20.5 absolute in [-2 pi, 2 pi]"),
    (r"tanh\.approx\.f32", 2**-11, 0, "§9.7.3.22: 2^-11 relative"),
    (r"rcp\.approx.*\.f32", 2**-23, 0, "§9.7.3.13: 1 ulp"),
    (r"sqrt\.approx.*\.f32", 2**-23, 0, "§9.7.3.15: 2^-23 relative"),
    (r"rsqrt\.approx.*\.f32", 2**-22.9, 0, "§9.7.3.16: 2^-22.9 relative"),
    (r"div\.(approx|full).*\.f32", 2**-22, 0, "§9.7.3.8: 2 ulp"),
    (r"ex2\.approx\.f16", 2**-9.9, 0, "§9.7.4.10: 2^-9.9 relative"),
    (r"ex2\.approx\.ftz\.bf16", 2**-7, 0, "§9.7.4.10: 2^-7 relative"),
    (r"tanh\.approx\.f16", 0, 2**-10.987, "§9.7.4.9: 2^-10.987 absolute"),
    (r"tanh\.approx\.bf16", 0, 2**-8, "§9.7.4.9: 2^-8 absolute"),
)


def scalar_cases(seed: int) -> Iterator[Case]:
    """Arithmetic, comparison, selection, logic."""
    return _cases(lambda entry: not entry.name.startswith("cvt"), "scalar", seed)


def conversion_cases(seed: int) -> Iterator[Case]:
    return _cases(lambda entry: entry.name.startswith("cvt"), "conversion", seed)


def _cases(chosen, group: str, seed: int) -> Iterator[Case]:
    for entry in TABLE.values():
        if entry.pure and chosen(entry):
            for count in _operand_counts(entry):
                yield elementwise(entry, group, seed, count)


def _operand_counts(entry: Entry) -> list[int]:
    """Numbers of sources that the entry can take: optional ones are left out once."""
    optional = sum(s[0] == "?" for s in entry.sources)
    return list(range(len(entry.sources) - optional, len(entry.sources) + 1))


def elementwise(entry: Entry, group: str, seed: int, sources: int) -> Case:
    """Load every source, execute once a thread, store every destination."""
    rng = np.random.default_rng([seed, zlib.crc32(entry.name.encode()), sources])
    kinds = [word for word in entry.name.split(".")[1:] if re.fullmatch(r"(bf16|[fusb]\d+)(x2)?", word)]
    names, body, arguments, used = [], [], [], {"p": 0, "h": 0, "r": 0, "d": 0}

    def register(letter: str) -> str:
        file = "p" if letter == "p" else {16: "h", 32: "r", 64: "d"}[WIDTH[letter]]
        used[file] += 1
        return f"%{file}{used[file] - 1 + (8 if file == 'd' else 0)}"

    source_kinds = kinds[1:] + kinds[:1] if entry.name.startswith(("cvt", "set.")) and len(kinds) > 1 else kinds
    loads, values = [], []
    limits = LIMITED.get(entry.name.split(".")[0])
    for i, letter in enumerate(s.strip("?") for s in entry.sources[:sources]):
        if letter == "k":
            names.append(str(LUTS[rng.integers(len(LUTS))]))
            continue
        value = operand(letter, source_kinds, COUNT, rng)
        if limits and i in limits:  # the ISA leaves larger ones undefined
            value = limits[i](value)
        if (
            letter in "fd" and i == 2 and values[0].dtype == values[1].dtype == value.dtype
        ):  # a third operand that nearly cancels the others' product
            value[::2] = _cancelling(values, value)[::2]
        values.append(value)
        arguments.append(Array(f"x{i}", value))
        names.append(register(letter))
        loads.append(_load(f"x{i}", letter, names[-1]))
    dests, stores = [], []
    for i, letter in enumerate(entry.dests):
        dests.append(register(letter))
        dtype = np.dtype(f"u{max(WIDTH[letter], 16) // 8 if letter != 'p' else 4}")
        arguments.append(Array(f"y{i}", np.full(COUNT, 0xA5A5A5A5A5A5A5A5 >> 64 - 8 * dtype.itemsize, dtype), True))
        stores.append(_store(f"y{i}", letter, dests[-1]))
    separator = "|" if len(dests) > 1 else ", "
    body = [*loads, f"{entry.name} {separator.join(dests)}, {', '.join(names)};", *stores]
    name = entry.name if len(_operand_counts(entry)) == 1 else f"{entry.name} ({sources} operands)"
    rule = rule_of(entry.name, kinds)
    return Case(group, name, "\n".join(body), arguments, rule, COUNT // BLOCK, BLOCK)


def rule_of(name: str, kinds: list[str]) -> Rule:
    """How close the results must be: the same bits, or within the documented error of an approximation."""
    kind = next((k.removesuffix("x2") for k in kinds if k.removesuffix("x2") in _FLOAT_TYPES), "bits")
    if name.startswith(("setp", "testp")) or (name.startswith(("set.", "cvt")) and kinds[0].removesuffix("x2") != kind):
        kind = "bits"
    for pattern, relative, absolute, source in APPROXIMATE:
        if re.match(pattern, name):
            return Rule(kind, relative, absolute, source)
    # Of two NaN operands float64 arithmetic returns one; which one is not modelled.
    return Rule(kind, any_nan=kind == "f64")


def _cancelling(values: list[np.ndarray], bits: np.ndarray) -> np.ndarray:
    dtype = np.dtype(f"f{bits.dtype.itemsize}")
    with np.errstate(all="ignore"):
        return (-values[0].view(dtype) * values[1].view(dtype)).view(bits.dtype)


def _load(array: str, letter: str, name: str) -> str:
    width = WIDTH[letter] // 8
    address = f"mad.wide.u32 %d0, %g, {width}, %{array};"
    if letter == "p":
        return f"{address} ld.global.u8 %h31, [%d0]; setp.ne.b16 {name}, %h31, 0;"
    return f"{address} ld.global.b{8 * width} {name}, [%d0];"


def _store(array: str, letter: str, name: str) -> str:
    width = WIDTH[letter] // 8 if letter != "p" else 4
    address = f"mad.wide.u32 %d0, %g, {width}, %{array};"
    if letter == "p":
        return f"{address} selp.b32 %r319, 1, 0, {name}; st.global.b32 [%d0], %r319;"
    return f"{address} st.global.b{8 * width} [%d0], {name};"
