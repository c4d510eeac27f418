"""Global, shared and tensor memory of one wave of CTAs, each with a state for every cell: bounds, poison, who writes.

The state of a cell says whether its value may be used. Fresh memory is UNWRITTEN; an asynchronous operation marks its
destination from the moment it is issued, and only its completion, as late as the program's waits allow, makes it
VALID. What ordinary stores wrote is GENERIC, what cp.async wrote COPIED: legal for loads, and VALID for TMA and the
tensor core once a proxy fence followed.
"""

from __future__ import annotations

import bisect
import ctypes

import numpy as np

from .errors import Hazard, LaunchError

UNWRITTEN, VALID, TMA_PENDING, MMA_PENDING, ST_PENDING, MBARRIER, GENERIC, COPY_PENDING, ASYNC_PENDING = range(9)
CP_PENDING, COPIED = 9, 10
REASONS = {
    UNWRITTEN: "it was never written (fresh memory is poison)",
    TMA_PENDING: "a TMA load into it has been issued and is not known to be complete: wait on the "
    "mbarrier it signals first",
    MMA_PENDING: "a tcgen05.mma that writes it is not known to be complete: wait on the mbarrier of its "
    "tcgen05.commit first",
    ST_PENDING: "a tcgen05.st into it has not been waited for: insert tcgen05.wait::st (and then signal the reader)",
    GENERIC: "ordinary stores wrote it and no fence.proxy.async followed: insert one after them, before the signal",
    COPIED: "cp.async wrote it and no fence.proxy.async followed: insert one after the wait for the copies, before the "
    "signal",
    COPY_PENDING: "a cp.async into it has been issued and is not known to be complete: wait first "
    "(cp.async.wait_group, cp.async.wait_all, or the mbarrier of cp.async.mbarrier.arrive)",
    ASYNC_PENDING: "an asynchronous store or reduction into it (st.async, red.async, cp.reduce.async.bulk) is not "
    "known to be complete: wait on the mbarrier it signals first",
    CP_PENDING: "a tcgen05.cp or tcgen05.shift that writes it is not known to be complete: wait on the mbarrier of its "
    "tcgen05.commit first",
    MBARRIER: "it holds an mbarrier, which only mbarrier instructions may touch",
}
UNDER_WAY = (MBARRIER, TMA_PENDING, COPY_PENDING, ASYNC_PENDING)  # what an ordinary store may not hit
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
REPEAT = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}
VALID_WORD = {width: VALID * ones for width, ones in REPEAT.items()}  # every byte VALID, by access width
GENERIC_WORD = {width: GENERIC * ones for width, ones in REPEAT.items()}
WINDOW_BASE = 1024  # the hardware keeps the first KiB of the shared window for itself; zero is not a realistic base
LOCAL_BASE = 0xF000_0000  # generic address of each thread's local memory, above every shared::cluster address
PARAM_BASE = 0x7F00_0000_0000_0000  # generic address of the parameter space, outside every user address


