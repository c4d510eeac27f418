"""split_kv: how keys are shared out, that the combined parts are attention, and what the host function launches."""

import numpy as np
import pytest

from generator.arrays import CallError, scratch_layout, view_of
from generator.compile import compile_kernel
from generator.emit import emit_kernel, write_text
from generator.emulator.errors import Hazard
from generator.plan import NotImplementedYet, plan_kernel
from generator.run import RunError, check_scratch, run_observed
from generator.spec import load_spec
from generator.split import SPLITS_MAX, splits_of
from generator.verify import compare, judge, judge_writes, random_operands, verify_kernel

PLAIN = {"head_dim": 128, "q_heads_per_kv": 8}
CASES = {
    "plain": (PLAIN, (2, 8, 1, 2, 1000), (1, 2, 17, SPLITS_MAX)),
    "everything": (
        {
            **{"head_dim": 64, "q_heads_per_kv": 4, "causal": True, "window_left": 200, "seqlens": True, "sink": True},
            **{"kv_sources": 2, "limit2": True},
        },
        (2, 4, 1, 3, 500, 300),
        (1, 3, 9),
    ),
    "V within K, un-normalized": (
        {
            **{"head_dim": 64, "head_dim_v": 48, "q_heads_per_kv": 3, "kv_shared": True, "kv_sources": 2},
            **{"seqlens": True, "sink": True, "output": "unnormalized", "dtype": "fp16"},
        },
        (3, 3, 1, 70, 400, 300),
        (1, 2, 5),
    ),
    "columns, a group of two tiles": (
        {"head_dim": 512, "q_heads_per_kv": 128, "causal": True, "window_left": 300, "sink": True, "seqlens": True},
        (2, 128, 1, 2, 700),
        (1, 3, 11),
    ),
}


def plan_of(**fields):
    return plan_kernel(load_spec(arch="sm_90a", split_kv=True, **fields))


def verified(binary, operands, splits, sms=4):
    run = run_observed(binary, **operands, splits=splits, sms=sms)
    assert len(run.launches) == (2 if splits > 1 else 1)  # one part is the result
    assert [*judge(compare(binary, operands, run.outputs)), *judge_writes(run.outputs)] == []
    return [output.array for output in run.outputs]


SWEPT = ("V within K, un-normalized",)  # a kernel of specs/ is like it
KERNELS = [pytest.param(case, marks=[pytest.mark.sweep] * (case in SWEPT)) for case in CASES]


@pytest.mark.parametrize("case", KERNELS)
def test_any_number_of_shares_gives_attention(case):
    """More shares than KV tiles too: some are empty then."""
    fields, shape, counts = CASES[case]
    binary = compile_kernel(plan_of(**fields))
    operands = random_operands(binary.spec, shape, 1)
    for splits in counts:
        verified(binary, operands, splits)
    assert binary.spills == 0


@pytest.mark.parametrize("splits", [0, SPLITS_MAX + 1])
def test_more_shares_than_the_combining_kernel_reads_are_refused(splits):
    binary = compile_kernel(plan_of(**PLAIN))
    with pytest.raises(CallError, match=rf"splits = {splits}: must be from 1 to {SPLITS_MAX}"):
        run_observed(binary, **random_operands(binary.spec, (1, 8, 1, 1, 100), 0), splits=splits)


def test_shares_of_a_call_follow_from_its_shapes():
    plan = plan_of(**PLAIN)

    def shares(batch, kv_heads, keys, sms=132, queries=1):
        shapes = {"q": (batch, queries, kv_heads * 8, 128), "k": (batch, keys, kv_heads, 128)}
        return splits_of(plan, shapes, sms)

    assert shares(1, 1, 128) == 1, "one KV tile cannot be shared"
    assert shares(132, 1, 1 << 16) == 1 and shares(66, 1, 1 << 16) == 2 and shares(8, 1, 1 << 15) == 16
    assert 60 <= shares(2, 1, 1 << 17) <= 66
    assert shares(1, 1, 1 << 20) == SPLITS_MAX, "a warp of the combining kernel reads no more"
    assert shares(1, 1, 1 << 20, sms=4) == 4
    assert shares(1, 8, 4096, queries=4096) == 1, "many query tiles need no shares"
    # a window of 300 keys is three or four KV tiles, however many keys there are
    windowed = plan_of(**PLAIN, causal=True, window_left=300)
    shapes = {"q": (1, 1, 8, 128), "k": (1, 1 << 17, 1, 128)}
    assert splits_of(windowed, shapes, 132) <= 4


