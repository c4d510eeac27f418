"""What peers are asked for, what they answer, and how refusals are told."""

import sys
import types

import pytest

from generator.matrix import Shape
from generator.peers import MESSAGE_SHOWN, PEERS, Refused, asked, chosen_peers, shortened, versions
from generator.reference import Seen, attention
from generator.sample import host, take_sample
from generator.spec import SpecError, load_spec

torch = pytest.importorskip("torch")
measured = pytest.importorskip("measured")

SQUARE, LONGER = Shape(1, 2, 2, 64, 64), Shape(1, 2, 2, 64, 100)
BY_NAME = {peer.name: peer for peer in PEERS}


def refusal(peer, shape=SQUARE, **fields):
    spec = load_spec(arch="sm_90a", **fields)
    with pytest.raises(Refused) as caught:
        peer.call(spec, shape, measured.random_tensors(spec, shape, 0, "cpu"))
    return caught.value.status, str(caught.value)


@pytest.mark.parametrize(
    "fields, shape, words",
    [
        ({}, SQUARE, []),
        ({"causal": True}, SQUARE, []),
        ({"causal": True}, LONGER, ["causal mask aligned at the bottom right"]),
        ({"causal": True, "window_left": 8}, SQUARE, ["window to the left"]),
        ({"causal": True, "window_left": 8}, LONGER, ["window to the left"]),
        ({"window_right": 0}, SQUARE, []),
        ({"window_left": 8}, LONGER, ["window aligned at the bottom right"]),
        ({"window_left": 8, "window_right": 4}, SQUARE, ["window to the right", "window to the left"]),
        ({"seqlens": True, "sink": True}, SQUARE, ["KV lengths", "sinks"]),
        ({"kv_sources": 2}, SQUARE, ["second KV source"]),
        ({"output": "unnormalized"}, SQUARE, ["un-normalized output"]),
    ],
)
def test_what_a_case_asks_for(fields, shape, words):
    assert list(asked(load_spec(head_dim=64, **fields), shape)) == words


def test_an_interface_without_the_words_is_not_called():
    status, message = refusal(measured.peer("p", raises=AssertionError), head_dim=16, seqlens=True, sink=True)
    assert (status, message) == ("refused", "its interface has no KV lengths, no sinks")
    assert refusal(BY_NAME["cudnn"], LONGER, head_dim=16, causal=True)[1] == (
        "its interface has no causal mask aligned at the bottom right"
    )


def test_wide_peers_are_not_asked_for_what_they_would_pad():
    for name in ("ffpa", "frost"):
        assert "for head_dim above 256" in refusal(BY_NAME[name], head_dim=256)[1]


def test_a_package_that_is_not_there_is_missing():
    status, message = refusal(
        measured.peer("p", raises=ModuleNotFoundError("No module named 'flash_attn'")), head_dim=16
    )
    assert (status, message) == ("missing", "ModuleNotFoundError: No module named 'flash_attn'")


def test_whatever_a_peer_raises_is_a_refusal_in_one_line():
    status, message = refusal(measured.peer("p", raises=RuntimeError("first\n  second " + "x" * 500)), head_dim=16)
    assert status == "refused" and message.startswith("RuntimeError: first second x")
    assert len(message) == MESSAGE_SHOWN and message.endswith("...")


def test_a_warning_before_the_error_is_told():
    told = [
        "Memory efficient kernel not used because: (Triggered internally at sdp_utils.cpp:9.)",
        "head_dim 512 is too wide (Triggered internally at sdp_utils.cpp:8.)",
        "CuDNN attention kernel not used because: (Triggered internally at sdp_utils.cpp:7.)",
        "CuDNN attention has been runtime disabled. (Triggered internally at sdp_utils.cpp:6.)",
    ]
    assert shortened(RuntimeError("No available kernel."), told) == (
        "RuntimeError: No available kernel. (head_dim 512 is too wide)"
    )
    assert shortened(RuntimeError("No available kernel."), told[:1]) == "RuntimeError: No available kernel."


def test_pytorchs_own_backends_say_why_they_do_not_run_here():
    for name in ("cudnn", "efficient"):
        status, message = refusal(BY_NAME[name], head_dim=16)
        assert status == "refused" and message.startswith("RuntimeError")


def test_an_output_of_another_shape_is_refused():
    peer = measured.peer("p")
    peer = type(peer)(**{**vars(peer), "prepare": lambda spec, operands: lambda: (operands["q"][:, :1], None)})
    assert "gives O (1, 1, 2, 16), not (1, 64, 2, 16)" in refusal(peer, head_dim=16)[1]


def test_a_right_peer_gives_its_output():
    spec = load_spec(arch="sm_90a", head_dim=16)
    call, o = measured.peer("p").call(spec, SQUARE, measured.random_tensors(spec, SQUARE, 0, "cpu"))
    assert tuple(o.shape) == (1, 64, 2, 16) and call.ms == 1.0


def test_chosen_peers():
    assert chosen_peers("all") == list(PEERS) and chosen_peers("none") == []
    assert [peer.name for peer in chosen_peers("cudnn, fa4,cudnn")] == ["cudnn", "fa4"]
    with pytest.raises(SpecError, match="^peers = 'fa5': must be all, none or names of fa4, cudnn, .*; for example"):
        chosen_peers("fa4,fa5")


