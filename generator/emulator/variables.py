"""Variables of PTX modules in global and constant memory: one copy a Gpu and module, kept from launch to launch."""

from __future__ import annotations

import numpy as np

from .errors import PtxSyntaxError
from .memory import GlobalMemory
from .syntax import Variable

_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


class ModuleVariables:
    """The variables of every module that a Gpu has launched something from."""

    def __init__(self, gmem: GlobalMemory):
        self._gmem = gmem
        self._storage: dict[str, np.ndarray] = {}
        self._addresses: dict[str, dict[str, np.uint64]] = {}

    def of(self, text: str, variables: dict[str, Variable]) -> dict[str, np.uint64]:
        """Addresses by name of the variables of the module with this text; made and initialized on first sight."""
        found = self._addresses.get(text)
        if found is None:
            found = self._addresses[text] = {}
            places = {}
            for variable in variables.values():
                align = max(variable.align, 16)
                raw = np.zeros(variable.nbytes + align, np.uint8)
                start = -raw.ctypes.data % align
                places[variable.name] = raw[start : start + variable.nbytes]
                self._storage[f"{id(found)} {variable.name}"] = raw
                found[variable.name] = np.uint64(places[variable.name].ctypes.data)
                self._gmem.add(int(found[variable.name]), variable.nbytes, f"variable {variable.name}")
            for variable in variables.values():
                initialize(places[variable.name], variable, found)
        return found


def initialize(place: np.ndarray, variable: Variable, addresses: dict[str, np.uint64]) -> None:
    """Write a variable's initial values into its bytes."""
    width = {"b": 1, "u": 1, "s": 1}.get(variable.kind[0], 0) and int(variable.kind[1:]) // 8
    for i, value in enumerate(variable.values):
        if variable.kind in _FLOATS:
            raw = np.array(value, _FLOATS[variable.kind]).tobytes()
        else:
            number = _resolve(value, variable, addresses)
            raw = (number & (1 << 8 * width) - 1).to_bytes(width, "little")
        place[i * len(raw) : (i + 1) * len(raw)] = np.frombuffer(raw, np.uint8)


def _resolve(value, variable: Variable, addresses: dict[str, np.uint64]) -> int:
    if isinstance(value, int):
        return value
    if not isinstance(value, tuple):
        raise PtxSyntaxError(f"PTX line {variable.line}: {value} is no initial value for .{variable.kind}")
    symbol, offset, mask = value
    if symbol not in addresses:
        raise PtxSyntaxError(f"PTX line {variable.line}: {symbol} in the initial value of {variable.name} is unknown")
    address = int(addresses[symbol]) + offset
    return (address & mask) // (mask & -mask) if mask else address
