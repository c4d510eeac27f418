"""Distributed shared memory: accesses to a peer's window, asynchronous stores, reductions and copies."""

import numpy as np
import pytest
from ptx_kernels import aligned, fails, run, tensor_map

from generator.emulator import Hazard

RANK = "mov.u32 %r1, %cluster_ctarank; "
MEET = "barrier.cluster.arrive; barrier.cluster.wait; "
# %r2: the next CTA's rank, %r3 the address of this thread's 16 bytes there
NEXT = RANK + "add.u32 %r2, %r1, 1; and.b32 %r2, %r2, 3; mapa.shared::cluster.u32 %r3, %s16, %r2; "
OWN = "mad.lo.u32 %r9, %r1, 1000, %tid; add.u32 %r10, %r9, 100; add.u32 %r11, %r9, 200; add.u32 %r12, %r9, 300; "
FOUR = "{%r9, %r10, %r11, %r12}"
KINDS = [("b8", 1), ("u16", 1), ("b32", 1), ("b32", 2), ("f32", 4), ("b64", 1), ("u64", 2), ("b16", 4)]


def everyone(words=4):
    """What thread t of CTA r stores: [4 CTAs, 32 threads, words]."""
    r, t, w = np.meshgrid(np.arange(4), np.arange(32), np.arange(words), indexing="ij")
    return (r * 1000 + t + 100 * w).astype(np.uint32)


@pytest.mark.parametrize("kind, count", KINDS, ids=lambda v: str(v))
@pytest.mark.parametrize("space", [".shared::cluster", ".relaxed.cluster.shared::cluster", ""])
def test_loads_and_stores_reach_the_peer(kind, count, space):
    """Each CTA writes the next one's memory, then reads the one after that."""
    size = int(kind[1:]) // 8 * count
    letter = "h" if int(kind[1:]) < 32 else "r" if kind[1:] == "32" else "d"
    regs = ", ".join(f"%{letter}{20 + i}" for i in range(count))
    regs = f"{{{regs}}}" if count > 1 else regs
    vector = f".v{count}" if count > 1 else ""
    generic = "cvt.u64.u32 %d1, %r3; cvta.shared::cluster.u64 %d1, %d1; " if not space else ""
    place = "[%d1]" if not space else "[%r3]"
    load, store = (f"{o}{space}{vector}.{kind} " for o in ("ld", "st"))
    x = aligned((4, 32, 16), np.uint8, 0)
    x[..., :size] = np.random.default_rng(size).integers(0, 256, (4, 32, size))
    y = aligned((4, 32, 16), np.uint8)
    run(
        NEXT
        + f"""mad.wide.u32 %d2, %g, 16, %x; mad.wide.u32 %d3, %g, 16, %y; {generic}
        ld.global{vector}.{kind} {regs}, [%d2]; {store} {place}, {regs}; {MEET}
        {load} {regs}, {place}; st.global{vector}.{kind} [%d3], {regs}; {MEET}""",
        grid=4,
        cluster=4,
        x=x,
        y=y,
    )
    assert (y == x).all()  # what I wrote to the next CTA is what I read there


@pytest.mark.parametrize("space", [".shared::cluster", ""])
def test_atomics_meet_in_one_cta(space):
    x = np.random.default_rng(0).integers(0, 2**31, 128).astype(np.uint32)
    y, o = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    body = (
        RANK
        + f"""setp.eq.u32 %p1, %r1, 2; mov.u32 %r2, 0; @%p1 st.shared.b32 [%s4], %r2; {MEET}
    mov.u32 %r4, 2; mapa.shared::cluster.u32 %r3, %s4, %r4; cvt.u64.u32 %d1, %r3; ld.global.b32 %r5, [%x_g];
    atom{space}.add.u32 %r6, [{"%r3" if space else "%d1"}], %r5; st.global.b32 [%o_g], %r6;
    red.relaxed.cluster{space}.max.u32 [{"%r3" if space else "%d1"}], %r5;
    {MEET} @%p1 ld.shared.b32 %r7, [%s4]; @%p1 st.global.b32 [%y_g], %r7;"""
    )
    run(body, grid=4, cluster=4, x=x, y=y, o=o)
    total = np.zeros(32, np.uint32)
    for row in x.reshape(4, 32):  # one order or another: the sum is the same, and so is every maximum that follows it
        total += row
    assert (y.reshape(4, 32)[2] == total).all() or (y.reshape(4, 32)[2] >= total).all()
    assert (np.sort(o.reshape(4, 32), axis=0)[0] == 0).all()


