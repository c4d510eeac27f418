"""Random operands with the values that go wrong first: signed zeros, subnormals, infinities, NaN, extremes."""

from __future__ import annotations

import ml_dtypes
import numpy as np

WIDTH = {"p": 8, "h": 16, "i": 16, "u": 32, "s": 32, "f": 32, "U": 64, "S": 64, "d": 64, "2": 64}
_FLOAT = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
_PLAIN = [0.0, 1.0, 1.5, 2.0, 0.5, 3.0, 100.0, 65504.0, 1e30, 1e-30, 2.0**24, 2.0**31, 2.0**63, 127.5, 0.1]
_FRACTION = {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}


def special_bits(kind: str) -> np.ndarray:
    """Bits of the special values of a float format, both signs."""
    dtype = np.dtype(_FLOAT[kind])
    bits, unsigned = dtype.itemsize * 8, np.dtype(f"u{dtype.itemsize}")
    fraction = _FRACTION[kind]
    infinity = (1 << bits - 1) - (1 << fraction)
    with np.errstate(over="ignore"):
        plain = np.array(_PLAIN).astype(dtype).view(unsigned).tolist()
    edges = [1, (1 << fraction) - 1, 1 << fraction, (1 << fraction) + 1, infinity - 1, infinity]
    nans = [infinity + 1, infinity + (1 << fraction - 1), (1 << bits - 1) - 1]
    found = plain + edges + nans
    return np.array(sorted({v | s << bits - 1 for v in found for s in (0, 1)}), unsigned)


def float_bits(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """A quarter each: special values, any bits, the normal distribution, all magnitudes."""
    dtype = np.dtype(_FLOAT[kind])
    unsigned = np.dtype(f"u{dtype.itemsize}")
    part = count // 4
    special = rng.choice(special_bits(kind), part)
    anything = (
        rng.integers(0, 1 << dtype.itemsize * 8, part, np.uint64, endpoint=False)
        if dtype.itemsize < 8
        else (rng.integers(0, 2**64 - 1, part, np.uint64, endpoint=True))
    )
    normal = rng.standard_normal(part).astype(dtype).view(unsigned)
    with np.errstate(all="ignore"):
        spread = np.exp2(rng.uniform(-30, 70, count - 3 * part)) * rng.choice([-1, 1], count - 3 * part)
        spread = spread.astype(dtype).view(unsigned)
    return np.concatenate([special, anything.astype(unsigned), normal, spread])


def integer_bits(width: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """A quarter each: extremes, small numbers, any bits, numbers of all lengths."""
    unsigned, part = np.dtype(f"u{width // 8}"), count // 4
    top = 1 << width - 1
    edges = [0, 1, 2, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, width - 1, width, width + 1, 0xFF, 0x80, 0x7F]
    special = rng.choice(np.array([e % (2 * top) for e in edges], np.uint64), part)
    small = rng.integers(0, 2 * width, part, np.uint64)
    anything = rng.integers(0, 2**64 - 1, count - 2 * part, np.uint64, endpoint=True)
    lengths = rng.integers(0, 64, count - 2 * part).astype(np.uint64)
    anything[part:] >>= lengths[part:]
    return np.concatenate([special, small, anything]).astype(unsigned)


def packed_bits(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs of 16-bit floats in 32 bits, or of float32 in 64."""
    low, high = (float_bits(kind, count, rng) for _ in range(2))
    high = rng.permutation(high)
    wide = np.dtype(f"u{2 * low.dtype.itemsize}")
    return low.astype(wide) | high.astype(wide) << wide.type(8 * low.dtype.itemsize)


def operand(letter: str, kinds: list[str], count: int, rng: np.random.Generator) -> np.ndarray:
    """Random bits for an operand of a signature letter (emulator/table.py), given the types that its opcode names."""
    if letter == "p":
        return rng.integers(0, 2, count).astype(np.uint8)
    width = WIDTH[letter]
    for kind in kinds:
        passed_on = letter == "u" and kind == kinds[0]  # bits of a float that the instruction only moves
        if kind in _FLOAT and np.dtype(_FLOAT[kind]).itemsize * 8 == width and (letter in "hfd" or passed_on):
            return rng.permutation(float_bits(kind, count, rng))
        if kind.endswith("x2") and kind[:-2] in _FLOAT and np.dtype(_FLOAT[kind[:-2]]).itemsize * 16 == width:
            return rng.permutation(packed_bits(kind[:-2], count, rng))
    return rng.permutation(integer_bits(width, count, rng))
