"""What a CTA needs as one of two that multiply as one (cta_group::2), each with a query tile of its own.

Pure arithmetic, as in budget.py. One tcgen05.mma multiplies 256 rows of Q, 128 of each CTA, and each CTA keeps its rows
of the product (layout A, PTX ISA 9.1 section 9.7.16.10.5); of K it holds half the keys, of V half the columns. So the
pair reads K and V from L2 once, a CTA has shared memory for head_dim 256, and S of two KV tiles fits beside O: the
tensor core multiplies for one while the softmax warps turn the other into P. The kernel is persistent: O leaves while
the next query tile has begun, so sO lies over nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
    output_bytes,
    place_buffers,
    place_mbarriers,
    register_overflow,
    smem_overflows,
)
from .lifetime import check_overlaps
from .spec import HEAD_DIM_STEP, KernelSpec
from .two_tiles import POLYNOMIAL_PAIRS

CTAS = 2
P_COLUMNS_MAX = 16  # that one tcgen05.st takes: their 32 columns of S are free then
SCORE_TILES = 2  # S and P of KV tile n in one, of n + 1 in the other
# Of 384 threads' 168 each at entry, all: no warp needs as much, and ptxas spills in none.
SOFTMAX_REGISTERS = 240  # a row of S (128), part of P, and what the exponentials need
CORRECTION_REGISTERS = 152  # 32 columns of O, a factor and addresses
ISSUER_REGISTERS = 112  # descriptors, coordinates, loop state


def v_width(spec: KernelSpec) -> int:
    """Columns of O that one tcgen05.mma of the pair writes: a multiple of 32, the last ones past head_dim_v."""
    step = HEAD_DIM_STEP * CTAS
    return -(-spec.v_dim // step) * step


def polynomial_pairs(spec: KernelSpec, arch: Arch) -> tuple[int, ...]:
    """Of each PAIR_PERIOD neighbouring pairs of columns, those whose exponentials the FMA units compute. Few where the
    special-function unit takes at most half of the tensor core's time, as at head_dim 256: only the first and the last
    KV tile's exponentials are waited for there.
    """
    special = 1 / arch.rates.mufu_ops
    tensor = 2 * (spec.head_dim + spec.v_dim) / arch.rates.tensor_flop
    return POLYNOMIAL_PAIRS[1::2] if 2 * special <= tensor else POLYNOMIAL_PAIRS


def two_cta_budget(spec: KernelSpec, arch: Arch, tiling: Tiling) -> Budget:
    """The Budget of a candidate. Never raises for what does not fit: see Budget.overflows."""
    roles = _roles(arch)
    mbarriers = _mbarriers(tiling, arch)
    buffers = _buffers(spec, tiling, mbarriers[1] + TMEM_SLOT_BYTES)
    regions = _regions(spec, tiling)
    budget = assembled(arch, mbarriers, buffers, regions, roles, handed_out=True)
    return replace(budget, overflows=(*_overflows(budget, tiling), *register_overflow(budget)))


def _roles(arch: Arch) -> tuple[Role, ...]:
    group = arch.group_warps
    issuer = "setmaxnreg: descriptors, coordinates, loop state"
    row = "setmaxnreg: a row of S, part of P, what the exponentials need"
    return (
        Role("softmax", 0, group, SOFTMAX_REGISTERS, row),
        Role("correction", group, group, CORRECTION_REGISTERS, "setmaxnreg: part of a row of O, its factor"),
        Role("mma", 2 * group, 1, ISSUER_REGISTERS, issuer),
        Role("tma", 2 * group + 1, 1, ISSUER_REGISTERS, issuer),
        Role("idle", 2 * group + 2, group - 2, ISSUER_REGISTERS, "setmaxnreg counts whole warpgroups"),
    )


def _mbarriers(tiling: Tiling, arch: Arch) -> tuple[tuple[Mbarrier, ...], int]:
    """The even CTA's MMA warp waits for what both CTAs did, and its commits arrive in both."""
    stages, scores, warps = tiling.kv_stages, SCORE_TILES, arch.group_warps
    families = (
        ("q_full", 1, CTAS, "TMA: Q of both CTAs has landed"),
        ("q_empty", 1, 1, "commit, in both CTAs: the last QK has read Q"),
        ("k_full", stages, CTAS, "TMA: a K tile, half of it in each CTA, has landed"),
        ("k_empty", stages, 1, "commit, in both CTAs: QK has read its K tile"),
        ("v_full", stages, CTAS, "TMA: a V tile, half of it in each CTA, has landed"),
        ("v_empty", stages, 1, "commit, in both CTAs: PV has read its V tile"),
        ("s_full", scores, 1, "commit, in both CTAs: QK has written S"),
        ("p_full", scores, 2 * CTAS * warps, "softmax and correction of both CTAs, one lane a warp: P and O are ready"),
        ("factor_full", scores, warps, "softmax, one lane a warp: the factors of O are in shared memory"),
        ("o_full", scores, 1, "commit, in both CTAs: PV has written O and read P"),
        ("sum_full", 1, warps, "softmax, one lane a warp: sums and references are in shared memory"),
        ("sum_empty", 1, warps, "correction, one lane a warp: they are in registers"),
    )
    return place_mbarriers(families)


