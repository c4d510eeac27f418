"""What peers are asked for, what they answer, and how refusals are told."""

import pytest

from generator.matrix import Shape
from generator.peers import MESSAGE_SHOWN, PEERS, Refused, asked, chosen_peers, shortened, versions
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
    assert shortened(RuntimeError("No available kernel."), ["other", "head_dim 512 is too wide"]) == (
        "RuntimeError: No available kernel. (head_dim 512 is too wide)"
    )


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
    from generator.sample import take_sample

    return take_sample(spec, operands)
