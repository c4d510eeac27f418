"""Whole launches: captured in the emulator with their arrays, saved to a file, executed again on a GPU.

A capture holds the PTX, the launch's extents and parameters, and every array before and after. On a GPU the arrays lie
elsewhere: each 64-bit word of the parameters that names a byte of an array (a pointer, the start of a tensor map) is
moved with it.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

FORMAT = 1
_FACTS = ("text", "kernel", "grid", "block", "cluster", "smem_bytes")
VIEWS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True)
class Captured:
    """One launch. `arrays`: (address in the emulator, name, bytes before, bytes after), u8."""

    text: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    smem_bytes: int
    params: tuple[bytes, ...]
    arrays: tuple[tuple[int, str, np.ndarray, np.ndarray], ...]


class Capture:
    """An observer of a Gpu (`gpu.observers.append(capture)`) that keeps every launch that ends well."""

    def __init__(self) -> None:
        self.launches: list[Captured] = []

    @contextmanager
    def __call__(self, case: Any) -> Iterator[None]:
        before = [(start, name, view.copy()) for start, _, name, view in case.gpu.gmem.regions]
        yield
        after = {start: view for start, _, _, view in case.gpu.gmem.regions}
        arrays = tuple((start, name, old, after[start].copy()) for start, name, old in before)
        facts = {name: getattr(case, name) for name in _FACTS}
        self.launches.append(Captured(**facts, params=tuple(case.params), arrays=arrays))


def to_bytes(launches: Sequence[Captured]) -> bytes:
    """An .npz file: a JSON head and the arrays, no pickles."""
    head, members = [], {}
    for i, launch in enumerate(launches):
        facts = {name: getattr(launch, name) for name in _FACTS} | {"params": [p.hex() for p in launch.params]}
        head.append(facts | {"arrays": [(address, name) for address, name, _, _ in launch.arrays]})
        for j, (_, _, before, after) in enumerate(launch.arrays):
            members[f"before_{i}_{j}"], members[f"after_{i}_{j}"] = before, after
    text = json.dumps({"format": FORMAT, "launches": head})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, head=np.frombuffer(text.encode(), np.uint8), **members)
    return buffer.getvalue()


def from_bytes(raw: bytes) -> list[Captured]:
    """The inverse of `to_bytes`. Raises ValueError for anything else, a file that was cut off among it."""
    if not zipfile.is_zipfile(io.BytesIO(raw)):
        raise ValueError("not a capture of `bespoke emulate --capture`, or one that was cut off")
    with np.load(io.BytesIO(raw), allow_pickle=False) as members:
        if "head" not in members:
            raise ValueError("an archive, but not a capture of `bespoke emulate --capture`")
        head = json.loads(members["head"].tobytes())
        if head["format"] != FORMAT:
            raise ValueError(f"a capture of format {head['format']}: this version reads {FORMAT}")
        return [_launch(i, facts, members) for i, facts in enumerate(head["launches"])]


def _launch(i: int, facts: dict[str, Any], members: Any) -> Captured:
    arrays = tuple(
        (address, name, members[f"before_{i}_{j}"], members[f"after_{i}_{j}"])
        for j, (address, name) in enumerate(facts.pop("arrays"))
    )
    params = tuple(bytes.fromhex(p) for p in facts.pop("params"))
    return Captured(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}, params=params, arrays=arrays
    )


def moved(param: bytes, places: Sequence[tuple[int, int, int]]) -> bytes:
    """A parameter with its pointers moved; `places`: (address in the emulator, bytes, address now)."""
    raw = bytearray(param)
    for at in range(0, len(raw) - 7, 8):
        (word,) = struct.unpack_from("<Q", raw, at)
        for start, nbytes, now in places:
            if start <= word < start + nbytes:
                struct.pack_into("<Q", raw, at, word - start + now)
    return bytes(raw)


@dataclass(frozen=True)
class Difference:
    """An array that the launch wrote, on both sides: bytes, bytes that differ, and the relative L2 difference of its
    finite values read as each of VIEWS.
    """

    kernel: str
    array: str
    nbytes: int
    differ: int
    relative: dict[str, float]


def differences(launch: Captured, silicon: Sequence[np.ndarray]) -> list[Difference]:
    """What the GPU left in the arrays, against the emulator's; arrays that neither wrote are left out."""
    found = []
    for (_, name, before, after), given in zip(launch.arrays, silicon, strict=True):
        if (after != before).any() or (given != before).any():
            relative = {kind: _relative(given, after, dtype) for kind, dtype in VIEWS.items()}
            found.append(Difference(launch.kernel, name, after.size, int((given != after).sum()), relative))
    return found


def _relative(given: np.ndarray, expected: np.ndarray, dtype: Any) -> float:
    whole = given.size // 4 * 4
    with np.errstate(all="ignore"):
        x, y = (np.ascontiguousarray(a[:whole]).view(dtype).astype(np.float64) for a in (given, expected))
        finite = np.isfinite(x) & np.isfinite(y)
        return float(np.linalg.norm((x - y)[finite]) / max(np.linalg.norm(y[finite]), np.finfo(np.float64).tiny))
