"""Arrays beside Q, K and V: what each kernel takes, what a call refuses and with which words, and their edges."""

import ml_dtypes
import numpy as np
import pytest

import generator
from generator.arrays import CallError, check_inputs
from generator.reference import Seen, attention, normalize
from generator.run import run_observed
from generator.spec import load_spec
from generator.tiles import count_tiles
from generator.verify import random_inputs

BF16 = np.dtype(ml_dtypes.bfloat16)


def zeros(*shape, dtype=BF16):
    return np.zeros(shape, dtype)


def arrays_of(spec, **changed):
    """B 2, Hkv 2, Sq 70, Skv 150, Skv2 40, every input of the specification, with changes (None: left out)."""
    heads, d = 2 * spec.q_heads_per_kv, spec.head_dim
    every = {
        "q": zeros(2, 70, heads, d),
        "k": zeros(2, 150, 2, d),
        "v": zeros(2, 150, 2, spec.v_dim),
        "k2": zeros(2, 40, 2, d),
        "v2": zeros(2, 40, 2, spec.v_dim),
        "seqlens": np.array([150, 0], np.int32),
        "seqlens2": np.array([0, 40], np.int32),
        "limit2": np.full((2, 70), 99, np.int32),
        "sink": zeros(heads, dtype=np.float32),
    }
    names = [parameter.name for parameter in generator.signature.inputs(spec)]
    given = {name: every[name] for name in names} | changed
    return {name: array for name, array in given.items() if array is not None}


ROW = np.zeros(2, np.int32)
TWO = {"kv_sources": 2}
SHARED = {"kv_shared": True}
REFUSED = [
    (
        SHARED,
        {"v": zeros(2, 150, 2, 32)},
        r"v = 'given': V is K's first 32 columns \(kv_shared\); leave v out, or build",
    ),
    (
        {},
        {"v": None},
        r"v = None: the kernel needs it: v is V .B, Skv, Hkv, 32.; pass it, or build a kernel with kv_sha",
    ),
    (
        SHARED | TWO,
        {"k2": zeros(2, 40, 2, 64)},
        r"k2.shape = .*: must be as wide as k, 32 columns: V is a prefix of bo",
    ),
    (SHARED | TWO, {"v2": zeros(2, 40, 2, 32)}, r"v2 = 'given': V is K's first 32 columns \(kv_shared\); leave v out"),
    (
        {},
        {"k2": zeros(2, 40, 2, 32)},
        "k2 = 'given': the kernel was built for one KV source; build one with kv_sources=2",
    ),
    (
        TWO,
        {"k2": None},
        r"k2 = None: the kernel needs it: k2 is the second source's K .B, Skv2, Hkv, 32.; pass k2=, or",
    ),
    (
        TWO,
        {"v2": None},
        r"v2 = None: the kernel needs it: v2 is the second source's V .B, Skv2, Hkv, 32.; pass v2=, or",
    ),
    (
        TWO | {"seqlens": True},
        {"seqlens2": None},
        "seqlens2 = None: the kernel needs it: seqlens2 is the second source's",
    ),
    (
        TWO,
        {"seqlens2": ROW},
        "seqlens2 = 'given': the kernel was built without lengths of a second source; use seqlens=T",
    ),
    (
        TWO,
        {"limit2": np.zeros((2, 70), np.int32)},
        "limit2 = 'given': the kernel was built without limits; build one wi",
    ),
    (
        TWO | {"limit2": True},
        {"limit2": None},
        "limit2 = None: the kernel needs it: limit2 is the keys of the second so",
    ),
    (
        TWO | {"limit2": True},
        {"limit2": np.zeros((2, 69), np.int32)},
        r"limit2.shape = \(2, 69\): must have the extents of",
    ),
    (
        TWO | {"limit2": True},
        {"limit2": np.full((2, 70), -3, np.int32)},
        "limit2 = -3: must not be negative; 0 hides ev",
    ),
    (
        TWO | {"limit2": True},
        {"limit2": np.zeros((70, 2), np.int32).T},
        r"limit2.strides = .*: the last dimension must b",
    ),
    (
        TWO | {"seqlens": True},
        {"seqlens2": np.array([41, 0], np.int32)},
        "seqlens2 = 41: is beyond k2, which has 40 keys",
    ),
    (
        TWO,
        {"k2": zeros(2, 40, 1, 32), "v2": zeros(2, 40, 1, 32)},
        "heads = .*: both KV sources must have the same heads",
    ),
    (TWO, {"v2": zeros(2, 41, 2, 32)}, "shape = .*: k2 and v2 must agree in sequence and heads; slice the longer one"),
    (
        TWO,
        {"k2": zeros(3, 40, 2, 32)},
        "batch = .*: q, k, v, k2 and v2 must have the same batch; repeat or slice the odd",
    ),
    (
        TWO,
        {"k2": zeros(2, 40, 2, 64)},
        r"k2.shape = .*: the kernel was built for 32 columns; build a kernel with head_di",
    ),
    (
        {},
        {"sink": zeros(2, dtype=np.float32)},
        "sink = 'given': the kernel was built without sinks; build one with sink=T",
    ),
    (
        {"sink": True},
        {"sink": None},
        "sink = None: the kernel needs it: sink is a logit a query head, float32 .Hq.; pass",
    ),
    (
        {"sink": True},
        {"sink": zeros(3, dtype=np.float32)},
        r"sink.shape = \(3,\): must have the extents of q: .heads 2.; ",
    ),
    (
        {"sink": True},
        {"sink": zeros(2)},
        "sink.dtype = 'bf16': the kernel was built for float32; convert it to float32",
    ),
    (
        {},
        {"seqlens": np.zeros(2, np.int32)},
        "seqlens = 'given': the kernel was built without KV lengths; build one with",
    ),
    (
        {"seqlens": True},
        {"seqlens": None},
        "seqlens = None: the kernel needs it: seqlens is the KV lengths, int32 .B.; ",
    ),
    ({"seqlens": True}, {"seqlens": [1, 2]}, "seqlens = 'list': must be a NumPy array or a PyTorch tensor"),
    ({"seqlens": True}, {"seqlens": np.zeros(2)}, "seqlens.dtype = 'float64': the kernel was built for int32; convert"),
    (
        {"seqlens": True},
        {"seqlens": np.zeros((2, 1), np.int32)},
        r"seqlens.shape = \(2, 1\): must have one dimension .b",
    ),
    (
        {"seqlens": True},
        {"seqlens": np.zeros(3, np.int32)},
        r"seqlens.shape = \(3,\): must have the extents of q: .batc",
    ),
    (
        {"seqlens": True},
        {"seqlens": np.array([5, -1], np.int32)},
        "seqlens = -1: must not be negative; 0 hides every k",
    ),
    (
        {"seqlens": True},
        {"seqlens": np.array([151, 0], np.int32)},
        "seqlens = 151: is beyond k, which has 150 keys; at",
    ),
    (
        {"seqlens": True},
        {"seqlens": np.zeros(4, np.int32)[::2]},
        r"seqlens.strides = \(2,\): the last dimension must be",
    ),
    (
        {"seqlens": True},
        {"lengths": np.zeros(2, np.int32)},
        "lengths = 'given': no kernel takes it; see the names in th",
    ),
]


