"""What one CTA needs of an SM, by name and by byte: pure arithmetic over a Tiling.

The same Budget is printed for the user, asserted by the planner, spelled into the template and compared with the
compiled kernel. Shared memory is laid out in the order of `Budget.buffers`, each buffer at its own `offset`, and the
kernel is launched with exactly `smem_total` bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .arch import Arch
from .lifetime import check_overlaps
from .spec import HEAD_DIM_STEP, KernelSpec

ELEMENT_BYTES = 2  # bf16 and fp16
ACCUMULATOR_BYTES = 4  # float32
MBARRIER_BYTES = 8
TMEM_SLOT_BYTES = 4  # tcgen05.alloc writes the base address here
TILE_ALIGNMENT = 1024  # where a 128-byte swizzle pattern repeats; 64 and 32 bytes repeat sooner
SWIZZLE_SPANS = (128, 64, 32)

SOFTMAX_WARPS, MMA_WARPS, TMA_WARPS = 4, 1, 1
SOFTMAX_OVERHEAD_REGISTERS = 48  # estimate: addresses, loop state, row maximum, sum and scale
WIDE_REMEDY = (
    "a CTA pair (cta_group::2) with M = 64 rows a CTA (strategy = pair), or O's columns in two passes "
    "(strategy = passes)"
)
ISSUER_REGISTERS = 40  # estimate: an MMA or TMA warp holds descriptors, coordinates and loop state


@dataclass(frozen=True)
class Tiling:
    """The numbers that a planner chooses. p_staging: "tmem" or "smem"; o_over_q: sO lies over sQ.

    strategy: "tiles": K and V in rings of their own, a tile a stage. "two_tiles": so too, and two query tiles a CTA, of
    tile_m rows each. "two_ctas": so too, by two CTAs, with tile_m rows of the query tile and half of K and V each.
    "chunks": both in chunks through one ring, whose buffers kv_stages counts; passes: into how many passes it splits
    O's columns. "pair": as chunks, by a CTA pair.
    "warpgroups": consumer warpgroups of 64 of the tile_m rows each; turns: they issue their MMAs one after another;
    lazy: O is rescaled only where a row's maximum has moved much; beside_pv: the softmax of a consumer runs beside its
    product of the KV tile before with V, not after it. "columns": one warpgroup of 64 rows for S, two more with half of
    O's columns each; tile_m counts the rows of a cluster.
    """

    tile_m: int
    tile_n: int
    kv_stages: int
    p_staging: str
    o_over_q: bool
    o_chunk: int  # columns of O staged in shared memory at a time; 0: none, O goes from registers to global memory
    strategy: str = "tiles"
    passes: int = 1
    k_chunk: int = 0  # columns of K in a buffer of the ring
    v_keys: int = 0  # keys of V in a buffer of the ring; 0: V has none of its own
    turns: bool = False
    lazy: bool = False
    beside_pv: bool = True

    def __str__(self) -> str:
        staged = f"{'sO over sQ' if self.o_over_q else 'own sO'} by {self.o_chunk} columns" if self.o_chunk else "no sO"
        how = {
            "tiles": "",
            "two_tiles": "two query tiles, ",
            "two_ctas": "two CTAs, ",
            "chunks": "K and V in chunks, ",
            "pair": "CTA pair, ",
            "columns": f"O's columns over two warpgroups, {'cluster of two CTAs, ' if self.tile_m > 64 else ''}",
            "warpgroups": f"{self.tile_m // 64} consumer warpgroup{'s' if self.tile_m > 64 else ''}, ",
        }[self.strategy]
        how += "in turns, " if self.turns else ""
        how += "rescaled lazily, " if self.lazy else ""
        how += "" if self.beside_pv else "softmax after PV, "
        if self.passes > 1:
            how += f"O in {self.passes} passes, "
        if self.k_chunk:
            how += f"{self.k_chunk} columns of K {f'or {self.v_keys} keys of V' if self.v_keys else 'and V'} a buffer, "
        return (
            f"{how}tile {self.tile_m}x{self.tile_n}, kv_stage {self.kv_stages}, P in {self.p_staging.upper()}, {staged}"
        )


@dataclass(frozen=True)
class Buffer:
    """One shared-memory buffer. bytes counts all stages; alias_of names the buffer whose bytes it reuses."""

    name: str
    bytes: int
    alignment: int
    stages: int
    offset: int
    alias_of: str | None
    reason: str

    @property
    def stage_bytes(self) -> int:
        return self.bytes // self.stages


@dataclass(frozen=True)
class Region:
    """One range of TMEM columns (32 bits x 128 lanes each)."""

    name: str
    column: int
    columns: int
    reason: str

    @property
    def end(self) -> int:
        """One past the last column."""
        return self.column + self.columns


@dataclass(frozen=True)
class Mbarrier:
    """One family of mbarriers. offset: bytes from the start of shared memory; arrivals: expected count a phase."""

    name: str
    stages: int
    arrivals: int
    offset: int
    reason: str

    @property
    def slot(self) -> int:
        """Index of the first stage in the barrier block."""
        return self.offset // MBARRIER_BYTES


@dataclass(frozen=True)
class Role:
    """A group of warps. registers: of a thread, an estimate or what setmaxnreg hands out (see Budget.handed_out)."""

    name: str
    first_warp: int
    warps: int
    registers: int
    reason: str


@dataclass(frozen=True)
class NamedBarrier:
    id: int
    name: str
    threads: int
    reason: str


@dataclass(frozen=True)
class Overflow:
    """A resource that does not suffice. need, limit and over are in unit; remedy says what to change."""

    resource: str  # "smem", "tmem", "registers", "threads", "named barriers"
    unit: str
    need: int
    limit: int
    reason: str
    remedy: str

    @property
    def over(self) -> int:
        return self.need - self.limit

    def __str__(self) -> str:
        return f"{self.resource}: {self.reason} = {self.need} {self.unit} of {self.limit}, over by {self.over}"


@dataclass(frozen=True)
class Budget:
    """Everything one CTA needs, and whether the architecture has it."""

    buffers: tuple[Buffer, ...]
    smem_total: int
    smem_limit: int
    regions: tuple[Region, ...]
    tmem_used: int
    tmem_columns: int  # allocated: a power of two
    tmem_limit: int
    mbarriers: tuple[Mbarrier, ...]
    tmem_slot_offset: int
    named_barriers: tuple[NamedBarrier, ...]
    roles: tuple[Role, ...]
    threads: int
    registers_limit: int  # a thread
    registers_total: int  # an SM's, for this CTA
    registers_pool: int  # of which the CTA can have so many
    handed_out: bool  # by setmaxnreg, each role its own; else a role's are an estimate
    overflows: tuple[Overflow, ...]

    @property
    def fits(self) -> bool:
        return not self.overflows

    def buffer(self, name: str) -> Buffer:
        """The buffer of that name; KeyError when this plan has none (sP with P in TMEM)."""
        return _named(self.buffers, name)

    def region(self, name: str) -> Region:
        """The TMEM region of that name; KeyError when this plan has none (P with P in SMEM)."""
        return _named(self.regions, name)

    def mbarrier(self, name: str) -> Mbarrier:
        return _named(self.mbarriers, name)

    def role(self, name: str) -> Role:
        return _named(self.roles, name)

    def columns_of(self, letter: str) -> int:
        """Columns of S, P or O, of every query tile."""
        return sum(region.columns for region in self.regions if region.name[0] == letter)

    def bytes_of(self, name: str) -> int:
        """Bytes that a buffer adds to the total: 0 for one that is absent or lies over another."""
        return sum(item.bytes for item in self.buffers if item.name == name and item.alias_of is None)


def _named(items: Iterable[Any], name: str) -> Any:
    for item in items:
        if item.name == name:
            return item
    raise KeyError(name)


def swizzle_bytes(row_bytes: int) -> int:
    """Largest swizzle span that divides a tile's row. Every multiple of 16 16-bit elements has at least 32."""
    for span in SWIZZLE_SPANS:
        if row_bytes % span == 0:
            return span
    raise ValueError(f"a row of {row_bytes} bytes is not a multiple of {SWIZZLE_SPANS[-1]}")


