"""Each block's tile comes back reversed and scaled, through dynamic shared memory; x and y come as raw pointers."""

import cutlass
import numpy as np
from cutlass import cute
from cutlass.cute.runtime import make_ptr

THREADS = 64


@cute.kernel
def reverse_kernel(x: cute.Tensor, y: cute.Tensor, scale: cutlass.Float32):
    smem = cutlass.memory.SmemAllocator()
    tile = smem.allocate_tensor(cutlass.Float32, cute.make_layout(THREADS), byte_alignment=16)
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    tile[thread] = x[block * THREADS + thread]
    cute.arch.sync_threads()
    y[block * THREADS + thread] = tile[THREADS - 1 - thread] * scale


@cute.jit
def reverse(x: cute.Pointer, y: cute.Pointer, n: cutlass.Int32, scale: cutlass.Float32):
    tensors = [cute.make_tensor(pointer, cute.make_layout(n)) for pointer in (x, y)]
    reverse_kernel(*tensors, scale).launch(grid=(n // THREADS, 1, 1), block=(THREADS, 1, 1))


def pointer(array):
    return make_ptr(cutlass.Float32, array.ctypes.data, cute.AddressSpace.gmem, assumed_align=4)


def main(blocks=5):
    x = np.arange(blocks * THREADS, dtype=np.float32)
    y = np.zeros_like(x)
    reverse(pointer(x), pointer(y), x.size, 0.5)
    assert np.array_equal(y.reshape(blocks, THREADS), x.reshape(blocks, THREADS)[:, ::-1] * 0.5)
    print(f"shared_reverse: {blocks} blocks are right")


if __name__ == "__main__":
    main()
