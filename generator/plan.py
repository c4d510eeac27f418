"""KernelSpec -> Plan: the candidates, why each was rejected, and the choice. Pure Python, no DSL import.

The rules of choice. Where one MMA writes all of O (head_dim and head_dim_v at most 256), K and V come in whole tiles,
with one query tile (tiles), with two in flight (two_tiles) or with two CTAs that multiply as one (two_ctas). Of the
candidates of each that fit the architecture, take the first by
  1. at least two kv stages, so that the next K and V tiles are loaded while these are multiplied;
  2. the largest tile_n: fewer barriers and fewer rescales a key;
  3. P in TMEM rather than in shared memory: it leaves the shared-memory pipe to K and V;
  4. the most kv stages, up to three; a deeper ring must be asked for;
  5. the widest o_chunk: fewer steps of the epilogue;
  6. the least reuse: sO of its own rather than over sQ;
of these the one with at least two kv stages that costs the fewest SM cycles a block of 128 x 128 scores (cost.py), and
of equals that with two query tiles in a CTA, which needs no other CTA.
Beyond, K and V stream in chunks, and of the strategies (chunks.py) take the candidate that costs
  1. the fewest SM cycles a block of 128 x 128 scores, by the counts and rates of cost.py;
  2. then the fewest bytes from L2;
  3. then the most bytes in flight in the ring;
  4. then the fewest TMA boxes a tile: wide swizzle spans;
  5. then the fewest chunks a tile: fewer barriers.
tile_m names the rows of one CTA: 64 asks for a pair, 128 for one CTA that keeps whole rows of O.
A field that the specification sets is not searched over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from .arch import ARCHS, Arch
from .budget import Tiling
from .chunks import PASSES, budget_of, chunked_tilings, geometry, shared_chunks
from .column_order import column_preference
from .columns import check_columns, column_tilings
from .columns_plan import ColumnsPlan
from .cost import Cost, cost_of
from .hopper import HopperPlan
from .layout import WHOLE_TILES, Plan, Rejected
from .spec import HEAD_DIM_STEP, KV_STAGE_MAX, KernelSpec, SpecError
from .warpgroups import CONSUMERS_MAX, can_pack, split_preference, warpgroup_preference, warpgroup_tilings

__all__ = [
    "CHUNKED",
    "WHOLE_TILES",
    "DoesNotFit",
    "NotImplementedYet",
    "Plan",
    "candidates",
    "plan_kernel",
    "plan_tiling",
]

TILE_NS = (128, 64, 32, 16)
SHARED_TILE_NS = tuple(range(128, 0, -16))  # two K tiles must fit where K in chunks is V too: finer steps fill the rest
TILE_N_MAX = 128
PAIR_N_STEP = 32  # keys: N of a tcgen05.mma of two CTAs [PTX 9.7.16.2]
CHUNKED = ("chunks", "passes", "pair")
BY_SIMPLICITY = ("two_tiles", "two_ctas", "tiles")  # of strategies with whole tiles at one cost the first is taken
KV_STAGES_AUTO = 3
O_CHUNK_STEP = 16  # columns: 32 bytes of 16 bits, the narrowest swizzle span


class DoesNotFit(SpecError):
    """No candidate fits the architecture; the message says what overflows by how much, and what would fit."""


class NotImplementedYet(SpecError):
    """The vocabulary has it, this architecture's template does not, or not yet."""


