"""Other attention kernels on the same tensors: what each can be asked for, and how it is called.

A peer is asked for a case, or it is said why not: its interface has no word for it, its package is not installed, it
refuses, or it fails. Nothing is converted behind its back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .mask import mask_of
from .matrix import Shape
from .spec import KernelSpec, SpecError

MESSAGE_SHOWN = 160  # characters of a peer's own words
WIDE = 256  # head_dim from which on FROST and ffpa-attn have kernels of their own

Operands = Mapping[str, Any]
Call = Callable[[], tuple[Any, Any]]  # -> O [B, Sq, Hq, Dv], and LSE [B, Hq, Sq] or None


class Refused(Exception):
    """A peer does not serve a case. status: "refused" or "missing"."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True)
class Peer:
    """name: on the command line; title: in tables; distributions: what it comes in; words: what of a case its interface
    can say, of `asked`; wide: only head_dims above 256; last_resort: asked when no other peer answers.
    """

    name: str
    title: str
    distributions: tuple[str, ...]
    prepare: Callable[[KernelSpec, Operands], Call]
    words: frozenset[str]
    wide: bool = False
    last_resort: bool = False

    def call(self, spec: KernelSpec, shape: Shape, operands: Operands) -> tuple[Call, Any]:
        """What runs the case, and O of its first run. Raises Refused."""
        lacking = [what for what in asked(spec, shape) if what not in self.words]
        if lacking:
            raise Refused("refused", f"its interface has no {', no '.join(lacking)}")
        if self.wide and spec.head_dim <= WIDE:
            raise Refused("refused", f"for head_dim above {WIDE}; below, its kernel is padded")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                ready = self.prepare(spec, operands)
                o, _ = ready()
                _finish()  # an error of the device is this peer's, not the next one's
                _check_shape(o, operands["q"].shape[:3], spec.v_dim)
                return ready, o
            except ImportError as error:
                raise Refused("missing", shortened(error)) from None
            except Exception as error:  # whatever a peer raises is its answer
                raise Refused("refused", shortened(error, [str(item.message) for item in told])) from None


def _check_shape(o: Any, rows: Sequence[int], columns: int) -> None:
    if tuple(o.shape) != (*rows, columns):
        raise ValueError(f"gives O {tuple(o.shape)}, not {(*rows, columns)}")


def _finish() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def asked(spec: KernelSpec, shape: Shape) -> Iterator[str]:
    """What a case asks for besides plain attention, in words that peers have or have not."""
    mask, square = mask_of(spec), shape.queries == shape.keys
    diagonal = mask.right == 0 and mask.left is None
    if diagonal and not square:
        yield "causal mask aligned at the bottom right"
    if mask.right not in (None, 0):
        yield "window to the right"
    if mask.left is not None:
        yield "window to the left" if mask.right == 0 or square else "window aligned at the bottom right"
    if spec.seqlens:
        yield "KV lengths"
    if spec.sink:
        yield "sinks"
    if spec.kv_sources == 2:
        yield "second KV source"
    if spec.unnormalized:
        yield "un-normalized output"


def shortened(error: BaseException, told: Sequence[str] = ()) -> str:
    """An error in one line, with the warning that explains it: PyTorch tells there why a backend does not take a case,
    after heads ("... not used because:") and a word on each backend that was not asked ("... runtime disabled").
    """
    reasons = [text.split(" (Triggered internally")[0].strip() for text in told]
    reasons = [text for text in reasons if not text.endswith("because:") and "runtime disabled" not in text]
    text = f"{type(error).__name__}: {error}" + (f" ({reasons[-1]})" if reasons else "")
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_SHOWN else text[: MESSAGE_SHOWN - 3] + "..."


def chosen_peers(text: str) -> list[Peer]:
    """Of `--peers all|none|NAME,NAME`. Raises SpecError."""
    if text in ("all", "none"):
        return list(PEERS) if text == "all" else []
    by_name = {peer.name: peer for peer in PEERS}
    names = [word.strip() for word in text.split(",")]
    for name in names:
        if name not in by_name:
            limit = f"must be all, none or names of {', '.join(by_name)}"
            raise SpecError("peers", name, limit, "for example --peers fa4,cudnn")
    return [by_name[name] for name in dict.fromkeys(names)]


def versions(peers: Sequence[Peer]) -> dict[str, str]:
    """Of the peers' distributions that are installed; what carries no metadata is not in it."""
    from importlib import metadata

    found = {}
    for name in dict.fromkeys(name for peer in peers for name in peer.distributions):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _values(spec: KernelSpec, operands: Operands) -> Any:
    """V, where K holds it too."""
    return operands["v"] if "v" in operands else operands["k"][..., : spec.v_dim]


