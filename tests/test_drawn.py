"""Drawn specifications and shapes: each verifies, or is refused for a reason that arithmetic of its own confirms.

The arithmetic here shares nothing with the planner: it adds up what a CTA must hold and compares with the limits as
numbers. The suite draws a few cases from a fixed seed; `BESPOKE_DRAWN=500 pytest tests/test_drawn.py -m slow -n 0`
draws so many of them from BESPOKE_DRAWN_SEED (default 1) and says how many verified and how many were refused;
BESPOKE_DRAWN_STRATEGIES (default tiles,two_tiles) says of which.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from generator.compile import compile_kernel
from generator.plan import plan_kernel
from generator.spec import SpecError, load_spec
from generator.verify import verify_kernel

SMEM, COLUMNS, ROWS = 232448, 512, 128
IN_SUITE = 6
STRATEGIES = os.environ.get("BESPOKE_DRAWN_STRATEGIES", "tiles,two_tiles").split(",")


def specifications(draw):
    """Fields, most of them left alone; some of the combinations cannot be."""
    strategy = draw(st.sampled_from(STRATEGIES))
    fields = {"head_dim": draw(st.sampled_from(range(16, 257, 16))), "strategy": strategy}
    optional = {
        "head_dim_v": st.sampled_from(range(16, 257, 16)),
        "dtype": st.just("fp16"),
        "q_heads_per_kv": st.sampled_from([2, 3, 4, 5, 8, 16, 128]),
        "pack_heads": st.booleans(),
        "causal": st.just(True),
        "window_left": st.integers(0, 200) | st.just(10**6),
        "window_right": st.integers(0, 200) | st.just(10**6),
        "seqlens": st.just(True),
        "sink": st.just(True),
        "kv_sources": st.just(2),
        "limit2": st.just(True),
        "kv_shared": st.just(True),
        "output": st.just("unnormalized"),
        "lse": st.just(False),
        "p_staging": st.sampled_from(["tmem", "smem"]),
        "kv_stage": st.integers(1, 4),
        "tile_n": st.sampled_from(range(16, 129, 16)),
    }
    for name, values in optional.items():
        if draw(st.integers(0, 9)) < 3:
            fields[name] = draw(values)
    if "limit2" in fields and draw(st.booleans()):
        fields["kv_sources"] = 2
    return fields


def shapes(draw, fields):
    group, rows = fields.get("q_heads_per_kv", 1), st.sampled_from([1, 2, 127, 128, 129, 200, 256, 257])
    kv_heads = draw(st.integers(1, 2 if group < 16 else 1))
    queries = draw(rows if group < 16 else st.integers(1, 3))
    return (draw(st.integers(1, 3)), group * kv_heads, kv_heads, queries, draw(rows), draw(rows))


@st.composite
def cases(draw):
    fields = specifications(draw)
    return fields, shapes(draw, fields)


def reasons(fields):
    """Why there can be no such kernel: every reason that applies, with the field that is to blame."""
    d = fields["head_dim"]
    dv, group = fields.get("head_dim_v", d), fields.get("q_heads_per_kv", 1)
    shared, unnormalized = fields.get("kv_shared", False), fields.get("output") == "unnormalized"
    if unnormalized and fields.get("lse") is False:
        yield "lse"
    if shared and dv > d:
        yield "kv_shared"
    if fields.get("limit2") and fields.get("kv_sources", 1) == 1:
        yield "limit2"
    if fields.get("pack_heads") is True and ROWS % group:
        yield "pack_heads"
    tiles = [fields["tile_n"]] if "tile_n" in fields else [128, 64, 32, 16]
    stages = [fields["kv_stage"]] if "kv_stage" in fields else [1, 2, 3]
    stagings = [fields["p_staging"]] if "p_staging" in fields else ["tmem", "smem"]
    every = [(n, s, p) for n in tiles for s in stages for p in stagings]
    out_bytes = 4 if unnormalized else 2
    if fields["strategy"] == "two_tiles":
        if stagings == ["smem"]:
            yield "p_staging"
        if not any(two_fit(d, dv, n, s, shared, out_bytes) for n in tiles for s in stages):
            yield from ("kv_stage", "tile_n", "strategy", "head_dim")
    elif not any(fits(d, dv, n, s, p, shared, out_bytes) for n, s, p in every):
        yield from ("kv_stage", "tile_n", "p_staging", "head_dim")


def fits(d, dv, n, stages, staging, shared, out_bytes):
    """Bytes and columns of one CTA, with O staged 16 columns at a time, or in any whole part of Q's place."""
    if shared and stages == 1:
        return False  # the next QK would wait for a stage that only the PV after it frees
    columns = n + (n // 2 if staging == "tmem" else 0) + dv
    allocated = 32
    while allocated < columns:
        allocated *= 2
    kib = lambda size: -(-size // 1024) * 1024  # noqa: E731
    q, k, v = ROWS * d * 2, stages * n * d * 2, 0 if shared else stages * n * dv * 2
    p = ROWS * n * 2 if staging == "smem" else 0
    own = 1024 + sum(map(kib, (q, k, v, p))) + kib(ROWS * 16 * out_bytes)
    over_q = own - kib(ROWS * 16 * out_bytes)  # 16 columns of O are never more than Q's 16 or more
    in_q = over_q if ROWS * 16 * out_bytes <= q else own
    return allocated <= COLUMNS and min(own, in_q) <= SMEM


def two_fit(d, dv, n, stages, shared, out_bytes):
    """The same of two query tiles: S and O twice, P over S, three floats a row besides."""
    if shared and stages == 1:
        return False
    kib = lambda size: -(-size // 1024) * 1024  # noqa: E731
    q, k, v = 2 * ROWS * d * 2, stages * n * d * 2, 0 if shared else stages * n * dv * 2
    o = 2 * ROWS * 16 * out_bytes
    in_q = 1024 + 2 * ROWS * 3 * 4 + sum(map(kib, (q, k, v)))
    return 2 * (n + dv) <= COLUMNS and (in_q if o <= q else in_q + kib(o)) <= SMEM


def outcome(fields, shape):
    """ "verified" or "refused"; fails where neither is right."""
    expected = set(reasons(fields))
    try:
        plan = plan_kernel(load_spec(fields))
    except SpecError as error:
        assert error.field in expected, f"{fields}: refused without need: {error}"
        assert error.remedy and error.limit
        return "refused"
    assert not expected, f"{fields}: should have been refused for {expected}"
    report = verify_kernel(compile_kernel(plan), shape)
    assert report.passed, f"{fields} {shape}: {report}"
    assert report.tiles.visited == report.tiles.needed
    return "verified"


QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "phases": (Phase.generate,)}


@seed(20261128)
@settings(max_examples=IN_SUITE, **QUIET)
@given(cases())
def test_a_drawn_kernel_verifies_or_is_refused_for_a_reason(case):
    outcome(*case)


@settings(max_examples=400, **QUIET)
@given(st.composite(specifications)())
def test_the_planner_refuses_what_the_other_arithmetic_does(fields):
    expected = set(reasons(fields))
    try:
        plan_kernel(load_spec(fields))
    except SpecError as error:
        assert error.field in expected
    else:
        assert not expected


@pytest.mark.slow
@pytest.mark.skipif("BESPOKE_DRAWN" not in os.environ, reason="takes minutes: BESPOKE_DRAWN=500 asks for so many cases")
def test_many_drawn_kernels(capsys):
    count, number = int(os.environ["BESPOKE_DRAWN"]), int(os.environ.get("BESPOKE_DRAWN_SEED", "1"))
    tally = {"verified": 0, "refused": 0}

    @seed(number)
    @settings(max_examples=count, **QUIET)
    @given(cases())
    def draw(case):
        tally[outcome(*case)] += 1

    draw()
    with capsys.disabled():
        print(f"\n{sum(tally.values())} drawn from seed {number}: {tally}")
    assert tally["verified"] and tally["refused"]
