"""Global memory as it was, so that one launch can be executed several times on the same inputs."""

from __future__ import annotations

import numpy as np

from .memory import GlobalMemory


class Snapshot:
    """A copy of every array of a global memory, and of what was written where."""

    def __init__(self, gmem: GlobalMemory):
        self._gmem = gmem
        self._arrays = {start: view.copy() for start, _, _, view in gmem.regions}
        self._written = {start: written.copy() for start, written in gmem.written.items()}

    def arrays(self) -> dict[tuple[str, int], np.ndarray]:
        """The copies: ("data" or "written", address) → bytes."""
        copies = {("data", start): copy for start, copy in self._arrays.items()}
        return copies | {("written", start): copy for start, copy in self._written.items()}

    def restore(self) -> None:
        """Every array as it was; outputs hold what they held, and count as unwritten again."""
        for start, _, _, view in self._gmem.regions:
            view[:] = self._arrays[start]
        for start, written in self._written.items():
            self._gmem.written[start][:] = written

    def difference(self) -> tuple[str, int, np.ndarray, np.ndarray] | None:
        """(array, byte offset, bytes then, bytes now) of the first word of four bytes that differs from the copy."""
        for start, _, name, view in self._gmem.regions:
            differs = view != self._arrays[start]
            if differs.any():
                at = int(np.argmax(differs)) // 4 * 4
                return name, at, self._arrays[start][at : at + 4], view[at : at + 4]
        return None
