"""The barrier protocol of a plan as a table: who arrives, how many arrivals a phase takes, who waits, for which phase.

The counts are the Budget's, which the kernel's initialization is emitted from; j counts KV tiles, n those of all query
tiles of a persistent CTA, i chunks through the ring, in the order in which the MMA warp consumes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import Plan


@dataclass(frozen=True)
class Exchange:
    """One barrier. arrivals: that complete a phase, and the bytes where a TMA load completes it too."""

    barrier: str
    stages: int
    arrivals: str
    arrives: str
    waits: str
    phase: str


def protocol(plan: Plan) -> list[Exchange]:
    """Every mbarrier of the plan, then the barriers of the hardware, in the order of first use."""
    who = _Warps(plan)
    if plan.tiling.strategy == "warpgroups":
        told = _warpgroups(plan)
    elif plan.tiling.strategy == "columns":
        told = _columns(plan)
    elif plan.query_tiles == 2:
        told = _two_tiles(plan)
    else:
        told = _two_ctas(plan) if plan.two_ctas else {**_ring(plan, who), **_scores(who)}
    rows = []
    for bar in plan.budget.mbarriers:
        arrives, waits, phase, size = told[bar.name]
        arrivals = f"{bar.arrivals} and {size} bytes" if size else str(bar.arrivals)
        rows.append(Exchange(bar.name, bar.stages, arrivals, arrives, waits, phase))
    return rows + _hardware(plan)


class _Warps:
    """How the warps are called: in a pair, of which CTA."""

    def __init__(self, plan: Plan) -> None:
        pair = plan.ctas == 2
        self.load = "load warp and TMA of each CTA, at the even CTA" if pair else "load warp and TMA"
        self.loader = "load warp of each CTA" if pair else "load warp"
        self.mma = "MMA warp of the even CTA" if pair else "MMA warp"
        self.commit = "tcgen05.commit, multicast to both CTAs," if pair else "tcgen05.commit"
        self.softmax = (
            "8 softmax warps of both CTAs, one lane each, at the even CTA,"
            if pair
            else "4 softmax warps, one lane each,"
        )
        self.readers = "softmax warps of each CTA" if pair else "softmax warps"


Told = dict[str, tuple[str, str, str, int | str]]  # name -> arrives, waits, phase, bytes (0: no load)


def _ring(plan: Plan, who: _Warps) -> Told:
    n, layouts, tma = plan.kv_stages, plan.layouts, who.load
    parity = f"parity of i div {n}, buffer i mod {n}"
    first = f"opposite parity of i div {n}: passes at once in the first round"
    if plan.tiling.strategy != "tiles":
        size = " or ".join(map(str, dict.fromkeys(plan.shape.loaded_bytes)))
        full, freed = "before the MMAs of chunk i", "after the MMAs of chunk i"
        if plan.shape.kept:
            full, freed = "before QK of chunk i", "after the MMAs of chunk i: of QK, or of PV where it is V's too"
        return {
            "q_full": (tma, f"{who.mma}, once", "0", plan.budget.buffer("sQ").bytes * plan.shape.ctas),
            "ring_full": (tma, f"{who.mma}, {full}", parity, size),
            "ring_empty": (
                f"{who.commit} {freed}",
                f"{who.loader}, before loading chunk i",
                first,
                0,
            ),
        }
    parity, first = parity.replace("buffer", "stage").replace("i ", "j "), first.replace("i div", "j div")
    found: Told = {"q_full": (tma, f"{who.mma}, once", "0", layouts["sQ"].bytes)}
    for name, gemm in (("k", "QK"), ("v", "PV")):
        size, last = layouts[f"s{name.upper()}"].bytes, "PV" if plan.spec.kv_shared else gemm
        found[f"{name}_full"] = (tma, f"{who.mma}, before {gemm} j", parity, size)
        found[f"{name}_empty"] = (f"{who.commit} after {last} j", f"{who.loader}, before loading tile j", first, 0)
    return found


def _two_tiles(plan: Plan) -> Told:
    """Barriers without "of tile i" serve both query tiles: j counts what the CTA loads. With it i is a query tile, and
    j counts what that sees. Both go on from one turn of a persistent CTA to the next.
    """
    n, layouts = plan.kv_stages, plan.layouts
    parity, first = f"parity of j div {n}, stage j mod {n}", f"opposite parity of j div {n}: passes at once at first"
    once = "parity of the query tiles before that see any key"
    told: Told = {
        "q_full": ("load warp and TMA, Q i", "MMA warp, before a query tile's first QK", once, layouts["sQ"].bytes),
        "q_empty": (
            "tcgen05.commit after a query tile's last QK",
            "load warp, before loading the next Q i",
            "opposite parity of them: passes at once for the first",
            0,
        ),
    }
    for name, gemm in (("k", "QK"), ("v", "PV")):
        size, last = layouts[f"s{name.upper()}"].bytes, "PV" if plan.spec.kv_shared else gemm
        told[f"{name}_full"] = ("load warp and TMA", f"MMA warp, before {gemm} j", parity, size)
        told[f"{name}_empty"] = (f"tcgen05.commit after {last} j of both", "load warp, before loading tile j", first, 0)
    softmax = "4 softmax warps of tile i, one lane each,"
    told |= {
        "s_full": (
            "tcgen05.commit after QK j of tile i",
            "softmax warps of tile i, before reading S j",
            "parity of j",
            0,
        ),
        "p_full": (
            f"{softmax} when P j is written, 4 correction warps, one lane each, when O is rescaled for it",
            "MMA warp, before PV j of tile i",
            "parity of j",
            0,
        ),
        "factor_full": (
            f"{softmax} when the factors for tile j are stored",
            "correction warps, before p_full of j",
            "parity of j",
            0,
        ),
        "o_full": (
            "tcgen05.commit after a query tile's last PV",
            "correction warps, before O of tile i leaves",
            once,
            0,
        ),
        "sum_full": (
            f"{softmax} after the last KV tile of a turn",
            "correction warps, before O of tile i leaves",
            "parity of the turn",
            0,
        ),
        "sum_empty": (
            "4 correction warps, one lane each, when they have read them",
            "softmax warps of tile i, before they write the next ones",
            "opposite parity of the turn: passes at once in the first",
            0,
        ),
    }
    return told


def _warpgroups(plan: Plan) -> Told:
    """n counts the KV tiles of all query tiles of the CTA, whichever source they are of. Every consumer reads every K
    and V tile, but a Q of its own.
    """
    stages, layouts = plan.kv_stages, plan.layouts
    parity = f"parity of n div {stages}, stage n mod {stages}"
    first = f"opposite parity of n div {stages}: passes at once in the first round"
    each = "one lane of each warp of every consumer,"
    freed = (
        "first warp of consumer i, one lane, when the store of O, which lies over Q, has read it"
        if plan.o_over_q
        else "one lane of each warp of consumer i, after its last QK of a query tile"
    )
    turn, q_bytes = "parity of the turn", layouts["sQ"].bytes
    told: Told = {
        "q_full": ("load warp and TMA, Q i", "consumer i, at the start of a query tile", turn, q_bytes),
        "q_empty": (freed, "load warp, before loading Q i", f"opposite {turn}: passes at once in the first", 0),
    }
    for name, gemm in (("k", "QK"), ("v", "PV")):
        size, last = layouts[f"s{name.upper()}"].bytes, "PV" if plan.spec.kv_shared else gemm
        told[f"{name}_full"] = ("load warp and TMA", f"each consumer, before {gemm} n", parity, size)
        told[f"{name}_empty"] = (f"{each} after {last} n", "load warp, before loading tile n", first, 0)
    return told


def _columns(plan: Plan) -> Told:
    """Of each ring n counts what goes through it: chunks of Q, of K, slices of V, KV tiles. In a cluster each CTA's
    load warps fill half of every piece of K and V in both, and a piece is free once both have read it.
    """
    both = ", of both CTAs," if plan.cluster > 1 else ""
    loader = "load warps and TMA of both CTAs" if plan.cluster > 1 else "load warp and TMA"
    scores, outputs = "one lane of each score warp", "one lane of each output warp"

    def ring(count: int) -> tuple[str, str]:
        at = f"n div {count}"
        return f"parity of {at}, stage n mod {count}", f"opposite parity of {at}: passes at once in the first round"

    (q, q_first), (k, k_first) = (ring(n) for n in (plan.q_stages, plan.kv_stages))
    tile, tile_first = ring(plan.p_stages)
    read = "when it is in registers, or after the last QK of a query tile"
    if plan.separate_v:
        (v, v_first), waits, freed = ring(plan.v_stages), "before QK of chunk n", f"{scores}{both} after QK of chunk n"
        of_v = {
            "v_full": (loader, "output warps, before PV of slice n", v, plan.v_slice_bytes),
            "v_empty": (f"{outputs}{both} after PV of slice n", "second load warp, before loading slice n", v_first, 0),
        }
    else:
        waits, of_v = "before QK of chunk n; output warps by p_full", {}
        freed = f"{outputs} of a half{both} after PV of chunk n, or of each score warp after QK where it is not V"
        k, k_first = (f"{said}, of parts n of {plan.part_chunks} chunks" for said in ring(plan.ring_parts))
        if plan.rest_chunks:
            k += "; what is not V: parity of the KV tile"
            k_first += "; what is not V: opposite parity of the KV tile"
    waiting = "the second half of " if plan.pv_waits_at else ""
    known = "the last step of QK of tile n + 1 begun" if plan.separate_v else "after QK of tile n + 1"
    return of_v | {
        "q_full": ("load warp and TMA", "score warps, at the start of a query tile", q, plan.q_chunk_bytes),
        "q_empty": (f"{scores}, {read}", "load warp, before loading chunk n", q_first, 0),
        "k_full": (loader, f"score warps, {waits}", k, plan.k_chunk_bytes),
        "k_empty": (freed, "load warp, before loading chunk n", k_first, 0),
        "p_full": (f"{scores}, when P and factors are written", "output warps, before PV of KV tile n", tile, 0),
        "p_empty": (f"{outputs}, after PV of KV tile n", "score warps, before writing P of tile n", tile_first, 0),
        "scored": (f"{scores}, {known}", f"output warps, before {waiting}PV n", tile, 0),
    }


def _two_ctas(plan: Plan) -> Told:
    """Bytes are of both CTAs."""
    n, layouts, who = plan.kv_stages, plan.layouts, _Warps(plan)
    parity, first = f"parity of n div {n}, stage n mod {n}", f"opposite parity of n div {n}: passes at once at first"
    slot = "parity of n div 2, slot n mod 2"
    q_bytes = plan.ctas * layouts["sQ"].bytes
    told: Told = {
        "q_full": (who.load, f"{who.mma}, before the first QK of a query tile", "parity of the query tile", q_bytes),
        "q_empty": (
            f"{who.commit} after the last QK of a query tile",
            f"{who.loader}, before loading Q",
            "opposite parity of the query tile: passes at once for the first",
            0,
        ),
    }
    for name, gemm in (("k", "QK"), ("v", "PV")):
        size = plan.ctas * layouts[f"s{name.upper()}"].bytes
        told[f"{name}_full"] = (who.load, f"{who.mma}, before {gemm} n", parity, size)
        told[f"{name}_empty"] = (f"{who.commit} after {gemm} n", f"{who.loader}, before loading tile n", first, 0)
    rows = "4 softmax warps of each CTA, one lane each,"
    told |= {
        "s_full": (f"{who.commit} after QK n", "softmax warps of each CTA, before reading S n", slot, 0),
        "p_full": (
            f"{who.softmax} when P n is written, 8 correction warps alike when O is rescaled for it",
            f"{who.mma}, before PV n",
            slot,
            0,
        ),
        "factor_full": (f"{rows} when factors for tile n are stored", "correction warps, before p_full of n", slot, 0),
        "o_full": (
            f"{who.commit} after PV n",
            "correction warps, before they rescale O for tile n + 1 or O leaves",
            slot,
            0,
        ),
        "sum_full": (f"{rows} after the last KV tile", "correction warps, before O leaves", "parity of the turn", 0),
        "sum_empty": (
            "4 correction warps of each CTA, one lane each, when they have read them",
            "softmax warps, before they write the next ones",
            "opposite parity of the turn: passes at once in the first",
            0,
        ),
    }
    return told


def _scores(who: _Warps) -> Told:
    return {
        "s_full": (f"{who.commit} after QK j", f"{who.readers}, before reading S j", "parity of j", 0),
        "s_empty": (
            f"{who.softmax} when S j is in registers",
            f"{who.mma}, before QK j",
            "opposite parity of j: of S j - 1; passes at once for tile 0",
            0,
        ),
        "p_full": (f"{who.softmax} when P j is written and O rescaled", f"{who.mma}, before PV j", "parity of j", 0),
        "o_full": (
            f"{who.commit} after PV j",
            f"{who.readers}, before rescaling O for tile j and before O leaves",
            "opposite parity of j: of PV j - 1; passes at once for tile 0",
            0,
        ),
    }


def _hardware(plan: Plan) -> list[Exchange]:
    threads, rows = plan.budget.threads, []
    told = _named(plan)
    for bar in plan.budget.named_barriers:
        who = told.get(bar.name, ("its threads", "its threads", bar.reason))
        rows.append(Exchange(f"bar.sync {bar.id}", 1, str(bar.threads), *who))
    if plan.ctas == 2:
        why = "mbarriers of both CTAs initialized; at the end, TMEM and mbarriers of both no longer used"
        rows.append(Exchange("barrier.cluster", 1, str(2 * threads), "every thread of the pair", "the same", why))
    return rows


def _named(plan: Plan) -> dict[str, tuple[str, str, str]]:
    """Named barriers of which not every thread both arrives and waits: name -> arrives, waits, why."""
    if plan.tiling.strategy != "warpgroups":
        return {}
    told, count = {}, plan.consumers
    for i in range(count if count > 1 else 0):
        before = (i - 1) % count
        told[f"turn {i}"] = (
            f"consumer {before}, which has issued PV (bar.arrive), and consumer {i}"
            + (f"; at the start consumer {before} too" if i == 0 else ""),
            f"consumer {i}, before QK of each KV tile but a query tile's first",
            f"consumer {i} issues its MMAs after consumer {before}"
            + ("" if plan.takes_turns else "; not used: this plan takes no turns"),
        )
    for i in range(count):
        told[f"consumer {i}"] = (
            f"the 128 threads of consumer {i}",
            "the same",
            "before O of a query tile is staged, its last store has read sO; before it is stored, it is staged"
            if not plan.spec.unnormalized
            else "not used: O goes from registers to global memory",
        )
    return told
