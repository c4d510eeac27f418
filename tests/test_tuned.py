"""tuned.json: records that are what they say, and that the planner takes them until a field says otherwise."""

import json
from dataclasses import fields as fields_of
from importlib import resources

import pytest

from generator import tuned
from generator.plan import plan_kernel
from generator.spec import SpecError, load_spec
from generator.tuned import Winner, mask_kind, winner

RECORDS = json.loads(resources.files("generator").joinpath("tuned.json").read_text())
WHOLE = [record for record in RECORDS if max(record["head_dim"], record["head_dim_v"]) <= 256]


def name_of(record):
    return f"{record['head_dim']}/{record['head_dim_v']} {record['mask']}"


def spec_of(record, **more):
    causal = record["mask"] == "causal"
    dims = {name: record[name] for name in ("arch", "head_dim", "head_dim_v")}
    return load_spec({**dims, "causal": causal, **more})


def test_records_are_well_formed():
    names = {field.name for field in fields_of(Winner)}
    for record in RECORDS:
        assert set(record) == names
        assert record["arch"] == "sm_90a" and record["mask"] in ("full", "causal")
        assert record["tile_m"] % 64 == 0 and record["tile_n"] % 16 == 0
        assert type(record["turns"]) is bool and type(record["beside_pv"]) is bool
        assert record["v_keys"] in ((0,) if record in WHOLE else (16, 32))
        assert record["tflops"] and all(int(n) > 0 and 0 < rate < 989 for n, rate in record["tflops"].items())
        assert record["device"] and len(record["date"].split("-")) == 3
    keys = [Winner(**record).key for record in RECORDS]
    assert len(set(keys)) == len(keys) and len(WHOLE) >= 26


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_every_record_can_be_planned_and_is(record):
    spec = spec_of(record)
    plan = plan_kernel(spec)
    assert winner(spec) == Winner(**record)
    if record not in WHOLE:
        assert (plan.tile_m, plan.tile_n) == (record["tile_m"], record["tile_n"]) and plan.budget.fits
        assert plan.tiling.v_keys == record["v_keys"] and plan.beside_pv == record["beside_pv"]
        assert plan.keeps_reference and not plan.lazy
        return
    assert (plan.tile_m, plan.tile_n) == (record["tile_m"], record["tile_n"]) and plan.kv_stages >= 2
    assert (plan.takes_turns, plan.beside_pv) == (record["turns"], record["beside_pv"]) and plan.budget.fits


def test_a_winner_serves_whatever_else_is_asked_for():
    record = next(r for r in WHOLE if (r["head_dim"], r["mask"]) == (64, "causal"))
    for more in ({"seqlens": True}, {"sink": True, "dtype": "fp16"}, {"output": "unnormalized"}, {"window_left": 2048}):
        plan = plan_kernel(spec_of(record, **more))
        assert (plan.tile_m, plan.tile_n) == (record["tile_m"], record["tile_n"])


def test_columns_take_theirs_for_long_rows():
    """Short rows (narrow windows, split_kv) were not what was measured."""
    record = next(r for r in RECORDS if (r["head_dim"], r["mask"]) == (480, "full"))
    assert (record["tile_m"], record["tile_n"]) == (128, 96)
    for more, rows in (({"sink": True}, 128), ({"split_kv": True}, 64)):
        assert plan_kernel(spec_of(record, **more)).tile_m == rows
    record = next(r for r in RECORDS if (r["head_dim"], r["mask"]) == (272, "causal"))
    assert record["tile_m"] == 128
    for more, rows in (({}, 128), ({"window_left": 4095}, 128), ({"window_left": 127}, 64)):
        assert plan_kernel(spec_of(record, **more)).tile_m == rows


def test_fields_override_it():
    """Another tile than the winner's is planned by the model's rules: turns by the width of O."""
    record = next(r for r in WHOLE if (r["head_dim"], r["mask"]) == (112, "full"))
    assert (record["tile_m"], record["tile_n"], record["turns"]) == (192, 96, False)
    assert not plan_kernel(spec_of(record)).takes_turns
    other = plan_kernel(spec_of(record, tile_m=128))
    assert other.tile_m == 128 and other.takes_turns
    narrow = plan_kernel(spec_of(record, tile_n=64))
    assert narrow.tile_n == 64
    both = plan_kernel(spec_of(record, tile_m=192, tile_n=96, kv_stage=2))
    assert (both.takes_turns, both.kv_stages) == (False, 2)


def test_other_widths_of_v_have_none():
    assert winner(load_spec(None, arch="sm_90a", head_dim=64, head_dim_v=48)) is None
    assert winner(load_spec(None, arch="sm_100a", head_dim=64)) is None


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({}, "full"),
        ({"seqlens": True, "kv_sources": 2}, "full"),
        ({"causal": True}, "causal"),
        ({"window_left": 5}, "causal"),
        ({"window_right": 0}, "causal"),
    ],
)
def test_kinds_of_masks(fields, kind):
    assert mask_kind(load_spec(None, head_dim=64, **fields)) == kind


def test_two_winners_for_one_key_are_refused(tmp_path):
    (tmp_path / "tuned.json").write_text(json.dumps([RECORDS[0], RECORDS[0]]))
    with pytest.raises(SpecError, match="has two winners for one key; remove one of them"):
        tuned.read_winners(tmp_path / "tuned.json")
