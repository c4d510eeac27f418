"""The cubins in what the DSL links into a host object: one ELF file, or a fat binary of several."""

from __future__ import annotations

import struct
from collections.abc import Callable

from .errors import HostError


def cubins_of(image: bytes) -> list[bytes]:
    """The cubins in an ELF file or a fat binary that is held as bytes."""
    return images_at(lambda at, count: image[at : at + count], 0)


def images_at(read: Callable[[int, int], bytes], address: int) -> list[bytes]:
    """The ELF images at `address`: one as it is, or those in a fat binary, the container that the DSL links in.

    A fat binary is a header (u32 magic, u16 version, u16 header bytes, u64 body bytes) and a body of entries, each
    with a header of its own (u16 kind, u16 version, u32 header bytes, u64 payload bytes; kind 2 is a cubin).
    """
    start = read(address, 4)
    if start == b"\x7fELF":
        return [_elf_at(read, address)]
    if start != struct.pack("<I", 0xBA55ED50):
        raise HostError(f"_cudaLibraryLoadData: the image is neither ELF nor a fat binary; it begins with {start!r}")
    header_bytes, body_bytes = struct.unpack("<xxxxxxHQ", read(address, 16))
    body = read(address + header_bytes, body_bytes)
    images, at = [], 0
    while at < len(body):
        kind, entry_header, payload = struct.unpack_from("<HxxIQ", body, at)
        if kind == 2:
            images.append(body[at + entry_header : at + entry_header + payload])
        at += entry_header + payload
    return images


def _elf_at(read: Callable[[int, int], bytes], address: int) -> bytes:
    """The ELF-64 file at `address`, whose length only its own header tables tell."""
    header = read(address, 64)
    program_table, section_table = struct.unpack_from("<QQ", header, 0x20)
    program_size, program_count, section_size, section_count = struct.unpack_from("<HHHH", header, 0x36)
    end = max(program_table + program_size * program_count, section_table + section_size * section_count)
    return read(address, end)
