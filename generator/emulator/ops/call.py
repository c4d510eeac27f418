"""What the driver provides to kernels: vprintf and __assertfail (CUDA programming guide, formatted output, assertion).

They are called like functions (PTX ISA 9.1 §9.7.12.4); `calls` makes one instruction of the call.
"""

from __future__ import annotations

import re

import numpy as np

from ..cluster import OFFSET_MASK
from ..errors import Hazard
from ..memory import LOCAL_BASE, WINDOW_BASE
from ..table import effect
from .access import SHARED_TOP
from .local import thread_bytes
from .tma import _lanes

_SPECIFIER = re.compile(r"%([-+ #0]*)(\*|\d+)?(?:\.(\*|\d*))?(hh|h|ll|l|z|j|t)?([diouxXeEfFgGaAcsp%])")
_WIDE = ("ll", "l", "z", "j", "t")
_LONGEST = 1 << 16  # bytes of a string


def read_bytes(m, thread: tuple[int, int, int], address: int, nbytes: int, where) -> bytes:
    """`nbytes` bytes at a generic address, as thread (warp, CTA, lane) sees it."""
    if address >= int(SHARED_TOP):
        start, view = m.gmem.require(address, address + nbytes, where)
        return view[address - start : address - start + nbytes].tobytes()
    if address >= LOCAL_BASE:
        return thread_bytes(m, thread, address, nbytes, where)
    offset = (address & OFFSET_MASK) - WINDOW_BASE
    if offset < 0 or offset + nbytes > m.smem.size:
        raise Hazard(f"{where}: shared offset {offset:#x} is out of bounds")
    return m.smem.data[thread[1], offset : offset + nbytes].tobytes()


def read_string(m, thread, address: int, where) -> str:
    """A string that ends with a zero byte."""
    found = bytearray()
    while len(found) < _LONGEST:
        byte = read_bytes(m, thread, address + len(found), 1, where)
        if byte == b"\0":
            return found.decode("utf-8", "replace")
        found += byte
    raise Hazard(f"{where}: a string at {address:#x} does not end")


class _Arguments:
    """The buffer of printf's arguments: each aligned to its size, integers of 4 or 8 bytes, floats of 8."""

    def __init__(self, m, thread, address: int, where):
        self.m, self.thread, self.address, self.where = m, thread, address, where
        self.offset = self.count = 0

    def take(self, kind: str):
        dtype = np.dtype(kind)
        self.offset = -(-self.offset // dtype.itemsize) * dtype.itemsize
        raw = read_bytes(self.m, self.thread, self.address + self.offset, dtype.itemsize, self.where)
        self.offset += dtype.itemsize
        self.count += 1
        return np.frombuffer(raw, dtype)[0].item()


def format_text(template: str, arguments: _Arguments) -> str:
    """C's printf: the text, with `arguments` read as the conversions want them."""

    def convert(match: re.Match) -> str:
        flags, width, precision, length, kind = match.groups()
        if kind == "%":
            return "%"
        width = arguments.take("i4") if width == "*" else width or ""
        precision = "" if precision is None else f".{arguments.take('i4') if precision == '*' else precision or 0}"
        head = f"%{flags}{width}{precision}"
        if kind in "di":
            return f"{head}d" % arguments.take("i8" if length in _WIDE else "i4")
        if kind in "ouxX":
            return f"{head}{kind.replace('u', 'd')}" % arguments.take("u8" if length in _WIDE else "u4")
        if kind == "c":
            return f"%{flags}{width}s" % chr(arguments.take("i4") & 0xFF)
        if kind == "p":
            return f"%{flags}{width}s" % hex(arguments.take("u8"))
        if kind == "s":
            address = arguments.take("u8")
            return f"{head}s" % read_string(arguments.m, arguments.thread, address, arguments.where)
        value = arguments.take("f8")
        return f"%{flags}{width}s" % value.hex() if kind in "aA" else f"{head}{kind}" % value

    return _SPECIFIER.sub(convert, template)


@effect("vprintf", "u=U,U", "9.7.12.4")
def vprintf(m, ws, active, instr, template, buffer):
    """Appends to what the launch has printed, one lane after the other; gives the number of arguments."""
    where = m.where(ws, instr, True if active is None else active)
    warps, ctas, lanes, (templates, buffers) = _lanes(m, ws, active, (template, buffer))
    counts = np.zeros((*ws.lead, 32), np.uint32)
    for i, thread in enumerate(zip(warps.tolist(), ctas.tolist(), lanes.tolist(), strict=True)):
        arguments = _Arguments(m, thread, int(buffers[i]), where)
        m.printed.append(format_text(read_string(m, thread, int(templates[i]), where), arguments))
        counts[...] = arguments.count
    return counts


@effect("__assertfail", "=U,U,u,U,U", "9.7.12.4")
def assert_fail(m, ws, active, instr, message, file, line, function, char_size):
    """The kernel's assert: says what, where, and in which thread."""
    where = m.where(ws, instr, True if active is None else active)
    warps, ctas, lanes, rows = _lanes(m, ws, active, (message, file, line, function))
    thread = int(warps[0]), int(ctas[0]), int(lanes[0])
    text, path, name = (read_string(m, thread, int(rows[i][0]), where) for i in (0, 1, 3))
    index = thread[0] * 32 + thread[2]
    x, y, _ = m.block
    position = (index % x, index // x % y, index // (x * y))
    raise Hazard(f"{where}, thread {position}: assertion failed: {text} ({path}:{int(rows[2][0])}, {name})")
