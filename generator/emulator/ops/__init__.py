"""Instruction families; importing this package fills the instruction table."""

from . import barrier, memory, scalar, tcgen05, tma, warp

__all__ = ["barrier", "memory", "scalar", "tcgen05", "tma", "warp"]
