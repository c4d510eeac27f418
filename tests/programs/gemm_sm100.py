"""C = A B^T on Blackwell's tensor cores: A [M, K] and B [N, K] float16, C [M, N] float32.

One 128 x 64 tile a block, K in steps of 64 through one shared-memory stage: TMA, tcgen05.mma, tensor memory, registers.
"""

import cutlass
import numpy as np
from cutlass import Float16, Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.cute.runtime import from_dlpack

TILE_M, TILE_N, TILE_K = 128, 64, 64
MMA_K = 16
LOAD_BYTES = (TILE_M + TILE_N) * TILE_K * 2
TMEM_COLUMNS = 64


def make_mma():
    shape, k_major = (TILE_M, TILE_N, MMA_K), OperandMajorMode.K
    source = tcgen05.OperandSource.SMEM
    op = tcgen05.MmaF16BF16Op(Float16, Float32, shape, tcgen05.CtaGroup.ONE, source, k_major, k_major)
    return cute.make_tiled_mma(op)


def operand_layout(rows):
    atom = tcgen05.make_smem_layout_atom(tcgen05.SmemLayoutAtomKind.K_SW128, Float16)
    return tcgen05.tile_to_mma_shape(atom, ((rows, MMA_K), 1, TILE_K // MMA_K), order=(1, 2))


def tma_views(atom, smem, gmem):
    flat = [cute.group_modes(tensor, 0, 3) for tensor in (smem, gmem)]
    return cpasync.tma_partition(atom, 0, cute.make_layout(1), *flat)


@cute.kernel
def gemm_kernel(tma_a: cute.CopyAtom, ma: cute.Tensor, tma_b: cute.CopyAtom, mb: cute.Tensor, c: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    row, column, _ = cute.arch.block_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = cutlass.memory.SmemAllocator()
    bars = smem.allocate_array(Int64, 3)  # loaded, multiplied, all done
    slot = smem.allocate_array(Int32, 1)
    layout_a, layout_b = operand_layout(TILE_M), operand_layout(TILE_N)
    sa = smem.allocate_tensor(Float16, layout_a.outer, byte_alignment=1024, swizzle=layout_a.inner)
    sb = smem.allocate_tensor(Float16, layout_b.outer, byte_alignment=1024, swizzle=layout_b.inner)
    if warp == 0:
        cute.arch.alloc_tmem(TMEM_COLUMNS, slot)
        cute.arch.relinquish_tmem_alloc_permit()
        with cute.arch.elect_one():
            for i in range(3):
                cute.arch.mbarrier_init(bars + i, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    tmem = cute.arch.retrieve_tmem_ptr(Float32, 16, slot)

    mma = make_mma()
    part = mma.get_slice(0)
    ga = part.partition_A(cute.local_tile(ma, (TILE_M, TILE_K), (row, None)))
    gb = part.partition_B(cute.local_tile(mb, (TILE_N, TILE_K), (column, None)))
    to_a, from_a = tma_views(tma_a, sa, ga)
    to_b, from_b = tma_views(tma_b, sb, gb)
    accumulator = mma.make_fragment_C(mma.partition_shape_C((TILE_M, TILE_N)))
    accumulator = cute.make_tensor(tmem, accumulator.layout)
    a, b = mma.make_fragment_A(sa), mma.make_fragment_B(sb)
    steps = cute.size(from_a, mode=[1])
    if warp == 0:
        for k in cutlass.range(steps, unroll=1):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(bars, LOAD_BYTES)
            cute.copy(tma_a, from_a[None, k], to_a, tma_bar_ptr=bars)
            cute.copy(tma_b, from_b[None, k], to_b, tma_bar_ptr=bars)
            cute.arch.mbarrier_wait(bars, k & 1)
            mma.set(tcgen05.Field.ACCUMULATE, k > 0)
            for i in cutlass.range_constexpr(TILE_K // MMA_K):
                cute.gemm(mma, accumulator, a[None, None, i], b[None, None, i], accumulator)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            with cute.arch.elect_one():
                tcgen05.commit(bars + 1)
            cute.arch.mbarrier_wait(bars + 1, k & 1)  # the stage may be filled again
        with cute.arch.elect_one():
            tcgen05.commit(bars + 2)
    cute.arch.mbarrier_wait(bars + 2, 0)  # a barrier of its own: a phase of bars + 1 can be passed twice unseen
    cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")

    tile = accumulator[(None, None), 0, 0]
    atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(32)), Float32)
    copy = tcgen05.make_tmem_copy(atom, tile).get_slice(thread)
    values = cute.make_rmem_tensor(copy.partition_D(cute.make_identity_tensor(tile.shape)).shape, Float32)
    cute.copy(copy, copy.partition_S(tile), values)
    cute.arch.fence_view_async_tmem_load()
    for n in cutlass.range(TILE_N, unroll_full=True):
        c[row * TILE_M + thread, column * TILE_N + n] = values[n]
    cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")
    cute.arch.sync_threads()
    if warp == 0:
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
        cute.arch.dealloc_tmem(tmem, TMEM_COLUMNS)


@cute.jit
def gemm(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
    load, tile = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE), (TILE_M, TILE_N, TILE_K)
    tma_a, ma = cute.nvgpu.make_tiled_tma_atom_A(load, a, operand_layout(TILE_M), tile, make_mma())
    tma_b, mb = cute.nvgpu.make_tiled_tma_atom_B(load, b, operand_layout(TILE_N), tile, make_mma())
    grid = (a.shape[0] // TILE_M, b.shape[0] // TILE_N, 1)
    gemm_kernel(tma_a, ma, tma_b, mb, c).launch(grid=grid, block=(TILE_M, 1, 1))


def main(m=256, n=128, k=192):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((rows, k)).astype(np.float16) for rows in (m, n))
    c = np.full((m, n), np.nan, np.float32)
    gemm(*(from_dlpack(x, assumed_align=16) for x in (a, b, c)))
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    error = np.linalg.norm(c - exact) / np.linalg.norm(exact)
    assert error < 1e-6, error
    print(f"gemm_sm100: {m} x {n} x {k} is right")


if __name__ == "__main__":
    main()
