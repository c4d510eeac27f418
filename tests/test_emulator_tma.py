"""emulator/ops/tma: tensor copies of every rank and swizzle, their counts, and every wait that may be missing."""

import ml_dtypes
import numpy as np
import pytest
from ptx_kernels import aligned, box_image, box_places, fails, run, shared_bytes, tensor_map

from generator.emulator import Deadlock, Hazard

MBAR = 65536  # shared offset of the mbarrier, past every box
SMEM = MBAR + 64
FENCE = "fence.proxy.async.shared::cta; bar.sync 0; setp.eq.u32 %p1, %tid, 0;"
LEADER = f"setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+{MBAR}], 1; bar.sync 0;"
WAIT = f"W: mbarrier.try_wait.parity.shared::cta.b64 %p9, [%s+{MBAR}], 0; @!%p9 bra W;"


def filled(shape, dtype, seed=0) -> np.ndarray:
    array = aligned(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = np.random.default_rng(seed).integers(1, 256, array.nbytes, np.uint8)
    return array


def coordinates(point) -> str:
    moves = "".join(f"mov.u32 %r{20 + i}, {c};" for i, c in enumerate(point))
    return moves, "{" + ", ".join(f"%r{20 + i}" for i in range(len(point))) + "}"


def load(point, guard="@%p1", offset=0, map="%m", barrier=MBAR, space="shared::cta") -> str:
    moves, coords = coordinates(point)
    opcode = f"cp.async.bulk.tensor.{len(point)}d.{space}.global.tile.mbarrier::complete_tx::bytes"
    return f"{moves}\n{guard} {opcode} [%s+{offset}], [{map}, {coords}], [%s+{barrier}]; // HERE\n"


def store(point, guard="@%p1", offset=0, map="%m") -> str:
    moves, coords = coordinates(point)
    opcode = f"cp.async.bulk.tensor.{len(point)}d.global.shared::cta.tile.bulk_group"
    return f"{moves}\n{guard} {opcode} [{map}, {coords}], [%s+{offset}]; // HERE\n"


def expect(nbytes: int) -> str:
    return f"@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s+{MBAR}], {nbytes};"


def copy(nbytes: int, threads: int, out: bool, offset=0) -> str:
    """Move shared memory to `y` (out) or `x` to shared memory, 16 bytes a thread and step."""
    lines = []
    for start in range(0, nbytes, 16 * threads):
        left = (nbytes - start) // 16
        lines.append(f"setp.lt.u32 %p10, %tid, {left}; mad.wide.u32 %d10, %tid, 16, {'%y' if out else '%x'};")
        memory, shared = f"[%d10+{start}]", f"[%s16+{offset + start}]"
        regs = "{%r30, %r31, %r32, %r33}"
        first, second = (f"ld.shared.v4.b32 {regs}, {shared}", f"st.global.v4.b32 {memory}, {regs}") if out else (
            f"ld.global.v4.b32 {regs}, {memory}", f"st.shared.v4.b32 {shared}, {regs}")  # fmt: skip
        lines.append(f"@%p10 {first}; @%p10 {second};")
    return "\n".join(lines)


def loaded(array, box, point, swizzle, offset=0) -> np.ndarray:
    """Bytes in shared memory after a load."""
    nbytes = shared_bytes(box, array.itemsize, swizzle)
    y, x = aligned(nbytes, np.uint8), aligned(nbytes, np.uint8)
    x[:] = 0xEE
    body = LEADER + copy(nbytes, 128, False, offset) + FENCE + expect(int(np.prod(box)) * array.itemsize)
    body += load(point, offset=offset) + WAIT + copy(nbytes, 128, True, offset)
    run(body, block=128, smem=SMEM, x=x, y=y, m=tensor_map(array, box, swizzle), known={"array": array})
    return y


CASES = [  # shape, box (innermost first), coordinates: the first a multiple of 16 bytes
    ((50,), (16,), (8,)),
    ((50,), (16,), (-8,)),
    ((50,), (16,), (40,)),
    ((20, 64), (16, 8), (8, 3)),
    ((20, 64), (16, 8), (-8, -3)),
    ((20, 64), (16, 8), (56, 17)),
    ((5, 9, 32), (8, 4, 3), (16, 2, 1)),
    ((5, 9, 32), (8, 4, 3), (-8, 7, 4)),
    ((3, 4, 9, 32), (16, 3, 2, 2), (8, 8, -1, 2)),
    ((2, 3, 4, 9, 16), (8, 4, 2, 3, 2), (8, -2, 3, -1, 1)),
]


ON_16_BYTES = [c for c in CASES if min(c[2]) >= 0 and c[0][-1] % 8 == 0]


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("shape, box, point", CASES)
def test_loads_of_every_rank_and_swizzle(shape, box, point, swizzle):
    array = filled(shape, np.float16)
    assert (loaded(array, box, point, swizzle) == box_image(array, box, point, swizzle)).all()


@pytest.mark.parametrize("swizzle, inner", [(1, 16), (2, 32), (3, 64), (0, 128)])
@pytest.mark.parametrize("offset", [0, 1024, 128, 896])
def test_a_swizzle_follows_the_absolute_shared_address(swizzle, inner, offset):
    array = filled((40, 128), ml_dtypes.bfloat16)
    box, point = (inner, 32), (inner // 2, 20)
    assert (loaded(array, box, point, swizzle, offset) == box_image(array, box, point, swizzle, offset)).all()


@pytest.mark.parametrize(
    "dtype, box", [(np.uint8, (128, 8)), (np.uint32, (32, 8)), (np.float32, (32, 8)), (np.float16, (64, 8))]
)
def test_loads_of_every_element_type(dtype, box):
    array = filled((30, 160), dtype)
    for point in ((0, 0), (96, 25), (-16, 29)):
        assert (loaded(array, box, point, 3) == box_image(array, box, point, 3)).all()


def test_a_box_that_lies_outside_is_zero_and_counts_in_full():
    array = filled((20, 64), np.float16)
    assert not loaded(array, (16, 8), (64, 0), 0).any()
    assert not loaded(array, (16, 8), (-16, -8), 1).any()
    assert not loaded(array, (16, 8), (2**31 - 8, 0), 0).any()


def test_strides_wider_than_the_tensor():
    """A slice of a larger array: rows and heads apart."""
    whole = filled((4, 12, 6, 64), np.float16)
    part = whole[1:3, :, 4]  # [2, 12, 64]
    assert (loaded(part, (32, 5, 2), (32, 9, 0), 2) == box_image(part, (32, 5, 2), (32, 9, 0), 2)).all()


@pytest.mark.parametrize("transfer", [load, store])
@pytest.mark.parametrize("dtype, first", [(np.float16, 4), (np.float16, -1), (np.float32, 2), (np.uint8, 8)])
def test_the_first_coordinate_is_a_multiple_of_16_bytes(transfer, dtype, first):
    """Anything else is an illegal instruction on an H200."""
    array, x = filled((20, 64), dtype), filled(1024, np.uint8)
    body = LEADER + copy(1024, 32, False) + FENCE + transfer((first, 0))
    words = f"element {first} of {array.itemsize} bytes: the first coordinate must be a multiple of 16 bytes"
    fails(Hazard, body, words, smem=SMEM, x=x, m=tensor_map(array, (16, 8)), known={"array": array})


def test_both_spellings_of_the_destination():
    array = filled((20, 64), np.float16)
    y = aligned(256, np.uint8)
    body = LEADER + expect(256) + load((0, 1), space="shared::cluster") + WAIT + copy(256, 32, True)
    run(body, smem=SMEM, y=y, m=tensor_map(array, (16, 8)), known={"array": array})
    assert (y == box_image(array, (16, 8), (0, 1), 0)).all()


def test_two_loads_on_one_barrier_and_one_cta_each():
    array = filled((64, 64), np.float16)
    y = aligned((3, 4096), np.uint8)
    body = (
        "mul.lo.u32 %r5, %cta, 16;" + LEADER + expect(4096) + load((0, "%r5")).replace("// HERE", "")
        + load((32, "%r5"), offset=2048).replace("// HERE", "") + WAIT
        + "mad.wide.u32 %d20, %cta, 4096, %y;" + copy(4096, 64, True).replace("16, %y", "16, %d20")
    )  # fmt: skip
    run(body, block=64, grid=3, smem=SMEM, y=y, m=tensor_map(array, (32, 32), 2), known={"array": array})
    for cta in range(3):
        assert (y[cta, :2048] == box_image(array, (32, 32), (0, 16 * cta), 2)).all()
        assert (y[cta, 2048:] == box_image(array, (32, 32), (32, 16 * cta), 2, 2048)).all()


# -- counts and waits --------------------------------------------------------------------------------------------------
MAP = {"smem": SMEM, "block": 32}


@pytest.fixture
def q():
    return filled((20, 64), np.float16)


@pytest.mark.parametrize("expected", [128, 512])
def test_a_wrong_expect_tx_never_completes(q, expected):
    """The box has 256 bytes, also where it hangs over the edge."""
    body = LEADER + expect(expected) + load((56, 17)) + WAIT
    words = f"{expected - 256} bytes missing"
    fails(Deadlock, body.replace("// HERE", ""), words, m=tensor_map(q, (16, 8)), known={"q": q}, **MAP)


def test_32_lanes_that_load_count_32_times(q):
    body = LEADER + expect(32 * 256) + load((0, 0), guard="") + WAIT + copy(256, 32, True)
    y = aligned(256, np.uint8)
    run(body, y=y, m=tensor_map(q, (16, 8)), known={"q": q}, **MAP)
    assert (y == box_image(q, (16, 8), (0, 0), 0)).all()


def test_reading_the_destination_before_the_wait(q):
    start = (
        f"st.shared.b32 [%s4], %tid; fence.proxy.async.shared::cta; {LEADER}"
        + expect(256)
        + load((0, 0)).replace("// HERE", "")
    )
    read = "\nld.shared.b32 %r1, [%s4]; // HERE\n"
    known = {"m": tensor_map(q, (16, 8)), "known": {"q": q}, **MAP}
    fails(Hazard, start + read, "a TMA load into it has been issued", "lane 0, address 0x400", **known)
    run(start + WAIT + read, **known)


def test_waiting_on_the_other_parity_does_not_help(q):
    body = LEADER + expect(256) + load((0, 0)).replace("// HERE", "") + WAIT.replace("], 0", "], 1")
    fails(
        Hazard,
        body + "\nld.shared.b32 %r1, [%s4]; // HERE\n",
        "a TMA load into it",
        m=tensor_map(q, (16, 8)),
        known={"q": q},
        **MAP,
    )


def test_waiting_on_another_barrier_does_not_help(q):
    """Two loads, two barriers: only the one that was waited for may be read."""
    body = (
        LEADER + f"@%p1 mbarrier.init.shared.b64 [%s+{MBAR + 8}], 1; bar.sync 0;" + expect(256)
        + expect(256).replace(str(MBAR), str(MBAR + 8)) + load((0, 0), barrier=MBAR + 8).replace("// HERE", "")
        + load((0, 8), offset=256).replace("// HERE", "") + WAIT + "ld.shared.b32 %r1, [%s4+256];"
        + "\nld.shared.b32 %r1, [%s4]; // HERE\n"
    )  # fmt: skip
    fails(Hazard, body, "a TMA load into it has been issued", m=tensor_map(q, (16, 8)), known={"q": q}, **MAP)


def test_storing_to_the_destination_before_the_wait(q):
    body = LEADER + expect(256) + load((0, 0)).replace("// HERE", "") + "\nst.shared.b32 [%s4], %tid; // HERE\n"
    fails(Hazard, body, "a TMA load into it has been issued", m=tensor_map(q, (16, 8)), known={"q": q}, **MAP)


def test_a_load_may_take_effect_as_late_as_its_wait(q):
    """Thread 0 changes global memory after the issue: the copy sees it, as it may on silicon."""
    y = aligned(256, np.uint8)
    before = q.copy()
    body = (
        LEADER
        + expect(256)
        + load((0, 0))
        + "mov.u32 %r1, 0x3C003C00; @%p1 st.global.b32 [%q], %r1;"
        + WAIT
        + copy(256, 32, True)
    )
    run(body, y=y, q=q, m=tensor_map(q, (16, 8)), **MAP)
    assert q[0, 0] == 1.0 and before[0, 0] != 1.0
    assert (y == box_image(q, (16, 8), (0, 0), 0)).all()


def test_a_barrier_that_was_never_initialized(q):
    body = "setp.eq.u32 %p1, %tid, 0;" + load((0, 0))
    fails(Hazard, body, "before mbarrier.init", m=tensor_map(q, (16, 8)), known={"q": q}, **MAP)


@pytest.mark.parametrize(
    "offset, words", [(64, "multiple of 128"), (SMEM - 64 - 128, "leaves the CTA's"), (MBAR, "holds an mbarrier")]
)
def test_destinations_that_cannot_be(q, offset, words):
    body = LEADER + expect(256) + load((0, 0), offset=offset)
    fails(Hazard, body, words, m=tensor_map(q, (16, 8)), known={"q": q}, smem=SMEM + 960 * (offset == MBAR))


# -- stores ------------------------------------------------------------------------------------------------------------
FINISH = "@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;"


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("shape, box, point", ON_16_BYTES + [((20, 64), (16, 8), (64, 0))])
def test_stores_are_clipped_at_the_edge(shape, box, point, swizzle):
    array = filled(shape, np.float16)
    expected = array.copy()
    nbytes = shared_bytes(box, 2, swizzle)
    x = filled(nbytes, np.uint8, seed=9)
    linear = x[box_places(box, 2, swizzle)].view(np.uint16).reshape(box[::-1])
    for index in np.ndindex(*box[::-1]):
        at = tuple(i + c for i, c in zip(index, point[::-1], strict=True))
        if all(i < n for i, n in zip(at, shape, strict=True)):
            expected.view(np.uint16)[at] = linear[index]
    body = copy(nbytes, 128, False) + FENCE + store(point) + FINISH
    run(body, block=128, smem=SMEM, x=x, m=tensor_map(array, box, swizzle), known={"array": array})
    assert (array.view(np.uint16) == expected.view(np.uint16)).all()


def test_a_store_writes_whole_16_bytes_of_a_row():
    """Rows of 21 float16 in a wider array: an H200 writes the three elements that follow, too."""
    whole, x = filled((20, 32), np.float16), filled(512, np.uint8, seed=5)
    expected = whole.copy()
    expected[3:11, 16:24] = x.view(np.float16).reshape(8, 32)[:, :8]
    body = copy(512, 32, False) + FENCE + store((16, 3)) + FINISH
    run(body, smem=SMEM, x=x, m=tensor_map(whole[:, :21], (32, 8)), known={"array": whole})
    assert (whole.view(np.uint16) == expected.view(np.uint16)).all()


def test_a_store_whose_last_16_bytes_leave_the_array():
    x = filled(256, np.uint8)
    line = filled((44,), np.float16)
    body = copy(256, 32, False) + FENCE + store((32,))
    fails(Hazard, body + FINISH, "out of bounds", smem=SMEM, x=x, m=tensor_map(line, (16,)), known={"line": line})


def test_a_load_rounds_to_tf32():
    """TFLOAT32 tensors: to nearest even, NaN to 0x7FFFE000, as on an H200."""
    words = np.array([0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001, 0x7F800000, 0x7FC00001, 0xBF801001, 1], np.uint32)
    array = filled((2, 8), np.float32)
    array.view(np.uint32)[:] = words
    raw = bytearray(tensor_map(array, (8, 2)))
    raw[10] |= 1
    y = aligned(64, np.uint8)
    body = LEADER + expect(64) + load((0, 0)) + WAIT + copy(64, 32, True)
    run(body, smem=SMEM, y=y, m=bytes(raw), known={"array": array})
    rounded = [0x3F800000, 0x3F804000, 0x3F800000, 0x3F802000, 0x7F800000, 0x7FFFE000, 0xBF802000, 0]
    assert y.view(np.uint32).tolist() == rounded * 2


def test_a_store_from_all_lanes_is_idempotent():
    array, x = filled((8, 16), np.float16), filled(256, np.uint8, seed=2)
    run(copy(256, 32, False) + FENCE + store((0, 0), guard="") + FINISH.replace("@%p1 ", ""),
        smem=SMEM, x=x, m=tensor_map(array, (16, 8)), known={"array": array})  # fmt: skip
    assert (array.reshape(-1).view(np.uint8) == x).all()


@pytest.mark.parametrize("finish", ["", "@%p1 cp.async.bulk.commit_group;",
                                    "@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 1;",
                                    "@%p1 cp.async.bulk.wait_group.read 0;"])  # fmt: skip
def test_a_store_that_is_not_waited_for_at_exit(finish):
    array, x = filled((8, 16), np.float16), filled(256, np.uint8)
    body = copy(256, 32, False) + FENCE + store((0, 0)) + finish
    fails(Hazard, body, "CTA (0, 0, 0), warp 0, lane 0 exits with a bulk store", "wait_group.read 0", smem=SMEM, x=x,
          m=tensor_map(array, (16, 8)), known={"array": array})  # fmt: skip


def test_a_source_that_is_overwritten_before_the_wait():
    """Before the wait the store may still have to read it, which is a race; after it, it may be reused."""
    for early in (True, False):
        array, x = filled((8, 16), np.float16), filled(256, np.uint8, seed=3)
        overwrite = (
            "mov.u32 %r1, 0; st.shared.b32 [%s4], %r1; st.shared.b32 [%s4+128], %r1;"
            "fence.proxy.async.shared::cta; bar.sync 0;"
        )
        parts = ("@%p1 cp.async.bulk.commit_group;", "@%p1 cp.async.bulk.wait_group.read 0; bar.sync 0;")
        body = (
            copy(256, 32, False)
            + FENCE
            + store((0, 0))
            + parts[0]
            + (overwrite + parts[1] if early else parts[1] + overwrite)
        )
        options = {"smem": SMEM, "x": x, "m": tensor_map(array, (16, 8)), "known": {"array": array}}
        if early:
            body = body.replace("// HERE", "")  # the store is right, overwriting is wrong
            fails(
                Hazard,
                body,
                "st.shared.b32",
                "shared offset 0x0, the source of a bulk store that may not have been read",
                **options,
            )
        else:
            run(body, **options)
            assert (array.reshape(-1).view(np.uint8) == x).all()


def test_groups_complete_in_order():
    """With one group allowed to be under way, the older store is done, and its source may be reused."""
    array, x = filled((16, 16), np.float16), filled(512, np.uint8, seed=4)
    body = (
        copy(512, 32, False) + FENCE + store((0, 0)).replace("// HERE", "") + "@%p1 cp.async.bulk.commit_group;"
        + store((0, 8), offset=256) + "@%p1 cp.async.bulk.commit_group;"
        + "@%p1 cp.async.bulk.wait_group.read 1; bar.sync 0;"
        + "mov.u32 %r1, 0; st.shared.b32 [%s4], %r1; fence.proxy.async.shared::cta; @%p1 cp.async.bulk.wait_group 0;"
    )  # fmt: skip
    run(body, smem=SMEM, x=x, m=tensor_map(array, (16, 8)), known={"array": array})
    assert (array.reshape(-1).view(np.uint8) == x).all()


def test_a_store_needs_the_proxy_fence():
    array, x = filled((8, 16), np.float16), filled(256, np.uint8)
    body = copy(256, 32, False) + "bar.sync 0; setp.eq.u32 %p1, %tid, 0;" + store((0, 0)) + FINISH
    fails(Hazard, body, "fence.proxy.async", smem=SMEM, x=x, m=tensor_map(array, (16, 8)), known={"array": array})


def test_a_store_of_memory_that_was_never_written():
    array = filled((8, 16), np.float16)
    fails(Hazard, "setp.eq.u32 %p1, %tid, 0;" + store((0, 0)) + FINISH, "never written", smem=SMEM,
          m=tensor_map(array, (16, 8)), known={"array": array})  # fmt: skip


def test_a_store_at_negative_coordinates():
    array, x = filled((8, 16), np.float16), filled(256, np.uint8)
    body = copy(256, 32, False) + FENCE + store((0, -1)) + FINISH
    fails(Hazard, body, "coordinates (0, -1): they must not be negative", smem=SMEM, x=x, m=tensor_map(array, (16, 8)),
          known={"array": array})  # fmt: skip
