"""Two KV sources in one launch beyond head_dim 256: against two launches that are merged, and with nothing to see."""

from types import SimpleNamespace

import numpy as np
import pytest

import generator
from generator.compile import compile_kernel
from generator.plan import plan_kernel
from generator.reference import attention, merge
from generator.spec import load_spec
from generator.tiles import count_tiles, seen_of
from generator.verify import COS_MIN, cosine, random_operands, relative_error, verify_kernel

SHAPE = (2, 8, 1, 20, 150, 90)
WINDOW = {"q_heads_per_kv": 8, "causal": True, "window_left": 40, "seqlens": True}
STRATEGIES = {
    "pair": {"head_dim": 512},
    "passes": {"head_dim": 512, "strategy": "passes"},
    "chunks": {"head_dim": 320},
    "chunks, V within K": {"head_dim": 320, "kv_shared": True},
    "passes, V within K": {"head_dim": 576, "head_dim_v": 512, "kv_shared": True, "strategy": "passes"},
    "pair, V within K": {"head_dim": 576, "head_dim_v": 512, "kv_shared": True},
}


def swept_but(*kept):
    """Every strategy, marked for the sweep where it is not kept in the default run."""
    return [pytest.param(name, marks=[pytest.mark.sweep] * (name not in kept)) for name in STRATEGIES]


def operands_of(spec):
    """random_operands whose K and V are normal throughout, so that their lengths can be changed."""
    operands = random_operands(spec, SHAPE, seed=3)
    rng = np.random.default_rng(0)
    for name in {"k", "v", "k2", "v2"} & set(operands):
        operands[name][:] = rng.standard_normal(operands[name].shape)
    return operands


def launched(fields, operands, **names):
    """The un-normalized kernel of these fields; names: of its arrays -> of ours."""
    kernel = generator.build(output="unnormalized", **fields)
    wanted = [parameter.name for parameter in generator.signature.inputs(kernel.spec)]
    o, lse, m = kernel(**{name: operands[names.get(name, name)] for name in wanted})
    return SimpleNamespace(o=o, lse=lse, m=m)


def exact_of(spec, operands):
    v = operands.get("v", operands["k"][..., : spec.v_dim])
    scale = spec.head_dim**-0.5
    return attention(operands["q"], operands["k"], v, scale, seen=seen_of(spec, operands))


@pytest.mark.parametrize("strategy", swept_but("pair"))
def test_one_launch_agrees_with_two_that_are_merged(strategy):
    wide = STRATEGIES[strategy]
    fused = generator.build(kv_sources=2, sink=True, **wide, **WINDOW)
    operands = operands_of(fused.spec)
    operands["seqlens"][:], operands["seqlens2"][:] = (150, 77), (90, 33)
    second = {"k": "k2", "v": "v2", "seqlens": "seqlens2"}
    plain = {"q_heads_per_kv": 8, "seqlens": True}
    parts = [launched(wide | WINDOW, operands), launched(wide | plain, operands, **second)]
    merged_o, merged_lse = merge(parts, operands["sink"])
    o, lse = fused(**operands)
    exact = exact_of(fused.spec, operands)
    assert (
        min(cosine(o.astype(float), merged_o), cosine(merged_o, exact.o), cosine(o.astype(float), exact.o)) >= COS_MIN
    )
    assert relative_error(o.astype(float), merged_o) < 4e-3
    np.testing.assert_allclose(lse, merged_lse, atol=1e-5)
    np.testing.assert_allclose(lse, exact.lse, atol=1e-5)


@pytest.mark.parametrize("strategy", ["pair", "passes, V within K", "chunks, V within K"])
@pytest.mark.parametrize(
    "lengths, lengths2, limit", [((0, 0), (90, 1), None), ((150, 3), (0, 0), 7), ((0, 9), (90, 90), 0)], ids=str
)
def test_a_source_without_keys_is_as_if_it_were_not_there(strategy, lengths, lengths2, limit):
    fused = generator.build(kv_sources=2, limit2=True, sink=True, **STRATEGIES[strategy], **WINDOW)
    operands = operands_of(fused.spec)
    operands["seqlens"][:], operands["seqlens2"][:] = lengths, lengths2
    if limit is not None:
        operands["limit2"][:] = limit
    o, lse = fused(**operands)
    exact = exact_of(fused.spec, operands)
    np.testing.assert_allclose(o.astype(float), exact.o, atol=3e-2)
    np.testing.assert_allclose(lse, exact.lse, atol=1e-5)
    if not lengths[0] and limit == 0:  # the first batch entry sees no key: the sinks alone
        assert not o[0].any()
        np.testing.assert_allclose(lse[0], np.broadcast_to(operands["sink"][:, None], lse[0].shape), rtol=1e-6)


@pytest.mark.parametrize("strategy", swept_but("chunks, V within K"))
def test_other_schedules(strategy):
    def schedules(gpu, outputs):
        gpu.schedules = 4

    spec = load_spec(kv_sources=2, limit2=True, **STRATEGIES[strategy], **WINDOW)
    report = verify_kernel(compile_kernel(plan_kernel(spec)), (1, 8, 1, 20, 261, 133), prepare=schedules)
    assert report.passed, report


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tiles_of_both_sources_are_the_needed_ones(strategy):
    fields = STRATEGIES[strategy] | WINDOW
    plan = plan_kernel(load_spec(kv_sources=2, limit2=True, tile_n=32, **fields))
    counts = count_tiles(plan, random_operands(plan.spec, SHAPE, seed=0))
    assert counts.visited == counts.needed < counts.all
