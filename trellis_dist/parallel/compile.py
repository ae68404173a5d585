"""torch.compile, block by block; whatever talks to other ranks stays outside of every graph.

Blocks of one kind share their graphs, so compilation time does not grow with the number of layers.

    sp = tp = 1                     one graph for a block (softmax attention and the recurrent baselines:
                                    before and after the operation)
    sp > 1 or tp > 1                graphs between the calls that communicate
    selective recomputation         graphs of the parts that are recomputed, and of what lies between

Dynamo refuses point-to-point operations, and tracing the autograd.Functions that make transfers would move
them; so those are called from between graphs. Recomputation is eager and calls compiled code, never the other
way round: the tape is set and read outside of graphs too.
"""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels import compress_kv
from trellis_dist.models import region as regions
from trellis_dist.models.block import Block
from trellis_dist.models.conv import causal_conv
from trellis_dist.models.linear import linear, linear_joined
from trellis_dist.models.mixers.attention import causal_attention
from trellis_dist.models.region import Region

__all__ = ["apply_compile"]

Backend = str | Callable[..., Any]

# What a model calls where nothing replaced it; everything else came from parallel/ and communicates. Softmax
# attention is not among them: its calls, one for each document, would make another graph of each number.
_INSIDE = (compress_kv, causal_conv, linear, linear_joined)
_REPLACEABLE = ("operation", "convolution", "column", "row")


def apply_compile(model: nn.Module, *, backend: Backend) -> None:
    """Compile every block of ``model``, in place, after everything else was applied to it.

    Args:
        backend: of torch.compile, "inductor" or "aot_eager" by name or a function; "none" compiles nothing.

    Raises:
        ValueError: "inductor" on a CPU without a C++ compiler or Python's headers.
    """
    if backend == "none":
        return
    if backend == "inductor" and any(parameter.device.type == "cpu" for parameter in model.parameters()):
        _check_compiler()
    # Recomputing must run the graph that ran first: another one may keep other tensors. Graphs are tried in
    # the order they were made; by default the last one used comes first, and it may be another micro-batch's.
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]
    # Sizes that depend on where documents start are no reason to leave a graph.
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    # All layers count together; kinds of layers, packed or not, training or evaluation soon make more than 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in model.modules():
        if isinstance(block, Block):
            _compile_block(block, backend)


def _check_compiler() -> None:
    from torch._inductor.config import cpp

    found = [compiler for compiler in cpp.cxx if compiler is not None and shutil.which(compiler)]
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = "no C++ compiler" if not found else f"no {headers}" if not headers.is_file() else None
    if missing is not None:
        raise ValueError(
            f'training.compile = "inductor" generates C++ on a CPU and found {missing}: install g++ and '
            "Python's headers (python3-dev; CXX names another compiler), or set training.compile = "
            '"aot_eager" or "none"'
        )


def _compile_block(block: Block, backend: Backend) -> None:
    mixer: Any = block.mixer
    for module in (mixer, block.mlp):
        _take_out(module)
    if mixer.region is not regions.call:
        mixer.region = _CompiledRegion(mixer.region, backend)
        block.region = _CompiledRegion(block.region, backend)
    block.whole = _CompiledRegion(block.whole, backend)


def _take_out(module: nn.Module) -> None:
    """Keep outside of graphs what ``module`` calls and they should not hold."""
    for name in _REPLACEABLE:
        function = getattr(module, name, None)
        if function is not None and function not in _INSIDE:
            setattr(module, name, torch.compiler.disable(function, reason=_reason(function)))


def _reason(function: object) -> str:
    """Why no graph holds ``function``."""
    if function is causal_attention:
        return "goes document by document"
    if getattr(function, "__module__", "").startswith("kernels.baselines"):
        return "goes chunk by chunk"  # in Python: each number of chunks would be another graph
    return "communicates"


class _CompiledRegion:
    """A region whose parts are compiled: what was a region before, recomputation, stays around them."""

    def __init__(self, region: Region, backend: Backend) -> None:
        self._region, self._backend = region, backend
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    @torch.compiler.disable(reason="recomputation is eager")  # type: ignore[untyped-decorator]
    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if function not in self._compiled:
            # Not fullgraph: a run should not end at the first input that is one compilation too many.
            self._compiled[function] = torch.compile(function, backend=self._backend)
        return self._region(self._compiled[function], *args)
