"""The matrix: every kernel of specs/ on every shape of specs/matrix.toml, in the emulator, against NumPy.

A failure names the kernel and the shape in the test's id, and the figure in its message.
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


@pytest.mark.parametrize("kernel, shape", load_matrix(), ids=str)
def test_kernel_is_right(kernel, shape):
    report = verify_kernel(binary_of(kernel), shape)
    assert report.passed, str(report)
