"""test_drawn.py for K and V in chunks: drawn specifications verify, or are refused for a reason of their own.

`BESPOKE_DRAWN=200 pytest tests/test_drawn_wide.py -m slow -n 0` draws so many kernels, from BESPOKE_DRAWN_SEED.
"""

import os

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from test_drawn import COLUMNS, QUIET, ROWS

from generator.compile import compile_kernel
from generator.plan import plan_kernel
from generator.spec import SpecError, load_spec
from generator.verify import verify_kernel

IN_SUITE = 4


def specifications(draw):
    """Fields, most of them left alone; some of the combinations cannot be."""
    fields = {"head_dim": draw(st.sampled_from([*range(272, 513, 16), 576]))}
    optional = {
        "head_dim_v": st.sampled_from(range(16, 513, 16)),
        "strategy": st.sampled_from(["chunks", "passes", "pair"]),
        "dtype": st.just("fp16"),
        "q_heads_per_kv": st.sampled_from([2, 3, 8, 128]),
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
        "tile_n": st.sampled_from([32, 64]),
    }
    for name, values in optional.items():
        if draw(st.integers(0, 9)) < (5 if name in ("strategy", "kv_shared", "kv_sources") else 3):
            fields[name] = draw(values)
    if fields["head_dim"] == 576 and draw(st.integers(0, 9)) < 9:
        fields["head_dim_v"] = 512
    if "kv_shared" in fields and draw(st.booleans()):
        fields.pop("tile_n", None)
    if "limit2" in fields and draw(st.booleans()):
        fields["kv_sources"] = 2
    return fields


@st.composite
def cases(draw):
    fields = specifications(draw)
    group, rows = fields.get("q_heads_per_kv", 1), st.sampled_from([1, 2, 65, 127, 128, 129, 200])
    queries = draw(rows if group < 8 else st.integers(1, 17 if group < 128 else 3))
    return fields, (draw(st.integers(1, 2)), group, 1, queries, draw(rows), draw(rows))


def reasons(fields):
    """Why there can be no such kernel: every reason that applies, with the field that is to blame."""
    d, strategy = fields["head_dim"], fields.get("strategy", "auto")
    dv, shared = fields.get("head_dim_v", d), fields.get("kv_shared", False)
    if d > 512 and dv != 512:
        yield from ("head_dim", "head_dim_v")
    if dv > 512:
        yield "head_dim_v"
    if fields.get("output") == "unnormalized" and fields.get("lse") is False:
        yield "lse"
    if shared and dv > d:
        yield "kv_shared"
    if fields.get("limit2") and fields.get("kv_sources", 1) == 1:
        yield "limit2"
    if fields.get("pack_heads") is True and ROWS % fields.get("q_heads_per_kv", 1):
        yield "pack_heads"
    if strategy == "pair" and fields.get("p_staging") == "tmem":
        yield "p_staging"
    if strategy == "passes" and (dv < 32 or shared and dv == 32):
        yield "strategy"  # nothing for the second pass; or chunks of 16 columns, of which 17 or more are too many
    if strategy == "chunks":
        n = fields.get("tile_n", 16)
        columns = dv + n + (n // 2 if fields.get("p_staging") == "tmem" else 0)
        if columns > COLUMNS:
            yield from ("strategy", "tile_n", "p_staging")


def may_be_refused(fields):
    """Where the sum above is too coarse: O in whole chunks or groups, and two K tiles in shared memory."""
    chunks = fields.get("strategy") == "chunks"
    wide = fields.get("head_dim_v", fields["head_dim"]) > 320
    return chunks and wide or (fields.get("kv_shared") and "tile_n" in fields)


def outcome(fields, shape):
    """ "verified" or "refused"; fails where neither is right. shape: None for the plan alone."""
    expected = set(reasons(fields))
    try:
        plan = plan_kernel(load_spec(fields))
    except SpecError as error:
        coarse = {"strategy", "tile_n", "p_staging"} if may_be_refused(fields) else set()
        assert error.field in expected | coarse, f"{fields}: refused without need: {error}"
        assert error.remedy and error.limit
        return "refused"
    assert not expected, f"{fields}: should have been refused for {expected}"
    assert fields.get("p_staging", plan.p_staging) == plan.p_staging
    if shape is not None:
        report = verify_kernel(compile_kernel(plan), shape)
        assert report.passed, f"{fields} {shape}: {report}"
        assert report.tiles.visited == report.tiles.needed
    return "verified"


@seed(20261128)
@settings(max_examples=IN_SUITE, **QUIET)
@given(cases())
def test_a_drawn_kernel_verifies_or_is_refused_for_a_reason(case):
    outcome(*case)


@settings(max_examples=200, **QUIET)
@given(st.composite(specifications)())
def test_the_planner_refuses_what_the_other_arithmetic_does(fields):
    outcome(fields, None)


@pytest.mark.slow
@pytest.mark.skipif("BESPOKE_DRAWN" not in os.environ, reason="takes minutes: BESPOKE_DRAWN=200 asks for so many cases")
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
