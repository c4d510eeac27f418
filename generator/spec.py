"""What the user asks for: one frozen specification a kernel, and the one way to load it.

A specification comes from a TOML file, from keyword arguments or from both (`load_spec`). Every value that is text
is one of a closed set, so no free string can reach a template or the file system through a specification. The
vocabulary is wider than what is implemented: `plan.py` refuses, by field, what sm_100a does not have yet.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .resources import specs_dir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HEAD_DIM_STEP = 16  # K of one 16-bit MMA instruction (facts: ptx.md section 3)
HEAD_DIM_MAX = 512
HEAD_DIM_QK_MLA = 576  # Q/K only, and only with head_dim_v = 512
KV_STAGE_MAX = 16
KV_STAGE_SHARED_MAX = 25  # chunks of K that are V too (columns.py): three KV tiles of eight, and one that is no V
TILE_MAX = 256  # largest M or N of one tcgen05.mma
GROUP_MAX = 1024
WINDOW_MAX = 1 << 30  # keys: no sequence is longer (arrays.py), and sums of two stay within int32
SPEC_FILE_BYTES_MAX = 65536

_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,127}")


class SpecError(ValueError):
    """Bad input. The message names the field, the value, the limit and the remedy; so do the attributes.

    field: name of the field at fault ("" when no single field is).
    value: what was given.
    limit: what is allowed.
    remedy: what to do instead.
    """

    def __init__(self, field: str, value: object, limit: str, remedy: str, message: str | None = None) -> None:
        self.field, self.value, self.limit, self.remedy = field, value, limit, remedy
        super().__init__(message or f"{field} = {_shown(value)}: {limit}; {remedy}")


def _shown(value: object) -> str:
    """One short line for any value: control characters escaped, long text cut (paths are shown whole)."""
    text = repr(str(value)) if isinstance(value, (str, PurePath)) else str(value)
    text = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    return text if len(text) <= 80 or isinstance(value, PurePath) else text[:77] + "..."


class KernelSpec(BaseModel):
    """One attention kernel. Tensors are [B, S, H, D], D contiguous; O has V's head_dim; accumulation is float32.

    Build it with `load_spec`, which turns bad input into `SpecError`; constructing it directly raises pydantic's
    own ValidationError.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    arch: Literal["sm_100a", "sm_90a"] = Field("sm_100a", description="target architecture")
    head_dim: int = Field(description="columns of Q and K; a multiple of 16, 16 to 512 (576 with head_dim_v 512)")
    head_dim_v: int | None = Field(None, description="columns of V and O; default: head_dim")
    dtype: Literal["bf16", "fp16"] = Field("bf16", description="of Q, K, V and a normalized O")
    q_heads_per_kv: int = Field(1, ge=1, le=GROUP_MAX, description="query heads a KV head: 1 is MHA, more is GQA")
    pack_heads: bool | Literal["auto"] = Field("auto", description="fold the group into the M rows of a tile")
    causal: bool = Field(False, description="mask above the diagonal, aligned at the bottom right")
    window_left: int | None = Field(None, ge=0, le=WINDOW_MAX, description="keys visible to the left of the diagonal")
    window_right: int | None = Field(None, ge=0, le=WINDOW_MAX, description="keys visible to the right of the diagonal")
    seqlens: bool = Field(False, description="KV lengths a batch entry, int32 [B]")
    sink: bool = Field(False, description="a float32 logit a head [Hq] joins the softmax denominator")
    kv_sources: Literal[1, 2] = Field(1, description="2: a second KV source merged in the same launch")
    limit2: bool = Field(False, description="keys of the second source that a query sees, int32 [B, Sq]")
    kv_shared: bool = Field(False, description="V is a prefix of K's columns: one buffer serves both")
    output: Literal["normalized", "unnormalized"] = Field("normalized", description="unnormalized: float32 O, LSE, m")
    lse: bool = Field(True, description="store the log-sum-exp, float32 [B, Hq, Sq], natural log")
    split_kv: bool = Field(False, description="CTAs share a query tile's keys, a second kernel combines their results")
    strategy: Literal["auto", "tiles", "two_tiles", "two_ctas", "chunks", "passes", "pair", "warpgroups", "columns"] = (
        Field("auto", description="how K, V and O are laid over CTAs; auto: the planner's cost model decides")
    )
    p_staging: Literal["auto", "tmem", "smem", "register"] = Field("auto", description="where P waits for P.V")
    kv_stage: int | Literal["auto"] = Field("auto", description="depth of the K and V rings: tiles, or chunks")
    tile_m: int | Literal["auto"] = Field("auto", description="query rows a CTA")
    tile_n: int | Literal["auto"] = Field("auto", description="keys a KV tile")

    @model_validator(mode="before")
    @classmethod
    def _default_head_dim_v(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("head_dim_v") is None and "head_dim" in data:
            return {**data, "head_dim_v": data["head_dim"]}
        return data

    @property
    def kv_stage_max(self) -> int:
        """The largest kv_stage that may be asked for."""
        return KV_STAGE_SHARED_MAX if self.arch == "sm_90a" and self.kv_shared else KV_STAGE_MAX

    @model_validator(mode="after")
    def _check(self) -> KernelSpec:
        mla = self.head_dim == HEAD_DIM_QK_MLA and self.head_dim_v == HEAD_DIM_MAX
        if not mla:
            _check_head_dim("head_dim", self.head_dim)
        _check_head_dim("head_dim_v", self.v_dim)
        _check_range("kv_stage", self.kv_stage, 1, self.kv_stage_max, 1)
        _check_range("tile_m", self.tile_m, 16, TILE_MAX, 16)
        _check_range("tile_n", self.tile_n, 16, TILE_MAX, 16)
        if self.output == "unnormalized" and not self.lse:
            limit = "an unnormalized output needs LSE to be merged with other partial results"
            raise _Refused("lse", False, limit, 'set lse = true, or output = "normalized"')
        if self.kv_shared and self.v_dim > self.head_dim:
            limit = f"V is a prefix of K's {self.head_dim} columns, so head_dim_v = {self.v_dim} cannot be more"
            raise _Refused("kv_shared", True, limit, "lower head_dim_v")
        if self.limit2 and self.kv_sources == 1:
            raise _Refused("limit2", True, "limits a second KV source, and there is one", "set kv_sources = 2")
        return self

    @property
    def v_dim(self) -> int:
        """head_dim_v as a number: columns of V and O."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def unnormalized(self) -> bool:
        return self.output == "unnormalized"

    @property
    def partial(self) -> KernelSpec:
        """What the attention kernel itself computes: with split_kv un-normalized results without sinks, of which the
        combining kernel makes what the specification asks for; else the specification.
        """
        if not self.split_kv:
            return self
        return self.model_copy(update={"output": "unnormalized", "lse": True, "sink": False})

    @property
    def name(self) -> str:
        """Stable kernel name such as fmha_sm100_d128_causal; equal names mean equal specifications."""
        return "_".join(["fmha", self.arch.replace("_", "").removesuffix("a"), f"d{self.head_dim}", *_tokens(self)])

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of all fields: the key of caches."""
        fields = self.model_dump()
        for name, default in (("strategy", "auto"), ("split_kv", False)):
            if fields[name] == default:  # a younger field: left open, it changes no digest that stands in a file
                del fields[name]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def non_default(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in the order of the vocabulary; head_dim always."""
        defaults = {name: info.default for name, info in type(self).model_fields.items()} | {
            "head_dim_v": self.head_dim
        }
        return {name: value for name, value in self if name == "head_dim" or value != defaults[name]}


def _tokens(spec: KernelSpec) -> list[str]:
    """One short word a field that differs from its default; the order is fixed, so names are stable."""
    values = spec.non_default()
    spelled = {
        "head_dim_v": f"v{spec.v_dim}",
        "dtype": spec.dtype,
        "q_heads_per_kv": f"gqa{spec.q_heads_per_kv}",
        "pack_heads": "pack" if spec.pack_heads is True else "nopack",
        "causal": "causal",
        "window_left": f"wl{spec.window_left}",
        "window_right": f"wr{spec.window_right}",
        "seqlens": "seqlens",
        "sink": "sink",
        "kv_sources": f"kv{spec.kv_sources}",
        "limit2": "limit2",
        "kv_shared": "kvshared",
        "output": "unnorm",
        "lse": "nolse",
        "split_kv": "split",
        "strategy": spec.strategy,
        "p_staging": f"p{spec.p_staging}",
        "kv_stage": f"stage{spec.kv_stage}",
        "tile_m": f"m{spec.tile_m}",
        "tile_n": f"n{spec.tile_n}",
    }
    return [word for field, word in spelled.items() if field in values]


class _Refused(ValueError):
    """Carries a refusal out of a pydantic validator, which would otherwise flatten it to text."""

    def __init__(self, field: str, value: object, limit: str, remedy: str) -> None:
        self.error = SpecError(field, value, limit, remedy)
        super().__init__(str(self.error))


def _check_head_dim(field: str, value: int) -> None:
    limit = f"must be a multiple of {HEAD_DIM_STEP} from {HEAD_DIM_STEP} to {HEAD_DIM_MAX}"
    if field == "head_dim":
        limit += f" ({HEAD_DIM_QK_MLA} with head_dim_v = {HEAD_DIM_MAX})"
        if abs(value - HEAD_DIM_QK_MLA) < value - HEAD_DIM_MAX:
            remedy = f"the nearest is {HEAD_DIM_QK_MLA}, with head_dim_v = {HEAD_DIM_MAX}"
            raise _Refused(field, value, limit, remedy)
    _check_range(field, value, HEAD_DIM_STEP, HEAD_DIM_MAX, HEAD_DIM_STEP, limit)


def _check_range(field: str, value: int | str, low: int, high: int, step: int, limit: str | None = None) -> None:
    if value == "auto" or (low <= value <= high and value % step == 0):
        return
    below = max(low, min(high, value // step * step))
    above = max(low, min(high, below + step))
    near = str(below) if value <= low or value >= high else f"{below} or {above}"
    multiple = f"a multiple of {step}" if step > 1 else "a whole number"
    raise _Refused(
        field, value, limit or f'must be "auto" or {multiple} from {low} to {high}', f"the nearest is {near}"
    )


def load_spec(source: str | Path | Mapping[str, Any] | KernelSpec | None = None, **overrides: Any) -> KernelSpec:
    """A checked specification.

    source: a kernel name in specs/ ("fmha_sm100_d96"), a path to a .toml file, a mapping of fields, a KernelSpec,
        or None. overrides: fields that win over the source's.
    Raises SpecError, whose message names field, value, limit and remedy.
    """
    if source is None:
        fields: dict[str, Any] = {}
    elif isinstance(source, KernelSpec):
        fields = source.non_default()
    elif isinstance(source, Mapping):
        fields = dict(source)
    else:
        fields = _read_toml(_find_spec_file(source))
    return _validate({**fields, **overrides})


def spec_names() -> list[str]:
    """Names of the kernels in specs/, sorted."""
    return sorted(path.stem for path in specs_dir().glob("fmha_*.toml"))


def _find_spec_file(source: str | Path) -> Path:
    """A bare name is looked up in specs/ and nowhere else; anything else must be an existing .toml file."""
    if isinstance(source, str) and _NAME.fullmatch(source):
        path = specs_dir() / f"{source}.toml"
        if not path.is_file():
            near = difflib.get_close_matches(source, spec_names(), n=1)
            remedy = f"did you mean {near[0]}?" if near else "give a name in specs/, a .toml file or --head-dim"
            raise SpecError("kernel", source, "no such specification in specs/", remedy)
        return path
    path = Path(source)
    limit = "a kernel is a name (a-z, 0-9, _) in specs/ or a path to an existing .toml file"
    try:
        usable = path.suffix == ".toml" and path.is_file() and path.stat().st_size <= SPEC_FILE_BYTES_MAX
    except (OSError, ValueError):  # ValueError: an embedded NUL
        usable = False
    if not usable:
        raise SpecError("kernel", str(source), limit, "see the names in specs/, or give --head-dim")
    if path.resolve().parent == specs_dir() and path.stem == "matrix":
        raise SpecError("kernel", str(source), limit, "matrix.toml sweeps specifications: use `bespoke matrix`")
    return path


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError("kernel", str(path), f"not valid TOML: {error}", "correct the file") from None
    except OSError as error:
        raise SpecError(
            "kernel", str(path), f"cannot be read: {error.strerror}", "check the file's permissions"
        ) from None


def _validate(fields: dict[str, Any]) -> KernelSpec:
    known = list(KernelSpec.model_fields)
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else "fields are " + ", ".join(known)
            raise SpecError(
                str(key), fields[key], "unknown field", remedy, f"{_shown(str(key))}: unknown field; {remedy}"
            )
    if fields.get("head_dim") is None:
        raise SpecError("head_dim", None, "is required", "for example head_dim = 96 (--head-dim 96)")
    try:
        return KernelSpec.model_validate(fields)
    except ValidationError as error:
        raise _explain(error, fields) from None


def _explain(error: ValidationError, fields: Mapping[str, Any]) -> SpecError:
    """The first of pydantic's complaints in our words."""
    first = error.errors()[0]
    refused = first.get("ctx", {}).get("error")
    if isinstance(refused, _Refused):
        return refused.error
    field = str(first["loc"][0])
    value = fields.get(field)
    if field == "head_dim_v" and value is None:
        field, value = "head_dim", fields["head_dim"]
    return SpecError(field, value, _limit(field), _remedy(field, value))


def _limit(field: str) -> str:
    """What a field takes, read off the model so that it cannot drift from it."""
    schema = KernelSpec.model_json_schema()["properties"][field]
    parts = []
    for option in schema.get("anyOf", [schema]):
        if "enum" in option or "const" in option:
            parts += [json.dumps(value) for value in option.get("enum", [option.get("const")])]
        elif option.get("type") == "integer":
            low, high = option.get("minimum"), option.get("maximum")
            text = "a whole number"
            text += f" from {low} to {high}" if high is not None else f" of at least {low}" if low is not None else ""
            parts.append(text)
        elif option.get("type") == "boolean":
            parts.append("true or false")
    return "must be " + " or ".join(parts)


def _remedy(field: str, value: object) -> str:
    info = KernelSpec.model_fields[field]
    if isinstance(value, str):
        choices = re.findall(r'"([^"]*)"', _limit(field))
        near = difflib.get_close_matches(value, choices, n=1)
        if near:
            return f'did you mean "{near[0]}"?'
    if info.is_required():
        return f"for example {field} = 96"
    default = info.default
    return f"leave it out for the default ({json.dumps(default)})" if default is not None else "leave it out"