def _buffers(spec: KernelSpec, tiling: Tiling, barrier_bytes: int) -> tuple[tuple[Buffer, ...], int]:
    m, n, stages = tiling.tile_m, tiling.tile_n, tiling.kv_stages
    o_bytes, k_rows, v_columns = output_bytes(spec), n // CTAS, v_width(spec) // CTAS
    k_stage, v_stage = k_rows * spec.head_dim * ELEMENT_BYTES, n * v_columns * ELEMENT_BYTES
    steps = spec.v_dim // tiling.o_chunk
    staging = f"{m} x {tiling.o_chunk} of {o_bytes} bytes, in {steps} step{'s' if steps > 1 else ''}"
    rows = f"factors of {SCORE_TILES} KV tiles, sum and reference of {m} rows"
    return place_buffers(
        [
            ("barriers", barrier_bytes, 1, None, "mbarriers and the slot of the TMEM base address"),
            ("rows", (SCORE_TILES + 2) * m * ACCUMULATOR_BYTES, 1, None, rows),
            ("sQ", m * spec.head_dim * ELEMENT_BYTES, 1, None, f"{m} x {spec.head_dim}"),
            ("sK", stages * k_stage, stages, None, f"{k_rows} x {spec.head_dim} a stage"),
            ("sV", stages * v_stage, stages, None, f"{n} x {v_columns} a stage"),
            ("sO", m * tiling.o_chunk * o_bytes, 1, None, staging),
        ]
    )


def _regions(spec: KernelSpec, tiling: Tiling) -> tuple[tuple[Region, ...], int]:
    """S of two KV tiles, P over S, O."""
    m, n, width = tiling.tile_m, tiling.tile_n, v_width(spec)
    check_overlaps([("P", "S")], scores=SCORE_TILES)
    regions = [Region(f"S{i}", i * n, n, f"{m} x {n} float32") for i in range(SCORE_TILES)]
    over = [
        Region(f"P{i}", i * n, n // 2, f"{m} x {n} of 16 bits, two a column, over S{i} once that is read")
        for i in range(SCORE_TILES)
    ]
    output = Region("O", SCORE_TILES * n, width, f"{m} x {width} float32")
    return (*regions, *over, output), output.end


def _overflows(budget: Budget, tiling: Tiling) -> Iterator[Overflow]:
    options = ["a lower kv_stage"] if tiling.kv_stages > 1 else ["a smaller tile_n"]
    yield from smem_overflows(budget, " or ".join([*options, "one CTA (strategy = tiles)"]))
    if budget.tmem_used > budget.tmem_limit:
        reason = " + ".join(f"{name} {budget.region(name).columns}" for name in ("S0", "S1", "O"))
        yield Overflow("tmem", "columns", budget.tmem_used, budget.tmem_limit, reason, "a smaller tile_n")
