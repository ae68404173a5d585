"""Splits, scales and windows, exactly as Informer, Autoformer and DLinear cut them.

Training, validation and test follow each other in time. A window is look-back steps and the horizon after
them; the windows of validation and test look back across the border, so that the first step of the part is
also the first that is forecast. Every window counts: those authors' loaders leave out an incomplete last
batch of the test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trellis_dist.forecasting.series import Series
from trellis_dist.validation import require

__all__ = ["BORDERS", "FRACTIONS", "Splits", "Windows", "borders_of", "split"]

# Rows of training, validation and test: 12, 4 and 4 months of 30 days, of hours or quarters of them; the
# last rows go unused.
HOURS = (12 * 30 * 24, 4 * 30 * 24, 4 * 30 * 24)
QUARTERS = (4 * HOURS[0], 4 * HOURS[1], 4 * HOURS[2])
BORDERS = {"etth1": HOURS, "etth2": HOURS, "ettm1": QUARTERS, "ettm2": QUARTERS}
# Shares of training, validation and test of the others.
FRACTIONS = (0.7, 0.1, 0.2)


@dataclass(frozen=True)
class Windows:
    """Every window of one part.

    Attributes:
        rows: fp32 [n, C], standardised; validation and test begin ``look_back`` rows before their border.
        look_back, horizon: steps of a window.
    """

    rows: Tensor
    look_back: int
    horizon: int

    def __len__(self) -> int:
        return max(0, len(self.rows) - self.look_back - self.horizon + 1)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """What is read [b, look_back, C] and what follows [b, horizon, C] of the windows ``indices`` [b]."""
        steps = self.rows.unfold(0, self.look_back + self.horizon, 1)[indices.to(self.rows.device)]
        steps = steps.transpose(1, 2)
        return steps[:, : self.look_back], steps[:, self.look_back :]

    def to(self, device: torch.device) -> Windows:
        """The same on another device."""
        return replace(self, rows=self.rows.to(device))


@dataclass(frozen=True)
class Splits:
    """Attributes:
    train, validation, test: windows on data standardised by the training rows.
    mean, deviation: fp64 [C] of the training rows, with which a forecast is scaled back.
    """

    train: Windows
    validation: Windows
    test: Windows
    mean: Tensor
    deviation: Tensor

    def counts(self) -> dict[str, int]:
        """Windows of each part."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}

    def to(self, device: torch.device) -> Splits:
        """The same windows on another device; the scale stays where it is."""
        train, validation, test = (part.to(device) for part in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)


def borders_of(
    rows: int, *, dataset: str, fractions: tuple[float, float, float] | None = None
) -> tuple[int, int, int]:
    """Rows of training, validation and test of a series of ``rows``.

    The ETT series have fixed ones. Of the others, training and test are rounded down and validation is the
    rest.

    Args:
        fractions: of training, validation and test; None: FRACTIONS.

    Raises:
        ValueError: fewer rows than the ETT series has, fractions for one, or fractions that are not three
            positive shares of 1.
    """
    if dataset in BORDERS:
        borders = BORDERS[dataset]
        require(fractions is None, f"--fractions says nothing of {dataset}, whose rows are fixed: "
                "leave it out, or use --dataset csv")  # fmt: skip
        require(rows >= sum(borders), f"{rows} rows are fewer than the {sum(borders)} of {dataset}: "
                "give its whole file, or use --dataset csv")  # fmt: skip
        return borders
    fractions = FRACTIONS if fractions is None else fractions
    require(
        len(fractions) == 3 and min(fractions) > 0 and abs(sum(fractions) - 1) < 1e-9,
        f"fractions {fractions}: give three positive shares that add up to 1, such as 0.7,0.1,0.2",
    )
    train, test = int(rows * fractions[0]), int(rows * fractions[2])
    return train, rows - train - test, test


def split(series: Series, borders: tuple[int, int, int], *, look_back: int, horizon: int) -> Splits:
    """The windows of a series, standardised per channel by mean and deviation of the training rows.

    A channel that is constant in training is only shifted.

    Raises:
        ValueError: a part is too short for one window.
    """
    train, validation, test = borders
    known = series.values[:train]
    require(
        train >= look_back, f"{train} training rows are fewer than look_back = {look_back}: use a shorter one"
    )
    mean, deviation = known.mean(0), known.std(0, correction=0)
    # A constant such as 0.1 has a mean that is rounded, and so a deviation of some 1e-17.
    constant = deviation <= 1e-12 * mean.abs()
    deviation = torch.where(constant, torch.ones_like(deviation), deviation)
    scaled = ((series.values - mean) / deviation).float()
    ends = (train, train + validation, train + validation + test)
    starts = (0, train - look_back, train + validation - look_back)
    parts = [Windows(scaled[a:b], look_back, horizon) for a, b in zip(starts, ends, strict=True)]
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        require(
            len(part) > 0,
            f"the {name} part has {len(part.rows)} rows, too few for one window of {look_back} + {horizon}: "
            "use a shorter horizon or look-back, or another --fractions",
        )
    return Splits(parts[0], parts[1], parts[2], mean, deviation)
