"""What a CTA needs on sm_90a beyond head_dim 256, where the accumulator of 64 query rows takes half of the register
file: one warpgroup computes the scores, two more hold half of O's columns each.

Pure arithmetic, as in budget.py. Q stays in the score warpgroup's registers, operand A of QK, as far as they suffice;
that way shared memory gives its bandwidth to K and V, which stream through rings in pieces: K in chunks of columns, V
in slices of keys, or as a part of K's chunks. P goes through shared memory, with the factor by which O is to be
rescaled. With a cluster of two CTAs, each loads half of every piece for both (multicast), which halves what L2 has to
give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .arch import Arch
from .budget import (
    ACCUMULATOR_BYTES,
    ELEMENT_BYTES,
    TILE_ALIGNMENT,
    Budget,
    Buffer,
    Mbarrier,
    NamedBarrier,
    Overflow,
    Role,
    Tiling,
    assembled,
    place_buffers,
    place_mbarriers,
    register_overflow,
    smem_overflows,
)
from .spec import HEAD_DIM_STEP, KernelSpec
from .warpgroups import narrow_window

CHUNK = 64  # columns of K or Q in a buffer: 128 bytes, the widest swizzle span
V_KEYS = (16, 32)  # keys of V in a buffer
IN_K = 0  # v_keys where V has no buffers, being a part of K's
SLICES_MIN = 2  # of V: one is multiplied while the one before is given back
V_PADDED_MAX = 4 / 3  # of a half's columns in a buffer of V: see v_buffer_width
OUTPUT_GROUPS = 2
P_STAGES = 2
# What a thread holds beside its fragments: addresses, loop state, two rows' maximum, sum and factor. With 16 and 32
# ptxas spills nothing at head_dim 512, with 8 less of either it does; an output thread has two accumulators.
SCORE_OTHERS, OUTPUT_OTHERS = 16, 32
P_REGISTERS_MIN = 12  # see score_others
PRODUCER_REGISTERS = 24
PART, PART_MAX = 128, 192  # columns of O: of the first of two wgmma where one would write more than PART_MAX
TILE_NS = (128, 96, 64)
SHARED_TILE_NS = (128, 112, 96, 80, 64)  # where V is in K's chunks
CLUSTERS = (1, 2)
Q_AHEAD = 2  # chunks of the next query tile's Q: with 0, 2 and 4 a window of 128 took 1346, 1030 and 1160 us on an H200
STEPS_FROM = 8  # buffers of K from which on two are multiplied between one signal and the next
K_TILES_AHEAD = 1.5  # of K in its ring at most; what is left goes to V
K_TILES = (2, 3)  # of K in its ring, least and most, where they are V too: QK of one goes ahead of PV of the one before
DEEP, PV_AFTER_QK_FROM = 2.75, 2.5  # KV tiles in such a ring: see is_deep and pv_waits_at


def half_width(spec: KernelSpec) -> int:
    """Columns of O that one output warpgroup holds; of the second, up to 16 may lie beyond head_dim_v."""
    return -(-spec.v_dim // (OUTPUT_GROUPS * HEAD_DIM_STEP)) * HEAD_DIM_STEP


def v_buffer_width(spec: KernelSpec) -> int:
    """Columns that a buffer of V has for an output warpgroup: its half of O's. Where that is an odd number of 16, and V
    would come in boxes of 16 columns, a few more that are not multiplied make boxes of 64. On an H200 (2026-11-29) 667
    and 530 TFLOP/s at 480, 633 and 471 at 464, 568 and 504 at 400, 597 and 483 at 336, 541 and 494 at 272; but 619 and
    632 at 448, 615 and 612 at 320, whose boxes have 32.
    """
    width = half_width(spec)
    whole = -(-width // CHUNK) * CHUNK
    return whole if width % (2 * HEAD_DIM_STEP) and whole <= V_PADDED_MAX * width else width


def o_parts(spec: KernelSpec) -> tuple[int, ...]:
    """Columns of it that one wgmma writes. ptxas refuses one whose accumulator leaves it too few of the registers that
    all threads have at entry (128, of 512 threads), whatever setmaxnreg gives later.
    """
    width = half_width(spec)
    return (width,) if width <= PART_MAX else (PART, width - PART)


def k_chunks(spec: KernelSpec) -> int:
    return -(-spec.head_dim // CHUNK)


def shares_chunks(spec: KernelSpec) -> bool:
    """Whether V is a part of K's chunks (kv_shared) and each half of its columns whole ones: then one load serves both.
    A chunk, TILE_N keys of 64 columns, is B of QK with the columns as its K, and B of PV with the keys.
    """
    return spec.kv_shared and half_width(spec) % CHUNK == 0


def part_chunks(spec: KernelSpec) -> int:
    """Chunks of K that one wgmma of PV reads where they are V too: neighbours in the ring, released together."""
    return o_parts(spec)[0] // CHUNK


def tile_parts(spec: KernelSpec) -> int:
    """Of a KV tile. First comes the first of either half of O, which PV is done with first."""
    return OUTPUT_GROUPS * len(o_parts(spec))


def rest_chunks(spec: KernelSpec) -> int:
    """Chunks of K that are no part of V where the others are: each has a buffer of its own, before the ring's."""
    return k_chunks(spec) - tile_parts(spec) * part_chunks(spec)


