"""The matrix: every kernel of specs/ on every shape of specs/matrix.toml, in the emulator, against NumPy.

A failure names the kernel and the shape in the test's id, and the figure in its message. Kernels whose pairs of
features others have too, but for pairs with a head_dim, and of some kernels the shapes that others meet with the same
features, wait for `pytest -m sweep`; `bespoke matrix` runs all.
"""

from functools import lru_cache

import pytest

from generator.compile import Binary, compile_kernel
from generator.covering import all_pairs, pairs_of
from generator.features import TILES
from generator.hopper_features import WARPGROUPS
from generator.matrix import Shape, load_matrix, sweeps
from generator.plan import plan_kernel
from generator.spec import load_spec, spec_names
from generator.verify import verify_kernel
from generator.wide_features import WIDE


@lru_cache(maxsize=4)
def binary_of(kernel: str) -> Binary:
    """Compiled once a process: cases of one kernel stand next to one another, so workers mostly keep theirs."""
    return compile_kernel(plan_kernel(load_spec(kernel)))


SWEPT = {  # kernels, with all their shapes
    "fmha_sm100_d112_gqa4_wl115_wr40_two_tiles",
    "fmha_sm100_d112_two_ctas",
    "fmha_sm100_d112_v144_gqa4_kv2_limit2_nolse_tiles",
    "fmha_sm100_d112_v64_fp16_causal_wl115_wr5_seqlens_sink_unnorm_psmem_stage1_n32",
    "fmha_sm100_d128_causal",
    "fmha_sm100_d128_causal_two_tiles",
    "fmha_sm100_d128_causal_wl127_seqlens_tiles",
    "fmha_sm100_d128_gqa8_causal_wl127_seqlens_sink_kv2_limit2_tiles",
    "fmha_sm100_d128_gqa8_causal_wl127_seqlens_sink_kv2_limit2_two_tiles",
    "fmha_sm100_d128_two_ctas",
    "fmha_sm100_d128_two_tiles",
    "fmha_sm100_d128_v80_fp16_gqa3_wr40_kv2_kvshared_unnorm_tiles_n32",
    "fmha_sm100_d160_gqa3_kv2_two_tiles",
    "fmha_sm100_d160_tiles",
    "fmha_sm100_d160_two_ctas",
    "fmha_sm100_d160_v192_gqa3_kv2_limit2_nolse_tiles_stage1",
    "fmha_sm100_d16_gqa3_causal_two_tiles_stage3_n32",
    "fmha_sm100_d16_gqa4_kv2_limit2_kvshared_tiles",
    "fmha_sm100_d16_two_ctas",
    "fmha_sm100_d16_unnorm_tiles",
    "fmha_sm100_d192_fp16_wl195_wr5_seqlens_sink_kv2_unnorm_psmem_stage1_n32",
    "fmha_sm100_d192_v128_causal_tiles",
    "fmha_sm100_d192_v128_causal_two_ctas",
    "fmha_sm100_d192_v128_causal_two_tiles",
    "fmha_sm100_d192_v128_gqa32_causal_kvshared_tiles",
    "fmha_sm100_d192_v224_gqa3_kv2_limit2_nolse_tiles",
    "fmha_sm100_d256",
    "fmha_sm100_d256_causal_two_ctas",
    "fmha_sm100_d256_gqa3_kv2_limit2_nolse_tiles_stage1",
    "fmha_sm100_d256_tiles",
    "fmha_sm100_d256_two_ctas",
    "fmha_sm100_d256_v160_fp16_gqa2_causal_wl259_wr5_seqlens_sink_kv2_kvshared_unnorm_psmem_n32",
    "fmha_sm100_d272_causal_pair_stage2",
    "fmha_sm100_d272_kv2_limit2",
    "fmha_sm100_d320",
    "fmha_sm100_d320_kv2_limit2",
    "fmha_sm100_d32_gqa2_causal_tiles_ptmem_stage2_n48",
    "fmha_sm100_d32_wl35_nolse_tiles_stage1",
    "fmha_sm100_d384_kv2",
    "fmha_sm100_d448_unnorm",
    "fmha_sm100_d48_gqa3_tiles",
    "fmha_sm100_d48_two_ctas",
    "fmha_sm100_d512",
    "fmha_sm100_d512_causal_kvshared_passes",
    "fmha_sm100_d512_causal_passes",
    "fmha_sm100_d512_fp16_gqa2_causal_unnorm",
    "fmha_sm100_d512_v336_gqa8_causal_wl212_wr5_seqlens_sink_kv2_passes_psmem",
    "fmha_sm100_d576_v512_fp16_gqa3_wr40_kv2_unnorm_passes",
    "fmha_sm100_d576_v512_gqa2_causal_nolse",
    "fmha_sm100_d64_gqa4_causal_seqlens_sink_unnorm_two_tiles",
    "fmha_sm100_d64_gqa4_wl40_wr17_unnorm_tiles",
    "fmha_sm100_d64_kv2_kvshared_tiles",
    "fmha_sm100_d64_v32_fp16_gqa3_sink_nolse_psmem_stage1_n32",
    "fmha_sm100_d64_v96_kv2_limit2_tiles",
    "fmha_sm100_d80_fp16_gqa4_nolse_tiles_stage1",
    "fmha_sm100_d80_kv2_limit2_tiles",
    "fmha_sm100_d80_two_ctas",
    "fmha_sm100_d80_v112_gqa3_tiles",
    "fmha_sm100_d96",
    "fmha_sm100_d96_tiles",
    "fmha_sm100_d96_two_ctas",
    "fmha_sm100_d96_v128_gqa3_kv2_limit2_nolse_tiles_stage1",
    "fmha_sm100_d96_v64_fp16_gqa2_causal_wl99_wr5_seqlens_sink_kv2_kvshared_unnorm_psmem_n32",
    "fmha_sm90_d128",
    "fmha_sm90_d128_gqa8_split",
    "fmha_sm90_d16",
    "fmha_sm90_d160_v64_m256",
    "fmha_sm90_d160_v96_gqa3_kv2_m64",
    "fmha_sm90_d160_v96_gqa4_kv2_limit2_stage3_n112",
    "fmha_sm90_d192_v128",
    "fmha_sm90_d192_v128_causal",
    "fmha_sm90_d192_v128_fp16_gqa2_causal_wl195_wr5_seqlens_sink_kv2_kvshared_unnorm_split_m128",
    "fmha_sm90_d192_v128_fp16_gqa2_causal_wl195_wr5_seqlens_sink_kv2_limit2_kvshared_unnorm_n176",
    "fmha_sm90_d192_v128_gqa4_kv2_stage1_m64",
    "fmha_sm90_d192_v224_gqa3_nolse",
    "fmha_sm90_d192_v64_m256",
    "fmha_sm90_d256_causal",
    "fmha_sm90_d256_causal_wl3000",
    "fmha_sm90_d256_v128_fp16_gqa2_causal_wl259_wr5_seqlens_sink_kv2_kvshared_unnorm_split_m128",
    "fmha_sm90_d256_v64_m256",
    "fmha_sm90_d272_v320_gqa3_wl84_wr5_nolse_m128_n64",
    "fmha_sm90_d304_fp16_gqa3_causal_sink",
    "fmha_sm90_d320_causal",
    "fmha_sm90_d352_v64_causal_sink_kv2_unnorm_stage4",
    "fmha_sm90_d448_kv2_limit2_n64",
    "fmha_sm90_d512_causal",
    "fmha_sm90_d512_causal_seqlens_m128",
    "fmha_sm90_d512_gqa8_causal_wl127_seqlens_sink",
    "fmha_sm90_d64_causal",
    "fmha_sm90_d64_v144_gqa3_kv2_limit2",
    "fmha_sm90_d64_v32_fp16_gqa4_seqlens_kv2_limit2_stage14_n80",
    "fmha_sm90_d96",
    "fmha_sm90_d96_causal",
    "fmha_sm90_d96_gqa4_wr40_kv2_kvshared_n176",
}
BRIEF = {  # kernels whose shapes beyond the edges wait
    "fmha_sm100_d112_gqa3_kv2_kvshared_tiles",
    "fmha_sm100_d128_v160_nolse_tiles_stage1",
    "fmha_sm100_d160_v96_fp16_gqa2_causal_wl163_wr5_seqlens_sink_kv2_kvshared_unnorm_psmem_n32",
    "fmha_sm100_d240_v80_fp16_gqa3_wr20_nolse_two_ctas_stage1",
    "fmha_sm100_d272_v320",
    "fmha_sm100_d272_v320_fp16_gqa3_wl0_wr5_seqlens_sink_kv2_nolse_passes_psmem_n32",
    "fmha_sm100_d320_causal_passes_stage2_n32",
    "fmha_sm100_d320_kvshared",
    "fmha_sm100_d32_v16_fp16_gqa3_wr5_seqlens_sink_kv2_limit2_kvshared_unnorm_psmem_n32",
    "fmha_sm100_d32_v48_kv2_two_ctas_n32",
    "fmha_sm100_d384_fp16_nolse_pair_n64",
    "fmha_sm100_d448_causal_chunks_psmem",
    "fmha_sm100_d448_v288_wl148_wr5_seqlens_sink_kv2_kvshared_nolse_n32",
    "fmha_sm100_d448_v496_gqa3_kv2_limit2_n32",
    "fmha_sm100_d48_v32_wl0_wr5_seqlens_sink_kv2_kvshared_nolse_tiles",
    "fmha_sm100_d48_v80_gqa2_sink_kv2_limit2_nolse_psmem_stage1",
    "fmha_sm100_d576_v512_nolse_passes",
    "fmha_sm90_d128_kv2_limit2_stage1_m64",
    "fmha_sm90_d128_v160_gqa3_seqlens_kv2_unnorm_stage1_n64",
    "fmha_sm90_d128_v80_kv2_limit2_nolse_split_stage1_m256",
    "fmha_sm90_d144_kv2",
    "fmha_sm90_d160_v192_nolse_stage1_n48",
    "fmha_sm90_d16_kvshared_nolse_n176",
    "fmha_sm90_d16_v48_n64",
    "fmha_sm90_d256_gqa2_causal_stage1_m128_n112",
    "fmha_sm90_d256_v128_fp16_gqa2_wl259_wr5_seqlens_sink_kv2_nolse_stage1_m64_n48",
    "fmha_sm90_d256_v128_gqa3_kv2_limit2_kvshared_unnorm",
    "fmha_sm90_d384_fp16_gqa4_unnorm",
    "fmha_sm90_d512_gqa8_causal",
    "fmha_sm90_d96_stage8_m256_n48",
    "fmha_sm90_d96_v64_fp16_gqa3_causal_wl99_wr5_seqlens_sink_kvshared_unnorm_split_m256_n48",
}
EDGES = sweeps()[0]  # of every kernel but those of a group of 128


