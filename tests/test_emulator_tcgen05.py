"""emulator/ops/tcgen05: allocation of tensor memory, its loads and stores, who may touch what and when."""

import numpy as np
import pytest
from ptx_kernels import ALLOC, DEALLOC, fails, run, with_tmem

from generator.emulator import Hazard

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
LD, ST = "tcgen05.ld.sync.aligned.32x32b", "tcgen05.st.sync.aligned.32x32b"
WAIT = "tcgen05.wait::st.sync.aligned;"


def registers(n: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(n)) + "}"


# -- allocation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("columns", [32, 64, 128, 256, 512])
def test_allocate_and_free(columns):
    report = run(with_tmem("", columns), block=64)
    assert report.tmem_columns == columns


def test_allocations_do_not_overlap_and_the_peak_is_reported():
    y = np.zeros((32, 3), np.uint32)
    sizes = (256, 128, 64)
    body = "mad.wide.u32 %d1, %tid, 12, %y;"
    for i, n in enumerate(sizes):
        body += f"{ALLOC} [%s+{4 * i}], {n}; ld.shared.b32 %r{i}, [%s+{4 * i}]; st.global.b32 [%d1+{4 * i}], %r{i};"
    body += "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
    body += "".join(f"{DEALLOC} %r{i}, {n};" for i, n in enumerate(sizes))
    assert run(body, y=y).tmem_columns == 448
    taken = [range(start, start + n) for start, n in zip(y[0].tolist(), sizes, strict=True)]
    assert sum(map(len, taken)) == len(set().union(*taken)) and max(map(max, taken)) < 512
    assert all(r.start % n == 0 for r, n in zip(taken, sizes, strict=True))


@pytest.mark.parametrize("columns", [0, 16, 31, 48, 96, 500, 1024])
def test_illegal_sizes(columns):
    fails(Hazard, f"\n{ALLOC} [%s], {columns}; // HERE\n", f"alloc of {columns} columns", "power of two from 32 to 512")


def test_more_than_there_is():
    fails(Hazard, f"{ALLOC} [%s], 512;\n{ALLOC} [%s+4], 32; // HERE\n", "32 TMEM columns are not free in CTA (0, 0, 0)")


def test_allocations_do_not_grow():
    body = f"{ALLOC} [%s], 32; ld.shared.b32 %r1, [%s]; {DEALLOC} %r1, 32;\n{ALLOC} [%s], 64; // HERE\n"
    fails(Hazard, body, "tcgen05.alloc of 64 columns after one of 32", "the count must not increase")


def test_leak_at_exit():
    fails(Hazard, with_tmem("", 128, free=False), "CTA (0, 0, 0) exits with 128 TMEM columns still allocated")
    body = f"{ALLOC} [%s], 64; ld.shared.b32 %r1, [%s]; setp.eq.u32 %p1, %cta, 3; @%p1 ret; {DEALLOC} %r1, 64;"
    fails(Hazard, body, "CTA (3, 0, 0) exits with 64 TMEM columns", grid=5)


def test_double_free():
    body = f"{ALLOC} [%s], 64; ld.shared.b32 %r1, [%s]; {DEALLOC} %r1, 64;\n{DEALLOC} %r1, 64; // HERE\n"
    fails(Hazard, body, "dealloc of 64 columns at 0x0, which is not an allocation of CTA (0, 0, 0)")


@pytest.mark.parametrize("address, columns", [("%r1", 32), ("%r2", 64), ("%r1", 128)])
def test_free_of_what_was_not_allocated(address, columns):
    body = (
        f"{ALLOC} [%s], 64; ld.shared.b32 %r1, [%s]; add.u32 %r2, %r1, 32;\n{DEALLOC} {address}, {columns}; // HERE\n"
    )
    fails(Hazard, body, f"dealloc of {columns} columns", "not an allocation")


def test_alloc_after_relinquish():
    body = (
        f"{ALLOC} [%s], 64; tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;\n{ALLOC} [%s+4], 64; // HERE\n"
    )
    fails(Hazard, body, "tcgen05.alloc after tcgen05.relinquish_alloc_permit")


