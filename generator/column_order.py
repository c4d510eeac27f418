"""Which of the candidates of columns.py is taken: by what was measured on an H200, with figures (docs/h200.md has the
rest).
"""

from __future__ import annotations

from .arch import Arch
from .budget import Tiling
from .columns import IN_K, V_KEYS, chunks_apart, half_width, is_deep, o_parts, v_stages
from .spec import KernelSpec
from .warpgroups import is_winner, narrow_window

ENOUGH_SLICES = {16: 4, 32: 3, IN_K: 0}  # buffers of V, by keys in one: two of 32 were slower on an H200


def column_preference(spec: KernelSpec, arch: Arch, tiling: Tiling) -> tuple:
    """Sort key of candidates: the smallest is taken. The winner of a measurement (tuned.json), where there was one,
    then column_order. What was measured were long rows of head dims beyond warpgroups: of a narrow window, with
    split_kv, of V within K, or with P in shared memory at a head_dim that warpgroups have too, there is none.
    """
    wide = max(spec.head_dim, spec.v_dim) > arch.mma_n_max
    measured = wide and has_long_rows(spec) and not spec.kv_shared
    return (not (measured and is_winner(spec, tiling)), *column_order(spec, arch, tiling))


def column_order(spec: KernelSpec, arch: Arch, tiling: Tiling) -> tuple:
    """column_preference as if no tile had won, by TFLOP/s on an H200 (2026-11-29): 0.99 of the fastest of 32 cases from
    272 to 512.

    Two CTAs that load for one another: prefers_pairs. V within K's chunks: prefers_shared; else in small slices at 496
    and 512, whose rings have the least room: 714 and 581 of 128 x 96 at 512; elsewhere in wide ones, 669 and 610 at
    384, 668 and 522 at 448. A ring that is_deep. Q in registers, but for two chunks; at 496 and 512 for three, which
    lets a wider tile in. Three wide slices of V or four small ones: 603 at 512, 563 with two wide ones. O through
    shared memory: a window of 128 at 512 took 862 us, by threads 950. The widest tile: 653 with 128 keys at 320, 602
    with 96. As much of K as is left.
    """
    roomless = widest(spec, arch) and has_long_rows(spec)
    other_size = (tiling.tile_m > arch.mma_m) != prefers_pairs(spec, arch, tiling)
    if tiling.v_keys == IN_K:
        slices, shallow = -1 if prefers_shared(spec, tiling) else len(V_KEYS), not is_deep(spec, tiling)
    else:
        slices, shallow = (V_KEYS if roomless else V_KEYS[::-1]).index(tiling.v_keys), False
    apart = max(3 if roomless else 2, chunks_apart(spec, arch, tiling))
    few = v_stages(spec, arch, tiling) < ENOUGH_SLICES[tiling.v_keys]
    return (other_size, slices, shallow, apart, few, not tiling.o_chunk, -tiling.tile_n, -tiling.kv_stages)


def prefers_shared(spec: KernelSpec, tiling: Tiling) -> bool:
    """Whether V in K's chunks is the faster way. On an H200 (2026-11-29): 752 TFLOP/s at 384 with three KV tiles in the
    ring, 640 with V apart, 464 to 578 with two and two and a half; where an output warpgroup takes its half of V in two
    parts, so that one is released early, two are as good as V apart (576/512: 649 and 626).
    """
    return is_deep(spec, tiling) or len(o_parts(spec)) > 1


def prefers_pairs(spec: KernelSpec, arch: Arch, tiling: Tiling) -> bool:
    """Whether a cluster of two CTAs is the faster one. On an H200 (2026-11-29): 612 and 413 at 480; 636 and 641 at 512
    by turns with others, but 591 and 550 where nothing else ran and power was the limit; with eight packed heads 664
    and 647 there, but 599 and 624 at 448. With V in K's chunks one CTA asks for little enough: 713 and 703 at 512. Of
    short rows and head dims of up to 256 that was not measured; there one CTA loads for itself.
    """
    wide = max(spec.head_dim, spec.v_dim) > arch.mma_n_max
    return wide and has_long_rows(spec) and tiling.v_keys != IN_K


def widest(spec: KernelSpec, arch: Arch) -> bool:
    """Whether both output warpgroups hold as many columns of O as one wgmma can write."""
    return half_width(spec) == arch.mma_n_max


def has_long_rows(spec: KernelSpec) -> bool:
    """Neither narrow windows nor keys that are shared out."""
    return narrow_window(spec) is None and not spec.split_kv
