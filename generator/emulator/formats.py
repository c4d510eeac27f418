"""Number formats as NumPy bits: f16, bf16, f32 rounding modes, ftz (PTX ISA 9.1 §9.7.3, §9.7.9.21)."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from .symbolic import traced_as

F32_TINY = np.finfo(np.float32).tiny


def flush(x: np.ndarray) -> np.ndarray:
    """Replace subnormal float32 by zero of the same sign (.ftz)."""
    small = np.abs(x) < F32_TINY
    if np.any(small):
        return np.where(small, np.copysign(np.float32(0), x), x)
    return x


@traced_as("bf16", np.uint16)
def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 → bf16, nearest even, as u16; NaN becomes 0x7FFF as on the GPU."""
    bits = np.asarray(x).astype(ml_dtypes.bfloat16).view(np.uint16)
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF), bits) if np.any(nan) else bits


@traced_as("f16", np.uint16)
def f16_bits(x: np.ndarray) -> np.ndarray:
    """float32 → float16, nearest even, as u16; NaN becomes 0x7FFF as on the GPU."""
    bits = np.asarray(x).astype(np.float16).view(np.uint16)
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF), bits) if np.any(nan) else bits


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """u16 bf16 bits → float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_to_f32(bits: np.ndarray) -> np.ndarray:
    """u16 float16 bits → float32, exact."""
    return bits.view(np.float16).astype(np.float32)


def hardware_nan(x: np.ndarray) -> np.ndarray:
    """Bits, u32, of float32 results: a NaN that arithmetic produces is always 0x7FFFFFFF (measured on an H200).

    The bits of a computed NaN do not matter before somebody looks at them as an integer, so that is where they are made
    what they are on silicon.
    """
    bits = x.view(np.uint32)
    nan = np.isnan(x)
    return np.where(nan, np.uint32(0x7FFFFFFF), bits) if nan.any() else bits


def pack16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Two u16 → u32."""
    return (high.astype(np.uint32) << np.uint32(16)) | low


def round_toward(near64: np.ndarray, mode: str, error: np.ndarray | float = 0.0) -> np.ndarray:
    """The exact value `near64 + error` → float32 in mode "rm" (toward -inf), "rp" (+inf) or "rz" (zero).

    `near64` is that value rounded to float64, `error` what the rounding lost: only its sign matters.
    """
    near = near64.astype(np.float32)
    back = near.astype(np.float64)
    above = (back > near64) | ((back == near64) & (error < 0))
    below = (back < near64) | ((back == near64) & (error > 0))
    down, up = np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))
    if mode == "rz":
        above, below = above & (near64 > 0), below & (near64 < 0)
    return np.where(above & (mode != "rp"), down, np.where(below & (mode != "rm"), up, near))


# -- exact rounding into any small format ------------------------------------------------------------------------------
class Format(NamedTuple):
    """A binary floating-point format: stored mantissa bits, exponent of the smallest normal, largest finite value."""

    mantissa: int
    lowest: int
    largest: float
    nan: int  # the NaN the hardware writes; where the format has none, its largest value
    infinite: bool = True


FORMATS = {
    "f16": Format(10, -14, 65504.0, 0x7FFF),
    "bf16": Format(7, -126, float.fromhex("0x1.fep127"), 0x7FFF),
    "tf32": Format(10, -126, float.fromhex("0x1.ffcp127"), 0x7FFFE000),
    "f32": Format(23, -126, float.fromhex("0x1.fffffep127"), 0x7FFFFFFF),
    "e4m3": Format(3, -6, 448.0, 0x7F, False),
    "e5m2": Format(2, -14, 57344.0, 0x7F),
    "e2m3": Format(3, 0, 7.5, 0x1F, False),
    "e3m2": Format(2, -2, 28.0, 0x1F, False),
}
SMALL = {
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
}
_WHOLE = {
    "rn": np.rint,
    "rz": np.trunc,
    "rm": np.floor,
    "rp": np.ceil,
    "rna": lambda x: np.trunc(x + np.copysign(0.5, x)),  # nearest, ties away from zero
}


def sum_exact(a, b):
    """Two float64 arrays → their rounded sum and its exact error (Knuth's two-sum)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def sum_odd(a, b):
    """a + b in float64, rounded to odd: a later rounding to at most 51 bits gives what one rounding would."""
    total, error = sum_exact(a, b)
    odd = np.isfinite(error) & (error != 0) & (total.view(np.uint64) & np.uint64(1) == 0)
    return np.where(odd, np.nextafter(total, np.copysign(np.inf, error)), total)


def round_float(name: str, x: np.ndarray, mode: str = "rn", finite: bool = False) -> np.ndarray:
    """float64 → the float64 that holds its value in format `name`; `finite`: what is too large becomes the largest."""
    form = FORMATS[name]
    _, exponent = np.frexp(x)
    exponent = np.where(np.isfinite(x), exponent, form.lowest)
    quantum = np.ldexp(1.0, np.maximum(exponent - 1, form.lowest) - form.mantissa)
    result = _WHOLE[mode](x / quantum) * quantum
    over = np.abs(result) > form.largest
    if np.any(over):
        keeps = finite | (mode == "rz") & np.isfinite(x)
        keeps = keeps | (mode == "rm") & np.isfinite(x) & (x > 0) | (mode == "rp") & np.isfinite(x) & (x < 0)
        result = np.where(over, np.copysign(np.where(keeps, form.largest, np.inf), x), result)
    return result


def encode(name: str, x: np.ndarray, mode: str = "rn", finite: bool = False) -> np.ndarray:
    """float64 → bits in format `name`: u32 for f32 and tf32, else u16. NaN is the one the hardware writes."""
    exact = round_float(name, np.asarray(x, np.float64), mode, finite)
    if name in ("f32", "tf32"):
        bits = exact.astype(np.float32).view(np.uint32)
        if name == "tf32":
            bits = bits & np.uint32(0xFFFFE000)
        return np.where(np.isnan(x), np.uint32(FORMATS[name].nan), bits)
    if name == "f16":
        bits = exact.astype(np.float16).view(np.uint16)
    else:
        small = np.nan_to_num(exact, posinf=np.inf, neginf=-np.inf).astype(np.float32).astype(SMALL[name])
        bits = small.view(np.uint16 if name == "bf16" else np.uint8).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(FORMATS[name].nan), bits)


def decode(name: str, bits: np.ndarray) -> np.ndarray:
    """Bits (in the low part of an unsigned array) → float64, exact."""
    if name == "f16":
        return np.asarray(bits).astype(np.uint16).view(np.float16).astype(np.float64)
    if name in ("f32", "tf32"):
        return np.asarray(bits).view(np.float32).astype(np.float64)
    width = np.uint16 if name == "bf16" else np.uint8
    mask = width(0x3F if name in ("e2m3", "e3m2") else np.iinfo(width).max)
    return (np.asarray(bits).astype(width) & mask).view(SMALL[name]).astype(np.float64)


def flush_to(name: str, x: np.ndarray) -> np.ndarray:
    """Values below the smallest normal of format `name` → zero of the same sign (.ftz)."""
    return np.where(np.abs(x) < 2.0 ** FORMATS[name].lowest, np.copysign(0.0, x), x)


def saturate(x: np.ndarray) -> np.ndarray:
    """.sat: into [0, 1]; NaN and -0 become +0."""
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def relu(x: np.ndarray) -> np.ndarray:
    """.relu: negative values and -0 become +0; NaN stays."""
    return np.where(x > 0, x, np.where(np.isnan(x), x, x.dtype.type(0)))
