"""What a CTA needs on sm_90a: consumer warpgroups of 64 query rows each, and a warp that loads for all of them.

Pure arithmetic, as in budget.py. A consumer multiplies its rows with K and V (wgmma), S, P and O in its registers; Q of
each lies in a slab of shared memory of its own, K and V in rings that all of them read. Registers are handed out by
warpgroup (setmaxnreg), so the budget of a thread is a choice here; what its accumulators and the rest need of that is
an estimate, compared with what ptxas spills.

All exponentials are the special-function unit's: what limits the softmax is how many instructions a warp issues. With
one, two and three of eight by a cubic instead, head_dim 16 to 64 lost 3 to 20 % on an H200 (2026-11-28).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .arch import Arch
from .budget import (
    ELEMENT_BYTES,
    Budget,
    Buffer,
    Mbarrier,
    NamedBarrier,
    Overflow,
    Role,
    Tiling,
    assembled,
    kv_buffers,
    place_buffers,
    place_mbarriers,
    register_overflow,
    shared_ring_overflow,
    smem_overflows,
)
from .mask import mask_of
from .spec import HEAD_DIM_STEP, KernelSpec
from .tuned import winner

CONSUMERS_MAX = 4  # with four, of 112 registers a thread, narrow tiles of a narrow head
KV_STAGES_AUTO = 4
TILE_N_STEP = HEAD_DIM_STEP  # keys: K of the wgmma that multiplies P with V
TILE_N_MAX = 256
# Addresses, descriptors, loop state, two rows' maximum, sum and factor. At head_dim 128 and 176 keys ptxas spills
# nothing with 240 registers, of which S, P and O take 196.
OTHER_REGISTERS = 28
# Of a thread, beside the accumulator of one wgmma. ptxas refuses an instruction that leaves it fewer of those that all
# threads have at entry, whatever setmaxnreg gives later: 192 columns compile with 128 at entry, 208 want 134.
WGMMA_OTHERS = 30
SPLIT_TILES = 2  # with split_kv: of a group's heads at most; both read the same keys at the same time, once from memory
SPLIT_KEYS = 128  # of a KV tile with split_kv: more only lengthens the way from the last key to the end
NARROW = 2048  # keys: of a window that a KV tile may be a large part of, so that the tiles at its ends count
PART_MAX = 4096.0  # of a thread's part of a row's sum of a KV tile: fp16 ends at 65504
OUTWEIGHING = 4.0  # times all before: of random scores hardly ever, of a new key that is nearly all of a row at once
ONE_LOOP_FROM = 224  # columns of V: 0.99 to 1.01 as fast from there on (H200, 2026-11-29), at 208 0.96, at 176 0.82
WIDE = 128  # columns of O from which on its rescaling costs more than asking whether it is needed
# Columns of K and V together up to which other consumers' products hide one's softmax: it may then come after its own
# PV, so that P is rounded as it comes, and K and V are released sooner. On an H200 (2026-11-29) worth up to 7 % up to
# head_dim 80, from -2 to 2 % at 96 and 128, where tuned.json decides. Not for a wide O, whose consumers take no turns:
# with three of them that cost 9 to 23 % at head_dim 32 to 64.
AFTER_PV = 160
# By consumers: which part of the time that the exponentials take is not hidden behind the tensor core's, see
# predicted_cycles.
EXPOSED = {1: 1.6, 2: 0.88, 3: 0.65, 4: 0.66}
TILE_CYCLES = 480  # for barriers and latencies
# Of narrow windows a tile, whose masks count, and a query tile: its beginning, its end, more for each consumer.
TILE_CYCLES_WINDOW, QUERY_CYCLES, CONSUMER_CYCLES = 620, 1700, 350
# (consumer, producer): of the registers that 128 threads a warpgroup have at entry, multiples of 8 [PTX 9.7.19.5]
REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32), 4: (112, 32)}


def consumers(tiling: Tiling, arch: Arch) -> int:
    """Consumer warpgroups of a CTA."""
    return tiling.tile_m // arch.mma_m


def warpgroup_tilings(spec: KernelSpec, arch: Arch) -> list[Tiling]:
    """Every Tiling of the strategy that the specification's fields leave open."""
    rows = [arch.mma_m * count for count in range(1, CONSUMERS_MAX + 1)] if spec.tile_m == "auto" else [spec.tile_m]
    tile_ns = range(TILE_N_MAX, 0, -TILE_N_STEP) if spec.tile_n == "auto" else (spec.tile_n,)
    stages = range(1, KV_STAGES_AUTO + 1) if spec.kv_stage == "auto" else (spec.kv_stage,)
    reuse = (False,) if spec.unnormalized else (False, True)  # float32 O goes from registers to global memory
    if spec.pack_heads is True and spec.q_heads_per_kv > 1:
        rows = [count for count in rows if can_pack(spec.q_heads_per_kv, count, arch)]
    return [
        Tiling(
            *(tile_m, tile_n, kv_stages, "register", over_q, spec.v_dim, "warpgroups"),
            **schedule(spec, arch, tile_m, tile_n),
        )
        for tile_m in rows
        for tile_n in tile_ns
        for kv_stages in stages
        for over_q in reuse
    ]


