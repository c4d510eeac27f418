"""The merge kernel: the formula of reference.merge, in the emulator; parts of which one or both have nothing."""

from types import SimpleNamespace

import numpy as np
import pytest

import generator
from generator.arrays import CallError
from generator.emit import write_text
from generator.merge import Merge, emit_merge
from generator.reference import attention, merge
from generator.resources import checkout_root
from generator.spec import SpecError
from generator.verify import COS_MIN, cosine, random_inputs, relative_error

COMMITTED = (Merge(128, sink=True), Merge(64, dtype="fp16"))


def parts(head_dim_v, rows=37, heads=3, seed=0):
    """Two results as a kernel gives them; batch entry 1 has nothing in the first part, 2 in the second, 3 in both."""
    rng = np.random.default_rng(seed)
    for empty in ((1, 3), (2, 3)):
        o = rng.standard_normal((4, rows, heads, head_dim_v)).astype(np.float32)
        m = (3 * rng.standard_normal((4, heads, rows))).astype(np.float32)
        lse = m + rng.random(m.shape, np.float32) * 5
        for b in empty:
            o[b], m[b], lse[b] = 0, -np.inf, -np.inf
        yield o, lse, m


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim_v", [16, 80, 128, 512])
def test_merged_is_the_formula(head_dim_v, dtype, sink):
    first, second = parts(head_dim_v)
    logits = np.array([-np.inf, 2.0, -50.0], np.float32) if sink else None
    o, lse = generator.build_merge(head_dim_v, dtype, sink)(first, second, logits)
    named = [SimpleNamespace(o=o, lse=lse, m=m) for o, lse, m in (first, second)]
    exact_o, exact_lse = merge(named, logits)
    assert cosine(o.astype(float), exact_o) >= COS_MIN
    assert relative_error(o.astype(float), exact_o) < (3e-3 if dtype == "bf16" else 4e-4)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-6, atol=2e-6)
    assert not o[3].any()


def test_two_launches_and_the_merge_kernel_agree_with_one_launch():
    plain = {"head_dim": 64, "strategy": "tiles"}
    fields = {**plain, "causal": True, "window_left": 30}
    q, k, v = random_inputs("bf16", (1, 2, 2, 130, 200), 64, 64, seed=0)
    _, k2, v2 = random_inputs("bf16", (1, 2, 2, 130, 70), 64, 64, seed=1)
    sink = np.array([0.7, -2.0], np.float32)
    windowed, plain = (generator.build(output="unnormalized", **f) for f in (fields, plain))
    o, lse = generator.build_merge(64, sink=True)(windowed(q, k, v), plain(q, k2, v2), sink)
    fused_o, fused_lse = generator.build(kv_sources=2, sink=True, **fields)(q, k, v, k2, v2, sink=sink)
    seen = generator.reference.Seen(True, 30, k2=k2, v2=v2, sink=sink)
    exact = attention(q, k, v, 0.125, seen=seen)
    for ours in (o, fused_o):
        assert cosine(ours.astype(float), exact.o) >= COS_MIN
    assert cosine(o.astype(float), fused_o.astype(float)) >= COS_MIN
    np.testing.assert_allclose(lse, fused_lse, atol=2e-6)


@pytest.mark.parametrize("spec", COMMITTED, ids=lambda spec: spec.name)
def test_committed_merge_kernels_are_what_is_emitted(spec):
    path = checkout_root() / "generated" / f"{spec.name}.py"
    assert path.read_text() == emit_merge(spec), "python tests/test_merge.py writes it"


def refused(message, kernel, *arguments):
    with pytest.raises(CallError, match=f"^{message}"):
        kernel(*arguments)


def test_what_a_merge_refuses():
    first, second = parts(16)
    plain, sunk = generator.build_merge(16), generator.build_merge(16, sink=True)
    refused(r"first = 'tuple': must be \(o, lse, m\) of an un-normalized kernel; build the", plain, first[:2], second)
    refused("sink = True: the kernel was built without sinks; build one with sink=True", plain, first, second, first[1])
    refused("sink = False: the kernel was built with sinks; build one with sink=False", sunk, first, second)
    refused(r"sink.shape = \(2,\): must be \(3,\), to agree", sunk, first, second, np.zeros(2, np.float32))
    refused(
        r"lse2.shape = .*: must be \(4, 3, 37\), to agree with o1", plain, first, (second[0], second[1][:1], second[2])
    )
    refused(r"o1.shape = .*: must be \[batch, sequence, heads, 16\]", plain, [x[..., :8] for x in first], second)
    refused("m1.dtype = 'float64': must be float32", plain, (*first[:2], first[2].astype(float)), second)
    for fields, message in (
        ({"head_dim_v": 24}, "head_dim_v = 24: must be a multiple of 16 from 16 to 512; for example"),
        ({"head_dim_v": 32, "dtype": "fp8"}, "dtype = 'fp8': must be"),
        ({"head_dim_v": 32, "arch": "sm_80"}, "arch = 'sm_80': one of sm_100a, sm_90a"),
    ):
        with pytest.raises(SpecError, match=f"^{message}"):
            generator.build_merge(**fields)


if __name__ == "__main__":
    for spec in COMMITTED:
        write_text(checkout_root() / "generated" / f"{spec.name}.py", emit_merge(spec))
