"""Initial weights, drawn from (seed, parameter name, global index) only.

Every parameter gets its own generator, so neither the order of construction nor the mesh changes a value: a
tensor-parallel rank draws the whole tensor and keeps its slice. Draws are fp32 on the CPU whatever the
parameter's dtype and device.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trellis_dist.models.parallel_kind import ParallelKind, declare

__all__ = [
    "Constant",
    "Identity",
    "Initial",
    "InverseSoftplus",
    "LogUniform",
    "Normal",
    "Ramp",
    "initialise",
    "new_parameter",
]


@dataclass(frozen=True)
class Normal:
    """Independent draws from N(0, std^2)."""

    std: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """fp32 tensor of ``shape``."""
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").mul_(self.std)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """fp32 tensor of ``shape``; draws nothing."""
        return torch.full(shape, self.value, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Identity:
    """Ones on the diagonal of the last two dimensions."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """fp32 tensor of ``shape``; draws nothing."""
        rows, columns = shape[-2:]
        return torch.eye(rows, columns, dtype=torch.float32, device="cpu").expand(shape).clone()


@dataclass(frozen=True)
class LogUniform:
    """log u with u uniform in [low, high]: a rate that is handed around as its logarithm."""

    low: float
    high: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """fp32 tensor of ``shape``."""
        draws = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        return (self.low + (self.high - self.low) * draws).log_()


@dataclass(frozen=True)
class InverseSoftplus:
    """b with softplus(b) = e^u, u uniform in [log low, log high]: a step size's bias, as in Mamba."""

    low: float
    high: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """fp32 tensor of ``shape``."""
        draws = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        step = (math.log(self.low) + (math.log(self.high) - math.log(self.low)) * draws).exp_()
        return step + torch.log(-torch.expm1(-step))


@dataclass(frozen=True)
class Ramp:
    """RWKV-7's biases: from ``low`` to ``high`` over all channels, and up and down again within each head.

    Channel n of N has low + (high - low) (n / (N - 1))^power + zigzag z |z|, z from -1 to 1 over its head.

    Attributes:
        low, high, power, zigzag: as above.
        width: channels of a head.
    """

    low: float
    high: float
    width: int
    power: float = 1.0
    zigzag: float = 0.0

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """fp32 tensor of ``shape``; draws nothing."""
        channels = shape.numel()
        across = torch.linspace(0, 1, channels, dtype=torch.float32, device="cpu") ** self.power
        within = torch.linspace(-1, 1, self.width, dtype=torch.float32, device="cpu")
        ridge = self.zigzag * (within * within.abs()).repeat(channels // self.width)
        return (self.low + (self.high - self.low) * across + ridge).view(shape)


Initial = Normal | Constant | Identity | LogUniform | InverseSoftplus | Ramp


def new_parameter(*shape: int, initial: Initial, kind: ParallelKind, dim: int | None = None) -> nn.Parameter:
    """An uninitialised parameter that carries its initial distribution and its tensor-parallel kind.

    ``dim`` is the dimension a sharded parameter is split along. ``initialise`` fills in the values.
    """
    parameter = declare(nn.Parameter(torch.empty(*shape)), kind, dim=dim)
    parameter.initial = initial  # type: ignore[attr-defined]
    return parameter


def initialise(model: nn.Module, seed: int) -> None:
    """Overwrite every parameter of ``model`` with its initial draw.

    Raises:
        ValueError: a parameter declares no initial distribution (it was not made by ``new_parameter``).
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initial = getattr(parameter, "initial", None)
            if initial is None:
                raise ValueError(f"parameter {name} has no initial distribution: make it with new_parameter")
            parameter.copy_(initial.draw(parameter.shape, _generator(seed, name)))


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator seeded by sha256(seed, name): unrelated streams for unrelated names."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
