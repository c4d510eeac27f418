"""y = x by TMA: a tile is loaded into shared memory on an mbarrier and stored from there; edges are TMA's to clip."""

import cutlass
import numpy as np
from cutlass import cute
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import from_dlpack

ROWS, COLUMNS = 32, 64  # a tile


@cute.kernel
def copy_kernel(load: cute.CopyAtom, source: cute.Tensor, store: cute.CopyAtom, target: cute.Tensor):
    smem = cutlass.memory.SmemAllocator()
    bar = smem.allocate_array(cutlass.Int64, 1)
    tile = smem.allocate_tensor(cutlass.Float32, tile_layout(), byte_alignment=128)
    thread, _, _ = cute.arch.thread_idx()
    row, column, _ = cute.arch.block_idx()
    tile_in, global_in = cpasync.tma_partition(
        load, 0, cute.make_layout(1), cute.group_modes(tile, 0, 2), tiles(source)
    )
    tile_out, global_out = cpasync.tma_partition(
        store, 0, cute.make_layout(1), cute.group_modes(tile, 0, 2), tiles(target)
    )
    if thread == 0:
        cute.arch.mbarrier_init(bar, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if thread == 0:
        cute.arch.mbarrier_arrive_and_expect_tx(bar, ROWS * COLUMNS * 4)
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
        cute.copy(load, global_in[None, (row, column)], tile_in, tma_bar_ptr=bar)
        cute.arch.mbarrier_wait(bar, 0)
        cute.copy(store, tile_out, global_out[None, (row, column)])
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0)


def tile_layout():
    return cute.make_layout((ROWS, COLUMNS), stride=(COLUMNS, 1))


def tiles(tensor):
    """Mode 0 is one tile, mode 1 the tile's row and column in the grid."""
    return cute.zipped_divide(tensor, (ROWS, COLUMNS))


@cute.jit
def copy(x: cute.Tensor, y: cute.Tensor):
    layout = tile_layout()
    load, source = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), x, layout, (ROWS, COLUMNS))
    store, target = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), y, layout, (ROWS, COLUMNS))
    blocks = cute.ceil_div(x.shape, (ROWS, COLUMNS))
    copy_kernel(load, source, store, target).launch(grid=(*blocks, 1), block=(64, 1, 1))


def main(rows=70, columns=132):
    x = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    y = np.zeros_like(x)
    copy(from_dlpack(x, assumed_align=16), from_dlpack(y, assumed_align=16))
    assert np.array_equal(x, y)
    print(f"tma_copy: {rows} x {columns} are right")


if __name__ == "__main__":
    main()
