"""Cases on CUDA device 0, through the driver: the PTX is assembled by the driver's own compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .case import Array, Case, Map, module_text
from .launches import Captured, moved

ALIGNMENT = 256  # arrays keep their address modulo this


class DeviceError(RuntimeError):
    """A CUDA call failed; the message has CUDA's own name of the error."""


def _check(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(driver.CUresult(error).name)
    return values[0] if values else None


class Device:
    """CUDA device 0 and its primary context."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise DeviceError(f"cuda-python cannot be imported: {error}") from None
        self.driver = driver
        try:
            _check(driver.cuInit(0))
        except RuntimeError as error:  # cuda-python's own, where there is no driver library; DeviceError is one, too
            raise DeviceError(f"no CUDA device can be used ({error}); `--recorded` needs none") from None
        self.handle = _check(driver.cuDeviceGet(0))
        self.name = _check(driver.cuDeviceGetName(100, self.handle)).split(b"\0")[0].decode()
        attribute = driver.CUdevice_attribute
        self.capability = tuple(
            _check(driver.cuDeviceGetAttribute(which, self.handle))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self.version = _check(driver.cuDriverGetVersion())
        _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(self.handle))))

    @property
    def target(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}a"

    def assemble(self, cases: Sequence[Case]) -> tuple[list[tuple[Any, list[Case]]], list[Case]]:
        """Load the cases' modules: (module, its cases) in parts as large as possible, and the cases whose PTX is
        refused.
        """
        try:
            text = module_text(cases, self.target).encode() + b"\0"
            return [(_check(self.driver.cuModuleLoadData(text)), list(cases))], []
        except DeviceError:
            if len(cases) == 1:
                return [], list(cases)
        half = len(cases) // 2
        parts = [self.assemble(part) for part in (cases[:half], cases[half:])]
        return [m for loaded, _ in parts for m in loaded], [c for _, refused in parts for c in refused]

    def run(self, module: Any, number: int, case: Case) -> dict[str, np.ndarray]:
        """Launch entry `number` of a module; returns the outputs by name.

        Raises DeviceError when the launch or the kernel fails; after a fault in a kernel no call works in this process.
        """
        d, addresses = self.driver, {}
        function = _check(d.cuModuleGetFunction(module, f"k{number}".encode()))
        if case.smem_bytes > 48 * 1024:
            which = d.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(d.cuFuncSetAttribute(function, which, case.smem_bytes))
        arrays = [a for a in case.arguments if isinstance(a, Array)]
        for array in arrays:
            value = np.ascontiguousarray(array.value)
            addresses[array.name] = _check(d.cuMemAlloc(max(value.nbytes, 16)))
            _check(d.cuMemcpyHtoD(addresses[array.name], value.ctypes.data, value.nbytes))
        try:
            self._launch(function, case, addresses)
            _check(d.cuCtxSynchronize())
            outputs = {}
            for array in arrays:
                if array.output:
                    outputs[array.name] = np.empty_like(array.value)
                    _check(d.cuMemcpyDtoH(outputs[array.name].ctypes.data, addresses[array.name], array.value.nbytes))
        finally:
            for address in addresses.values():
                d.cuMemFree(address)
        return outputs

    def _launch(self, function: Any, case: Case, addresses: dict[str, Any]) -> None:
        d, blobs = self.driver, []
        for argument in case.arguments:
            raw = (
                self.tensor_map(argument, int(addresses[argument.array]))
                if isinstance(argument, Map)
                else int(addresses[argument.name]).to_bytes(8, "little")
            )
            blobs.append(ctypes.create_string_buffer(raw, len(raw)))
        pointers = (ctypes.c_void_p * len(blobs))(*(ctypes.addressof(b) for b in blobs))
        # Clusters are declared in the PTX (.reqnctapercluster), so a plain launch serves every case.
        grid_block = (case.grid, 1, 1, case.block, 1, 1)
        _check(d.cuLaunchKernel(function, *grid_block, case.smem_bytes, 0, ctypes.addressof(pointers), 0))

    def replay(self, launch: Captured) -> list[np.ndarray]:
        """Execute a captured launch; returns its arrays afterwards, u8, in their order. Raises DeviceError."""
        d, places = self.driver, []
        function = _check(
            d.cuModuleGetFunction(_check(d.cuModuleLoadData(launch.text.encode() + b"\0")), launch.kernel.encode())
        )
        which = d.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(d.cuFuncSetAttribute(function, which, launch.smem_bytes))
        for start, _, before, _ in launch.arrays:
            base = int(_check(d.cuMemAlloc(before.nbytes + ALIGNMENT)))
            places.append((start, before.nbytes, base + start % ALIGNMENT))
            _check(d.cuMemcpyHtoD(places[-1][2], np.ascontiguousarray(before).ctypes.data, before.nbytes))
        blobs = [ctypes.create_string_buffer(moved(p, places), len(p)) for p in launch.params]
        pointers = (ctypes.c_void_p * len(blobs))(*(ctypes.addressof(b) for b in blobs))
        _check(d.cuLaunchKernelEx(self._config(launch), function, ctypes.addressof(pointers), 0))
        _check(d.cuCtxSynchronize())
        results = [np.empty(nbytes, np.uint8) for _, nbytes, _ in places]
        for result, (start, nbytes, now) in zip(results, places, strict=True):
            _check(d.cuMemcpyDtoH(result.ctypes.data, now, nbytes))
            d.cuMemFree(now - start % ALIGNMENT)
        return results

    def _config(self, launch: Captured) -> Any:
        d = self.driver
        config = d.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block
        config.sharedMemBytes, config.hStream = launch.smem_bytes, 0
        attributes = []
        if max(launch.cluster) > 1:
            attribute = d.CUlaunchAttribute()
            attribute.id = d.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dim = attribute.value.clusterDim
            dim.x, dim.y, dim.z = launch.cluster
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config

    def tensor_map(self, spec: Map, address: int) -> bytes:
        """The driver's 128 bytes for a tensor map over memory at `address`."""
        d = self.driver
        rank = len(spec.sizes)
        encoded = _check(
            d.cuTensorMapEncodeTiled(
                d.CUtensorMapDataType(spec.data_type),
                rank,
                address,
                [d.cuuint64_t(n) for n in spec.sizes],
                [d.cuuint64_t(n) for n in spec.strides or (0,)],
                [d.cuuint32_t(n) for n in spec.box],
                [d.cuuint32_t(1)] * rank,
                d.CUtensorMapInterleave(0),
                d.CUtensorMapSwizzle(spec.swizzle),
                d.CUtensorMapL2promotion(0),
                d.CUtensorMapFloatOOBfill(0),
            )
        )
        return ctypes.string_at(encoded.getPtr(), 128)
