"""Kernels that compute on rows beyond the end: a hazard, unless it is allowed; what was never written is poison."""

import struct

import numpy as np
import pytest
from ptx_kernels import fails, ptx, run

from generator.emulator import Gpu, Hazard

ROWS = 20
LOADED = f"""setp.lt.u32 %p1, %tid, {ROWS}; cvt.rn.f32.u32 %r1, %tid; @%p1 st.shared.f32 [%s4], %r1;
ld.shared.f32 %r2, [%s4]; // HERE
mul.rn.f32 %r2, %r2, 2.0; %STORE% st.global.f32 [%y_g], %r2;"""
PREDICATED = f"""setp.lt.u32 %p1, %tid, {ROWS}; @%p1 cvt.rn.f32.u32 %r3, %tid;
mul.rn.f32 %r2, %r3, 2.0; // HERE
%STORE% st.global.f32 [%y_g], %r2;"""


def launch(body: str, y: np.ndarray, allow: bool):
    gpu = Gpu()
    gpu.allow_uninitialized = allow
    gpu.add_array(y, "y")
    gpu.launch(
        gpu.load_ptx(ptx(body, y=y)), "k", (1, 1, 1), (32, 1, 1), (1, 1, 1), 1024, [struct.pack("<Q", y.ctypes.data)]
    )


@pytest.mark.parametrize("body", [LOADED, PREDICATED], ids=["shared memory", "register"])
@pytest.mark.parametrize("store", ["@%p1", ""], ids=["dropped", "used"])
def test_rows_beyond_the_end(body, store):
    y = np.zeros(32, np.float32)
    body = body.replace("%STORE%", store)
    with pytest.raises(Hazard, match="never written"):
        launch(body, y, False)
    launch(body, y, True)
    assert (y[:ROWS] == 2 * np.arange(ROWS)).all()
    if store:
        assert (y[ROWS:] == 0).all()
    elif "ld.shared" in body:
        assert np.isnan(y[ROWS:]).all()


def test_what_is_under_way_is_no_padding():
    fails(Hazard, "cp.async.ca.shared.global [%s4], [%x_g], 4; ld.shared.b32 %r1, [%s4]; // HERE\n", "not known to be",
          x=np.zeros(32, np.uint32))  # fmt: skip


def test_vector_registers():
    """As inline assembly declares them."""
    y = np.zeros(4, np.float32)
    moves = "".join(f"mov.f32 abcd.{c}, {i}.5;" for i, c in enumerate("xyzw"))
    run(f"{{ .reg .v4 .f32 abcd; {moves} setp.eq.u32 %p1, %tid, 0; @%p1 st.global.v4.f32 [%y], abcd; }}", y=y)
    assert (y == [0.5, 1.5, 2.5, 3.5]).all()