@pytest.mark.parametrize("statement", [f"{ALLOC} [%s], 64", f"{DEALLOC} %r1, 64", f"{LD}.x1.b32 {{%r2}}, [%r1]",
                                       f"{ST}.x1.b32 [%r1], {{%r1}}"])  # fmt: skip
def test_part_of_a_warp_may_not(statement):
    body = f"mov.u32 %r1, 0; setp.lt.u32 %p1, %tid, 31; @%p1 bra SIDE; bra END;\nSIDE: {statement}; // HERE\n"
    fails(Hazard, body + "END: mov.u32 %r3, 0;", "all 32 lanes", "warp 0, lane 0")


def test_a_freed_column_is_poison_again():
    body = f"""{ALLOC} [%s], 64; ld.shared.b32 %r1, [%s]; {ST}.x1.b32 [%r1], {{%tid}}; {WAIT} {DEALLOC} %r1, 64;
    {ALLOC} [%s], 64;\n{LD}.x1.b32 {{%r2}}, [%r1]; // HERE\n"""
    fails(Hazard, body, "never written")


# -- loads and stores --------------------------------------------------------------------------------------------------
def store_and_load(n: int, st: int, column: int, block: int = 128, grid: int = 1):
    """Write n columns from `column` on with .x{st}, read them with .x{n}: y[thread, i] as the kernel stored it."""
    y = np.zeros((block * grid, n), np.uint32)
    fill = "".join(f"mad.lo.u32 %r{i}, %g, 1000, {i};" for i in range(n))
    writes = "".join(
        f"add.u32 %r152, %r151, {column + i}; {ST}.x{st}.b32 [%r152], {registers(st, i)};" for i in range(0, n, st)
    )
    clear = "".join(f"mov.u32 %r{i}, 0;" for i in range(n))
    out = "".join(f"st.global.b32 [%d1+{4 * i}], %r{i};" for i in range(n))
    body = f"{fill} {writes} {WAIT} {clear} add.u32 %r152, %r151, {column}; {LD}.x{n}.b32 {registers(n)}, [%r152];"
    run(
        with_tmem(f"{body} tcgen05.wait::ld.sync.aligned; mad.wide.u32 %d1, %g, {4 * n}, %y; {out}"),
        block=block,
        grid=grid,
        y=y,
    )
    return y


@pytest.mark.parametrize("n", WIDTHS)
def test_round_trip_of_every_width(n):
    y = store_and_load(n, n, column=512 - n)
    assert (y == np.arange(128)[:, None] * 1000 + np.arange(n)).all()


@pytest.mark.parametrize("n, st", [(8, 1), (32, 4), (128, 16), (64, 32)])
def test_column_i_is_register_i_whatever_the_width(n, st):
    assert (store_and_load(n, st, column=100) == np.arange(128)[:, None] * 1000 + np.arange(n)).all()


@pytest.mark.parametrize("block, grid", [(32, 3), (96, 2), (128, 40)])
def test_every_cta_has_tensor_memory_of_its_own(block, grid):
    assert (store_and_load(4, 4, 7, block, grid) == np.arange(block * grid)[:, None] * 1000 + np.arange(4)).all()


def test_warps_4_apart_share_lanes():
    """Warp 5 reads what warp 1 wrote: lanes belong to the warp's rank modulo 4."""
    y = np.zeros(256, np.uint32)
    body = f"""setp.ge.u32 %p1, %tid, 128; @%p1 bra READ; {ST}.x1.b32 [%r151+3], {{%tid}}; {WAIT}
    tcgen05.fence::before_thread_sync; READ: bar.sync 1, 256; tcgen05.fence::after_thread_sync;
    {LD}.x1.b32 {{%r1}}, [%r151+3]; st.global.b32 [%y_g], %r1;"""
    run(with_tmem(body), block=256, y=y)
    assert (y == np.arange(256) % 128).all()


