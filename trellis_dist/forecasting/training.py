"""One training: epochs of Adam, the best weights by validation error, and all of it as tensors to save.

An epoch depends on its number, the seed and the state before it alone (its windows and its dropout are drawn
from those), so a training that goes on from what was saved gives the bits of one that never stopped (on a GPU
as far as its kernels repeat theirs).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trellis_dist.forecasting.models import ForecastTraining
from trellis_dist.forecasting.windows import Splits, Windows

__all__ = ["Errors", "Training", "errors_of", "usable_device"]

# Windows scored at once; it changes no result beyond rounding.
SCORED = 64


def usable_device(name: str) -> torch.device:
    """ "cpu" or "cuda". Raises ValueError for "cuda" where torch sees none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device: use --device cpu")
    return torch.device(name)


@dataclass(frozen=True)
class Errors:
    """Mean squared and mean absolute error over windows, steps and channels, on standardised data."""

    mse: float
    mae: float


@torch.no_grad()
def errors_of(model: nn.Module, windows: Windows, *, every: int = 1) -> Errors:
    """Errors over one window in ``every``, summed in fp64."""
    model.eval()
    squared = absolute = 0.0
    chosen = torch.arange(0, len(windows), every)
    for indices in chosen.split(SCORED):
        x, y = windows.batch(indices)
        difference = model(x) - y
        squared += float(difference.square().sum(dtype=torch.float64))
        absolute += float(difference.abs().sum(dtype=torch.float64))
    count = len(chosen) * windows.horizon * windows.rows.shape[1]
    return Errors(squared / count, absolute / count)


@dataclass
class Training:
    """Call ``epoch`` until ``finished``; then ``model`` after ``take_best`` is the result.

    Attributes:
        model: the weights being trained, on the device of the windows.
        epochs: validation MSE after each epoch so far.
        seconds: spent in epochs, over all starts; the caller adds them.
    """

    model: nn.Module
    splits: Splits
    settings: ForecastTraining
    seed: int
    epochs: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=self.settings.learning_rate)
        self._best = self._copy()

    @property
    def best_epoch(self) -> int:
        """0-based; the first of equals."""
        return min(range(len(self.epochs)), key=lambda epoch: self.epochs[epoch])

    @property
    def finished(self) -> bool:
        """All epochs are done, validation has not improved for ``patience`` of them, or it diverged."""
        done = len(self.epochs)
        waited = done > 0 and done - 1 - self.best_epoch >= self.settings.patience
        return done >= self.settings.epochs or waited or self.diverged

    @property
    def diverged(self) -> bool:
        """Whether the validation error after the last epoch is not finite."""
        return bool(self.epochs) and not math.isfinite(self.epochs[-1])

    def epoch(self) -> None:
        """Train on the windows of this epoch, in its order, and validate; an error not finite is inf."""
        number = len(self.epochs)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.settings.decay ** max(number - 1, 0)
        with torch.random.fork_rng():
            torch.manual_seed(_stream(self.seed, number))
            order = torch.randperm(len(self.splits.train))[: self.settings.windows]
            for indices in _whole_batches(order, self.settings.batch_size):
                self._step(*self.splits.train.batch(indices))
        error = errors_of(self.model, self.splits.validation, every=self.settings.validation_every).mse
        self.epochs.append(error if math.isfinite(error) else math.inf)
        if self.best_epoch == number:
            self._best = self._copy()

    def _step(self, x: Tensor, y: Tensor) -> None:
        self.model.train()
        loss = (self.model(x) - y).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self._optimizer.step()

    def take_best(self) -> nn.Module:
        """The model with the weights of the best epoch."""
        self.model.load_state_dict(self._best)
        return self.model

    def tensors(self) -> dict[str, Tensor]:
        """Weights, best weights and both moments of every parameter, by name."""
        found = {f"model/{name}": value for name, value in self._copy().items()}
        found |= {f"best/{name}": value for name, value in self._best.items()}
        for name, state in self._moments().items():
            found |= {f"adam/{name}/{key}": value.clone() for key, value in state.items()}
        return found

    def record(self) -> dict[str, Any]:
        """The rest of the state, as JSON takes it."""
        return {"epochs": list(self.epochs), "seconds": self.seconds}

    def load(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on from what ``tensors`` and ``record`` gave."""
        names = list(self.model.state_dict())
        self.model.load_state_dict({name: tensors[f"model/{name}"] for name in names})
        self._best = {name: tensors[f"best/{name}"].clone() for name in names}
        for name, parameter in self.model.named_parameters():
            moments = {key: tensors[f"adam/{name}/{key}"] for key in ("exp_avg", "exp_avg_sq")}
            moved = {key: value.to(parameter.device, copy=True) for key, value in moments.items()}
            # Adam counts its steps on the CPU.
            self._optimizer.state[parameter] = {**moved, "step": tensors[f"adam/{name}/step"].clone()}
        self.epochs, self.seconds = list(record["epochs"]), float(record["seconds"])

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        return {name: self._optimizer.state[p] for name, p in self.model.named_parameters()}

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def _whole_batches(order: Tensor, size: int) -> list[Tensor]:
    """``order`` in batches, an incomplete last one left out unless it is the only one."""
    batches = list(order.split(size))
    return batches if len(batches) == 1 or len(batches[-1]) == size else batches[:-1]


def _stream(seed: int, epoch: int) -> int:
    """Unrelated draws for every seed and epoch."""
    digest = hashlib.sha256(f"{seed}\0forecast epoch {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
