"""Our Blackwell kernels beside FlashAttention-4's, without a GPU: `python tests/throughput.py [--write-docs]`.

What one CTA executes for a KV tile, by unit, and how long the timeline's model (docs/timeline.md) says it takes: both
kernels compiled here and executed by the emulator on the same model. Exponentials and arithmetic are those of the
softmax warps, the warps that compute exponentials; the rest is of all warps. A CTA has 256 query rows and sees all of
2048 or 4096 keys; the difference of the two launches is 16 KV tiles of 128 keys, without beginning and end. Then whole
launches of more query tiles than multiprocessors. Needs flash-attn-4 and CPU PyTorch for its half; what is missing is
said.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import re
import sys
import tempfile
import unittest.mock
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from generator.compile import compile_kernel
from generator.cubin import read_cubin
from generator.emulator import Tracer, attach, attached
from generator.emulator.clock import FLOAT, INTEGER, MEMORY, SPECIAL, unit_of
from generator.emulator.timeline import WARP
from generator.layout import Plan
from generator.plan import plan_kernel
from generator.resources import checkout_root
from generator.run import run_observed
from generator.spec import load_spec
from generator.verify import random_inputs

QUERIES, KEYS, TILE, TRACED = 256, (2048, 4096), 128, 2
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
CASES = [(d, v, causal) for d, v in DIMS for causal in (False, True)]
SMS, HEADS, SQUARE = 2, 2, 1024  # of the whole launches: 8 query tiles of 256 rows, all keys
PAGE = checkout_root() / "docs" / "throughput.md"
ROWS = {
    "tensor core, cycles": "mma_cycles",
    "tcgen05.mma": "mma",
    "exponentials, special-function unit": "special",
    "exponentials, FMA units": "polynomial",
    "softmax: float instructions (f32x2 twice)": "float",
    "softmax: integer, compare, convert": "integer",
    "shared memory, bytes of threads": "shared",
    "TMEM, bytes of threads": "tmem",
    "barriers: waits and arrivals": "barriers",
    "other instructions, moves left out": "other",
}
SOFTMAX = ("special", "polynomial", "float", "integer")  # counted in the softmax warps
# polynomial_pairs with which as many exponentials leave the special-function unit as FlashAttention-4's, at 256 ours
LIKE_FLASH = {128: {False: (4, 12), True: (4, 12)}, 192: {False: (), True: (4,)}}


@dataclass
class Measured:
    """counts: of one KV tile of a CTA, by the values of ROWS; cycles: of both launches; tensor: share at the longer."""

    counts: dict[str, float]
    cycles: tuple[float, float]
    tensor: float
    registers: int
    spills: int
    name: str
    ctas: int  # that share the work, each with a multiprocessor of its own

    @property
    def steady(self) -> float:
        """Share of the time in which the tensor core works, between the two launches."""
        tiles = (KEYS[1] - KEYS[0]) / TILE
        return self.counts["mma_cycles"] * tiles / self.ctas / (self.cycles[1] - self.cycles[0])


@dataclass
class Launched:
    """opcodes: warp-instructions of all warps, a wait for an mbarrier once, however often it polls; softmax: of those
    that compute exponentials.
    """

    opcodes: Counter
    softmax: Counter
    model: dict[str, Any]
    flop: int
    facts: Any
    ctas: int


def launched(launch: Any, tracer: Tracer, facts: Any) -> Launched:
    ctas, timeline = math.prod(launch.grid), tracer.timelines[-1]
    assert ctas <= TRACED, "a CTA that is not traced"
    opcodes = Counter({name: n for name, n in launch.opcodes.items() if not name.startswith("mbarrier.try_wait")})
    steps = (step for log in timeline.recording.logs.values() for step in log if not isinstance(step, int))
    opcodes["mbarrier.wait"] = sum(step.kind == "wait" for step in steps)
    return Launched(opcodes, _softmax(timeline), launch.model, launch.mma_flop, facts, ctas)


def _softmax(timeline: Any) -> Counter:
    """Warp-instructions of the traced warps that compute exponentials for more than a factor of O now and then."""
    recording, found = timeline.recording, []
    instrs = recording.program.kernel.instrs
    for log in recording.logs.values():
        blocks = [recording.program.blocks[step] for step in log if isinstance(step, int)]
        found.append(Counter(instr.opcode for block in blocks for instr in instrs[block.start : block.stop]))
    most = max(counts["ex2.approx.ftz.f32"] for counts in found)
    return sum((counts for counts in found if 2 * counts["ex2.approx.ftz.f32"] > most), Counter())


def measured(launches: list[Launched], name: str) -> Measured:
    tiles = (KEYS[1] - KEYS[0]) // TILE
    counts: Counter = Counter()
    for field in ("opcodes", "softmax"):
        more = Counter(getattr(launches[1], field))
        more.subtract(getattr(launches[0], field))
        for opcode, n in more.items():
            for key, amount in _kinds(opcode).items():
                counts[key] += n * amount / tiles * ((key in SOFTMAX) == (field == "softmax"))
    counts["mma_cycles"] = (launches[1].flop - launches[0].flop) / 8192 / tiles
    facts = launches[1].facts
    return Measured(
        dict(counts),
        tuple(launch.model["cycles"] for launch in launches),
        launches[1].model["tensor_core"],
        facts.registers,
        facts.spill_store_bytes + facts.spill_load_bytes,
        name,
        launches[1].ctas,
    )


def _kinds(opcode: str) -> dict[str, float]:
    """What a warp-instruction counts for, each thing in the unit of its row; moves, which rename, count nothing."""
    if opcode.startswith(("mov.", "cvta.", "ld.param")):
        return {}
    if opcode.startswith("tcgen05.mma"):
        return {"mma": 1}
    if opcode.startswith(("tcgen05.ld", "tcgen05.st")):
        return {"tmem": 32 * 4 * int(re.search(r"\.x(\d+)", opcode)[1])}
    if opcode.startswith(("mbarrier.", "bar.", "barrier.", "tcgen05.commit")):
        return {"barriers": 1}
    if opcode.startswith("ex2."):
        return {"special": 32}
    if opcode.startswith("add.rm"):  # one of each exponential by polynomial: FlashAttention-4 does it alike
        return {"polynomial": 64 if "f32x2" in opcode else 32, "float": 2 if "f32x2" in opcode else 1}
    unit = unit_of(opcode)
    if unit == FLOAT:
        return {"float": 2 if "f32x2" in opcode else 1}
    if unit == MEMORY:
        wide = re.search(r"\.v(\d)", opcode)
        return {"shared": 32 * 4 * int(wide[1] if wide else 1)} if ".shared" in opcode else {"other": 1}
    if unit == INTEGER:
        return {"integer": 1}
    return {"other": 1 - (unit == SPECIAL)}


def ours(d: int, v: int, causal: bool, strategy: str, folder: Path, pairs: tuple[int, ...] | None = None) -> Measured:
    """pairs: instead of the plan's polynomial_pairs."""
    plan = plan_kernel(load_spec(None, head_dim=d, head_dim_v=v, causal=causal, strategy=strategy))
    chosen = plan.polynomial_pairs if pairs is None else pairs
    with unittest.mock.patch.object(Plan, "polynomial_pairs", chosen):
        binary = compile_kernel(plan)
    found = []
    for keys in KEYS:
        inputs = random_inputs("bf16", (1, 1, 1, QUERIES, keys), d, v, 0)
        tracer = Tracer(folder / "t.json", ctas=TRACED)
        launch = run_observed(binary, *inputs, strict=False, trace=tracer).launches[0]
        found.append(launched(launch, tracer, binary))
    name = plan.kernel_name if pairs is None else f"the same, {len(pairs)} of 16 pairs by FMA"
    return measured(found, name)