def waits(kernel: str, shape: Shape) -> bool:
    """Whether the case is left to `pytest -m sweep`."""
    edge = (shape.batch, shape.kv_heads, shape.queries, shape.keys) in EDGES.shapes
    return kernel in SWEPT or (kernel in BRIEF and not edge)


CASES = [
    pytest.param(*case, id=f"{case.kernel}-{case.shape}", marks=[pytest.mark.sweep] * waits(*case))
    for case in load_matrix()
]


@pytest.mark.parametrize("kernel, shape", CASES)
def test_kernel_is_right(kernel, shape):
    report = verify_kernel(binary_of(kernel), shape)
    assert report.passed, str(report)


@pytest.mark.parametrize("design", [TILES, WIDE, WARPGROUPS], ids=["tiles", "wide", "warpgroups"])
def test_what_waits_for_the_sweep_has_its_features_covered_without_it(design):
    """Every pair of feature values that meets in specs/, but for head_dim's, meets in a kernel that does not wait, and
    every head_dim; and every value but head_dim's meets each table of matrix.toml that it meets at all.
    """
    rows = {name: design.features(load_spec(name)) for name in design.names()}
    wanted = {pair for pair in all_pairs(design.factors) if "head_dim" not in (pair[0], pair[2])}
    pairs = {name: pairs_of(row, design.factors) & wanted for name, row in rows.items()}
    head_dims = {name: {row["head_dim"]} for name, row in rows.items()}
    values = {
        name: {(a, x) for a, x in row.items() if a != "head_dim" and x in design.factors[a]}
        for name, row in rows.items()
    }

    def met(sets, names):
        return set().union(*(sets[name] for name in names))

    assert met(pairs, rows.keys() - SWEPT) == met(pairs, rows)
    assert met(head_dims, rows.keys() - SWEPT) == met(head_dims, rows)
    for table in sweeps():
        names = {name for name in rows if table.takes(name)}
        waiting = SWEPT if table is EDGES else SWEPT | BRIEF
        assert met(values, names - waiting) == met(values, names), table.name


def test_what_waits_for_the_sweep_leaves_every_strategy():
    def strategies(names):
        return {plan_kernel(load_spec(name)).tiling.strategy for name in names}

    assert set(spec_names()) >= SWEPT | BRIEF and not SWEPT & BRIEF
    assert all(EDGES.takes(name) for name in BRIEF)
    assert strategies(set(spec_names()) - SWEPT - BRIEF) == strategies(spec_names())
