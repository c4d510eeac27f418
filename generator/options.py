"""KERNEL on the command line: a name, a file or options that mirror the specification's fields, made from the model."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable
from types import NoneType
from typing import Any

import typer

from .spec import KernelSpec, load_spec

_HELP_PANEL = "Specification"


def spec_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option a field of KernelSpec. The command receives those set in its parameter `fields`."""

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in KernelSpec.model_fields}
        fields = {name: _value(name, text) for name, text in given.items() if text is not None}
        command(**arguments, fields=fields)

    own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "fields"]
    mirrored = [_parameter(name) for name in KernelSpec.model_fields]
    with_options.__signature__ = inspect.Signature([*own, *mirrored])  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in (*own, *mirrored)}
    return with_options


def kernel_spec(kernel: str | None, fields: dict[str, Any]) -> KernelSpec:
    """The specification that KERNEL and the options describe; options win. Raises SpecError."""
    return load_spec(kernel, **fields)


def listed_specs(kernel: str | None, fields: dict[str, Any], head_dims: str | None) -> list[KernelSpec]:
    """One specification a head_dim where the option takes a list, "64,128"; head_dims: the list when it is not given,
    None for the kernel's own. Raises SpecError.
    """
    wanted = fields.get("head_dim", head_dims)
    if wanted is None:
        return [kernel_spec(kernel, fields)]
    dims = [int(word) if word.isdecimal() else word for word in str(wanted).split(",")]
    return [kernel_spec(kernel, {**fields, "head_dim": dim}) for dim in dims]


def _kinds(name: str) -> set[type]:
    """The types that a field's values have; a Literal counts as those of its values."""
    kinds: set[type] = set()
    pending = [KernelSpec.model_fields[name].annotation]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type):
            kinds.add(kind)
        else:
            literal = typing.get_origin(kind) is typing.Literal
            pending += [type(value) if literal else value for value in typing.get_args(kind)]
    return kinds - {NoneType}


def _parameter(name: str) -> inspect.Parameter:
    """The option of one field. None (not given) leaves the field to the file, or to its default."""
    option = "--" + name.replace("_", "-")
    info = KernelSpec.model_fields[name]
    flag = _kinds(name) == {bool}
    names = f"{option}/--no-{option[2:]}" if flag else option
    metavar = None if flag else "|".join(_choices(name))
    default = typer.Option(None, names, help=info.description, metavar=metavar, rich_help_panel=_HELP_PANEL)
    annotation = bool | None if flag else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _choices(name: str) -> list[str]:
    """What a field takes, for the help text: its literals, and INT."""
    literals = re.findall(r"Literal\[([^\]]*)\]", str(KernelSpec.model_fields[name].annotation))
    words = [word.strip(" '") for group in literals for word in group.split(",")]
    kinds = _kinds(name)
    if bool in kinds:
        words += ["true", "false"]
    if int in kinds and not any(word.isdecimal() for word in words):
        words.append("INT")
    return words


def _value(name: str, text: str | bool) -> Any:
    """Option text in the type that the model checks strictly; what cannot be converted is left for it to refuse."""
    kinds = _kinds(name)
    if isinstance(text, str) and int in kinds and re.fullmatch(r"[+-]?\d{1,9}", text):
        return int(text)
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    return text