def ring_parts(spec: KernelSpec, tiling: Tiling) -> int:
    """Parts that K's ring holds where K's chunks are V too."""
    return (tiling.kv_stages - rest_chunks(spec)) // part_chunks(spec)


def ring_tiles(spec: KernelSpec, tiling: Tiling) -> float:
    """The same in KV tiles."""
    return ring_parts(spec, tiling) / tile_parts(spec)


def is_deep(spec: KernelSpec, tiling: Tiling) -> bool:
    """Whether a ring in which K is V too lets QK go ahead of PV. On an H200 (2026-11-29): 706, 666 and 628 TFLOP/s with
    2.75, 2.5 and 2 KV tiles in it at 576/512, 713, 680 and 616 at 512. In narrow windows one part beyond two tiles is
    enough: with a window of 1024 559 and 494 at 576/512, at 512 563 with one and 565 with two.
    """
    if narrow_window(spec) is not None:
        return ring_parts(spec, tiling) > K_TILES[0] * tile_parts(spec)
    return ring_tiles(spec, tiling) >= DEEP


def pv_waits_at(spec: KernelSpec, tiling: Tiling) -> int:
    """The part of O before which PV waits for QK of the next KV tile, where V is in K's chunks: the first, so that all
    of PV runs beside the softmax, unless K waits for what PV releases. On an H200 (2026-11-29), by the first and by the
    middle: 701 and 610 TFLOP/s with three KV tiles in the ring at 512, 680 and 616 with 2.5, 556 and 630 with two; 609
    and 637 with 2.25 at 576/512, but with a window of 1024 559 and 494.
    """
    ahead = is_deep(spec, tiling) or ring_tiles(spec, tiling) >= PV_AFTER_QK_FROM
    return 0 if ahead else len(o_parts(spec)) // 2


def looks_for_maxima(spec: KernelSpec) -> bool:
    """Of some KV tiles after a query tile's first one: of those before which a row may have seen no key."""
    return spec.window_left is not None or spec.kv_sources == 2


def k_step(tiling: Tiling) -> int:
    """Chunks of K that are multiplied between one signal and the next. Where the ring has room for as many on their way
    as are read, and one is released while the other is multiplied, two: at head_dim 512 that was 4 % faster by clusters
    on an H200 (2026-11-29), by one CTA between 1 % slower and 1 % faster. Signals in the midst of a chunk's products
    were 4 to 10 % slower, for ptxas makes groups of them.
    """
    return 2 if tiling.kv_stages >= STEPS_FROM else 1


