"""The instruction table → docs/instructions.md: every name that the emulator executes, collapsed back to patterns.

python -m generator.emulator.document > docs/instructions.md
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from .flow import CONTROL, IGNORED, MOVES, PARAM_LOADS
from .table import FAMILIES, RESULT, TABLE, expand
from .translate import Translator

SECTIONS = {
    "9.7.1": "Integer arithmetic",
    "9.7.2": "Extended-precision integers",
    "9.7.3": "float32 and float64",
    "9.7.4": "f16 and bf16",
    "9.7.5": "Mixed precision",
    "9.7.6": "Comparison and selection",
    "9.7.7": "f16 and bf16 comparison",
    "9.7.8": "Logic and shifts",
    "9.7.9": "Data movement and conversion",
    "9.7.12": "Control flow",
    "9.7.13": "Synchronization",
    "9.7.14": "Warp-level matrices",
    "9.7.15": "Warpgroup-level matrices (sm_90a)",
    "9.7.16": "Tensor core of generation 5 (sm_100a)",
    "9.7.19": "Miscellaneous",
}
_TAIL = re.compile(r"(\.v\d)?\.(\{[^{}]*\}|\w+)$")  # vector and type
CALLS = {"call", "call.uni", "brx.idx"}  # resolved while parsing
# What the translator does without a table entry: moves only rename, parameters are bound at launch.
TRANSLATED = (
    (MOVES, {"mov": "9.7.9.4", "cvta": "9.7.9.20"}),
    (PARAM_LOADS, {"ld": "9.7.9.8"}),
    (CALLS, {"call": "9.7.12.4", "brx": "9.7.12.2"}),
    (CONTROL, {"bra": "9.7.12.3", "ret": "9.7.12.5", "exit": "9.7.12.6"}),
    (IGNORED, {"nop": "9.7.19"}),
)
HEAD = """# Instructions the emulator executes

Written by `python -m generator.emulator.document` from the instruction table; do not edit. Braces list alternatives,
`{,.x}` an optional part; every spelling that a pattern gives is supported, any other raises `UnsupportedInstruction`
with its PTX line. Sections are those of the PTX ISA 9.1.
"""


def names_by_place() -> dict[tuple[str, str], set[str]]:
    """(ISA section, mnemonic) → every opcode."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, entry in TABLE.items():
        if RESULT in name:
            continue
        found[entry.isa, name.split(".")[0]].add(name)
    for names, sections in TRANSLATED:
        for name in names:
            mnemonic = name.split(".")[0]
            found[sections[mnemonic], mnemonic].add(name)
    return found


def families_by_place() -> dict[tuple[str, str], list[str]]:
    """(ISA section, mnemonic) → patterns of the families: those that differ in vector and type are drawn together."""
    heads: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for mnemonic, family in FAMILIES.items():
        for entry in family:
            tail = _TAIL.search(entry.name)
            heads[entry.isa, mnemonic][entry.name[: tail.start()]] += expand(tail[0])
    return {
        place: sorted(
            head + (tails[0] if len(tails) == 1 else "{" + ",".join(tails) + "}") for head, tails in of.items()
        )
        for place, of in heads.items()
    }


def collapse(names: Iterable[str]) -> list[str]:
    """Opcodes → patterns that `table.expand` turns back into exactly these opcodes, each once."""
    return sorted(_patterns(frozenset(tuple(name.split(".")) for name in names), {}))


def _patterns(rest: frozenset, known: dict) -> list[str]:
    """Patterns of a set of modifier sequences, each beginning with a dot unless it is a mnemonic or empty."""
    if rest in known:
        return known[rest]
    found = [""] if () in rest else []
    tails: dict[str, set] = defaultdict(set)
    for sequence in rest:
        if sequence:
            tails[sequence[0]].add(sequence[1:])
    alike: dict[frozenset, list[str]] = defaultdict(list)
    for token, tail in tails.items():
        alike[frozenset(tail)].append(token)
    optional = None
    for tail, tokens in alike.items():  # the rest without these tokens is what follows them: they are optional
        without = frozenset(s for s in rest if not s or s[0] not in tokens)
        if without == tail:
            optional = tail, tokens
            break
    if optional is not None:
        tail, tokens = optional
        found = [_choice(tokens, True) + pattern for pattern in _patterns(tail, known)]
    else:
        for tail, tokens in alike.items():
            found += [_choice(tokens, False) + pattern for pattern in _patterns(tail, known)]
    known[rest] = found
    return found


def _choice(tokens: list[str], optional: bool) -> str:
    tokens = sorted(tokens)
    if optional:
        return "{," + ",".join(f".{t}" for t in tokens) + "}"
    return f".{tokens[0]}" if len(tokens) == 1 else ".{" + ",".join(tokens) + "}"


def section_key(isa: str) -> tuple[int, ...]:
    return tuple(int(part) for part in isa.split("."))


def document() -> str:
    """The whole page."""
    places, families = names_by_place(), families_by_place()
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for place, names in places.items():
        rows[place] += [pattern[1:] for pattern in collapse(names)]
    for place, patterns in families.items():
        rows[place] += patterns
    sizes = {place: sum(len(expand(pattern)) for pattern in patterns) for place, patterns in rows.items()}
    total = sum(sizes.values())
    lines = [HEAD, f"{total} opcodes of {len({m for _, m in rows})} families."]
    chapters: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for isa, mnemonic in rows:
        chapters[".".join(isa.split(".")[:3])].append((isa, mnemonic))
    for chapter in sorted(chapters, key=section_key):
        lines += [
            "",
            f"## {SECTIONS.get(chapter, 'Other')} (§{chapter})",
            "",
            "| family | § | opcodes | patterns |",
            "|---|---|---|---|",
        ]
        for isa, mnemonic in sorted(chapters[chapter], key=lambda place: (section_key(place[0]), place[1])):
            patterns = "<br>".join(f"`{pattern}`" for pattern in rows[isa, mnemonic])
            lines.append(f"| {mnemonic} | {isa} | {sizes[isa, mnemonic]} | {patterns} |")
    specials = ", ".join(f"`%{name}`" for name in sorted(Translator.SPECIALS))
    lines += ["", "## Special registers (§10)", "", specials + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(document(), end="")
