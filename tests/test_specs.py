"""specs/: file names, and that every pair of features meets in some kernel; matrix.toml: edges and bad input."""

from itertools import product

import pytest

from generator.covering import all_pairs, pairs_of
from generator.features import FACTORS, IMPOSSIBLE, TILES
from generator.hopper_features import WARPGROUPS
from generator.matrix import load_matrix, parse_shape, parse_sweeps, shapes_of
from generator.plan import plan_kernel
from generator.resources import specs_dir
from generator.spec import SpecError, load_spec, spec_names
from generator.wide_features import WIDE

EDGES = (1, 127, 128, 129, 255, 300)
DESIGNS = [TILES, WIDE, WARPGROUPS]


@pytest.mark.parametrize("design", DESIGNS, ids=["tiles", "wide", "warpgroups"])
def test_every_pair_of_features_meets_in_some_kernel(design):
    met = set().union(*(pairs_of(design.features(load_spec(name)), design.factors) for name in design.names()))
    assert sorted(set(all_pairs(design.factors)) - met - set(design.impossible), key=str) == []
    assert not met & set(design.impossible)


@pytest.mark.parametrize("pair", IMPOSSIBLE, ids=str)
def test_a_pair_that_is_left_out_is_refused_by_itself(pair):
    """With everything else plain, so that nothing else is to blame; the words are spec.py's and plan.py's."""
    a, x, b, y = pair
    plain = {name: values[0] for name, values in FACTORS.items()} | {"head_dim": 64, a: x, b: y}
    if ("V", "narrower") in ((a, x), (b, y)):
        return  # below 16 columns there is nothing to ask for: test_spec.py refuses head_dim_v = 0 and 8
    fields = {
        "head_dim": plain["head_dim"],
        "head_dim_v": plain["head_dim"] + (16 if plain["V"] == "wider" else 0),
        "kv_shared": plain["shared"],
        "output": plain["output"],
        "lse": plain["lse"],
        "kv_stage": 1 if plain["one kv stage"] else "auto",
        "p_staging": "smem" if plain["P in"] == "smem" else "auto",
        "strategy": plain["schedule"],
    }
    with pytest.raises(SpecError):
        plan_kernel(load_spec(fields))
    assert plan_kernel(load_spec(fields | {b_field(b): b_default(b, fields)})).budget.fits


def b_field(name):
    fields = {"V": "head_dim_v", "shared": "kv_shared", "one kv stage": "kv_stage", "lse": "lse"}
    return fields.get(name, "strategy")


def b_default(name, fields):
    return {"V": fields["head_dim"], "shared": False, "one kv stage": "auto", "lse": True}.get(name, "tiles")


@pytest.mark.parametrize("pair", WIDE.impossible, ids=str)
def test_a_wide_pair_that_is_left_out_is_refused_by_itself(pair):
    """With everything else plain: head_dim 320 by chunks, V as wide where it can be."""
    a, x, b, y = pair
    asked = {a: x, b: y}
    d = asked.get("head_dim", 320)
    wider = {"as wide": d, "wider": d + 16}[asked["V"]] if "V" in asked else 512 if d == 576 else d
    fields = {
        "head_dim": d,
        "head_dim_v": wider,
        "strategy": asked.get("strategy", "auto"),
        "p_staging": asked.get("P in", "auto"),
        "kv_shared": asked.get("shared", False),
        "output": asked.get("output", "normalized"),
        "lse": asked.get("lse", True),
    }
    with pytest.raises(SpecError):
        plan_kernel(load_spec(fields))
    cure = {"V": ("head_dim_v", min(d, 512)), "strategy": ("strategy", "auto"), "P in": ("p_staging", "auto")}
    cure |= {"shared": ("kv_shared", False), "lse": ("lse", True)}
    assert plan_kernel(load_spec(fields | dict([cure[b]]))).budget.fits


@pytest.mark.parametrize("design", DESIGNS, ids=["tiles", "wide", "warpgroups"])
def test_specifications_have_the_features_that_they_are_asked_for(design):
    told = [design.features(load_spec(name)) for name in design.names()]
    rows = [row for row in told if all(row[name] in values for name, values in design.factors.items())]
    assert len(rows) > 20
    for row in rows:
        spec = design.specification(row)
        assert spec is not None and design.features(spec) == row


