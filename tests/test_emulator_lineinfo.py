"""emulator/lineinfo: source lines in messages, from `.loc` directives written by hand and by the CuTe DSL."""

import re

import numpy as np
import pytest
from ptx_kernels import HEADER, launch, ptx
from test_emulate import HANGS as WAITS
from typer.testing import CliRunner

from generator import cli
from generator.compile import compile_kernel
from generator.emit import emit_kernel
from generator.emulator import Deadlock, Gpu, Hazard, PtxSyntaxError, UnsupportedInstruction, attached, scheduler
from generator.emulator.lineinfo import LineTable, Source, enclosing_function, name_sources, read_loc
from generator.emulator.parse import parse_ptx
from generator.plan import plan_kernel
from generator.spec import load_spec
from generator.verify import verify_kernel

PROGRAM = """\
def helper(x):
    def inner():
        return x[4096]  # too far

    return inner


def kernel(x):
    y = x[0]
"""
BODY = """
.loc 1 9 5
ld.global.b32 %r1, [%x];
.loc 1 3 16
ld.global.b32 %r2, [%x + 4096];
.loc 1 0 0
add.u32 %r1, %r1, %r2;
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def located(body, path):
    return ptx(body, x=np.zeros(4, np.uint32)) + f'\n.file 1 "{path}"\n'


def line_of(text, words):
    return next(i for i, line in enumerate(text.splitlines(), 1) if words in line)


def test_instructions_carry_their_source(program):
    (kernel,) = parse_ptx(located(BODY, program)).kernels.values()
    loads = [i for i in kernel.instrs if i.opcode == "ld.global.b32"]
    assert [i.source for i in loads] == [Source(1, 9, 5), Source(1, 3, 16)]
    assert [i.source.known for i in kernel.instrs[-2:]] == [False, False]
    assert kernel.instrs[0].source is None


def test_a_directive_with_inlining():
    source = read_loc("\t.loc\t2 96 3, function_name $L__info_string0+12, inlined_at 1 40 7")
    assert source == Source(2, 96, 3, "$L__info_string0+12", (1, 40, 7))


def test_function_names_of_other_languages_come_from_the_ptx(tmp_path):
    names = b"outer\0inner\0"
    section = "$L__info_string0:\n" + "".join(f".b8 {byte}\n" for byte in names)
    text = located(".loc 1 2 3, function_name $L__info_string0+6, inlined_at 1 9 9\nadd.u32 %r1, %r1, %r1;", "a.cu")
    table = LineTable(text + ".section .debug_str\n{\n" + section + "}\n")
    assert table.describe(table.at(line_of(text, "add.u32 %r1"))) == "a.cu:2, in inner, called at a.cu:9"


def test_innermost_function(program):
    path = str(program)
    assert [enclosing_function(path, line) for line in (1, 3, 5, 7, 9)] == ["helper", "inner", "helper", "", "kernel"]
    assert enclosing_function(str(program.with_name("missing.py")), 1) == ""


def test_hazard_names_the_source_line(program):
    text = located(BODY, program)
    line = line_of(text, "4096")
    with pytest.raises(Hazard) as caught:
        launch(text, {"x": np.zeros(4, np.uint32)})
    first, *quotes = str(caught.value).splitlines()
    assert first.startswith(f"PTX line {line} (ld.global.b32; {program}:3, in inner), CTA (0, 0, 0), warp 0, lane 0")
    assert quotes == [f"    {program}:3: return x[4096]  # too far"]


def test_without_line_information_messages_stay(program):
    message = "PTX line 3 (st.shared.b32), CTA (0, 0, 0)"
    assert name_sources(message, ptx("add.u32 %r1, %r1, %r1;")) == message
    with pytest.raises(Hazard) as caught:
        launch(re.sub(r"\.loc.*", "", located(BODY, program)), {"x": np.zeros(4, np.uint32)})
    assert "program.py" not in str(caught.value)


def test_paths_inside_the_working_folder_are_short(program, monkeypatch):
    monkeypatch.chdir(program.parent)
    with pytest.raises(Hazard, match=r"\(ld.global.b32; program.py:3, in inner\)"):
        launch(located(BODY, program), {"x": np.zeros(4, np.uint32)})


def test_file_that_is_gone_is_named_without_its_text():
    with pytest.raises(Hazard, match=r"^PTX line \d+ \(ld.global.b32; /gone/program.py:3\), [^\n]*$"):
        launch(located(BODY, "/gone/program.py"), {"x": np.zeros(4, np.uint32)})


BAD = {  # body: (error, its message up to the source)
    "frobnicate.b32 %r1, %r1;": (UnsupportedInstruction, "PTX line {} ({}:9, in kernel): the emulator does not know"),
    "mov.u32 %r1, %undeclared;": (PtxSyntaxError, "PTX line {} ({}:9, in kernel): register or operand '%undeclared'"),
    "ld.shared.b32 %r1, [%s16 + 90000];": (Hazard, "PTX line {} (ld.shared.b32; {}:9, in kernel), CTA"),
}


@pytest.mark.parametrize("body", BAD)
def test_every_kind_of_error_names_it(body, program):
    error, words = BAD[body]
    text = located(f".loc 1 9 5\n{body}", program)
    with pytest.raises(error) as caught:
        launch(text, {"x": np.zeros(4, np.uint32)})
    assert str(caught.value).startswith(words.format(line_of(text, body), program))


def test_endless_loop_names_the_lines_of_its_block(program, monkeypatch):
    monkeypatch.setattr(scheduler, "IDLE_LIMIT", scheduler.PATIENCE)
    body = ".loc 1 9 5\nLOOP:\nld.global.b32 %r1, [%x];\n.loc 1 3 5\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 bra LOOP;"
    text = located(body, program)
    with pytest.raises(Deadlock, match=rf"PTX lines \d+ to \d+ \({program}:3, in inner\)"):
        launch(text, {"x": np.zeros(4, np.uint32)})


def test_source_does_not_reach_into_the_next_kernel(program):
    other = ".visible .entry other()\n{\nret;\n}\n"
    text = HEADER + ".visible .entry k()\n{\n.loc 1 9 5\nret;\n}\n" + other + f'.file 1 "{program}"\n'
    table = LineTable(text)
    assert table.at(line_of(text, "ret;")) == Source(1, 9, 5)
    assert table.at(len(text.splitlines()) - 2) is None


# --- through the CuTe DSL ---------------------------------------------------------------------------------------------

HAZARD = """
import numpy as np
from cutlass import cute
from cutlass.cute.runtime import from_dlpack