@pytest.mark.parametrize("group, rows", [(1, 64), (8, 64), (64, 64), (128, 64), (256, 128)])
def test_a_tile_has_the_fewest_rows_that_hold_half_a_group(group, rows):
    plan = plan_of(head_dim=128, q_heads_per_kv=group)
    assert (plan.tile_m, plan.packed, plan.tile_n) == (rows, group > 1, 128)
    assert plan.budget.fits and not any(buffer.name == "sO" for buffer in plan.budget.buffers)


def test_the_plan_is_that_of_a_part():
    plan = plan_of(head_dim=96, sink=True)
    assert plan.spec.sink and not plan.spec.unnormalized
    assert plan.part.unnormalized and plan.part.lse and not plan.part.sink
    assert [parameter.name for parameter in plan.parameters] == [
        *("q", "k", "v", "sink", "o", "lse", "o_parts", "lse_parts", "m_parts")
    ]
    views = tuple(view_of(name, np.zeros((3, 5, 4, 96), np.float16)) for name in "qkv")
    assert scratch_layout(plan.spec, views[0], 7) == [
        ("o_parts", (21, 5, 4, 96), "float32"),
        ("lse_parts", (21, 4, 5), "float32"),
        ("m_parts", (21, 4, 5), "float32"),
    ]
    assert [shape for _, shape, _ in scratch_layout(plan.spec, views[0], 1)] == [(0, 5, 4, 96), (0, 4, 5), (0, 4, 5)]
    assert scratch_layout(load_spec(head_dim=96), views[0], 7) == []


def test_what_is_written_around_scratch_is_told():
    binary = compile_kernel(plan_of(**PLAIN))

    class Kept:
        name = "o_parts"

        def outside(self):
            return 3

    with pytest.raises(RunError, match="wrote 3 elements outside o_parts"):
        check_scratch(binary, [Kept()])


def test_a_part_that_was_never_written_is_a_hazard():
    """With the attention kernel left out, the combining kernel reads what nobody wrote."""
    binary = compile_kernel(plan_of(**PLAIN))
    operands = random_operands(binary.spec, (1, 8, 1, 1, 600), 0)

    def forget(gpu, outputs):
        launch = gpu.launch
        gpu.launch = lambda module, name, *rest, **named: (
            launch(module, name, *rest, **named) if "combine" in name else None
        )

    with pytest.raises(Hazard, match="reads global memory although it was never written"):
        run_observed(binary, **operands, splits=3, prepare=forget)


def test_the_combining_kernel_has_none_of_the_attention_kernels_buffers():
    binary = compile_kernel(plan_of(**PLAIN))
    labels = {}
    run = run_observed(
        binary,
        **random_operands(binary.spec, (1, 8, 1, 1, 300), 0),
        splits=2,
        prepare=lambda gpu, _: labels.update(gpu.labels),
    )
    assert [launch.kernel in labels for launch in run.launches] == [True, False]
    assert "sQ" in labels[binary.kernel_name].shared_at(binary.plan.budget.buffer("sQ").offset)


def test_a_launch_that_may_overlap_the_one_before_must_wait_for_it(tmp_path):
    plan = plan_of(**PLAIN)
    kept = [line for line in emit_kernel(plan).splitlines() if "griddepcontrol_wait()  # for what" not in line]
    source = write_text(tmp_path / f"{plan.kernel_name}.py", "\n".join(kept) + "\n")
    report = verify_kernel(compile_kernel(plan, source, use_cache=False), (1, 8, 1, 1, 300))
    assert report.hazards == 1 and "insert griddepcontrol.wait before the first use" in report.failures[0]


def test_blackwell_refuses_it_by_name():
    with pytest.raises(NotImplementedYet, match=r"split_kv = True: not implemented for sm_100a yet; .*sm_90a"):
        plan_kernel(load_spec(head_dim=128, split_kv=True))


def test_names_and_digests_without_it_stay():
    assert load_spec(head_dim=128).digest == load_spec(head_dim=128, split_kv=False).digest
    assert load_spec(head_dim=128, split_kv=True).name == "fmha_sm100_d128_split"
    assert load_spec(head_dim=128, split_kv=True).digest != load_spec(head_dim=128).digest