LONG = [pair for pair in WARPGROUPS.impossible if ("sO over sQ", True) in (pair[:2], pair[2:])]  # of many plans
PAIRS = [pytest.param(pair, marks=[pytest.mark.sweep] * (pair in LONG[1:])) for pair in WARPGROUPS.impossible]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_pair_that_sm_90a_leaves_out_is_refused_or_never_chosen(pair):
    """With everything else plain. What the planner alone decides (schedules, where sO lies) it never decides so,
    whatever the tile, with V as wide and of 64 and 144 columns, and with rings of one to four stages, of one to sixteen
    where it is about sO; the rest is refused.
    """
    a, x, b, y = pair
    asked = {a: x, b: y}
    if ("V", "narrower") in ((a, x), (b, y)):
        return  # below 16 columns there is nothing to ask for: test_spec.py refuses head_dim_v = 0 and 8
    d = asked.get("head_dim", 64)
    fields = {
        "arch": "sm_90a",
        "head_dim": d,
        "head_dim_v": d + (16 if asked.get("V") == "wider" else 0),
        "kv_shared": asked.get("shared", False),
        "output": asked.get("output", "normalized"),
        "lse": asked.get("lse", True),
        "split_kv": asked.get("split", False),
        "kv_stage": 1 if asked.get("one kv stage") else "auto",
        "tile_m": 64 * asked["consumers"] if "consumers" in asked else "auto",
        "strategy": "warpgroups",
    }
    if not {a, b} & {"schedule", "softmax", "sO over sQ"}:
        with pytest.raises(SpecError):
            plan_kernel(load_spec(fields))
        return
    rows = [fields["tile_m"]] if "consumers" in asked else (64, 128, 192, 256)
    depths = range(1, 17) if "sO over sQ" in (a, b) else range(1, 5)
    planned = 0
    widths = (16,) if asked.get("V") == "wider" else (None, 64, 144)
    dims_tried = (asked["head_dim"],) if "head_dim" in asked else (16, 96, 112, 192, 256)
    for head_dim, width, tile_m, tile_n, depth in product(dims_tried, widths, rows, range(16, 257, 48), depths):
        v_dim = head_dim if width is None else head_dim + width if asked.get("V") == "wider" else width
        if v_dim > 256:
            continue
        dims = {"head_dim": head_dim, "head_dim_v": v_dim}
        try:
            spec = load_spec(fields | dims | {"tile_m": tile_m, "tile_n": tile_n, "kv_stage": depth})
            chosen = WARPGROUPS.features(spec)
        except SpecError:
            continue
        planned += 1
        assert (chosen[a], chosen[b]) != (x, y), spec.name
    assert planned >= 10


@pytest.mark.parametrize("mask", ["", "_causal"])
@pytest.mark.parametrize("dims", ["d64", "d96", "d128", "d192_v128", "d256"])
def test_what_is_measured_on_sm_90a_is_among_the_kernels(dims, mask):
    spec = load_spec(f"fmha_sm90_{dims}{mask}")
    plain = {"arch", "head_dim", *(["head_dim_v"] if "_v" in dims else []), *(["causal"] if mask else [])}
    assert set(spec.non_default()) == plain


@pytest.mark.parametrize("name", spec_names())
def test_file_is_named_after_its_kernel(name):
    assert load_spec(name).name == name


def test_folder_holds_specifications_and_the_matrix_only():
    assert {path.name for path in specs_dir().iterdir()} == {f"{name}.toml" for name in spec_names()} | {"matrix.toml"}


def test_matrix_covers_every_kernel_and_every_pair_of_edges():
    cases = load_matrix()
    assert {case.kernel for case in cases} == set(spec_names())
    assert len(cases) == len(set(cases))
    lengths = {(case.shape.queries, case.shape.keys) for case in cases}
    assert set(product(EDGES, EDGES)) <= lengths
    shapes = [case.shape for case in cases]
    assert any(shape.batch > 1 for shape in shapes)
    assert any(shape.kv_heads > 1 and shape.q_heads > shape.kv_heads for shape in shapes)
    assert any(shape.keys >= 1000 for shape in shapes)