def test_versions_are_of_what_is_installed():
    assert versions(PEERS).keys() <= {name for peer in PEERS for name in peer.distributions}


@pytest.mark.parametrize(
    "fields", [{"causal": True}, {"window_left": 9, "window_right": 3}, {"seqlens": True}], ids=str
)
def test_flex_attention_masks_as_we_do(fields, monkeypatch):
    """Its mask, run by PyTorch without compiling, on the CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    spec = load_spec(arch="sm_90a", head_dim=16, q_heads_per_kv=2, **fields)
    shape = Shape(2, 2, 1, 50, 70)
    operands = {name: x.float() if x.is_floating_point() else x for name, x in _operands(spec, shape).items()}
    call, o = BY_NAME["flex"].call(spec, shape, operands)
    assert measured_sample(spec, operands).o_error(o) < 1e-5


def _operands(spec, shape):
    return measured.random_tensors(spec, shape, 0, "cpu")


def measured_sample(spec, operands):
    return take_sample(spec, operands)


# --- how each is called: stand-ins with the packages' own parameters ------------------------------------------------


def stand_in(monkeypatch, module, **functions):
    """Packages of this dotted name, the last of which has these functions."""
    words = module.split(".")
    for count in range(1, len(words) + 1):
        name = ".".join(words[:count])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vars(sys.modules[module]).update(functions)


def attended(q, k, v, **seen):
    """Attention of [B, S, H, D] tensors in NumPy, as float64 tensors: O and LSE."""
    exact = attention(host(q), host(k), host(v), q.shape[-1] ** -0.5, seen=Seen(**seen))
    return torch.from_numpy(exact.o), torch.from_numpy(exact.lse)


def error_of(name, shape, **fields):
    spec = load_spec(arch="sm_90a", **fields)
    operands = _operands(spec, shape)
    _, o = BY_NAME[name].call(spec, shape, operands)
    return measured_sample(spec, operands).o_error(o)


@pytest.mark.parametrize(
    "fields",
    [{}, {"causal": True, "window_left": 9, "sink": True, "q_heads_per_kv": 2}, {"window_left": 5, "window_right": 3}],
    ids=str,
)
def test_fa4_is_called_by_its_words(monkeypatch, fields):
    def flash_attn_func(
        q, k, v, *, causal=False, window_size=(None, None), learnable_sink=None, return_lse=False
    ):  # of flash-attn-4 4.0.0b36, those that we give
        assert return_lse and q.shape[1] == 24
        left, right = window_size
        return attended(q, k, v, causal=causal, left=left, right=right, sink=learnable_sink)

    stand_in(monkeypatch, "flash_attn.cute.interface", flash_attn_func=flash_attn_func)
    assert error_of("fa4", Shape(2, 2, 2 // fields.get("q_heads_per_kv", 1), 24, 33), head_dim=16, **fields) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_ffpa_is_called_by_its_words(monkeypatch, causal):
    def ffpa_attn_func(query, key, value, *, is_causal=False, enable_gqa=False, backend=None):
        assert backend == "cutedsl" and enable_gqa and query.shape[1] == 2
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return attended(q, k, v, causal=is_causal)[0].transpose(1, 2)

    stand_in(monkeypatch, "ffpa_attn", ffpa_attn_func=ffpa_attn_func)
    fields = {"head_dim": 272, "q_heads_per_kv": 2, "causal": causal}
    assert error_of("ffpa", Shape(1, 2, 1, 20, 26), **fields) < 1e-12


@pytest.mark.parametrize("fields", [{}, {"causal": True, "window_left": 9, "sink": True}, {"seqlens": True}], ids=str)
def test_frost_is_called_by_its_words(monkeypatch, fields):
    def sdpa_fwd_wrapper_dsl_sm90(
        q_tensor,
        k_tensor,
        v_tensor,
        *,
        is_causal=False,
        causal_bottom_right=False,
        window_size_left=None,
        seq_q_lens=None,
        seq_kv_lens=None,
        sinks=None,
    ):
        assert is_causal == causal_bottom_right and (seq_q_lens is None) == (seq_kv_lens is None)
        q, k, v = (x.transpose(1, 2) for x in (q_tensor, k_tensor, v_tensor))
        seen = {"causal": is_causal, "left": window_size_left, "seqlens": seq_kv_lens, "sink": sinks}
        o, lse = attended(q, k, v, **seen)
        return {"o_tensor": o.transpose(1, 2), "lse_tensor": lse}

    stand_in(monkeypatch, "cudnn.sdpa.fwd.api_dsl", sdpa_fwd_wrapper_dsl_sm90=sdpa_fwd_wrapper_dsl_sm90)
    assert error_of("frost", Shape(2, 2, 2, 20, 26), head_dim=272, **fields) < 1e-12


@pytest.mark.parametrize("fields", [{}, {"causal": True}, {"head_dim_v": 32, "kv_shared": True}], ids=str)
def test_pytorch_is_called_by_its_words(monkeypatch, fields):
    """Its backend for CPUs stands in for those of GPUs."""
    from torch.nn.attention import SDPBackend

    monkeypatch.setattr(SDPBackend, "CUDNN_ATTENTION", SDPBackend.MATH, raising=False)
    assert error_of("cudnn", Shape(2, 2, 2, 24, 24), head_dim=48, **fields) < 4e-3
