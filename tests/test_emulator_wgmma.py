"""emulator/ops/wgmma: products of a warpgroup against NumPy in every operand form, and what may go wrong there."""

import numpy as np
import pytest
from ptx_kernels import aligned, operand_image, tensor_map
from wgmma_programs import (
    BF16,
    COMMIT,
    E4M3,
    E5M2,
    F16,
    FENCE,
    S8,
    TF32,
    U8,
    Operands,
    fails,
    halves,
    run,
    vector,
    wait,
    zeros,
)

from generator.emulator import Hazard, UnsupportedInstruction


# -- the product in every form -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("a_mn, b_mn", [(False, False), (False, True), (True, False), (True, True)])
def test_every_major_and_swizzle(a_mn, b_mn, swizzle, dtype):
    operands = Operands(64, 4, dtype, a_mn=a_mn, b_mn=b_mn, swizzle=swizzle)
    assert (operands.multiply() == operands.product()).all()


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("b_mn", [False, True])
def test_a_in_registers(b_mn, swizzle):
    operands = Operands(48, 4, F16, b_mn=b_mn, swizzle=swizzle)
    assert (operands.multiply(registers=True) == operands.product()).all()


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_n(n):
    for b_mn in (False, True):
        operands = Operands(n, 2, b_mn=b_mn, swizzle=1 + n // 8 % 3, seed=n)
        assert (operands.multiply() == operands.product()).all()


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("swizzle", [0, 3])
@pytest.mark.parametrize("a, b", [(TF32, TF32), (E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)])
def test_tf32_and_fp8(a, b, swizzle, registers):
    operands = Operands(40, 2, a, b, swizzle=swizzle)
    assert (operands.multiply(registers=registers) == operands.product()).all()


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("dtype, other", [(F16, F16), (E4M3, E5M2), (E5M2, E5M2)])
def test_accumulators_in_float16(dtype, other, registers):
    operands = Operands(24, 2, dtype, other, d="f16")
    assert (operands.multiply(registers=registers) == operands.product()).all()


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("a, b", [(S8, S8), (S8, U8), (U8, S8), (U8, U8)])
@pytest.mark.parametrize("d", ["s32", "s32.satfinite"])
def test_integers(a, b, d, registers):
    operands = Operands(48, 3, a, b, d=d)
    rng = np.random.default_rng(4)
    for part in (operands.a, operands.b):
        part[:] = rng.integers(np.iinfo(part.dtype).min, np.iinfo(part.dtype).max + 1, part.shape)
    images = [operand_image(halves(v), False, 3) for v in (operands.a, operands.b)]
    operands.x[: sum(map(len, images))] = np.concatenate(images)
    product = operands.a.astype(np.int64) @ operands.b.astype(np.int64).T
    assert (operands.multiply(registers=registers) == product).all()
    for first in (2**31 - 1, -(2**31)):
        start = "".join(f"mov.b32 %acc{i}, {first & 0xFFFFFFFF:#x};" for i in range(24))
        body = start + operands.mmas("%one", registers=registers) + COMMIT + wait()
        total = np.full(product.shape, first)
        for k in range(0, operands.k, 32):
            total = total + operands.a[:, k : k + 32].astype(np.int64) @ operands.b[:, k : k + 32].astype(np.int64).T
            total = np.clip(total, -(2**31), 2**31 - 1) if d != "s32" else total.astype(np.int32).astype(np.int64)
        assert (operands.multiply(body, registers=registers) == total).all()


def test_tf32_drops_the_low_bits_of_the_mantissa():
    operands = Operands(8, 1, TF32)
    expected = operands.product()
    operands.x.view(np.uint32)[:] |= (operands.x.view(np.uint32) != 0) * np.uint32(0x1FFF)
    assert (operands.multiply() == expected).all()


def test_a_float16_accumulator_is_rounded_by_every_instruction():
    operands = Operands(8, 4, F16, d="f16")
    operands.a[:], operands.b[:] = 0, 0
    operands.a[:, ::16], operands.b[:, ::16] = 1, 1
    operands.x[:] = 0
    images = [operand_image(halves(v), False, 3) for v in (operands.a, operands.b)]
    operands.x[: sum(map(len, images))] = np.concatenate(images)
    start = "".join(f"mov.b32 %acc{i}, 0x68006800;" for i in range(2))  # 2048: a step of 1 is rounded away
    result = operands.multiply(start + operands.mmas("%one") + COMMIT + wait())
    assert (result == 2048).all()


@pytest.mark.parametrize("negate", [(1, -1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("registers", [False, True])
def test_negated_operands(negate, registers):
    operands = Operands(16, 2, negate=negate)
    assert (operands.multiply(registers=registers) == operands.product()).all()
    start = "".join(f"mov.b32 %acc{i}, 0f41200000;" for i in range(8))
    body = start + operands.mmas("%one", registers=registers) + COMMIT + wait()
    assert (operands.multiply(body, registers=registers) == operands.product() + 10).all()


def test_warpgroups_with_an_a_each_and_several_ctas():
    operands = Operands(64, 4, groups=3)
    assert (operands.multiply(grid=5) == operands.product()).all()


def test_warpgroups_that_read_different_b():
    """The upper warpgroup multiplies by the second half of the k extent only."""
    operands = Operands(32, 4, groups=2)
    low, high = operands.db[0], operands.db[2]
    pick = f"mov.b64 %db, {low:#x}; setp.ge.u32 %q, %tid, 128; @%q add.s64 %db, %db, {high - low};"
    step = operands.step(0, "%zero").replace(f"mov.b64 %db, {low:#x};", pick)
    a, b = operands.a.astype(np.float32), operands.b.astype(np.float32)
    expected = np.concatenate([a[:64, :16] @ b[:, :16].T, a[64:, :16] @ b[:, 32:48].T])
    assert (operands.multiply(FENCE + step + COMMIT + wait(), grid=2) == expected).all()


def test_ctas_that_read_different_operands():
    """CTA 1 takes the later k step of both; each CTA adds into its own rows."""
    operands = Operands(16, 4, groups=2)
    da, db = (d[2] - d[0] for d in (operands.da, operands.db))
    move = f"mul.wide.u32 %d1, %cta, {da}; add.s64 %da, %da, %d1; mul.wide.u32 %d1, %cta, {db}; add.s64 %db, %db, %d1;"
    text = operands.step(0, "%zero").replace("\nwgmma", f"{move}\nwgmma")
    y = np.zeros((2, *operands.output().shape), np.uint32)
    shift = f"mad.wide.u32 %d11, %tid, {4 * operands.registers}, %y; mul.wide.u32 %d1, %cta, {y[0].nbytes};"
    dump = operands.dump().replace(f"mad.wide.u32 %d11, %tid, {4 * operands.registers}, %y;",
                                   f"{shift} add.s64 %d11, %d11, %d1;")  # fmt: skip
    run(operands.fill() + FENCE + text + COMMIT + wait() + dump, 256, 2, x=operands.x, y=y)
    a, b = operands.a.astype(np.float32), operands.b.astype(np.float32)
    for cta, k in ((0, slice(0, 16)), (1, slice(32, 48))):
        assert (operands.matrix(y[cta]) == a[:, k] @ b[:, k].T).all()


def test_only_one_of_two_warpgroups_multiplies():
    operands = Operands(16, 2, groups=2)
    guarded = operands.mmas().replace("\nwgmma.mma", "\n@%q wgmma.mma")
    body = zeros("acc", 8) + "setp.ge.u32 %q, %tid, 128;" + guarded + COMMIT + wait()
    assert (operands.multiply(body)[:64] == 0).all()
    assert (operands.multiply(body)[64:] == operands.product()[64:]).all()


# -- accumulation, groups, registers -----------------------------------------------------------------------------------
def test_scale_d_false_needs_no_accumulator_and_true_adds():
    operands = Operands(16, 2)
    assert (operands.multiply() == operands.product()).all()
    twice = operands.mmas() + COMMIT + operands.mmas("%one") + COMMIT + wait()
    assert (operands.multiply(twice) == 2 * operands.product()).all()
    runtime = "setp.gt.u32 %q, %cta, 7;" + operands.mmas("%q") + COMMIT + wait()
    assert (operands.multiply(zeros("acc", 8) + runtime) == operands.product()).all()
    again = operands.mmas() + operands.mmas() + COMMIT + wait()  # the second product replaces the first
    assert (operands.multiply(again) == operands.product()).all()


def test_adding_to_an_accumulator_that_was_never_written():
    operands = Operands(16, 1)
    body = operands.fill() + FENCE + operands.step(0, "%one", mark="// HERE") + COMMIT + wait()
    fails(Hazard, body, "%acc0", "never written", x=operands.x)


def test_accumulators_carried_and_scaled_around_a_loop():
    operands = Operands(16, 2)
    scale = "".join(f"add.f32 %acc{i}, %acc{i}, %acc{i};" for i in range(8))
    body = zeros("acc", 8) + f"mov.u32 %r1, 0; LOOP: {scale}\n" + operands.mmas("%one") + COMMIT + wait()
    body += "add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 3; @%p1 bra LOOP;"
    assert (operands.multiply(body) == 7 * operands.product()).all()


def test_a_copy_of_the_accumulator_keeps_its_old_value():
    """Moves only rename in the translator; the wait writes the register's storage."""
    operands = Operands(16, 1)
    start = "".join(f"mov.b32 %acc{i}, 0f3F800000;" for i in range(8)) + "bar.sync 0;"
    copies = "".join(f"mov.b32 %other{i}, %acc{i};" for i in range(8))
    scale = "".join(f"add.f32 %acc{i}, %acc{i}, %acc{i};" for i in range(8))
    joined = "".join(f"add.f32 %acc{i}, %acc{i}, %other{i};" for i in range(8))
    for change, old in (("", 1), (scale, 2)):
        body = start + copies + change + operands.mmas("%one") + COMMIT + wait() + joined
        assert (operands.multiply(body) == operands.product() + old + 1).all()


def test_accumulators_that_share_registers_in_another_order():
    operands = Operands(16, 1)
    reverse = "{" + ", ".join(f"%acc{i}" for i in (4, 5, 6, 7, 0, 1, 2, 3)) + "}"
    second = operands.step(0, "%one").replace(vector("acc", 8), reverse)
    body = operands.mmas() + COMMIT + wait() + FENCE + second + COMMIT + wait()
    product = operands.product()
    assert (operands.multiply(body) == product + np.roll(product, 8, axis=1)).all()


def test_a_wait_leaves_the_younger_groups_pending():
    operands = Operands(16, 2)
    two = operands.mmas() + COMMIT + operands.mmas(acc="other") + COMMIT
    assert (operands.multiply(two + wait(1) + "bar.sync 0;" + operands.dump() + wait()) == operands.product()).all()
    body = operands.fill() + two + wait(1) + "bar.sync 0;\nadd.u32 %r1, %other3, 0; // HERE\n" + wait()
    fails(Hazard, body, "touches register %other3", "wgmma in flight", x=operands.x)
    sums = "".join(f"add.f32 %acc{i}, %acc{i}, %other{i};" for i in range(8))
    assert (operands.multiply(two + wait(1) + wait(0) + sums) == 2 * operands.product()).all()


def test_a_wait_covers_only_what_was_committed():
    operands = Operands(16, 1)
    body = operands.fill() + operands.mmas() + wait() + "\nadd.u32 %r1, %acc0, 0; // HERE\n"
    fails(Hazard, body, "touches register %acc0", x=operands.x)


# -- what may go wrong -------------------------------------------------------------------------------------------------
ONE = Operands(16, 1)
QUIET = FENCE + ONE.step(0, "%zero")


@pytest.mark.parametrize("between", ["", COMMIT, COMMIT + wait(1), "bar.sync 0;"])
@pytest.mark.parametrize(
    "use", ["add.u32 %r1, %acc7, 0;", "mov.b32 %acc7, 0;", "add.u32 %acc7, %tid, 0;", "st.shared.b32 [%s4], %acc7;"]
)
def test_the_accumulator_may_not_be_touched_before_the_wait(between, use):
    body = ONE.fill() + QUIET + between + f"\n{use} // HERE\n" + COMMIT + wait()
    fails(Hazard, body, "touches register %acc7", "accumulator register of a wgmma in flight", x=ONE.x)


def test_registers_of_a_may_not_be_changed_before_the_wait():
    text = ONE.fill() + ONE.load_fragments() + ONE.mmas(registers=True) + COMMIT
    more = {"x": ONE.x, "f": ONE.fragments()}
    fails(Hazard, text + "\nmov.b32 %frag2, 0; // HERE\n" + wait(), "touches register %frag2", "operand A", **more)
    again = ONE.step(0, "%zero", "other", True)  # another wgmma may read the same registers
    run(text + again + COMMIT + wait() + "mov.b32 %frag2, 0;", **more)


def test_registers_of_a_may_not_be_an_accumulator_in_flight():
    text = ONE.fill() + QUIET + ONE.step(0, "%zero", "other", True, "// HERE").replace("%frag", "%acc")
    fails(Hazard, text + COMMIT + wait(), "touches register %acc0", x=ONE.x)


def test_two_accumulators_in_flight_may_not_overlap():
    shifted = ONE.step(0, "%zero", mark="// HERE").replace(vector("acc", 8), vector("acc", 8, 4))
    fails(Hazard, ONE.fill() + QUIET + shifted + COMMIT + wait(), "uses register %acc4", x=ONE.x)


def test_registers_need_a_fence_after_they_were_written():
    fails(Hazard, ONE.fill() + ONE.step(0, "%zero", mark="// HERE"), "%acc0", "no wgmma.fence since", x=ONE.x)
    change = "add.u32 %acc5, %tid, 0;"
    add = ONE.step(0, "%one", mark="// HERE")
    for between in (change, change + "bar.sync 0;", change + "bar.sync 0; bar.sync 0;"):
        body = ONE.fill() + QUIET + COMMIT + wait() + between + add
        fails(Hazard, body, "uses register %acc5", "no wgmma.fence since", x=ONE.x)
        run(body.replace(add, FENCE + add + COMMIT + wait()), x=ONE.x)
    run(ONE.fill() + QUIET + COMMIT + wait() + add + COMMIT + wait(), x=ONE.x)  # only wgmma used the accumulator
    read = "add.u32 %r1, %acc5, 0;"  # and may not be overwritten before it was read
    fails(Hazard, ONE.fill() + QUIET + COMMIT + wait() + read + ONE.step(0, "%zero", mark="// HERE"), "%acc5", x=ONE.x)
    for set_to, fine in (("mov.b32 %acc4, 0; mov.b32 %acc5, %acc4;", True), ("mov.b32 %acc5, %tid;", False)):
        body = ONE.fill() + QUIET + COMMIT + wait() + FENCE + set_to + add + COMMIT + wait()
        if fine:  # compilers move a constant below the fence: a warning
            run(body, x=ONE.x)
        else:
            fails(Hazard, body, "uses register %acc5", "no wgmma.fence since", x=ONE.x)
    text = ONE.fill() + FENCE + ONE.load_fragments() + ONE.step(0, "%zero", registers=True, mark="// HERE")
    fails(Hazard, text, "uses register %frag0", "no wgmma.fence since", x=ONE.x, f=ONE.fragments())


def test_operands_need_the_proxy_fence():
    fails(Hazard, ONE.fill("bar.sync 0;") + QUIET, "operand A of CTA (0, 0, 0)", "fence.proxy.async", x=ONE.x)
    fails(Hazard, ONE.fill("bar.sync 0;") + ONE.load_fragments() + ONE.mmas(registers=True), "operand B of CTA",
          "fence.proxy.async", x=ONE.x, f=ONE.fragments())  # fmt: skip


def test_operands_that_were_never_written():
    far = QUIET.replace(f"{ONE.db[0]:#x}", f"{ONE.db[0] + (32768 >> 4):#x}")
    fails(Hazard, ONE.fill() + far, "operand B of CTA (0, 0, 0)", "never written", x=ONE.x)


def test_operands_outside_shared_memory():
    fails(Hazard, QUIET, "descriptor of A reaches shared offsets", "the CTA has 256 bytes", smem=256)


def test_an_operand_that_threads_overwrite_before_the_wait():
    store = "\nst.shared.b32 [%s4], %tid; // HERE\n"
    fails(Hazard, ONE.fill() + QUIET + COMMIT + store + wait(), "operand A of a wgmma in flight", x=ONE.x)
    at = ONE.stride
    store = f"\nst.shared.b32 [%s4+{at}], %tid; // HERE\n"
    fails(Hazard, ONE.fill() + QUIET + COMMIT + store + wait(), "operand B of a wgmma in flight", x=ONE.x)
    store = "st.shared.b32 [%s4], %tid;"
    assert (ONE.multiply(QUIET + COMMIT + wait() + store) == ONE.product()).all()


def test_an_operand_may_be_overwritten_once_its_own_warpgroup_has_waited():
    """What the other warpgroup still multiplies is held, what this one has multiplied no longer."""
    operands = Operands(16, 1, groups=2)
    split = operands.mmas() + COMMIT + "setp.ge.u32 %q, %tid, 128; @%q bra LATE;\n"
    late = "\nLATE:\n" + wait()
    for held, side in ((operands.stride, "A"), (2 * operands.stride, "B")):
        store = f"\nst.shared.b32 [%s4+{held}], %tid; // HERE\n"
        body = operands.fill() + split + wait() + store + late
        fails(Hazard, body, f"operand {side} of a wgmma in flight", x=operands.x, block=256)
    store = "st.shared.b32 [%s4], %tid;\n"
    assert (operands.multiply(split + wait() + store + late) == operands.product()).all()
    early = operands.fill() + split + store.replace(";", "; // HERE") + wait() + late
    fails(Hazard, early, "operand A of a wgmma in flight", x=operands.x, block=256)


def test_an_operand_that_tma_overwrites_before_the_wait():
    source = aligned((8, 64), BF16)
    load = "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
    bar = len(ONE.x)
    begin = f"""setp.eq.u32 %p1, %tid, 0; mov.u32 %r149, 0; @%p1 mbarrier.init.shared.b64 [%s+{bar}], 1;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s+{bar}], 1024;"""
    copy = f"\n@%p1 {load} [%s], [%m, {{%r149, %r149}}], [%s+{bar}]; // HERE\n"
    more = {"m": tensor_map(source, (64, 8), 3), "known": {"source": source}}
    text = ONE.fill() + begin + QUIET + COMMIT
    fails(Hazard, text + copy + wait(), "operand A of a wgmma in flight", x=ONE.x, **more)
    fails(Hazard, ONE.fill() + begin + copy.replace("// HERE", "") + QUIET, "operand A", "TMA load", x=ONE.x, **more)
    assert (ONE.multiply(begin + QUIET + COMMIT + wait() + copy, **more) == ONE.product()).all()


def test_a_warp_that_exits_with_a_wgmma_in_flight():
    marked = QUIET.replace(", 0, 0;", ", 0, 0; // HERE")
    for end in ("", COMMIT, COMMIT + wait(1)):
        fails(Hazard, ONE.fill() + marked + end, "wgmma.wait_group is missing", x=ONE.x)


def test_part_of_a_warp():
    guarded = QUIET.replace("\nwgmma.mma", "\n@%q wgmma.mma").replace(", 0, 0;", ", 0, 0; // HERE")
    fails(Hazard, ONE.fill() + "setp.ne.u32 %q, %tid, 5;" + guarded, "all 32 lanes must converge", x=ONE.x)


def test_lanes_that_disagree():
    for register, what in (("%da", "descriptors of A"), ("%db", "descriptors of B")):
        odd = f"cvt.u64.u32 %d1, %tid; add.s64 {register}, {register}, %d1;"
        text = QUIET.replace("\nwgmma.mma", f"{odd}\nwgmma.mma")
        fails(Hazard, ONE.fill() + text, f"different {what}", x=ONE.x)
    body = zeros("acc", 8) + "setp.ne.u32 %q, %tid, 5;" + FENCE + ONE.step(0, "%q")
    fails(Hazard, ONE.fill() + body, "different values of scale-d", x=ONE.x)


@pytest.mark.parametrize("bit", [14, 15, 30, 31, 46, 47, 48, 52, 61])
def test_reserved_bits_of_the_descriptor(bit):
    text = QUIET.replace(f"{ONE.db[0]:#x}", f"{ONE.db[0] | 1 << bit:#x}")
    fails(Hazard, ONE.fill() + text, "matrix descriptor", "reserved bit", x=ONE.x)


def test_a_base_offset_is_refused():
    text = QUIET.replace(f"{ONE.db[0]:#x}", f"{ONE.db[0] | 1 << 50:#x}")
    fails(UnsupportedInstruction, ONE.fill() + text, "base offset", x=ONE.x)


def test_operands_that_do_not_fit_the_opcode():
    wrong = QUIET.replace(vector("acc", 8), vector("acc", 4))
    fails(Hazard, ONE.fill() + wrong, "D has 4 registers, N = 16 takes 8", x=ONE.x)
    wrong = QUIET.replace("1, 1, 0, 0;", "1, 1, 0;")
    fails(UnsupportedInstruction, ONE.fill() + wrong, "1 transpose immediates, it takes 2", x=ONE.x)
    wrong = QUIET.replace("1, 1, 0, 0;", "2, 1, 0, 0;")
    fails(Hazard, ONE.fill() + wrong, "imm-scale must be 1 or -1", x=ONE.x)
    wrong = QUIET.replace("m64n16k16", "m64n12k16")
    fails(UnsupportedInstruction, ONE.fill() + wrong, "does not know 'wgmma.mma_async.sync.aligned.m64n12k16", x=ONE.x)
