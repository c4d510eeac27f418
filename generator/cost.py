"""What a KV tile costs one CTA, from counts and documented rates: the figures that decide between strategies.

Counted, not simulated: latencies, barriers and the dependence of softmax on the tensor core are left out, so the cycles
are a lower bound and the limiter is the resource that reaches it. The rates, of one SM, are
Arch.rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from .arch import Arch, Rates
from .budget import ELEMENT_BYTES, Tiling
from .chunks import geometry
from .columns import CHUNK, IN_K, OUTPUT_GROUPS, chunks_apart, half_width, o_parts, v_buffer_width
from .spec import HEAD_DIM_STEP, KernelSpec
from .two_ctas import CTAS, polynomial_pairs, v_width
from .two_tiles import PAIR_PERIOD, POLYNOMIAL_PAIRS, QUERY_TILES
from .warpgroups import consumers

UNIT = 128  # scores are compared a block of UNIT query rows x UNIT keys


@dataclass(frozen=True)
class Cost:
    """One KV tile of one CTA; in a pair, of each of the two. rows x keys: scores that it takes part in.

    mma_instructions: tcgen05.mma or wgmma that a CTA (or pair) issues. Bytes: mma_read_bytes of shared memory by them,
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
    rates: Rates

    @property
    def cycles(self) -> dict[str, float]:
        """Cycles that each resource is busy for the tile."""
        return {
            "tensor core": self.mma_flop / self.rates.tensor_flop,
            "smem": (self.mma_read_bytes + self.write_bytes) / self.rates.smem_bytes,
            "L2": self.load_bytes / self.rates.l2_bytes,
            "MUFU": self.exponentials / self.rates.mufu_ops,
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
    if tiling.strategy == "warpgroups":
        return _warpgroup_cost(spec, arch, tiling)
    if tiling.strategy == "columns":
        return _column_cost(spec, arch, tiling)
    queries = QUERY_TILES if tiling.strategy == "two_tiles" else 1
    by_fma = len(POLYNOMIAL_PAIRS) if tiling.strategy == "two_tiles" else 0
    if tiling.strategy == "two_ctas":
        by_fma = len(polynomial_pairs(spec, arch))
    one_load, qk_columns = spec.kv_shared and tiling.strategy in ("tiles", "two_tiles", "chunks"), spec.head_dim
    if tiling.strategy in ("tiles", "two_tiles", "two_ctas"):
        ctas, groups = CTAS if tiling.strategy == "two_ctas" else 1, -(-spec.v_dim // arch.mma_n_max)
        width = v_width(spec) if tiling.strategy == "two_ctas" else spec.v_dim // groups
        k_columns = spec.head_dim
        v_columns = 0 if one_load else spec.v_dim // ctas
    else:
        shape = geometry(spec, arch, tiling)
        ctas, groups, width, qk_columns = shape.ctas, shape.v_groups, shape.v_width, shape.qk_columns
        k_columns, v_columns = shape.k_chunks * tiling.k_chunk, 0 if one_load else shape.o_columns
    rows, keys = tiling.tile_m, tiling.tile_n
    step_bytes = HEAD_DIM_STEP * ELEMENT_BYTES  # of one row of A or B that one tcgen05.mma multiplies
    qk_steps, pv_steps = qk_columns // HEAD_DIM_STEP, groups * (keys // HEAD_DIM_STEP)
    p_rows = rows if tiling.p_staging == "smem" else 0
    qk_read, pv_read = qk_steps * (rows + keys // ctas), pv_steps * (p_rows + width // ctas)
    mma_rows = arch.mma_m if tiling.strategy == "two_ctas" else arch.mma_m // ctas
    loaded = keys // ctas * spec.head_dim + (0 if one_load else keys * spec.v_dim // tiling.passes // ctas)
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
        exponentials=queries * rows * keys * (PAIR_PERIOD - by_fma) // PAIR_PERIOD,
        rates=arch.rates,
    )


def _warpgroup_cost(spec: KernelSpec, arch: Arch, tiling: Tiling) -> Cost:
    """Every consumer's wgmma reads all of B from shared memory, and of A what is not in registers: Q, not P."""
    rows, keys, groups = tiling.tile_m, tiling.tile_n, consumers(tiling, arch)
    step_bytes = HEAD_DIM_STEP * ELEMENT_BYTES
    qk_steps, pv_steps = spec.head_dim // HEAD_DIM_STEP, keys // HEAD_DIM_STEP
    columns = spec.head_dim + (0 if spec.kv_shared else spec.v_dim)
    return Cost(
        rows=rows,
        keys=keys,
        passes=1,
        mma_instructions=groups * (qk_steps + pv_steps),
        mma_flop=2 * rows * keys * (spec.head_dim + spec.v_dim),
        mma_read_bytes=groups * step_bytes * (qk_steps * (arch.mma_m + keys) + pv_steps * spec.v_dim),
        write_bytes=ELEMENT_BYTES * keys * columns,
        load_bytes=ELEMENT_BYTES * keys * columns,
        exponentials=rows * keys,
        rates=arch.rates,
    )


def _column_cost(spec: KernelSpec, arch: Arch, tiling: Tiling) -> Cost:
    """One CTA. The score warpgroup's wgmma read K, and of Q the chunks that are not in registers; each of the output
    warpgroups reads all of P once for each of its wgmma. With a cluster each CTA has half of K and V to load.
    """
    rows, keys, cluster = arch.mma_m, tiling.tile_n, tiling.tile_m // arch.mma_m
    step_bytes, columns = HEAD_DIM_STEP * ELEMENT_BYTES, spec.head_dim + spec.v_dim
    loaded = written = spec.head_dim
    if tiling.v_keys != IN_K:  # what lies beyond V's columns is zeros that no one loads
        width, half = v_buffer_width(spec), half_width(spec)
        loaded, written = loaded + width + min(width, spec.v_dim - half), written + OUTPUT_GROUPS * width
    qk_steps, pv_steps, parts = spec.head_dim // HEAD_DIM_STEP, keys // HEAD_DIM_STEP, len(o_parts(spec))
    q_steps = chunks_apart(spec, arch, tiling) * CHUNK // HEAD_DIM_STEP
    pv_reads = pv_steps * (OUTPUT_GROUPS * parts * rows + spec.v_dim)
    return Cost(
        rows=rows,
        keys=keys,
        passes=1,
        mma_instructions=qk_steps + OUTPUT_GROUPS * parts * pv_steps,
        mma_flop=2 * rows * keys * columns,
        mma_read_bytes=step_bytes * (qk_steps * keys + q_steps * rows + pv_reads),
        write_bytes=ELEMENT_BYTES * (keys * written + rows * keys),
        load_bytes=ELEMENT_BYTES * keys * loaded // cluster,
        exponentials=rows * keys,
        rates=arch.rates,
    )
