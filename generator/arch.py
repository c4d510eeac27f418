"""Hardware facts, one object an architecture; every number has its source.

Sources: [PG] CUDA C++ Programming Guide, table of technical specifications by compute capability. [PTX] PTX ISA 9.1.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What one SM does in a cycle at most."""

    tensor_flop: int
    smem_bytes: int  # read by the tensor core, written by TMA and by warps
    l2_bytes: int
    mufu_ops: int  # ex2

    def __str__(self) -> str:
        return (
            f"{self.tensor_flop} FLOP, {self.smem_bytes} bytes of smem, {self.l2_bytes} bytes of L2, "
            f"{self.mufu_ops} ex2 (sources: arch.py)"
        )


@dataclass(frozen=True)
class Arch:
    """What one SM and one CTA have. Bytes, threads and 32-bit registers or TMEM columns."""

    name: str
    smem_per_cta: int  # bytes a CTA may ask for (opt-in dynamic shared memory)
    registers_per_sm: int
    registers_per_thread: int
    register_granule: int  # a thread's count is rounded up to a multiple of this
    threads_per_cta: int
    named_barriers: int
    warp_size: int
    group_warps: int  # of a warpgroup: warp w of one reaches TMEM lanes 32w to 32w+31 only
    tmem_columns: int  # 0: the architecture has no tensor memory
    tmem_alloc_min: int  # columns; an allocation is a power of two
    tmem_lanes: int
    tmem_lane_step: int  # from a lane's address to the next one's
    mma_m: int  # rows of A that one dense MMA instruction multiplies at full rate, alone or in a CTA pair of half each
    mma_n_max: int  # columns of D that one dense MMA instruction writes
    mma_k: int  # columns of A that one dense MMA instruction of 16-bit operands multiplies
    p_stagings: tuple[str, ...]  # where the second GEMM can read P
    rates: Rates | None  # None: nothing is planned by them yet


SM100A = Arch(
    name="sm_100a",
    smem_per_cta=232448,  # 227 KiB [PG]; also what the driver reports as the opt-in maximum
    registers_per_sm=65536,  # [PG]
    registers_per_thread=255,  # [PG]
    register_granule=8,  # [PTX 9.7.19.5] setmaxnreg steps by 8
    threads_per_cta=1024,  # [PG]
    named_barriers=16,  # [PTX 9.7.13.1]
    warp_size=32,
    group_warps=4,  # [PTX 9.7.15.1]
    tmem_columns=512,  # [PTX 9.7.16.1]
    tmem_alloc_min=32,  # [PTX 9.7.16.7.1]
    tmem_lanes=128,  # [PTX 9.7.16.1]
    tmem_lane_step=1 << 16,  # an address has the lane in its upper half [PTX 9.7.16.1]
    mma_m=128,  # [PTX 9.7.16.2]
    mma_n_max=256,  # [PTX 9.7.16.2]
    mma_k=16,  # [PTX 9.7.16.2]
    p_stagings=("tmem", "smem"),  # tcgen05.mma reads A from tensor or shared memory [PTX 9.7.16.10]
    rates=Rates(
        # 2.25 PFLOP/s dense bf16 over 148 SMs at 1.86 GHz (B200 data sheet; FlashAttention-4's analysis has the same
        # figure); a tcgen05.mma that fills all 128 lanes runs at it, which for 64 rows of a pair in both halves of the
        # lanes (layout B) is inferred
        tensor_flop=8192,
        smem_bytes=128,  # FlashAttention-4's analysis
        l2_bytes=64,  # inferred: two dies with the 5120 bytes a cycle of an A100 or H100 each, over 148 SMs
        mufu_ops=16,  # [PG], throughput of native arithmetic instructions
    ),
)

SM90A = Arch(
    name="sm_90a",
    smem_per_cta=232448,  # 227 KiB [PG]
    registers_per_sm=65536,  # [PG]
    registers_per_thread=255,  # [PG]
    register_granule=8,  # [PTX 9.7.19.5]
    threads_per_cta=1024,  # [PG]
    named_barriers=16,  # [PTX 9.7.13.1]
    warp_size=32,
    group_warps=4,  # [PTX 9.7.15.1]
    tmem_columns=0,
    tmem_alloc_min=0,
    tmem_lanes=0,
    tmem_lane_step=0,
    mma_m=64,  # [PTX 9.7.15.2]
    mma_n_max=256,  # [PTX 9.7.15.2]
    mma_k=16,  # [PTX 9.7.15.2]
    p_stagings=("register", "smem"),  # wgmma reads A from registers or shared memory [PTX 9.7.15.5]
    rates=Rates(
        # 989 TFLOP/s dense bf16 over 132 SMs at 1.83 GHz (H100 SXM data sheet)
        tensor_flop=4096,
        smem_bytes=128,  # 32 banks of 4 bytes [PG]
        l2_bytes=39,  # 5120 bytes a cycle over 132 SMs, as of an A100
        mufu_ops=16,  # [PG], throughput of native arithmetic instructions
    ),
)

ARCHS: dict[str, Arch] = {arch.name: arch for arch in (SM100A, SM90A)}