@pytest.mark.parametrize("fields, changed, message", REFUSED, ids=lambda value: str(value)[:40])
def test_refused_arrays(fields, changed, message):
    spec = load_spec(head_dim=32, **fields)
    check_inputs(spec, **arrays_of(spec))
    with pytest.raises(CallError, match=f"^{message}") as caught:
        check_inputs(spec, **arrays_of(spec, **changed))
    assert caught.value.field and caught.value.limit and caught.value.remedy


def test_every_length_of_a_tile_and_around_it():
    """One query, lengths 0 to past a tile, K past the length not a number."""
    kernel = generator.build(head_dim=16, seqlens=True, tile_n=16, strategy="tiles")
    lengths = np.array([0, 1, 15, 16, 17, 31, 32, 33], np.int32)
    q, k, v = random_inputs("bf16", (8, 1, 1, 1, 33), 16, 16, seed=0)
    for b, length in enumerate(lengths):
        k[b, length:] = np.nan
    o, lse = kernel(q, k, v, seqlens=lengths)
    assert not o[0].any() and np.isneginf(lse[0]).all() and np.isfinite(lse[1:]).all()
    exact = attention(q, k, v, 0.25, seen=Seen(seqlens=lengths))
    np.testing.assert_allclose(o.astype(float), exact.o, atol=2e-2)
    np.testing.assert_allclose(lse, exact.lse, atol=1e-5)


