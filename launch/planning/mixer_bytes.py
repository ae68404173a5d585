"""Bytes that a baseline's mixer keeps and takes: counted while it runs on tensors without contents.

The recurrent baselines are plain PyTorch, so what autograd keeps follows from every line of theirs. Instead
of a formula for each, the mixer itself runs forward and backward on torch's fake tensors, and every storage
is counted while it lives. Two short rows are run: bytes are linear in the chunks, whatever row they are of.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

from launch.recipe import Recipe
from trellis_dist.models.config import LayerKind, ModelConfig
from trellis_dist.parallel.config import MeshConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["MixerBytes", "mixer_bytes", "mixer_bytes_of"]

# Chunks of the two rows that are run.
_SHORT, _LONG = 2, 4


@dataclass(frozen=True)
class MixerBytes:
    """Of one mixer, for one micro-batch on one rank; its input, the norm's output, is counted in ``kept``.

    Attributes:
        kept: for the backward pass.
        output: the part of ``kept`` that only the output stage keeps.
        regions: what stays under selective recomputation, the input left out.
        operands: the operation's tokens and its output.
        work: most that the backward pass takes beside what it was left.
    """

    kept: int
    output: int
    regions: int
    operands: int
    work: int


def mixer_bytes_of(recipe: Recipe, mesh: MeshConfig, kind: LayerKind, *, half: bool) -> MixerBytes:
    """A mixer of ``kind`` in a micro-batch of ``recipe`` on one rank of ``mesh``."""
    return mixer_bytes(
        recipe.model,
        kind,
        rows=recipe.training.micro_batch,
        length=recipe.data.sequence_length // mesh.sp,
        tp=mesh.tp,
        half=half,
        halo=mesh.sp > 1,
    )


def mixer_bytes(
    config: ModelConfig, kind: LayerKind, *, rows: int, length: int, tp: int, half: bool, halo: bool
) -> MixerBytes:
    """A mixer of ``kind`` over ``rows`` rows of ``length`` tokens, one document each.

    Args:
        tp: ranks that its heads are split over.
        half: whether activations are bf16.
        halo: whether the convolution takes inputs of a segment before.
    """
    chunk = config.chunk_size(kind)
    chunks = rows * -(-length // chunk)
    short, long = (
        astuple(_run(config, kind, length=count * chunk, tp=tp, half=half, halo=halo))
        for count in (_SHORT, _LONG)
    )
    more = (chunks - _LONG) / (_LONG - _SHORT)
    return MixerBytes(*(int(b + (b - a) * more) for a, b in zip(short, long, strict=True)))


@functools.lru_cache(maxsize=256)
def _run(config: ModelConfig, kind: LayerKind, *, length: int, tp: int, half: bool, halo: bool) -> MixerBytes:
    """The same of one row."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels import PackedLayout
    from trellis_dist.models.context import SequenceContext

    dtype = torch.bfloat16 if half else torch.float32
    with torch.device("meta"):
        mixer = _shard(config, kind, tp)
    PackedLayout.uniform(1, length, config.chunk_size(kind))  # kept for the mixer: it needs true tables
    live = _Live()
    with FakeTensorMode(allow_non_fake_inputs=True), live.watching():
        shapes = {name: p.shape for name, p in mixer.named_parameters()}
        owned = {n: torch.empty(shape, dtype=dtype, requires_grad=True) for n, shape in shapes.items()}
        x = torch.empty(1, length, config.dim, dtype=dtype, requires_grad=True)
        stages = _Stages(mixer, owned.values(), halo=halo)
        with stages.counting():
            y = torch.func.functional_call(mixer, owned, (x, SequenceContext()))
        counted = stages.result()
        gradient = torch.empty_like(y)
        left = live.peak = live.bytes
        y.backward(gradient)
    return replace(counted, work=live.peak - left)


def _shard(config: ModelConfig, kind: LayerKind, tp: int) -> nn.Module:
    """A rank's part of the mixer of a layer of ``kind``."""
    from trellis_dist.models.parallel_kind import ParallelKind, keep_shard, kind_of
    from trellis_dist.models.registry import build_mixer

    mixer = build_mixer(kind, config, config.pattern.index(kind))
    for parameter in mixer.parameters():
        if tp > 1 and kind_of(parameter) is ParallelKind.SHARDED:
            keep_shard(parameter, index=0, count=tp)
    return mixer


class _Stages:
    """What a mixer's forward pass saves for its backward pass, by stage: before, operation, output."""

    def __init__(self, mixer: Any, owned: Iterable[Tensor], *, halo: bool) -> None:
        self._operands = 0
        self._owned = set(map(_key, owned))
        self._alive: list[Tensor] = []  # so that no key comes twice
        self._saved: dict[str, dict[int, int]] = {"before": {}, "operation": {}, "output": {}}
        self._passed: dict[int, int] = {}  # what the output stage is given
        self._stage = "before"
        self._operation = mixer.operation
        mixer.operation = self._operate
        mixer.region = self._region
        if halo:
            mixer.convolution = _with_halo(mixer.convolution)

    @contextmanager
    def counting(self) -> Iterator[None]:
        import torch

        def pack(x: Tensor) -> Tensor:
            if _key(x) not in self._owned:
                self._alive.append(x)
                self._saved[self._stage][_key(x)] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield

    def result(self) -> MixerBytes:
        """What was counted, the backward pass's work aside; from here on nothing is held."""
        before, operation, output = self._saved.values()
        own = {key: size for key, size in output.items() if key not in {**before, **operation}}
        self._alive.clear()
        return MixerBytes(
            kept=sum({**before, **operation, **output}.values()),
            output=sum(own.values()),
            regions=sum({**operation, **self._passed}.values()),  # its arguments stay for its recomputation
            operands=self._operands,
            work=0,
        )

    def _region(self, function: Callable[..., Any], *args: Any) -> Any:
        """Called for what comes before the operation, then for what comes after it."""
        from torch.utils._pytree import tree_leaves

        if self._stage == "operation":
            self._stage = "output"
            self._passed = {_key(x): x.untyped_storage().nbytes() for x in tree_leaves(args) if _is_tensor(x)}
        results = function(*args)
        self._stage = "operation"
        return results

    def _operate(self, tokens: dict[str, Tensor], weights: Any, memory: Any, layout: Any) -> Any:
        y, final = self._operation(tokens, weights, memory, layout)
        self._operands = sum(x.numel() * x.element_size() for x in (*tokens.values(), y))
        return y, final


def _with_halo(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convolve(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
        tail = x.new_empty(len(x), weight.shape[1] - 1, x.shape[-1]) if weight.shape[1] > 1 else None
        return convolution(x, weight, tail=tail)

    return convolve


class _Live:
    """Bytes of the storages that operations made and that still live."""

    def __init__(self) -> None:
        self.bytes = self.peak = 0
        self._seen: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        live = self

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                results = func(*args, **(kwargs or {}))
                for x in filter(_is_tensor, tree_leaves(results)):
                    live._add(x)
                return results

        with Watch():  # type: ignore[no-untyped-call]
            yield

    def _add(self, x: Tensor) -> None:
        storage, key = x.untyped_storage(), _key(x)
        if key in self._seen:
            return
        self._seen.add(key)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key, storage.nbytes()).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


def _is_tensor(x: object) -> bool:
    return hasattr(x, "untyped_storage")


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)
