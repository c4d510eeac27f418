"""Kernels that nobody here wrote, on the emulator: a row of docs/foreign.md for each case that can run here.

    python tests/foreign.py [--only WORD]... [--fail-fast]

runs the cases of the projects that are installed (with CPU-only PyTorch, and triton, which their autotuners import)
and prints Markdown. Each kernel gets random
inputs, its result is compared with the same computation in float64. Seconds are those of the emulation, compilation
left out. Not part of the test run; test_emulate.py holds a marked test with a few of the cases.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from generator.emulator import EmulatorError, Hazard, attached

os.environ["QUACK_CACHE_ENABLED"] = "0"  # what it keeps on the disk was compiled for a GPU

ARCHS = ("sm_90a", "sm_100a")
MODULES = ("foreign_fa4", "foreign_quack")
HEADER = "| source | arch | case | error against float64 | hazards | launches | seconds | M warp-instructions |"


@dataclass(frozen=True)
class Row:
    """A case's result. When a hazard stopped the run, errors and launches are those of one that lets kernels compute
    on values never written, or of one without checks.
    """

    source: str
    arch: str
    case: str
    errors: dict[str, float]
    launches: tuple[Any, ...]
    hazard: str = ""
    failure: str = ""

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        seconds = sum(launch.seconds for launch in self.launches)
        count = sum(launch.warp_instructions for launch in self.launches)
        shown = (self.source, self.arch, self.case, self.failure or errors, self.hazard or "none", len(self.launches))
        return f"| {' | '.join(map(str, shown))} | {seconds:.2f} | {count / 1e6:.2f} |"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, case: Any) -> Row:
    """One case; whatever it raises becomes the row's failure."""
    facts = (f"{module.SOURCE} {metadata.version(module.SOURCE)}", case.arch, str(case))
    hazard = ""
    for mode in ({}, {"allow_uninitialized": True}, {"strict": False}):
        try:
            with attached(case.arch, sms=module.SMS, **mode) as gpu:
                forget_devices()
                errors = module.run(case)
            note = f" ({', '.join(mode)})" if mode else ""
            return Row(*facts, errors, tuple(gpu.launches), hazard + note)
        except Hazard as error:
            hazard = hazard or str(error)
        except Exception as error:
            if not isinstance(error, EmulatorError):
                traceback.print_exc()
            first = (str(error).strip().splitlines() or [""])[0]
            return Row(*facts, {}, tuple(gpu.launches), hazard, f"{type(error).__name__}: {first}")
    return Row(*facts, {}, (), hazard, "a hazard, without checks too")


def forget_devices() -> None:
    """Libraries ask once a process which device there is."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("flash_attn", "quack")):
            for value in list(vars(module).values()):
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


def chosen(words: list[str]) -> Iterator[tuple[ModuleType, Any]]:
    for name in MODULES:
        module = load(name)
        if not list(metadata.distributions(name=module.SOURCE)):
            print(f"{module.SOURCE} is not installed", file=sys.stderr)
            continue
        for case in module.CASES:
            if all(word in f"{name} {case.arch} {case}," for word in words):
                yield module, case


def _in_a_process(arch: str, words: list[str]) -> int:
    """The cases of one architecture: what libraries compile, they keep a process, whatever device there is later."""
    only = [argument for word in (arch, *words) for argument in ("--only", word)]
    return subprocess.run([sys.executable, __file__, "--rows", *only], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="cases whose description has this word")
    parser.add_argument("--rows", action="store_true", help="print no heading")
    parser.add_argument("--list", action="store_true", help="name the cases only")
    arguments = parser.parse_args()
    if not arguments.list and not arguments.rows:
        print(HEADER + "\n" + "|---" * HEADER.count(" | ") + "|---|", flush=True)
    if not arguments.list and not any(word.startswith("sm_") for word in arguments.only):
        return max(_in_a_process(arch, arguments.only) for arch in ARCHS)
    failed = 0
    for module, case in chosen(arguments.only):
        if arguments.list:
            print(case.arch, case)
            continue
        row = run(module, case)
        print(row, flush=True)
        failed += bool(row.failure)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