def plan_kernel(spec: KernelSpec) -> Plan:
    """The Plan of a specification.

    Raises NotImplementedYet for what the architecture's template lacks, DoesNotFit when no candidate fits; both say
    field, value, limit and remedy.
    """
    asked, spec, arch = spec, spec.partial, ARCHS[spec.arch]
    check_implemented(asked)
    fitting, rejected = [], []
    for tiling in candidates(spec, arch):
        budget = budget_of(spec, arch, tiling)
        if budget.fits:
            fitting.append((tiling, budget))
        else:
            rejected += [Rejected(tiling, str(over), over.remedy) for over in budget.overflows[:1]]
    if not fitting:
        raise _does_not_fit(spec, arch)
    rank = ranking(spec, arch)
    fitting.sort(key=lambda pair: rank(pair[0]))
    chosen, budget = fitting[0]
    rejected += [_second(spec, arch, chosen, tiling) for tiling, _ in fitting[1:]]
    return _plan_class(chosen)(asked, arch, chosen, budget, tuple(rejected))


def plan_tiling(spec: KernelSpec, tiling: Tiling) -> Plan:
    """The Plan of a specification with exactly this tiling, whatever the planner would take; nothing is rejected.

    Raises NotImplementedYet as plan_kernel does, DoesNotFit when the tiling's budget overflows.
    """
    arch = ARCHS[spec.arch]
    check_implemented(spec)
    budget = budget_of(spec.partial, arch, tiling)
    if not budget.fits:
        over = budget.overflows[0]
        raise DoesNotFit("tiling", str(tiling), f"does not fit: {over}", over.remedy)
    return _plan_class(tiling)(spec, arch, tiling, budget, ())


def _plan_class(tiling: Tiling) -> type[Plan]:
    return {"warpgroups": HopperPlan, "columns": ColumnsPlan}.get(tiling.strategy, Plan)


