"""A batch of warps that stand at the same instruction, and how their registers are read and written."""

from __future__ import annotations

import numpy as np

LANES = np.arange(32, dtype=np.uint32)


def common(value) -> int | None:
    """The unsigned number that all elements of an array or scalar hold, None where they differ."""
    value = np.asarray(value)
    raw, width = value.tobytes(), value.itemsize
    return int.from_bytes(raw[:width], "little") if raw == raw[:width] * value.size else None


class Warps:
    """Warps that execute together: a product of a warp range and a CTA range (views, no copies), or any list.

    Registers are arrays [warps of a CTA, CTAs, 32 lanes]; `index` selects from them `lead + (32,)`, where `lead` is
    (warps, CTAs) or (count,). `warp` and `cta` are index arrays that broadcast against that.
    `mask` is None when every lane runs, else bool `lead + (32,)`.
    """

    __slots__ = (
        "index",
        "lead",
        "warp",
        "cta",
        "mask",
        "count",
        "sliced",
        "w_range",
        "c_range",
        "shape",
        "pairs",
        "unique",
        "known",
        "is_arm",
    )

    def __init__(self, warps: np.ndarray, ctas: np.ndarray):
        """`warps`, `ctas`: int arrays of the same length, sorted by warp, then CTA."""
        count = len(warps)
        w0, w1, c0, c1 = int(warps[0]), int(warps[-1]) + 1, int(ctas.min()), int(ctas.max()) + 1
        self.count = count
        self.mask: np.ndarray | None = None
        self.sliced = (w1 - w0) * (c1 - c0) == count
        if self.sliced:
            self.index = (slice(w0, w1), slice(c0, c1))
            self.lead = (w1 - w0, c1 - c0)
            self.warp = np.arange(w0, w1).reshape(-1, 1, 1)
            self.cta = np.arange(c0, c1).reshape(1, -1, 1)
            self.w_range, self.c_range = (w0, w1), (c0, c1)
        else:
            self.index = (warps, ctas)
            self.lead = (count,)
            self.warp = warps.reshape(-1, 1)
            self.cta = ctas.reshape(-1, 1)
            self.w_range = self.c_range = (-1, -1)

        self.shape = (*self.lead, 32)
        self.pairs: tuple[np.ndarray, np.ndarray] | None = None
        self.unique: np.ndarray | None = None
        self.is_arm = False  # lanes that run one block while the others of their warps wait at its end
        self.known: dict = {}  # what instructions have found out about these warps and operands of theirs

    def get(self, register: np.ndarray) -> np.ndarray:
        return register[self.index]

    def of_cta(self, values: np.ndarray) -> np.ndarray:
        """What an array [CTAs] holds for the CTA of each warp, broadcastable to lead + (32,)."""
        if self.sliced:
            return values[self.index[1]].reshape(1, -1, 1)
        return values[self.cta]

    def put(self, register: np.ndarray, value) -> None:
        """Write back a register, only in the lanes that run."""
        if self.mask is None:
            register[self.index] = value
        elif self.sliced:
            np.copyto(register[self.index], value, where=self.mask)
        else:
            register[self.index] = np.where(self.mask, value, register[self.index])

    def full(self, value) -> np.ndarray:
        """`value` as lead + (32,)."""
        if type(value) is np.ndarray and value.shape == self.shape:
            return value
        value = np.asarray(value)
        found = np.empty(self.shape, value.dtype)  # a copy is cheaper than np.broadcast_to's view
        found[...] = value
        return found

    def item(self, value, at: int):
        """The number in lane `at` of the batch, counted through its warps."""
        if type(value) is np.ndarray and value.shape == self.shape:
            return value.item(at)
        return np.asarray(value).item() if np.size(value) == 1 else self.full(value).item(at)

    def pick(self, value, rows: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """The values in lane `lanes[i]` of warp `rows[i]` of the batch."""
        if len(rows) > 1:
            return self.full(value).reshape(-1, 32)[rows, lanes]
        if np.size(value) == 1:
            return np.array(value).reshape(1)
        at = int(rows[0]) * 32 + int(lanes[0])
        return self.full(value).reshape(-1)[at : at + 1].copy()

    def flat_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Warp and CTA index of each warp of the batch, in the order of `full(x).reshape(-1, 32)`."""
        if self.pairs is None:
            shape = (*self.lead, 1)
            both = (np.broadcast_to(self.warp, shape).reshape(-1), np.broadcast_to(self.cta, shape).reshape(-1))
            for array in both:
                array.flags.writeable = False
            self.pairs = both
        return self.pairs

    def ctas(self) -> np.ndarray:
        """CTAs of the batch, ascending, each once."""
        if self.unique is None:
            self.unique = np.unique(self.cta)
        return self.unique

    def lanes_by_cta(self, active: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """CTAs in which lanes run, ascending, and how many lanes in each: of all, or of the `active` ones."""
        key = None if active is None else ("lanes", active.shape, active.tobytes())
        found = self.known.get(key)
        if found is None:
            ctas = np.repeat(self.flat_pairs()[1], 32)
            on = ctas if active is None else ctas[self.full(active).reshape(-1)]
            found = self.known[key] = np.unique(on, return_counts=True)
        return found

    def where(self, lanes: np.ndarray) -> tuple[int, int, int]:
        """CTA, warp, lane of the first True in `lanes` (broadcastable to lead + (32,))."""
        at = int(np.argmax(self.full(lanes).reshape(-1, 32).any(axis=1)))
        lane = int(np.argmax(self.full(lanes).reshape(-1, 32)[at]))
        warps, ctas = self.flat_pairs()
        return int(ctas[at]), int(warps[at]), lane
