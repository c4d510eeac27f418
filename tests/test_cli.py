"""The command: documents on stdout, words on stderr, exit codes, and what bad input is told."""

import json
import shlex
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import generator.emulation
from generator import cli
from generator.emit import command_options, emit_kernel
from generator.explain import STRATEGIES
from generator.plan import plan_kernel
from generator.resources import checkout_root
from generator.spec import KernelSpec, load_spec


def bespoke(*words, code=0):
    """Run a subcommand in this process. Fails when the exit code is another one."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def refusal(*words) -> str:
    """What a refused run says on stderr, in one line; it says nothing on stdout."""
    result = bespoke(*words, code=2)
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def test_budget_prints_every_row_of_the_table():
    text = bespoke("budget", "--head-dim", "64,128").stdout
    for heading in ("head_dim", "P in", "kv_stage", "sQ", "sK", "sV", "sP", "sO", "barriers", "total", "limit"):
        assert heading in text
    rows = [line.split() for line in text.splitlines() if "232448" in line]
    assert len(rows) == 24 and {row[0] for row in rows} == {"64", "128"}
    places = (("tiles", "TMEM"), ("tiles", "SMEM"), ("two_tiles", "TMEM"), ("two_ctas", "TMEM"))
    assert {(row[1], row[2], row[3]) for row in rows} == {(*place, k) for place in places for k in "123"}
    shown = [row[:10] for row in rows]
    assert ["128", "tiles", "TMEM", "2", "128x128", "32768", "65536", "65536", "0", "32768"] in shown
    assert ["128", "two_tiles", "TMEM", "2", "128x128", "65536", "65536", "65536", "0", "16384"] in shown


def test_budget_of_sm_90a_shows_registers_in_the_place_of_tensor_memory():
    text = bespoke("budget", "--arch", "sm_90a", "--head-dim", "64,256").stdout
    heads = next(line for line in text.splitlines() if "head_dim" in line)
    for heading in ("reg S", "reg P", "reg O", "other", "sum", "of"):
        assert heading in heads
    assert "TMEM" not in text
    rows = [line.split() for line in text.splitlines() if "232448" in line]
    assert len(rows) == 8 and {row[1:4] == ["warpgroups", "REGISTER", row[3]] for row in rows} == {True}
    assert {row[3] for row in rows} == set("1234")
    numbers = {row[0]: row for row in rows if row[-1] == "chosen"}
    assert numbers["64"][-8:] == ["64", "32", "32", "28", "156", "160", "fits,", "chosen"]
    assert numbers["256"][-8:] == ["32", "16", "128", "28", "204", "240", "fits,", "chosen"]


def test_budget_document_of_sm_90a():
    words = ("--arch", "sm_90a", "--head-dim", "128", "--tile-m", "128", "--tile-n", "160", "--kv-stage", "2", "--json")
    (row,) = json.loads(bespoke("budget", *words).stdout)
    assert row["registers"] == {"S": 80, "P": 40, "O": 64, "other": 28}
    assert (row["registers_used"], row["registers_limit"]) == (212, 240) and "tmem" not in row
    assert row["smem"] == {"sQ": 32768, "sK": 81920, "sV": 81920, "sP": 0, "sO": 32768, "barriers": 96}


def test_plan_of_sm_90a_has_no_table_of_tensor_memory():
    text = bespoke("plan", "--arch", "sm_90a", "--head-dim", "128", "--explain").stdout
    assert "registers of a thread, consumer: 152 of 160" in text and "TMEM" not in text and "tcgen05" not in text
    assert "wgmma" in text and "4096 FLOP" in text and "consumer 1 may issue its MMAs" in text
    wide = bespoke("plan", "--arch", "sm_90a", "--head-dim", "512", "--explain").stdout
    assert (
        "registers of a thread, scores: " in wide and "registers of a thread, output: " in wide and "TMEM" not in wide
    )


def test_budget_of_head_dim_512_says_what_overflows():
    text = bespoke("budget", "--head-dim", "512").stdout
    assert "a 128 x 512 float32 accumulator takes all 512 columns, so S has no room" in text
    assert "a CTA pair (cta_group::2)" in text and "passes: as chunks, O's columns in two passes" in text
    assert [line.split()[1] for line in text.splitlines() if line.strip().startswith("512 ")] == list(
        STRATEGIES["sm_100a"]
    )


def test_budget_document():
    rows = json.loads(bespoke("budget", "--head-dim", "256", "--kv-stage", "2", "--json").stdout)
    assert [(row["strategy"], row["p_staging"], row["chosen"]) for row in rows] == [
        *(("tiles", "tmem", False), ("tiles", "smem", False)),
        *(("two_tiles", "tmem", False), ("two_ctas", "tmem", True)),
    ]
    row = rows[0]
    assert row["smem"] == {"sQ": 65536, "sK": 65536, "sV": 65536, "sP": 0, "sO": 0, "barriers": 108}
    assert row["tmem"] == {"S": 64, "P": 32, "O": 256} and row["tmem_columns"] == 512
    assert row["smem_total"] == 197632 and row["smem_limit"] == 232448 and row["fits"]


def test_plan_shows_the_choice_and_the_rejected():
    text = bespoke("plan", "fmha_sm100_d256_tiles").stdout
    assert "tile 128x64, kv_stage 2, P in TMEM, sO over sQ by 256 columns" in text
    assert "shared memory: 197632 of 232448 bytes" in text and "not taken: " in text
    assert "over by 96256" in text


def test_plan_document_holds_every_candidate():
    document = json.loads(bespoke("plan", "fmha_sm100_d96", "--json").stdout)
    plan = plan_kernel(load_spec("fmha_sm100_d96"))
    assert document["kernel"] == "fmha_sm100_d96" and document["digest"] == plan.spec.digest
    assert len(document["rejected"]) == len(plan.rejected)
    assert document["budget"]["smem_total"] == plan.budget.smem_total and document["budget"]["fits"] is True


def test_options_win_over_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("head_dim = 96\ncausal = true\n")
    document = json.loads(bespoke("plan", path, "--no-causal", "--kv-stage", "2", "--json").stdout)
    assert document["kernel"] == "fmha_sm100_d96_stage2"


@settings(max_examples=25, deadline=None)
@given(
    st.fixed_dictionaries(
        {"head_dim": st.sampled_from([16, 96, 256])},
        optional={
            "causal": st.booleans(),
            "lse": st.booleans(),
            "dtype": st.sampled_from(["bf16", "fp16"]),
            "pack_heads": st.sampled_from(["auto", False]),
            "q_heads_per_kv": st.integers(1, 8),
            "p_staging": st.sampled_from(["auto", "tmem", "smem"]),
            "kv_stage": st.sampled_from(["auto", 1, 2]),
            "tile_n": st.sampled_from(["auto", 16, 64]),
        },
    )
)
def test_command_in_an_emitted_header_asks_for_the_same_kernel(fields):
    spec = load_spec(fields)
    document = json.loads(bespoke("plan", *shlex.split(command_options(spec)), "--json").stdout)
    assert document["digest"] == spec.digest


def test_every_field_has_an_option():
    for name in ("budget", "plan", "generate", "compile", "verify", "make"):
        text = bespoke(name, "--help").stdout
        for field in KernelSpec.model_fields:
            assert "--" + field.replace("_", "-") in text


def test_generate_writes_and_check_compares(tmp_path):
    output = bespoke("generate", "--head-dim", "80", "--out", tmp_path).stdout
    path = tmp_path / "fmha_sm100_d80.py"
    assert output == f"{path}\n"
    assert path.read_text() == emit_kernel(plan_kernel(load_spec(head_dim=80)))
    bespoke("generate", "--head-dim", "80", "--out", tmp_path, "--check")
    path.write_text("# edited\n")
    result = bespoke("generate", "--head-dim", "80", "--out", tmp_path, "--check", code=1)
    assert "is not what is emitted now" in " ".join(result.stderr.split())
    assert path.read_text() == "# edited\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--head-dim", "0"], "head_dim = 0: must be a multiple of 16 from 16 to 512"),
        (["--head-dim", "24"], "the nearest is 16 or 32"),
        (["--head-dim", "264"], "the nearest is 256 or 272"),
        (["--head-dim", "1024"], "the nearest is 576, with head_dim_v = 512"),
        (["--head-dim", "abc"], "head_dim = 'abc': must be a whole number"),
        (["--head-dim", "../x"], "head_dim = '../x': must be a whole number"),
        (["--head-dim", "-16"], "head_dim = -16: must be a multiple of 16"),
        ([], "head_dim = None: is required; for example head_dim = 96 (--head-dim 96)"),
        (["--head-dim", "512", "--tile-m", "128"], "tile_m = 128: does not fit; the closest is "),
        (["--head-dim", "512", "--tile-m", "128"], "takes all 512 columns, so S has no room: S 16 + O 512 = 528"),
        (["--head-dim", "64", "--tile-m", "64"], "tile_m = 64: not implemented for sm_100a yet"),
        (
            ["--head-dim", "272", "--arch", "sm_90a", "--strategy", "warpgroups"],
            "strategy = 'warpgroups': not implemented for sm_90a yet: one warpgroup holds all of O",
        ),
        (["--head-dim", "64", "--p-staging", "register"], "is for Hopper (sm_90a) only"),
        (["--head-dim", "64", "--dtype", "{{ x }}"], 'dtype = \'{{ x }}\': must be "bf16" or "fp16"'),
        (["--head-dim", "64", "--causal", "--no-lse", "--output", "unnormalized"], "lse = False: "),
        (["--head-dim", "128", "--tile-n", "128", "--kv-stage", "9"], "the deepest that fits is 5"),
        (["fmha_sm100_d69"], "did you mean fmha_sm100_d96?"),
        (["../specs/fmha_sm100_d96"], "a kernel is a name (a-z, 0-9, _) in specs/ or a path to an existing .toml file"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "generate"])
def test_bad_input_is_refused_with_exit_code_2(tmp_path, command, words, message):
    out = ["--out", tmp_path] if command == "generate" else []
    text = refusal(command, *words, *out)
    assert text.startswith("error: ") and message in text
    assert list(tmp_path.iterdir()) == []


def test_budget_refuses_bad_input():
    assert "head_dim = 'abc'" in refusal("budget", "--head-dim", "64,abc")
    assert "head_dim = ''" in refusal("budget", "--head-dim", "64,")
    assert "is for Hopper (sm_90a) only" in refusal("budget", "--p-staging", "register")


def test_unknown_option_and_command_are_refused():
    assert "--hed-dim" in refusal("plan", "--hed-dim", "64")
    assert "plam" in refusal("plam")


def test_unwritable_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    text = refusal("generate", "--head-dim", "64", "--out", tmp_path / "file" / "sub")
    assert "cannot be written: Not a directory" in text
    assert "choose a folder that you can write to (--out DIR)" in text


def test_files_that_cannot_be_written_are_refused_before_the_program_runs(tmp_path):
    """The program is not there: had it been looked for, that would be the message."""
    (tmp_path / "file").write_text("")
    for option in ("--capture", "--json"):
        text = refusal("emulate", option, tmp_path / "file" / "out", "nowhere.py")
        assert "out = " in text and "cannot be written: " in text and "nowhere.py" not in text
        assert "is a folder, a file is wanted; name a file in it" in refusal("emulate", option, tmp_path, "nowhere.py")
    assert "cannot be written" in refusal("mutate", "--json", tmp_path / "file" / "out", "nowhere.py")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_malformed_shape_is_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(generator.emulation, "compiled", None)
    assert "a shape is B,Hq,Hkv,Sq,Skv" in refusal("mutate", "--head-dim", "64", "--shape", "1,1,1,128")
    assert "a shape is B,Hq,Hkv,Sq,Skv" in refusal("verify", "--head-dim", "64", "--shape", "1,1,1,128")
    assert "Hq must be Hkv x q_heads_per_kv" in refusal("verify", "--head-dim", "64", "--shape", "1,2,1,128,128")


def test_matrix_selection_that_is_empty_is_refused():
    assert "select = 'nothing*': matches no kernel in specs/" in refusal("matrix", "--select", "nothing*")


def test_interrupt_is_one_line_and_130(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "plan_kernel", interrupt)
    result = bespoke("plan", "--head-dim", "64", code=130)
    assert "interrupted; no half-written file is left" in result.stderr and result.stdout == ""


def test_light_commands_import_no_dsl():
    program = (
        "import sys; from typer.testing import CliRunner; from generator.cli import app; "
        "results = [CliRunner().invoke(app, words.split()) for words in "
        "('budget', 'plan --head-dim 96', 'generate --head-dim 96 --check')]; "
        "print([r.exit_code for r in results[:2]], [m for m in ('cutlass', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 0] []"


def test_module_runs_as_the_command():
    words = [sys.executable, "-m", "generator", "plan", "--head-dim", "24"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=checkout_root())
    assert done.returncode == 2 and done.stdout == "" and "the nearest is 16 or 32" in done.stderr