def _by_head(spec: KernelSpec, operands: Operands) -> list[Any]:
    """Q, K, V as [B, H, S, D] views."""
    return [x.transpose(1, 2) for x in (operands["q"], operands["k"], _values(spec, operands))]


def _fa4(spec: KernelSpec, operands: Operands) -> Call:
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = operands["q"], operands["k"], _values(spec, operands)
    window = (spec.window_left, None if spec.causal else spec.window_right)
    options = {"causal": spec.causal, "window_size": window, "return_lse": True}
    if spec.sink:
        options["learnable_sink"] = operands["sink"]

    def call() -> tuple[Any, Any]:
        return flash_attn_func(q, k, v, **options)[:2]

    return call


def _sdpa(backend: str) -> Callable[[KernelSpec, Operands], Call]:
    """PyTorch's scaled_dot_product_attention by exactly this backend."""

    def prepare(spec: KernelSpec, operands: Operands) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = _by_head(spec, operands)
        options = {"is_causal": mask_of(spec).right == 0, "enable_gqa": spec.q_heads_per_kv > 1}
        only = getattr(SDPBackend, backend)

        def call() -> tuple[Any, Any]:
            with sdpa_kernel(only):
                return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2), None

        return call

    return prepare


def _flex(spec: KernelSpec, operands: Operands) -> Call:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = _by_head(spec, operands)
    mask, queries, keys = mask_of(spec), q.shape[2], k.shape[2]
    lengths = operands.get("seqlens")

    def sees(b: Any, h: Any, row: Any, key: Any) -> Any:
        length = keys if lengths is None else lengths[b]
        distance = key - (row + length - queries)
        seen = key < length
        if mask.left is not None:
            seen = seen & (distance >= -mask.left)
        if mask.right is not None:
            seen = seen & (distance <= mask.right)
        return seen

    blocks = None
    if mask.windowed or lengths is not None:
        batch = q.shape[0] if lengths is not None else None
        blocks = create_block_mask(sees, batch, None, queries, keys, device=q.device)
    torch._dynamo.reset()  # else the ninth case would run uncompiled: a function is recompiled eight times
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call() -> tuple[Any, Any]:
        return compiled(q, k, v, block_mask=blocks, enable_gqa=spec.q_heads_per_kv > 1).transpose(1, 2), None

    return call


def _ffpa(spec: KernelSpec, operands: Operands) -> Call:
    from ffpa_attn import ffpa_attn_func

    q, k, v = _by_head(spec, operands)
    options = {"is_causal": mask_of(spec).right == 0, "enable_gqa": spec.q_heads_per_kv > 1, "backend": "cutedsl"}

    def call() -> tuple[Any, Any]:
        return ffpa_attn_func(q, k, v, **options).transpose(1, 2), None

    return call


def _frost(spec: KernelSpec, operands: Operands) -> Call:
    import torch
    from cudnn.sdpa.fwd.api_dsl import sdpa_fwd_wrapper_dsl_sm90

    q, k, v = _by_head(spec, operands)
    causal = mask_of(spec).right == 0
    options = {"is_causal": causal, "causal_bottom_right": causal, "window_size_left": spec.window_left}
    if spec.sink:
        options["sinks"] = operands["sink"]
    if spec.seqlens:
        rows = torch.full((q.shape[0],), q.shape[2], dtype=torch.int32, device=q.device)
        options |= {"seq_q_lens": rows, "seq_kv_lens": operands["seqlens"]}

    def call() -> tuple[Any, Any]:
        given = sdpa_fwd_wrapper_dsl_sm90(q, k, v, **options)
        return given["o_tensor"].transpose(1, 2), None

    return call


_SHIFTED = frozenset({"causal mask aligned at the bottom right"})
_LEFT = _SHIFTED | {"window to the left"}
_WINDOWS = _LEFT | {"window to the right", "window aligned at the bottom right"}
_NOTHING: frozenset[str] = frozenset()

PEERS = (
    Peer("fa4", "FA4", ("flash-attn-4",), _fa4, _WINDOWS | {"sinks"}),
    Peer("cudnn", "cuDNN", ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"), _sdpa("CUDNN_ATTENTION"), _NOTHING),
    Peer("flex", "FlexAttention", (), _flex, _WINDOWS | {"KV lengths"}),
    Peer("ffpa", "ffpa-attn", ("ffpa-attn",), _ffpa, _SHIFTED, wide=True),
    Peer("frost", "FROST", ("nvidia-cudnn-frontend",), _frost, _LEFT | {"sinks", "KV lengths"}, wide=True),
    Peer("efficient", "mem-efficient", (), _sdpa("EFFICIENT_ATTENTION"), _NOTHING, last_resort=True),
)
