"""bench.py: what is counted, what is checked before it is timed, and what the figures say."""

import numpy as np
import pytest

from generator.bench import (
    COPIED,
    REPS,
    ROOF,
    bench_case,
    bytes_of,
    check_kernel,
    default_shapes,
    flop_of,
    pairs,
    poisoned,
)
from generator.matrix import Shape
from generator.measurement import bench_cells
from generator.plan import plan_kernel
from generator.sample import host, take_sample
from generator.spec import load_spec
from generator.tiles import seen_of

torch = pytest.importorskip("torch")
measured = pytest.importorskip("measured")

SHAPE = Shape(2, 2, 2, 40, 56)
WIDTH = {"head_dim": 64}


def spec_of(**fields):
    return load_spec(arch="sm_90a", **{"head_dim": 16, **fields})


def roof():
    pass


roof.ms = 2 * ROOF**3 / 800e9  # 800 TFLOP/s


def measure(spec, kernel, peers=(), shape=SHAPE):
    return bench_case(plan_kernel(spec), kernel, shape, peers, roof, measured.FakeClock(), reps=4, device="cpu")


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": True},
        {"causal": True, "window_left": 7},
        {"window_left": 5, "window_right": 3},
        {"seqlens": True},
        {"seqlens": True, "causal": True},
        {"kv_sources": 2},
        {"kv_sources": 2, "limit2": True, "seqlens": True, "causal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 2, 2, 40, 56), (1, 2, 2, 60, 33)], ids=str)
def test_pairs_are_those_that_the_definition_sees(fields, shape):
    spec = spec_of(**fields)
    shape = Shape(*shape, keys2=19 if spec.kv_sources == 2 else 0)
    operands = measured.random_tensors(spec, shape, 3, "cpu")
    given = {name: host(x) for name, x in operands.items()}
    seen, count = seen_of(spec, given), 0
    for b in range(shape.batch):
        count += int(seen.first(b, shape.queries, shape.keys).sum())
        count += int(seen.second(b, shape.queries).sum()) if spec.kv_sources == 2 else 0
    assert pairs(spec, shape, given) == count


def test_flop_is_the_usual_formula():
    shape = Shape(1, 16, 16, 16384, 16384)
    assert flop_of(spec_of(head_dim=128), shape, {}) == 4 * 16 * 16384**2 * 128
    assert flop_of(spec_of(head_dim=128, causal=True), shape, {}) == 4 * 16 * 16384 * 16385 // 2 * 128
    assert flop_of(spec_of(head_dim=192, head_dim_v=128), shape, {}) == 2 * 16 * 16384**2 * 320
    grouped = Shape(2, 8, 2, 10, 20)
    assert flop_of(spec_of(q_heads_per_kv=4), grouped, {}) == 2 * 8 * 2 * 200 * 32


@pytest.mark.parametrize(
    "fields, heads",
    [
        ({"head_dim": 128}, (16, 16)),
        ({"head_dim": 80}, (25, 25)),
        ({"head_dim": 256, "q_heads_per_kv": 4}, (8, 2)),
        ({"head_dim": 256, "q_heads_per_kv": 128}, (128, 1)),
    ],
)
def test_default_shapes_have_hidden_size_2048(fields, heads):
    shapes = default_shapes(spec_of(**fields))
    assert [(s.batch, s.queries, s.keys) for s in shapes] == [(4, 4096, 4096), (1, 16384, 16384)]
    assert all((s.q_heads, s.kv_heads) == heads for s in shapes)


def test_a_second_source_has_keys():
    assert [shape.keys2 for shape in default_shapes(spec_of(kv_sources=2))] == [1025, 4097]


@pytest.mark.parametrize("group, heads", [(1, (8, 8)), (16, (16, 1))])
def test_split_kernels_are_measured_decoding(group, heads):
    shapes = default_shapes(spec_of(split_kv=True, q_heads_per_kv=group))
    assert {(s.queries, s.batch * s.keys, s.q_heads, s.kv_heads) for s in shapes} == {(1, 262144, *heads)}


def test_bytes_are_of_what_some_query_sees():
    shape = Shape(2, 6, 2, 5, 100)
    outputs = 2 * 5 * 6 * (64 * 2 + 64 * 2 + 4)  # Q, O and LSE
    assert bytes_of(spec_of(**WIDTH, q_heads_per_kv=3), shape, {}) == 2 * 100 * 2 * 128 * 2 + outputs
    lengths = {"seqlens": torch.tensor([0, 30]).numpy()}
    assert bytes_of(spec_of(**WIDTH, q_heads_per_kv=3, seqlens=True), shape, lengths) == 30 * 2 * 128 * 2 + outputs
    windowed = spec_of(**WIDTH, q_heads_per_kv=3, causal=True, window_left=10)
    assert bytes_of(windowed, shape, {}) == 2 * 15 * 2 * 128 * 2 + outputs, "5 diagonals and 10 keys before them"
    shared = spec_of(**WIDTH, q_heads_per_kv=3, kv_shared=True, lse=False)
    assert bytes_of(shared, shape, {}) == 2 * 100 * 2 * 64 * 2 + outputs - 2 * 5 * 6 * 4
    two = {"limit2": torch.tensor([[0] * 4 + [7], [50] * 5]).numpy()}
    second = spec_of(**WIDTH, q_heads_per_kv=3, kv_sources=2, limit2=True)
    assert bytes_of(second, shape._replace(keys2=40), two) == (200 + 7 + 40) * 2 * 128 * 2 + outputs
    raw = spec_of(**WIDTH, q_heads_per_kv=3, output="unnormalized")
    assert bytes_of(raw, shape, {}) == 2 * 100 * 2 * 128 * 2 + 2 * 5 * 6 * (64 * 2 + 64 * 4 + 8)


def test_a_copy_is_timed_beside_a_split_kernel():
    def copy():
        pass

    copy.ms = 2.0
    spec = spec_of(split_kv=True)
    kernel = measured.NumpyKernel(spec)
    kernel_plan = plan_kernel(spec)
    row = bench_case(kernel_plan, kernel, SHAPE, (), roof, measured.FakeClock(), reps=4, device="cpu", copy=copy)
    assert row.copy == 2 * COPIED / 2.0 / 1e6 and row.bandwidth == row.moved / 1.0 / 1e6
    assert row.of_copy == row.bandwidth / row.copy
    facts = row.as_dict()
    assert (facts["bytes"], facts["gb_s"], facts["copy_gb_s"]) == (row.moved, row.bandwidth, row.copy)
    header, (cells,) = bench_cells([row])
    assert header[-2:] == ["GB/s", "of copy"] and cells[-1].endswith("%")
    assert "GB/s" not in bench_cells([measure(spec_of(), measured.NumpyKernel(spec_of()))])[0]


def test_a_peer_that_the_clock_cannot_time_is_refused():
    class Clock(measured.FakeClock):
        def milliseconds(self, launch, count):
            if getattr(launch, "ms", 0) == 7.0:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().milliseconds(launch, count)

    spec, peers = spec_of(), (measured.peer("fa4", ms=7.0), measured.peer("cudnn", ms=3.0))
    kernel = measured.NumpyKernel(spec)
    row = bench_case(plan_kernel(spec), kernel, SHAPE, peers, roof, Clock(), reps=4, device="cpu")
    assert [peer.status for peer in row.peers] == ["refused", "measured"]
    assert row.peers[0].message == "cannot be timed: RuntimeError: operation not permitted when stream is capturing"
    assert row.best_peer.name == "cudnn"


def test_repetitions_are_even():
    assert REPS % 2 == 0


def test_random_tensors_are_what_the_kernel_takes():
    from generator.arrays import check_inputs

    spec = spec_of(kv_sources=2, limit2=True, seqlens=True, sink=True, dtype="fp16", q_heads_per_kv=2)
    shape = Shape(3, 4, 2, 30, 50, 9)
    operands = measured.random_tensors(spec, shape, 0, "cpu")
    check_inputs(spec, **operands)
    assert int(operands["seqlens"].min()) >= 25 and int(operands["seqlens2"].max()) <= 9
    assert int(operands["limit2"][2, -1]) == 9 and operands["sink"].dtype == torch.float32
    again = measured.random_tensors(spec, shape, 0, "cpu")
    assert all(torch.equal(operands[name], again[name]) for name in operands)


# --- checking ---------------------------------------------------------------------------------------------------------


def check(spoil=None, **fields):
    spec = spec_of(**fields)
    operands = measured.random_tensors(spec, SHAPE, 0, "cpu")
    return check_kernel(spec, measured.NumpyKernel(spec, spoil), operands, take_sample(spec, operands))


@pytest.mark.parametrize(
    "fields", [{}, {"output": "unnormalized"}, {"lse": False}, {"sink": True, "causal": True}], ids=str
)
def test_a_right_kernel_may_be_timed(fields):
    figure = check(**fields)
    assert figure.status == "measured" and figure.message == "" and figure.o_err < 3e-3
    assert (figure.lse_err is None) == (fields.get("lse") is False)


def test_outputs_begin_as_nan():
    outputs = poisoned(spec_of(), torch.zeros(2, 5, 3, 16, dtype=torch.bfloat16))
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {"o": (2, 5, 3, 16), "lse": (2, 3, 5)}
    assert all(bool(x.isnan().all()) for x in outputs.values())


def test_an_element_that_is_not_written_is_found_wherever_it_is():
    def skip(named):
        named["o"][1, 17, 1, 3] = np.nan
        named["lse"][0, 1, 8] = np.nan

    figure = check(skip)
    assert figure.status == "wrong"
    assert "o: 1 elements are NaN or were not written" in figure.message
    assert "lse: 1 elements are NaN or were not written" in figure.message


def test_wrong_figures_are_told_with_their_bounds():
    def spoil(named):
        named["o"] *= 1.01
        named["lse"] += 0.01

    figure = check(spoil)
    assert "O is off by 1.0" in figure.message and "more than 0.004" in figure.message
    assert "LSE is off by 1.00e-02, more than 0.0001" in figure.message


# --- a row ------------------------------------------------------------------------------------------------------------


def test_a_row_has_rates_fractions_and_ratios():
    spec = spec_of()
    kernel = measured.NumpyKernel(spec)
    row = measure(spec, kernel, [measured.peer("slow", ms=2.0), measured.peer("fast", ms=1.25)])
    flop = 2 * 2 * 2 * 40 * 56 * 32
    assert row.flop == flop and row.roof == pytest.approx(800)
    assert row.ours.timing.median == 1.0 and row.ours.tflops(row.flop) == pytest.approx(flop / 1e9)
    assert row.of_roof == pytest.approx(flop / 1e9 / 800)
    assert row.best_peer.name == "fast" and row.ratio == pytest.approx(1.25)
    document = row.as_dict()
    assert document["best_peer"] == "fast" and document["shape"] == "2,2,2,40,56"
    assert document["ours"]["ms"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert document["ours"]["tflops"]["median"] == pytest.approx(flop / 1e9)
    assert kernel.calls == 1


def test_a_wrong_kernel_is_not_timed():
    spec = spec_of()

    def spoil(named):
        named["o"] += 1

    row = measure(spec, measured.NumpyKernel(spec, spoil), [measured.peer("right")])
    assert row.ours.status == "wrong" and row.ours.timing is None
    assert row.ratio is None and row.of_roof is None and row.best_peer.name == "right"


def test_wrong_missing_and_refusing_peers_stay_in_the_row():
    peers = [
        measured.peer("wrong", error=0.01),
        measured.peer("absent", raises=ImportError("no such package")),
        measured.peer("cannot", raises=NotImplementedError("head_dim 16")),
    ]
    row = measure(spec_of(), measured.NumpyKernel(spec_of()), peers)
    assert [(peer.name, peer.status) for peer in row.peers] == [
        ("wrong", "wrong"),
        ("absent", "missing"),
        ("cannot", "refused"),
    ]
    assert "more than 0.004" in row.peers[0].message and all(peer.timing is None for peer in row.peers)
    assert row.best_peer is None and row.ratio is None and row.ours.timing is not None
    assert row.as_dict()["ratio"] is None


@pytest.mark.parametrize("other, tried", [({}, False), ({"error": 0.5}, True), ({"raises": ValueError()}, True)])
def test_the_last_resort_is_asked_when_no_other_peer_is_right(other, tried):
    last = measured.peer("last", last_resort=True)
    row = measure(spec_of(), measured.NumpyKernel(spec_of()), [last, measured.peer("other", **other)])
    assert [peer.name for peer in row.peers] == (["other", "last"] if tried else ["other"])


def test_a_last_resort_alone_is_asked():
    row = measure(spec_of(), measured.NumpyKernel(spec_of()), [measured.peer("last", last_resort=True)])
    assert row.peers[0].status == "measured"
