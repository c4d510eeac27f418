"""y = x + the block's rank in its cluster of two, with a cluster barrier on the way."""

import cutlass
import numpy as np
from cutlass import cute
from cutlass.cute.runtime import from_dlpack

THREADS = 32


@cute.kernel
def rank_kernel(x: cute.Tensor, y: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    rank = cute.arch.block_idx_in_cluster()
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    i = block * THREADS + thread
    y[i] = x[i] + cutlass.Float32(rank)


@cute.jit
def add_ranks(x: cute.Tensor, y: cute.Tensor):
    blocks = cute.size(x) // THREADS
    rank_kernel(x, y).launch(grid=(blocks, 1, 1), block=(THREADS, 1, 1), cluster=(2, 1, 1))


def main(clusters=3):
    x = np.arange(clusters * 2 * THREADS, dtype=np.float32)
    y = np.zeros_like(x)
    add_ranks(from_dlpack(x), from_dlpack(y))
    assert np.array_equal(y, x + np.arange(x.size) // THREADS % 2)
    print(f"cluster_rank: {clusters} clusters are right")


if __name__ == "__main__":
    main()
