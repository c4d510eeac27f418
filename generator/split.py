"""split_kv: to how many CTAs the keys of a query tile are shared out, and the kernel that combines their results.

A decoding step has few query rows: fewer query tiles than a GPU has SMs, each with many keys. With its keys shared out
every SM loads a part of them; each part's un-normalized O, LSE and m go to scratch memory, and a second kernel of the
same launch makes the attention of them, by the formula of reference.merge; one share is the result already. How many
there are follows from a call's shapes, so one compiled kernel serves all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .layout import Plan

SPLITS_MAX = 128  # a warp of the combining kernel reads LSE of 32 parts at once
COMBINE_WARPS = 8
LANE_COLUMNS = 4  # float32, 16 bytes
PARTS_AHEAD = 4  # parts of which a warp reads rows at once: with COMBINE_WARPS a row, those of 32 shares
TILE_OVERHEAD = 2  # KV tiles that could be loaded in the time in which a share begins and ends
PART_OVERHEAD = 0.02  # and in which one more part is combined


def lane_steps(head_dim_v: int) -> int:
    """Steps of a warp along a row of O."""
    return -(-head_dim_v // (32 * LANE_COLUMNS))


def combine_bytes(head_dim_v: int) -> int:
    """Shared memory of the combining kernel: a row of O a warp, float32."""
    return 4 * COMBINE_WARPS * head_dim_v


def splits_of(plan: Plan, shapes: Mapping[str, Sequence[int]], sms: int) -> int:
    """Shares of a call with tensors of these shapes, by name, on a GPU of so many SMs.

    The fewest that let the busiest SM load the fewest KV tiles: query tiles are counted as if each saw the most keys
    that one can.
    """
    batch, queries, heads, _ = shapes["q"]
    tiles = -(-queries * plan.heads_per_tile // plan.mma_m) * (heads // plan.heads_per_tile) * batch
    keys = _keys_seen(plan, shapes["k"][1], -(-plan.mma_m // plan.heads_per_tile))
    kv_tiles = -(-keys // plan.tile_n)
    if "k2" in shapes:
        kv_tiles += -(-shapes["k2"][1] // plan.tile_n)
    workers = max(1, sms // plan.ctas)

    def cost(splits: int) -> tuple[float, int]:
        rounds = -(-tiles * splits // workers)
        return rounds * (-(-kv_tiles // splits) + TILE_OVERHEAD) + PART_OVERHEAD * splits, splits

    return min(range(1, min(SPLITS_MAX, max(kv_tiles, 1)) + 1), key=cost)


def _keys_seen(plan: Plan, keys: int, tokens: int) -> int:
    """The most keys of the first source that the tokens of a query tile can see."""
    mask = plan.mask
    if mask.left is None or mask.right is None:
        return keys
    return min(keys, mask.left + mask.right + tokens)
