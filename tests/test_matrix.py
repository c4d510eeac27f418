"""The matrix: every kernel of specs/ on every shape of specs/matrix.toml, in the emulator, against NumPy.

A failure names the kernel and the shape in the test's id, and the figure in its message. Kernels of sm_90a whose pairs
of features others have too wait for `pytest -m sweep`; `bespoke matrix` runs all.
"""

from functools import lru_cache

import pytest

from generator.compile import Binary, compile_kernel
from generator.matrix import load_matrix
from generator.plan import plan_kernel
from generator.spec import load_spec
from generator.verify import verify_kernel


@lru_cache(maxsize=4)
def binary_of(kernel: str) -> Binary:
    """Compiled once a process: cases of one kernel stand next to one another, so workers mostly keep theirs."""
    return compile_kernel(plan_kernel(load_spec(kernel)))


SWEPT = {
    *("fmha_sm90_d64_causal", "fmha_sm90_d96", "fmha_sm90_d96_causal", "fmha_sm90_d128", "fmha_sm90_d192_v128"),
    *("fmha_sm90_d192_v128_causal", "fmha_sm90_d256_causal", "fmha_sm90_d320_causal", "fmha_sm90_d512_causal"),
    *("fmha_sm90_d352_v64_causal_sink_kv2_unnorm_stage4", "fmha_sm90_d272_v320_gqa3_wl84_wr5_nolse_m128_n64"),
}
CASES = [
    pytest.param(*case, id=f"{case.kernel}-{case.shape}", marks=[pytest.mark.sweep] * (case.kernel in SWEPT))
    for case in load_matrix()
]


@pytest.mark.parametrize("kernel, shape", CASES)
def test_kernel_is_right(kernel, shape):
    report = verify_kernel(binary_of(kernel), shape)
    assert report.passed, str(report)