def test_a_peer_is_named_by_its_space_only():
    body = NEXT + OWN + "st.shared.b32 [%s16], %r9; " + MEET + "\nld.shared.b32 %r4, [%r3]; // HERE\n" + MEET
    fails(Hazard, body, "name the space shared::cluster", grid=4, cluster=4)
    fails(
        Hazard,
        "mov.u32 %r1, 0x2000400;\nld.shared::cluster.b32 %r2, [%r1]; // HERE\n",
        "names CTA 2 of a cluster of 2",
        grid=2,
        cluster=2,
    )
    fails(Hazard, "mov.u32 %r1, 0x1000400;\nld.shared.b32 %r2, [%r1]; // HERE\n", "out of bounds")


def test_a_cta_that_has_exited_has_no_memory():
    body = (
        NEXT
        + "setp.eq.u32 %p1, %r1, 1; st.shared.b32 [%s16], %r1; "
        + MEET
        + """@%p1 ret;
    mov.u32 %r5, 0; W: add.u32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 40; @%p2 bra W;
    setp.eq.u32 %p3, %r1, 0; @!%p3 bra DONE;\nld.shared::cluster.b32 %r4, [%r3]; // HERE\nDONE:"""
    )
    fails(Hazard, body, "has exited", grid=4, cluster=4)


BAR = (
    "setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+1024], 1; fence.mbarrier_init.release.cluster; " + MEET
)
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s+1024], {}; "
WAIT = "W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p9, [%s+1024], 0; @!%p9 bra W; "
THERE = "add.u32 %r20, %s, 1024; mapa.shared::cluster.u32 %r21, %r20, %r2; "
OUT = """mad.wide.u32 %d1, %g, 16, %y; ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%s16];
st.global.v4.b32 [%d1], {%r5, %r6, %r7, %r8}; """


@pytest.mark.parametrize("vector", [1, 2, 4])
def test_st_async_arrives_with_its_bytes(vector):
    regs = {1: "%r9", 2: "{%r9, %r10}", 4: FOUR}[vector]
    v = f".v{vector}" if vector > 1 else ""
    fill = "st.shared.v4.b32 [%s16], {%tid, %tid, %tid, %tid}; "
    send = f"\nst.async.weak.shared::cluster.mbarrier::complete_tx::bytes{v}.b32 [%r3], {regs}, [%r21]; // HERE\n"
    body = fill + NEXT + OWN + BAR + EXPECT.format(128 * vector) + THERE + send
    y = aligned((4, 32, 4), np.uint32)
    run(body + WAIT + OUT + MEET, grid=4, cluster=4, smem=2048, y=y)
    expected = np.broadcast_to(np.arange(32)[:, None], (4, 32, 4)).copy()
    expected[..., :vector] = np.roll(everyone(), 1, axis=0)[..., :vector]
    assert (y == expected).all()
    early = body.replace("// HERE", "") + "\nld.shared.b32 %r5, [%s16]; // HERE\n" + WAIT + MEET
    fails(Hazard, early, "asynchronous store or reduction into it", grid=4, cluster=4, smem=2048)


def test_st_async_and_its_mbarrier_lie_in_one_cta():
    body = (
        NEXT
        + OWN
        + BAR
        + "\nst.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r3], %r9, [%s+1024]; // HERE\n"
    )
    fails(Hazard, body + MEET, "another CTA than the destination", grid=4, cluster=4, smem=2048)