def test_an_addition_in_place_over_all_columns():
    y = np.zeros((128, 4), np.uint32)
    body = f"""mov.u32 %r20, 0; LOOP: add.u32 %r21, %r151, %r20; mad.lo.u32 %r0, %tid, 7, %r20;
    {ST}.x1.b32 [%r21], {{%r0}};
    add.u32 %r20, %r20, 1; setp.lt.u32 %p1, %r20, 512; @%p1 bra LOOP; {WAIT}
    mov.u32 %r20, 0; SUM: add.u32 %r21, %r151, %r20; {LD}.x4.b32 {registers(4)}, [%r21];
    {LD}.x4.b32 {registers(4, 4)}, [%r151];
    add.u32 %r4, %r4, %r0; add.u32 %r5, %r5, %r1; add.u32 %r6, %r6, %r2; add.u32 %r7, %r7, %r3; {ST}.x4.b32 [%r151],
    {registers(4, 4)}; {WAIT} add.u32 %r20, %r20, 128; setp.lt.u32 %p1, %r20, 512; @%p1 bra SUM;
    mad.wide.u32 %d1, %tid, 16, %y; st.global.v4.b32 [%d1], {registers(4, 4)};"""
    run(with_tmem(body), block=128, y=y)
    start = np.arange(128)[:, None] * 7 + np.arange(4)
    assert (y == start * 2 + (start + 128) + (start + 256) + (start + 384)).all()


# -- misuse ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("access", [f"{LD}.x1.b32 {{%r2}}, [%r150]", f"{ST}.x1.b32 [%r150], {{%tid}}"])
def test_foreign_lanes(access):
    """%r150 names lane 0: right for warp 0 only."""
    body = with_tmem(f"{ST}.x1.b32 [%r151], {{%tid}}; {WAIT}\n{access}; // HERE\n")
    fails(Hazard, body, "addresses TMEM lane 0 (column 0)", "may touch only lanes 32 to 63", "warp 1", block=64)


@pytest.mark.parametrize(
    "access", [f"{LD}.x4.b32 {registers(4)}, [%r151+30]", f"{ST}.x4.b32 [%r151+30], {registers(4)}"]
)
def test_columns_that_are_not_allocated(access):
    zero = "".join(f"mov.u32 %r{i}, 0;" for i in range(4))
    fails(Hazard, with_tmem(f"{zero}\n{access}; // HERE\n", 32), "TMEM column 32 is not allocated in CTA (0, 0, 0)")


def test_columns_beyond_the_last():
    fails(Hazard, with_tmem(f"\n{LD}.x4.b32 {registers(4)}, [%r151+509]; // HERE\n"), "out of bounds (512 columns)")


def test_lanes_that_give_different_addresses():
    body = with_tmem(f"add.u32 %r1, %r151, %tid;\n{LD}.x1.b32 {{%r2}}, [%r1]; // HERE\n")
    fails(Hazard, body, "lanes of a warp give different TMEM addresses")


def test_reading_columns_that_were_never_written():
    body = with_tmem(f"{ST}.x2.b32 [%r151+4], {{%tid, %tid}}; {WAIT}\n{LD}.x4.b32 {registers(4)}, [%r151+4]; // HERE\n")
    fails(Hazard, body, "column 6", "never written")


def test_a_store_that_was_not_waited_for():
    body = f"{ST}.x1.b32 [%r151], {{%tid}}; {{}}\n{LD}.x1.b32 {{{{%r2}}}}, [%r151]; // HERE\n".replace(
        "{%tid}", "{{%tid}}"
    )
    fails(Hazard, with_tmem(body.format("")), "tcgen05.wait::st")
    run(with_tmem(body.format(WAIT)))


def test_another_warps_wait_does_not_count():
    """Warps 0 and 4 share lanes; warp 4 waits for its own stores only."""
    body = f"""setp.ge.u32 %p1, %tid, 128; @%p1 bra OTHER; {ST}.x1.b32 [%r151], {{%tid}}; bra JOIN;
    OTHER: {WAIT} JOIN: bar.sync 1, 256;
    {LD}.x1.b32 {{%r2}}, [%r151]; // HERE\n"""
    fails(Hazard, with_tmem(body), "tcgen05.wait::st", block=256)


def test_each_warp_waits_for_its_own_store():
    """Warp 0 stores and waits; warp 1 stores only."""
    body = f"{ST}.x1.b32 [%r151], {{%tid}}; setp.ge.u32 %p1, %tid, 32; @%p1 bra JOIN; {WAIT}"
    body += f"\nJOIN: {LD}.x1.b32 {{%r2}}, [%r151]; // HERE\n"
    fails(Hazard, with_tmem(body), "tcgen05.wait::st", "warp 1", block=64)
