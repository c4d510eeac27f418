"""What a CTA needs when K and V stream in chunks through one ring: alone ("chunks"), or as one of a pair ("pair").

Pure arithmetic, as in budget.py. Where the two strategies agree:

    Q       stays in shared memory, in chunks of k_chunk columns
    ring    kv_stages equal buffers; each holds k_chunk columns of tile_n keys of K, or v_width of v_keys keys of V
    O       v_groups x v_width columns, one tcgen05.mma wide each; in passes, each pass with as many columns

With kv_shared one CTA's ring holds K alone, k_chunk columns of tile_n keys a buffer. The chunks that a CTA has as V
come last in each tile: QK reads them K-major and PV, later, MN-major from the same buffers, so that only PV releases
them, and the ring is at least as deep as lifetime.py finds. A pair loads V's columns a second time, from K's tensor:
its tcgen05.mma takes one descriptor for both CTAs, so at one address both have the same keys for PV, and for QK each
has keys of its own.

In a pair (cta_group::2) one tcgen05.mma multiplies 128 rows of Q, 64 of each CTA, with K and V of which each CTA holds
half, and each CTA keeps its 64 rows of the product: the left half of the columns in lanes 0 to 63, the right half in
the same columns of lanes 64 to 127 (layout B, PTX ISA 9.1 section 9.7.16.10.5). So S and O take half as many columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .arch import Arch
from .budget import (
    ACCUMULATOR_BYTES,
    ELEMENT_BYTES,
    SOFTMAX_WARPS,
    TILE_ALIGNMENT,
    TMEM_SLOT_BYTES,
    WIDE_REMEDY,
    Budget,
    Buffer,
    Mbarrier,
    NamedBarrier,
    Overflow,
    Region,
    Tiling,
    accumulator_overflow,
    assembled,
    compute_budget,
    issuer_roles,
    named_barriers,
    output_bytes,
    place_buffers,
    place_mbarriers,
    place_regions,
    register_overflow,
    smem_overflows,
    softmax_role,
    swizzle_bytes,
)
from .columns import column_budget
from .lifetime import fewest_buffers
from .spec import HEAD_DIM_STEP, KernelSpec
from .two_ctas import two_cta_budget
from .two_tiles import two_tile_budget
from .warpgroups import warpgroup_budget


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from a specification and a Tiling with K and V in chunks. Columns and rows, of one CTA unless
    they say otherwise.
    """

    ctas: int  # that share one tcgen05.mma
    k_chunks: int  # of head_dim
    qk_columns: int  # of head_dim that QK multiplies, with those past it where it cannot tell the chunk that has them
    kept: int  # chunks of a K tile that are V's too; 0: V has buffers of its own
    v_groups: int  # of O's columns, a pass
    v_width: int  # columns of O that one tcgen05.mma writes, over all CTAs
    v_keys: int  # of V in a buffer
    v_key_blocks: int  # of tile_n
    k_rows: int  # keys of K in a buffer
    v_columns: int  # columns of V in a buffer, and of one group of O in TMEM
    chunk_bytes: tuple[int, int]  # what a TMA load brings: of K, of V

    @property
    def loaded_bytes(self) -> tuple[int, int]:
        """What completes a buffer of the ring: the chunk of K or V of all CTAs."""
        return self.chunk_bytes[0] * self.ctas, self.chunk_bytes[1] * self.ctas

    @property
    def buffer_bytes(self) -> int:
        return -(-max(self.chunk_bytes) // TILE_ALIGNMENT) * TILE_ALIGNMENT

    @property
    def o_columns(self) -> int:
        """TMEM columns of O."""
        return self.v_groups * self.v_columns

    @property
    def o_width(self) -> int:
        """Columns of O that one pass computes, the last ones past head_dim_v where it does not divide."""
        return self.v_groups * self.v_width

    @property
    def chunks_a_tile(self) -> int:
        return self.k_chunks if self.kept else self.k_chunks + self.v_groups * self.v_key_blocks

    @property
    def boxes_a_tile(self) -> int:
        """TMA boxes of K and V, a swizzle span wide each."""
        k, v = self.chunk_bytes[0] // self.k_rows, self.v_columns * ELEMENT_BYTES  # bytes of a row
        of_v = 0 if self.kept else self.v_groups * self.v_key_blocks * v // swizzle_bytes(v)
        return self.k_chunks * k // swizzle_bytes(k) + of_v

    @property
    def fewest_buffers(self) -> int:
        """The shallowest ring with which the kernel does not wait for itself."""
        return fewest_buffers(self.k_chunks - self.kept, self.kept) if self.kept else 1


def geometry(spec: KernelSpec, arch: Arch, tiling: Tiling) -> Geometry:
    """The Geometry of a candidate whose strategy streams K and V in chunks."""
    if one_buffer(spec, tiling):
        return _shared_geometry(spec, tiling)
    ctas = 2 if tiling.strategy == "pair" else 1
    step = HEAD_DIM_STEP * ctas  # of N: a pair's tcgen05.mma takes multiples of 32 [PTX 9.7.16.2]
    a_pass = -(-spec.v_dim // tiling.passes)
    groups = -(-a_pass // arch.mma_n_max)
    width = -(-a_pass // (groups * step)) * step
    columns, k_rows = width // ctas, tiling.tile_n // ctas
    return Geometry(
        ctas=ctas,
        k_chunks=-(-spec.head_dim // tiling.k_chunk),
        qk_columns=spec.head_dim,
        kept=0,
        v_groups=groups,
        v_width=width,
        v_keys=tiling.v_keys,
        v_key_blocks=tiling.tile_n // tiling.v_keys,
        k_rows=k_rows,
        v_columns=columns,
        chunk_bytes=(k_rows * tiling.k_chunk * ELEMENT_BYTES, tiling.v_keys * columns * ELEMENT_BYTES),
    )


def one_buffer(spec: KernelSpec, tiling: Tiling) -> bool:
    """Whether the buffers of the ring serve K and V both."""
    return spec.kv_shared and tiling.strategy == "chunks"


def _shared_geometry(spec: KernelSpec, tiling: Tiling) -> Geometry:
    """Each pass has as many whole chunks as V, the last one past head_dim_v where it does not come out even. At which
    place head_dim's last chunk is multiplied differs from pass to pass, so that QK multiplies every chunk whole.
    """
    chunk, n = tiling.k_chunk, tiling.tile_n
    kept, chunks = -(-spec.v_dim // (chunk * tiling.passes)), -(-spec.head_dim // chunk)
    return Geometry(
        ctas=1,
        k_chunks=chunks,
        qk_columns=spec.head_dim if tiling.passes == 1 else chunks * chunk,
        kept=kept,
        v_groups=kept,
        v_width=chunk,
        v_keys=n,
        v_key_blocks=1,
        k_rows=n,
        v_columns=chunk,
        chunk_bytes=(n * chunk * ELEMENT_BYTES, n * chunk * ELEMENT_BYTES),
    )


def budget_of(spec: KernelSpec, arch: Arch, tiling: Tiling) -> Budget:
    """The Budget of any candidate. Never raises for what does not fit: see Budget.overflows."""
    if tiling.strategy == "tiles":
        return compute_budget(spec, arch, tiling)
    if tiling.strategy == "two_tiles":
        return two_tile_budget(spec, arch, tiling)
    if tiling.strategy == "two_ctas":
        return two_cta_budget(spec, arch, tiling)
    if tiling.strategy == "warpgroups":
        return warpgroup_budget(spec, arch, tiling)
    if tiling.strategy == "columns":
        return column_budget(spec, arch, tiling)
    shape = geometry(spec, arch, tiling)
    mbarriers = _mbarriers(tiling, shape)
    buffers = _buffers(spec, arch, tiling, shape, mbarriers[1] + TMEM_SLOT_BYTES)
    regions = _regions(tiling, shape)
    roles = (softmax_role(tiling.tile_n // shape.ctas, arch), *issuer_roles())
    barriers = named_barriers if shape.ctas == 1 else _pair_barriers
    budget = assembled(arch, mbarriers, buffers, regions, roles, barriers)
    halves = _too_narrow(spec, shape)
    return replace(budget, overflows=(*halves, *_overflows(budget, arch, tiling, shape), *register_overflow(budget)))


def _mbarriers(tiling: Tiling, shape: Geometry) -> tuple[tuple[Mbarrier, ...], int]:
    """The barrier block from offset 0 on. In a pair, the even CTA's MMA warp waits for what both CTAs did, and its
    commits arrive in both.
    """
    warps = SOFTMAX_WARPS * shape.ctas
    both = ", in both CTAs" if shape.ctas > 1 else ""
    of_both = " of both CTAs" if shape.ctas > 1 else ""
    landed, read = "a chunk of K or V", "QK or PV has read the chunk"
    if shape.kept:
        landed, read = "a chunk of K", "QK has read the chunk, and PV one that V has"
    families = (
        ("q_full", 1, shape.ctas, f"TMA: Q{of_both} has landed"),
        ("ring_full", tiling.kv_stages, shape.ctas, f"TMA: {landed}{of_both} has landed"),
        ("ring_empty", tiling.kv_stages, 1, f"commit{both}: {read}"),
        ("s_full", 1, 1, f"commit{both}: QK has written S"),
        ("s_empty", 1, warps, f"softmax{of_both}, one lane a warp: S is in registers"),
        ("p_full", 1, warps, f"softmax{of_both}, one lane a warp: P is written and O is rescaled"),
        ("o_full", 1, 1, f"commit{both}: PV has written O and read P"),
    )
    return place_mbarriers(families)


def _buffers(
    spec: KernelSpec, arch: Arch, tiling: Tiling, shape: Geometry, barrier_bytes: int
) -> tuple[tuple[Buffer, ...], int]:
    rows, n, lanes, o_bytes = tiling.tile_m, tiling.tile_n, arch.tmem_lanes, output_bytes(spec)
    ring = f"{shape.k_rows} x {tiling.k_chunk} of K or {tiling.v_keys} x {shape.v_columns} of V a buffer"
    if spec.kv_shared:
        ring += ", V loaded a second time, from K"
    if shape.kept:
        saved = n * shape.o_columns * ELEMENT_BYTES
        held = "all of them V's" if shape.kept == shape.k_chunks else f"{shape.kept} of a tile's {shape.k_chunks} V's"
        ring = f"{n} x {tiling.k_chunk} of K a buffer, {held} too, which saves {saved} bytes a tile"
    q_columns = shape.k_chunks * tiling.k_chunk
    wanted = [
        ("barriers", barrier_bytes, 1, None, "mbarriers and the slot of the TMEM base address"),
        ("sQ", rows * q_columns * ELEMENT_BYTES, 1, None, f"{rows} x {q_columns}, {shape.k_chunks} chunks"),
        ("ring", tiling.kv_stages * shape.buffer_bytes, tiling.kv_stages, None, ring),
    ]
    if tiling.p_staging == "smem":
        wanted.append(("sP", rows * n * ELEMENT_BYTES, 1, None, f"{rows} x {n}"))
    if shape.ctas > 1:
        wanted.append(("peaks", 2 * lanes * ACCUMULATOR_BYTES, 1, None, "row maxima of the two halves, two tiles"))
    steps = shape.o_columns // tiling.o_chunk
    staging = f"{lanes} x {tiling.o_chunk} of {o_bytes} bytes, in {steps} step{'s' if steps > 1 else ''}"
    if tiling.o_over_q:
        staging += ", over sQ once the last QK is done"
    wanted.append(("sO", lanes * tiling.o_chunk * o_bytes, 1, "sQ" if tiling.o_over_q else None, staging))
    return place_buffers(wanted)


def _regions(tiling: Tiling, shape: Geometry) -> tuple[tuple[Region, ...], int]:
    n, half = tiling.tile_n, ", half of its columns in each 64 lanes" if shape.ctas > 1 else ""
    rows = tiling.tile_m
    wanted = [("S", n // shape.ctas, f"{rows} x {n} float32{half}")]
    if tiling.p_staging == "tmem":
        wanted.append(("P", n // 2, f"{rows} x {n} of 16 bits, two a column"))
    wanted.append(("O", shape.o_columns, f"{rows} x {shape.o_width} float32{half}"))
    return place_regions(wanted)


def _pair_barriers(threads: int) -> tuple[NamedBarrier, ...]:
    why = "the two warps that share rows have written their maxima, or sums"
    return (
        NamedBarrier(0, "cta", threads, "mbarriers initialized, TMEM base published"),
        *(NamedBarrier(1 + i, f"rows {32 * i}", 64, f"warps {i} and {i + 2}: {why}") for i in (0, 1)),
    )


def _too_narrow(spec: KernelSpec, shape: Geometry) -> Iterator[Overflow]:
    """A CTA of the pair would have no column of O."""
    if spec.v_dim <= shape.v_columns * (shape.ctas - 1):
        least = shape.v_columns * shape.ctas
        reason = "a pair halves O's columns"
        yield Overflow("head_dim_v", "columns", least, spec.v_dim, reason, "one CTA (strategy = chunks or passes)")


def _overflows(budget: Budget, arch: Arch, tiling: Tiling, shape: Geometry) -> Iterator[Overflow]:
    options = ["fewer kv_stage buffers"] if tiling.kv_stages > max(2, shape.fewest_buffers) else ["a smaller tile_n"]
    options += [] if tiling.strategy == "pair" else ["a CTA pair (strategy = pair)"]
    options += ["P in TMEM"] if tiling.p_staging == "smem" and tiling.strategy != "pair" else []
    options += [] if tiling.o_over_q else ["sO over sQ"]
    yield from smem_overflows(budget, " or ".join(options))
    if tiling.kv_stages < shape.fewest_buffers:
        before = f"PV of the one before has read its {shape.kept} of them"
        reason = f"QK of a tile, {shape.k_chunks} buffers, is issued before {before}"
        remedy = f"at least {shape.fewest_buffers} buffers"
        yield Overflow("kv_stage", "buffers", shape.fewest_buffers, tiling.kv_stages, reason, remedy)
    if budget.tmem_used > budget.tmem_limit:
        rows_columns = (tiling.tile_m, shape.o_width)
        yield accumulator_overflow(budget, arch, rows_columns, shape.o_columns, WIDE_REMEDY)


# --- candidates -------------------------------------------------------------------------------------------------------

K_CHUNKS = (64, 128)  # columns: one 128-byte swizzle span, or two
SHARED_GROUPS_MAX = 8  # of a pass's columns of V, where K's chunks are V's too
RING_MIN = 2  # buffers: the next chunk is loaded while this one is multiplied
PASSES = 2


def chunked_tilings(
    spec: KernelSpec, arch: Arch, strategy: str, tile_ns: tuple[int, ...], stagings: tuple[str, ...], depth_max: int
) -> Iterator[Tiling]:
    """Candidates of a strategy of the specification's vocabulary: "chunks", "passes" or "pair". The ring is as deep as
    shared memory and depth_max allow unless the specification says how deep.
    """
    rows = arch.mma_m // 2 if strategy == "pair" else arch.mma_m
    kind, passes = ("pair", 1) if strategy == "pair" else ("chunks", PASSES if strategy == "passes" else 1)
    one_ring = spec.kv_shared and kind == "chunks"
    shared = list(shared_chunks(spec, arch, passes, depth_max)) if one_ring else None
    for tile_n in tile_ns:
        for staging in stagings:
            for k_chunk, v_keys in _buffer_sizes(shared, tile_n):
                plain = Tiling(rows, tile_n, RING_MIN, staging, True, 0, kind, passes, k_chunk, v_keys)
                chunk = _o_chunk(spec, arch, plain)
                depth = spec.kv_stage if spec.kv_stage != "auto" else _depth(spec, arch, plain, chunk, depth_max)
                yield replace(plain, kv_stages=depth, o_chunk=chunk)


def shared_chunks(spec: KernelSpec, arch: Arch, passes: int, depth_max: int) -> Iterator[int]:
    """Columns of K in a buffer where K's chunks are V's too: whole swizzle spans, or V's columns in even parts. Each
    pass has chunks of its own, and the ring need not be deeper than depth_max.
    """
    widest, a_pass = arch.mma_n_max, -(-spec.v_dim // passes)
    even = (-(-a_pass // (groups * HEAD_DIM_STEP)) * HEAD_DIM_STEP for groups in range(1, SHARED_GROUPS_MAX + 1))
    for width in sorted({*range(K_CHUNKS[0], widest + 1, K_CHUNKS[0]), *even}):
        kept, chunks = -(-a_pass // width), -(-spec.head_dim // width)
        own = (passes - 1) * kept * width < spec.v_dim and passes * kept <= chunks
        if width <= widest and own and fewest_buffers(chunks - kept, kept) <= depth_max:
            yield width


def _buffer_sizes(shared: list[int] | None, tile_n: int) -> Iterator[tuple[int, int]]:
    """(columns of K, keys of V) in a buffer; no keys where K's chunks, of these widths, are V's too."""
    if shared is not None:
        yield from ((k_chunk, 0) for k_chunk in shared)
        return
    whole = [n for n in range(HEAD_DIM_STEP, tile_n + 1, HEAD_DIM_STEP) if tile_n % n == 0]
    yield from ((k_chunk, v_keys) for k_chunk in K_CHUNKS for v_keys in whole)


def _o_chunk(spec: KernelSpec, arch: Arch, tiling: Tiling) -> int:
    """The widest part of O that can be staged over sQ: in a pair, of one group's half of the columns."""
    shape = geometry(spec, arch, tiling)
    span = shape.v_columns if shape.ctas > 1 else shape.o_columns
    q_bytes = tiling.tile_m * shape.k_chunks * tiling.k_chunk * ELEMENT_BYTES
    fitting = q_bytes // (arch.tmem_lanes * output_bytes(spec))
    return max(c for c in range(HEAD_DIM_STEP, span + 1, HEAD_DIM_STEP) if span % c == 0 and c <= max(fitting, 16))


def _depth(spec: KernelSpec, arch: Arch, tiling: Tiling, o_chunk: int, depth_max: int) -> int:
    """Ring buffers that fit beside the rest, or the fewest that there can be."""
    fewest = max(RING_MIN, geometry(spec, arch, tiling).fewest_buffers)
    budget = budget_of(spec, arch, replace(tiling, kv_stages=fewest, o_chunk=o_chunk))
    buffer = budget.buffer("ring").stage_bytes
    return max(fewest, min(depth_max, fewest + (budget.smem_limit - budget.smem_total) // buffer))