def output_bytes(spec: KernelSpec) -> int:
    """Bytes of one element of O as stored: float32 when unnormalized."""
    return ACCUMULATOR_BYTES if spec.unnormalized else ELEMENT_BYTES


def compute_budget(spec: KernelSpec, arch: Arch, tiling: Tiling) -> Budget:
    """The Budget of one candidate. Never raises for what does not fit: see Budget.overflows."""
    mbarriers = _mbarriers(spec, tiling)
    buffers = _buffers(spec, tiling, mbarriers[1] + TMEM_SLOT_BYTES)
    regions = _regions(spec, tiling)
    roles = (softmax_role(tiling.tile_n, arch), *issuer_roles())
    budget = assembled(arch, mbarriers, buffers, regions, roles)
    return replace(budget, overflows=tuple(_overflows(budget, arch, spec, tiling)))


Placed = tuple[tuple[Any, ...], int]  # things, and where the last one ends


def assembled(
    arch: Arch,
    mbarriers: Placed,
    buffers: Placed,
    regions: Placed,
    roles: tuple[Role, ...],
    barriers: Callable[[int], tuple[NamedBarrier, ...]] | None = None,
    handed_out: bool = False,
) -> Budget:
    """The Budget of what place_mbarriers, place_buffers and place_regions gave; what overflows is the caller's to add.

    barriers: the hardware's, from the number of threads. handed_out: setmaxnreg gives every role its registers, of
    those that all threads have at entry; else every thread has as many as the one that needs the most.
    """
    threads = arch.warp_size * sum(role.warps for role in roles)
    step = arch.register_granule
    if handed_out:
        total = arch.warp_size * sum(role.warps * role.registers for role in roles)
        pool = arch.registers_per_sm // threads // step * step * threads
    else:
        total = -(-max(role.registers for role in roles) // step) * step * threads
        pool = arch.registers_per_sm
    return Budget(
        buffers=buffers[0],
        smem_total=buffers[1],
        smem_limit=arch.smem_per_cta,
        regions=regions[0],
        tmem_used=regions[1],
        tmem_columns=allocated_columns(regions[1], arch),
        tmem_limit=arch.tmem_columns,
        mbarriers=mbarriers[0],
        tmem_slot_offset=mbarriers[1],
        named_barriers=(barriers or named_barriers)(threads),
        roles=roles,
        threads=threads,
        registers_limit=arch.registers_per_thread,
        registers_total=total,
        registers_pool=pool,
        handed_out=handed_out,
        overflows=(),
    )


def _mbarriers(spec: KernelSpec, tiling: Tiling) -> tuple[tuple[Mbarrier, ...], int]:
    """The barrier block from offset 0 on: 8 bytes an mbarrier, then the slot for the TMEM base address."""
    stages, warps = tiling.kv_stages, SOFTMAX_WARPS
    rings = [
        ("k_full", stages, 1, "TMA: a K tile has landed"),
        ("k_empty", stages, 1, "commit: QK has read its K tile"),
        ("v_full", stages, 1, "TMA: a V tile has landed"),
        ("v_empty", stages, 1, "commit: PV has read its V tile"),
    ]
    if spec.kv_shared:
        rings = [rings[0], ("k_empty", stages, 1, "commit: PV, and QK before it, have read the K tile")]
    families = (
        ("q_full", 1, 1, "TMA: Q has landed"),
        *rings,
        ("s_full", 1, 1, "commit: QK has written S"),
        ("s_empty", 1, warps, "softmax, one lane a warp: S is in registers"),
        ("p_full", 1, warps, "softmax, one lane a warp: P is written and O is rescaled"),
        ("o_full", 1, 1, "commit: PV has written O and read P"),
    )
    return place_mbarriers(families)


def place_mbarriers(wanted: Iterable[tuple[str, int, int, str]]) -> tuple[tuple[Mbarrier, ...], int]:
    """(name, count, arrivals, reason) -> Mbarriers in order of address from offset 0 on, and their end in bytes."""
    placed, offset = [], 0
    for name, count, arrivals, reason in wanted:
        placed.append(Mbarrier(name, count, arrivals, offset, reason))
        offset += MBARRIER_BYTES * count
    return tuple(placed), offset


def _buffers(spec: KernelSpec, tiling: Tiling, barrier_bytes: int) -> tuple[tuple[Buffer, ...], int]:
    """Shared memory in order of address. The total is a multiple of 1024, as a struct of aligned tiles is."""
    m, n = tiling.tile_m, tiling.tile_n
    o_bytes = output_bytes(spec)
    wanted = [
        ("barriers", barrier_bytes, 1, None, "mbarriers and the slot of the TMEM base address"),
        ("sQ", m * spec.head_dim * ELEMENT_BYTES, 1, None, f"{m} x {spec.head_dim}"),
        *kv_buffers(spec, tiling),
    ]
    if tiling.p_staging == "smem":
        wanted.append(("sP", m * n * ELEMENT_BYTES, 1, None, f"{m} x {n}"))
    steps = spec.v_dim // tiling.o_chunk
    staging = f"{m} x {tiling.o_chunk} of {o_bytes} bytes, in {steps} step{'s' if steps > 1 else ''}"
    if tiling.o_over_q:
        staging += ", over sQ once the last QK is done"
    wanted.append(("sO", m * tiling.o_chunk * o_bytes, 1, "sQ" if tiling.o_over_q else None, staging))
    return place_buffers(wanted)


def kv_buffers(spec: KernelSpec, tiling: Tiling) -> list[tuple[str, int, int, str | None, str]]:
    """The rings of K and V with whole tiles, as place_buffers takes them: one where V is a part of K."""
    n, stages = tiling.tile_n, tiling.kv_stages
    k_bytes, v_bytes = (stages * n * columns * ELEMENT_BYTES for columns in (spec.head_dim, spec.v_dim))
    why = f"{n} x {spec.head_dim} a stage"
    if spec.kv_shared:
        why += f", V its first {spec.v_dim} columns, which saves {v_bytes}"
        return [("sK", k_bytes, stages, None, why)]
    return [("sK", k_bytes, stages, None, why), ("sV", v_bytes, stages, None, f"{n} x {spec.v_dim} a stage")]


def place_buffers(wanted: Iterable[tuple[str, int, int, str | None, str]]) -> tuple[tuple[Buffer, ...], int]:
    """(name, bytes, stages, name of the buffer to lie over, reason) -> Buffers in order of address, and their end.

    Raises Overlap for a buffer that would lie over one that is alive at the same time.
    """
    placed: dict[str, Buffer] = {}
    end = 0
    for name, size, count, alias, reason in wanted:
        if alias is not None:
            check_overlaps([(name, alias)])
        offset = placed[alias].offset if alias else _round_up(end)
        placed[name] = Buffer(name, size, TILE_ALIGNMENT, count, offset, alias, reason)
        if alias is None:
            end = offset + size
    return tuple(placed.values()), _round_up(end)


def _round_up(offset: int) -> int:
    return -(-offset // TILE_ALIGNMENT) * TILE_ALIGNMENT


def _regions(spec: KernelSpec, tiling: Tiling) -> tuple[tuple[Region, ...], int]:
    """S, P, O side by side: S of the next tile is written while PV still reads P, so they never overlap."""
    m, n = tiling.tile_m, tiling.tile_n
    wanted = [("S", n, f"{m} x {n} float32")]
    if tiling.p_staging == "tmem":
        wanted.append(("P", n // 2, f"{m} x {n} of 16 bits, two a column"))
    wanted.append(("O", spec.v_dim, f"{m} x {spec.v_dim} float32"))
    return place_regions(wanted)


def place_regions(wanted: Iterable[tuple[str, int, str]]) -> tuple[tuple[Region, ...], int]:
    """(name, columns, reason) -> TMEM Regions side by side from column 0 on, and the columns they take."""
    placed, column = [], 0
    for name, columns, reason in wanted:
        placed.append(Region(name, column, columns, reason))
        column += columns
    return tuple(placed), column


def allocated_columns(used: int, arch: Arch) -> int:
    """What tcgen05.alloc must be asked for: a power of two; 0 where there is no tensor memory."""
    if not arch.tmem_columns:
        return 0
    return max(arch.tmem_alloc_min, 1 << (used - 1).bit_length())


def softmax_role(columns: int, arch: Arch) -> Role:
    """Warps 0-3: warp w of a warpgroup reaches TMEM lanes 32w to 32w+31 only. columns: of S in a thread's registers."""
    row = columns + columns // 2 + SOFTMAX_OVERHEAD_REGISTERS
    why = f"estimate: a row of S ({columns}) and P ({columns // 2}), {SOFTMAX_OVERHEAD_REGISTERS} else"
    return Role("softmax", 0, SOFTMAX_WARPS, min(row, arch.registers_per_thread), why)


def issuer_roles() -> tuple[Role, Role]:
    """The warps of which one thread issues: MMA and TMA."""
    issuer = "estimate: descriptors, coordinates, loop state"
    return (
        Role("mma", SOFTMAX_WARPS, MMA_WARPS, ISSUER_REGISTERS, issuer),
        Role("tma", SOFTMAX_WARPS + MMA_WARPS, TMA_WARPS, ISSUER_REGISTERS, issuer),
    )


def named_barriers(threads: int) -> tuple[NamedBarrier, ...]:
    return (NamedBarrier(0, "cta", threads, "mbarriers initialized, TMEM base published; before TMEM is freed"),)


def _overflows(budget: Budget, arch: Arch, spec: KernelSpec, tiling: Tiling) -> Iterator[Overflow]:
    yield from smem_overflows(budget, _smem_remedy(spec, tiling))
    yield from shared_ring_overflow(spec, tiling)
    if budget.tmem_columns > budget.tmem_limit:
        yield _tmem_overflow(budget, arch, spec, tiling)
    yield from register_overflow(budget)


def shared_ring_overflow(spec: KernelSpec, tiling: Tiling) -> Iterator[Overflow]:
    """One stage where V is a part of K: it is free after PV only, and QK of the next tile comes before."""
    if spec.kv_shared and tiling.kv_stages < 2:
        reason = "QK of the next tile is issued before PV of this one, which reads the same stage"
        yield Overflow("kv_stage", "stages", 2, tiling.kv_stages, reason, "at least two kv stages")


def smem_overflows(budget: Budget, remedy: str) -> Iterator[Overflow]:
    """Shared memory past its limit, and a buffer larger than the one it lies over."""
    if budget.smem_total > budget.smem_limit:
        parts = [b for b in budget.buffers if b.alias_of is None]
        reason = " + ".join(f"{b.name} {b.bytes}" for b in parts) + f", aligned to {TILE_ALIGNMENT},"
        yield Overflow("smem", "bytes", budget.smem_total, budget.smem_limit, reason, remedy)
    over = next((b for b in budget.buffers if b.alias_of is not None), None)
    if over is not None and over.bytes > budget.buffer(over.alias_of).bytes:
        limit = budget.buffer(over.alias_of).bytes
        reason = f"{over.name} cannot lie over {over.alias_of}: {over.name}"
        yield Overflow("smem", "bytes", over.bytes, limit, reason, "sO of its own, or fewer columns of O at a time")


def register_overflow(budget: Budget) -> Iterator[Overflow]:
    """More registers than a CTA can have; with setmaxnreg, than its threads have at entry."""
    total, pool = budget.registers_total, budget.registers_pool
    if total > pool:
        yield Overflow("registers", "registers", total, pool, f"{budget.threads} threads", "a smaller tile_n")


def _smem_remedy(spec: KernelSpec, tiling: Tiling) -> str:
    options = []
    if tiling.kv_stages > 1:
        options.append("a lower kv_stage")
    if tiling.tile_n > HEAD_DIM_STEP:
        options.append("a smaller tile_n")
    if tiling.p_staging == "smem":
        options.append("P in TMEM")
    if not tiling.o_over_q:
        options.append("sO over sQ")
    return " or ".join(options) or "a smaller head_dim"


def _tmem_overflow(budget: Budget, arch: Arch, spec: KernelSpec, tiling: Tiling) -> Overflow:
    remedy = "P in SMEM or a smaller tile_n" if spec.v_dim <= arch.mma_n_max else WIDE_REMEDY
    return accumulator_overflow(budget, arch, (tiling.tile_m, spec.v_dim), spec.v_dim, remedy)


def accumulator_overflow(budget: Budget, arch: Arch, shape: tuple[int, int], o_columns: int, remedy: str) -> Overflow:
    """TMEM past its limit. shape: rows and columns of O's accumulator, which takes o_columns of TMEM."""
    reason = " + ".join(f"{region.name} {region.columns}" for region in budget.regions)
    if o_columns >= arch.tmem_columns:
        rest = [region.name for region in budget.regions if region.name != "O"]
        reason = (
            f"a {shape[0]} x {shape[1]} float32 accumulator takes all {arch.tmem_columns} columns, "
            f"so {' and '.join(rest)} {'have' if len(rest) > 1 else 'has'} no room: {reason}"
        )
    return Overflow("tmem", "columns", budget.tmem_used, arch.tmem_columns, reason, remedy)
