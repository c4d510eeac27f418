"""The Plan of sm_90a: what its template spells, decided."""

from __future__ import annotations

from functools import cached_property
from math import gcd

from .budget import ELEMENT_BYTES, Role, swizzle_bytes
from .layout import Plan, TileLayout
from .partials import PARTIALS, Partials, with_part
from .signature import signature
from .split import COMBINE_WARPS, LANE_COLUMNS, PARTS_AHEAD, SPLITS_MAX, combine_bytes, lane_steps
from .two_tiles import SKIP_LOG2
from .warpgroups import (
    OUTWEIGHING,
    PART_MAX,
    consumers,
    cut_twice,
    has_own_spans,
    heads_in_tile,
    keeps_reference,
    looks_for_maxima,
    one_loop,
    packs,
)


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
        return packs(self.part, self.arch, self.tile_m)

    @property
    def heads_per_tile(self) -> int:
        """Query heads whose rows a tile holds."""
        return heads_in_tile(self.part.q_heads_per_kv, self.tile_m) if self.packed else 1

    @property
    def tiles_a_group(self) -> int:
        """Tiles that the heads of a group fill at one token; 1 where a tile holds all of them."""
        return self.part.q_heads_per_kv // self.heads_per_tile if self.packed else 1

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
        after = "" if self.beside_pv else "_after"
        found = PARTIALS[self.tiling.strategy + after]
        if self.spec.sink:
            found = with_part(found, "_sink", "_finish")
        if self.spec.split_kv:
            found = with_part(with_part(found, "_split_sm90", "_work"), "_combine_sm90", "_launch")
            found = with_part(found, "_whole_sm90", "_epilogue" if self.tiling.strategy == "warpgroups" else "_scores")
        return found

    @property
    def rotated(self) -> bool:
        """The j-th tile that is visited need not be the source's j-th."""
        return self.spec.split_kv or (super().rotated and not self.own_spans)

    @property
    def own_spans(self) -> bool:
        """Consumers visit KV tiles of their own, from the left."""
        return has_own_spans(self.spec, self.arch, self.tile_m)

    @property
    def keeps_reference(self) -> bool:
        """Of some KV tiles no maximum is looked for: see warpgroups.keeps_reference."""
        return keeps_reference(self.spec, self.arch, self.tile_m, self.tile_n)

    @property
    def scores_again(self) -> bool:
        """Where a reference must be raised the scores are gone, and may have to be computed again."""
        return self.keeps_reference and self.beside_pv

    @property
    def looks_for_maxima(self) -> bool:
        """Of some KV tiles after a query tile's first one."""
        return looks_for_maxima(self.spec, self.arch, self.tile_m, self.tile_n)

    @property
    def one_loop(self) -> bool:
        """KV tiles that are seen whole are not a loop of their own: see warpgroups.one_loop."""
        return one_loop(self.spec, self.arch, self.tile_m, self.tile_n)

    @property
    def part_max(self) -> float:
        return PART_MAX

    @property
    def outweighing(self) -> float:
        """By how much a part of a row's sum is more than all before it when the reference is raised."""
        return OUTWEIGHING

    @property
    def tiles_move(self) -> bool:
        """With own spans and windows: so a window meets the fewest tiles."""
        return self.own_spans and self.mask.left is not None

    @property
    def cut_twice(self) -> bool:
        """With own_spans: a KV tile can be cut on both sides, see warpgroups.cut_twice."""
        return cut_twice(self.spec, self.arch, self.tile_m, self.tile_n)

    @property
    def load_tiles(self) -> str:
        """KV tiles that the load warp loads."""
        return "span[3] - span[0]" if self.own_spans else super().load_tiles

    @property
    def tile_of_j(self) -> str:
        """The KV tile of the first source that is loaded j-th."""
        return "span[0] + j" if self.own_spans else super().tile_of_j

    @property
    def stored_by_threads(self) -> bool:
        """O goes from registers to global memory, not through shared memory by TMA."""
        return self.part.unnormalized

    @property
    def thread_o(self) -> str:
        """The tensor of the host function that O goes to where threads store it."""
        return "o_parts" if self.spec.split_kv else "o"

    @property
    def results(self) -> list[str]:
        """What the attention kernel writes, and reads, where there is one part: O first, as the kernel names them."""
        names = [item.name for item in self.parameters if item.output or item.name == "sink"]
        return sorted((name if name == "sink" else f"whole_{name}" for name in names), key=lambda n: n != "whole_o")

    @property
    def result_arguments(self) -> str:
        """The same of the host function, as the inside of a tuple."""
        spelled = {f"whole_{item.name}": item.spelled for item in self.parameters}
        return ", ".join(spelled.get(name, name) for name in self.results) + "," * (len(self.results) == 1)

    @property
    def result_operands(self) -> str:
        """The same of the kernel, as a tuple."""
        return f"({', '.join(self.results)}{',' * (len(self.results) == 1)})"

    @property
    def results_unpacked(self) -> str:
        """All but O, as the target of an assignment."""
        names = {"whole_lse": "lse", "whole_m": "m_out"}
        return ", ".join(["_", *(names.get(name, name) for name in self.results[1:])])

    @property
    def pads_v(self) -> bool:
        """Accumulators have columns beyond head_dim_v."""
        return False

    @property
    def combine_tensors(self) -> list[str]:
        """What the kernel that combines parts reads and writes."""
        names = [item.spelled for item in self.parameters if item.scratch or item.output or item.name == "sink"]
        return sorted(names, key=lambda name: not name.endswith("_parts"))

    @property
    def combine_arguments(self) -> str:
        return ", ".join(self.combine_tensors)

    @property
    def combine_warps(self) -> int:
        return COMBINE_WARPS

    @property
    def combine_threads(self) -> int:
        return COMBINE_WARPS * self.arch.warp_size

    @property
    def combine_bytes(self) -> int:
        """Shared memory of the combining kernel."""
        return combine_bytes(self.spec.v_dim)

    @property
    def splits_max(self) -> int:
        return SPLITS_MAX

    @property
    def parts_ahead(self) -> int:
        return PARTS_AHEAD

    @property
    def lane_columns(self) -> int:
        return LANE_COLUMNS

    @property
    def lane_steps(self) -> int:
        return lane_steps(self.spec.v_dim)

    @property
    def out_block(self) -> str:
        """Where a query tile's results go: a part is to them what a batch entry is to a kernel that has no parts."""
        return "part_of(block, lengths)" if self.spec.split_kv else "block"

    @property
    def skip_log2(self) -> float:
        """By how many factors of 2 a row's maximum must move before O and its sum are rescaled."""
        return SKIP_LOG2 if self.tiling.lazy else 0.0

    @property
    def takes_turns(self) -> bool:
        """Consumers issue their MMAs one after another, so that one's softmax runs while another's MMAs do."""
        return self.tiling.turns

    @property
    def beside_pv(self) -> bool:
        """A consumer's softmax runs beside its product of the KV tile before with V, not after it."""
        return self.tiling.beside_pv

    @property
    def lazy(self) -> bool:
        """O is rescaled only where a row's maximum has moved much."""
        return self.tiling.lazy

    def named_barrier(self, name: str) -> int:
        """The hardware's number of a named barrier of the budget; KeyError when this plan has none."""
        found = {barrier.name: barrier.id for barrier in self.budget.named_barriers}
        return found[name]

    @property
    def splits_columns(self) -> bool:
        """O's columns lie in two warpgroups."""
        return False

    @property
    def cluster(self) -> int:
        """CTAs that load K and V for one another."""
        return 1

    @property
    def roles(self) -> list[tuple[str, Role]]:
        """The roles that get registers of their own, as the kernel's constants call them."""
        return [("CONSUMER", self.budget.role("consumer")), ("PRODUCER", self.budget.role("tma"))]

    def register_change(self, role: str) -> str:
        """Whether setmaxnreg takes a role's threads up or down from what all have at entry; the wrong one is an illegal
        instruction.
        """
        at_entry = self.budget.registers_pool // self.budget.threads
        return "increase" if self.budget.role(role).registers > at_entry else "decrease"

    @property
    def own_barrier(self) -> int:
        """The first of the named barriers that one warpgroup has to itself."""
        return self.named_barrier("consumer 0")

    @property
    def needs_tokens(self) -> bool:
        """The epilogue asks which tokens a thread's rows are."""
        return self.part.lse

    @property
    def bounds(self) -> str:
        """What a row sees, as seen_of takes it."""
        names = ["firsts"] * (self.mask.left is not None) + ["ends"] + ["ends2"] * (self.part.kv_sources == 2)
        return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"

    @property
    def _matrices(self) -> list[str]:
        """What TMA loads and stores."""
        tensors = [item for item in signature(self.part) if item.matrix and not item.scratch]
        return self.with_v([item.name for item in tensors if not (self.stored_by_threads and item.output)])

    @property
    def tma_operands(self) -> str:
        """TMA atoms and tensors of Q, of K and V of each source, and of O, see stored_by_threads, the tensor alone."""
        return super().tma_operands + (", mo" if self.stored_by_threads else "")

    @cached_property
    def layouts(self) -> dict[str, TileLayout]:
        """TileLayout of "sQ" and "sO" of one consumer, and of "sK" and "sV"."""
        spec, rows, keys = self.part, self.arch.mma_m, self.tile_n
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
