"""Gates and memory norms of every Trellis layer while a text is read from its beginning.

The text goes through ``LanguageModel.prefill`` piece by piece, as a long prompt does. beta and gamma are
taken from what the mixer hands to its operation, norms from the state after each piece.

Shapes: B rows, T tokens, L Trellis layers, H heads, P pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trellis_dist.models.language_model import LanguageModel
from trellis_dist.models.mixers.trellis import TrellisMixer

__all__ = ["Trace", "held_open", "trace", "trellis_mixers"]

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """What was seen while rows were read; fp32, on the CPU.

    Attributes:
        layers: numbers of the Trellis layers.
        log_gate: log beta of the key pass [B, L, H, T], 0 or less; ``gate`` is beta itself, in (0, 1].
        log_value_gate: the same of the value pass where it has its own, else None.
        step: gamma of the key pass [B, L, H, T].
        ends: tokens read when the norms were taken, P of them.
        key_norm, value_norm: Frobenius norms of S and R [B, L, H, P].
    """

    layers: tuple[int, ...]
    log_gate: Tensor
    log_value_gate: Tensor | None
    step: Tensor
    ends: tuple[int, ...]
    key_norm: Tensor
    value_norm: Tensor

    @property
    def gate(self) -> Tensor:
        """Beta of the key pass."""
        return self.log_gate.exp()

    @property
    def value_gate(self) -> Tensor | None:
        """Beta of the value pass where it has its own."""
        return None if self.log_value_gate is None else self.log_value_gate.exp()


def trellis_mixers(model: LanguageModel) -> dict[int, TrellisMixer]:
    """Trellis layers by their number."""
    mixers = {layer: block.mixer for layer, block in enumerate(model.blocks)}
    return {layer: mixer for layer, mixer in mixers.items() if isinstance(mixer, TrellisMixer)}


def trace(model: LanguageModel, tokens: Tensor, *, piece: int) -> Trace:
    """Read ``tokens`` [B, T] from an empty state, ``piece`` at a time.

    Raises:
        ValueError: the model has no Trellis layer, or what ``LanguageModel.prefill`` raises.
    """
    mixers = trellis_mixers(model)
    if not mixers:
        raise ValueError(f"model.pattern = {list(model.config.pattern)} has no Trellis layer: no gate to see")
    taken: dict[int, list[Inputs]] = {layer: [] for layer in mixers}

    def note(layer: int, inputs: Inputs) -> Inputs:
        taken[layer].append({name: x for name, x in inputs.items() if name in _GATES})
        return inputs

    norms, ends, state = [], [], model.init_state(len(tokens))
    with _changed(mixers, note):
        for start in range(0, tokens.shape[1], piece):
            _, state = model.prefill(tokens[:, start : start + piece], state, last_only=True)
            norms.append([_norms(state.layers[layer]) for layer in mixers])
            ends.append(state.position)
    gate = _joined(taken, "log_decay")
    step = _joined(taken, "step_size")
    assert gate is not None, "the operation takes a log_decay"
    assert step is not None, "the operation takes a step_size"
    key_norm, value_norm = torch.stack([torch.stack(both, 2) for both in norms], -1).unbind(0)
    return Trace(
        layers=tuple(mixers),
        log_gate=gate,
        log_value_gate=_joined(taken, "value_log_decay"),
        step=step,
        ends=tuple(ends),
        key_norm=key_norm,
        value_norm=value_norm,
    )


_GATES = ("log_decay", "value_log_decay", "step_size")


def _norms(state: Any) -> Tensor:
    """|S| and |R| of one layer's state: [2, B, H]."""
    pair = (state.memory.key_memory, state.memory.value_memory)
    return torch.stack([memory.float().flatten(2).norm(dim=2).cpu() for memory in pair])


def _joined(taken: dict[int, list[Inputs]], name: str) -> Tensor | None:
    """[B, L, H, T] of what each piece has as [B, T, H]; None where the mixers have none of that name."""
    if any(name not in piece for pieces in taken.values() for piece in pieces):
        return None
    layers = [torch.cat([piece[name].float().cpu() for piece in pieces], 1) for pieces in taken.values()]
    return torch.stack(layers, 1).transpose(2, 3)


@contextlib.contextmanager
def held_open(model: LanguageModel, layers: Sequence[int]) -> Iterator[None]:
    """Within it these layers forget nothing: beta = 1 in both passes, whatever their gates say."""

    def opened(_: int, inputs: Inputs) -> Inputs:
        gates = {name: torch.zeros_like(x) for name, x in inputs.items() if name.endswith("log_decay")}
        return {**inputs, **gates}

    mixers = trellis_mixers(model)
    with _changed({layer: mixers[layer] for layer in layers}, opened):
        yield


@contextlib.contextmanager
def _changed(mixers: dict[int, TrellisMixer], change: Callable[[int, Inputs], Inputs]) -> Iterator[None]:
    """Within it ``change`` stands between what each mixer makes of its tokens and its operation."""

    def wrapped(own: Callable[..., Inputs], layer: int, *positional: Any, **named: Any) -> Inputs:
        return change(layer, own(*positional, **named))

    try:
        for layer, mixer in mixers.items():
            mixer._inputs = partial(wrapped, mixer._inputs, layer)  # type: ignore[method-assign]
        yield
    finally:
        for mixer in mixers.values():
            mixer.__dict__.pop("_inputs", None)
