"""The rows of the parity matrix.

First each axis and each engine alone, which is what a failure is looked up in; then mixes, so that every
engine has met every two of the things that a run may ask for beside it. ``coverage`` refuses a run that asks
for more.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from trellis_dist.training.parity.cases import BF16, FEW_STEPS, Case, OperationCase

__all__ = ["CASES", "cases_at", "find_case", "has_compiler"]

_Settings = dict[str, Any]


def cases_at(world_size: int) -> tuple[Case | OperationCase, ...]:
    """``CASES`` and what only makes sense where a job will run.

    Segments over all ranks, so that state passing crosses every link between machines, which sp 2 and 4 may
    not; and graphs by inductor, which needs a compiler.
    """
    line: tuple[Case | OperationCase, ...] = ()
    if world_size > 4:
        sp = world_size
        line = (OperationCase(sp=sp), Case(name=f"sp{sp} packed", sp=sp, packed=True, steps=FEW_STEPS))
    inductor = Case(name="sp2 inductor", sp=2, packed=True, compile="inductor", steps=FEW_STEPS)
    return (*CASES, *line, inductor)


def has_compiler() -> bool:
    """Whether this machine has a C++ compiler, which inductor asks for."""
    return any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))


def find_case(name: str) -> Case | OperationCase:
    """The case called ``name``; ``KeyError`` when there is none."""
    return {case.name: case for case in CASES}[name]


def _local() -> list[Case]:
    """Plain torch: what the meshes themselves do."""
    return [
        Case(name="dp", replicas=2),
        Case(name="dp packed", replicas=2, packed=True),
        Case(name="sp2", sp=2),
        Case(name="sp2 packed", sp=2, packed=True),
        Case(name="sp4", sp=4),
        Case(name="sp4 packed", sp=4, packed=True),
        Case(name="sp2 all-to-all", sp=2, mode="all_to_all"),
        Case(name="sp2 all-to-all packed", sp=2, mode="all_to_all", packed=True),
        Case(name="sp2 attention", sp=2, model="hybrid", packed=True),
        Case(name="tp2", tp=2),
        Case(name="tp2 packed", tp=2, packed=True),
        Case(name="tp2 attention", tp=2, model="hybrid", packed=True),
        Case(name="tp2 sequence-parallel", tp=2, sequence_parallel=True),
        Case(name="tp2 sequence-parallel packed", tp=2, sequence_parallel=True, packed=True),
        Case(name="tp2 sp2", tp=2, sp=2),
        Case(name="tp2 sp2 packed", tp=2, sp=2, packed=True),
        Case(name="tp2 sp2 sequence-parallel", tp=2, sp=2, sequence_parallel=True, packed=True),
        Case(name="tp2 sp2 all-to-all", tp=2, sp=2, mode="all_to_all", packed=True),
        Case(
            name="tp2 sp2 all-to-all sequence-parallel",
            tp=2,
            sp=2,
            mode="all_to_all",
            sequence_parallel=True,
            model="hybrid",
            packed=True,
        ),
        Case(name="sp2 accumulation 4", sp=2, packed=True, accumulation=4),
        Case(name="sp2 adamw", sp=2, packed=True, optimizer="adamw"),
        Case(name="dp carried", replicas=2, carried=True),
        Case(name="tp2 adamw", tp=2, sequence_parallel=True, packed=True, optimizer="adamw"),
    ]


def _recomputed() -> list[Case]:
    """When something is computed must not change a bit of it."""
    rows: dict[str, _Settings] = {
        "sp2 packed": {"sp": 2},
        "sp2 all-to-all packed": {"sp": 2, "mode": "all_to_all"},
        "tp2 sequence-parallel packed": {"tp": 2, "sequence_parallel": True},
    }
    return [
        Case(
            name=f"{name} {kind}",
            packed=True,
            steps=FEW_STEPS,
            same_bits_as=name,
            activation_checkpointing=kind,
            **row,
        )
        for name, row in rows.items()
        for kind in ("full", "selective")
    ]


_ENGINES: dict[str, _Settings] = {
    "local": {},
    **{f"zero{stage}": {"engine": "deepspeed", "zero_stage": stage} for stage in range(4)},
    "fsdp2": {"engine": "fsdp2"},
}


def _sharded() -> list[Case]:
    """Engines that divide state over data-parallel ranks."""
    divided = {name: engine for name, engine in _ENGINES.items() if name != "local"}
    triple: _Settings = {
        "replicas": 2,
        "sp": 2,
        "tp": 2,
        "accumulation": 2,
        "activation_checkpointing": "full",
    }
    return [
        *(Case(name=f"{name} dp", replicas=2, packed=True, **engine) for name, engine in divided.items()),
        *(Case(name=f"{name} dp sp2", replicas=2, sp=2, packed=True, **e) for name, e in divided.items()),
        Case(name="zero1 dp tp2", replicas=2, tp=2, packed=True, **_ENGINES["zero1"]),
        Case(
            name="zero1 tp2 sequence-parallel", tp=2, sequence_parallel=True, packed=True, **_ENGINES["zero1"]
        ),
        Case(name="zero1 dp sp2 tp2", packed=True, **triple, **_ENGINES["zero1"]),
    ]


_DP: _Settings = {"replicas": 2}
_SP: _Settings = {"sp": 2}
_HEADS: _Settings = {"sp": 2, "mode": "all_to_all"}
_TP: _Settings = {"tp": 2}
_TOKENS: _Settings = {"tp": 2, "sequence_parallel": True}
_FULL: _Settings = {"activation_checkpointing": "full"}
_SELECTIVE: _Settings = {"activation_checkpointing": "selective"}
_COMPILE: _Settings = {"compile": "aot_eager"}
_OFFLOAD: _Settings = {"offload_optimizer": True}
_AHEAD: _Settings = {"accumulation": 2, "forwards_first": 2}
_ATTENTION: _Settings = {"model": "hybrid"}
_ADAMW: _Settings = {"optimizer": "adamw"}
_CARRIED: _Settings = {"carried": True}
_BF16: _Settings = {"precision": "bf16", "tolerance": BF16}

# Any two of these things meet in one row. Half of the rows are plain SGD, where no gradient's scale can hide.
_MIXES: dict[str, _Settings] = {
    "dp, tp2 sequence-parallel, selective, carried": _DP | _TOKENS | _SELECTIVE | _CARRIED,
    "sp2 all-to-all, tp2": _HEADS | _TP,
    "dp, sp2 all-to-all, full, adamw": _DP | _HEADS | _FULL | _ADAMW,
    "dp, tp2, full, offload, ahead, carried": _DP | _TP | _FULL | _OFFLOAD | _AHEAD | _CARRIED,
    "sp2, tp2, selective": _SP | _TP | _SELECTIVE,
    "dp, sp2, selective, compile, attention": _DP | _SP | _SELECTIVE | _COMPILE | _ATTENTION,
    "sp2, tp2 sequence-parallel, full, offload, ahead": _SP | _TOKENS | _FULL | _OFFLOAD | _AHEAD,
    "dp, tp2, full, compile, offload, ahead, attention": (
        _DP | _TP | _FULL | _COMPILE | _OFFLOAD | _AHEAD | _ATTENTION | _ADAMW
    ),
    "sp2 all-to-all, tp2 sequence-parallel, selective, compile, offload, ahead, attention": (
        _HEADS | _TOKENS | _SELECTIVE | _COMPILE | _OFFLOAD | _AHEAD | _ATTENTION | _ADAMW
    ),
}
_COMPILED_EVERYWHERE = "dp, sp2, selective, compile, attention"
# bf16 with each of them, in rows of its own: its rounding hides what is small.
_BF16_MIXES: dict[str, _Settings] = {
    "dp, sp2, full, offload, ahead, bf16": _DP | _SP | _FULL | _OFFLOAD | _AHEAD | _BF16,
    "dp, tp2 sequence-parallel, adamw, carried, bf16": _DP | _TOKENS | _ADAMW | _CARRIED | _BF16,
    "sp2 all-to-all, tp2, selective, compile, attention, bf16": (
        _HEADS | _TP | _SELECTIVE | _COMPILE | _ATTENTION | _BF16
    ),
}


def _mixes() -> list[Case]:
    """Each engine with several things at once, without what is refused for it at start-up."""
    rows = []
    for name, engine in _ENGINES.items():
        bf16 = {} if name == "zero0" else _BF16_MIXES  # ZeRO 0 has no master weights
        for words, mix in (_MIXES | bf16).items():
            settings = {**engine, "packed": True, **mix}
            if name == "zero0":  # and divides nothing that could be offloaded
                words, settings["offload_optimizer"] = words.replace(" offload,", ""), False
            # ZeRO 3 calls hooks inside a block, which no graph may hold. For the others one row shows that
            # engine and graphs agree; what graphs do to the rest of the model depends on no engine.
            if name == "zero3" or (name != "local" and words != _COMPILED_EVERYWHERE):
                words, settings["compile"] = words.replace(" compile,", ""), "none"
            rows.append(Case(name=f"{name}, {words}", steps=FEW_STEPS, **settings))
    return rows


CASES: tuple[Case | OperationCase, ...] = (
    OperationCase(sp=2),
    OperationCase(sp=4),
    *_local(),
    *_recomputed(),
    *_sharded(),
    *_mixes(),
)
