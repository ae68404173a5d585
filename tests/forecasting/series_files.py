"""Series for the tests: ETTh1 where it lies beside the checkout, and what can be learned."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from trellis_dist.forecasting.cases import Data
from trellis_dist.forecasting.series import Series

SHARED = Path(__file__).resolve().parents[3] / "shared/data/timeseries"


def etth1(folder: Path) -> Path:
    """The real file, or one of its shape where it is absent."""
    real = SHARED / "ETTh1.csv"
    return real if real.is_file() else write_csv(folder / "etth1.csv", waves(17420, channels=7))


def exchange(folder: Path) -> Path:
    """As ``etth1``: no header, no date."""
    real = SHARED / "exchange_rate.txt.gz"
    return real if real.is_file() else write_csv(folder / "exchange.csv", waves(7588, channels=8), date=False)


def waves(rows: int, *, channels: int) -> Tensor:
    """A wave of period 12 and another phase for each channel, with noise of a tenth of it."""
    time = torch.arange(rows, dtype=torch.float64)[:, None] * (2 * math.pi / 12)
    noise = torch.randn(rows, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.sin(time + torch.arange(channels)) + 0.1 * noise


def write_csv(path: Path, values: Tensor, *, date: bool = True) -> Path:
    """With a header and a date column, or without both."""
    rows = [",".join(map(repr, row)) for row in values.tolist()]
    if date:
        header = ",".join(["date", *(f"C{index}" for index in range(values.shape[1]))])
        rows = [header, *(f"2016-07-01 00:00:00,{row}" for row in rows)]
    path.write_text("\n".join(rows) + "\n")
    return path


def wave_data(*, rows: int = 400, channels: int = 2, look_back: int = 24) -> Data:
    """``waves`` in memory, split 70/10/20."""
    series = Series(tuple(map(str, range(channels))), waves(rows, channels=channels))
    train, test = int(rows * 0.7), int(rows * 0.2)
    return Data("csv", "0" * 64, series, (train, rows - train - test, test), look_back)
