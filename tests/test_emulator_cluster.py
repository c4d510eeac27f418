"""Clusters: ranks, remote mbarriers, the cluster barrier, multicast loads, MMAs of a CTA pair."""

import ml_dtypes
import numpy as np
import ptx_kernels
import pytest
from ptx_kernels import ptx, tensor_map

from generator.emulator import Deadlock, Hazard, LaunchError

PAIR = (2, 1, 1)
INIT = """setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+512], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive; barrier.cluster.wait;"""
WAIT = "W: mbarrier.try_wait.parity.shared.b64 %p9, [%s+512], 0; @!%p9 bra W;"


def launch(body, grid, cluster=PAIR, block=32, smem=1024, known=None, **arguments):
    return ptx_kernels.launch(ptx(body, **arguments), arguments, block, grid, smem, known, cluster)


@pytest.mark.parametrize("cluster", [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (1, 4, 2)])
def test_ranks_and_ids(cluster):
    grid = (8, 4, 2)
    y = np.zeros((64, 6), np.uint32)
    body = """mov.u32 %r1, %ctaid.z; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.x; mad.lo.u32 %r1, %r1, 4, %r2;
    mad.lo.u32 %r1, %r1, 8, %r3; mul.wide.u32 %d1, %r1, 24; add.u64 %d1, %d1, %y;
    mov.u32 %r4, %cluster_ctarank; st.global.b32 [%d1], %r4; mov.u32 %r4, %clusterid.x; st.global.b32 [%d1+4], %r4;
    mov.u32 %r4, %clusterid.y; st.global.b32 [%d1+8], %r4; mov.u32 %r4, %cluster_ctaid.x; st.global.b32 [%d1+12], %r4;
    mov.u32 %r4, %cluster_nctarank; st.global.b32 [%d1+16], %r4;
    mov.u32 %r4, %nclusterid.x; st.global.b32 [%d1+20], %r4;"""
    launch(body, grid, cluster, y=y)
    for i, row in enumerate(y.tolist()):
        x, yy, z = i % 8, i // 8 % 4, i // 32
        cx, cy, cz = cluster
        rank = (z % cz * cy + yy % cy) * cx + x % cx
        assert row == [rank, x // cx, yy // cy, x % cx, cx * cy * cz, 8 // cx]


def test_arrivals_reach_the_peer_that_mapa_names():
    """Rank 0 arrives on rank 1's barrier and the other way round; each leaves only after the other's arrival."""
    body = (
        INIT
        + """mov.u32 %r1, %cluster_ctarank; xor.b32 %r2, %r1, 1; add.u32 %r3, %s, 512;
    mapa.shared::cluster.u32 %r4, %r3, %r2; @%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4];"""
        + WAIT
        + "add.u32 %r5, %r1, 7; st.global.b32 [%y_g], %r5; barrier.cluster.arrive; barrier.cluster.wait;"
    )
    y = np.zeros(32 * 80, np.uint32)
    launch(body, (80, 1, 1), y=y)
    assert (y.reshape(80, 32) == 7 + np.arange(80)[:, None] % 2).all()


def test_a_peer_that_never_arrives_is_a_deadlock():
    body = INIT + "mov.u32 %r1, %cluster_ctarank; setp.eq.u32 %p2, %r1, 1; @%p2 bra W; bra.uni DONE;" + WAIT + "DONE:"
    with pytest.raises(Deadlock, match=r"CTA \(1, 0, 0\):\n.*warp.? 0: waiting .* mbarrier at shared offset 0x200"):
        launch(body + " nop;", (2, 1, 1))


def test_the_cluster_barrier_waits_for_every_warp():
    """Rank 1 passes the barrier only after rank 0, which first waits for a load of its own."""
    body = "mov.u32 %r1, %cluster_ctarank; setp.eq.u32 %p2, %r1, 0; @%p2 bra A; bra.uni DONE; A: ret; DONE:"
    y = np.zeros(64, np.uint32)
    launch(body + "barrier.cluster.arrive; barrier.cluster.wait; st.global.b32 [%y_g], %tid;", (2, 1, 1), y=y)
    assert (y[32:] == np.arange(32)).all()  # a warp that has exited is not waited for
    with pytest.raises(Hazard, match="without an arrive"):
        launch("barrier.cluster.wait;", (2, 1, 1))
    with pytest.raises(Hazard, match="twice with no barrier.cluster.wait between"):
        launch(body + "barrier.cluster.arrive; barrier.cluster.arrive;", (2, 1, 1), block=64)


def test_a_rank_outside_the_cluster():
    """Programs compute an address for each lane and use those of the cluster."""
    body = """mov.u32 %r3, %cluster_ctarank; mad.lo.u32 %r3, %r3, 4, %s; mapa.shared::cluster.u32 %r2, %r3, %tid;
    setp.lt.u32 %p1, %tid, {};"""
    launch(body.format(2) + "@%p1 st.shared::cluster.b32 [%r2], %r3;", (2, 1, 1))
    for lanes, beyond in ((3, 2), (32, 31)):
        with pytest.raises(Hazard, match=f"a shared::cluster address names CTA {beyond} of a cluster of 2"):
            launch(body.format(lanes) + "@%p1 st.shared::cluster.b32 [%r2], %r3;", (2, 1, 1))
    with pytest.raises(LaunchError, match=r"grid \(3, 1, 1\) is not a multiple of cluster \(2, 1, 1\)"):
        launch("ret;", (3, 1, 1))
    with pytest.raises(LaunchError, match="1 to 16 CTAs"):
        launch("ret;", (32, 1, 1), cluster=(32, 1, 1))


def test_a_multicast_load_reaches_every_cta_of_the_mask():
    x = np.arange(4 * 64, dtype=np.float16).reshape(4, 64)
    y = np.full((4, 256), -1, np.float16)
    load = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
    body = (
        INIT
        + f"""@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s+512], 512; mov.u32 %r1, %cluster_ctarank;
    setp.eq.u32 %p2, %r1, 0; and.pred %p2, %p2, %p1; mov.b16 %h1, 11; mov.u32 %r0, 0; setp.eq.u32 %p3, %r1, 2;
    @%p2 {load} [%s], [%m, {{%r0, %r0}}], [%s+512], %h1; @%p3 ret;"""
        + WAIT
        + """ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%s16]; mul.wide.u32 %d1, %cta, 512; mul.wide.u32 %d2, %tid, 16;
    add.u64 %d1, %d1, %d2; add.u64 %d1, %d1, %y; st.global.v4.b32 [%d1], {%r2, %r3, %r4, %r5};"""
    )
    launch(body, (4, 1, 1), (4, 1, 1), y=y, m=tensor_map(x, (64, 4), 0), known={"x": x})
    for rank in (0, 1, 3):  # the mask is 0b1011
        assert (y[rank] == x.reshape(-1)).all()
    assert (y[2] == -1).all()


@pytest.mark.parametrize("parity", [0, 1])
def test_a_multicast_load_of_pairs_counts_in_one_cta_of_each(parity):
    """With .cta_group::2 the mbarrier's CTA says which of each pair hears of it, for its own box and the peer's."""
    x = np.arange(4 * 64, dtype=np.float16).reshape(4, 64)
    y = np.full((4, 256), -1, np.float16)
    load = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
    body = (
        INIT
        + f"""mov.u32 %r1, %cluster_ctarank; and.b32 %r0, %r1, 1; setp.eq.u32 %p3, %r0, {parity};
    and.pred %p4, %p3, %p1; @%p4 mbarrier.arrive.expect_tx.shared.b64 _, [%s+512], 1024; mov.b16 %h1, 15;
    mov.u32 %r0, 0; setp.eq.u32 %p2, %r1, 2; and.pred %p2, %p2, %p1; mov.u32 %r6, {parity};
    add.u32 %r7, %s, 512; mapa.shared::cluster.u32 %r7, %r7, %r6;
    @%p2 {load}.cta_group::2 [%s], [%m, {{%r0, %r0}}], [%r7], %h1; @!%p3 bra DONE;"""
        + WAIT
        + """DONE: barrier.cluster.arrive; barrier.cluster.wait; @!%p3 bra END;
    ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%s16]; mul.wide.u32 %d1, %cta, 512; mul.wide.u32 %d2, %tid, 16;
    add.u64 %d1, %d1, %d2; add.u64 %d1, %d1, %y; st.global.v4.b32 [%d1], {%r2, %r3, %r4, %r5}; END:"""
    )
    launch(body, (4, 1, 1), (4, 1, 1), y=y, m=tensor_map(x, (64, 4), 0), known={"x": x})
    assert (y[parity::2] == x.reshape(-1)).all()


def pair_mma(n: int, issuer: int = 0) -> np.ndarray:
    """D of a CTA pair: M = 256, K = 16, no swizzle, K-major; each CTA brings 128 rows of A and n / 2 rows of B."""
    rng = np.random.default_rng(n)
    a, b = (rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((256, 16), (n, 16)))
    chunked = [
        np.concatenate([part.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3).reshape(-1) for part in (a[h], b[g])])
        for h, g in ((slice(0, 128), slice(0, n // 2)), (slice(128, 256), slice(n // 2, n)))
    ]
    x = np.stack(chunked).view(np.uint16)  # [2, (128 + n / 2) · 16] elements, 16-byte chunks
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % 1024)))  # whole rounds of 128 threads
    y = np.zeros((256, n), np.float32)
    idesc = 1 << 4 | 1 << 7 | 1 << 10 | n >> 3 << 17 | 256 >> 4 << 24
    size = x.shape[1] * 2
    fill = "".join(
        f"ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d1+{i}]; st.shared.v4.b32 [%s16+{i}], {{%r1, %r2, %r3, %r4}};"
        for i in range(0, size, 2048)
    )
    dump = "".join(
        f"tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r1}}, [%r20+{c}]; st.global.b32 [%d3+{4 * c}], %r1;"
        for c in range(n)
    )
    body = f"""
    setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+20480], 1; fence.mbarrier_init.release.cluster;
    setp.lt.u32 %p2, %tid, 32; @!%p2 bra FILL; mov.u32 %r1, 512;
    tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%s+20488], %r1;
    FILL: mul.wide.u32 %d1, %cta, {size}; mul.wide.u32 %d2, %tid, 16; add.u64 %d1, %d1, %d2; add.u64 %d1, %d1, %x;
    {fill} fence.proxy.async.shared::cta; barrier.cluster.arrive; barrier.cluster.wait;
    mov.u32 %r5, %cluster_ctarank; setp.eq.u32 %p3, %r5, {issuer}; and.pred %p3, %p3, %p1;
    and.b32 %r6, %s, 0xffffff; shr.u32 %r6, %r6, 4; cvt.u64.u32 %d4, %r6;
    or.b64 %d4, %d4, {8 << 16 | 16 << 32 | 1 << 46};
    add.u64 %d5, %d4, 256; mov.u32 %r7, {idesc}; mov.u32 %r8, 0; mov.b16 %h1, 3;
    @%p3 tcgen05.mma.cta_group::2.kind::f16 [%r8], %d4, %d5, %r7, 0;
    @%p3 tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%s+20480], %h1;
    W: mbarrier.try_wait.parity.shared.b64 %p9, [%s+20480], 0; @!%p9 bra W;
    shr.u32 %r9, %tid, 5; shl.b32 %r20, %r9, 21; mad.lo.u32 %r10, %cta, 128, %tid; mul.wide.u32 %d3, %r10, {4 * n};
    add.u64 %d3, %d3, %y; {dump}
    bar.sync 0; mov.u32 %r1, 512; @!%p2 bra END; tcgen05.dealloc.cta_group::2.sync.aligned.b32 %r8, %r1; END:"""
    launch(body, (2, 1, 1), block=128, smem=20496, x=x, y=y)
    return y - a.astype(np.float32) @ b.astype(np.float32).T


@pytest.mark.parametrize("n", [32, 64, 128, 256])
def test_the_pair_multiplies_with_all_of_b(n):
    assert np.abs(pair_mma(n)).max() < 1e-5


def test_only_the_even_cta_issues():
    with pytest.raises(Hazard, match="the even CTA issues"):
        pair_mma(32, issuer=1)
