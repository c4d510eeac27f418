"""Number formats as NumPy bits: f16, bf16, f32 rounding modes, ftz (PTX ISA 9.1 §9.7.3, §9.7.9.21)."""

from __future__ import annotations

import ml_dtypes
import numpy as np

F32_TINY = np.finfo(np.float32).tiny
SIGN = np.uint32(0x80000000)


def flush(x: np.ndarray) -> np.ndarray:
    """Replace subnormal float32 by zero of the same sign (.ftz)."""
    small = np.abs(x) < F32_TINY
    if np.any(small):
        return np.where(small, np.copysign(np.float32(0), x), x)
    return x


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 → bf16, nearest even, as u16; NaN becomes 0x7FFF as on the GPU."""
    bits = np.asarray(x).astype(ml_dtypes.bfloat16).view(np.uint16)
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF), bits) if np.any(nan) else bits


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
