"""C = A B^T by tcgen05.mma of a kind that the command line names: A [M, K] and B [N, K], one tile a block.

64 rows a tile lie in half of the lanes and are loaded in the shape 16x256b; float16 accumulators are packed as they are
loaded.
"""

import sys

import cutlass
import ml_dtypes
import numpy as np
from cutlass import Float16, Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.cute.runtime import from_dlpack

TILE_N, TMEM_COLUMNS = 64, 64
K_MAJOR, MN_MAJOR = OperandMajorMode.K, OperandMajorMode.MN
E4M3, E5M2 = cutlass.Float8E4M3FN, cutlass.Float8E5M2
NUMPY = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2, cutlass.TFloat32: np.float32,
         cutlass.Int8: np.int8, cutlass.Uint8: np.uint8, Float16: np.float16}  # fmt: skip
OUTPUT = {Float32: np.float32, Float16: np.float16, Int32: np.int32}
CASES = {  # name → types of A, B and the accumulator, rows of a tile, majors
    "tf32": (cutlass.TFloat32, cutlass.TFloat32, Float32, 128, K_MAJOR, K_MAJOR),
    "f16_half": (Float16, Float16, Float16, 128, K_MAJOR, K_MAJOR),
    "f16_64": (Float16, Float16, Float32, 64, K_MAJOR, K_MAJOR),
    "f8": (E4M3, E5M2, Float32, 128, K_MAJOR, MN_MAJOR),
    "f8_64": (E4M3, E4M3, Float32, 64, MN_MAJOR, K_MAJOR),
    "s8": (cutlass.Int8, cutlass.Int8, Int32, 128, K_MAJOR, K_MAJOR),
}