@contextlib.contextmanager
def _cubins() -> Iterator[list[bytes]]:
    """Those that the DSL makes meanwhile."""
    seen: list[bytes] = []
    real = attach.cubins_of

    def noted(image: bytes) -> list[bytes]:
        found = list(real(image))
        seen.extend(found)
        return found

    attach.cubins_of = noted
    try:
        yield seen
    finally:
        attach.cubins_of = real


def flash(d: int, v: int, causal: bool, folder: Path) -> Measured:
    import foreign

    module = foreign.load("foreign_fa4")
    found = []
    with _cubins() as cubins:
        for keys in KEYS:
            tracer = Tracer(folder / "t.json", ctas=TRACED)
            with attached("sm_100a", False, module.SMS, trace=tracer) as device:
                foreign.forget_devices()
                module.run(module.Attention("sm_100a", d, QUERIES, keys, 1, 1, v, causal=causal))
                (launch,) = device.launches
                facts = [read_cubin(c, launch.kernel) for c in cubins if launch.kernel.encode() in c]
                found.append(launched(launch, tracer, facts[-1]))
    return measured(found, "FlashAttention-4")


@dataclass(frozen=True)
class Whole:
    """A launch of many query tiles on SMS multiprocessors. tensor: share of the time that their tensor cores work."""

    name: str
    ctas: int
    cycles: float
    tensor: float


