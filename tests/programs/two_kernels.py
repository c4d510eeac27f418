"""Two kernels in one program, one after the other on a stream, the second by programmatic dependent launch, and
persistent: as many blocks as the device has multiprocessors.
"""

import cuda.bindings.driver as cuda
import cutlass
import numpy as np
from cutlass import cute
from cutlass.cute.runtime import from_dlpack

THREADS = 32


@cute.kernel
def square_kernel(x: cute.Tensor, squared: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    i = block * THREADS + thread
    squared[i] = x[i] * x[i]
    cute.arch.griddepcontrol_launch_dependents()


@cute.kernel
def sum_kernel(squared: cute.Tensor, sums: cute.Tensor):
    """Row sums of squared [rows, THREADS], by a butterfly of shuffles."""
    cute.arch.griddepcontrol_wait()
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    for row in range(block, cute.size(sums), blocks):
        total = squared[row * THREADS + thread]
        for step in cutlass.range_constexpr(5):
            total += cute.arch.shuffle_sync_bfly(total, offset=1 << step)
        if thread == 0:
            sums[row] = total


@cute.jit
def row_norms(x: cute.Tensor, squared: cute.Tensor, sums: cute.Tensor, sms: cutlass.Int32, stream: cuda.CUstream):
    rows = cute.size(sums)
    square_kernel(x, squared).launch(grid=(rows, 1, 1), block=(THREADS, 1, 1), stream=stream)
    sum_kernel(squared, sums).launch(grid=(sms, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True)


def check(result):
    error, *values = result
    assert error == cuda.CUresult.CUDA_SUCCESS, error
    return values[0] if values else None


def main(rows=11):
    check(cuda.cuInit(0))
    stream = check(cuda.cuStreamCreate(0))
    sms = cutlass.utils.HardwareInfo().get_device_multiprocessor_count()
    x = np.random.default_rng(0).standard_normal(rows * THREADS, dtype=np.float32)
    squared, sums = np.zeros_like(x), np.zeros(rows, np.float32)
    compiled = cute.compile(row_norms, *map(from_dlpack, (x, squared, sums)), sms, stream)
    for _ in range(2):
        compiled(*map(from_dlpack, (x, squared, sums)), sms, stream)
    check(cuda.cuStreamSynchronize(stream))
    np.testing.assert_allclose(sums, (x.reshape(rows, THREADS).astype(np.float64) ** 2).sum(1), rtol=1e-6)
    print(f"two_kernels: {rows} rows on {sms} multiprocessors are right")


if __name__ == "__main__":
    main()