def test_every_causal_kernel_meets_rows_that_see_nothing():
    for name in spec_names():
        spec = load_spec(name)
        if spec.causal:
            assert any(shape.queries > shape.keys for shape in shapes_of(spec))


def test_shapes_follow_the_name_even_without_a_file():
    spec = load_spec(head_dim=144, q_heads_per_kv=3, causal=True)
    shapes = shapes_of(spec)
    assert shapes and all(shape.q_heads == 3 * shape.kv_heads for shape in shapes)
    assert len(shapes) > len(shapes_of(load_spec(head_dim=144)))


def test_selection_is_a_glob():
    assert {case.kernel for case in load_matrix("*_d96")} == {"fmha_sm100_d96", "fmha_sm90_d96"}
    with pytest.raises(SpecError, match=r"select = '\.\./\*': matches no kernel in specs/"):
        load_matrix("../*")


@pytest.mark.parametrize(
    "text", ["", "1,1,1,1", "1,1,1,1,0", "1,1,1,1,-1", "1,1,1,1,x", "1,1,1,1,1,1,1", "1.5,1,1,1,1"]
)
def test_malformed_shape(text):
    with pytest.raises(SpecError, match=r"a shape is B,Hq,Hkv,Sq,Skv\[,Skv2\], whole numbers of at least 1"):
        parse_shape(text, load_spec(head_dim=64))


def test_shape_with_mismatched_head_counts():
    with pytest.raises(SpecError, match="Hq must be Hkv x q_heads_per_kv = 2 x 4; Hq = 8, or another --q-heads-per-kv"):
        parse_shape("1,4,2,128,128", load_spec(head_dim=64, q_heads_per_kv=4))
    assert parse_shape("1,8,2,128,256", load_spec(head_dim=64, q_heads_per_kv=4)) == (1, 8, 2, 128, 256, 0)


def test_shape_of_two_sources():
    two = load_spec(head_dim=64, kv_sources=2)
    assert parse_shape("1,1,1,128,256,7", two) == (1, 1, 1, 128, 256, 7)
    assert parse_shape("1,1,1,128,256", two) == (1, 1, 1, 128, 256, 65)
    with pytest.raises(SpecError, match="Skv2 is of a second source, and the kernel has one; leave Skv2 out"):
        parse_shape("1,1,1,128,256,7", load_spec(head_dim=64))


GOOD = {"name": "edges", "kernels": ["*"], "shapes": [[1, 1, 1, 1]]}


@pytest.mark.parametrize(
    "document, message",
    [
        ({}, "holds [[sweep]] tables and nothing else"),
        ({"sweep": [GOOD], "sweeps": []}, "holds [[sweep]] tables and nothing else"),
        ({"sweep": [{**GOOD, "shape": []}]}, "has the keys name, kernels and shapes"),
        ({"sweep": [{**GOOD, "kernels": "*"}]}, "is a list of globs over kernel names"),
        ({"sweep": [{**GOOD, "shapes": [[1, 1, 1]]}]}, "a shape is [B, Hkv, Sq, Skv]"),
        ({"sweep": [{**GOOD, "shapes": [[1, 1, 1, 0]]}]}, "a shape is [B, Hkv, Sq, Skv]"),
        ({"sweep": [{**GOOD, "shapes": [[1, 1, 1, True]]}]}, "a shape is [B, Hkv, Sq, Skv]"),
    ],
)
def test_malformed_matrix(document, message):
    with pytest.raises(SpecError) as caught:
        parse_sweeps(document)
    assert message in str(caught.value)


def test_matrix_that_names_no_kernel(monkeypatch):
    sweep = parse_sweeps({"sweep": [{**GOOD, "kernels": ["*_d20"]}]})
    monkeypatch.setattr("generator.matrix.sweeps", lambda: sweep)
    with pytest.raises(SpecError, match=r'kernels = \'\*_d20\': matches no kernel in specs/; correct sweep "edges"'):
        load_matrix()