@pytest.mark.parametrize("operation, kind, function", [
    ("add", "u32", np.add), ("min", "s32", np.minimum), ("max", "u32", np.maximum), ("xor", "b32", np.bitwise_xor),
    ("or", "b32", np.bitwise_or), ("and", "b32", np.bitwise_and),
])  # fmt: skip
def test_red_async_of_every_cta_into_one(operation, kind, function):
    x = np.random.default_rng(3).integers(0, 2**32, (4, 32), np.uint32)
    y = aligned((4, 32, 4), np.uint32)
    body = (
        RANK
        + "mov.u32 %r2, 1; mapa.shared::cluster.u32 %r3, %s16, %r2; "
        + f"""ld.global.b32 %r9, [%x_g];
    st.shared.v4.b32 [%s16], {{%tid, %tid, %tid, %tid}}; {BAR} setp.eq.u32 %p2, %r1, 1; and.pred %p3, %p1, %p2;
    {EXPECT.format(4 * 128).replace("@%p1", "@%p3")} {THERE}
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.{operation}.{kind} [%r3], %r9, [%r21];
    @!%p2 bra DONE; {WAIT} DONE: {OUT} {MEET}"""
    )
    run(body, grid=4, cluster=4, smem=2048, x=x, y=y)
    dtype = np.int32 if kind == "s32" else np.uint32
    start = np.arange(32).astype(dtype)
    for row in x.view(dtype):
        start = function(start, row)
    assert (y[1, :, 0] == start.view(np.uint32)).all() and (y[1, :, 1] == np.arange(32)).all()


COPY = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
FILL = "st.shared.v4.b32 [%s16], " + FOUR + "; fence.proxy.async.shared::cta; "
SEND = "add.u32 %r22, %s, 512; mapa.shared::cluster.u32 %r23, %r22, %r2; "


def test_a_bulk_copy_between_ctas():
    """From the first 512 bytes of one CTA to the second 512 of the next."""
    y = aligned((4, 32, 4), np.uint32)
    body = NEXT + OWN + FILL + BAR + EXPECT.format(512) + THERE + SEND
    send = f"\n@%p1 {COPY} [%r23], [%s], 512, [%r21]; // HERE\n"
    run(body + send + WAIT + OUT.replace("[%s16]", "[%s16+512]") + MEET, grid=4, cluster=4, smem=2048, y=y)
    assert (y == np.roll(everyone(), 1, axis=0)).all()
    fails(
        Hazard,
        body.replace("fence.proxy.async.shared::cta;", "") + send + WAIT + MEET,
        "fence.proxy.async",
        grid=4,
        cluster=4,
        smem=2048,
    )
    early = send.replace("// HERE", "") + "bar.sync 0;\nst.shared.b32 [%s16], %tid; // HERE\n"
    fails(Hazard, body + early + WAIT + MEET, "source of a bulk store", grid=4, cluster=4, smem=2048)


@pytest.mark.parametrize(
    "operation, function", [("add.u32", np.add), ("max.s32", np.maximum), ("xor.b32", np.bitwise_xor)]
)
def test_a_bulk_reduction_between_ctas(operation, function):
    """Everybody reduces into CTA 1."""
    y = aligned((4, 32, 4), np.uint32)
    reduce = f"cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{operation}"
    start = "st.shared.v4.b32 [%s16+512], {%tid, %tid, %tid, %tid}; "
    body = RANK + "mov.u32 %r2, 1; " + OWN + start + FILL + BAR + "setp.eq.u32 %p2, %r1, 1; and.pred %p3, %p1, %p2;"
    body += (
        EXPECT.format(2048).replace("@%p1", "@%p3") + THERE + SEND + MEET + f"@%p1 {reduce} [%r23], [%s], 512, [%r21];"
    )
    run(
        body + "@!%p2 bra DONE;" + WAIT + "DONE:" + MEET + "@!%p2 ret;" + OUT.replace("[%s16]", "[%s16+512]"),
        grid=4,
        cluster=4,
        smem=2048,
        y=y,
    )
    expected = np.broadcast_to(np.arange(32, dtype=np.uint32)[:, None], (32, 4))
    for rank in range(4):
        expected = function(expected, everyone()[rank])
    assert (y[1] == expected).all()


