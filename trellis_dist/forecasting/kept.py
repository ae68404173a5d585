"""Files of a run: tensors with a record beside them, the finished model, and its forecast."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trellis_dist.files import atomic_write, digest
from trellis_dist.forecasting.cases import Data
from trellis_dist.forecasting.models import Shape, build, settings_of
from trellis_dist.forecasting.windows import Splits

__all__ = ["FORECAST", "MODEL", "load_model", "load_tensors", "save_model", "save_tensors"]

MODEL, FORECAST = "model.safetensors", "forecast.csv"


def save_model(folder: Path, name: str, model: nn.Module, data: Data, splits: Splits) -> None:
    """Write the model called ``name`` with the scale of its data, and its forecast of what comes."""
    shape = data.shape(splits.test.horizon)
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    tensors |= {"scale/mean": splits.mean, "scale/deviation": splits.deviation}
    record = {
        "name": name,
        "shape": [shape.look_back, shape.horizon, shape.channels],
        "built": _built(name, shape),
        "channels": list(data.series.names),
    }
    save_tensors(folder / MODEL, tensors, record)
    atomic_write(folder / FORECAST, _forecast(model, data, splits))


@torch.no_grad()
def _forecast(model: nn.Module, data: Data, splits: Splits) -> str:
    """CSV: a row for each step after the end of the series, a column for each channel, in its units."""
    device = splits.test.rows.device
    last = (data.series.values[-data.look_back :] - splits.mean) / splits.deviation  # [L, C]
    steps = model.eval()(last.float().to(device)[None])[0].double().cpu() * splits.deviation + splits.mean
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *data.series.names])
    writer.writerows([number, *map("{:.7g}".format, row)] for number, row in enumerate(steps.tolist(), 1))
    return text.getvalue()


def _built(name: str, shape: Shape) -> str:
    """A digest of how a model of this name is built; training's settings play no part."""
    return digest(settings_of(name, shape, dataset="csv")["model"])


def load_model(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A finished run's model, and the mean and deviation [C] of the data it was trained on.

    Forecasts of (x - mean) / deviation, times deviation plus mean, are in the units of the file.

    Raises:
        ValueError: no finished run, a damaged file, or a model that is built otherwise by now.
    """
    if not (folder / MODEL).is_file():
        raise ValueError(f"{folder} holds no {MODEL}: give the folder of a finished run")
    tensors, record = load_tensors(folder / MODEL)
    shape = Shape(*record["shape"])
    if record.get("built") != _built(record["name"], shape):
        raise ValueError(f"{folder} holds a {record['name']} that is built otherwise by now: train it again")
    model = build(record["name"], shape, seed=0)
    weights = {name: value for name, value in tensors.items() if name.startswith("model/")}
    model.load_state_dict({name.removeprefix("model/"): value for name, value in weights.items()})
    return model.eval(), tensors["scale/mean"], tensors["scale/deviation"]


def save_tensors(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Tensors and a record that JSON takes, in one safetensors file, there whole or not at all."""
    from safetensors.torch import save

    whole = {name: value.contiguous() for name, value in tensors.items()}
    atomic_write(path, save(whole, metadata={"record": json.dumps(record, sort_keys=True)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_tensors`` wrote. Raises ValueError where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return tensors, json.loads(file.metadata()["record"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to train this run anew") from error
