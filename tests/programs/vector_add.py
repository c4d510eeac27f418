"""c = a + b: one thread an element; compiled once and called, then called through the implicit compilation."""

import sys

import cutlass
import numpy as np
from cutlass import cute
from cutlass.cute.runtime import from_dlpack

THREADS = 128


@cute.kernel
def add_kernel(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * THREADS + thread
    if i < cute.size(a):
        c[i] = a[i] + b[i]


@cute.jit
def add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    blocks = cute.ceil_div(cute.size(a), THREADS)
    add_kernel(a, b, c).launch(grid=(blocks, 1, 1), block=(THREADS, 1, 1))


@cute.jit
def add_with_blocks(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, blocks: cutlass.Int32):
    add_kernel(a, b, c).launch(grid=(blocks, 1, 1), block=(THREADS, 1, 1))


def tensors(*arrays):
    return [from_dlpack(array).mark_layout_dynamic() for array in arrays]


def main(n=1000, seed=0):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(n, dtype=np.float32) for _ in range(2))
    c, again = np.zeros_like(a), np.zeros_like(a)
    compiled = cute.compile(add, *tensors(a, b, c))
    compiled(*tensors(a, b, c))
    add(*tensors(a, b, again))
    assert np.array_equal(c, a + b)
    assert np.array_equal(again, a + b)
    print(f"vector_add: {n} elements are right")
    return c


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
