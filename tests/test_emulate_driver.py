"""cuTensorMapEncodeTiled as a program calls it through cuda-python while an emulator is attached."""

import ctypes

import numpy as np
import pytest
from cuda.bindings import driver
from ptx_kernels import aligned

from generator.emulator import attached
from generator.emulator.host import HostError
from generator.emulator.tensormap import decode_tensor_map


def encode(array: np.ndarray, step: int = 1, fill: int = 0):
    """The map of float16 [32, 64] with boxes of 8 rows of 16."""
    wide, narrow = (lambda *x: [driver.cuuint64_t(n) for n in x]), (lambda *x: [driver.cuuint32_t(n) for n in x])
    return driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        2,
        array.ctypes.data,
        wide(64, 32),
        wide(128),
        narrow(16, 8),
        narrow(step, 1),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill(fill),
    )


def test_a_map_from_python():
    array = aligned((32, 64), np.float16)
    with attached("sm_90a"):
        error, found = encode(array)
    assert error == driver.CUresult.CUDA_SUCCESS
    tensor = decode_tensor_map(ctypes.string_at(found.getPtr(), 128))
    assert (tensor.address, tensor.sizes, tensor.strides) == (array.ctypes.data, (64, 32), (2, 128))
    assert (tensor.box, tensor.swizzle, tensor.element) == ((16, 8), 1, "f16")


@pytest.mark.parametrize("options", [{"step": 2}, {"fill": 1}])
def test_maps_that_are_not_emulated(options):
    with attached("sm_90a"), pytest.raises(HostError):
        encode(aligned((32, 64), np.float16), **options)
