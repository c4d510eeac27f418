"""Instruction families; importing this package fills the instruction table."""

from . import barrier, bits, carry, convert, double, floating, half, integer, memory, select, tcgen05, tma, warp, wgmma

__all__ = [
    "barrier",
    "bits",
    "carry",
    "convert",
    "double",
    "floating",
    "half",
    "integer",
    "memory",
    "select",
    "tcgen05",
    "tma",
    "warp",
    "wgmma",
]
