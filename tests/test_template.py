"""What the compiled kernel's PTX must say of its specification: K extents, descriptors, TMEM addresses, no spills."""

import re

import pytest

from generator.compile import compile_kernel
from generator.plan import plan_kernel
from generator.spec import load_spec

MMA_K = 16
SWIZZLE_CODE = {128: 2, 64: 4, 32: 6}  # ptx.md 3.2, bits 61-63 of a tcgen05 shared-memory descriptor

SPECS = (
    "fmha_sm100_d16_unnorm_tiles",
    "fmha_sm100_d48_fp16_causal_unnorm_psmem_stage1_n32",
    "fmha_sm100_d80_fp16_gqa4_nolse_tiles_stage1",
    "fmha_sm100_d96_tiles",
    "fmha_sm100_d128_causal_tiles",
    "fmha_sm100_d128_psmem",
    "fmha_sm100_d256_tiles",
    "fmha_sm100_d128_causal_wl127_seqlens_tiles",
    "fmha_sm100_d64_gqa4_wl40_wr17_unnorm_tiles",
    "fmha_sm100_d128_gqa8_causal_wl127_seqlens_sink_kv2_limit2_tiles",
    "fmha_sm100_d192_v128_gqa32_causal_kvshared_tiles",
)


@pytest.fixture(params=SPECS)
def binary(request):
    return compile_kernel(plan_kernel(load_spec(request.param)))


def mma_lines(binary):
    return re.findall(r"tcgen05\.mma\S* +(.*);", binary.ptx)


def instruction_descriptor(spec, columns, b_is_mn_major):
    """ptx.md 3.1: float32 accumulator, 16-bit A and B, N and M = 128."""
    kind = 1 if spec.dtype == "bf16" else 0
    return 1 << 4 | kind << 7 | kind << 10 | b_is_mn_major << 16 | columns >> 3 << 17 | 128 >> 4 << 24


def test_every_gemm_covers_its_whole_k_extent(binary):
    """QK has head_dim / 16 instructions and PV tile_n / 16; each stands twice, in the loop and outside it."""
    plan = binary.plan
    assert len(mma_lines(binary)) == 2 * (plan.spec.head_dim // MMA_K + plan.tile_n // MMA_K)


def test_instruction_descriptors(binary):
    plan, spec = binary.plan, binary.spec
    constants = set(map(int, re.findall(r"mov\.b32\s+%r\d+, (\d+);", binary.ptx)))
    assert instruction_descriptor(spec, plan.tile_n, False) in constants
    assert instruction_descriptor(spec, spec.v_dim, True) in constants


def test_shared_memory_descriptors_name_the_planned_swizzles(binary):
    layouts = binary.plan.layouts
    found = {
        constant >> 61
        for constant in (int(text) & (1 << 64) - 1 for text in re.findall(r"%rd\d+, (-?\d{16,});", binary.ptx))
        if constant >> 46 & 0b111 == 0b001
    }
    assert found == {SWIZZLE_CODE[layouts[name].swizzle_bytes] for name in layouts if name != "sO"}


def test_p_is_read_from_its_own_tmem_columns(binary):
    """In the TS form A is [base + P's first column + 8 k]: one K = 16 step takes 8 columns."""
    plan = binary.plan
    a_operands = [line.split(", ")[1] for line in mma_lines(binary)]
    from_tmem = {operand.strip("[]") for operand in a_operands if operand.startswith("[")}
    if plan.p_staging == "smem":
        assert from_tmem == set()
        return
    base = re.search(r"tcgen05\.dealloc\S*\s+(%r\d+)", binary.ptx).group(1)
    offsets = dict(re.findall(rf"add\.s32\s+(%r\d+), {base}, (\d+);", binary.ptx))
    first = plan.budget.region("P").column
    assert {int(offsets[register]) for register in from_tmem} == {first + 8 * k for k in range(plan.tile_n // MMA_K)}


def test_transaction_bytes_are_whole_tiles(binary):
    layouts = binary.plan.layouts
    loaded = ("sQ", "sK") if binary.spec.kv_shared else ("sQ", "sK", "sV")
    announced = re.findall(r"mbarrier\.arrive\.expect_tx\S* %rd\d+, \[[^]]+\], (%r\d+);", binary.ptx)
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", binary.ptx))
    assert {int(constants[register]) for register in announced} == {layouts[n].bytes for n in loaded}


def test_nothing_spills(binary):
    assert binary.spill_store_bytes == binary.spill_load_bytes == 0