def strategies(spec: KernelSpec) -> tuple[str, ...]:
    """Strategies that the specification leaves open, by its vocabulary's names."""
    if spec.strategy != "auto":
        return (spec.strategy,)
    if spec.arch == "sm_90a":
        return ("columns",) if spec.p_staging == "smem" or not fits_tiles(spec) else ("warpgroups",)
    if fits_tiles(spec):
        able = (name for name in BY_SIMPLICITY if not any(_later(spec.model_copy(update={"strategy": name}))))
        return tuple(able) or ("tiles",)
    rows = ARCHS[spec.arch].mma_m  # of one CTA: all of them ask for one CTA with whole rows of O in it, half for a pair
    return {rows // 2: ("pair",), rows: ("chunks",)}.get(spec.tile_m, CHUNKED)


def fits_tiles(spec: KernelSpec) -> bool:
    """Whole tiles of K and V: O's columns are written by one MMA instruction a step of K."""
    return max(spec.head_dim, spec.v_dim) <= ARCHS[spec.arch].mma_n_max


def candidates(spec: KernelSpec, arch: Arch) -> list[Tiling]:
    """Every Tiling that the specification's fields leave open."""
    tile_ns = TILE_NS if spec.tile_n == "auto" else (spec.tile_n,)
    stagings = arch.p_stagings if spec.p_staging == "auto" else (spec.p_staging,)
    found: list[Tiling] = []
    for strategy in strategies(spec):
        if strategy == "tiles":
            found += _whole_tiles(spec, tile_ns, stagings)
        elif strategy == "warpgroups":
            found += warpgroup_tilings(spec, arch)
        elif strategy == "columns":
            found += column_tilings(spec, arch)
        elif strategy == "two_tiles":
            whole = _whole_tiles(spec, tile_ns, ("tmem",))
            found += [replace(t, strategy=strategy) for t in whole if not t.o_over_q]
        elif strategy == "two_ctas":
            whole = _whole_tiles(spec, tuple(n for n in tile_ns if n % PAIR_N_STEP == 0), ("tmem",))
            found += [replace(t, strategy=strategy) for t in whole if not t.o_over_q]
        else:
            places = tuple(p for p in stagings if p == "smem") if strategy == "pair" else stagings
            wide = tuple(n for n in tile_ns if strategy != "pair" or n % PAIR_N_STEP == 0)
            if spec.kv_shared and strategy != "pair" and spec.tile_n == "auto":
                wide = SHARED_TILE_NS
            found += chunked_tilings(spec, arch, strategy, wide, places, KV_STAGE_MAX)
    return found


def _whole_tiles(spec: KernelSpec, tile_ns: tuple[int, ...], stagings: tuple[str, ...]) -> list[Tiling]:
    stages = range(1, KV_STAGES_AUTO + 1) if spec.kv_stage == "auto" else (spec.kv_stage,)
    chunks, rows = o_chunks(spec), ARCHS[spec.arch].mma_m
    return [
        Tiling(rows, tile_n, kv_stages, staging, over_q, chunk)
        for tile_n in tile_ns
        for staging in stagings
        for kv_stages in stages
        for chunk in chunks
        for over_q in (False, True)
    ]


def o_chunks(spec: KernelSpec) -> list[int]:
    """Widths that O may be staged in: divisors of head_dim_v in steps of 16 columns, widest first."""
    return [c for c in range(spec.v_dim, 0, -O_CHUNK_STEP) if spec.v_dim % c == 0]


def ranking(spec: KernelSpec, arch: Arch) -> Callable[[Tiling], tuple]:
    """Sort key of candidates: the smallest is taken. The rules are in the module's docstring."""
    if strategies(spec) == ("warpgroups",) and spec.split_kv:
        return lambda tiling: split_preference(spec, arch, tiling)
    if strategies(spec) == ("warpgroups",):
        return lambda tiling: warpgroup_preference(spec, arch, tiling)
    if strategies(spec) == ("columns",):
        return lambda tiling: column_preference(spec, arch, tiling)
    if strategies(spec)[0] in WHOLE_TILES:
        places = {name: place for place, (name, _) in enumerate(_whole_strategies(spec, arch))}
        return lambda tiling: (places.get(tiling.strategy, len(places)), *preference(tiling))

    def by_cost(tiling: Tiling) -> tuple:
        cost, shape = cost_of(spec, arch, tiling), geometry(spec, arch, tiling)
        ahead = tiling.kv_stages * sum(shape.chunk_bytes) / 2 / cost.keys  # bytes in flight a key
        bytes_a_score = cost.load_bytes * cost.passes / cost.rows / cost.keys
        return (cost.score, bytes_a_score, -ahead, shape.boxes_a_tile, shape.chunks_a_tile)

    return by_cost


@lru_cache(maxsize=64)
def _whole_strategies(spec: KernelSpec, arch: Arch) -> list[tuple[str, Cost]]:
    """The strategies with whole tiles that fit, the one to take first, and what the best candidate of each costs."""
    best = {}
    for name in strategies(spec):
        tried = candidates(spec.model_copy(update={"strategy": name}), arch)
        fitting = [tiling for tiling in tried if budget_of(spec, arch, tiling).fits]
        if fitting:
            best[name] = min(fitting, key=preference)
    costs = {name: cost_of(spec, arch, tiling) for name, tiling in best.items()}
    order = sorted(best, key=lambda name: (best[name].kv_stages < 2, costs[name].score, BY_SIMPLICITY.index(name)))
    return [(name, costs[name]) for name in order]


def preference(tiling: Tiling) -> tuple:
    """Sort key for whole tiles of one strategy."""
    return (
        tiling.kv_stages < 2,
        -tiling.tile_n,
        tiling.p_staging != "tmem",
        -tiling.kv_stages,
        -tiling.o_chunk,
        tiling.o_over_q,
    )


_RULES = (  # one a component of `preference`: why the worse candidate is worse, and the field that forces it
    ("fits, but has fewer than two kv stages", "kv_stage"),
    ("fits, but has a smaller tile_n", "tile_n"),
    ("fits, but keeps P in shared memory", "p_staging"),
    ("fits, but has fewer kv stages", "kv_stage"),
    ("fits, but needs more epilogue steps", None),
    ("fits, but lays sO over sQ without need", None),
)


_COSTS = (  # one a component of `by_cost`
    "fits, but costs more: {} SM cycles a 128 x 128 block of scores, the chosen one {}",
    "fits at the same cost, but moves more bytes from L2",
    "fits at the same cost, but has fewer bytes in flight",
    "fits at the same cost, but loads more boxes a tile",
    "fits at the same cost, but waits for more chunks a tile",
)


def _second(spec: KernelSpec, arch: Arch, chosen: Tiling, tiling: Tiling) -> Rejected:
    """A candidate that fits and was not taken: by the first rule on which the chosen one is better."""
    if chosen.strategy in ("warpgroups", "columns"):
        return _second_on_hopper(spec, arch, chosen, tiling)
    if chosen.strategy not in WHOLE_TILES:
        rank = ranking(spec, arch)
        for reason, better, worse in zip(_COSTS, rank(chosen), rank(tiling), strict=True):
            if better != worse:
                name = "passes" if tiling.passes > 1 else tiling.strategy
                return Rejected(tiling, reason.format(round(worse), round(better)), f"strategy = {name} asks for it")
        return Rejected(tiling, "fits, and is as good", "none needed")
    if tiling.strategy != chosen.strategy:
        return _other_strategy(spec, arch, chosen, tiling)
    values = {"kv_stage": tiling.kv_stages, "tile_n": tiling.tile_n, "p_staging": tiling.p_staging}
    for (reason, field), better, worse in zip(_RULES, preference(chosen), preference(tiling), strict=True):
        if better != worse:
            remedy = f"{field} = {values[field]} asks for it" if field else "none needed"
            return Rejected(tiling, reason, remedy)
    raise AssertionError(f"{chosen} and {tiling} are the same candidate")


def _other_strategy(spec: KernelSpec, arch: Arch, chosen: Tiling, tiling: Tiling) -> Rejected:
    """A candidate with whole tiles of a strategy that was not taken: by what the strategies cost at their best."""
    costs = dict(_whole_strategies(spec, arch))
    better, worse = costs[chosen.strategy].score, costs[tiling.strategy].score
    reason = "fits, but has fewer than two kv stages" if better > worse else "fits at the same cost, but is less simple"
    if worse > better:
        reason = _COSTS[0].format(round(worse), round(better))
    return Rejected(tiling, reason, f"strategy = {tiling.strategy} asks for it")


_HOPPER_RULES = (  # one a component of `warpgroup_preference`, and the fields that force the worse candidate
    ("fits, but has fewer than two kv stages", ("kv_stage",)),
    ("fits, but cannot hold the query heads of a group in a tile", ("tile_m",)),
    ("fits, but another tile was measured to be faster", ("tile_m", "tile_n")),
    (
        "fits, but costs more by the model: {:.0f} SM cycles a 128 x 128 block of scores, the chosen one {:.0f}",
        ("tile_m", "tile_n"),
    ),
    ("fits, but has fewer kv stages", ("kv_stage",)),
    ("fits, but lays sO over sQ without need", ()),
)


_SPLIT_RULES = (  # one a component of `split_preference`
    *_HOPPER_RULES[:2],
    ("fits, but holds a part of a group's query heads", ("tile_m",)),
    ("fits, but has more query rows than a group needs", ("tile_m",)),
    ("fits, but the last KV tile takes longer", ("tile_n",)),
    ("fits, but has a smaller tile_n", ("tile_n",)),
    ("fits, but has fewer kv stages", ("kv_stage",)),
)


_COLUMN_RULES = (  # one a component of `column_preference`
    ("fits, but another tile was measured to be faster", ("tile_m", "tile_n")),
    ("fits, but the other cluster size is faster", ("tile_m",)),
    ("fits, but V in slices of another width, or within K's chunks, is faster", ()),
    ("fits, but QK waits for chunks of K that PV releases", ("tile_n", "kv_stage")),
    ("fits, but reads more of Q from shared memory", ("tile_n",)),
    ("fits, but holds fewer slices of V", ("kv_stage",)),
    ("fits, but threads store O, not TMA", ()),
    ("fits, but has a smaller tile_n", ("tile_n",)),
    ("fits, but holds fewer chunks of K", ("kv_stage",)),
)


def _second_on_hopper(spec: KernelSpec, arch: Arch, chosen: Tiling, tiling: Tiling) -> Rejected:
    values = {"kv_stage": tiling.kv_stages, "tile_m": tiling.tile_m, "tile_n": tiling.tile_n}
    rank = ranking(spec, arch)
    rules = {"warpgroups": _SPLIT_RULES if spec.split_kv else _HOPPER_RULES, "columns": _COLUMN_RULES}[chosen.strategy]
    for (reason, fields), better, worse in zip(rules, rank(chosen), rank(tiling), strict=True):
        if better != worse:
            remedy = ", ".join(f"{field} = {values[field]}" for field in fields)
            text = reason.format(worse * 128 * 128, better * 128 * 128)
            return Rejected(tiling, text, f"{remedy} asks for it" if remedy else "none needed")
    raise AssertionError(f"{chosen} and {tiling} are the same candidate")


def check_implemented(spec: KernelSpec) -> None:
    """Raise NotImplementedYet, naming the field, for what the vocabulary has and the template lacks."""
    arch = ARCHS[spec.arch]
    if spec.p_staging != "auto" and spec.p_staging not in arch.p_stagings:
        owner = {"register": "Hopper (sm_90a)", "tmem": "Blackwell (sm_100a)"}[spec.p_staging]
        limit = f"is for {owner} only; on {arch.name} P waits in {' or '.join(arch.p_stagings)}"
        raise NotImplementedYet("p_staging", spec.p_staging, limit, f'use "auto" or "{arch.p_stagings[0]}"')
    if spec.arch == "sm_90a":
        _check_hopper(spec, arch)
        return
    if spec.strategy in ("warpgroups", "columns"):
        raise NotImplementedYet("strategy", spec.strategy, "is for Hopper (sm_90a) only", 'use "auto"')
    if spec.pack_heads is True and arch.mma_m % spec.q_heads_per_kv:
        limit = f"a group of {spec.q_heads_per_kv} query heads does not divide the {arch.mma_m} rows of a tile"
        raise DoesNotFit("pack_heads", True, limit, 'use "auto" or false, or a group that is a power of two up to 128')
    if spec.split_kv:
        limit = f"not implemented for {spec.arch} yet"
        raise NotImplementedYet("split_kv", True, limit, 'leave it out (default: false), or use arch = "sm_90a"')
    for field, remedy in _later(spec):
        limit = f"not implemented for {spec.arch} yet"
        raise NotImplementedYet(field, getattr(spec, field), limit, remedy)


def _later(spec: KernelSpec) -> Iterator[tuple[str, str]]:
    """(field, remedy) of everything asked for that sm_100a's template does not have yet."""
    arch = ARCHS[spec.arch]
    if spec.kv_shared and spec.strategy == "two_ctas":
        yield "kv_shared", "leave it out (default: false), or whole tiles in one CTA (strategy = two_tiles)"
    if spec.strategy == "passes" and spec.v_dim < 2 * HEAD_DIM_STEP:
        yield "strategy", f'O has {spec.v_dim} columns, two passes need {2 * HEAD_DIM_STEP}: use "auto" or "chunks"'
    if spec.strategy == "passes" and spec.kv_shared and not any(shared_chunks(spec, arch, PASSES, KV_STAGE_MAX)):
        limit = f"K in chunks of which each pass has its own as V fills more than {KV_STAGE_MAX} buffers"
        yield "strategy", f'{limit}: use "auto" or "chunks"'
    if spec.strategy == "two_tiles":
        yield from _later_in_two_tiles(spec)
    if spec.strategy == "two_ctas":
        yield from _later_in_two_ctas(spec)
    if spec.strategy == "tiles" and not fits_tiles(spec):
        yield "strategy", 'one MMA writes all of O, head_dim and head_dim_v of at most 256: use "auto" or "chunks"'
    rows = {arch.mma_m // 2 if strategy == "pair" else arch.mma_m for strategy in strategies(spec)}
    if spec.tile_m != "auto" and spec.tile_m not in rows:
        yield "tile_m", f'use "auto" or {" or ".join(map(str, sorted(rows)))}'
    if strategies(spec) == ("pair",) and spec.v_dim < PAIR_N_STEP:
        field = "strategy" if spec.strategy == "pair" else "tile_m"
        yield field, f'O has {spec.v_dim} columns, a pair halves {PAIR_N_STEP}: use "auto" or another strategy'
    if strategies(spec) == ("pair",) and spec.p_staging == "tmem":
        yield "p_staging", 'a pair with 64 rows a CTA keeps P in shared memory: use "auto" or "smem"'
    if strategies(spec) in (("pair",), ("two_ctas",)) and spec.tile_n != "auto" and spec.tile_n % PAIR_N_STEP:
        step = PAIR_N_STEP
        yield "tile_n", f"a tcgen05.mma of two CTAs takes multiples of {step} keys: use a multiple of {step}"
    if spec.tile_n != "auto" and spec.tile_n > TILE_N_MAX:
        yield "tile_n", f'use "auto" or at most {TILE_N_MAX}'


def _check_hopper(spec: KernelSpec, arch: Arch) -> None:
    """check_implemented of sm_90a."""
    if spec.strategy not in ("auto", "warpgroups", "columns"):
        limit = "is for Blackwell (sm_100a) only"
        raise NotImplementedYet("strategy", spec.strategy, limit, 'use "auto", "warpgroups" or "columns"')
    if spec.p_staging == "smem" and spec.strategy == "warpgroups":
        limit = "with strategy = warpgroups P goes from the registers of S to PV"
        raise NotImplementedYet("p_staging", "smem", limit, 'use "auto" or "register", or strategy = columns')
    if spec.p_staging == "register" and strategies(spec) == ("columns",):
        limit = "with strategy = columns one warpgroup makes P and two others multiply it, through shared memory"
        remedy = f'use "auto" or "smem", or strategy = warpgroups (head_dim of at most {arch.mma_n_max})'
        raise NotImplementedYet("p_staging", "register", limit, remedy)
    if strategies(spec) == ("columns",):
        for field, limit, remedy in check_columns(spec, arch):
            raise NotImplementedYet(field, getattr(spec, field), f"not implemented for sm_90a yet: {limit}", remedy)
    elif not fits_tiles(spec):
        limit = f"one warpgroup holds all of O: head_dim and head_dim_v of at most {arch.mma_n_max}"
        raise NotImplementedYet("strategy", spec.strategy, f"not implemented for sm_90a yet: {limit}", 'use "columns"')
    if spec.tile_m != "auto" and spec.tile_m not in range(arch.mma_m, CONSUMERS_MAX * arch.mma_m + 1, arch.mma_m):
        rows = ", ".join(str(arch.mma_m * count) for count in range(1, CONSUMERS_MAX + 1))
        raise DoesNotFit("tile_m", spec.tile_m, f"a consumer warpgroup has {arch.mma_m} query rows", f"use {rows}")
    rows = range(arch.mma_m, CONSUMERS_MAX * arch.mma_m + 1, arch.mma_m) if spec.tile_m == "auto" else (spec.tile_m,)
    group = spec.q_heads_per_kv
    if spec.pack_heads is True and group > 1 and not any(can_pack(group, count, arch) for count in rows):
        limit = (
            f"a group of {group} query heads does not fold into {' or '.join(map(str, rows))} rows of a tile, 64 a box"
        )
        raise DoesNotFit("pack_heads", True, limit, 'use "auto" or false, or another tile_m')


def _later_in_two_tiles(spec: KernelSpec) -> Iterator[tuple[str, str]]:
    one = "or one query tile (strategy = tiles)"
    if spec.v_dim > ARCHS[spec.arch].mma_n_max:
        yield "head_dim_v", f"at most {ARCHS[spec.arch].mma_n_max}, {one}"
    if spec.p_staging == "smem":
        yield "p_staging", f'P lies over S in tensor memory: use "auto" or "tmem", {one}'


def _later_in_two_ctas(spec: KernelSpec) -> Iterator[tuple[str, str]]:
    one = "or one query tile (strategy = tiles)"
    if max(spec.head_dim, spec.v_dim) > ARCHS[spec.arch].mma_n_max:
        field = "head_dim_v" if spec.head_dim <= ARCHS[spec.arch].mma_n_max else "head_dim"
        yield field, f"at most {ARCHS[spec.arch].mma_n_max}, or a CTA pair with K and V in chunks (strategy = pair)"
    if spec.p_staging == "smem":
        yield "p_staging", f'P lies over S in tensor memory: use "auto" or "tmem", {one}'


def _does_not_fit(spec: KernelSpec, arch: Arch) -> DoesNotFit:
    """Names the fields that the specification sets and that alone would make it fit; head_dim when none would."""
    tried = [(budget_of(spec, arch, tiling), tiling) for tiling in candidates(spec, arch)]
    closest, tiling = min(tried, key=lambda pair: (len(pair[0].overflows), pair[0].overflows[0].over))
    over = closest.overflows[0]
    limit = f"does not fit; the closest is {tiling}, {over}"
    cures = dict(_cures(spec, arch))
    if not cures:
        return DoesNotFit("head_dim", spec.head_dim, limit, over.remedy)
    field = next(iter(cures))
    return DoesNotFit(field, getattr(spec, field), limit, ", or ".join(cures.values()))


def _cures(spec: KernelSpec, arch: Arch) -> Iterator[tuple[str, str]]:
    """(field, what to set it to) for each field whose change alone makes the specification fit."""
    if spec.kv_stage != "auto" and (deepest := deepest_kv_stage(spec, arch)):
        yield "kv_stage", f"the deepest that fits is {deepest}"
    if spec.arch == "sm_100a" and spec.tile_m == arch.mma_m and spec.strategy == "auto":
        for strategy in CHUNKED:
            if _any_fits(spec.model_copy(update={"strategy": strategy, "tile_m": "auto"}), arch):
                yield "tile_m", f"leave it out: strategy = {strategy} fits"
                break
    others = (*(WHOLE_TILES if fits_tiles(spec) else ()), *CHUNKED)
    choices = {"strategy": others, "p_staging": arch.p_stagings, "tile_n": TILE_NS}
    if spec.arch == "sm_90a":
        choices = {"tile_n": range(TILE_NS[0], 0, -HEAD_DIM_STEP), "tile_m": (arch.mma_m * 2, arch.mma_m)}
    for field, values in choices.items():
        if getattr(spec, field) != "auto":
            fitting = (v for v in values if _any_fits(spec.model_copy(update={field: v}), arch))
            if (value := next(fitting, None)) is not None:
                yield field, f"{field} = {value} fits"


def _any_fits(spec: KernelSpec, arch: Arch) -> bool:
    """Whether the template has what is asked for, and some candidate of it fits."""
    try:
        check_implemented(spec)
    except SpecError:
        return False
    return any(budget_of(spec, arch, tiling).fits for tiling in candidates(spec, arch))


def deepest_kv_stage(spec: KernelSpec, arch: Arch) -> int:
    """The most kv stages that fit with the specification's other fields as they are; 0 when none does."""
    for depth in range(spec.kv_stage_max, 0, -1):
        if _any_fits(spec.model_copy(update={"kv_stage": depth}), arch):
            return depth
    return 0
