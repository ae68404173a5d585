"""What there is to run: a series and its split; models, horizons and seeds; what tells runs apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from trellis_dist.files import digest, sha256_file
from trellis_dist.forecasting.models import Shape, settings_of
from trellis_dist.forecasting.series import Series, read_series
from trellis_dist.forecasting.windows import Splits, borders_of, split

__all__ = ["FILES", "Case", "Data", "cases_of", "identity_of", "open_data"]

# What the files of known series are called in a folder of them.
FILES = {
    "etth1": "ETTh1.csv",
    "etth2": "ETTh2.csv",
    "ettm1": "ETTm1.csv",
    "ettm2": "ETTm2.csv",
    "exchange": "exchange_rate.txt.gz",
}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        model: a name of ``models.build``.
        horizon: steps to forecast.
        seed: of weights, windows and dropout.
        rates: learning rates to try; the one with the best validation error counts. Empty: the model's own.
        changed: (name, value) of what else in ``ForecastTraining`` is not the model's own.
    """

    model: str
    horizon: int
    seed: int
    rates: tuple[float, ...] = ()
    changed: tuple[tuple[str, Any], ...] = ()

    def folder(self, out: Path) -> Path:
        """Where it lies under ``out``."""
        tried = "".join(f"-{rate:g}" for rate in self.rates)
        name = f"seed-{self.seed}" + (f"-rates{tried}" if tried else "")
        name += "".join(f"-{key}-{'all' if value is None else value}" for key, value in self.changed)
        return out / f"h{self.horizon}" / self.model / name

    def __str__(self) -> str:
        return f"{self.model}, horizon {self.horizon}, seed {self.seed}"


@dataclass(frozen=True)
class Data:
    """A series from a file, how it is split, and how far models look back.

    Attributes:
        dataset: a name of ``FILES``, or "csv".
        sha256: of the file.
        borders: rows of training, validation and test.
    """

    dataset: str
    sha256: str
    series: Series
    borders: tuple[int, int, int]
    look_back: int

    def splits(self, horizon: int) -> Splits:
        """Its windows. Raises ValueError where a part is too short for one."""
        return split(self.series, self.borders, look_back=self.look_back, horizon=horizon)

    def shape(self, horizon: int) -> Shape:
        """What a model has to fit."""
        return Shape(self.look_back, horizon, self.series.values.shape[1])

    def record(self) -> dict[str, Any]:
        """What decides the windows, as JSON takes it."""
        rows, channels = self.series.values.shape
        kept = {"dataset": self.dataset, "sha256": self.sha256, "look_back": self.look_back}
        return {**kept, "borders": list(self.borders), "rows": rows, "channels": channels}


def open_data(
    path: Path,
    *,
    dataset: str,
    look_back: int = 336,
    fractions: tuple[float, float, float] | None = None,
) -> Data:
    """The data in a file, or in the file of a known series in a folder, split as ``windows.borders_of`` says.

    Raises:
        ValueError: what ``read_series`` and ``borders_of`` raise.
    """
    if path.is_dir() and dataset in FILES:
        path = path / FILES[dataset]
    series = read_series(path)
    borders = borders_of(len(series.values), dataset=dataset, fractions=fractions)
    return Data(dataset, sha256_file(path), series, borders, look_back)


def cases_of(
    *,
    models: Sequence[str],
    horizons: Sequence[int],
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    changed: Mapping[str, Any] | None = None,
    dataset: str = "csv",
) -> list[Case]:
    """Every combination once: all models of one horizon and seed before the next, so that they compare.

    On a known series DLinear keeps the rate of its authors, whatever ``rates`` the others try.
    """
    tried, other = tuple(dict.fromkeys(rates)), tuple(sorted((changed or {}).items()))
    found = [
        Case(model, horizon, seed, () if model == "dlinear" and dataset in FILES else tried, other)
        for seed, horizon, model in product(seeds, horizons, models)
    ]
    return list(dict.fromkeys(found))


def identity_of(case: Case, data: Mapping[str, Any], *, device: str = "cpu") -> str:
    """A digest of all that decides the result of a run; ``data``: what ``Data.record`` gives."""
    shape = Shape(data["look_back"], case.horizon, data["channels"])
    settings = settings_of(case.model, shape, dataset=data["dataset"])
    more: dict[str, Any] = {"rates": list(case.rates)} if case.rates else {}
    more |= {"changed": dict(case.changed)} if case.changed else {}
    more |= {"device": device} if device != "cpu" else {}
    return digest({"settings": settings, "seed": case.seed, "data": dict(data), **more})
