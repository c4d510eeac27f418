"""The mutation test: which synchronization instructions of a kernel can be broken without anyone noticing.

`bespoke mutate` runs every mutant of a kernel's PTX (emulator/mutants.py) and classifies it (emulator/mutation.py).
For a specification the outputs of a mutant that ran are judged as `bespoke verify` judges them; for a program, whose
reference is not known, any bit that differs from what the original wrote is wrong: nothing but the synchronization was
changed.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import Output
from .compile import Binary
from .emit import write_text
from .emulator.errors import EmulatorError
from .emulator.gpu import Gpu, LaunchCase, Observer
from .emulator.mutation import RESULTS, Outcome, run_mutants
from .emulator.script import ScriptRun, run_script
from .run import run_observed
from .verify import compare, judge, judge_writes, random_operands

Done = Callable[[Outcome], None]
KV_TILES = 7  # whole ones: three rounds of a ring of two stages, and one more
TURNS = 10  # of a persistent launch
SHARES = 5  # of a query tile's keys with split_kv: several warps combine a row


def shape_for(binary: Binary) -> tuple[int, ...]:
    """A launch that runs every instruction: whole and partial KV tiles, and with causal a tile of queries that sees no
    key at all. A persistent kernel, run by two CTAs (or pairs), takes many turns.
    """
    if binary.plan.persistent:
        keys, tokens = 5 * binary.tile_n + 5, binary.plan.tokens * binary.plan.query_tiles
        batch, heads = (TURNS // 2, 1) if binary.spec.seqlens else (1, TURNS // 2)
        shape = (batch, heads * binary.spec.q_heads_per_kv, heads, tokens + max(tokens // 16, 1), keys)
        return shape if binary.spec.kv_sources == 1 else (*shape, binary.tile_n + 3)
    keys = KV_TILES * binary.tile_n + 5
    queries = keys + 128 if binary.spec.causal else 200
    shape = (1, binary.spec.q_heads_per_kv, 1, queries, keys)
    return shape if binary.spec.kv_sources == 1 else (*shape, 3 * binary.tile_n + 5)


def mutate_kernel(
    binary: Binary, shape: Sequence[int], *, seed: int = 0, jobs: int = 2, done: Done = lambda _: None
) -> list[Outcome]:
    """Every mutant of a compiled kernel on random inputs of `shape` (B, Hq, Hkv, Sq, Skv).

    jobs: processes; done: called with each outcome as it comes. Raises EmulatorError when the kernel itself does not
    pass: every mutant would count as one that gives wrong numbers.
    """
    spec, shape = binary.spec, tuple(int(extent) for extent in shape)
    operands = _operands(binary, shape, seed)
    if binary.plan.corrected or binary.plan.tiling.lazy:
        _make_rising(operands, binary.tile_n)
    outcomes: list[Outcome] = []

    def failures(outputs: Sequence[Output]) -> str | None:
        return "; ".join([*judge(compare(binary, operands, outputs)), *judge_writes(outputs)]) or None

    splits = SHARES if spec.split_kv else None
    if own := failures(run_observed(binary, **operands, backend="emulator", splits=splits).outputs):
        raise EmulatorError(f"{spec.name} [{','.join(map(str, shape))}] is wrong before anything is broken: {own}")

    def prepare(gpu: Gpu, outputs: Sequence[Output]) -> None:
        def wrong() -> str | None:
            return failures(outputs)

        gpu.observers.append(_mutating(outcomes, wrong, jobs, done))

    run_observed(binary, **operands, backend="emulator", prepare=prepare, sms=2 * binary.plan.ctas, splits=splits)
    return [named(outcome, spec.name) for outcome in outcomes]


def _operands(binary: Binary, shape: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    """Random ones. Where a persistent kernel has lengths, from the first seed on with which the first worker begins
    with two KV tiles and the second one with more: later on, a wait for a stage is often implied by others.
    """
    while True:
        operands = random_operands(binary.spec, shape, seed)
        lengths = [operands[name] for name in ("seqlens", "seqlens2") if name in operands]
        tiles = sum((-(-length // binary.tile_n) for length in lengths), np.zeros(0 if not lengths else shape[0]))
        varied = tiles.size > 1 and shape[4] > 2 * binary.tile_n and binary.plan.persistent
        if not varied or (tiles[0] == 2 and tiles[1] > 2):
            return operands
        seed += 1


def _make_rising(operands: dict[str, np.ndarray], tile_n: int) -> None:
    """Let K [B, Skv, Hkv, D] grow from KV tile to KV tile, and on from source to source, so that the rows' maxima move
    by more than what a kernel lets pass without rescaling O.
    """
    before = 0
    for name in ("k", "k2"):
        if name in operands:
            k = operands[name]
            growth = 1 + 4 * (before + np.arange(k.shape[1]) // tile_n)
            operands[name] = (k.astype(np.float32) * growth[:, None, None]).astype(k.dtype)
            before += -(-k.shape[1] // tile_n)


def mutate_script(
    script: Path, arguments: Sequence[str], arch: str, sms: int, *, jobs: int = 2, done: Done = lambda _: None
) -> tuple[list[Outcome], ScriptRun]:
    """Every mutant of every kernel that a CuTe DSL program launches, at its first launch; and the program's own run.
    The kernels' names are the program's.
    """
    outcomes: list[Outcome] = []
    run = run_script(
        script, arguments, arch, sms, lambda gpu: gpu.observers.append(_mutating(outcomes, None, jobs, done))
    )
    kernels = list(dict.fromkeys(outcome.kernel for outcome in outcomes))
    names = {k: script.stem if len(kernels) == 1 else f"{script.stem}, kernel {i}" for i, k in enumerate(kernels, 1)}
    return [named(outcome, names[outcome.kernel]) for outcome in outcomes], run


def _mutating(outcomes: list[Outcome], wrong: Callable[[], str | None] | None, jobs: int, done: Done) -> Observer:
    seen: set[tuple[str, str]] = set()

    @contextmanager
    def observer(case: LaunchCase) -> Iterator[None]:
        if (case.text, case.kernel) not in seen:
            seen.add((case.text, case.kernel))
            outcomes.extend(run_mutants(case, wrong, jobs, done=done))
        yield

    return observer


def named(outcome: Outcome, kernel: str) -> Outcome:
    """The outcome under the kernel's short name."""
    return Outcome(**{**vars(outcome), "kernel": kernel})