def test_windows_larger_than_the_sequence_hide_nothing():
    q, k, v = random_inputs("bf16", (1, 1, 1, 130, 200), 16, 16, seed=0)
    plain = generator.build(head_dim=16)(q, k, v)
    for window in (199, 1 << 30):
        windowed = generator.build(head_dim=16, window_left=window, window_right=window)(q, k, v)
        assert all(ours.tobytes() == theirs.tobytes() for ours, theirs in zip(windowed, plain, strict=True))


@pytest.mark.parametrize("output", ["normalized", "unnormalized"])
def test_sinks_of_any_size(output):
    """Absent (-inf), tiny, like a score, overwhelming, and beyond what exp holds; with a batch entry without keys."""
    kernel = generator.build(head_dim=16, sink=True, seqlens=True, output=output, strategy="tiles")
    sinks = np.array([-np.inf, -200.0, 0.5, 60.0, 300.0], np.float32)
    q, k, v = random_inputs("bf16", (2, 5, 5, 20, 40), 16, 16, seed=0)
    lengths = np.array([40, 0], np.int32)
    o, lse, *m = kernel(q, k, v, sink=sinks, seqlens=lengths)
    exact = attention(q, k, v, 0.25, seen=Seen(seqlens=lengths, sink=sinks))
    attended = normalize(o, lse, m[0]) if m else o.astype(float)
    np.testing.assert_allclose(attended, exact.o, atol=1e-2)
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-6, atol=1e-5)
    assert not o[1].any()
    np.testing.assert_allclose(lse[1], np.broadcast_to(sinks[:, None], (5, 20)), rtol=1e-6)
    if m:
        np.testing.assert_allclose(m[0][0], attention(q, k, v, 0.25).m[0], atol=1e-5)
        assert np.isneginf(m[0][1]).all()


def exactly(kernel, *arrays):
    """Outputs with tensor cores' own order of addition, which does not depend on where a row lies."""

    def prepare(gpu, _):
        gpu.accumulation = "exact"

    return [output.array for output in run_observed(kernel.binary, *arrays, strict=False, prepare=prepare).outputs]


@pytest.mark.parametrize("group", [8, *(pytest.param(group, marks=pytest.mark.sweep) for group in (2, 32, 64, 128))])
def test_packed_heads_give_the_bits_of_unpacked_ones(group):
    """Rows of a tile are tokens x heads; groups beyond 32 have a token's rows in several warps. Odd token counts."""
    q, k, v = random_inputs("bf16", (2, 2 * group, 2, 70 if group < 32 else 3, 40), 16, 16, seed=0)
    packed, apart = (generator.build(head_dim=16, q_heads_per_kv=group, pack_heads=pack) for pack in (True, False))
    assert packed.plan.tokens == 128 // group and apart.plan.tokens == 128
    by_head = np.ascontiguousarray(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    expected = exactly(apart, q, k, v)
    for queries in (q, by_head):
        for ours, theirs in zip(exactly(packed, queries, k, v), expected, strict=True):
            assert ours.tobytes() == theirs.tobytes()


def test_packed_heads_meet_fewer_tiles_of_a_mask():
    q, k = np.empty((1, 256, 16, 64)), np.empty((1, 256, 2, 64))
    fields = {"head_dim": 64, "q_heads_per_kv": 8, "causal": True, "window_left": 15, "tile_n": 32, "strategy": "tiles"}
    packed, apart = (generator.plan_kernel(load_spec(pack_heads=pack, **fields)) for pack in (True, False))
    assert count_tiles(apart, {"q": q, "k": k}) == (144, 144, 256, 144)
    assert count_tiles(packed, {"q": q, "k": k}).visited == 46


@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (96, 64), (64, 48), (192, 128)])
def test_shared_kv_gives_the_bits_of_v_passed_apart(head_dim, head_dim_v):
    """K-major for QK and MN-major for PV from the same bytes, swizzled by 128, 64 and 32 bytes; several stages."""
    fields = {"head_dim": head_dim, "head_dim_v": head_dim_v, "causal": True, "tile_n": 32, "strategy": "tiles"}
    q, k, _ = random_inputs("bf16", (1, 2, 2, 130, 200), head_dim, head_dim_v, seed=0)
    shared, apart = generator.build(kv_shared=True, **fields), generator.build(**fields)
    expected = apart(q, k, np.ascontiguousarray(k[..., :head_dim_v]))
    for ours, theirs in zip(shared(q, k), expected, strict=True):
        assert ours.tobytes() == theirs.tobytes()
