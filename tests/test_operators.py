"""operators.py: kernels as operators of PyTorch, traced and called; on CPU tensors, which the emulator runs."""

import copy
import dataclasses
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

import generator
from generator.arrays import CallError
from generator.compile import compile_kernel
from generator.kernel import Kernel
from generator.plan import plan_kernel
from generator.reference import attention
from generator.resources import checkout_root
from generator.run import RunError
from generator.signature import inputs

torch = pytest.importorskip("torch")

CASES = {
    "normalized": {"q_heads_per_kv": 2, "causal": True},
    "sm_90a": {"arch": "sm_90a", "q_heads_per_kv": 2, "causal": True},
    "unnormalized": {"output": "unnormalized"},
    "no lse": {"lse": False, "dtype": "fp16", "head_dim_v": 32},
    "rows": {"seqlens": True, "sink": True, "q_heads_per_kv": 2},
    "two sources": {"kv_sources": 2, "seqlens": True, "limit2": True},
    "shared": {"kv_shared": True, "head_dim": 32, "head_dim_v": 16},
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()  # a code object is traced a few times at most


def built(case, **more):
    return generator.build(**{"head_dim": 16, **CASES[case], **more})


@pytest.fixture(params=CASES)
def kernel(request):
    return built(request.param)


def tensors_of(kernel, batch=2, queries=5, keys=24, keys2=9, kv_heads=2, seed=0):
    """The kernel's inputs by name."""
    spec, random = kernel.spec, torch.Generator().manual_seed(seed)
    sizes = {"batch": batch, "queries": queries, "keys": keys, "keys2": keys2, "kv_heads": kv_heads}
    sizes |= {"q_heads": kv_heads * spec.q_heads_per_kv, "head_dim": spec.head_dim, "head_dim_v": spec.v_dim}
    tensors = {}
    for parameter in inputs(spec):
        shape = parameter.extents(sizes)
        if parameter.dtype == "int32":
            most = {"seqlens": keys, "seqlens2": keys2, "limit2": keys2}[parameter.name]
            tensors[parameter.name] = torch.randint(0, most + 1, shape, dtype=torch.int32, generator=random)
        else:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[parameter.dtype]
            tensors[parameter.name] = torch.randn(shape, generator=random).to(dtype)
    return tensors


def several(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def same(ours, theirs):
    ours, theirs = several(ours), several(theirs)
    return len(ours) == len(theirs) and all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def layout(outputs):
    return [(tuple(x.shape), tuple(x.stride()), x.dtype, x.device) for x in several(outputs)]


# --- what it computes -------------------------------------------------------------------------------------------------


def test_operator_computes_attention():
    kernel = built("normalized", strategy="tiles")
    tensors = tensors_of(kernel)
    o, lse = kernel.op(*tensors.values(), scale=0.3)
    exact = attention(*(x.float().numpy().astype(np.float64) for x in tensors.values()), 0.3, causal=True)
    np.testing.assert_allclose(o.float().numpy(), exact.o, atol=2e-2)
    np.testing.assert_allclose(lse.numpy(), exact.lse, atol=1e-5)


def test_operator_returns_what_the_call_returns(kernel):
    tensors = tensors_of(kernel)
    assert same(kernel.op(**tensors), kernel(**tensors))
    assert same(kernel.op(**tensors, scale=0.7), kernel(**tensors, scale=0.7))
    assert not same(kernel.op(**tensors, scale=0.7), kernel(**tensors))


def test_pytorch_finds_nothing_wrong_with_it(kernel):
    """Schema, no aliasing or mutation, gradients, fake against real outputs, dynamic shapes."""
    tensors = tensors_of(kernel)
    assert set(torch.library.opcheck(kernel.op, (), tensors | {"scale": 0.3}).values()) == {"SUCCESS"}


# --- where PyTorch traces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_function_keeps_the_call(kernel, backend):
    tensors = tensors_of(kernel)

    def function(q, **others):
        outputs = several(kernel(q * 0.5, scale=0.4, **others))
        return tuple(output.float() * 2 for output in outputs)

    graphs = []

    def looked_at(graph, example):
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    compiled = torch.compile(function, fullgraph=True, backend=looked_at)
    assert same(compiled(**tensors), function(**tensors))
    assert len(graphs) == 1 and f"torch.ops.{kernel.op}(" in graphs[0]


def test_one_trace_serves_every_length():
    """Batch, queries and keys are symbols; new lengths, and a scale that changes, compile nothing again."""
    kernel = built("normalized")
    graphs = []

    def counted(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *x: kernel(*x), fullgraph=True, backend=counted, dynamic=True)
    for batch, queries, keys in ((2, 5, 24), (4, 17, 40), (2, 6, 7)):
        tensors = tensors_of(kernel, batch, queries, keys, kv_heads=3)  # no extent like another at first
        assert same(compiled(*tensors.values()), kernel(**tensors))
    assert len(graphs) == 1


def test_another_kernel_in_its_place_is_traced_anew():
    one, other = built("normalized"), generator.build(head_dim=16, q_heads_per_kv=2)
    tensors = tensors_of(one)
    compiled = torch.compile(lambda kernel, x: kernel(**x), fullgraph=True, backend="eager")
    for kernel in (one, other, one):
        assert same(compiled(kernel, tensors), kernel(**tensors))
    assert not same(one(**tensors), other(**tensors))


class Module(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, q, k, v):
        return self.kernel(q, k, v, scale=0.4)


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_call(strict):
    kernel = built("normalized")
    tensors = tensors_of(kernel)
    lengths = {"q": {1: torch.export.Dim("queries")}, "k": {1: (keys := torch.export.Dim("keys"))}, "v": {1: keys}}
    exported = torch.export.export(Module(kernel), (), tensors, dynamic_shapes=lengths, strict=strict)
    assert [node.target for node in exported.graph.nodes if "bespoke" in str(node.target)] == [kernel.op]
    for queries in (5, 11):
        tensors = tensors_of(kernel, queries=queries, keys=30)
        assert same(exported.module()(**tensors), kernel(**tensors, scale=0.4))


def test_fake_outputs_are_laid_out_as_real_ones(kernel):
    """GQA, V's own width, every number of outputs; inputs of other strides."""
    tensors = tensors_of(kernel)
    tensors["q"] = tensors["q"].transpose(1, 2).contiguous().transpose(1, 2)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = kernel(**{name: mode.from_tensor(x) for name, x in tensors.items()})
    assert layout(fake) == layout(kernel(**tensors))


def test_make_fx_records_the_call():
    kernel = built("normalized")
    tensors = tensors_of(kernel)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda q, k, v: kernel(q, k, v))(*tensors.values())
    assert f"torch.ops.{kernel.op}(" in graph.code
    other = tensors_of(kernel, seed=1)
    assert same(graph(*other.values()), kernel(**other))


def test_jit_trace_records_the_call():
    kernel = built("normalized")
    tensors, other = tensors_of(kernel), tensors_of(kernel, seed=1)
    traced = torch.jit.trace(lambda q, k, v: kernel(q, k, v), tuple(tensors.values()))
    assert same(traced(*other.values()), kernel(**other))


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_are_refused_when_they_are_asked_for():
    kernel = built("normalized")
    tensors = tensors_of(kernel)
    expected = kernel(**tensors)
    assert not any(x.requires_grad for x in expected)
    tensors["k"].requires_grad_()
    o, lse = kernel(**tensors)
    assert same((o, lse), expected) and o.requires_grad
    message = "fmha_sm100_d16_gqa2_causal has no backward pass: call it under torch.no_grad"
    with pytest.raises(RunError, match=message):
        o.float().sum().backward()
    with torch.no_grad():
        assert not any(x.requires_grad for x in kernel(**tensors))
        compiled = torch.compile(lambda **x: kernel(**x), fullgraph=True, backend="aot_eager")
        assert same(compiled(**tensors), expected)


# --- what it refuses --------------------------------------------------------------------------------------------------


REFUSED = {
    "missing": (lambda x: x.pop("v"), "v = None: the kernel needs it: v is V"),
    "unasked": (lambda x: x.update(sink=torch.zeros(4)), "sink = .*given.*: the kernel was built without sinks"),
    "dtype": (lambda x: x.update(k=x["k"].half()), "k.dtype = .*fp16.*: the kernel was built for bf16"),
    "dimensions": (lambda x: x.update(q=x["q"][0]), "q.shape = .*: must have four dimensions"),
}
REFUSED_BY_THE_CALL = {
    "columns": (lambda x: x.update(k=x["k"].repeat(1, 1, 1, 2)), "k.shape = .*: the kernel was built for 16 columns"),
    "heads": (lambda x: x.update(q=x["q"][:, :, :2]), "heads = .*: the kernel was built for 2 query head"),
    "scale": (lambda x: x.update(scale=-1.0), "scale = -1.0: must be a positive finite number"),
}


@pytest.mark.parametrize("case", REFUSED | REFUSED_BY_THE_CALL)
def test_operator_refuses_in_the_calls_words(case):
    kernel = built("normalized")
    change, message = (REFUSED | REFUSED_BY_THE_CALL)[case]
    arguments = tensors_of(kernel)
    change(arguments)
    for call in (kernel, kernel.op):
        with pytest.raises(CallError, match=f"^{message}"):
            call(**arguments)
    compiled = torch.compile(lambda **x: kernel(**x), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=message):
        compiled(**arguments)


@pytest.mark.parametrize("case", REFUSED)
def test_a_trace_refuses_what_it_can_tell(case):
    kernel = built("normalized")
    change, message = REFUSED[case]
    arguments = tensors_of(kernel)
    change(arguments)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(CallError, match=f"^{message}"):
        kernel(**{name: mode.from_tensor(x) for name, x in arguments.items()})


# --- its name ---------------------------------------------------------------------------------------------------------


def test_equal_builds_share_an_operator():
    one, other = (generator.build(head_dim=16, q_heads_per_kv=2, causal=True) for _ in range(2))
    assert one is not other and one.op is other.op
    assert re.fullmatch(r"bespoke\.fmha_sm100_d16_gqa2_causal_[0-9a-f]{8}\.default", str(one.op))
    assert len(built("unnormalized").op._schema.returns) == 3
    assert len(built("no lse").op._schema.returns) == 1


def test_other_plans_and_other_code_have_operators_of_their_own():
    """One specification, hence one kernel name: as planned, with another tile_n, and with a file that was edited."""
    planned = generator.build(head_dim=16)
    narrow = dataclasses.replace(plan_kernel(generator.load_spec(head_dim=16, tile_n=16)), spec=planned.spec)
    tiled = Kernel(narrow, compile_kernel(narrow))
    edited = Kernel(planned.plan, dataclasses.replace(planned.binary, ptx=planned.ptx + "// edited\n"))
    names = [str(kernel.op).split(".")[1] for kernel in (planned, tiled, edited)]
    assert len(set(names)) == 3 and all(name.startswith("fmha_sm100_d16_") for name in names)
    assert names[2].startswith(names[0] + "_")
    tensors = tensors_of(planned)
    for kernel in (planned, tiled, edited):
        assert same(kernel.op(**tensors), kernel(**tensors))


def test_the_readme_has_its_name():
    from generator.operators import planned_name

    plan = plan_kernel(generator.load_spec(head_dim=96, causal=True))
    assert f"torch.ops.bespoke.{planned_name(plan)}.default" in (checkout_root() / "README.md").read_text()


def test_a_module_with_a_kernel_can_be_copied():
    """After its calls were prepared and its operator registered; a copy is an equal build."""
    kernel = built("normalized")
    tensors = tensors_of(kernel)
    assert kernel._launcher is not None and kernel.op
    for copied in (copy.deepcopy(Module(kernel)).kernel, pickle.loads(pickle.dumps(kernel))):
        assert copied is not kernel and copied.op is kernel.op
        assert same(copied(**tensors), kernel(**tensors))


FRESH = """
import sys
import ml_dtypes, numpy
import generator
kernel = generator.build(head_dim=16, q_heads_per_kv=2, causal=True)
x = numpy.ones((1, 2, 2, 16), ml_dtypes.bfloat16)
kernel(x, x[:, :, :1], x[:, :, :1])
print("torch" in sys.modules)
import torch
x = torch.ones(1, 2, 2, 16).bfloat16()
kernel(x, x[:, :, :1], x[:, :, :1])
print("torch._dynamo" in sys.modules, "generator.operators" in sys.modules)
print(kernel.op)
"""


def test_pytorch_is_imported_when_it_is_needed_and_names_outlive_the_process():
    ran = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:3] == ["False", "False False", str(built("normalized").op)]


def test_tracing_comes_before_anything_else():
    """A kernel whose first call ever is traced."""
    kernel = generator.build(head_dim=16, causal=True, window_left=3)
    tensors = tensors_of(kernel)
    compiled = torch.compile(lambda **x: kernel(**x), fullgraph=True, backend="eager")
    assert same(compiled(**tensors), kernel(**tensors))
