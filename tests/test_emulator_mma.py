"""emulator/ops/tcgen05: matrix products against NumPy, in every operand layout, and what may go wrong around them.

Operands are small integers, so every product and sum is exact and results are compared bit for bit.
"""

import ml_dtypes
import numpy as np
import pytest
from ptx_kernels import (
    aligned,
    fails,
    instruction_descriptor,
    operand_image,
    operand_layout,
    run,
    smem_descriptor,
    tensor_map,
    with_tmem,
)

from generator.emulator import Deadlock, Hazard, UnsupportedInstruction

BF16, F16 = ml_dtypes.bfloat16, np.float16
MMA = "tcgen05.mma.cta_group::1.kind::f16"
TMEM_SLOT, MBAR, SMEM = 131072, 131080, 131200
INIT = f"setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%s+{MBAR}], 1; mov.u32 %r149, 0;"
HAND_OVER = """tcgen05.wait::st.sync.aligned; tcgen05.fence::before_thread_sync; bar.sync 0;
tcgen05.fence::after_thread_sync;"""
COMMIT = f"@%p1 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%s+{MBAR}];"
FENCE = "fence.proxy.async.shared::cta; bar.sync 0;"


def wait(parity: int = 0) -> str:
    return f"W{parity}: mbarrier.try_wait.parity.shared::cta.b64 %p9, [%s+{MBAR}], {parity}; @!%p9 bra W{parity};"


