"""The Plan of sm_90a: what its template spells, decided."""

from __future__ import annotations

from functools import cached_property
from math import gcd

from .budget import ELEMENT_BYTES, swizzle_bytes
from .layout import Plan, TileLayout
from .partials import PARTIALS, Partials, with_sink
from .two_tiles import SKIP_LOG2
from .warpgroups import consumers, packs


class HopperPlan(Plan):
    """Everything that templates/fwd_sm90.py.j2 spells. Bytes are of shared memory."""

    @property
    def consumers(self) -> int:
        """Consumer warpgroups of a CTA, 64 query rows each."""
        return consumers(self.tiling, self.arch)

    @property
    def group_threads(self) -> int:
        return self.arch.group_warps * self.arch.warp_size

    @property
    def fragments(self) -> bool:
        """A thread holds parts of several rows of S, not one row."""
        return True

    @property
    def packed(self) -> bool:
        """The query heads of a group share a tile."""
        return packs(self.spec, self.arch, self.tile_m)

    @property
    def persistent(self) -> bool:
        """A CTA works on one query tile after another, and is told how many CTAs there may be."""
        return True

    @property
    def mma_m(self) -> int:
        """Query rows of a CTA."""
        return self.tile_m

    @property
    def partials(self) -> Partials:
        found = PARTIALS[self.tiling.strategy]
        return with_sink(found, "_finish") if self.spec.sink else found

    @property
    def skip_log2(self) -> float:
        """By how many factors of 2 a row's maximum must move before O and its sum are rescaled."""
        return SKIP_LOG2 if self.tiling.lazy else 0.0

    @property
    def takes_turns(self) -> bool:
        """Consumers issue their MMAs one after another, so that one's softmax runs while another's MMAs do."""
        return self.tiling.turns

    @property
    def lazy(self) -> bool:
        """O is rescaled only where a row's maximum has moved much."""
        return self.tiling.lazy

    def named_barrier(self, name: str) -> int:
        """The hardware's number of a named barrier of the budget; KeyError when this plan has none."""
        found = {barrier.name: barrier.id for barrier in self.budget.named_barriers}
        return found[name]

    @property
    def needs_tokens(self) -> bool:
        """The epilogue asks which tokens a thread's rows are."""
        return self.spec.lse

    @property
    def bounds(self) -> str:
        """What a row sees, as seen_of takes it."""
        names = ["firsts"] * (self.mask.left is not None) + ["ends"] + ["ends2"] * (self.spec.kv_sources == 2)
        return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"

    @property
    def _matrices(self) -> list[str]:
        """What TMA loads and stores."""
        return [item.name for item in self.parameters if item.matrix and not (self.spec.unnormalized and item.output)]

    @property
    def tma_operands(self) -> str:
        """TMA atoms and tensors of Q, of K and V of each source, and of O as the kernel takes it: float32 without."""
        return super().tma_operands + (", mo" if self.spec.unnormalized else "")

    @cached_property
    def layouts(self) -> dict[str, TileLayout]:
        """TileLayout of "sQ" and "sO" of one consumer, and of "sK" and "sV"."""
        spec, rows, keys = self.spec, self.arch.mma_m, self.tile_n
        shapes = [
            ("sQ", rows, spec.head_dim, "K"),
            ("sK", keys, spec.head_dim, "K"),
            ("sV", keys, spec.v_dim, "MN"),
            *([] if spec.unnormalized else [("sO", rows, spec.v_dim, "")]),
        ]
        spans = {name: swizzle_bytes(columns * ELEMENT_BYTES) for name, _, columns, _ in shapes}
        if spec.kv_shared:
            # K and V are the same bytes, so one span must divide the rows of both
            spans["sK"] = spans["sV"] = swizzle_bytes(gcd(spec.head_dim, spec.v_dim) * ELEMENT_BYTES)
        return {
            name: TileLayout(name, count, columns, ELEMENT_BYTES, spans[name], major)
            for name, count, columns, major in shapes
        }
