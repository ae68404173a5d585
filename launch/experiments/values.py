"""Numbers of a result by name, as the tables name them.

perplexity, bits_per_byte          of the held-out text
parameters, state_bytes, flops_per_token, tokens_per_second
gradient_norm                      mean over the second half of the steps that were logged
gradient_norm_variance             over the same steps and without their trend, which the schedule makes
probe(NAME)                        of the looks into the memories in the second half of training, the mean
                                   over them and the layers (`error_of`: its standard error over the looks)
mean(A,B,...)                      of other names; nothing where one of them is missing
anything else                      a scalar of a task: "niah_single_1/choice/1024", "mqar/4/512"

A result that was written before looks were averaged and the trend was taken out has its last look and the
plain variance instead (`is_old`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

__all__ = ["error_of", "is_old", "value_of"]


def value_of(result: Mapping[str, Any], name: str) -> float | None:
    """The number called ``name``, or None where the result has none."""
    function, _, rest = name.partition("(")
    if function == "mean" and rest:
        parts = [value_of(result, part) for part in rest.removesuffix(")").split(",")]
        known = [part for part in parts if part is not None]
        return fmean(known) if len(known) == len(parts) else None
    if function == "probe" and rest:
        return _probe(result, rest.removesuffix(")"))
    if name in _OWN:
        return _OWN[name](result)
    found = result["scalars"].get(name)
    return None if found is None else float(found)


def error_of(result: Mapping[str, Any], name: str) -> float | None:
    """Standard error of the number called ``name``: of looks, None of anything else and of a single look.

    Of a mean of looks the largest of its parts', which are of the same batches.
    """
    function, _, rest = name.partition("(")
    if function == "mean" and rest:
        parts = [error_of(result, part) for part in rest.removesuffix(")").split(",")]
        known = [part for part in parts if part is not None]
        return max(known) if known and len(known) == len(parts) else None
    if function != "probe":
        return None
    found = result["training"].get("looks", {}).get(rest.removesuffix(")"), {}).get("error")
    return None if found is None else float(found)


def is_old(result: Mapping[str, Any]) -> bool:
    """Whether it lacks what was averaged over looks and freed of its trend."""
    training = result["training"]
    norm = training.get("gradient_norm") or {}
    return bool(training["probes"] and "looks" not in training) or bool(norm and "detrended" not in norm)


def _probe(result: Mapping[str, Any], name: str) -> float | None:
    if name in (looks := result["training"].get("looks", {})):
        return float(looks[name]["mean"])
    found = [value for key, value in result["training"]["probes"].items() if key.endswith(f"/{name}")]
    return fmean(found) if found else None


def _validation(result: Mapping[str, Any], key: str) -> float | None:
    found = result.get("validation", {}).get(key)
    return None if found is None else float(found)


def _perplexity(result: Mapping[str, Any]) -> float | None:
    loss = _validation(result, "loss")
    return None if loss is None else math.exp(min(loss, 700.0))


def _tokens_per_second(result: Mapping[str, Any]) -> float | None:
    seconds = result["training"]["seconds_per_token"]
    return 1.0 / seconds if seconds else None


def _gradient(result: Mapping[str, Any], *keys: str) -> float | None:
    """The first of the keys that the result has."""
    found = result["training"].get("gradient_norm") or {}
    return next((float(found[key]) for key in keys if key in found), None)


_OWN: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "perplexity": _perplexity,
    "bits_per_byte": lambda result: _validation(result, "bits_per_byte"),
    "tokens_per_second": _tokens_per_second,
    "gradient_norm": lambda result: _gradient(result, "mean"),
    "gradient_norm_variance": lambda result: _gradient(result, "detrended", "variance"),
    "parameters": lambda result: float(result["model"]["parameters"]),
    "state_bytes": lambda result: float(result["model"]["state_bytes"]),
    "flops_per_token": lambda result: float(result["model"]["flops_per_token"]),
}