@cute.jit
def store_beyond(x: cute.Tensor, i):
    x[i + 100] = x[i]

@cute.kernel
def kernel(x: cute.Tensor):
    store_beyond(x, cute.arch.thread_idx()[0])

@cute.jit
def main(x: cute.Tensor):
    kernel(x).launch(grid=(1, 1, 1), block=(32, 1, 1))

main(from_dlpack(np.zeros(64, np.float32)).mark_layout_dynamic())
"""
COMMANDS = {  # program: its wrong line, what holds it
    "hazard": (HAZARD, "    x[i + 100] = x[i]", "store_beyond"),
    "deadlock": (WAITS, "    cute.arch.mbarrier_wait(bar, 0)", "waits"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("lineinfo", [True, False])
def test_emulate_names_the_line_when_asked(name, lineinfo, tmp_path):
    text, statement, function = COMMANDS[name]
    path = tmp_path / "program.py"
    path.write_text(text)
    options = ["--lineinfo"] if lineinfo else []
    result = CliRunner().invoke(cli.app, ["emulate", *options, str(path)])
    assert result.exit_code == 1
    said = result.stderr.replace("\n", "")  # long lines are wrapped
    number = text.splitlines().index(statement) + 1
    assert (f"{path}:{number}, in {function})" in said) == lineinfo
    assert (f"{path}:{number}: {statement.strip()}" in said) == lineinfo


def test_attachments_with_and_without_do_not_share_code(tmp_path):
    texts = {}
    for lineinfo in (False, True, False):
        with attached("sm_100a", lineinfo=lineinfo) as gpu:
            path = tmp_path / "program.py"
            path.write_text(HAZARD.replace("x[i + 100]", "x[i]"))
            exec(compile(path.read_text(), str(path), "exec"), {"__name__": "program"})
            (texts[lineinfo],) = gpu._texts.values()
        assert (".loc" in texts[lineinfo]) == lineinfo


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BESPOKE_CACHE", str(tmp_path / "cache"))


def test_compiled_kernels_with_and_without_are_entries_of_their_own(own_cache, tmp_path):
    plan = plan_kernel(load_spec("fmha_sm100_d16_unnorm_tiles"))
    plain, told, again = (compile_kernel(plan, lineinfo=lineinfo) for lineinfo in (False, True, True))
    assert (plain.cached, told.cached, again.cached) == (False, False, True)
    assert ".loc" not in plain.ptx and f'.file	1 "{told.source_path}"' in told.ptx
    moved = tmp_path / "moved.py"
    moved.write_bytes(told.source_path.read_bytes())
    assert not compile_kernel(plan, moved, lineinfo=True).cached  # it names another file
    assert compile_kernel(plan, moved).cached
    code = [[i.opcode for k in parse_ptx(binary.ptx).kernels.values() for i in k.instrs] for binary in (plain, told)]
    assert code[0] == code[1]


def test_verify_names_the_line_of_the_generated_kernel(tmp_path):
    plan = plan_kernel(load_spec("fmha_sm100_d16_unnorm_tiles"))
    sound = "    wait_tmem(bars + S_EMPTY, (j + 1) & 1)"
    path = tmp_path / f"{plan.kernel_name}.py"
    path.write_text(emit_kernel(plan).replace(sound, "    # no wait"))
    report = verify_kernel(compile_kernel(plan, path, use_cache=False, lineinfo=True), (1, 1, 1, 300, 300))
    assert re.search(rf"PTX line \d+ \([\w.:]+; {path}:\d+, in \w+\), CTA", report.failures[0])


def test_gpu_keeps_messages_of_ptx_that_it_cannot_read(program):
    text = located(".loc 1 9 5\nmov.u32 %r1, %r2", program)  # cut off
    with pytest.raises(PtxSyntaxError, match="without a semicolon|ends inside"):
        Gpu().load_ptx(text[: text.index("%r2")])
