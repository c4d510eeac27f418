"""Stand-ins for what a GPU gives: a clock, kernels that compute in NumPy, peers, and measured rows."""

import numpy as np
import torch

from generator import peers as real_peers
from generator.bench import Figure, Row, random_tensors
from generator.matrix import Shape
from generator.plan import plan_kernel
from generator.reference import attention
from generator.sample import host
from generator.spec import load_spec
from generator.tiles import seen_of
from generator.timing import Timing


class FakeClock:
    """Every launch takes what it says of itself in `ms`; one that says nothing takes a millisecond."""

    def milliseconds(self, launch, count):
        return getattr(launch, "ms", 1.0)


class NumpyKernel:
    """run_kernel of a Binary, in float64. spoil: called with the outputs by name before they are stored."""

    def __init__(self, spec, spoil=None):
        self.spec, self.spoil, self.calls = spec, spoil, 0

    def __call__(self, out=None, **operands):
        self.calls += 1
        if out is None:
            return ()
        spec, given = self.spec, {name: host(x) for name, x in operands.items()}
        v = given.get("v", given["k"][..., : spec.v_dim])
        exact = attention(
            given["q"], given["k"], v, spec.head_dim**-0.5, False, spec.unnormalized, seen_of(spec, given)
        )
        named = {"o": exact.o, "lse": exact.lse, "m": exact.m}
        if self.spoil:
            self.spoil(named)
        for tensor, array in zip(out, named.values(), strict=False):
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)))
        return tuple(out)


def peer(name, error=0.0, raises=None, ms=1.0, **options):
    """A Peer that computes as NumpyKernel, each element off by a factor of 1 + error."""

    def prepare(spec, operands):
        if raises is not None:
            raise raises
        out = torch.empty((*operands["q"].shape[:3], spec.v_dim))

        def call():
            NumpyKernel(spec)(out=(out,), **operands)
            return out * (1 + error), None

        call.ms = ms
        return call

    words = options.pop("words", frozenset())
    return real_peers.Peer(name, name.upper(), (), prepare, words, **options)


def on_the_cpu(spec, shape, seed, device):
    """random_tensors wherever it is called for."""
    return random_tensors(spec, shape, seed, "cpu")


def row(head_dim=64, tokens=4096, batch=4, ours=500.0, peers=None, causal=False):
    """A Row with these TFLOP/s: measured peers by name, or a Figure as it is."""
    plan = plan_kernel(load_spec(arch="sm_90a", head_dim=head_dim, causal=causal))
    heads, flop = max(1, 2048 // head_dim), 10**13

    def figure(name, speed):
        if isinstance(speed, Figure):
            return speed
        times = tuple(flop / 1e9 / speed * factor for factor in (0.99, 1.0, 1.02))
        return Figure(name, "measured", o_err=2e-3, timing=Timing(times))

    others = tuple(figure(name, speed) for name, speed in (peers or {}).items())
    shape = Shape(batch, heads, heads, tokens, tokens)
    return Row(plan, shape, flop, 800.0, figure("bespoke", ours), others)
