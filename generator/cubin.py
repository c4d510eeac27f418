"""What ptxas decided, read from the cubin itself: registers, stack and spills of one kernel.

The numbers are those of `ptxas -v` without a second run of ptxas. Register and stack figures are attributes in the ELF
section `.nv.info`; spills are counted in the machine code, as the local-memory loads and stores that it contains.
ptxas reports the same bytes (596 and 640, 2460 and 2552 on a kernel squeezed into 128 and 96 registers), unless the
kernel has local arrays, whose accesses are counted here too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_REGCOUNT, _FRAME_SIZE = 0x2F, 0x11  # attributes of .nv.info, payload: u32 symbol index, u32 value
_VALUE_FOLLOWS = 4  # attribute format: the 16-bit field is the length of a payload
_INSTRUCTION_BYTES = 16  # of every architecture since sm_70
_STORE_LOCAL, _LOAD_LOCAL = 0x387, 0x983  # low 12 bits of STL and LDL
_WARPGROUP, _WAITS = 0x9C5, 1 << 47  # low 12 bits of WARPGROUP.ARRIVE and .DEPBAR, and what tells the second
_ACCESS_BYTES = (1, 1, 2, 2, 4, 8, 16)  # U8 S8 U16 S16 32 64 128, bits 73 to 75


@dataclass(frozen=True)
class CubinFacts:
    """Of one kernel: registers a thread; stack and spill traffic in bytes a thread (static count); wgmma_waits: waits
    for wgmma in its code.
    """

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    wgmma_waits: int


def read_cubin(cubin: bytes, kernel_name: str) -> CubinFacts:
    """The facts of `kernel_name`. Raises ValueError when the cubin is not ELF-64 or lacks the kernel."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a cubin: no ELF-64 header")
    sections = dict(_sections(cubin))
    names = _symbol_names(cubin, sections)
    if kernel_name not in names.values() or f".text.{kernel_name}" not in sections:
        raise ValueError(f"the cubin has no kernel {kernel_name!r}")
    values = {
        attribute: value
        for attribute, symbol, value in _attributes(sections[".nv.info"])
        if names.get(symbol) == kernel_name
    }
    code = sections[f".text.{kernel_name}"]
    stores, loads = _local_traffic(code)
    return CubinFacts(values[_REGCOUNT], values[_FRAME_SIZE], stores, loads, _wgmma_waits(code))


def _sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names_at = headers[names_index][4]
    for name, kind, _flags, _address, offset, length in headers:
        end = cubin.index(0, names_at + name)
        content = b"" if kind == 8 else cubin[offset : offset + length]  # 8: no bytes in the file
        yield cubin[names_at + name : end].decode(), content


def _symbol_names(cubin: bytes, sections: dict[str, bytes]) -> dict[int, str]:
    symbols, strings = sections[".symtab"], sections[".strtab"]
    names = {}
    for index in range(len(symbols) // 24):
        (at,) = struct.unpack_from("<I", symbols, index * 24)
        names[index] = strings[at : strings.index(0, at)].decode()
    return names


def _attributes(info: bytes) -> Iterator[tuple[int, int, int]]:
    at = 0
    while at < len(info):
        layout, attribute, length = struct.unpack_from("<BBH", info, at)
        at += 4
        if layout != _VALUE_FOLLOWS:
            continue
        if attribute in (_REGCOUNT, _FRAME_SIZE):
            yield attribute, *struct.unpack_from("<II", info, at)
        at += length


def _instructions(code: bytes) -> Iterator[tuple[int, int]]:
    """Both halves of each."""
    return struct.iter_unpack("<QQ", code[: len(code) // _INSTRUCTION_BYTES * _INSTRUCTION_BYTES])


def _wgmma_waits(code: bytes) -> int:
    return sum(low & 0xFFF == _WARPGROUP and bool(low & _WAITS) for low, _ in _instructions(code))


def _local_traffic(code: bytes) -> tuple[int, int]:
    stores = loads = 0
    for low, high in _instructions(code):
        opcode = low & 0xFFF
        if opcode == _STORE_LOCAL:
            stores += _ACCESS_BYTES[high >> 9 & 7]
        elif opcode == _LOAD_LOCAL:
            loads += _ACCESS_BYTES[high >> 9 & 7]
    return stores, loads
