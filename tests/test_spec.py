"""KernelSpec and load_spec: the vocabulary, stable names and digests, and what each kind of bad input is told."""

import json

import pytest
from pydantic import ValidationError

from generator.resources import specs_dir
from generator.spec import KernelSpec, SpecError, load_spec, spec_names

ALTERNATIVES = {
    "arch": "sm_90a",
    "head_dim": 128,
    "head_dim_v": 64,
    "dtype": "fp16",
    "q_heads_per_kv": 8,
    "pack_heads": False,
    "causal": True,
    "window_left": 0,
    "window_right": 127,
    "seqlens": True,
    "sink": True,
    "kv_sources": 2,
    "limit2": True,
    "kv_shared": True,
    "output": "unnormalized",
    "lse": False,
    "split_kv": True,
    "strategy": "pair",
    "p_staging": "smem",
    "kv_stage": 2,
    "tile_m": 64,
    "tile_n": 96,
}


def alternative(field):
    """Fields with one that differs from its default; limit2 is of a second source."""
    return {"head_dim": 96, field: ALTERNATIVES[field]} | ({"kv_sources": 2} if field == "limit2" else {})


def refusal(source=None, **fields) -> SpecError:
    with pytest.raises(SpecError) as caught:
        load_spec(source, **fields)
    return caught.value


def test_defaults_are_the_vocabulary_s():
    spec = load_spec(head_dim=96)
    assert spec.name == "fmha_sm100_d96"
    assert (spec.arch, spec.dtype, spec.output, spec.lse, spec.p_staging) == (
        *("sm_100a", "bf16", "normalized", True, "auto"),
    )
    assert spec.v_dim == 96 and not spec.causal and spec.q_heads_per_kv == 1


def test_name_is_the_one_of_the_design():
    assert load_spec(head_dim=128, causal=True).name == "fmha_sm100_d128_causal"


def test_every_field_shows_in_name_and_digest():
    assert set(ALTERNATIVES) == set(KernelSpec.model_fields)
    specs = [load_spec(head_dim=96)]
    specs += [load_spec(alternative(field)) for field in ALTERNATIVES]
    assert len({spec.name for spec in specs}) == len(specs)
    assert len({spec.digest for spec in specs}) == len(specs)


def test_digest_is_stable():
    assert load_spec(head_dim=64).digest == load_spec(head_dim=64, head_dim_v=64, causal=False).digest
    assert load_spec(head_dim=64).digest.startswith("217bc58b74c45dd4")


def test_specification_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_spec(head_dim=64).head_dim = 128


def test_non_default_fields_rebuild_the_specification():
    for field in ALTERNATIVES:
        spec = load_spec(alternative(field))
        assert load_spec(spec.non_default()) == spec == load_spec(spec)


def test_toml_name_path_and_keywords_agree(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('head_dim = 96\ncausal = true\ndtype = "fp16"\n')
    assert load_spec(path) == load_spec(str(path)) == load_spec(head_dim=96, causal=True, dtype="fp16")
    assert load_spec("fmha_sm100_d96") == load_spec(head_dim=96)
    assert load_spec("fmha_sm100_d96", causal=True).name == "fmha_sm100_d96_causal"


MLA = "576, with head_dim_v = 512"


@pytest.mark.parametrize(
    "head_dim, nearest",
    [(0, "16"), (24, "16 or 32"), (264, "256 or 272"), (528, "512"), (560, MLA), (576, MLA), (1024, MLA)],
)
def test_head_dim_out_of_the_vocabulary(head_dim, nearest):
    error = refusal(head_dim=head_dim)
    assert str(error) == (
        f"head_dim = {head_dim}: must be a multiple of 16 from 16 to 512 (576 with head_dim_v = 512); "
        f"the nearest is {nearest}"
    )
    assert (error.field, error.value, error.remedy) == ("head_dim", head_dim, f"the nearest is {nearest}")


def test_head_dim_576_needs_head_dim_v_512():
    assert load_spec(head_dim=576, head_dim_v=512).v_dim == 512
    assert refusal(head_dim=576).field == "head_dim"
    assert refusal(head_dim=576, head_dim_v=256).field == "head_dim"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head_dim": "abc"}, "head_dim = 'abc': must be a whole number; for example head_dim = 96"),
        ({"head_dim": 96.0}, "head_dim = 96.0: must be a whole number; for example head_dim = 96"),
        ({"head_dim": True}, "head_dim = True: must be a whole number; for example head_dim = 96"),
        ({}, "head_dim = None: is required; for example head_dim = 96 (--head-dim 96)"),
        ({"head_dim": 64, "head_dim_v": 24}, "head_dim_v = 24: must be a multiple of 16 from 16 to 512"),
        ({"head_dim": 64, "dtype": "bf61"}, 'dtype = \'bf61\': must be "bf16" or "fp16"; did you mean "bf16"?'),
        ({"head_dim": 64, "q_heads_per_kv": 0}, "q_heads_per_kv = 0: must be a whole number from 1 to 1024"),
        ({"head_dim": 64, "kv_stage": 0}, 'kv_stage = 0: must be "auto" or a whole number from 1 to 16'),
        ({"head_dim": 64, "kv_stage": "deep"}, "kv_stage = 'deep': must be a whole number or \"auto\""),
        ({"head_dim": 64, "tile_n": 100}, 'tile_n = 100: must be "auto" or a multiple of 16 from 16 to 256'),
        ({"head_dim": 64, "causal": "yes"}, "causal = 'yes': must be true or false"),
        (
            {"head_dim": 64, "window_left": -1},
            "window_left = -1: must be a whole number from 0 to 1073741824; leave it",
        ),
        (
            {"head_dim": 64, "window_right": 1 << 31},
            "window_right = 2147483648: must be a whole number from 0 to 10737",
        ),
        (
            {"head_dim": 64, "limit2": True},
            "limit2 = True: limits a second KV source, and there is one; set kv_sources",
        ),
        ({"head_dim": 64, "kv_sources": 3}, "kv_sources = 3: must be 1 or 2"),
        ({"head_dim": 64, "output": "unnormalized", "lse": False}, "lse = False: an unnormalized output needs LSE"),
        ({"head_dim": 64, "head_dim_v": 128, "kv_shared": True}, "kv_shared = True: V is a prefix of K's 64 columns"),
    ],
)
def test_bad_values_name_field_value_limit_and_remedy(fields, message):
    error = refusal(**fields)
    assert message in str(error)
    assert error.field == message.split(" = ")[0]
    assert error.remedy and str(error).endswith(error.remedy)


