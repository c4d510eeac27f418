"""Instruction families; importing this package fills the instruction table."""

from . import barrier, convert, floating, integer, memory, select, tcgen05, tma, warp

__all__ = ["barrier", "convert", "floating", "integer", "memory", "select", "tcgen05", "tma", "warp"]
