"""What a KV tile costs one CTA, from counts and documented rates: the figures that decide between strategies.

Counted, not simulated: latencies, barriers and the dependence of softmax on the tensor core are left out, so the cycles
are a lower bound and the limiter is the resource that reaches it. Rates a cycle of one SM:

    tensor core  8192 FLOP    2.25 PFLOP/s dense bf16 over 148 SMs at 1.86 GHz (B200 data sheet; FlashAttention-4's
                              analysis has the same figure); a tcgen05.mma that fills all 128 lanes runs at it, which
                              for 64 rows of a pair in both halves of the lanes (layout B) is inferred
    smem         128 bytes    read by tcgen05.mma, written by TMA and by the softmax warps (FlashAttention-4's analysis)
    L2           64 bytes     inferred: two dies with the 5120 bytes a cycle of an A100 or H100 each, over 148 SMs
    MUFU         16 ex2       (CUDA programming guide, throughput of native arithmetic instructions)
"""

from __future__ import annotations

from dataclasses import dataclass

from .arch import Arch
from .budget import ELEMENT_BYTES, Tiling
from .chunks import MMA_M, geometry
from .spec import HEAD_DIM_STEP, KernelSpec
from .two_tiles import POLYNOMIAL_PAIRS, QUERY_TILES

TENSOR_FLOP, SMEM_BYTES, L2_BYTES, MUFU_OPS = 8192, 128, 64, 16  # a cycle and SM
RATES = f"{TENSOR_FLOP} FLOP, {SMEM_BYTES} bytes of smem, {L2_BYTES} bytes of L2, {MUFU_OPS} ex2 (sources: cost.py)"
UNIT = 128  # scores are compared a block of UNIT query rows x UNIT keys


@dataclass(frozen=True)
class Cost:
    """One KV tile of one CTA; in a pair, of each of the two. rows x keys: scores that it takes part in.

    mma_instructions: tcgen05.mma that a CTA (or pair) issues. Bytes: mma_read_bytes of shared memory by tcgen05.mma,
    write_bytes into it by TMA and softmax, load_bytes from L2 or global memory. exponentials: of the special-function
    unit.
    """

    rows: int
    keys: int
    passes: int
    mma_instructions: int
    mma_flop: int
    mma_read_bytes: int
    write_bytes: int
    load_bytes: int
    exponentials: int

    @property
    def cycles(self) -> dict[str, float]:
        """Cycles that each resource is busy for the tile."""
        return {
            "tensor core": self.mma_flop / TENSOR_FLOP,
            "smem": (self.mma_read_bytes + self.write_bytes) / SMEM_BYTES,
            "L2": self.load_bytes / L2_BYTES,
            "MUFU": self.exponentials / MUFU_OPS,
        }

    @property
    def limiter(self) -> str:
        """The resource that is busy longest."""
        cycles = self.cycles
        return max(cycles, key=lambda name: cycles[name])

    @property
    def score(self) -> float:
        """SM cycles a block of 128 x 128 scores, all passes and CTAs together: what the planner minimizes."""
        return max(self.cycles.values()) * self.passes * UNIT * UNIT / (self.rows * self.keys)


def cost_of(spec: KernelSpec, arch: Arch, tiling: Tiling) -> Cost:
    """The Cost of a candidate, whether or not it fits."""
    queries, by_fma = (QUERY_TILES, len(POLYNOMIAL_PAIRS)) if tiling.strategy == "two_tiles" else (1, 0)
    if tiling.strategy in ("tiles", "two_tiles"):
        ctas, groups = 1, -(-spec.v_dim // arch.mma_n_max)
        width, k_columns, v_columns = spec.v_dim // groups, spec.head_dim, spec.v_dim
    else:
        shape = geometry(spec, arch, tiling)
        ctas, groups, width = shape.ctas, shape.v_groups, shape.v_width
        k_columns, v_columns = shape.k_chunks * tiling.k_chunk, shape.o_columns
    rows, keys = tiling.tile_m, tiling.tile_n
    step_bytes = HEAD_DIM_STEP * ELEMENT_BYTES  # of one row of A or B that one tcgen05.mma multiplies
    qk_steps, pv_steps = spec.head_dim // HEAD_DIM_STEP, groups * (keys // HEAD_DIM_STEP)
    p_rows = rows if tiling.p_staging == "smem" else 0
    qk_read, pv_read = qk_steps * (rows + keys // ctas), pv_steps * (p_rows + width // ctas)
    mma_rows = MMA_M // ctas
    loaded = keys // ctas * spec.head_dim + keys * spec.v_dim // tiling.passes // ctas
    written = keys // ctas * k_columns + keys * v_columns + p_rows * keys
    return Cost(
        rows=rows * queries,
        keys=keys,
        passes=tiling.passes,
        mma_instructions=queries * (qk_steps + pv_steps),
        mma_flop=2 * queries * mma_rows * HEAD_DIM_STEP * (qk_steps * keys + pv_steps * width),
        mma_read_bytes=queries * step_bytes * (qk_read + pv_read),
        write_bytes=ELEMENT_BYTES * written,
        load_bytes=ELEMENT_BYTES * loaded,
        exponentials=queries * rows * keys * (8 - by_fma) // 8,
    )