def integers(shape, dtype, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


def fill(nbytes: int) -> str:
    """128 threads copy the bytes at `x` to shared memory."""
    regs = "{%r30, %r31, %r32, %r33}"
    steps = (
        f"ld.global.v4.b32 {regs}, [%d10+{i}]; st.shared.v4.b32 [%s16+{i}], {regs};" for i in range(0, nbytes, 2048)
    )
    return "mad.wide.u32 %d10, %tid, 16, %x;" + "\n".join(steps) + FENCE


def issue(d: int, a: int | str, b: int, idesc: int, accumulate, tail: str = "") -> str:
    """One MMA by thread 0; `a` is a descriptor, or the text of a TMEM address."""
    left = f"[{a}]" if isinstance(a, str) else "%d1"
    move = "" if isinstance(a, str) else f"mov.b64 %d1, {a:#x};"
    return (
        f"{move} mov.b64 %d2, {b:#x}; mov.b32 %r148, {idesc:#x}; setp.ne.u32 %p2, {int(accumulate)}, 0;"
        f"add.u32 %r147, %r150, {d};\n@%p1 {MMA} [%r147], {left}, %d2, %r148, %p2{tail}; // HERE\n"
    )


def dump(n: int, d: int = 0) -> str:
    """Every thread stores its row: columns d to d + n of its lane to y[thread]."""
    text = f"mad.wide.u32 %d11, %tid, {4 * n}, %y;"
    regs = "{" + ", ".join(f"%r{i}" for i in range(16)) + "}"
    for c in range(0, n, 16):
        text += f"tcgen05.ld.sync.aligned.32x32b.x16.b32 {regs}, [%r151+{d + c}];"
        text += "".join(f"st.global.b32 [%d11+{4 * (c + i)}], %r{i};" for i in range(16))
    return text


def descriptors(rows: int, k: int, mn_major: bool, swizzle: int, base: int) -> list[int]:
    _, _, lbo, sbo, starts = operand_layout(rows, k, mn_major, swizzle)
    return [smem_descriptor(base + start, lbo, sbo, swizzle) for start in starts]


class Operands:
    """A [128, k] and B [n, k] in shared memory, and the descriptors of each step of 16 k."""

    def __init__(self, n=64, k=64, dtype=BF16, a_mn=False, b_mn=False, swizzle_a=3, swizzle_b=3, seed=0):
        self.n, self.k = n, k
        self.a, self.b = integers((128, k), dtype, seed), integers((n, k), dtype, seed + 1)
        images = [operand_image(self.a, a_mn, swizzle_a), operand_image(self.b, b_mn, swizzle_b)]
        self.x = aligned(sum(map(len, images)) + 2048, np.uint8)
        self.x[: len(images[0])], self.x[len(images[0]) : -2048] = images
        self.descriptors_a = descriptors(128, k, a_mn, swizzle_a, 0)
        self.descriptors_b = descriptors(n, k, b_mn, swizzle_b, len(images[0]))
        self.idesc = instruction_descriptor(n, bf16=dtype is BF16, a_mn=a_mn, b_mn=b_mn)
        self.fill = fill(-(-len(self.x) // 2048) * 2048 - 2048)

    def product(self) -> np.ndarray:
        return self.a.astype(np.float32) @ self.b.astype(np.float32).T

    def mmas(self, d=0, first=False, idesc=None) -> str:
        pairs = zip(self.descriptors_a, self.descriptors_b, strict=True)
        return "".join(issue(d, a, b, idesc or self.idesc, first or i) for i, (a, b) in enumerate(pairs))


def multiply(operands: Operands, body: str | None = None, grid: int = 1) -> np.ndarray:
    """Run MMAs (by default the product), wait for them, return D."""
    y = np.zeros((128, operands.n), np.float32)
    body = operands.mmas() if body is None else body
    text = INIT + operands.fill + body + COMMIT + wait() + dump(operands.n)
    run(with_tmem(text, slot=TMEM_SLOT), block=128, grid=grid, smem=SMEM, x=operands.x, y=y)
    return y


# -- the product in every layout ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("a_mn, b_mn", [(False, False), (False, True), (True, False), (True, True)])
def test_every_major_and_swizzle(a_mn, b_mn, swizzle, dtype):
    operands = Operands(64, 64, dtype, a_mn, b_mn, swizzle, swizzle)
    assert (multiply(operands) == operands.product()).all()


@pytest.mark.parametrize("n", range(16, 257, 16))
@pytest.mark.parametrize("b_mn", [False, True])
def test_every_n(n, b_mn):
    operands = Operands(n, 32, b_mn=b_mn, swizzle_a=2, swizzle_b=2 if n % 32 == 0 else 1, seed=n)
    assert (multiply(operands) == operands.product()).all()


@pytest.mark.parametrize("swizzle_a, swizzle_b", [(3, 0), (1, 3), (2, 1)])
def test_operands_with_different_swizzles(swizzle_a, swizzle_b):
    operands = Operands(48, 64, F16, False, False, swizzle_a, swizzle_b)
    assert (multiply(operands) == operands.product()).all()


@pytest.mark.parametrize("k", [16, 48, 128, 256])
def test_many_k_steps(k):
    operands = Operands(32, k, swizzle_a=1, swizzle_b=1)
    assert (multiply(operands) == operands.product()).all()


def test_the_descriptors_that_the_dsl_writes():
    """facts/ptx.md §3.1, §3.3: QK of FlashAttention-4 and its K-major operands with 128-byte swizzle."""
    assert instruction_descriptor(128) == 0x8200490
    assert instruction_descriptor(128, b_mn=True) == 0x8210490
    _, _, _, sbo, _ = operand_layout(128, 64, False, 3)
    assert smem_descriptor(0, 16, sbo, 3) == 0x4000404000010000 | 1024 >> 4


def test_overwrite_and_accumulate():
    operands = Operands(32, 32)
    twice = operands.mmas() + operands.mmas(first=True)
    assert (multiply(operands, twice) == 2 * operands.product()).all()
    assert (multiply(operands, twice + operands.mmas()) == operands.product()).all()


@pytest.mark.parametrize("negate_a, negate_b", [(True, False), (False, True), (True, True)])
def test_negated_operands(negate_a, negate_b):
    operands = Operands(32, 32)
    idesc = instruction_descriptor(32, negate_a=negate_a, negate_b=negate_b)
    sign = (-1) ** (negate_a + negate_b)
    assert (multiply(operands, operands.mmas(idesc=idesc)) == sign * operands.product()).all()


def test_accumulating_onto_what_threads_stored():
    operands = Operands(16, 16)
    store = "cvt.rn.f32.u32 %r0, %tid;"
    store += "".join(f"tcgen05.st.sync.aligned.32x32b.x1.b32 [%r151+{c}], {{%r0}};" for c in range(16)) + HAND_OVER
    y = multiply(operands, store + operands.mmas(first=True))
    assert (y == operands.product() + np.arange(128, dtype=np.float32)[:, None]).all()


def test_two_accumulators_and_two_commits():
    first, second = Operands(32, 32, seed=1), Operands(32, 32, seed=5)
    y = np.zeros((128, 64), np.float32)
    offset = len(first.x) - 2048
    shift = offset >> 4
    moved = second.mmas(d=32)
    for d in (*second.descriptors_a, *second.descriptors_b):
        moved = moved.replace(f"{d:#x}", f"{d + shift:#x}")
    x = np.concatenate([first.x[:-2048], second.x])
    text = INIT + fill(len(x) // 2048 * 2048) + first.mmas() + COMMIT + wait(0)
    text += "bar.sync 0;" + moved + COMMIT + wait(1) + dump(64)
    run(with_tmem(text, slot=TMEM_SLOT), block=128, smem=SMEM, x=aligned(len(x), np.uint8, x), y=y)
    assert (y == np.hstack([first.product(), second.product()])).all()


def test_every_cta_multiplies_its_own_operands():
    """40 CTAs, two waves: CTA c uses B + c, so D grows by c times the row sums of A."""
    operands = Operands(16, 16, F16, swizzle_a=0, swizzle_b=0)
    y = np.zeros((40, 128, 16), np.float32)
    base = len(operand_image(operands.a, False, 0))
    image = aligned((40, len(operands.x)), np.uint8)
    for c in range(40):
        image[c] = operands.x
        image[c, base:-2048] = operand_image((operands.b + np.float16(c)).astype(F16), False, 0)
    own_x = f"%x; mul.wide.u32 %d12, %cta, {len(operands.x)}; add.u64 %d10, %d10, %d12;"
    own_y = "%y; mul.wide.u32 %d12, %cta, 8192; add.u64 %d11, %d11, %d12;"
    text = INIT + operands.fill.replace("%x;", own_x, 1) + operands.mmas() + COMMIT + wait()
    text += dump(16).replace("%y;", own_y, 1)
    run(with_tmem(text, slot=TMEM_SLOT), block=128, grid=40, smem=SMEM, x=image, y=y)
    sums = operands.a.astype(np.float32).sum(axis=1)[:, None]
    for c in range(40):
        assert (y[c] == operands.product() + c * sums).all(), c


# -- A in tensor memory ------------------------------------------------------------------------------------------------
def stored_a(k: int, column: int, finish: str = HAND_OVER) -> str:
    """Each thread stores its row of A, two elements a column, from the array `p`."""
    text = f"mad.wide.u32 %d12, %tid, {2 * k}, %p;"
    for c in range(0, k // 2, 8):
        regs = ", ".join(f"%r{i}" for i in range(8))
        text += "".join(f"ld.global.b32 %r{i}, [%d12+{4 * (c + i)}];" for i in range(8))
        text += f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r151+{column + c}], {{{regs}}};"
    return text + finish


def from_tmem(operands: Operands, column: int, idesc=None) -> str:
    return "".join(
        f"add.u32 %r146, %r150, {column + 8 * i};" + issue(0, "%r146", b, idesc or operands.idesc, i)
        for i, b in enumerate(operands.descriptors_b)
    )


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("b_mn, swizzle", [(False, 3), (True, 3), (True, 1), (False, 0)])
def test_a_from_tensor_memory(b_mn, swizzle, dtype):
    operands = Operands(64, 64, dtype, b_mn=b_mn, swizzle_b=swizzle)
    y = np.zeros((128, 64), np.float32)
    text = INIT + operands.fill + stored_a(64, 200) + from_tmem(operands, 200) + COMMIT + wait() + dump(64)
    run(with_tmem(text, slot=TMEM_SLOT), block=128, smem=SMEM, x=operands.x, y=y, p=operands.a)
    assert (y == operands.product()).all()


def test_a_from_tensor_memory_must_have_been_waited_for():
    operands = Operands(64, 32)
    text = INIT + operands.fill + stored_a(32, 200, finish="bar.sync 0;") + from_tmem(operands, 200)
    fails(Hazard, with_tmem(text, slot=TMEM_SLOT), "tcgen05.wait::st", block=128, smem=SMEM,
          x=operands.x, p=operands.a)  # fmt: skip


def test_a_from_tensor_memory_off_by_one_column():
    operands = Operands(64, 16)
    text = INIT + operands.fill + stored_a(16, 200) + from_tmem(operands, 201)
    fails(Hazard, with_tmem(text, slot=TMEM_SLOT), "A operand", "never written", block=128, smem=SMEM, x=operands.x,
          p=operands.a)  # fmt: skip


def test_mmas_run_in_issue_order_though_their_accumulators_differ():
    """FlashAttention-4 issues P·V and then Q·K of the next tile, whose S overwrites P, with no wait between."""
    operands = Operands(64, 32)
    y = np.zeros((128, 64), np.float32)
    text = INIT + operands.fill + stored_a(32, 200) + from_tmem(operands, 200) + operands.mmas(d=190) + COMMIT + wait()
    for column, expected in ((0, operands.product()), (190, operands.product())):
        run(with_tmem(text + dump(64, column), slot=TMEM_SLOT), block=128, smem=SMEM, x=operands.x, y=y, p=operands.a)
        assert (y == expected).all()


# -- what may go wrong -------------------------------------------------------------------------------------------------
def broken(error: type, text: str, *parts: str, operands=None, columns=512, **more) -> None:
    operands = operands or Operands(32, 16)
    body = with_tmem(INIT + operands.fill + text, columns, TMEM_SLOT)
    fails(error, body, *parts, block=128, smem=SMEM, x=operands.x, **more)


ONE = Operands(32, 16)
A, B = ONE.descriptors_a[0], ONE.descriptors_b[0]
ISSUE = issue(0, A, B, ONE.idesc, False)
READ = "\ntcgen05.ld.sync.aligned.32x32b.x1.b32 {%r0}, [%r151]; // HERE\n"


def test_reading_the_accumulator_before_the_commit_is_waited_for():
    quiet = ISSUE.replace("// HERE", "")
    broken(Hazard, quiet + READ, "wait on the mbarrier of its tcgen05.commit")
    broken(Hazard, quiet + COMMIT + READ, "wait on the mbarrier of its tcgen05.commit")
    broken(Hazard, quiet + COMMIT + wait(1) + READ, "wait on the mbarrier of its tcgen05.commit")


def test_storing_into_the_accumulator_of_a_pending_mma():
    store = "\ntcgen05.st.sync.aligned.32x32b.x1.b32 [%r151], {%r149}; // HERE\n"
    broken(Hazard, ISSUE.replace("// HERE", "") + store, "wait on the mbarrier of its tcgen05.commit")


def test_freeing_the_accumulator_of_a_pending_mma():
    broken(Hazard, ISSUE.replace("// HERE", ""), "tcgen05.dealloc although")


def test_a_wait_without_a_commit_is_a_deadlock():
    broken(Deadlock, ISSUE.replace("// HERE", "") + wait(), "parity 0", "1 of 1 arrivals")


def test_one_commit_is_one_arrival():
    """An mbarrier that expects two arrivals needs two commits."""
    quiet = ISSUE.replace("// HERE", "")
    two = INIT.replace("], 1;", "], 2;")
    y = np.zeros((128, 32), np.float32)
    body = with_tmem(two + ONE.fill + quiet + COMMIT + quiet + COMMIT + wait() + dump(32), slot=TMEM_SLOT)
    run(body, block=128, smem=SMEM, x=ONE.x, y=y)
    assert (y == ONE.product()).all()
    body = with_tmem(two + ONE.fill + quiet + COMMIT + wait(), slot=TMEM_SLOT)
    fails(Deadlock, body, "phase 0, 1 of 2 arrivals", block=128, smem=SMEM, x=ONE.x)


def test_several_lanes_that_issue():
    broken(Hazard, ISSUE.replace("@%p1 ", ""), "issued by several lanes of a warp: elect one")
    broken(Hazard, ISSUE.replace("// HERE", "") + "\n" + COMMIT.replace("@%p1 ", "") + " // HERE\n", "elect one")


def test_the_first_mma_must_not_accumulate():
    broken(Hazard, issue(0, A, B, ONE.idesc, True), "never written", "first MMA must not accumulate")


def test_accumulators_outside_the_allocation():
    broken(
        Hazard, issue(96, A, B, instruction_descriptor(48), False), "accumulator in TMEM columns 96 to 143", columns=128
    )
    broken(Hazard, issue(1 << 16, A, B, ONE.idesc, False), "must start at lane 0")


def test_operands_that_were_never_written():
    broken(Hazard, issue(0, A + (32768 >> 4), B, ONE.idesc, False), "operand A of CTA (0, 0, 0)", "never written")
    broken(Hazard, issue(0, A, B + (32768 >> 4), ONE.idesc, False), "operand B of CTA (0, 0, 0)", "never written")


def test_operands_outside_shared_memory():
    far = smem_descriptor(200 * 1024, 16, 256, 1)
    broken(Hazard, issue(0, far, B, ONE.idesc, False), "descriptor of A reaches", f"{SMEM} bytes")
    below = B - (B & 0x3FFF)
    broken(Hazard, issue(0, A, below, ONE.idesc, False), "descriptor of B reaches shared offsets -1024")


def test_an_operand_whose_load_was_not_waited_for():
    source = aligned((8, 64), BF16)
    load = "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
    text = f"@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s+{MBAR}], 1024;"
    text += f"@%p1 {load} [%s], [%m, {{%r149, %r149}}], [%s+{MBAR}];"
    options = {"m": tensor_map(source, (64, 8), 3), "known": {"source": source}}
    broken(Hazard, text + ISSUE, "operand A of CTA (0, 0, 0)", "a TMA load into it has been issued", **options)


def test_an_operand_that_threads_overwrite_too_soon():
    """The MMA reads as late as it may, so a store into A (also a fenced one) before the wait is a race."""
    zero = "mov.u32 %r9, 0;" + "".join(f"st.shared.b32 [%s4+{i}], %r9;" for i in range(0, 16384, 512)) + FENCE
    broken(Hazard, ISSUE + zero, "overwrites shared offset 0x0, which is operand A of a tcgen05.mma")
    assert (multiply(ONE) == ONE.product()).all()


def test_operands_need_the_proxy_fence():
    operands = Operands(32, 16)
    text = INIT + operands.fill.replace("fence.proxy.async.shared::cta;", "") + ISSUE
    fails(Hazard, with_tmem(text, slot=TMEM_SLOT), "fence.proxy.async", block=128, smem=SMEM, x=operands.x)


@pytest.mark.parametrize(
    "bits, error, words",
    [(1 << 46, Hazard, "bits 46-48 must be 0b001"), (1 << 47, Hazard, "bits 46-48"), (1 << 49,
        UnsupportedInstruction, "base offset"),
     (1 << 51, UnsupportedInstruction, "base offset"), (1 << 52, UnsupportedInstruction, "absolute leading-dimension"),
     (1 << 61, Hazard, "swizzle mode 3 does not exist"), (3 << 61, Hazard, "128-byte swizzle with 32-byte atoms")],
)  # fmt: skip
def test_illegal_shared_memory_descriptors(bits, error, words):
    broken(error, issue(0, A ^ bits, B, ONE.idesc, False), words, f"{A ^ bits:#018x}")
    broken(error, issue(0, A, B ^ bits, ONE.idesc, False), words, f"{B ^ bits:#018x}")


@pytest.mark.parametrize(
    "idesc, error, words",
    [(ONE.idesc ^ 1 << 4, Hazard, "D of type f16 takes operands of type f16"),
     (ONE.idesc | 1 << 2, UnsupportedInstruction, "sparse products are not supported"),
     (ONE.idesc ^ 3 << 4, Hazard, "kind::f16 has D of type f16 (0), f32 (1), not 2"),
     (ONE.idesc | 1 << 30, Hazard, "bits 30-31 are a shift, which only .ws has"),
     (ONE.idesc ^ 3 << 7, Hazard, "takes f16 or bf16"), (ONE.idesc ^ 5 << 10, Hazard, "takes f16 or bf16"),
     (instruction_descriptor(32, m=32), Hazard, "M = 32: kind::f16 with cta_group::1 has M = 64 or 128"),
     (instruction_descriptor(32, m=256), Hazard, "M = 256"),
     (instruction_descriptor(0), Hazard, "N = 0"), (instruction_descriptor(264), Hazard, "N = 264: kind::f16 with "
         "cta_group::1 and M = 128 has N = a multiple of 8 from 8 to 256")],
)  # fmt: skip
def test_illegal_instruction_descriptors(idesc, error, words):
    broken(error, issue(0, A, B, idesc, False), words)


def test_illegal_modifiers():
    broken(Hazard, issue(0, A, B, ONE.idesc, False, ", 16"), "scale-input-d 16: it must be from 0 to 15")
    some = issue(0, A, B, ONE.idesc, False).replace("%r148, %p2", "%r148, {%r149, %r148}, %p2")
    broken(Hazard, some, "disable-output-lane has 2 words, cta_group::1 takes 4")


def test_an_operand_that_tma_overwrites_before_the_mma_is_done():
    """The MMA reads as late as its commit is waited for; a load into its operand meanwhile is a race."""
    source = aligned((8, 64), BF16)
    load = "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes"
    overwrite = f"""@%p1 mbarrier.init.shared.b64 [%s+{MBAR + 8}], 1;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%s+{MBAR + 8}], 1024;
    @%p1 {load} [%s], [%m, {{%r149, %r149}}], [%s+{MBAR + 8}];"""
    y = np.zeros((128, 32), np.float32)
    options = {"y": y, "m": tensor_map(source, (64, 8), 3), "known": {"source": source}}
    broken(
        Hazard,
        ISSUE + COMMIT + overwrite + wait() + dump(32),
        "cp.async.bulk.tensor.2d",
        "which is operand A of a tcgen05.mma",
        **options,
    )
    body = with_tmem(INIT + ONE.fill + ISSUE + COMMIT + wait() + overwrite + dump(32), slot=TMEM_SLOT)
    run(body, block=128, smem=SMEM, x=ONE.x, **options)
    assert (y == ONE.product()).all()


RESERVED = "reserved bits of descriptors are not checked (ops/tcgen05.py: decode_idesc, shared_operand)"


@pytest.mark.parametrize("bit", [3, 6, 23, 29])
def test_reserved_bits_of_the_instruction_descriptor(bit):
    broken((Hazard, UnsupportedInstruction), issue(0, A, B, ONE.idesc | 1 << bit, False), "instruction descriptor")


@pytest.mark.parametrize("bit", [14, 15, 30, 31, 53, 60])
def test_reserved_bits_of_the_shared_memory_descriptor(bit):
    broken((Hazard, UnsupportedInstruction), issue(0, A | 1 << bit, B, ONE.idesc, False), "shared-memory descriptor")
