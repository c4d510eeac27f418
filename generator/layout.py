"""The Plan: everything that the template spells, decided. plan.py makes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd

from .arch import Arch
from .budget import (
    ELEMENT_BYTES,
    SOFTMAX_WARPS,
    Budget,
    Tiling,
    output_bytes,
    swizzle_bytes,
)
from .chunks import Geometry, geometry, one_buffer
from .mask import Mask, mask_of
from .partials import PARTIALS, Partials, with_part
from .signature import Parameter, signature
from .spec import KernelSpec
from .spelling import Spelling
from .two_ctas import P_COLUMNS_MAX, polynomial_pairs, v_width
from .two_tiles import EXP2_CUBIC, PAIR_PERIOD, POLYNOMIAL_PAIRS, QUERY_TILES, SKIP_LOG2, registers_of

WHOLE_TILES = ("tiles", "two_tiles", "two_ctas")  # of sm_100a
REGISTER_COLUMNS_MAX = 32


@dataclass(frozen=True)
class TileLayout:
    """How one operand lies in shared memory.

    rows x columns of element_bytes, columns contiguous in global memory; swizzle_bytes is the TMA and MMA swizzle
    span; box is the TMA box (columns, rows) of one swizzle span; major is the operand's in the MMA ("" for sO).
    """

    name: str
    rows: int
    columns: int
    element_bytes: int
    swizzle_bytes: int
    major: str

    @property
    def swizzle_columns(self) -> int:
        return self.swizzle_bytes // self.element_bytes

    @property
    def box(self) -> tuple[int, int]:
        return (self.swizzle_columns, self.rows)

    @property
    def bytes(self) -> int:
        """Of one stage: what a TMA load of it adds to the transaction count, out-of-bounds fill included."""
        return self.rows * self.columns * self.element_bytes


@dataclass(frozen=True)
class Rejected:
    """A candidate that was not taken, why, and what would make it good."""

    candidate: Tiling
    reason: str
    remedy: str


@dataclass(frozen=True)
class Plan(Spelling):
    """Everything the template spells. Columns are of TMEM, bytes of shared memory."""

    spec: KernelSpec
    arch: Arch
    tiling: Tiling
    budget: Budget
    rejected: tuple[Rejected, ...]

    @property
    def kernel_name(self) -> str:
        return self.spec.name

    @cached_property
    def part(self) -> KernelSpec:
        """What the attention kernel itself computes: see KernelSpec.partial."""
        return self.spec.partial

    @property
    def tile_m(self) -> int:
        return self.tiling.tile_m

    @property
    def tile_n(self) -> int:
        return self.tiling.tile_n

    @property
    def kv_stages(self) -> int:
        return self.tiling.kv_stages

    @property
    def p_staging(self) -> str:
        """ "tmem" or "smem"."""
        return self.tiling.p_staging

    @property
    def o_over_q(self) -> bool:
        return self.tiling.o_over_q

    @property
    def o_chunk(self) -> int:
        return self.tiling.o_chunk

    @property
    def o_steps(self) -> int:
        """Steps of the epilogue: o_chunk columns of O each."""
        columns = self.part.v_dim if self.two_ctas else self.o_tmem_columns  # a pair's products may be wider than O
        return columns // self.tiling.o_chunk

    @property
    def pair(self) -> bool:
        """Two CTAs share a tile of queries and issue with cta_group::2."""
        return self.tiling.strategy == "pair"

    @property
    def fragments(self) -> bool:
        """A thread holds parts of several rows of S, not one row."""
        return False

    @property
    def two_ctas(self) -> bool:
        """Two CTAs issue with cta_group::2, each with a query tile of its own."""
        return self.tiling.strategy == "two_ctas"

    @property
    def corrected(self) -> bool:
        """Warps of their own rescale O, and only where the maximum has moved much."""
        return self.tiling.strategy in ("two_tiles", "two_ctas")

    @property
    def skip_log2(self) -> float:
        """By how many factors of 2 a row's maximum must move before O and its sum are rescaled."""
        return SKIP_LOG2 if self.corrected else 0.0

    @property
    def persistent(self) -> bool:
        """A CTA works on one query tile after another, and is told how many CTAs there may be."""
        return self.corrected

    @property
    def ctas(self) -> int:
        """CTAs that share a tcgen05.mma."""
        return 2 if self.pair or self.two_ctas else 1

    @property
    def cta_mask(self) -> int:
        """A bit for each of them, by rank."""
        return (1 << self.ctas) - 1

    @property
    def passes(self) -> int:
        """Passes over O's columns, each with the scores recomputed."""
        return self.tiling.passes

    @property
    def mma_m(self) -> int:
        """Query rows that one tcgen05.mma multiplies, over all CTAs that share it."""
        if self.two_ctas:
            return self.tile_m * self.ctas
        return self.tile_m if self.tiling.strategy in WHOLE_TILES else self.arch.mma_m

    @cached_property
    def shape(self) -> Geometry:
        """Chunks of K and V; only for a strategy that has them."""
        return geometry(self.part, self.arch, self.tiling)

    @property
    def separate_v(self) -> bool:
        """V is loaded into buffers of its own."""
        return not self.part.kv_shared or self.pair

    @property
    def chunk(self) -> str:
        """The chunk of K that is loaded and multiplied c-th where K's chunks are V's too: V's come last."""
        if self.shape.kept == self.shape.k_chunks:
            return "c"
        return "chunk_at(c, o_pass)" if self.passes > 1 else "chunk_at(c)"

    @property
    def pads_head_dim(self) -> bool:
        """QK multiplies columns past head_dim."""
        return self.shape.qk_columns > self.part.head_dim

    @property
    def chunk_columns(self) -> str:
        """How many columns of it QK multiplies."""
        whole = self.pads_head_dim or self.part.head_dim % self.tiling.k_chunk == 0
        return "K_CHUNK" if whole else f"min(K_CHUNK, HEAD_DIM - {self.chunk} * K_CHUNK)"

    @property
    def kv_tiles(self) -> str:
        """KV tiles that a CTA visits, of all sources, by the kernel's `span` and `spans`."""
        return "span[0] + spans[1][0]" if self.part.kv_sources == 2 else "span[0]"

    @property
    def load_tiles(self) -> str:
        """The same by what the load warp has."""
        return "spans[0][0] + spans[1][0]" if self.part.kv_sources == 2 else "span[0]"

    @property
    def tile_of_j(self) -> str:
        """The KV tile of the first source that is visited j-th."""
        return "kv_tile(j, span)" if self.mask.left is not None or self.part.split_kv else "j"

    @property
    def o_tmem_columns(self) -> int:
        """TMEM columns of O."""
        return self.budget.region("O0" if self.query_tiles == 2 else "O").columns

    @property
    def s_width(self) -> int:
        """Columns of S that a thread holds."""
        return self.budget.region("S" if self.tiling.strategy not in ("two_tiles", "two_ctas") else "S0").columns

    @property
    def partials(self) -> Partials:
        """The template's parts for this strategy."""
        found = PARTIALS["chunks_shared" if one_buffer(self.part, self.tiling) else self.tiling.strategy]
        return with_part(found, "_sink", "_kernel") if self.part.sink else found

    @property
    def query_tiles(self) -> int:
        """Query tiles that a CTA has in flight."""
        return QUERY_TILES if self.tiling.strategy == "two_tiles" else 1

    @property
    def o_tile_bytes(self) -> int:
        """sO of one query tile."""
        return self.budget.buffer("sO").stage_bytes

    @property
    def polynomial(self) -> tuple[float, ...]:
        """Coefficients of 2^x on [0, 1), from x^3 to x; the constant is 1."""
        return EXP2_CUBIC

    @property
    def pair_period(self) -> int:
        return PAIR_PERIOD

    @property
    def polynomial_pairs(self) -> tuple[int, ...]:
        """Of each pair_period neighbouring pairs of columns, those whose exponentials the polynomial computes."""
        return polynomial_pairs(self.part, self.arch) if self.two_ctas else POLYNOMIAL_PAIRS

    @property
    def s_columns(self) -> int:
        """Columns of S that one tcgen05.ld brings to registers."""
        return register_columns(self.s_width)

    @property
    def p_columns(self) -> int:
        """Columns of P (two elements each) that one tcgen05.st takes from registers."""
        most = REGISTER_COLUMNS_MAX
        if self.corrected:
            most = P_COLUMNS_MAX if self.two_ctas else registers_of(self.tiling).p_columns
        return register_columns(self.tile_n // 2, most)

    @property
    def o_columns(self) -> int:
        """Columns of O that the rescale holds in registers at a time."""
        most = registers_of(self.tiling).o_columns if self.query_tiles == 2 else REGISTER_COLUMNS_MAX
        return register_columns(self.o_chunk, most)

    @property
    def stage_columns(self) -> int:
        """Columns of O that the epilogue holds in registers at a time."""
        most = registers_of(self.tiling).stage_columns if self.query_tiles == 2 else REGISTER_COLUMNS_MAX
        return register_columns(self.o_chunk, most)

    @property
    def mask(self) -> Mask:
        return mask_of(self.part)

    @property
    def heads_per_tile(self) -> int:
        """Query heads whose rows a tile holds."""
        return self.part.q_heads_per_kv if self.packed else 1

    @property
    def tiles_a_group(self) -> int:
        """Tiles that the heads of a group fill at one token; 1 where a tile holds all of them."""
        return 1

    @property
    def packed(self) -> bool:
        """The query heads of a group share a tile."""
        return packs_heads(self.part, self.arch.mma_m)

    @property
    def tokens(self) -> int:
        """Query tokens of a tile."""
        return self.mma_m // self.heads_per_tile

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The tensors of the kernel's host function."""
        return signature(self.spec)

    @property
    def thread_tensors(self) -> list[Parameter]:
        """Those that threads read and write, as the kernel takes them."""
        return [parameter for parameter in signature(self.part) if not parameter.matrix and not parameter.scratch]

    @property
    def uses_row(self) -> bool:
        """A softmax thread asks which row of the tile it has: for its mask, its LSE or its head."""
        return self.mask.rows_differ or self.part.lse or (self.packed and bool(self.rows))

    @property
    def _matrices(self) -> list[str]:
        """What TMA loads and stores: a pair loads V's columns of a shared K as if they were a tensor of their own."""
        return self.with_v([parameter.name for parameter in signature(self.part) if parameter.matrix])

    def with_v(self, names: list[str]) -> list[str]:
        """Names of tensors, with V's after K's where V lies within K and is loaded apart all the same."""
        if not self.part.kv_shared or not self.separate_v:
            return names
        return [name for own in names for name in ([own, own.replace("k", "v")] if own[0] == "k" else [own])]

    @property
    def rotated(self) -> bool:
        """Tiles of some source are not visited from the left; two query tiles, which share them, visit all in order."""
        return self.query_tiles == 1 and (self.mask.left is not None or self.mask.sources == 2)

    @property
    def own_spans(self) -> bool:
        """Warpgroups of a CTA visit KV tiles of their own."""
        return False

    @property
    def tiles_move(self) -> bool:
        """KV tiles begin with the first key that the query tile sees, not with a multiple of tile_n."""
        return False

    @property
    def spans_differ(self) -> bool:
        """What a query tile sees is not the first KV tiles of a single source."""
        return self.mask.left is not None or self.mask.sources == 2

    @cached_property
    def layouts(self) -> dict[str, TileLayout]:
        """TileLayout of "sQ", "sK", "sV", "sO", and "sP" when P is staged in shared memory: what one CTA holds, and of
        one chunk where K and V are streamed in chunks ("sQ" too, of which there are as many as K has).

        sO's is of one warp's slab: each softmax warp stages and stores its own 32 rows.
        """
        spec, tiling = self.part, self.tiling
        if tiling.strategy in WHOLE_TILES:
            k_columns, k_rows, v_columns, v_rows = spec.head_dim, tiling.tile_n, spec.v_dim, tiling.tile_n
            if self.two_ctas:
                k_rows, v_columns = k_rows // self.ctas, v_width(spec) // self.ctas
        else:
            shape = self.shape
            k_columns, k_rows, v_columns, v_rows = tiling.k_chunk, shape.k_rows, shape.v_columns, shape.v_keys
        shapes = [
            ("sQ", tiling.tile_m, k_columns, ELEMENT_BYTES, "K"),
            ("sK", k_rows, k_columns, ELEMENT_BYTES, "K"),
            ("sV", v_rows, v_columns, ELEMENT_BYTES, "MN"),
            ("sO", self.arch.tmem_lanes // SOFTMAX_WARPS, tiling.o_chunk, output_bytes(spec), ""),
        ]
        if tiling.p_staging == "smem":
            shapes.append(("sP", tiling.tile_m, tiling.tile_n, ELEMENT_BYTES, "K"))
        spans = {name: swizzle_bytes(columns * size) for name, _, columns, size, _ in shapes}
        half = tiling.tile_n // 2 * ELEMENT_BYTES  # of a row of P, which is what a thread of a pair stores
        if self.pair and half % spans["sP"] and spans["sP"] % half:
            spans["sP"] = swizzle_bytes(half)
        if spec.kv_shared and tiling.strategy in WHOLE_TILES:
            # K and V are the same bytes, so one span must divide the rows of both
            spans["sK"] = spans["sV"] = swizzle_bytes(gcd(spec.head_dim, spec.v_dim) * ELEMENT_BYTES)
        return {
            name: TileLayout(name, rows, columns, size, spans[name], major)
            for name, rows, columns, size, major in shapes
        }


def register_columns(columns: int, most: int = REGISTER_COLUMNS_MAX) -> int:
    """Widest tcgen05.ld or .st (a power of two, at most as many registers) that walks these columns evenly."""
    return min(most, columns & -columns)


def packs_heads(spec: KernelSpec, rows: int) -> bool:
    """Whether the query heads of a group fold into the rows of a tile.

    "auto" folds every group that divides the tile: no grid has more CTAs for it, one whose last tile would be partly
    empty has fewer, a tile of fewer tokens meets less of a mask's edge, and a KV tile serves all of its group at once.
    """
    if spec.pack_heads == "auto":
        return spec.q_heads_per_kv > 1 and rows % spec.q_heads_per_kv == 0
    return spec.pack_heads and spec.q_heads_per_kv > 1
