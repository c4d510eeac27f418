"""The Plan of strategy "columns" on sm_90a: what its templates spell, decided."""

from __future__ import annotations

from functools import cached_property

from .budget import ELEMENT_BYTES, Role, swizzle_bytes
from .columns import (
    CHUNK,
    IN_K,
    OUTPUT_GROUPS,
    P_STAGES,
    chunks_apart,
    half_width,
    k_chunks,
    k_step,
    looks_for_maxima,
    o_parts,
    part_chunks,
    pv_waits_at,
    rest_chunks,
    ring_parts,
    tile_parts,
    v_buffer_width,
)
from .hopper import HopperPlan
from .layout import TileLayout


class ColumnsPlan(HopperPlan):
    """The same for strategy "columns": a score warpgroup, and two that hold half of O's columns each."""

    @property
    def keeps_reference(self) -> bool:
        return self.mask.left is None

    @property
    def looks_for_maxima(self) -> bool:
        return looks_for_maxima(self.part)

    @property
    def scores_again(self) -> bool:
        return False

    @property
    def one_loop(self) -> bool:
        """The softmax waits for QK, and PV for both: each question in between costs (docs/h200.md)."""
        return False

    @property
    def own_spans(self) -> bool:
        """All warpgroups work on the same 64 rows."""
        return False

    @property
    def splits_columns(self) -> bool:
        """O's columns lie in two warpgroups."""
        return True

    @property
    def stored_by_threads(self) -> bool:
        return not self.o_chunk

    @property
    def separate_v(self) -> bool:
        """V is loaded into buffers of its own, also where its columns are K's but not whole chunks of them."""
        return self.tiling.v_keys != IN_K

    @property
    def cluster(self) -> int:
        """CTAs that load K and V for one another."""
        return self.tile_m // self.arch.mma_m

    @property
    def ctas(self) -> int:
        """CTAs that work together."""
        return self.cluster

    @property
    def own_barrier(self) -> int:
        """The first of the output warpgroups' named barriers; 0: O is not staged, there are none."""
        return 0 if self.stored_by_threads else self.named_barrier("output 0")

    @property
    def roles(self) -> list[tuple[str, Role]]:
        """The roles that get registers of their own, as the kernel's constants call them."""
        names = {"SCORE": "scores", "OUTPUT": "output", "PRODUCER": "tma"}
        return [(name, self.budget.role(role)) for name, role in names.items()]

    @property
    def worker(self) -> str:
        return "pair" if self.cluster > 1 else "CTA"

    @property
    def workers(self) -> str:
        return "cute.arch.grid_dim()[0]" + (" // 2" if self.cluster > 1 else "")

    @property
    def place(self) -> str:
        return "cute.arch.block_idx()[0]" + (" // 2" if self.cluster > 1 else "")

    @property
    def cta_rows_said(self) -> str:
        """What a CTA covers, in words."""
        return f"{self.arch.mma_m} of a cluster's {self.tile_rows}" if self.cluster > 1 else self.tile_rows

    @property
    def k_chunks(self) -> int:
        return k_chunks(self.part)

    @property
    def k_step(self) -> int:
        return k_step(self.tiling)

    @property
    def q_chunks(self) -> int:
        """Chunks of Q in registers: the first ones."""
        return self.k_chunks - self.chunks_apart

    @property
    def q_columns(self) -> int:
        """Columns of Q in registers."""
        return self.part.head_dim if not self.chunks_apart else self.q_chunks * CHUNK

    @property
    def chunks_apart(self) -> int:
        """Chunks of Q that stay in shared memory: the last ones."""
        return chunks_apart(self.part, self.arch, self.tiling)

    @property
    def q_stages(self) -> int:
        return self.budget.buffer("sQ").stages

    @property
    def ring_parts(self) -> int:
        return ring_parts(self.part, self.tiling)

    @property
    def part_chunks(self) -> int:
        return part_chunks(self.part)

    @property
    def tile_parts(self) -> int:
        return tile_parts(self.part)

    @property
    def rest_chunks(self) -> int:
        return 0 if self.separate_v else rest_chunks(self.part)

    @property
    def k_start(self) -> str:
        """The first place in K's ring: stage or part, its phase, and that of the chunks which are in no part."""
        return f"({', '.join(['Int32(0)'] * (3 if self.rest_chunks else 2))})"

    @property
    def pv_waits_at(self) -> int:
        """The part of O before which PV waits for QK of the next KV tile."""
        return 0 if self.separate_v else pv_waits_at(self.part, self.tiling)

    @property
    def v_slices(self) -> int:
        return self.tile_n // self.tiling.v_keys

    @property
    def v_stages(self) -> int:
        return self.budget.buffer("sV").stages

    @property
    def p_stages(self) -> int:
        return P_STAGES

    @property
    def o_width(self) -> int:
        return half_width(self.part)

    @property
    def v_width(self) -> int:
        return v_buffer_width(self.part)

    @property
    def v_box(self) -> int:
        """Columns of V that TMA brings in one piece: a swizzle span."""
        return self.layouts["sV"].swizzle_bytes // ELEMENT_BYTES

    @property
    def pads_v_buffers(self) -> bool:
        """A buffer of V has more columns of a half than are multiplied."""
        return self.separate_v and self.v_width > self.o_width

    @property
    def v_width_name(self) -> str:
        return "V_WIDTH" if self.pads_v_buffers else "O_WIDTH"

    @property
    def pads_v(self) -> bool:
        """The second output warpgroup holds columns beyond head_dim_v."""
        return OUTPUT_GROUPS * self.o_width > self.part.v_dim

    @property
    def o_parts(self) -> tuple[int, ...]:
        return o_parts(self.part)

    @property
    def q_chunk_bytes(self) -> int:
        return self.arch.mma_m * CHUNK * ELEMENT_BYTES

    @property
    def k_chunk_bytes(self) -> int:
        return self.layouts["sK"].bytes

    @property
    def v_slice_bytes(self) -> int:
        return OUTPUT_GROUPS * self.layouts["sV"].bytes

    @property
    def loaded_tile_times_slices(self) -> str:
        """The first slice of the j-th KV tile of source 1."""
        return f"{self.loaded_tile} * V_SLICES"

    @cached_property
    def layouts(self) -> dict[str, TileLayout]:
        """TileLayout of a chunk of "sQ" and "sK", half a slice of "sV", "sP", and of what is staged of "sO"."""
        spec, rows, keys = self.part, self.arch.mma_m, self.tile_n
        shapes = [
            ("sQ", rows, CHUNK, "K"),
            ("sK", keys, CHUNK, "K"),
            *([("sV", self.tiling.v_keys, v_buffer_width(spec), "MN")] if self.separate_v else []),
            ("sP", rows, keys, "K"),
            *([] if self.stored_by_threads else [("sO", rows, self.o_chunk, "")]),
        ]
        return {
            name: TileLayout(name, count, columns, ELEMENT_BYTES, swizzle_bytes(columns * ELEMENT_BYTES), major)
            for name, count, columns, major in shapes
        }
