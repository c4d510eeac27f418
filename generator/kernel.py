"""The Python API: build a kernel from a specification, then call it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .budget import Budget
from .compile import Binary, compile_kernel
from .handles import handle_of
from .plan import Plan, plan_kernel
from .spec import KernelSpec, load_spec

if TYPE_CHECKING:
    from .launch import Launcher


class Kernel:
    """A compiled attention kernel; build() makes it. Calling it runs it where the arrays are.

    plan, budget: what was decided. source_path: the emitted file. binary: what was compiled. op: as an operator of
    PyTorch.
    """

    def __init__(self, plan: Plan, binary: Binary) -> None:
        self.plan = plan
        self.binary = binary
        self.handle = handle_of(self)  # what a trace knows it by

    def __call__(
        self, q: Any, k: Any, v: Any = None, k2: Any = None, v2: Any = None, *, scale: float | None = None, **rows: Any
    ) -> Any:
        """Attention of Q [B, Sq, Hq, D], K [B, Skv, Hkv, D], V [B, Skv, Hkv, Dv]; D contiguous, other strides free.

        NumPy (ml_dtypes.bfloat16, float16) or CPU PyTorch arrays run on the emulator, CUDA tensors on the GPU.
        A kernel takes what its specification asks for, and nothing else: v unless kv_shared; k2 and v2
        [B, Skv2, Hkv, ...] with kv_sources = 2; by name seqlens and seqlens2, int32 [B] (keys of each source that
        exist, 0 to Skv), limit2, int32 [B, Sq] (keys of the second source that a query sees), sink, float32 [Hq].
        Rows of K and V past a length are read with the tile that they share, so they must be finite.
        scale: of the scores, default 1/sqrt(D). Returns (o, lse), (o, lse, m) when the output is un-normalized, or o
        alone when the kernel stores no LSE: O [B, Sq, Hq, Dv], LSE and m float32 [B, Hq, Sq], natural log.
        PyTorch sees the operator `op` instead where it traces (torch.compile, torch.export, fake tensors, dispatch
        modes) and where gradients are recorded; those raise RunError in the backward pass, of which there is none.
        Raises CallError for arrays that do not fit the kernel, RunError when it cannot be launched.
        """
        arrays = {"q": q, "k": k}
        for name, array in (("v", v), ("k2", k2), ("v2", v2), *rows.items()):
            if array is not None:
                arrays[name] = array
        if _as_operator(arrays):
            return self._operator()(**arrays, scale=scale)
        outputs = self.run(arrays, scale)
        return outputs if len(outputs) > 1 else outputs[0]

    def run(self, arrays: Mapping[str, Any], scale: float | None = None) -> tuple[Any, ...]:
        """The call itself, of arrays by name, whatever PyTorch records or traces: (o,), (o, lse) or (o, lse, m)."""
        if getattr(arrays["q"], "is_cuda", False):
            return self._launcher(arrays, scale)
        from .run import run_kernel

        return run_kernel(self.binary, **arrays, scale=scale)

    @cached_property
    def _launcher(self) -> Launcher:
        from .launch import Launcher

        return Launcher(self.binary)

    @property
    def op(self) -> Any:
        """The kernel as an operator, torch.ops.bespoke.<name>.default, registered when this is first read.

        (Tensor q, Tensor k, Tensor? v, k2, v2, seqlens, seqlens2, limit2, sink, float? scale) -> what a call returns.
        The name follows from the specification and its plan. Imports PyTorch.
        """
        return self._operator()

    def _operator(self) -> Any:
        from .operators import operator_of

        return operator_of(self)

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

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, here or in another process, prepares its own calls (copy.deepcopy of a module that has a kernel)."""
        return type(self), (self.plan, self.binary)

    def __repr__(self) -> str:
        return f"<Kernel {self.spec.name}: {self.plan.tiling}>"


def _as_operator(arrays: Mapping[str, Any]) -> bool:
    """Whether PyTorch must see a call with these arrays as one operator."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(arrays["q"], torch.Tensor):
        return False
    if torch.compiler.is_compiling():
        return True
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing()
    recorded = torch.is_grad_enabled()
    for array in arrays.values():
        kind = type(array)
        if kind is not torch.Tensor:
            if not isinstance(array, torch.Tensor):
                return False  # the call refuses it
            watched = watched or kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
        watched = watched or (recorded and array.requires_grad)
    return watched


def build(spec: str | Path | Mapping[str, Any] | KernelSpec | None = None, **fields: Any) -> Kernel:
    """Plan, emit and compile a kernel, or take it from the cache.

    spec: a KernelSpec, a mapping, a name in specs/ or a path to a .toml file; fields override it.
    Raises SpecError (bad input, does not fit, DSL missing or untested) and CompileError.
    """
    plan = plan_kernel(load_spec(spec, **fields))
    return Kernel(plan, compile_kernel(plan))