def column_tilings(spec: KernelSpec, arch: Arch) -> list[Tiling]:
    """Every Tiling of the strategy that the specification's fields leave open. kv_stages counts chunks of K; V's ring
    takes the shared memory that is left (v_stages).
    """
    clusters = CLUSTERS if spec.tile_m == "auto" else (spec.tile_m // arch.mma_m,)
    return [
        Tiling(
            *(arch.mma_m * cluster, tile_n, depth, "smem", False, o_chunk, "columns"),
            k_chunk=CHUNK,
            v_keys=v_keys,
            lazy=looks_for_maxima(spec),
        )
        for cluster in clusters
        for tile_n, v_keys, depths in _rings(spec)
        for depth in depths
        if spec.kv_stage in ("auto", depth)
        for o_chunk in o_chunks(spec, v_keys)
    ]


def _rings(spec: KernelSpec) -> Iterator[tuple[int, int, Sequence[int]]]:
    """(tile_n, v_keys, kv_stages that K's ring may have) of every way to hold K and V."""
    if shares_chunks(spec):
        least, most = (tiles * tile_parts(spec) for tiles in K_TILES)
        depths = [rest_chunks(spec) + part_chunks(spec) * parts for parts in range(most, least - 1, -1)]
        for tile_n in SHARED_TILE_NS if spec.tile_n == "auto" else (spec.tile_n,):
            yield tile_n, IN_K, depths
    most = max(STEPS_FROM, int(K_TILES_AHEAD * k_chunks(spec)), 0 if spec.kv_stage == "auto" else spec.kv_stage)
    for tile_n in TILE_NS if spec.tile_n == "auto" else (spec.tile_n,):
        for v_keys in V_KEYS:
            if tile_n % v_keys == 0:
                yield tile_n, v_keys, range(most, 1, -1)


def o_chunks(spec: KernelSpec, v_keys: int) -> tuple[int, ...]:
    """Columns of O that an output warpgroup may stage at a time: a swizzle span, or none. Beside V there is room."""
    span = next(columns for columns in (64, 32, 16) if half_width(spec) % columns == 0)
    if spec.unnormalized:
        return (0,)
    return (span, 0) if v_keys == IN_K else (span,)


def v_stages(spec: KernelSpec, arch: Arch, tiling: Tiling) -> int:
    """Buffers of V's ring: as many as fit beside the rest, at most two KV tiles' worth."""
    if tiling.v_keys == IN_K:
        return 0
    rest = sum(size for _, size, *_ in _wanted(spec, arch, tiling, 0))
    free = arch.smem_per_cta - rest - 2 * TILE_ALIGNMENT  # barriers, and what aligning the factors takes
    return max(1, min(2 * tiling.tile_n // tiling.v_keys, free // _v_bytes(spec, tiling)))


def _v_bytes(spec: KernelSpec, tiling: Tiling) -> int:
    return tiling.v_keys * OUTPUT_GROUPS * v_buffer_width(spec) * ELEMENT_BYTES


def _wanted(spec: KernelSpec, arch: Arch, tiling: Tiling, v_count: int) -> list[tuple[str, int, int, str | None, str]]:
    rows, keys = arch.mma_m, tiling.tile_n
    apart, stages = chunks_apart(spec, arch, tiling), q_stages(spec, arch, tiling)
    why = f"{rows} x {CHUNK} a stage, on the way to registers" + (f"; the last {apart} chunks stay" if apart else "")
    of_k = f"{keys} x {CHUNK} a stage"
    if tiling.v_keys == IN_K:
        of_k += f", V too: {ring_tiles(spec, tiling):g} KV tiles"
    wanted = [
        ("rows", P_STAGES * rows * ACCUMULATOR_BYTES, P_STAGES, None, f"factors of {rows} rows"),
        ("sK", tiling.kv_stages * keys * CHUNK * ELEMENT_BYTES, tiling.kv_stages, None, of_k),
        ("sQ", stages * rows * CHUNK * ELEMENT_BYTES, stages, None, why),
        ("sP", P_STAGES * rows * keys * ELEMENT_BYTES, P_STAGES, None, f"{rows} x {keys} a stage"),
    ]
    if v_count:
        why = f"{tiling.v_keys} x {OUTPUT_GROUPS * v_buffer_width(spec)} a stage"
        wanted.insert(3, ("sV", v_count * _v_bytes(spec, tiling), v_count, None, why))
    if tiling.o_chunk:
        size = OUTPUT_GROUPS * rows * tiling.o_chunk * ELEMENT_BYTES
        why = f"{rows} x {tiling.o_chunk} an output warpgroup, in {half_width(spec) // tiling.o_chunk} steps"
        wanted.append(("sO", size, OUTPUT_GROUPS, None, why))
    return wanted


def column_budget(spec: KernelSpec, arch: Arch, tiling: Tiling) -> Budget:
    """The Budget of a candidate. Never raises for what does not fit: see Budget.overflows."""
    v_count, cluster = v_stages(spec, arch, tiling), tiling.tile_m // arch.mma_m
    mbarriers = _mbarriers(tiling, v_count, arch.group_warps, cluster, q_stages(spec, arch, tiling))
    buffers = _buffers(spec, arch, tiling, mbarriers[1], v_count)
    roles = _roles(spec, arch, tiling)

    def barriers(threads: int) -> tuple[NamedBarrier, ...]:
        return _named_barriers(threads, tiling)

    budget = assembled(arch, mbarriers, buffers, ((), 0), roles, barriers, handed_out=True)
    return replace(budget, overflows=tuple(_overflows(budget, spec, arch, tiling)))


def _buffers(
    spec: KernelSpec, arch: Arch, tiling: Tiling, barrier_bytes: int, v_count: int
) -> tuple[tuple[Buffer, ...], int]:
    wanted = [("barriers", barrier_bytes, 1, None, "mbarriers"), *_wanted(spec, arch, tiling, v_count)]
    return place_buffers(wanted)


def output_registers(spec: KernelSpec) -> int:
    """Of a thread that holds O: a multiple of 8."""
    return -(-(half_width(spec) // 2 + OUTPUT_OTHERS) // 8) * 8


def score_registers(spec: KernelSpec, arch: Arch) -> int:
    """What the others leave of the register file, 240 at most."""
    group = arch.group_warps * arch.warp_size
    left = arch.registers_per_sm // group - OUTPUT_GROUPS * output_registers(spec) - PRODUCER_REGISTERS
    return min(240, left // 8 * 8)


def score_fragments(spec: KernelSpec, arch: Arch, tiling: Tiling) -> dict[str, int]:
    """Registers that a thread of the score warpgroup holds of Q, S and P: 64 rows over 128 threads."""
    q_columns = spec.head_dim - min(spec.head_dim, chunks_apart(spec, arch, tiling) * CHUNK)
    return {"Q": q_columns // 4, "S": tiling.tile_n // 2, "P": tiling.tile_n // 4}


def score_others(tiling: Tiling) -> int:
    """What a thread of the score warpgroup holds beside fragments, by estimate: more where P is small, for at head_dim
    512 with tiles of 32 keys ptxas serialized wgmma with 24 left beside Q and S, and did not with 28.
    """
    return SCORE_OTHERS + max(0, P_REGISTERS_MIN - tiling.tile_n // 4)


def chunks_apart(spec: KernelSpec, arch: Arch, tiling: Tiling) -> int:
    """Chunks of Q, the last ones, that stay in shared memory because the score warpgroup's registers do not suffice."""
    free = score_registers(spec, arch) - score_others(tiling) - tiling.tile_n // 2 - tiling.tile_n // 4
    return next(count for count in range(k_chunks(spec) + 1) if spec.head_dim - count * CHUNK <= max(0, 4 * free))


def q_stages(spec: KernelSpec, arch: Arch, tiling: Tiling) -> int:
    """Buffers through which Q's chunks come: all that stay, and two so that one is loaded while another is read. Where
    a query tile has few KV tiles the way to the next one's Q would show: Q_AHEAD of its chunks wait for their turn. A
    CTA has one query tile or two where keys are shared out: what they would take is K's (601 and 571 TFLOP/s of
    decoding at 576/512, an H200, 2026-11-29).
    """
    apart = chunks_apart(spec, arch, tiling)
    if spec.window_left is not None:
        return min(k_chunks(spec), apart + Q_AHEAD)
    return max(2, apart)


def _roles(spec: KernelSpec, arch: Arch, tiling: Tiling) -> tuple[Role, ...]:
    size = arch.group_warps
    held = ", ".join(f"{name} {count}" for name, count in score_fragments(spec, arch, tiling).items())
    others = score_others(tiling)
    o_why = f"setmaxnreg: half of O {half_width(spec) // 2}, {OUTPUT_OTHERS} else by estimate"
    loaders, loads = (1, "it loads Q and K") if tiling.v_keys == IN_K else (2, "one loads Q and K, one V")
    return (
        Role("scores", 0, size, score_registers(spec, arch), f"setmaxnreg: {held}, {others} else by estimate"),
        Role("output", size, OUTPUT_GROUPS * size, output_registers(spec), o_why),
        Role("tma", 3 * size, loaders, PRODUCER_REGISTERS, f"setmaxnreg: coordinates, loop state; {loads}"),
        Role("idle", 3 * size + loaders, size - loaders, PRODUCER_REGISTERS, "setmaxnreg counts whole warpgroups"),
    )


def _mbarriers(
    tiling: Tiling, v_count: int, warps: int, cluster: int, q_count: int
) -> tuple[tuple[Mbarrier, ...], int]:
    both = ", in both CTAs" if cluster > 1 else ""
    output = OUTPUT_GROUPS * warps
    if tiling.v_keys == IN_K:
        read, of_v = "half of O's or the score warps, one lane each", []
        known = "QK of the next KV tile is done"
    else:
        read, known = "score warps, one lane each", "QK of the next KV tile is in its last step"
        of_v = [
            ("v_full", v_count, 1, "TMA: a slice of V has landed"),
            ("v_empty", v_count, cluster * output, f"output warps, one lane each{both}: PV has read it"),
        ]
    return place_mbarriers(
        (
            ("q_full", q_count, 1, "TMA: a chunk of Q has landed"),
            ("q_empty", q_count, warps, "score warps, one lane each: it is in registers, or the last QK has read it"),
            ("k_full", tiling.kv_stages, 1, "TMA: a chunk of K has landed"),
            ("k_empty", tiling.kv_stages, cluster * warps, f"{read}{both}: it has been read"),
            *of_v,
            ("p_full", P_STAGES, warps, "score warps, one lane each: P and the factors of O are written"),
            ("p_empty", P_STAGES, output, "output warps, one lane each: P and factors have been read"),
            ("scored", P_STAGES, warps, f"score warps, one lane each: {known}"),
        )
    )


def _named_barriers(threads: int, tiling: Tiling) -> tuple[NamedBarrier, ...]:
    groups = range(OUTPUT_GROUPS if tiling.o_chunk else 0)
    own = [NamedBarrier(1 + i, f"output {i}", 128, f"half {i} of O: sO may be written; is written") for i in groups]
    return (NamedBarrier(0, "cta", threads, "mbarriers initialized"), *own)


def _overflows(budget: Budget, spec: KernelSpec, arch: Arch, tiling: Tiling) -> Iterator[Overflow]:
    yield from smem_overflows(budget, "a lower kv_stage or a smaller tile_n")
    yield from register_overflow(budget)
    held = score_fragments(spec, arch, tiling)
    others, limit = score_others(tiling), budget.role("scores").registers
    need = sum(held.values()) + others
    if need > limit:
        reason = " + ".join(f"{name} {count}" for name, count in held.items()) + f" + {others} else, a thread"
        yield Overflow("registers", "registers", need, limit, reason, "a smaller tile_n")
    slices = v_stages(spec, arch, tiling)
    if tiling.v_keys != IN_K and slices < SLICES_MIN:
        reason = "PV of a slice of V is issued before the one before it is released"
        yield Overflow("smem", "slices", SLICES_MIN, slices, reason, "a lower kv_stage")


def check_columns(spec: KernelSpec, arch: Arch) -> Iterator[tuple[str, str, str]]:
    """(field, what is not implemented, remedy) of everything that the strategy lacks."""
    rows = [arch.mma_m * cluster for cluster in CLUSTERS]
    if spec.tile_m != "auto" and spec.tile_m not in rows:
        limit = f"a CTA has {arch.mma_m} query rows, a cluster at most two CTAs"
        yield "tile_m", limit, f"use {' or '.join(map(str, rows))}"
    if spec.kv_stage == 1:
        yield "kv_stage", "QK of the next chunk of K is issued before this one is released", "use 2 or more"
    least = min(V_KEYS)
    if spec.tile_n != "auto" and (spec.tile_n % least or spec.tile_n < 2 * least):
        limit = f"PV takes slices of {least} keys, two or more"
        yield "tile_n", limit, f"use a multiple of {least} from {2 * least} on"
