"""Threads print what they see, and the last block to finish says so: printf and an atomic counter."""

import cutlass
import numpy as np
from cutlass import cute
from cutlass.cute.runtime import from_dlpack

THREADS = 32


@cute.kernel
def print_kernel(x: cute.Tensor, done: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    i = block * THREADS + thread
    if x[i] < 0.0:
        cute.printf("block {} thread {}: {} is negative", block, thread, x[i])
    if thread == 0:
        before = cute.arch.atomic_add(done.iterator.llvm_ptr, cutlass.Int32(1))
        if before == blocks - 1:
            cute.printf("all {} blocks are done", blocks)


@cute.jit
def look(x: cute.Tensor, done: cute.Tensor):
    print_kernel(x, done).launch(grid=(cute.size(x) // THREADS, 1, 1), block=(THREADS, 1, 1))


def main(blocks=3):
    x = np.arange(blocks * THREADS, dtype=np.float32)
    x[[5, 40]] = -1.5, -2.25
    done = np.zeros(1, np.int32)
    look(from_dlpack(x), from_dlpack(done))
    assert done[0] == blocks
    print(f"print_and_count: {blocks} blocks are right")


if __name__ == "__main__":
    main()