def schedule(spec: KernelSpec, arch: Arch, tile_m: int, tile_n: int) -> dict[str, bool]:
    """turns, lazy and beside_pv of a Tiling: as measured for the winner's tile (but lazy), else by the widths."""
    found, usual = winner(spec), default_schedule(spec, arch, tile_m, tile_n)
    if found and (tile_m, tile_n) == (found.tile_m, found.tile_n):
        return {**usual, "turns": found.turns, "beside_pv": found.beside_pv}
    return usual


def default_schedule(spec: KernelSpec, arch: Arch, tile_m: int, tile_n: int) -> dict[str, bool]:
    """turns, lazy and beside_pv where nothing was measured: by the widths. Where maxima are looked for O is rescaled
    lazily if it is wide, or consumers have spans of their own within windows: beside PV ptxas keeps the exponentials
    before the wait for that only if a branch comes between (97 us and 88 on an H200 at head_dim 64 with 128 keys, 302
    and 295 with 1024, 2026-11-29); after PV it matters little (80.3 and 81.2, 256.9 both).
    """
    wide = spec.v_dim > WIDE
    windows = spec.window_left is not None and has_own_spans(spec, arch, tile_m)
    alone = tile_m == arch.mma_m
    beside = alone or wide or spec.head_dim + spec.v_dim > AFTER_PV
    lazy = (wide or windows) and looks_for_maxima(spec, arch, tile_m, tile_n)
    return {"turns": not (alone or wide), "lazy": lazy, "beside_pv": beside}


