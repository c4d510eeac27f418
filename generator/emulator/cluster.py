"""Clusters of a wave: who is whose peer, what a shared::cluster address names, and the cluster barrier.

CTAs of a wave stand cluster by cluster: index = cluster · size + rank. A shared::cluster address carries the rank in
bits 24 and up, as the values of shared symbols do inside a cluster (seen in kernels that clear bit 24 to name the even
CTA of a pair); outside clusters these bits are zero.

Sources: PTX ISA 9.1 §9.7.13.3 (barrier.cluster), §9.7.9.23 (mapa).
"""

from __future__ import annotations

import numpy as np

from .errors import Hazard

RANK_SHIFT = 24
OFFSET_MASK = (1 << RANK_SHIFT) - 1
CLUSTER_BARRIER = 16  # the barrier number that a warp in barrier.cluster.wait is recorded under


class Cluster:
    """Clusters of shape (x, y, z) in a wave of `n_cta` CTAs of `n_warps` warps."""

    def __init__(self, shape: tuple[int, int, int], n_cta: int, n_warps: int):
        self.shape = shape
        self.size = shape[0] * shape[1] * shape[2]
        self.arrived = np.zeros((n_warps, n_cta, 32), bool)
        self.generation = np.zeros(n_cta // self.size, np.int64)
        self.token = np.full(
            (n_warps, n_cta, 32), -1, np.int64
        )  # phase that a lane arrived in and did not wait for yet

    def rank(self, ctas):
        return ctas % self.size

    def target(self, ctas: np.ndarray, addresses: np.ndarray, where) -> np.ndarray:
        """CTA index that each shared::cluster address names, seen from CTA `ctas[i]`."""
        if self.size == 1:
            return ctas
        ranks = np.asarray(addresses).astype(np.int64) >> RANK_SHIFT
        if (ranks >= self.size).any():
            raise Hazard(f"{where}: a shared::cluster address names CTA {int(ranks.max())} of a cluster of {self.size}")
        return ctas - ctas % self.size + ranks

    def peers(self, cta: int, mask: int) -> list[int]:
        """CTA indices of the ranks in a multicast mask."""
        first = cta - cta % self.size
        return [first + rank for rank in range(self.size) if mask >> rank & 1]

    def expand(self, bits: int) -> int:
        """Every CTA of the clusters that hold one of these CTAs (CtaSets ints)."""
        if self.size == 1:
            return bits
        whole, found = (1 << self.size) - 1, 0
        for first in range(0, bits.bit_length(), self.size):
            if bits >> first & whole:
                found |= whole << first
        return found

    def split(self, bits: int) -> list[int]:
        """These CTAs by cluster (CtaSets ints)."""
        whole = (1 << self.size) - 1
        parts = (bits & whole << first for first in range(0, bits.bit_length(), self.size))
        return [part for part in parts if part]

    def arrive(self, warps: np.ndarray, ctas: np.ndarray, lanes: np.ndarray, where) -> None:
        """barrier.cluster.arrive of these lanes, bool [len(warps), 32]."""
        token = self.token[warps, ctas]
        if (lanes & (token >= 0)).any():
            raise Hazard(f"{where}: barrier.cluster.arrive twice with no barrier.cluster.wait between")
        self.arrived[warps, ctas] |= lanes
        self.token[warps, ctas] = np.where(lanes, self.generation[ctas // self.size][:, None], token)

    def settle(self, exited: np.ndarray) -> np.ndarray:
        """Complete the barrier of every cluster whose lanes have all arrived or exited; returns their CTAs."""
        here = (self.arrived | exited).all(axis=(0, 2)).reshape(-1, self.size).all(axis=1)
        some = self.arrived.any(axis=(0, 2)).reshape(-1, self.size).any(axis=1)
        done = np.nonzero(here & some)[0]
        self.generation[done] += 1
        ctas = (done[:, None] * self.size + np.arange(self.size)).reshape(-1)
        self.arrived[:, ctas] = False
        return ctas

    def waits(self, warps: np.ndarray, ctas: np.ndarray, lanes: np.ndarray, where) -> np.ndarray:
        """bool: which of these warps must wait for the phase that their `lanes` arrived in."""
        token = self.token[warps, ctas]
        if (lanes & (token < 0)).any():
            raise Hazard(f"{where}: barrier.cluster.wait without an arrive before it")
        must = (lanes & (self.generation[ctas // self.size][:, None] <= token)).any(axis=1)
        self.token[warps, ctas] = np.where(lanes, -1, token)
        return must
