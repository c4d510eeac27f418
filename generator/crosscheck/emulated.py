"""Cases in the emulator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..emulator import Gpu
from ..emulator.encode import encode_tiled
from ..emulator.parse import Module
from .case import Array, Case, Map, Rule, module_text


class Emulated:
    """One emulated GPU for many cases. `settings`: of `Gpu`."""

    def __init__(self, target: str, **settings) -> None:
        self.target, self.settings = target, settings

    def rule(self, case: Case) -> Rule:
        """How close the outputs must be, given how this GPU accumulates."""
        exact = self.settings.get("accumulation", "fast") == "exact"
        return case.rule if exact or case.fast is None else case.fast

    def load(self, cases: Sequence[Case]) -> tuple[Gpu, Module]:
        gpu = Gpu(self.target, **self.settings)
        return gpu, gpu.load_ptx(module_text(cases, self.target))

    def run(self, loaded: tuple[Gpu, Module], number: int, case: Case) -> dict[str, np.ndarray]:
        """Launch entry `number`; returns the outputs by name. Raises EmulatorError."""
        gpu, module = loaded
        arrays = {a.name: np.array(a.value, order="C") for a in case.arguments if isinstance(a, Array)}
        for name, array in arrays.items():
            gpu.add_array(array, name)
        params = []
        for argument in case.arguments:
            if isinstance(argument, Map):
                address = arrays[argument.array].ctypes.data
                fields = (argument.sizes, argument.strides, argument.box, argument.swizzle)
                params.append(encode_tiled(argument.data_type, address, *fields))
            else:
                params.append(arrays[argument.name].ctypes.data.to_bytes(8, "little"))
        try:
            extents = ((case.grid, 1, 1), (case.block, 1, 1), (case.cluster, 1, 1))
            gpu.launch(module, f"k{number}", *extents, case.smem_bytes, params)
        finally:
            for array in arrays.values():
                if array.nbytes:
                    gpu.gmem.remove(array.ctypes.data)
        return {a.name: arrays[a.name] for a in case.arguments if isinstance(a, Array) and a.output}
