"""specs/matrix.toml: which kernels are verified on which shapes. Adding a case is adding a line there or a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from .plan import plan_kernel
from .resources import specs_dir
from .spec import KernelSpec, SpecError, load_spec, spec_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHAPE_FORMAT = "B,Hq,Hkv,Sq,Skv[,Skv2]"


class Shape(NamedTuple):
    """Batch, query heads, KV heads, queries, keys; every one at least 1."""

    batch: int
    q_heads: int
    kv_heads: int
    queries: int
    keys: int
    keys2: int = 0  # of a second source; 0: there is none

    def __str__(self) -> str:
        return ",".join(map(str, self if self.keys2 else self[:5]))


class Case(NamedTuple):
    """One verification: the kernel of specs/<kernel>.toml on one shape."""

    kernel: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.kernel}[{self.shape}]"


class Sweep(NamedTuple):
    """kernels: globs over kernel names, those after "!" leave kernels out; shapes: (B, Hkv, Sq, Skv[, Skv2])."""

    name: str
    kernels: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def takes(self, kernel: str) -> bool:
        """Whether the sweep is of the kernel of this name."""
        wanted, left_out = ([p for p in self.kernels if p.startswith("!") is out] for out in (False, True))
        return any(fnmatchcase(kernel, p) for p in wanted) and not any(fnmatchcase(kernel, p[1:]) for p in left_out)


def run_cases(cases: Sequence[Case], backend: str, jobs: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Verify every case, a kernel's together so that it compiles once; rows as kernels finish, in no fixed order.

    A kernel that cannot be compiled or run gives failed rows that say why.
    """
    work = [
        (name, [case.shape for case in group], backend, seed) for name, group in groupby(cases, key=lambda c: c.kernel)
    ]
    work.sort(key=lambda item: -len(item[1]))  # the longest first, so that no process is left with it at the end
    from .emulator.interrupt import each

    if jobs == 1:
        for item in work:
            yield from _verify_shapes(*item)
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # inherited by the workers: one process a core, one thread each
    for _, rows in each(min(jobs, len(work)), "spawn", _verify_shapes, work):
        yield from rows


def _verify_shapes(name: str, shapes: Sequence[Shape], backend: str, seed: int) -> list[dict[str, Any]]:
    from .compile import compile_kernel
    from .run import RunError
    from .verify import Report, verify_kernel

    rows = []
    binary = None
    for shape in shapes:
        try:
            binary = binary or compile_kernel(plan_kernel(load_spec(name)))
            rows.append(verify_kernel(binary, shape, backend=backend, seed=seed).as_dict())
        except RunError:  # no such device: no other kernel would run either
            raise
        except Exception as error:  # one kernel's trouble must not lose the others' rows
            failure = f"{type(error).__name__}: {error}"
            rows.append(Report(name, shape, backend, seed, None, {}, {}, 0, 0.0, (failure,)).as_dict())
    return rows


def parse_shape(text: str, spec: KernelSpec) -> Shape:
    """ "B,Hq,Hkv,Sq,Skv" -> Shape, with Skv2 or its default where the kernel has a second source. Raises SpecError."""
    group, limit = spec.q_heads_per_kv, f"a shape is {SHAPE_FORMAT}, whole numbers of at least 1"
    words = text.split(",")
    if len(words) not in (5, 6) or not all(word.strip().isdecimal() and int(word) >= 1 for word in words):
        raise SpecError("shape", text, limit, f"for example --shape 1,{group},1,128,128")
    if len(words) == 6 and spec.kv_sources == 1:
        raise SpecError("shape", text, "Skv2 is of a second source, and the kernel has one", "leave Skv2 out")
    shape = with_keys2(Shape(*map(int, words)), spec)
    if shape.q_heads != shape.kv_heads * group:
        limit = f"Hq must be Hkv x q_heads_per_kv = {shape.kv_heads} x {group}"
        raise SpecError("shape", text, limit, f"Hq = {shape.kv_heads * group}, or another --q-heads-per-kv")
    return shape


def with_keys2(shape: Shape, spec: KernelSpec) -> Shape:
    """The shape with keys of a second source exactly where the kernel has one: by default a quarter, and one more."""
    if spec.kv_sources == 1:
        return shape._replace(keys2=0)
    return shape if shape.keys2 else shape._replace(keys2=shape.keys // 4 + 1)


def load_matrix(select: str = "*") -> list[Case]:
    """Every case of specs/matrix.toml whose kernel name matches the glob, each once, in order of kernel.

    Raises SpecError for a malformed matrix, a glob in it that matches no kernel, and a selection that is empty.
    """
    names = spec_names()
    for sweep in sweeps():
        for pattern in sweep.kernels:
            if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
                limit = "matches no kernel in specs/"
                raise SpecError("kernels", pattern, limit, f'correct sweep "{sweep.name}" of matrix.toml')
    chosen = [name for name in names if fnmatchcase(name, select)]
    if not chosen:
        raise SpecError("select", select, "matches no kernel in specs/", 'for example --select "*_d128*"')
    return [Case(name, shape) for name in chosen for shape in shapes_of(load_spec(name))]


def shapes_of(spec: KernelSpec) -> list[Shape]:
    """The shapes that matrix.toml asks for a kernel of this name, whether or not it has a file in specs/."""
    shapes = [
        with_keys2(Shape(batch, kv_heads * spec.q_heads_per_kv, kv_heads, queries, *keys), spec)
        for sweep in sweeps()
        if sweep.takes(spec.name)
        for batch, kv_heads, queries, *keys in sweep.shapes
    ]
    return list(dict.fromkeys(shapes))


@lru_cache(maxsize=1)
def sweeps() -> tuple[Sweep, ...]:
    """The sweeps of specs/matrix.toml, checked. Raises SpecError."""
    path = specs_dir() / "matrix.toml"
    try:
        return parse_sweeps(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError("matrix.toml", str(path), f"cannot be read: {error}", "restore the file") from None


def parse_sweeps(document: Mapping[str, Any]) -> tuple[Sweep, ...]:
    """The checked sweeps of a parsed matrix.toml. Raises SpecError."""
    tables = document.get("sweep")
    if set(document) != {"sweep"} or not isinstance(tables, list):
        raise SpecError("matrix.toml", sorted(document), "holds [[sweep]] tables and nothing else", "correct the file")
    return tuple(_sweep(table) for table in tables)


def _sweep(table: Mapping[str, Any]) -> Sweep:
    if set(table) != {"name", "kernels", "shapes"}:
        raise SpecError("sweep", sorted(table), "has the keys name, kernels and shapes", "correct matrix.toml")
    if not isinstance(table["kernels"], list) or not all(isinstance(word, str) for word in table["kernels"]):
        raise SpecError("kernels", table["kernels"], "is a list of globs over kernel names", "correct matrix.toml")
    for shape in table["shapes"]:
        if not isinstance(shape, list) or len(shape) not in (4, 5) or not all(type(n) is int and n >= 1 for n in shape):
            limit = "a shape is [B, Hkv, Sq, Skv] or [B, Hkv, Sq, Skv, Skv2], whole numbers of at least 1"
            raise SpecError("shapes", shape, limit, f'correct sweep "{table["name"]}" of matrix.toml')
    return Sweep(table["name"], tuple(table["kernels"]), tuple(tuple(shape) for shape in table["shapes"]))
