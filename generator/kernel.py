"""The Python API: build a kernel from a specification, then call it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .budget import Budget
from .compile import Binary, compile_kernel
from .plan import Plan, plan_kernel
from .spec import KernelSpec, load_spec


class Kernel:
    """A compiled attention kernel; build() makes it. Calling it runs it where the arrays are.

    plan, budget: what was decided. source_path: the emitted file. binary: what was compiled.
    """

    def __init__(self, plan: Plan, binary: Binary) -> None:
        self.plan = plan
        self.binary = binary

    def __call__(
        self, q: Any, k: Any, v: Any = None, k2: Any = None, v2: Any = None, *, scale: float | None = None, **rows: Any
    ) -> Any:
        """Attention of Q [B, Sq, Hq, D], K [B, Skv, Hkv, D], V [B, Skv, Hkv, Dv]; D contiguous, other strides free.

        NumPy (ml_dtypes.bfloat16, float16) or CPU PyTorch arrays run on the emulator, CUDA tensors on the GPU.
        A kernel takes what its specification asks for, and nothing else: v unless kv_shared; k2 and v2
        [B, Skv2, Hkv, ...] with kv_sources = 2; by name seqlens and seqlens2, int32 [B] (keys of each source that
        exist, 0 to Skv), limit2, int32 [B, Sq] (keys of the second source that a query sees), sink, float32 [Hq].
        Rows of K and V past a length are read with the tile that they share, so they must be finite.
        out=(o, lse, ...): CUDA tensors to write into rather than new ones, as many as are returned.
        scale: of the scores, default 1/sqrt(D). Returns (o, lse), (o, lse, m) when the output is un-normalized, or o
        alone when the kernel stores no LSE: O [B, Sq, Hq, Dv], LSE and m float32 [B, Hq, Sq], natural log.
        Raises CallError for arrays that do not fit the kernel, RunError when it cannot be launched.
        """
        from .run import run_kernel

        outputs = run_kernel(self.binary, q, k, v, k2, v2, scale=scale, **rows)
        return outputs if len(outputs) > 1 else outputs[0]

    @property
    def spec(self) -> KernelSpec:
        return self.plan.spec

    @property
    def budget(self) -> Budget:
        return self.plan.budget

    @property
    def source_path(self) -> Path:
        return self.binary.source_path

    @property
    def ptx(self) -> str:
        return self.binary.ptx

    @property
    def cubin(self) -> bytes:
        return self.binary.cubin

    def __repr__(self) -> str:
        return f"<Kernel {self.spec.name}: {self.plan.tiling}>"


def build(spec: str | Path | Mapping[str, Any] | KernelSpec | None = None, **fields: Any) -> Kernel:
    """Plan, emit and compile a kernel, or take it from the cache.

    spec: a KernelSpec, a mapping, a name in specs/ or a path to a .toml file; fields override it.
    Raises SpecError (bad input, does not fit, DSL missing or untested) and CompileError.
    """
    plan = plan_kernel(load_spec(spec, **fields))
    return Kernel(plan, compile_kernel(plan))