class Gemm:
    def __init__(self, a_type, b_type, acc_type, tile_m, a_major, b_major):
        self.a_type, self.b_type, self.acc_type, self.tile_m = a_type, b_type, acc_type, tile_m
        self.a_major, self.b_major = a_major, b_major
        self.mma_k = 256 // a_type.width
        self.tile_k = 4 * self.mma_k

    def mma(self):
        shape, source = (self.tile_m, TILE_N, self.mma_k), tcgen05.OperandSource.SMEM
        rest = (shape, tcgen05.CtaGroup.ONE, source, self.a_major, self.b_major)
        if self.a_type is cutlass.TFloat32:
            op = tcgen05.MmaTF32Op(*rest)
        elif self.a_type is cutlass.Int8:
            op = tcgen05.MmaI8Op(self.a_type, *rest)
        elif self.a_type is Float16:
            op = tcgen05.MmaF16BF16Op(Float16, self.acc_type, *rest)
        else:
            op = tcgen05.MmaF8F6F4Op(self.a_type, self.b_type, self.acc_type, *rest)
        return cute.make_tiled_mma(op)

    def layout(self, rows, kind, major):
        atoms = tcgen05.SmemLayoutAtomKind
        atom = tcgen05.make_smem_layout_atom(atoms.K_SW128 if major == K_MAJOR else atoms.MN_SW64, kind)
        order = (1, 2) if major == K_MAJOR else (2, 1)
        return tcgen05.tile_to_mma_shape(atom, ((rows, self.mma_k), 1, self.tile_k // self.mma_k), order=order)

    @cute.jit
    def __call__(self, a: cute.Tensor, b: cute.Tensor, c: cute.Tensor):
        load, tile = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE), (self.tile_m, TILE_N, self.tile_k)
        layout_a = self.layout(self.tile_m, self.a_type, self.a_major)
        layout_b = self.layout(TILE_N, self.b_type, self.b_major)
        internal = cutlass.TFloat32 if self.a_type is cutlass.TFloat32 else None
        tma_a, ma = cute.nvgpu.make_tiled_tma_atom_A(load, a, layout_a, tile, self.mma(), internal_type=internal)
        tma_b, mb = cute.nvgpu.make_tiled_tma_atom_B(load, b, layout_b, tile, self.mma(), internal_type=internal)
        grid = (a.shape[0] // self.tile_m, b.shape[0] // TILE_N, 1)
        self.kernel(tma_a, ma, tma_b, mb, c).launch(grid=grid, block=(128, 1, 1))

    @cute.kernel
    def kernel(self, tma_a: cute.CopyAtom, ma: cute.Tensor, tma_b: cute.CopyAtom, mb: cute.Tensor, c: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        row, column, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = cutlass.memory.SmemAllocator()
        bars = smem.allocate_array(Int64, 3)
        slot = smem.allocate_array(Int32, 1)
        layout_a = self.layout(self.tile_m, self.a_type, self.a_major)
        layout_b = self.layout(TILE_N, self.b_type, self.b_major)
        sa = smem.allocate_tensor(self.a_type, layout_a.outer, byte_alignment=1024, swizzle=layout_a.inner)
        sb = smem.allocate_tensor(self.b_type, layout_b.outer, byte_alignment=1024, swizzle=layout_b.inner)
        if warp == 0:
            cute.arch.alloc_tmem(TMEM_COLUMNS, slot)
            cute.arch.relinquish_tmem_alloc_permit()
            with cute.arch.elect_one():
                for i in range(3):
                    cute.arch.mbarrier_init(bars + i, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        tmem = cute.arch.retrieve_tmem_ptr(self.acc_type, 16, slot)

        mma = self.mma()
        part = mma.get_slice(0)
        ga = part.partition_A(cute.local_tile(ma, (self.tile_m, self.tile_k), (row, None)))
        gb = part.partition_B(cute.local_tile(mb, (TILE_N, self.tile_k), (column, None)))
        views = []
        for atom, shared, far in ((tma_a, sa, ga), (tma_b, sb, gb)):
            flat = [cute.group_modes(tensor, 0, 3) for tensor in (shared, far)]
            views.append(cpasync.tma_partition(atom, 0, cute.make_layout(1), *flat))
        (to_a, from_a), (to_b, from_b) = views
        accumulator = mma.make_fragment_C(mma.partition_shape_C((self.tile_m, TILE_N)))
        accumulator = cute.make_tensor(tmem, accumulator.layout)
        a, b = mma.make_fragment_A(sa), mma.make_fragment_B(sb)
        load_bytes = (self.tile_m + TILE_N) * 128
        if warp == 0:
            for k in cutlass.range(cute.size(from_a, mode=[1]), unroll=1):
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(bars, load_bytes)
                cute.copy(tma_a, from_a[None, k], to_a, tma_bar_ptr=bars)
                cute.copy(tma_b, from_b[None, k], to_b, tma_bar_ptr=bars)
                cute.arch.mbarrier_wait(bars, k & 1)
                mma.set(tcgen05.Field.ACCUMULATE, k > 0)
                for i in cutlass.range_constexpr(self.tile_k // self.mma_k):
                    cute.gemm(mma, accumulator, a[None, None, i], b[None, None, i], accumulator)
                    mma.set(tcgen05.Field.ACCUMULATE, True)
                with cute.arch.elect_one():
                    tcgen05.commit(bars + 1)
                cute.arch.mbarrier_wait(bars + 1, k & 1)
            with cute.arch.elect_one():
                tcgen05.commit(bars + 2)
        cute.arch.mbarrier_wait(bars + 2, 0)
        cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")

        tile = accumulator[(None, None), 0, 0]
        pack = tcgen05.Pack.PACK_16b_IN_32b if self.acc_type is Float16 else tcgen05.Pack.NONE
        if cutlass.const_expr(self.tile_m == 64):
            op = tcgen05.Ld16x256bOp(tcgen05.Repetition(8), pack)
        else:
            op = tcgen05.Ld32x32bOp(tcgen05.Repetition(32), pack)
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(op, self.acc_type), tile).get_slice(thread)
        where = copy.partition_D(
            cute.local_tile(cute.make_identity_tensor(c.shape), (self.tile_m, TILE_N), (row, column))
        )
        values = cute.make_rmem_tensor(where.shape, self.acc_type)
        cute.copy(copy, copy.partition_S(tile), values)
        cute.arch.fence_view_async_tmem_load()
        for i in cutlass.range(cute.size(values), unroll_full=True):
            c[where[i]] = values[i]
        cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")
        cute.arch.sync_threads()
        if warp == 0:
            cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
            cute.arch.dealloc_tmem(tmem, TMEM_COLUMNS)


def tensor(values, kind, major):
    """A [rows, K] tensor, contiguous along K or along the rows."""
    stored = np.ascontiguousarray(values if major == K_MAJOR else values.T)
    raw = stored.view(np.uint8) if kind in (E4M3, E5M2) else stored
    raw = raw if major == K_MAJOR else raw.T
    made = from_dlpack(raw, assumed_align=16)
    made.element_type = kind
    return made, raw


def main(name, m=128, n=128, k=256):
    a_type, b_type, acc_type, *_, a_major, b_major = CASES[name]
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, (r, k)).astype(NUMPY[t]) for r, t in ((m, a_type), (n, b_type)))
    c = np.zeros((m, n), OUTPUT[acc_type])
    (ta, _), (tb, _) = tensor(a, a_type, a_major), tensor(b, b_type, b_major)
    Gemm(*CASES[name])(ta, tb, from_dlpack(c, assumed_align=16))
    assert (c == a.astype(np.float64) @ b.astype(np.float64).T).all()
    print(f"gemm_kinds_sm100: {name} is right")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        main(case)
