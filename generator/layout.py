"""The Plan: everything that the template spells, decided. plan.py makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from .chunks import Geometry, geometry
from .mask import Mask, mask_of
from .partials import PARTIALS, Partials
from .signature import Parameter, signature
from .spec import KernelSpec
from .two_tiles import EXP2_CUBIC, POLYNOMIAL_PAIRS, QUERY_TILES, SKIP_LOG2

TILE_M = 128
WHOLE_TILES = ("tiles", "two_tiles")
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
class Plan:
    """Everything the template spells. Columns are of TMEM, bytes of shared memory."""

    spec: KernelSpec
    arch: Arch
    tiling: Tiling
    budget: Budget
    rejected: tuple[Rejected, ...]

    @property
    def kernel_name(self) -> str:
        return self.spec.name

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
        return self.o_tmem_columns // self.tiling.o_chunk

    @property
    def pair(self) -> bool:
        """Two CTAs share a tile of queries and issue with cta_group::2."""
        return self.tiling.strategy == "pair"

    @property
    def passes(self) -> int:
        """Passes over O's columns, each with the scores recomputed."""
        return self.tiling.passes

    @property
    def mma_m(self) -> int:
        """Query rows that one tcgen05.mma multiplies, over all CTAs that share it."""
        return self.tile_m if self.tiling.strategy in WHOLE_TILES else self.arch.mma_m

    @cached_property
    def shape(self) -> Geometry:
        """Chunks of K and V; only for a strategy that has them."""
        return geometry(self.spec, self.arch, self.tiling)

    @property
    def o_tmem_columns(self) -> int:
        """TMEM columns of O."""
        return self.budget.region("O0" if self.query_tiles == 2 else "O").columns

    @property
    def s_width(self) -> int:
        """Columns of S that a thread holds."""
        return self.budget.region("S0" if self.query_tiles == 2 else "S").columns

    @property
    def partials(self) -> Partials:
        """The template's parts for this strategy."""
        found = PARTIALS[self.tiling.strategy]
        if not self.spec.sink:
            return found
        at = next(i for i, part in enumerate(found.parts) if part.startswith("_kernel"))
        return replace(found, parts=(*found.parts[:at], "_sink.py.j2", *found.parts[at:]))

    @property
    def query_tiles(self) -> int:
        """Query tiles that a CTA has in flight."""
        return QUERY_TILES if self.tiling.strategy == "two_tiles" else 1

    @property
    def cta_tokens(self) -> str:
        """Query tokens of a CTA, as the kernel's constants say it."""
        return f"2 * {self.token_tile}" if self.query_tiles == 2 else self.token_tile

    @property
    def row_in_tile(self) -> str:
        """A thread's row of its query tile."""
        return "cute.arch.thread_idx()[0]" + (" % TILE_M" if self.query_tiles == 2 else "")

    @property
    def tile_warps(self) -> str:
        """The constant that says how many warps read the rows of a query tile."""
        return "TILE_WARPS" if self.query_tiles == 2 else "SOFTMAX_WARPS"

    @property
    def warp_in_tile(self) -> str:
        """Which of them a warp is."""
        return "cute.arch.warp_idx()" + (" % TILE_WARPS" if self.query_tiles == 2 else "")

    @property
    def span_name(self) -> str:
        """The argument that tells the load warp which KV tiles it loads; "" where they are the first ones."""
        if self.query_tiles == 2:
            return "span" if self.spans_differ else ""
        return "spans" if self.spec.kv_sources == 2 else "span"

    @property
    def loaded_tile(self) -> str:
        """Which KV tile of source 1 is the j-th that is loaded."""
        if self.mask.left is None:
            return "j"
        return "span[1] + j" if self.query_tiles == 2 else "kv_tile(j, span)"

    @property
    def loaded_tile2(self) -> str:
        """The same of source 2, of whose tiles span[0] of source 1 come first."""
        return "j - span[0]" if self.query_tiles == 2 else "kv_tile(j - span[0], span2)"

    @property
    def o_tile_bytes(self) -> int:
        """sO of one query tile."""
        return self.budget.buffer("sO").stage_bytes

    @property
    def skip_log2(self) -> float:
        """By how much, in log2, a row's maximum may move before its reference follows and O is rescaled."""
        return SKIP_LOG2 if self.query_tiles == 2 else 0.0

    @property
    def polynomial(self) -> tuple[float, ...]:
        """Coefficients of 2^x on [0, 1), from x^3 to x; the constant is 1."""
        return EXP2_CUBIC

    @property
    def polynomial_pairs(self) -> tuple[int, ...]:
        """Of each 8 neighbouring pairs of columns, those whose exponentials are computed by the polynomial."""
        return POLYNOMIAL_PAIRS

    @property
    def s_columns(self) -> int:
        """Columns of S that one tcgen05.ld brings to registers."""
        return register_columns(self.s_width)

    @property
    def p_columns(self) -> int:
        """Columns of P (two elements each) that one tcgen05.st takes from registers."""
        return register_columns(self.tile_n // 2)

    @property
    def o_columns(self) -> int:
        """Columns of O that the rescale and the epilogue hold in registers at a time."""
        return register_columns(self.o_chunk)

    @property
    def mask(self) -> Mask:
        return mask_of(self.spec)

    @property
    def heads_per_tile(self) -> int:
        """Query heads whose rows a tile holds."""
        return self.spec.q_heads_per_kv if self.packed else 1

    @property
    def packed(self) -> bool:
        """The query heads of a group share a tile."""
        return packs_heads(self.spec)

    @property
    def tokens(self) -> int:
        """Query tokens of a tile."""
        return self.mma_m // self.heads_per_tile

    @property
    def token_tile(self) -> str:
        """The constant that says how many query tokens a tile has."""
        return "TILE_TOKENS" if self.packed else "TILE_M"

    @property
    def tile_rows(self) -> str:
        """What a tile covers, in words."""
        if not self.packed:
            return f"{self.mma_m} query rows of a query head"
        return f"{self.tokens} query tokens of a KV head's {self.heads_per_tile} query heads"

    @property
    def grid_x(self) -> str:
        """The grid's first extent, in words."""
        times = "2 " if self.pair else f"{self.passes} " if self.passes > 1 else ""
        return f"{times}ceil(Sq / {self.tokens})"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The tensors of the kernel's host function."""
        return signature(self.spec)

    @property
    def thread_tensors(self) -> list[Parameter]:
        """Those that threads read and write, as the kernel takes them."""
        return [parameter for parameter in self.parameters if not parameter.matrix]

    @property
    def thread_arguments(self) -> str:
        """thread_tensors as the beginning of a list of arguments."""
        return "".join(f"{parameter.spelled}, " for parameter in self.thread_tensors)

    @property
    def rows(self) -> str:
        """Those of them that belong to a row: what the warps of the epilogue take, as the inside of a tuple; "" for
        none. With one query tile they are the softmax warps, which read limit2 too.
        """
        wanted = ("limit2", "sink", "lse", "m")[self.query_tiles - 1 :]
        names = [parameter.spelled for parameter in self.thread_tensors if parameter.name in wanted]
        return f"{names[0]}," if len(names) == 1 else ", ".join(names)

    @property
    def tma_operands(self) -> str:
        """TMA atoms and tensors of Q, of each source's K and V, and of O, as the kernel takes them."""
        names = [parameter.name for parameter in self.parameters if parameter.matrix]
        return ", ".join(f"tma_{name}, m{name}" for name in names)

    @property
    def tma_atoms(self) -> str:
        return ", ".join(f"tma_{parameter.name}" for parameter in self.parameters if parameter.matrix)

    @property
    def rotated(self) -> bool:
        """Tiles of some source are not visited from the left; two query tiles, which share them, visit all in order."""
        return self.query_tiles == 1 and (self.mask.left is not None or self.mask.sources == 2)

    @property
    def spans_differ(self) -> bool:
        """What a query tile sees is not the first KV tiles of a single source."""
        return self.mask.left is not None or self.mask.sources == 2

    @property
    def rows_unpacked(self) -> str:
        """The same as the target of an assignment."""
        return f"({self.rows})" if self.rows.endswith(",") else self.rows

    @property
    def empty_lse(self) -> str:
        """What is said of the LSE of a row that sees no key."""
        if not self.spec.lse:
            return ""
        return " and LSE = its sink" if self.spec.sink else " and LSE = -inf"

    @cached_property
    def layouts(self) -> dict[str, TileLayout]:
        """TileLayout of "sQ", "sK", "sV", "sO", and "sP" when P is staged in shared memory: what one CTA holds, and of
        one chunk where K and V are streamed in chunks ("sQ" too, of which there are as many as K has).

        sO's is of one warp's slab: each softmax warp stages and stores its own 32 rows.
        """
        spec, tiling = self.spec, self.tiling
        if tiling.strategy in WHOLE_TILES:
            k_columns, k_rows, v_columns, v_rows = spec.head_dim, tiling.tile_n, spec.v_dim, tiling.tile_n
        else:
            shape = self.shape
            k_columns, k_rows, v_columns, v_rows = tiling.k_chunk, shape.k_rows, shape.v_columns, tiling.v_keys
        shapes = [
            ("sQ", tiling.tile_m, k_columns, ELEMENT_BYTES, "K"),
            ("sK", k_rows, k_columns, ELEMENT_BYTES, "K"),
            ("sV", v_rows, v_columns, ELEMENT_BYTES, "MN"),
            ("sO", self.mma_m // SOFTMAX_WARPS, tiling.o_chunk, output_bytes(spec), ""),
        ]
        if tiling.p_staging == "smem":
            shapes.append(("sP", tiling.tile_m, tiling.tile_n, ELEMENT_BYTES, "K"))
        spans = {name: swizzle_bytes(columns * size) for name, _, columns, size, _ in shapes}
        if spec.kv_shared:  # K and V are the same bytes, so one span must divide the rows of both
            spans["sK"] = spans["sV"] = swizzle_bytes(gcd(spec.head_dim, spec.v_dim) * ELEMENT_BYTES)
        return {
            name: TileLayout(name, rows, columns, size, spans[name], major)
            for name, rows, columns, size, major in shapes
        }


def register_columns(columns: int) -> int:
    """Widest tcgen05.ld or .st (a power of two, at most 32 registers) that walks these columns evenly."""
    return min(REGISTER_COLUMNS_MAX, columns & -columns)


def packs_heads(spec: KernelSpec) -> bool:
    """Whether the query heads of a group fold into the rows of a tile.

    "auto" folds every group that divides the tile: no grid has more CTAs for it, one whose last tile would be partly
    empty has fewer, a tile of fewer tokens meets less of a mask's edge, and a KV tile serves all of its group at once.
    """
    if spec.pack_heads == "auto":
        return spec.q_heads_per_kv > 1 and TILE_M % spec.q_heads_per_kv == 0
    return spec.pack_heads and spec.q_heads_per_kv > 1
