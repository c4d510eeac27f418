"""emulator/targets: what sm_90a does not have is refused when the module is loaded, by line, opcode and target."""

import pytest
from ptx_kernels import ptx

from generator.emulator import Gpu
from generator.emulator.errors import LaunchError

REFUSED = (
    "tcgen05.wait::ld.sync.aligned;",
    "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%s], [%s+16];",
    "add.rn.f32x2 %d1, %d2, %d3;",
    "add.rn.f32.bf16 %r1, %h1, %r2;",
    "redux.sync.max.f32 %r1, %r2, -1;",
    "cvt.rn.satfinite.e2m3x2.f32 %h1, %r1, %r2;",
    "ld.global.v4.b64 {%d1, %d2, %d3, %d4}, [%d5];",
    "max.f32 %r1, %r2, %r3, %r4;",
)
TAKEN = (
    "max.NaN.f32 %r1, %r2, %r3; redux.sync.max.u32 %r1, %r2, -1; cvt.rn.bf16x2.f32 %r1, %r2, %r3;"
    "cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, %r2; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d5];"
)


@pytest.mark.parametrize("statement", REFUSED, ids=lambda s: s.split()[0])
def test_what_only_sm_100a_has(statement):
    text = ptx(f"{TAKEN}\n@%p1 bra END;\n{statement} // HERE\nEND:")
    line = next(n for n, written in enumerate(text.splitlines(), 1) if "// HERE" in written)
    Gpu("sm_100a").load_ptx(text)
    with pytest.raises(LaunchError) as caught:
        Gpu("sm_90a").load_ptx(text.replace(".target sm_100a", ".target sm_90a"))
    message = f"PTX line {line} ({statement.split()[0].rstrip(';')}): sm_90a has no such instruction"
    assert message in str(caught.value) and "it needs sm_100a: compile the program for sm_100a" in str(caught.value)
    assert ("with 3 sources" in str(caught.value)) == statement.startswith("max")


def test_what_both_have():
    Gpu("sm_90a").load_ptx(ptx(TAKEN).replace(".target sm_100a", ".target sm_90a"))