def cut_twice(spec: KernelSpec, arch: Arch, tile_m: int, tile_n: int) -> bool:
    """With own spans: a KV tile can have columns on its left that one row of a consumer does not see, and on its right
    that another one does not. Not where the first row's keys end more than a tile after the last row's begin.
    """
    left = mask_of(spec).left
    if left is None:
        return False
    heads = heads_in_tile(spec.q_heads_per_kv, tile_m) if packs(spec, arch, tile_m) else 1
    return left + 1 < tile_n + -(-arch.mma_m // heads) + 1


def keeps_reference(spec: KernelSpec, arch: Arch, tile_m: int, tile_n: int) -> bool:
    """Of KV tiles before which every row has seen some key no maximum is looked for. Which they are is not known where
    a window's tiles come in rotated order, or are cut on both sides.
    """
    known = has_own_spans(spec, arch, tile_m) and not cut_twice(spec, arch, tile_m, tile_n)
    return mask_of(spec).left is None or known


def looks_for_maxima(spec: KernelSpec, arch: Arch, tile_m: int, tile_n: int) -> bool:
    """Of some KV tiles after a query tile's first one."""
    kept = keeps_reference(spec, arch, tile_m, tile_n)
    return not kept or mask_of(spec).left is not None or spec.kv_sources == 2


def one_loop(spec: KernelSpec, arch: Arch, tile_m: int, tile_n: int) -> bool:
    """One loop visits all KV tiles after a query tile's first one, and asks of each whether some are hidden, where two
    would make one for each answer. It compiles by a third faster, and where a KV tile is so much to multiply that the
    question does not count, from ONE_LOOP_FROM columns of V on, it runs as fast, if the scale is held in a register.
    With split_kv it would spill.
    """
    wide = spec.v_dim >= ONE_LOOP_FROM and not spec.split_kv
    return wide and not looks_for_maxima(spec, arch, tile_m, tile_n)


def has_own_spans(spec: KernelSpec, arch: Arch, tile_m: int) -> bool:
    """Each consumer multiplies the KV tiles that its own rows see, and passes by what the CTA loads for the others."""
    one_span = spec.kv_sources == 1 and not spec.split_kv
    return one_span and mask_of(spec).windowed and tile_m > arch.mma_m


def is_winner(spec: KernelSpec, tiling: Tiling) -> bool:
    """Whether the tile is the fastest that was measured for such a specification."""
    found = winner(spec)
    tile = tiling.tile_m, tiling.tile_n, tiling.v_keys
    return found is not None and tile == (found.tile_m, found.tile_n, found.v_keys)


def can_pack(group: int, tile_m: int, arch: Arch) -> bool:
    """Whether the rows of a tile are whole tokens of `group` query heads, and each consumer's a box of them; or a part
    of one token's heads, as many as there are rows.
    """
    whole = tile_m % group == 0 and (arch.mma_m % group == 0 or group % arch.mma_m == 0)
    return whole or group % tile_m == 0


def heads_in_tile(group: int, tile_m: int) -> int:
    """Query heads whose rows a tile holds where can_pack."""
    return min(group, tile_m)


def packs(spec: KernelSpec, arch: Arch, tile_m: int) -> bool:
    """Whether the query heads of a group fold into the rows of a tile: see layout.packs_heads."""
    group = spec.q_heads_per_kv
    return group > 1 and spec.pack_heads is not False and can_pack(group, tile_m, arch)


def warpgroup_budget(spec: KernelSpec, arch: Arch, tiling: Tiling) -> Budget:
    """The Budget of a candidate. Never raises for what does not fit: see Budget.overflows."""
    groups = consumers(tiling, arch)
    mbarriers = _mbarriers(spec, tiling, groups, groups * arch.group_warps)
    buffers = _buffers(spec, arch, tiling, mbarriers[1])
    roles = _roles(spec, arch, tiling)

    def barriers(threads: int) -> tuple[NamedBarrier, ...]:
        return _named_barriers(threads, groups, arch)

    budget = assembled(arch, mbarriers, buffers, ((), 0), roles, barriers, handed_out=True)
    return replace(budget, overflows=tuple(_overflows(budget, spec, arch, tiling)))


def fragment_registers(spec: KernelSpec, tiling: Tiling) -> dict[str, int]:
    """Registers a consumer thread holds of S, P and O: 64 rows over 128 threads, 16 bits for P."""
    n = tiling.tile_n
    return {"S": n // 2, "P": n // 4, "O": spec.v_dim // 2}


def _roles(spec: KernelSpec, arch: Arch, tiling: Tiling) -> tuple[Role, ...]:
    groups, size = consumers(tiling, arch), arch.group_warps
    consumer, producer = REGISTERS[groups]
    held = ", ".join(f"{name} {count}" for name, count in fragment_registers(spec, tiling).items())
    return (
        Role("consumer", 0, groups * size, consumer, f"setmaxnreg: {held}, {OTHER_REGISTERS} else by estimate"),
        Role("tma", groups * size, 2, producer, "setmaxnreg: coordinates, loop state; one loads Q, one K and V"),
        Role("idle", groups * size + 2, size - 2, producer, "setmaxnreg counts whole warpgroups"),
    )


def _mbarriers(spec: KernelSpec, tiling: Tiling, groups: int, warps: int) -> tuple[tuple[Mbarrier, ...], int]:
    stages = tiling.kv_stages
    rings = [
        ("k_full", stages, 1, "TMA: a K tile has landed"),
        ("k_empty", stages, warps, "consumers, one lane a warp: QK has read the K tile"),
        ("v_full", stages, 1, "TMA: a V tile has landed"),
        ("v_empty", stages, warps, "consumers, one lane a warp: PV has read the V tile"),
    ]
    if spec.kv_shared:
        rings = [rings[0], ("k_empty", stages, warps, "consumers, one lane a warp: PV, and QK before it, have read it")]
    freed = "its first warp: its O has been stored" if tiling.o_over_q else "one lane a warp: its last QK has read Q"
    families = (
        ("q_full", groups, 1, "TMA: Q of a consumer has landed"),
        ("q_empty", groups, 1 if tiling.o_over_q else warps // groups, f"a consumer, {freed}"),
        *rings,
    )
    return place_mbarriers(families)


def _buffers(spec: KernelSpec, arch: Arch, tiling: Tiling, barrier_bytes: int) -> tuple[tuple[Buffer, ...], int]:
    groups, rows = consumers(tiling, arch), arch.mma_m
    wanted = [
        ("barriers", barrier_bytes, 1, None, "mbarriers"),
        (
            "sQ",
            groups * rows * spec.head_dim * ELEMENT_BYTES,
            groups,
            None,
            f"{rows} x {spec.head_dim} a consumer",
        ),
        *kv_buffers(spec, tiling),
    ]
    if not spec.unnormalized:
        staging, columns = f"{rows} x {spec.v_dim} a consumer", spec.v_dim
        if tiling.o_over_q:
            staging += ", each over its part of sQ once its last QK is done"
            columns = max(spec.head_dim, spec.v_dim)
        size = groups * rows * columns * ELEMENT_BYTES
        wanted.append(("sO", size, groups, "sQ" if tiling.o_over_q else None, staging))
    return place_buffers(wanted)


def _named_barriers(threads: int, groups: int, arch: Arch) -> tuple[NamedBarrier, ...]:
    size = arch.group_warps * arch.warp_size
    turns = [NamedBarrier(1 + i, f"turn {i}", 2 * size, f"consumer {i} may issue its MMAs") for i in range(groups)]
    own = [
        NamedBarrier(1 + groups + i, f"consumer {i}", size, f"consumer {i}: sO may be written; is written")
        for i in range(groups)
    ]
    cta = NamedBarrier(0, "cta", threads, "mbarriers initialized")
    return (cta, *(turns if groups > 1 else ()), *own)


def _overflows(budget: Budget, spec: KernelSpec, arch: Arch, tiling: Tiling) -> Iterator[Overflow]:
    options = ["a lower kv_stage"] if tiling.kv_stages > 1 else ["a smaller tile_n"]
    options += ["fewer rows (tile_m)"] if tiling.tile_m > arch.mma_m else []
    options += [] if tiling.o_over_q or spec.unnormalized else ["sO over sQ"]
    yield from smem_overflows(budget, " or ".join(options))
    yield from shared_ring_overflow(spec, tiling)
    yield from register_overflow(budget)
    held = fragment_registers(spec, tiling)
    need, limit = sum(held.values()) + OTHER_REGISTERS, budget.role("consumer").registers
    if need > limit:
        reason = " + ".join(f"{name} {count}" for name, count in held.items()) + f" + {OTHER_REGISTERS} else, a thread"
        yield Overflow("registers", "registers", need, limit, reason, "a smaller tile_n, or fewer rows (tile_m)")
    at_entry = budget.registers_pool // budget.threads
    for name in ("S", "O"):
        if (need := held[name] + WGMMA_OTHERS) > at_entry:
            reason = f"one wgmma writes {name}: {held[name]} + {WGMMA_OTHERS} else, a thread at entry"
            yield Overflow("registers", "registers", need, at_entry, reason, "fewer rows (tile_m)")


def predicted_cycles(spec: KernelSpec, arch: Arch, tiling: Tiling) -> float:
    """SM cycles of one KV tile of a CTA, by a model with coefficients fitted to measurements on an H200: 94 tilings of
    eleven head dims at 16384 tokens, 2026-11-28; mean error 5 %.

    The tensor core's time, what of the exponentials' does not hide behind it, and a constant for barriers and
    latencies.
    """
    scores = tiling.tile_m * tiling.tile_n
    tensor = 2 * scores * (spec.head_dim + spec.v_dim) / arch.rates.tensor_flop
    constant = TILE_CYCLES if narrow_window(spec) is None else TILE_CYCLES_WINDOW
    return 0.9 * tensor + EXPOSED[consumers(tiling, arch)] * scores / arch.rates.mufu_ops + constant


def split_preference(spec: KernelSpec, arch: Arch, tiling: Tiling) -> tuple:
    """warpgroup_preference with split_kv, where loading K and V takes the time and query rows are few: the fewest rows
    of which SPLIT_TILES tiles hold a group's heads, then the widest KV tile up to SPLIT_KEYS. On an H200 (2026-11-29),
    128 heads on one of 128 columns: 40.7 us at 64 x 4096 and 2 x 131072 tokens by tiles of 64 rows, 47 and 43 of 128.
    Tiles of 64 to 176 keys and two to six stages are within 3 % of one another where one tile holds the group.
    """
    apart = not packs(spec, arch, tiling.tile_m)
    parted = not apart and spec.q_heads_per_kv > SPLIT_TILES * tiling.tile_m
    over = tiling.tile_n > SPLIT_KEYS
    return (tiling.kv_stages < 2, apart, parted, tiling.tile_m, over, -tiling.tile_n, -tiling.kv_stages)


def narrow_window(spec: KernelSpec) -> int | None:
    """Keys that a query sees of a window of fewer than NARROW; None of any other mask."""
    right = 0 if spec.causal else spec.window_right
    seen = None if spec.window_left is None or right is None else spec.window_left + 1 + right
    return seen if seen is not None and seen < NARROW else None


def window_tiles(spec: KernelSpec, arch: Arch, tiling: Tiling, seen: int) -> float:
    """KV tiles that a consumer multiplies of a narrow window of so many keys, the mean: with own spans they begin where
    the CTA begins to see, else anywhere.
    """
    packed = packs(spec, arch, tiling.tile_m)
    own = has_own_spans(spec, arch, tiling.tile_m)
    rows = arch.mma_m if own else tiling.tile_m
    tokens = max(1, rows // spec.q_heads_per_kv) if packed else rows
    if not own:
        return (seen + tokens - 2) / tiling.tile_n + 1
    apart = arch.mma_m / spec.q_heads_per_kv if packed else arch.mma_m  # tokens from a consumer's first to the next's
    firsts = [int(i * apart) for i in range(consumers(tiling, arch))]
    keys = seen + tokens - 1
    found = [(first + keys - 1) // tiling.tile_n - first // tiling.tile_n + 1 for first in firsts]
    return sum(found) / len(found)


def cycles_a_score(spec: KernelSpec, arch: Arch, tiling: Tiling) -> float:
    """Predicted SM cycles of a score that is seen. Of narrow windows the constants are fitted to what an H200 took at
    head_dim 64, 64 heads on 8 (2026-11-29), when softmax still ran beside PV; after it, of 128 keys 80 us at 192x80, 84
    at 256x48, 85 at 256x64 and 192x96, 92 at 192x64; of 1024 keys 253 at 256x64, 257 at 192x96, which the model takes,
    260 at 192x128, 262 at 192x112.
    """
    each, seen = predicted_cycles(spec, arch, tiling), narrow_window(spec)
    if seen is None:
        return each / (tiling.tile_m * tiling.tile_n)
    ends = QUERY_CYCLES + CONSUMER_CYCLES * consumers(tiling, arch)
    return (window_tiles(spec, arch, tiling, seen) * each + ends) / (tiling.tile_m * seen)


def warpgroup_preference(spec: KernelSpec, arch: Arch, tiling: Tiling) -> tuple:
    """Sort key of candidates: the smallest is taken. Two stages, else K and V are not loaded while others are
    multiplied; a group's heads in one tile; the winner of a measurement, where there was one (of a narrow window there
    was none); then the fewest predicted cycles a score.
    """
    shallow, apart, *model = model_preference(spec, arch, tiling)
    lost = narrow_window(spec) is None and not is_winner(spec, tiling)
    return (shallow, apart, lost, *model)


def model_preference(spec: KernelSpec, arch: Arch, tiling: Tiling) -> tuple:
    """warpgroup_preference as if nothing had been measured."""
    apart = not packs(spec, arch, tiling.tile_m)
    return (tiling.kv_stages < 2, apart, cycles_a_score(spec, arch, tiling), -tiling.kv_stages, tiling.o_over_q)