@pytest.mark.parametrize(
    "key, remedy",
    [
        ("headdim", "did you mean head_dim?"),
        ("casual", "did you mean causal?"),
        ("kv_stages", "did you mean kv_stage?"),
        ("zzz", "fields are arch, head_dim, "),
    ],
)
def test_unknown_toml_key_suggests_the_nearest(tmp_path, key, remedy):
    path = tmp_path / "mine.toml"
    path.write_text(f"head_dim = 64\n{key} = 1\n")
    message = str(refusal(path))
    assert message.startswith(f"'{key}': unknown field; ") and remedy in message


HOSTILE = ["../../etc/passwd", "bf16\nimport os", "{{ spec }}", "{% raw %}", "fp16\x00", "`id`", "a" * 5000]
TEXT_FIELDS = ["arch", "dtype", "output", "p_staging", "pack_heads", "kv_stage", "tile_n", "head_dim"]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("field", TEXT_FIELDS)
def test_no_free_text_passes_a_field(tmp_path, field, text):
    error = refusal({"head_dim": 64, field: text})
    assert error.field == field and error.value == text
    assert str(error).isprintable() and len(str(error)) < 400
    path = tmp_path / "mine.toml"
    path.write_text(
        f"head_dim = 64\n{field} = {json.dumps(text)}\n" if field != "head_dim" else f"head_dim = {json.dumps(text)}"
    )
    assert refusal(path).field == field


@pytest.mark.parametrize("key", ["../x", "a\nb", "{{ x }}"])
def test_hostile_key_is_quoted_not_obeyed(key):
    message = str(refusal({"head_dim": 64, key: 1}))
    assert "unknown field" in message and message.isprintable()


@pytest.mark.parametrize(
    "source", ["../specs/fmha_sm100_d96", "..", "/etc/passwd", "fmha_sm100_d96\n", "{{ x }}", "x\x00.toml", ""]
)
def test_kernel_must_be_a_name_or_a_toml_file(source):
    error = refusal(source)
    assert error.field == "kernel" and str(error).isprintable()
    assert "a kernel is a name (a-z, 0-9, _) in specs/ or a path to an existing .toml file" in str(error)


def test_unknown_name_suggests_the_nearest():
    assert "did you mean fmha_sm100_d96?" in str(refusal("fmha_sm100_d69"))


def test_matrix_is_no_specification():
    assert "use `bespoke matrix`" in str(refusal(specs_dir() / "matrix.toml"))
    assert "matrix" not in spec_names()


def test_broken_toml_says_where(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("head_dim = \n")
    assert "not valid TOML" in str(refusal(path)) and "line 1" in str(refusal(path))
    path.write_bytes(b"\xff\xfe")
    assert "not valid TOML" in str(refusal(path))


def test_huge_file_is_not_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("head_dim = 64\n" + "#" * 70000)
    assert refusal(path).field == "kernel"