# -- reductions into global memory -------------------------------------------------------------------------------------
GLOBAL = {
    "add.u32": (np.uint32, np.add), "min.s32": (np.int32, np.minimum), "max.u64": (np.uint64, np.maximum),
    "add.f32": (np.float32, np.add), "add.f64": (np.float64, np.add), "and.b64": (np.uint64, np.bitwise_and),
    "xor.b32": (np.uint32, np.bitwise_xor), "add.noftz.f16": (np.float16, np.add), "max.f16": (np.float16, np.maximum),
}  # fmt: skip
LOAD = "mad.wide.u32 %d1, %tid, 16, %x; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1]; "
LOAD += "st.shared.v4.b32 [%s16], {%r1, %r2, %r3, %r4}; "
LOAD += "fence.proxy.async.shared::cta; bar.sync 0; setp.eq.u32 %p1, %tid, 0; "
DONE = "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"


@pytest.mark.parametrize("name", GLOBAL)
def test_a_bulk_reduction_into_global_memory(name):
    dtype, function = GLOBAL[name]
    rng, count = np.random.default_rng(5), 512 // np.dtype(dtype).itemsize
    values = rng.standard_normal if np.dtype(dtype).kind == "f" else lambda n: rng.integers(0, 2**31, n)
    x, y = aligned(count, dtype, 0), aligned(count, dtype, 0)
    x[:], y[:] = values(count), values(count)
    start = y.copy()
    run(LOAD + f"@%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.{name} [%y], [%s], 512; {DONE}", x=x, y=y)
    assert (y == function(start, x)).all() and not (y == start).all()


@pytest.mark.parametrize("operation, dtype, function", [
    ("add", np.float32, np.add), ("add", np.float16, np.add), ("min", np.float16, np.minimum),
    ("or", np.uint32, np.bitwise_or),
])  # fmt: skip
def test_a_tensor_reduction_clips_at_the_edge(operation, dtype, function):
    """A box of 4 rows at row 3 of a tensor with 5 rows: two of them count."""
    columns = 128 // np.dtype(dtype).itemsize
    x, y = aligned((4, columns), dtype, 0), aligned((5, columns), dtype, 0)
    x[:], y[:] = (np.random.default_rng(s).integers(1, 1000, a.shape) for s, a in ((0, x), (1, y)))
    start = y.copy()
    body = (
        LOAD
        + f"""mov.u32 %r10, 0; mov.u32 %r11, 3;
    @%p1 cp.reduce.async.bulk.tensor.2d.global.shared::cta.{operation}.tile.bulk_group [%m, {{%r10, %r11}}], [%s];
    {DONE}"""
    )
    run(body, x=x, m=tensor_map(y, (columns, 4)), known={"y": y})
    start[3:] = function(start[3:], x[:2])
    assert (y == start).all()


def test_a_tensor_reduction_is_one_that_its_type_has():
    y = aligned((4, 32), np.float32)
    x = aligned((4, 32), np.float32)
    line = "\n@%p1 cp.reduce.async.bulk.tensor.2d.global.shared::cta.max.bulk_group [%m, {%r10, %r10}], [%s]; // HERE\n"
    fails(
        Hazard,
        LOAD + "mov.u32 %r10, 0;" + line,
        "not defined for a tensor of f32",
        x=x,
        m=tensor_map(y, (32, 4)),
        known={"y": y},
    )


# -- one instruction, several arrays -----------------------------------------------------------------------------------
def test_lanes_may_touch_different_arrays():
    x, z = np.arange(32, dtype=np.uint32), np.arange(100, 132, dtype=np.uint32)
    y, w = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    run(
        """and.b32 %r1, %tid, 1; setp.eq.u32 %p1, %r1, 1; selp.b64 %d1, %x_g, %z_g, %p1; selp.b64 %d2, %y_g, %w_g, %p1;
        ld.global.b32 %r2, [%d1]; st.global.b32 [%d2], %r2; red.global.add.u32 [%d2], 7;""",
        x=x,
        y=y,
        z=z,
        w=w,
    )
    odd = np.arange(32) % 2 == 1
    assert (y == np.where(odd, x + 7, 0)).all() and (w == np.where(odd, 0, z + 7)).all()
    fails(
        Hazard,
        "setp.eq.u32 %p1, %tid, 9; mov.b64 %d2, 4096; selp.b64 %d1, %d2, %x_g, %p1;"
        "\nld.global.b32 %r2, [%d1]; // HERE\n",
        "lane 9",
        "out of bounds",
        x=x,
        z=z,
    )
