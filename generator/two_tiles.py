"""What a CTA needs with two query tiles in flight: while the softmax warps of one turn S into P, the tensor core
multiplies for the other.

Pure arithmetic, as in budget.py. Each query tile has S and O of its own in tensor memory, P lies over S, and a
warpgroup of softmax warps; a third warpgroup rescales O of both and stores it, so that no thread holds a row of S and
one of O. Both tiles use the same K and V. Registers are handed out by warpgroup (setmaxnreg), so the budget of a thread
is a choice here and no estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .arch import Arch
from .budget import (
    ACCUMULATOR_BYTES,
    ELEMENT_BYTES,
    TMEM_SLOT_BYTES,
    Budget,
    Buffer,
    Mbarrier,
    Overflow,
    Region,
    Role,
    Tiling,
    assembled,
    kv_buffers,
    output_bytes,
    place_buffers,
    place_mbarriers,
    register_overflow,
    shared_ring_overflow,
    smem_overflows,
)
from .lifetime import check_overlaps
from .spec import KernelSpec

QUERY_TILES = 2
# P is at most 2^SKIP_LOG2 then, which 16 bits hold with the same relative error as 1, and a row's sum of 2^20 of them
# is within float32's range.
SKIP_LOG2 = 8.0
# 2^x on [0, 1) as 1 + c1 x + c2 x^2 + c3 x^3 with the least relative error, 8.8e-5 (found by Remez' exchange)
EXP2_CUBIC = (0.077119089663028717, 0.22756439447402954, 0.69514614343643188)
# Three exponentials of eight leave the special-function unit, 16 a cycle, at 5/8 of the time that the tensor core takes
# for a tile of head_dim 128; on the timeline's model more make no difference, fewer do.
PAIR_PERIOD = 16
POLYNOMIAL_PAIRS = (1, 4, 6, 9, 12, 14)


@dataclass(frozen=True)
class Registers:
    """Of 512 threads' 65536, all: by thread of a role. p_columns: of P that a softmax thread holds at a time, at most;
    o_columns, stage_columns: of O that a correction thread does when it rescales and when O leaves.
    """

    softmax: int  # a row of S, part of P, and what the exponentials need
    correction: int  # part of a row of O, a factor and addresses
    issuer: int  # descriptors, coordinates, loop state
    p_columns: int
    o_columns: int
    stage_columns: int


# ptxas begins a row's polynomials early, for they are the longest chains, and their results wait in registers while the
# special-function unit works: head_dim 64 to 128 spilled 348 to 468 bytes a thread with 192 registers for softmax and P
# in halves of a row, and does not with these, where each quarter's columns of S are free once its P is on its way.
WHOLE_ROW = Registers(softmax=216, correction=48, issuer=32, p_columns=16, o_columns=8, stage_columns=16)
HALF_ROW = Registers(softmax=168, correction=104, issuer=72, p_columns=32, o_columns=32, stage_columns=32)
HALF_ROW_COLUMNS = 64  # of S, at most


def registers_of(tiling: Tiling) -> Registers:
    """How the CTA's registers are handed out."""
    return HALF_ROW if tiling.tile_n <= HALF_ROW_COLUMNS else WHOLE_ROW


def two_tile_budget(spec: KernelSpec, arch: Arch, tiling: Tiling) -> Budget:
    """The Budget of a candidate. Never raises for what does not fit: see Budget.overflows."""
    mbarriers = _mbarriers(spec, tiling, arch)
    buffers = _buffers(spec, tiling, mbarriers[1] + TMEM_SLOT_BYTES)
    regions = _regions(spec, tiling)
    roles = _roles(arch, registers_of(tiling))
    budget = assembled(arch, mbarriers, buffers, regions, roles, handed_out=True)
    return replace(budget, overflows=(*_overflows(budget, spec, tiling), *register_overflow(budget)))


def _roles(arch: Arch, registers: Registers) -> tuple[Role, ...]:
    group = arch.group_warps
    first = QUERY_TILES * group
    issuer = "setmaxnreg: descriptors, coordinates, loop state"
    row = "setmaxnreg: a row of S, part of P, what the exponentials need"
    return (
        Role("softmax", 0, first, registers.softmax, row),
        Role("correction", first, group, registers.correction, "setmaxnreg: part of a row of O, its factor"),
        Role("mma", first + group, 1, registers.issuer, issuer),
        Role("tma", first + group + 1, 1, registers.issuer, issuer),
        Role("idle", first + group + 2, group - 2, registers.issuer, "setmaxnreg counts whole warpgroups"),
    )