# --- the table --------------------------------------------------------------------------------------------------------


def tally(outcomes: Sequence[Outcome]) -> dict[str, Counter[str]]:
    """Kind of mutant → how many came to which result."""
    table: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        table.setdefault(outcome.kind, Counter())[outcome.result] += 1
    return dict(sorted(table.items()))


def summary(outcomes: Sequence[Outcome], command: str = "") -> dict[str, Any]:
    """What docs/mutation.json keeps of a kernel: the tally, the reasons of equivalent mutants, by kind, the mutants
    that were missed, and the command that made the table.
    """
    reasons: dict[str, set[str]] = {}
    for outcome in outcomes:
        if outcome.result == "equivalent":
            reasons.setdefault(outcome.kind, set()).add(outcome.message)
    kinds = {kind: dict(counts) for kind, counts in tally(outcomes).items()}
    missed = [f"{o.kind}: {o.opcode}, PTX line {o.line}" for o in outcomes if o.result == "missed"]
    return {
        "command": command,
        "kinds": kinds,
        "reasons": {kind: sorted(texts) for kind, texts in sorted(reasons.items())},
        "missed": missed,
    }


def command() -> str:
    """The command under way, without the options that say where things are written, or by how many processes."""
    words, skip = ["bespoke"], False
    for word in sys.argv[1:]:
        if not skip and word not in ("--json", "--write-docs", "--title", "--jobs"):
            words.append(Path(word).name if word.endswith(".py") else word)
        skip = word in ("--json", "--title", "--jobs")
    return shlex.join(words)


def write_docs(outcomes: Sequence[Outcome], folder: Path, command: str = "") -> Path:
    """Replace these kernels' entries in mutation.json, and write mutation.md from it; returns the latter's path. Other
    kernels' entries stay.
    """
    data = folder / "mutation.json"
    kernels = json.loads(data.read_text()) if data.exists() else {}
    for kernel in dict.fromkeys(outcome.kernel for outcome in outcomes):
        kernels[kernel] = summary([outcome for outcome in outcomes if outcome.kernel == kernel], command)
    write_text(data, json.dumps(dict(sorted(kernels.items())), indent=1) + "\n")
    return write_text(folder / "mutation.md", markdown(kernels))


HEAD = """# The mutation test

Every synchronization instruction of a kernel's PTX is removed or weakened, one at a time: waits, fences, commits,
arrivals, barriers, phases, counts, stage indices, elections. Each mutant runs in the strict emulator, on the inputs of
the original, and is *reported* (a hazard), *warned* of (the ISA asks for it and silicon is known to tolerate its
absence: `generator/emulator/formal.py`), leaves *wrong numbers*, is *deadlocked*, or is *equivalent*: a reviewed list
(`generator/emulator/equivalent.py`) says by kind and context why nobody can tell it from the original. *Missed* is what
is left. *Not run*: the launch does not reach the instruction. Written by `bespoke mutate --write-docs`; do not edit.
"""


def markdown(kernels: dict[str, Any]) -> str:
    """docs/mutation.md."""
    kernels = dict(sorted(kernels.items()))
    shown = [result for result in RESULTS if result != "not run"]
    lines = [HEAD, *_row("kernel", "mutants", *shown), *_row("---", *["---:"] * (len(shown) + 1))]
    for kernel, entry in kernels.items():
        total = sum((Counter(counts) for counts in entry["kinds"].values()), Counter())
        lines += _row(kernel, sum(total[r] for r in shown), *(total[r] for r in shown))
    for kernel, entry in kernels.items():
        made = [f"`{entry['command']}`", ""] if entry.get("command") else []
        lines += ["", f"## {kernel}", "", *made, *_row("kind", *RESULTS), *_row("---", *["---:"] * len(RESULTS))]
        lines += [line for kind, n in entry["kinds"].items() for line in _row(kind, *(n.get(r, 0) for r in RESULTS))]
        lines += ["", *(f"- missed: {text}" for text in entry["missed"])] if entry.get("missed") else []
    reasons = sorted({(kind, r) for entry in kernels.values() for kind, rs in entry["reasons"].items() for r in rs})
    lines += ["", "## Why mutants are equivalent", ""]
    lines += [f"- {kind}: {reason}." for kind, reason in reasons]
    return "\n".join(lines) + "\n"


def _row(*cells: Any) -> list[str]:
    return ["| " + " | ".join(str(cell) for cell in cells) + " |"]
