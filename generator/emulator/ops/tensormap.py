"""Tensor maps that kernels write: single fields, and the copy that makes them known to tensor copies (PTX ISA 9.1
§9.7.9.28, §9.7.13.16). The layout is that of `tensormap`.
"""

from __future__ import annotations

import numpy as np

from ..errors import Hazard, UnsupportedInstruction
from ..table import effect
from .access import place
from .memory import owners
from .tma import _lanes

MAP_BYTES = 128
# u8 u16 u32 s32 u64 s64 f16 f32 f64 bf16 tf32 → bits 7 and up of word 2
_TYPES = {**{i: i for i in (0, 1, 2, 3, 4, 5, 6, 7, 9, 10)}, 11: 7 | 1 << 9}
_FIELDS = {  # name → PTX type of the value
    **dict.fromkeys(("global_address", "global_stride"), "b64"),
    **dict.fromkeys(("rank", "box_dim", "global_dim", "element_stride", "elemtype", "interleave_layout"), "b32"),
    **dict.fromkeys(("swizzle_mode", "fill_mode", "swizzle_atomicity"), "b32"),
}


def _bits(words: np.ndarray, word: int, low: int, width: int, value: int) -> None:
    mask = (1 << width) - 1 << low
    words[word] = int(words[word]) & ~mask & 0xFFFFFFFF | value << low & mask


def replace_field(words: np.ndarray, field: str, index: int, value: int, where) -> None:
    """Set one field of a map of 32 words."""
    if field == "global_address":
        words[0], words[1] = value & 0xFFFFFFFF, value >> 32
    elif field == "rank":  # counted from zero
        _bits(words, 2, 4, 3, value)
    elif field == "box_dim":
        _bits(words, *((13, 24) if index == 0 else (14, 8 * (index - 1))), 8, value - 1)
    elif field == "global_dim":
        words[8 + index] = value - 1 & 0xFFFFFFFF
    elif field == "global_stride":  # bytes, of dimension index + 1
        if value % 16:
            raise Hazard(f"{where}: a stride of {value} bytes: it must be a multiple of 16")
        words[3 + index] = value >> 4 & 0xFFFFFFFF
        _bits(words, 7, 4 * index, 4, value >> 36)
    elif field == "elemtype" and value in _TYPES:
        _bits(words, 2, 7, 10, _TYPES[value] | int(words[2]) >> 7 & 0b111000000)
    elif field == "swizzle_mode" and value <= 3:
        _bits(words, 2, 13, 2, value)
    elif (field, value) not in (
        ("element_stride", 1),
        ("interleave_layout", 0),
        ("fill_mode", 0),
        ("swizzle_atomicity", 0),
    ):
        raise UnsupportedInstruction(f"{where}: {field} {value} of a tensor map is not supported")


def _replace(field: str, space: str, ordinal: bool):
    def run(m, ws, active, instr, address, *operands):
        where = m.where(ws, instr, True if active is None else active, address)
        index, value = operands if ordinal else (0, *operands)
        ctas = ws.full(owners(m, ws, active, instr, address) if space == "shared" else ws.cta)
        _, _, _, (addresses, here, values) = _lanes(m, ws, active, (np.asarray(address).astype(np.uint64), ctas, value))
        for at, cta, number in {*zip(addresses.tolist(), here.tolist(), values.tolist(), strict=True)}:
            target, wrote = place(m, cta, at, MAP_BYTES, where, space == "shared")
            replace_field(target.view(np.uint32), field, int(index), number, where)
            wrote()

    return run


for _field, _type in _FIELDS.items():
    _ordinal = _field in ("box_dim", "global_dim", "global_stride", "element_stride")
    _value = (
        "k" if _field in ("elemtype", "interleave_layout", "swizzle_mode", "fill_mode", "swizzle_atomicity") else None
    )
    _signature = "=a," + ("k," if _ordinal else "") + (_value or {"b32": "u", "b64": "U"}[_type])
    for _space in (".global", ".shared::cta"):
        effect(f"tensormap.replace.tile.{_field}{_space}.b1024.{_type}", _signature, "9.7.9.28")(
            _replace(_field, "shared" if "shared" in _space else "global", _ordinal)
        )


@effect(
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.{cta,cluster,gpu,sys}.sync.aligned",
    "=a,a,k",
    "9.7.13.16",
)
def cp_fenceproxy(m, ws, active, instr, destination, source, size):
    """Copies a map from shared to global memory, where tensor copies will see it."""
    where = m.where(ws, instr, True if active is None else active, destination)
    if size != MAP_BYTES:
        raise Hazard(f"{where}: a tensor map has {MAP_BYTES} bytes, not {size}")
    sources, targets = (np.asarray(a).astype(np.uint64) for a in (source, destination))
    _, ctas, _, rows = _lanes(m, ws, active, (targets, sources))
    for cta, to, at in {*zip(ctas.tolist(), *(row.tolist() for row in rows), strict=True)}:
        raw, _ = place(m, cta, at, MAP_BYTES, where, True)
        start, view = m.gmem.require(to, to + MAP_BYTES, where)
        view[to - start : to - start + MAP_BYTES] = raw
        if start in m.gmem.written:
            m.gmem.written[start][to - start : to - start + MAP_BYTES] = 1


@effect("fence.proxy.tensormap::generic.acquire.{cta,cluster,gpu,sys}", "=a,k", "9.7.13.4")
def acquire_map(m, ws, active, instr, address, size):
    """Maps are decoded when a copy names them: what was written is seen."""