def _mbarriers(spec: KernelSpec, tiling: Tiling, arch: Arch) -> tuple[tuple[Mbarrier, ...], int]:
    stages, tiles, warps = tiling.kv_stages, QUERY_TILES, arch.group_warps
    rings = [
        ("k_full", stages, 1, "TMA: a K tile has landed"),
        ("k_empty", stages, 1, "commit: QK of both query tiles has read its K tile"),
        ("v_full", stages, 1, "TMA: a V tile has landed"),
        ("v_empty", stages, 1, "commit: PV of both query tiles has read its V tile"),
    ]
    if spec.kv_shared:
        rings = [rings[0], ("k_empty", stages, 1, "commit: QK and PV of both query tiles have read the K tile")]
    families = (
        ("q_full", tiles, 1, "TMA: Q has landed"),
        ("q_empty", tiles, 1, "commit: the last QK has read Q"),
        *rings,
        ("s_full", tiles, 1, "commit: QK has written S, and PV before it has read P and written O"),
        ("p_full", tiles, 2 * warps, "softmax and correction, one lane a warp: P is written, O is rescaled"),
        ("factor_full", tiles, warps, "softmax, one lane a warp: the factors of O are in shared memory"),
        ("o_full", tiles, 1, "commit: the last PV has written O"),
        ("sum_full", tiles, warps, "softmax, one lane a warp: sums and references are in shared memory"),
        ("sum_empty", tiles, warps, "correction, one lane a warp: they are in registers"),
    )
    return place_mbarriers(families)


def _buffers(spec: KernelSpec, tiling: Tiling, barrier_bytes: int) -> tuple[tuple[Buffer, ...], int]:
    m, tiles = tiling.tile_m, QUERY_TILES
    o_bytes = output_bytes(spec)
    steps = spec.v_dim // tiling.o_chunk
    staging = f"two tiles of {m} x {tiling.o_chunk} of {o_bytes} bytes, in {steps} step{'s' if steps > 1 else ''}"
    if tiling.o_over_q:
        staging += ", over sQ once the last QK is done"
    rows_bytes = 3 * tiles * m * ACCUMULATOR_BYTES
    return place_buffers(
        [
            ("barriers", barrier_bytes, 1, None, "mbarriers and the slot of the TMEM base address"),
            ("rows", rows_bytes, 1, None, f"factor, sum and reference of {tiles} x {m} rows"),
            ("sQ", tiles * m * spec.head_dim * ELEMENT_BYTES, tiles, None, f"two tiles of {m} x {spec.head_dim}"),
            *kv_buffers(spec, tiling),
            ("sO", tiles * m * tiling.o_chunk * o_bytes, tiles, "sQ" if tiling.o_over_q else None, staging),
        ]
    )


def _regions(spec: KernelSpec, tiling: Tiling) -> tuple[tuple[Region, ...], int]:
    """S of both tiles, P over S, O of both tiles."""
    m, n = tiling.tile_m, tiling.tile_n
    check_overlaps([("P", "S")], qk_first=False)
    regions = [Region(f"S{i}", i * n, n, f"{m} x {n} float32") for i in range(QUERY_TILES)]
    over = [
        Region(f"P{i}", i * n, n // 2, f"{m} x {n} of 16 bits, two a column, over S{i} once that is read")
        for i in range(QUERY_TILES)
    ]
    first, width = QUERY_TILES * n, spec.v_dim
    outputs = [Region(f"O{i}", first + i * width, width, f"{m} x {width} float32") for i in range(QUERY_TILES)]
    return (*regions, *over, *outputs), first + QUERY_TILES * width


def _overflows(budget: Budget, spec: KernelSpec, tiling: Tiling) -> Iterator[Overflow]:
    options = ["a lower kv_stage"] if tiling.kv_stages > 1 else ["a smaller tile_n"]
    yield from smem_overflows(budget, " or ".join([*options, "one query tile (strategy = tiles)"]))
    yield from shared_ring_overflow(spec, tiling)
    if budget.tmem_used > budget.tmem_limit:
        names = ("S0", "S1", "O0", "O1")
        reason = " + ".join(f"{name} {budget.region(name).columns}" for name in names)
        remedy = "a smaller tile_n or one query tile (strategy = tiles)"
        yield Overflow("tmem", "columns", budget.tmem_used, budget.tmem_limit, reason, remedy)
