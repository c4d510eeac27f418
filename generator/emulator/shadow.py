"""Who last wrote and read each cell of shared and tensor memory: epochs (see `clocks`), laid out like the memory.

Shared memory has three planes: bytes, 4-byte words and 16-byte chunks. An access is marked in the widest plane whose
cells it fills, and checked against all three, so that neighbours in one word never disturb one another. A plane is
looked at only in pages where something was ever marked.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .clocks import LINE_SHIFT

PAGE_SHIFT = 10  # 1 KiB


class Plane:
    """Epochs of the cells of one size: `write` int64 [n_cta, cells], and the same a reading component, made on first
    use.
    """

    def __init__(self, n_cta: int, size: int, grain: int):
        self.grain, self.cells, self.n_cta = grain, size // grain, n_cta
        self.touched = np.zeros((size >> PAGE_SHIFT) + 1, bool)
        self.any = False
        self.write = np.zeros((n_cta, self.cells), np.int64)
        self.reads: dict[int, np.ndarray] = {}  # local component → last read

    def read_by(self, local: int) -> np.ndarray:
        found = self.reads.get(local)
        if found is None:
            found = self.reads[local] = np.zeros((self.n_cta, self.cells), np.int64)
        return found

    def looked_at(self, low: int, high: int) -> bool:
        """Whether anything was ever marked near the bytes [low, high)."""
        return self.any and bool(self.touched[low >> PAGE_SHIFT : (high - 1 >> PAGE_SHIFT) + 1].any())

    def touch(self, low: int, high: int) -> None:
        self.any = True
        self.touched[low >> PAGE_SHIFT : (high - 1 >> PAGE_SHIFT) + 1] = True

    def indices(self, offsets: np.ndarray, nbytes: int) -> list[np.ndarray]:
        """Cells of accesses of `nbytes` bytes at `offsets`, one array a cell of each access."""
        first = offsets // self.grain
        return [first + i for i in range(max(nbytes // self.grain, 1))]


class SharedShadow:
    """The planes of shared memory [n_cta, size]."""

    def __init__(self, n_cta: int, size: int):
        self.planes = [Plane(n_cta, size, grain) for grain in (16, 4, 1)]
        self.chunks, self.words, self.bytes = self.planes

    def plane_of(self, nbytes: int) -> Plane:
        return self.chunks if nbytes % 16 == 0 else self.words if nbytes % 4 == 0 else self.bytes

    def marks(self, ctas, offsets: np.ndarray, nbytes: int, reads: bool) -> Iterator[tuple[np.ndarray, bool, int]]:
        """Every epoch that accesses of `nbytes` bytes at `offsets` meet: (epochs, whether they are reads, byte).

        `ctas`, `offsets`: int arrays that broadcast; `reads`: whether reads count too.
        """
        low, high = int(offsets.min()), int(offsets.max()) + nbytes
        for plane in self.planes:
            if plane.looked_at(low, high):
                for i, cell in enumerate(plane.indices(offsets, nbytes)):
                    yield plane.write[ctas, cell], False, i * plane.grain
                    if reads:
                        for read in plane.reads.values():
                            yield read[ctas, cell], True, i * plane.grain

    def chunk_marks(self, pick, low: int, high: int, reads: bool) -> Iterator[tuple[np.ndarray, bool, int]]:
        """The same for whole chunks: `pick(array)` selects them from an array [n_cta, chunks]."""
        for plane in self.planes:
            if plane.looked_at(low, high):
                per = 16 // plane.grain
                for i in range(per):
                    view = plane.write.reshape(plane.n_cta, -1, per)[..., i] if per > 1 else plane.write
                    yield pick(view), False, i * plane.grain
                    if reads:
                        for read in plane.reads.values():
                            view = read.reshape(plane.n_cta, -1, per)[..., i] if per > 1 else read
                            yield pick(view), True, i * plane.grain


class TensorShadow:
    """Epochs of TMEM cells, laid out like `TensorMemory.state`: int64 [512 columns, 4 quarters, 2 halves, n_cta].

    `reads`: one array for the tcgen05.ld of warps 4g to 4g + 3 (a quarter belongs to one of them), one for MMAs.
    """

    def __init__(self, columns: int, n_cta: int):
        self.shape = (columns, 4, 2, n_cta)
        self.write = np.zeros(self.shape, np.int64)
        self.reads: dict[object, np.ndarray] = {}

    def read_by(self, key) -> np.ndarray:
        found = self.reads.get(key)
        if found is None:
            found = self.reads[key] = np.zeros(self.shape, np.int64)
        return found


def line_of(epoch: int) -> int:
    return int(epoch) >> LINE_SHIFT & (1 << 20) - 1
