"""The architecture as a test: imports point upstream only, and the emulator knows nothing of its parent."""

import ast
from pathlib import Path

import pytest

import generator.resources

PACKAGE = Path(generator.resources.__file__).parent

# Upstream first. A module imports only modules to its left.
FLOW = (
    *("resources", "spec", "signature", "mask", "arch", "lifetime", "budget", "two_tiles", "two_ctas"),
    *("tuned", "warpgroups", "columns", "column_order", "accumulators", "chunks", "cost"),
    *("partials", "spelling", "layout"),
    *("split", "hopper", "columns_plan"),
    *("plan", "covering", "features", "wide_features", "hopper_features"),
    *("explain", "survey", "emit", "protocol", "maps", "pages"),
    *("dsl", "cache", "cubin", "compile", "arrays", "launch", "run", "handles", "operators", "kernel", "merge"),
    *("reference",),
    *("tiles", "verify", "mutate", "matrix", "builds", "sample", "timing", "peers", "bench", "plot", "tune"),
    *("options", "present", "__init__", "command", "emulation", "measurement", "cli", "__main__"),
)


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, relative to the package's root: "plan", "emulator"."""
    folder = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= set(_targets(node, folder))
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("generator.")}
            assert all(alias.name != "generator" for alias in node.names), f"{path}: imports the package itself"
    return found


def _targets(node: ast.ImportFrom, folder: tuple[str, ...]):
    names = [alias.name for alias in node.names]
    if node.level == 0:
        parts = (node.module or "").split(".")
        if parts[0] == "generator":
            yield from parts[1:2] or names
        return
    base = folder[: len(folder) - (node.level - 1)]
    parts = (*base, *(node.module.split(".") if node.module else ()))
    yield from parts[:1] or names


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_imports_point_upstream(path):
    assert path.stem in FLOW, f"{path.name}: say in FLOW where it stands"
    upstream = {
        *FLOW[: FLOW.index(path.stem)],
        "emulator",
        *({"crosscheck"} if path.stem in ("command", "emulation") else ()),
    }
    assert imported(path) - upstream == set()


def test_flow_names_no_module_that_is_gone():
    assert set(FLOW) == {path.stem for path in PACKAGE.glob("*.py")}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("crosscheck/**/*.py")), ids=lambda path: path.name)
def test_crosscheck_imports_only_the_emulator(path):
    assert imported(path) <= {"crosscheck", "emulator"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("emulator/**/*.py")), ids=lambda path: path.name)
def test_emulator_imports_nothing_from_its_parent(path):
    assert imported(path) <= {"emulator"}


def test_only_cli_side_modules_know_the_terminal():
    for path in PACKAGE.glob("*.py"):
        words = {name.split(".")[0] for node in ast.walk(ast.parse(path.read_text())) for name in _absolute(node)}
        assert path.stem in ("cli", "command", "emulation", "measurement", "options", "present") or not words & {
            "typer",
            "rich",
        }


def test_templates_and_specs_are_data():
    root = generator.resources.checkout_root()
    for folder in ("templates", "specs", "generated", "tests"):
        assert not (root / folder / "__init__.py").exists()


def _absolute(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module or ""]
    return []


def test_the_emulator_has_the_planners_hardware_limits():
    """emulator/ imports nothing from its parent, so these numbers stand in both; here is where they meet."""
    from generator.arch import ARCHS
    from generator.emulator.memory import TensorMemory
    from generator.emulator.targets import SMEM_LIMIT

    assert {name: arch.smem_per_cta for name, arch in ARCHS.items()} == SMEM_LIMIT
    assert ARCHS["sm_100a"].tmem_columns == TensorMemory.COLUMNS