class SharedMemory:
    """Shared memory of every CTA of a wave: data and state u8 [n_cta, size], addresses from WINDOW_BASE."""

    def __init__(self, n_cta: int, size: int, states: bool = True):
        """Without `states` nothing is known of the cells, and nothing checked."""
        self.size = size
        self.stride = -(-max(size, 16) // 1024) * 1024
        self.data = np.full((n_cta, self.stride), 0xFF, np.uint8)
        self.flat = {w: self.data.reshape(-1).view(t) for w, t in UINT.items()}
        self.chunks = self.data.view(np.complex128)  # [n_cta, size / 16]: 16-byte chunks, as the one dtype of that size
        self.flat_state: dict[int, np.ndarray] = {}
        if states:
            self.state = np.zeros((n_cta, self.stride), np.uint8)
            self.flat_state = {w: self.state.reshape(-1).view(t) for w, t in UINT.items()}
            self.chunk_state = self.state.view(np.complex128)
        self.unfenced: list[tuple[int, np.ndarray]] = []  # (width, flat indices) of stores with no proxy fence since

    def fence_proxy(self, ctas: np.ndarray) -> None:
        """fence.proxy.async in these CTAs: what their threads stored becomes visible to the asynchronous proxy."""
        left = []
        first, last = int(ctas[0]), int(ctas[-1])
        for width, at in self.unfenced:
            owner = at * width // self.stride
            neighbours = last - first + 1 == len(ctas)
            mine = (owner >= first) & (owner <= last) if neighbours else np.isin(owner, ctas)
            state = self.flat_state[width]
            done = at[mine]
            found = state[done]
            state[done[(found == GENERIC_WORD[width]) | (found == COPIED * REPEAT[width])]] = VALID_WORD[width]
            if not mine.all():
                left.append((width, at[~mine]))
        self.unfenced = left

    def invalid_chunk(
        self, ctas: np.ndarray, chunks: np.ndarray, legal: tuple[int, ...] = (VALID,)
    ) -> tuple[int, int, int] | None:
        """(CTA, chunk, state) of the first of these 16-byte chunks that holds a byte in no `legal` state, or None."""
        words = take_chunks(self.chunk_state, ctas, chunks).view(np.uint64)
        if (words == VALID_WORD[8]).all():
            return None
        codes = np.ascontiguousarray(words).view(np.uint8).reshape(len(ctas), -1, 16)
        bad = ~np.isin(codes, legal)
        if not bad.any():
            return None
        cta, at, byte = (int(i) for i in np.argwhere(bad)[0])
        return int(ctas[cta]), int(chunks.reshape(-1)[at]), int(codes[cta, at, byte])


def take_chunks(array: np.ndarray, ctas: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """`array[ctas][:, chunks]` for 16-byte items, by the fastest route: complex128 [len(ctas), *chunks.shape]."""
    first, last = int(ctas[0]), int(ctas[-1])
    if last - first + 1 == len(ctas):
        return array[first : last + 1].take(chunks, axis=1)
    return array.reshape(-1).take(ctas.reshape(-1, *(1,) * chunks.ndim) * array.shape[1] + chunks)


class TensorMemory:
    """TMEM of every CTA of a wave: 512 columns of 128 lanes of 32 bits.

    `data` u32 [512 columns, 4 warps' quarters, n_cta, 32 lanes]: what a warpgroup loads from one column is contiguous.
    `state` u8 [512 columns, 4 quarters, 2 halves of 16 lanes, n_cta].
    `allocated` bool [512 columns, n_cta].
    """

    COLUMNS = 512

    def __init__(self, n_cta: int, states: bool = True):
        self.data = np.full((self.COLUMNS, 4, n_cta, 32), 0xFFFFFFFF, np.uint32)
        self.state = np.zeros((self.COLUMNS, 4, 2, n_cta), np.uint8) if states else None
        self.allocated = np.zeros((self.COLUMNS, n_cta), bool)
        self.blocks: list[dict[int, int]] = [{} for _ in range(n_cta)]
        self.relinquished = np.zeros(n_cta, bool)
        self.requested = np.full(n_cta, self.COLUMNS)  # by the last allocation
        self.peak = np.zeros(n_cta, np.int64)

    def allocate(self, cta: int, columns: int) -> int | None:
        """First free aligned run of `columns`, or None when the pool is taken."""
        for start in range(0, self.COLUMNS - columns + 1, columns):
            if not self.allocated[start : start + columns, cta].any():
                self.allocated[start : start + columns, cta] = True
                if self.state is not None:
                    self.state[start : start + columns, :, :, cta] = UNWRITTEN
                self.blocks[cta][start] = columns
                self.peak[cta] = max(self.peak[cta], self.allocated[:, cta].sum())
                return start
        return None


class GlobalMemory:
    """Host arrays that kernels may touch, by address. Everything else is out of bounds."""

    def __init__(self):
        self.starts: list[int] = []
        self.regions: list[tuple[int, int, str, np.ndarray]] = []
        self.written: dict[int, np.ndarray] = {}  # start of an array that came uninitialized → 1 where written

    def add(self, address: int, nbytes: int, name: str, initialized: bool = True) -> None:
        """Make `nbytes` bytes from `address` on legal. The memory stays the caller's and must outlive the launch.

        Reading a byte of an array that came uninitialized, and that no kernel has written, is a Hazard.
        """
        if nbytes == 0:
            return
        self.written.pop(address, None)
        if not initialized:
            self.written[address] = np.zeros(nbytes, np.uint8)
        view = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)
        at = bisect.bisect(self.starts, address)
        for other in self.regions[max(0, at - 1) : at + 1]:
            if address < other[0] + other[1] and other[0] < address + nbytes:
                if other[0] == address and other[1] == nbytes:
                    return
                raise LaunchError(
                    f"array {name!r} at {address:#x} (+{nbytes}) overlaps array {other[2]!r} at "
                    f"{other[0]:#x} (+{other[1]})"
                )
        self.starts.insert(at, address)
        self.regions.insert(at, (address, nbytes, name, view))

    def remove(self, address: int) -> None:
        """Forget the array that starts at `address`."""
        at = self.starts.index(address)
        del self.starts[at], self.regions[at]
        self.written.pop(address, None)

    def find(self, low: int, high: int) -> tuple[int, np.ndarray] | None:
        """The region that holds all bytes in [low, high): its start and its bytes, or None."""
        at = bisect.bisect(self.starts, low) - 1
        if at >= 0:
            start, nbytes, _, view = self.regions[at]
            if high <= start + nbytes:
                return start, view
        return None

    def require(self, low: int, high: int, where: str) -> tuple[int, np.ndarray]:
        """`find`, or a Hazard that names the nearest array."""
        found = self.find(low, high)
        if found is not None:
            return found
        at = bisect.bisect(self.starts, low) - 1
        near = ""
        if at >= 0:
            start, nbytes, name, _ = self.regions[at]
            gap = low - start - nbytes
            near = f"; the nearest array below is {name!r}, {nbytes} bytes, which ends {gap:+d} bytes before it"
        raise Hazard(f"{where}: global memory [{low:#x}, {high:#x}) is out of bounds{near}")