def whole(timeline: Any, model: dict[str, Any], cluster: int, flop: int, name: str) -> Whole:
    """The model gives each CTA a multiprocessor: here the clusters of a launch take their turns on SMS of them, in the
    order of their numbers, each when the one before it is done.
    """
    ends: dict[int, float] = {}
    for track in timeline.tracks:
        if track.kind == WARP and track.slices:
            ends[track.cta] = max(ends.get(track.cta, 0.0), max(piece.end for piece in track.slices))
    free = [0.0] * (SMS // cluster)
    for first in range(0, model["ctas"], cluster):
        free.sort()
        free[0] += max(ends[first + i] for i in range(cluster))
    cycles = max(free)
    return Whole(name, model["ctas"], cycles, flop / 8192 / SMS / cycles)


def our_whole(d: int, v: int, causal: bool, strategy: str, folder: Path) -> Whole:
    binary = compile_kernel(plan_kernel(load_spec(None, head_dim=d, head_dim_v=v, causal=causal, strategy=strategy)))
    inputs = random_inputs("bf16", (1, HEADS, HEADS, SQUARE, SQUARE), d, v, 0)
    tracer = Tracer(folder / "t.json", ctas=64)
    launch = run_observed(binary, *inputs, strict=False, trace=tracer, sms=SMS).launches[0]
    return whole(tracer.timelines[0], launch.model, binary.plan.ctas, launch.mma_flop, binary.plan.kernel_name)


def their_whole(d: int, v: int, causal: bool, folder: Path) -> Whole:
    import foreign
    from flash_attn.cute.interface import _flash_attn_fwd

    _flash_attn_fwd.compile_cache.clear()  # a kernel keeps the number of multiprocessors that it was compiled for
    module, tracer = foreign.load("foreign_fa4"), Tracer(folder / "t.json", ctas=64)
    with attached("sm_100a", False, SMS, trace=tracer) as device:
        foreign.forget_devices()
        module.run(module.Attention("sm_100a", d, SQUARE, SQUARE, HEADS, HEADS, v, causal=causal))
        (launch,) = device.launches
    cluster = math.prod(launch.cluster)
    return whole(tracer.timelines[0], launch.model, cluster, launch.mma_flop, "FlashAttention-4")


def whole_lines(folder: Path, theirs: bool) -> list[str]:
    lines = [
        "## More query tiles than multiprocessors",
        "",
        f"{HEADS} heads of {SQUARE} queries and as many keys, 256 rows a query tile, on {SMS} multiprocessors. A "
        "persistent",
        "launch has a CTA a multiprocessor; the CTAs of another take their turns, each when the one before it is done.",
        "Tensor core busy: of its time; what a kernel multiplies past the mask's edge counts.",
        "",
        "| head_dim | kernel | CTAs | cycles | tensor core busy |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for d, v, causal in CASES:
        found = [our_whole(d, v, causal, _strategies(d, v)[-1], folder)]
        found += [their_whole(d, v, causal, folder)] if theirs else []
        for one in found:
            lines.append(f"| {_title(d, v, causal)} | {one.name} | {one.ctas} | {one.cycles:.0f} | {one.tensor:.1%} |")
        print("\n".join(lines[-len(found) :]), flush=True)
    return [*lines, ""]


def _title(d: int, v: int, causal: bool) -> str:
    return f"{d}" + (f"/{v}" if v != d else "") + (", causal" if causal else "")


def table(d: int, v: int, causal: bool, columns: list[Measured]) -> list[str]:
    lines = [
        f"## head_dim {_title(d, v, causal)}",
        "",
        "| a KV tile of a CTA, 256 x 128 scores | " + " | ".join(m.name for m in columns) + " |",
    ]
    lines.append("| --- |" + " ---: |" * len(columns))
    for label, key in ROWS.items():
        lines.append(f"| {label} | " + " | ".join(f"{m.counts.get(key, 0):.0f}" for m in columns) + " |")
    for label, text in (
        ("multiprocessors", [str(m.ctas) for m in columns]),
        ("registers a thread at entry", [str(m.registers) for m in columns]),
        ("spilled bytes a thread", [str(m.spills) for m in columns]),
        ("cycles, 2048 keys", [f"{m.cycles[0]:.0f}" for m in columns]),
        ("cycles, 4096 keys", [f"{m.cycles[1]:.0f}" for m in columns]),
        ("tensor core busy, 4096 keys", [f"{m.tensor:.1%}" for m in columns]),
        ("tensor core busy, without beginning and end", [f"{m.steady:.1%}" for m in columns]),
    ):
        lines.append(f"| {label} | " + " | ".join(text) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write-docs", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--only", metavar="WORD", help="cases whose title holds it, as 'head_dim 128'")
    options = parser.parse_args()
    theirs = all(importlib.util.find_spec(name) for name in ("flash_attn", "torch"))
    if not theirs:
        print("flash-attn-4 and PyTorch are not installed together: our half only", file=sys.stderr)
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for d, v, causal in CASES:
            if options.only and options.only not in f"head_dim {_title(d, v, causal)}":
                continue
            columns = [ours(d, v, causal, strategy, Path(folder)) for strategy in _strategies(d, v)]
            if (pairs := LIKE_FLASH.get(max(d, v, 128), {}).get(causal)) is not None:
                columns.append(ours(d, v, causal, _strategies(d, v)[-1], Path(folder), pairs))
            columns += [flash(d, v, causal, Path(folder))] if theirs else []
            part = table(d, v, causal, columns)
            print("\n".join(part), flush=True)
            lines += part
        if not options.only:
            lines += whole_lines(Path(folder), theirs)
    if options.write_docs:
        PAGE.write_text("\n".join([HEAD, *lines]))


def _strategies(d: int, v: int) -> list[str]:
    """Those that are compared, the throughput schedule last."""
    if d == 256:
        return ["tiles", "two_ctas"]
    return ["tiles", "two_tiles"] if d == v else ["two_tiles", "two_ctas"]


HEAD = """# Throughput, predicted

What is executed for each KV tile, and what the timeline's model makes of it ([timeline.md](timeline.md)), for our
kernels with one query tile and with two in flight, or at head_dim 192 and 256 in two CTAs that multiply as one, and for
FlashAttention-4 (4.0.0b36), compiled by the same CuTe DSL and executed by the emulator. Nothing here was measured on a
GPU. 256 query rows: one CTA, or two of 128 with a multiprocessor each, which take half the cycles for as much work.
Counts are of warp-instructions where no unit is given, exponentials of single elements; exponentials and arithmetic are
those of the softmax warps, moves, which rename registers, are left out, and a wait counts once, however often it polls.
Written by `python tests/throughput.py --write-docs`.

Two exponentials that leave the special-function unit cost a warp six float instructions of two elements, which count
twelve, and six integer ones. The planner's kernels take three of eight that way up to head_dim 192, FlashAttention-4
one of eight or fewer: so they need fewer cycles, and have more of these instructions. "The same" is our kernel with
FlashAttention-4's share: then no row of the softmax loop is longer than FlashAttention-4's. ptxas begins these
polynomials early, for they are the longest chains, and their results wait in registers: in the softmax loop, nowhere
else, 348 to 468 bytes a thread were spilled while P left in halves of a row from 192 registers; in quarters, from 216,
none are.
"""

if __name__ == "__main__":
    main()
