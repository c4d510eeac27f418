"""generated/ is what the templates emit today, and it stays as ruff would write it."""

import ast
import difflib
import subprocess
import sys

import pytest

from generator.emit import emit_kernel, kernel_path
from generator.plan import plan_kernel
from generator.resources import checkout_root
from generator.spec import load_spec, spec_names

GENERATED = checkout_root() / "generated"


@pytest.mark.parametrize("name", spec_names())
def test_emitted_kernel_is_the_committed_one(name):
    plan = plan_kernel(load_spec(name))
    path = kernel_path(plan, GENERATED)
    committed = path.read_text() if path.is_file() else ""
    difference = difflib.unified_diff(
        committed.splitlines(), emit_kernel(plan).splitlines(), str(path), "emitted now", lineterm=""
    )
    assert "\n".join(difference) == "", f"`bespoke generate {name}` and look at the diff"


@pytest.mark.parametrize("name", spec_names())
def test_emitted_kernel_stands_alone(name):
    tree = ast.parse(emit_kernel(plan_kernel(load_spec(name))))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= {"cutlass", "cuda"}


def test_emitted_kernels_are_as_ruff_writes_them(tmp_path):
    for name in spec_names():
        plan = plan_kernel(load_spec(name))
        kernel_path(plan, tmp_path).write_text(emit_kernel(plan))
    config = str(checkout_root() / "pyproject.toml")
    for command in (["format", "--check", "--diff"], ["check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", config, str(tmp_path)]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
