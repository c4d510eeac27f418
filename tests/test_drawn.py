"""Drawn specifications and shapes: each verifies, or is refused for a reason that a second arithmetic confirms.

That arithmetic (drawn_arithmetic.py) shares nothing with the planner. The suite draws a few cases from a fixed seed;
`BESPOKE_DRAWN=500 pytest tests/test_drawn.py -m slow -n 0` draws so many of them from BESPOKE_DRAWN_SEED (default 1)
and says how many verified and how many were refused, by strategy.
"""

import os
from collections import Counter

import pytest
from drawn_arithmetic import HOPPER, HOPPER_WIDE, STRATEGIES, TILES, WIDE, reasons
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from generator.compile import compile_kernel
from generator.plan import plan_kernel
from generator.spec import SpecError, load_spec
from generator.verify import verify_kernel

IN_SUITE = 6
RARE = {"limit2": 1, "tile_m": 1}  # of ten: most combinations with them are refused
RARE_IN = {
    "two_tiles": {"p_staging": 1},
    "two_ctas": {"p_staging": 1, "kv_shared": 1},
    HOPPER: {"p_staging": 1, "tile_m": 3},
    HOPPER_WIDE: {"p_staging": 1, "tile_m": 2, "tile_n": 2, "kv_stage": 2},
}
NARROW, BROAD = range(16, 257, 16), (*range(272, 513, 16), 576)


def specifications(draw, strategy=None):
    """Fields, with this strategy or any, most of them left alone; some of the combinations cannot be. HOPPER's and
    HOPPER_WIDE's are of sm_90a, where it may be left out, and a few ask for a strategy of sm_100a.
    """
    strategy = strategy or draw(st.sampled_from(STRATEGIES))
    hopper, own = strategy in (HOPPER, HOPPER_WIDE), strategy
    wide_ones = 1 if strategy in (*TILES, HOPPER) else 4  # of ten: whole tiles refuse them
    head_dims = [st.sampled_from(BROAD if draw(st.integers(0, 9)) < wide_ones else NARROW) for _ in range(2)]
    fields = {"head_dim": draw(head_dims[0])}
    if hopper:
        fields["arch"] = "sm_90a"
        strategy = draw(st.sampled_from([own, *["auto"] * 8, draw(st.sampled_from((*TILES, *WIDE)))]))
    if strategy != "auto":
        fields["strategy"] = strategy
    if fields["head_dim"] > 512 and draw(st.integers(0, 4)):
        fields["head_dim_v"] = 512
    optional = {
        "head_dim_v": head_dims[1].filter(lambda d: d <= 512),
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
        "kv_stage": st.integers(1, 4) | st.sampled_from([8, 16]),
        "tile_m": st.sampled_from([64, 128]),
        "tile_n": st.sampled_from(range(16, 129, 16)),
    }
    if hopper:
        optional |= {
            "q_heads_per_kv": st.sampled_from([2, 3, 4, 5, 6, 8, 16, 128, 192]),
            "p_staging": st.sampled_from(["register", "register", "tmem", "smem"]),
            "tile_m": st.sampled_from([64, 64, 128, 128, 192, 192, 256, 96]),
            "tile_n": st.sampled_from(range(16, 257, 16)),
            "split_kv": st.just(True),
        }
    for name, values in optional.items():
        rare = RARE | RARE_IN.get(own if hopper else strategy, {})
        if name not in fields and draw(st.integers(0, 9)) < rare.get(name, 3):
            fields[name] = draw(values)
    wide = max(fields["head_dim"], fields.get("head_dim_v", 0)) > NARROW[-1]
    if hopper and (wide or fields.get("p_staging") == "smem") != (own == HOPPER_WIDE):
        fields.setdefault("strategy", own)  # left out, the other one is taken there
    if "limit2" in fields and draw(st.booleans()):
        fields["kv_sources"] = 2
    return fields


def shapes(draw, fields):
    group, rows = fields.get("q_heads_per_kv", 1), st.sampled_from([1, 2, 64, 65, 127, 128, 129, 193, 200, 256, 257])
    kv_heads = draw(st.integers(1, 2 if group < 16 else 1))
    queries = draw(rows if group < 16 else st.integers(1, 3))
    return (draw(st.integers(1, 3)), group * kv_heads, kv_heads, queries, draw(rows), draw(rows))


@st.composite
def cases(draw, strategy=None):
    fields = specifications(draw, strategy)
    return fields, shapes(draw, fields)


def assert_obeyed(fields, plan):
    """What the specification sets is not searched over."""
    chosen = {
        "strategy": "passes" if plan.tiling.passes > 1 else plan.tiling.strategy,
        "p_staging": plan.tiling.p_staging,
        "kv_stage": plan.tiling.kv_stages,
        "tile_m": plan.tiling.tile_m,
        "tile_n": plan.tiling.tile_n,
    }
    assert {name: fields.get(name, value) for name, value in chosen.items()} == chosen, f"{fields}: {plan.tiling}"


def outcome(fields, shape):
    """ "verified" or "refused"; fails where neither is right."""
    expected = reasons(fields)
    try:
        plan = plan_kernel(load_spec(fields))
    except SpecError as error:
        assert error.field in expected, f"{fields}: refused without need: {error}"
        assert error.remedy and error.limit
        return "refused"
    assert not expected, f"{fields}: should have been refused for {expected}"
    assert_obeyed(fields, plan)
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
    expected = reasons(fields)
    try:
        assert_obeyed(fields, plan_kernel(load_spec(fields)))
    except SpecError as error:
        assert error.field in expected
    else:
        assert not expected


@pytest.mark.slow
@pytest.mark.skipif("BESPOKE_DRAWN" not in os.environ, reason="takes minutes: BESPOKE_DRAWN=500 asks for so many cases")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_many_drawn_kernels(strategy, capsys):
    """As many of each strategy."""
    count = -(-int(os.environ["BESPOKE_DRAWN"]) // len(STRATEGIES))
    number, tally = int(os.environ.get("BESPOKE_DRAWN_SEED", "1")), Counter()

    @seed(number)
    @settings(max_examples=count, **QUIET)
    @given(cases(strategy))
    def draw(case):
        tally[outcome(*case)] += 1

    draw()
    with capsys.disabled():
        print(f"\n{strategy}: {tally.total()} drawn from seed {number}, {dict(tally)}")
    assert tally["verified"] and tally["refused"]
